"""The picture that stands for a row in a report is the row's own: no map, no edit, no other row's."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.corpora import RECIPE, Built, build
from tests.corpus.auditing import edit_manifest, report
from x2i import corpus
from x2i.corpus.audit.gallery import kept_pictures, own_picture
from x2i.corpus.sample import Picture, Sample, placeholder
from x2i.pipelines.tasks.base import picture_of

#: Both ways between picture and map, and a conversation; each row but `cup` is stored smaller than it came.
MAPS = RECIPE[: RECIPE.index("tasks:")] + (
    "tasks:\n  text_to_image:\n  control: {tasks: [canny_to_image, image_to_canny]}\n  understanding: {tasks: [describe]}\n"
    "output: {shorter_side: 96, shard_samples: 8}\n"
)


@pytest.fixture(scope="module")
def maps(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(tmp_path_factory.mktemp("maps"), MAPS)


def likeness(built: Built, location: str, small: bytes) -> float:
    """Mean difference, of 255, between a picture and the source's file."""
    shown = Image.open(io.BytesIO(small)).convert("RGB")
    original = Image.open(built.root / "photos" / location).convert("RGB").resize(shown.size, Image.Resampling.LANCZOS)
    return float(np.abs(np.asarray(shown, float) - np.asarray(original, float)).mean())


def rows_of(built: Built) -> dict[str, str]:
    kept = corpus.open(built.corpus).sql("select row_id, location from selection where kept").fetchall()
    assert len(kept) >= 5
    return dict(kept)


@pytest.mark.parametrize(
    ("tasks", "surely"),
    [
        (["text_to_image", "image_to_canny", "canny_to_image", "describe"], None),
        (["text_to_image", "image_to_canny"], None),
        (["describe", "image_to_canny"], None),  # what a conversation is about
        (["image_to_canny", "canny_to_image"], ["cup.jpg"]),  # told by its bytes, on either side
        (["image_to_canny"], ["cup.jpg"]),
        (["canny_to_image"], ["cup.jpg"]),
    ],
)
def test_whatever_the_samples_are_a_row_is_shown_by_its_own_picture(
    maps: Built, tmp_path: Path, tasks: list[str], surely: list[str] | None
) -> None:
    mine = maps.copy(tmp_path)
    edit_manifest(mine, f"select * from old where task_type in {(*tasks, '')}")
    rows = rows_of(mine)
    found = kept_pictures(corpus.open(mine.corpus), rows, 320)
    assert sorted(rows[r] for r in found) == sorted(surely or rows.values())
    for row_id, small in found.items():
        assert likeness(mine, rows[row_id], small) < 10  # an edge map differs by 60 and more


def test_where_no_sample_shows_it_the_source_does(maps: Built, tmp_path: Path) -> None:
    mine = maps.copy(tmp_path)
    rows = rows_of(mine)
    edit_manifest(mine, "select * from old where task_type = 'image_to_canny'")
    (mine.corpus / "corpus.json").write_text(
        (mine.corpus / "corpus.json").read_text().replace(f'"samples": {len(rows) * 4}', f'"samples": {len(rows)}')
    )
    shown, _ = report(mine)
    thresholds = [a for t, a in shown.tags if t == "img" and a["alt"] in rows.values()]
    kinds = {str(a["src"])[:15] for a in thresholds}
    assert len(thresholds) > 5
    assert kinds == {"data:image/jpeg", "data:image/webp"}  # JPEGs are from the source, `cup` is from a shard


def picture(value: int) -> Picture:
    return picture_of(np.full((8, 12, 3), value, np.uint8))


OWN, OTHER = picture(200), picture(20)
ORIGINAL = {"image_id": hashlib.sha256(OWN.data).hexdigest()}


@pytest.mark.parametrize(
    ("inputs", "output", "provenance", "own"),
    [
        ((), OWN, {}, True),
        ((OTHER,), OWN, {}, False),  # which of the two it is cannot be told
        ((OTHER,), OWN, {"parameters": {"published": True}}, True),
        ((OTHER,), OWN, ORIGINAL, True),
        ((OWN,), OTHER, ORIGINAL, True),
        ((OWN, OTHER), None, {}, False),
        ((OTHER, OWN), None, {"parameters": {"published": True}, "input_ids": ["0"]}, True),
        ((OWN,), None, {}, True),
        ((OTHER,), None, {"others": [{"image_id": "0"}]}, False),
        ((OTHER,), None, {"parameters": {"degradation": "deblur"}}, False),
        ((OWN,), None, {"parameters": {"degradation": "clean"}}, True),
        ((OTHER,), None, {"parameters": "damaged", "others": []}, True),  # the one picture that is talked of
    ],
)
def test_a_row_s_own_picture_in_a_sample(
    inputs: tuple[Picture, ...], output: Picture | None, provenance: dict[str, Any], own: bool
) -> None:
    instruction = "" if output is None else "".join(placeholder(i + 1) for i in range(len(inputs)))
    found = own_picture(Sample("key", "any", instruction, inputs, output, provenance=provenance))
    assert (found is not None) == own
    if own and OWN in (*inputs, output):
        assert found == OWN
