"""All published layouts of pairs through one build to a verified corpus, whose pictures are the published bytes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from tests.pipelines.builds import build, recipe
from tests.pipelines.sources import published_pairs as published
from tests.pipelines.sources.test_import_pairs import LAYOUTS
from x2i import corpus
from x2i.corpus.verify import verify


def test_from_published_layouts_to_a_verified_corpus(tmp_path: Path) -> None:
    wanted: dict[tuple[str, str], published.Pair] = {}
    sources = []
    for layout, (kind, _, _) in LAYOUTS.items():
        pairs = getattr(published, layout)(tmp_path / layout)
        wanted |= {(layout, location): pair for location, pair in pairs.items()}
        sources.append({"kind": kind, "name": layout, "path": str(tmp_path / layout), "unit_rows": 4})
    path = recipe(
        tmp_path,
        sources=sources,
        annotators={},
        select={"dedup": {"exact": False}},  # two of SEED's sessions begin with the same turn
        tasks={"published": None},
    )
    result = build(path, "--workers", "2")
    assert result["samples"] == len(wanted)
    assert result["rows_in"] == len(wanted) + sum(len(reasons) for _, _, reasons in LAYOUTS.values())
    report = verify(tmp_path / "corpus")
    assert report.ok, report.faults
    seen, masked = set(), []
    for sample in corpus.open(tmp_path / "corpus"):
        pair = wanted[(place := (sample.provenance["source"], sample.provenance["location"]))]
        assert sample.output_image is not None and sample.output_image.data == pair.output
        assert [p.data for p in sample.input_images] == pair.inputs
        assert pair.text is None or pair.text in sample.instruction
        seen.add(place)
        if sample.mask is not None:
            masked.append(place[0])
            pixels, inside = np.asarray(sample.mask.open().convert("L")), published.region()
            rim = published.rim()
            assert (pixels[inside] == 255).all() and not pixels[~inside & ~rim].any()
    assert seen == set(wanted)
    assert Counter(masked) == {"ultraedit": 2, "magicbrush": 2, "magicbrush_test": 2, "viton_hd": 1}
