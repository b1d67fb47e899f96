"""`regions`: GRIT's own boxes come out as `grounding`'s would, and tasks take them as such."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from tests.pipelines.annotating import run
from tests.pipelines.tasks.regions import PLACES, values
from tests.pipelines.tasks.rows import row
from x2i.corpus.sample import Sample
from x2i.pipelines.annotators.base import Batch, Item
from x2i.pipelines.annotators.grounding import Grounding
from x2i.pipelines.annotators.regions import Regions, RegionsConfig
from x2i.pipelines.tasks.segmentation import Segmentation, SegmentationConfig
from x2i.pipelines.tasks.subject import Subject, SubjectConfig

CAPTION = "🥄 A spoon, and a cup of espresso."
SPOON, CUP = ([*PLACES["coffee.png"][i][1]] for i in (1, 0))


def found(meta: dict[str, Any], **config: Any) -> dict[str, Any]:
    table = run(Regions(RegionsConfig(**config)), Batch([Item("0" * 64, None, meta=json.dumps(meta))]))
    (only,) = table.to_pylist()
    return dict(only)


def test_phrases_and_boxes_come_in_the_form_of_grounding() -> None:
    meta = {
        "caption": CAPTION,
        "noun_chunks": [[2, 9, *SPOON, 0.7], [15, 32, *CUP, 0.9], [2, 9, 0.0, 0.0, 0.1, 0.1, 0.5]],
    }
    out = found(meta)
    assert out["phrases"] == ["a cup of espresso", "A spoon", "A spoon"]
    assert np.allclose(out["boxes"][0], CUP) and out["scores"] == pytest.approx([0.9, 0.7, 0.5])
    assert [out["spans"][i]["text"] for i in out["phrase_index"]] == out["phrases"]
    assert [CAPTION[s["start"] : s["end"]] for s in out["spans"]] == ["A spoon", "a cup of espresso"]
    assert Grounding.columns.names == Regions.columns.names[:4]
    assert all(Grounding.columns.field(n) == Regions.columns.field(n) for n in Grounding.columns.names)
    assert found(meta, min_score=0.6)["scores"] == pytest.approx([0.9, 0.7])
    assert found({"caption": CAPTION, "ref_exps": meta["noun_chunks"]}, key="ref_exps") == out


@pytest.mark.parametrize(
    "entries",
    [None, "x", {}, [[2, 9, *SPOON]], [[2, 99, *SPOON, 0.9]], [[9, 2, *SPOON, 0.9]], [[2, 9, 0.5, 0, 0.5, 1, 0.9]],
     [[2, 9, "0", 0, 1, 1, 0.9]], [[2, 9, *SPOON, None]], [SPOON], [[-1, 9, *SPOON, 0.9]], [None]],
)  # fmt: skip
def test_what_is_unsound_is_left_out(entries: Any) -> None:
    empty: dict[str, list[Any]] = {name: [] for name in Regions.columns.names}
    assert found({"caption": CAPTION, "noun_chunks": entries}) == empty
    assert found({"noun_chunks": [[2, 9, *SPOON, 0.9]]}) == empty
    clipped = found({"caption": CAPTION, "noun_chunks": [entries, [2, 9, -0.005, *SPOON[1:3], 1.004, 1]]})
    assert clipped["boxes"][0] == pytest.approx([0, *SPOON[1:3], 1])


def test_tasks_take_them_as_they_take_groundings() -> None:
    meta = {"caption": CAPTION, "noun_chunks": [[15, 32, *CUP, 0.9], [2, 9, *SPOON, 0.7]]}
    on = row(
        "coffee.png", text=CAPTION, meta=meta, values={"regions": found(meta), "masks": values("coffee.png")["masks"]}
    )
    subject = Subject(
        SubjectConfig(
            boxes="regions.boxes", spans="regions.spans", text="rows.meta.caption", area=(0.001, 0.9), in_caption=1
        )
    )
    assert subject.reads["regions.spans"] == subject.reads["regions.boxes"] == "regions: {kind: regions}"
    assert "rows.meta.caption" not in subject.reads
    several = [s for s in subject.build(on) if isinstance(s, Sample)][-1]
    assert [s["object"] for s in several.provenance["parameters"]["subjects"]] == ["A spoon", "a cup of espresso"]
    assert "🥄" in several.instruction and ", and " in several.instruction
    painted = Segmentation(SegmentationConfig(boxes="regions.boxes", most=2))
    assert len([s for s in painted.build(on) if isinstance(s, Sample)]) == 2
