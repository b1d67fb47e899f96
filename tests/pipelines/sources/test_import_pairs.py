"""Importers of published pairs: every row of each published layout, and each fault with its reason."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.pipelines.source_files import problems, read, serve
from tests.pipelines.sources import published_pairs as published
from x2i.base.errors import RecipeError
from x2i.corpus.sample import PLACEHOLDER, placeholder
from x2i.pipelines import registry, sources
from x2i.pipelines.sources.base import Row, Source

#: Each layout: its writer, its importer, its task types, and the reasons of the rows that cannot be used.
LAYOUTS: dict[str, tuple[str, set[str], list[str]]] = {
    "omniedit": (
        "omniedit",
        {"removal", "addition", "image_edit"},
        ["bad_instruction", "missing_image", "not_an_image"],
    ),
    "ultraedit": ("ultraedit", {"image_edit"}, ["bad_instruction"]),
    "magicbrush": ("magicbrush", {"image_edit"}, ["bad_mask"]),
    "magicbrush_test": ("magicbrush", {"image_edit"}, ["missing_image"]),
    "instruct_pix2pix": (
        "instruct_pix2pix",
        {"image_edit"},
        ["missing_image", "bad_instruction", "bad_instruction", "missing_image", "bad_metadata"],
    ),
    "instruct_pix2pix_table": ("instruct_pix2pix", {"image_edit"}, ["bad_instruction"]),
    "seed_data_edit": (
        "seed_data_edit",
        {"image_edit"},
        ["bad_instruction", "bad_metadata", "missing_image", "missing_image", "missing_image"],
    ),
    "viton_hd": ("viton_hd", {"virtual_try_on"}, ["missing_image", "bad_metadata", "no_output_image"]),
    "stylebooth": ("stylebooth", {"style_transfer"}, ["bad_instruction", "missing_image"]),
    "x2i": ("x2i", {"image_edit", "try_on", "text_to_iamge"}, ["missing_image", "bad_instruction"]),
}


def source(kind: str, path: Path | str, **options: Any) -> Source:
    cls = registry.find(sources, kind, Source, "test")
    return cls(cls.Config(path=str(path), **options))


def good(rows: list[Row]) -> dict[str, Row]:
    return {r.location: r for r in rows if r.problem is None}


def grey(data: bytes | None) -> np.ndarray:
    assert data is not None
    return np.asarray(Image.open(io.BytesIO(data)).convert("L"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_row_of_the_published_layout(layout: str, tmp_path: Path) -> None:
    kind, types, reasons = LAYOUTS[layout]
    want = getattr(published, layout)(tmp_path)
    rows = read(source(kind, tmp_path, unit_rows=3))
    found = good(rows)
    assert set(found) == set(want)
    assert list(problems(rows).values()) == reasons
    assert {r.meta["task_type"] for r in found.values()} == types
    for location, pair in want.items():
        row = found[location]
        assert row.data == pair.output and [d for _, d in row.inputs] == pair.inputs  # the published bytes
        assert row.text == row.meta["instruction"]
        assert sorted(PLACEHOLDER.findall(row.text or "")) == [str(i + 1) for i in range(len(pair.inputs))]
        if pair.text is not None and len(pair.inputs) == 1:
            assert row.text == f"{placeholder(1)} {pair.text}"
        json.dumps(row.meta, allow_nan=False)


def test_of_several_wordings_one_is_drawn_and_all_stay(tmp_path: Path) -> None:
    published.omniedit(tmp_path)
    (row, *_) = read(source("omniedit", tmp_path))
    wordings = row.meta["edited_prompt_list"]
    assert len(wordings) == 2 and (row.text or "").removeprefix(f"{placeholder(1)} ") in wordings
    assert row.meta["o_score"] == 8.49 and row.meta["omni_edit_id"] == "task_obj_remove_0"
    from x2i.pipelines.sources._pairs import worded

    drawn = [worded(wordings, "omniedit", f"id{i}", wordings) for i in range(200)]
    assert 70 < drawn.count(wordings[0]) < 130
    assert drawn == [worded(wordings, "omniedit", f"id{i}", wordings) for i in range(200)]


def test_ultraedit_has_masks_where_they_are_not_null(tmp_path: Path) -> None:
    published.ultraedit(tmp_path)
    rows = good(read(source("ultraedit", tmp_path)))
    assert [r.mask is not None for r in rows.values()] == [False, False, True, False, True]
    assert all(r.mask in (None, published.white_mask()) for r in rows.values())
    (first, *_) = rows.values()
    assert first.meta["ssim"] is None and first.meta["source_caption"] == "A desk." and first.meta["idx"] == 0


@pytest.mark.parametrize("alpha", [True, False])
def test_magicbrush_masks_become_white_where_the_edit_is(tmp_path: Path, alpha: bool) -> None:
    from x2i.pipelines.sources.magicbrush import region

    before = published.picture(400, "PNG")
    mask = grey(region(published.holed(before, alpha), before))
    inside, rim = published.region(), published.rim()
    assert (mask[inside] == 255).all()
    assert (mask[rim] == (127 if alpha else 0)).all() and not mask[~inside & ~rim].any()


def test_magicbrush_turns_keep_session_and_order(tmp_path: Path) -> None:
    published.magicbrush(tmp_path / "table")
    rows = read(source("magicbrush", tmp_path / "table"))
    assert [(r.meta["session"], r.meta["turn"]) for r in rows[:3]] == [("242679", i) for i in (1, 2, 3)]
    assert rows[1].inputs[0][1] == rows[0].data  # a turn begins where the one before ended
    assert [r.mask is not None for r in rows] == [True, True, False, False]
    published.magicbrush_test(tmp_path / "test")
    for path in (tmp_path / "test", tmp_path / "test/edit_turns.json"):
        rows = read(source("magicbrush", path))
        assert [(r.meta["session"], r.meta["turn"]) for r in rows] == [("100547", 1), ("100547", 2), ("7", 1)]
        assert rows[0].meta["global_descriptions"] == {"input": "a cat", "output": "a cat with a hat"}
        assert (grey(rows[0].mask)[published.region()] == 255).all()


def test_instruct_pix2pix_keeps_captions_and_similarities(tmp_path: Path) -> None:
    published.instruct_pix2pix(tmp_path)
    row = good(read(source("instruct_pix2pix", tmp_path)))["0000000/1006085889"]
    assert row.meta["input"] == "a road" and row.meta["output"] == "a snowy road" and row.meta["clip_sim_dir"] == 0.24


def test_seed_turns_are_rows(tmp_path: Path) -> None:
    published.seed_data_edit(tmp_path)
    rows = {r.location: r for r in read(source("seed_data_edit", tmp_path))}
    place = "multi_turn_editing/annotations/split_0001.jsonl"
    assert [rows[f"{place}#1:{i}"].meta["turn"] for i in (1, 2, 3)] == [1, 2, 3]
    assert f"{place}#1:4" not in rows  # a turn of nulls is none
    assert rows[f"{place}#1:3"].meta["session"] == f"{place}#1"
    anew = rows["auto_editing/openimages/annotations_GPT4V/split_0001.jsonl#1"]
    assert (anew.text or "").removeprefix(f"{placeholder(1)} ") in ("auto 3", "auto 3 anew")
    assert anew.meta["wordings"] == ["auto 3", "auto 3 anew"]
    # one part of the set, by its annotations
    alone = read(source("seed_data_edit", tmp_path / "real_editing/annotations"))
    assert [r.problem is None for r in alone] == [True, False]


def test_viton_hd_gives_maps_mask_and_paired_test(tmp_path: Path) -> None:
    published.viton_hd(tmp_path)
    rows = good(read(source("viton_hd", tmp_path)))
    assert rows["train_pairs.txt#1"].mask is None and rows["train_pairs.txt#2"].mask == published.white_mask()
    assert rows["train_pairs.txt#1"].meta["files"]["openpose_json"] == "train/openpose_json/00000_00_keypoints.json"
    paired = good(read(source("viton_hd", tmp_path, split="test", paired=True)))
    assert set(paired) == {"test_pairs.txt#1", "test_pairs.txt#2"}


def test_stylebooth_is_read_from_its_zip(tmp_path: Path) -> None:
    want = published.stylebooth(tmp_path / "stylebooth_dataset")
    with zipfile.ZipFile(tmp_path / "stylebooth_dataset.zip", "w") as archive:
        for path in sorted((tmp_path / "stylebooth_dataset").rglob("*.*")):
            archive.write(path, path.relative_to(tmp_path))
    rows = good(read(source("stylebooth", f"zip://stylebooth_dataset::{tmp_path}/stylebooth_dataset.zip")))
    assert {k: r.data for k, r in rows.items()} == {k: p.output for k, p in want.items()}
    row = rows["train.csv#2"]
    assert "Abstract Expressionism" in (row.text or "") and row.meta["ZhStyle"] == "风格"
    assert row.meta["SearchResult:DICT"].count(",") == 2


@pytest.mark.parametrize(
    ("lost", "said"),
    [("aa", "'aa' is not there"), ("ac", "'ac' is not there"), ("ad", "what follows the part 'ac' is not there")],
)
def test_a_missing_part_is_named_and_what_lies_before_it_is_used(tmp_path: Path, lost: str, said: str) -> None:
    want = published.x2i(tmp_path)
    whole = source("x2i", tmp_path / "pix2pix.jsonl")
    before = [u.id for u in whole.plan()]
    part = tmp_path / f"pix2pix/images.tar.gz.{lost}"
    kept = part.read_bytes()
    part.unlink()
    rows = read(whole)
    found = good(rows)
    assert set(found) < set(want) and all(r.data == want[k].output for k, r in found.items())
    missing = [r.problem for r in rows if r.problem and r.problem.reason != "bad_instruction"]
    assert missing and all(p.reason == "missing_part" and said in p.detail for p in missing)
    assert ("pix2pix.jsonl#1" in found) == (lost != "aa")
    part.write_bytes(kept)  # it arrives: the units are others, and are read again
    assert len(good(read(whole))) == 3
    assert [u.id for u in whole.plan()] != before  # its time is another


def test_unpacking_once_gives_the_same_rows(tmp_path: Path) -> None:
    published.x2i(tmp_path / "x2i")
    streamed = read(source("x2i", tmp_path / "x2i"))
    kept = source("x2i", tmp_path / "x2i", unpack=str(tmp_path / "kept"))
    assert [(r.location, r.data, r.inputs) for r in read(kept)] == [(r.location, r.data, r.inputs) for r in streamed]
    files = {p.name for p in (tmp_path / "kept").rglob("*.jpg")}
    assert {"000.jpg", "007.jpg", "a.jpg", "1.jpg"} <= files
    for path in (tmp_path / "x2i").rglob("*.tar.gz*"):  # from now on archives are only looked at
        status = path.stat()
        path.write_bytes(bytes(status.st_size))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert [r.data for r in read(kept)] == [r.data for r in streamed]
    assert not good(read(source("x2i", tmp_path / "x2i/pix2pix.jsonl")))


def test_where_archives_are_unpacked_is_no_part_of_what_a_source_is(tmp_path: Path) -> None:
    published.x2i(tmp_path)
    plain, kept = (source("x2i", tmp_path, **o) for o in ({}, {"unpack": "kept"}))  # nothing is annotated again
    assert plain.fingerprint == kept.fingerprint != source("x2i", tmp_path, drop="a/").fingerprint


def test_split_archives_behind_a_web_server(tmp_path: Path) -> None:
    want = published.x2i(tmp_path)
    with serve(tmp_path) as url:
        rows = read(source("x2i", f"{url}/pix2pix.jsonl"))
        told = good(read(source("x2i", f"{url}/laion-coco-aesthetic.jsonl")))
    assert {k: r.data for k, r in good(rows).items()} == {
        f"pix2pix.jsonl#{i}": want[f"pix2pix.jsonl#{i}"].output for i in (1, 2, 3)
    }
    assert len(told) == 3  # two from archives, one from a plain file


def test_a_split_tar_that_is_not_packed(tmp_path: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for i in range(6):
            info = tarfile.TarInfo(f"single/{i}.jpg")
            info.size = len(published.picture(i))
            tar.addfile(info, io.BytesIO(published.picture(i)))
    published.split(tmp_path / "single/single.tar", out.getvalue(), 5, ".part")
    told = [{"task_type": "t", "instruction": "x", "output_image": f"/share/X2I/single/{i}.jpg"} for i in (5, 0, 3)]
    published.lines(tmp_path / "a.jsonl", told)
    rows = read(source("x2i", tmp_path / "a.jsonl", drop="/share/X2I/"))
    assert [r.data for r in rows] == [published.picture(i) for i in (5, 0, 3)]
    assert all(r.problem for r in read(source("x2i", tmp_path / "a.jsonl", drop="/share/X2I/", archives=[])))


def test_a_damaged_archive_says_so(tmp_path: Path) -> None:
    published.x2i(tmp_path)
    path = tmp_path / "hr-viton/hr-viton.tar.gz"
    path.write_bytes(b"<html>sign in</html>" * 50)
    rows = read(source("x2i", tmp_path / "hr-viton.jsonl"))
    assert [r.problem.reason for r in rows if r.problem] == ["not_a_tar", "not_a_tar"]


@pytest.mark.parametrize("kind", sorted({k for k, _, _ in LAYOUTS.values()}))
def test_another_layout_is_a_mistake_of_the_recipe(kind: str, tmp_path: Path) -> None:
    published.table(tmp_path / "a.parquet", [{"image": published.cell(published.picture(0)), "text": "x"}], ("image",))
    with pytest.raises(RecipeError, match=re.escape(str(tmp_path)) + "|a.parquet: not the layout of"):
        list(source(kind, tmp_path).plan())
