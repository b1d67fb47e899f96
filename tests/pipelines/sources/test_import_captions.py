"""Importers of published caption, subject, control and understanding datasets, each on its published layout."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from tests import corpora
from tests.pipelines.source_files import photo, problems, read, serve
from tests.pipelines.sources import published_captions as published
from x2i.base.errors import RecipeError
from x2i.corpus.sample import placeholder
from x2i.corpus.verify import verify
from x2i.pipelines import registry
from x2i.pipelines import sources as source_files
from x2i.pipelines.sources._published import elements
from x2i.pipelines.sources._text import Malformed
from x2i.pipelines.sources.base import Row, Source


def source(kind: str, **options: Any) -> Source:
    cls = registry.find(source_files, kind, Source, "test")
    return cls(cls.Config(**options))


def rows(kind: str, path: Path, **options: Any) -> dict[str, Row]:
    """All rows by location, after the checks of what every source promises."""
    return {r.location: r for r in read(source(kind, path=str(path), **options))}


def reasons(found: dict[str, Row]) -> dict[str, str]:
    return problems(list(found.values()))


# ---------------------------------------------------------------------------------------------- img2dataset


def test_grit_keeps_phrases_boxes_and_original_bytes(tmp_path: Path) -> None:
    found = rows("grit", published.grit(tmp_path / "grit"))
    first = found["00000.tar#000000000.jpg"]
    assert first.data == published.picture(0) and first.text == published.GRIT_CAPTION
    start, end, *box, score = first.meta["noun_chunks"][0]
    assert first.meta["caption"][start:end] == "wire hanger" and box == [0.0, 0.03, 0.96, 0.97] and score == 0.675
    assert first.meta["id"] == 1795296605919 and first.meta["clip_similarity_vitl14"] == 0.2958984375
    silent = found["00000.tar#000000001.jpg"]
    assert silent.text is None and silent.problem is None and silent.meta["ref_exps"] is None
    assert (
        found["00000.tar#000000002.jpg"].data == published.CORRUPT
    )  # what is wrong with it is seen when it is decoded
    assert reasons(found) == {"00000.tar#000000003.jpg": "bad_metadata", "00000.tar#000000004": "not_downloaded"}
    assert found["00000.tar#000000004"].meta["error_message"] == "HTTP Error 404: Not Found"
    assert found["00001.tar#000010000.jpg"].text == published.GRIT_CAPTION and len(found) == 6


@pytest.mark.parametrize("caption_col", ["re_caption", "org_caption"])
@pytest.mark.parametrize("text", ["recaption", "original"])
def test_recap_datacomp_has_both_captions_whichever_img2dataset_called_caption(
    tmp_path: Path, caption_col: str, text: str
) -> None:
    found = list(rows("recap_datacomp", published.recap_datacomp(tmp_path / "r", caption_col), text=text).values())
    long, short = "A photograph, numbered 0, that a model describes at length.", "IMG_0"
    assert (found[0].meta["re_caption"], found[0].meta["org_caption"]) == (long, short)
    assert found[0].text == (long if text == "recaption" else short)
    assert [r.text is None for r in found[:3]] == [False, text == "recaption", text == "original"]
    assert [r.problem.reason for r in found if r.problem] == ["not_downloaded"]
    assert found[0].meta["re_clip_score"] == 0.21 and found[0].meta["org_clip_score"] is None


def test_parquet_with_images_inside_is_read_where_there_is_no_tar(tmp_path: Path) -> None:
    ours = {"url": "https://example.org/0", "re_caption": "long", "org_caption": "short", "re_clip_score": 0.2}
    fetched = {**ours, "key": "000000000", "status": "success", "error_message": None, "jpg": photo("coffee")}
    failed = {**ours, "key": "000000001", "status": "failed_to_download", "error_message": "404", "jpg": None}
    pq.write_table(pa.Table.from_pylist([fetched, failed]), tmp_path / "00000.parquet")
    found = rows("recap_datacomp", tmp_path, text="original")
    assert found["00000.parquet#0"].data == photo("coffee") and found["00000.parquet#0"].text == "short"
    assert found["00000.parquet#1"].problem.detail == "404"  # type: ignore[union-attr]
    addresses = tmp_path / "addresses"
    addresses.mkdir()
    pq.write_table(pa.Table.from_pylist([ours]), addresses / "train-00000.parquet")
    with pytest.raises(
        RecipeError, match="no column 'jpg'.*with img2dataset first"
    ):  # nothing is downloaded from 10^9 addresses by the way
        list(source("recap_datacomp", path=str(addresses)).plan())


# --------------------------------------------------------------------------------------------- subject pairs


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_a_shard_whose_tar_was_lost_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = published.grit(tmp_path / "grit")
    assert list(source("grit", path=str(folder)).plan()) and not caplog.text
    (folder / "00000.tar").unlink()
    assert len(list(source("grit", path=str(folder)).plan())) == 1
    assert "1 Parquet files have no tar beside them (00000.parquet" in caplog.text


def test_subjects200k_cuts_composites_into_tiles_both_ways(tmp_path: Path) -> None:
    found = rows("subjects200k", published.subjects200k(tmp_path / "data"))
    assert len(found) == 14
    first, other = "train-00000-of-00002.parquet#0.left", "train-00000-of-00002.parquet#0.right"
    one, two = found[first], found[other]
    assert one.data is not None and two.data is not None
    assert one.data.startswith(b"\x89PNG") and "PNG" in one.meta["reencoded"]
    assert one.inputs == [(other, two.data)] and two.inputs == [(first, one.data)]
    whole = pixels(published.composite(0, 1, ".jpg"))
    assert np.array_equal(pixels(one.data), whole[8:520, 8:520])
    assert np.array_equal(pixels(two.data), whole[8:520, 536:1048])
    assert two.text == f"On a shelf, at dusk, number 0. Show the same Moon Lamp as in {placeholder(1)}."
    assert two.meta["instruction"] == two.text and two.meta["task_type"] == "subject_driven"
    assert two.meta["quality_assessment"]["imageQuality"] == 5 and two.meta["description"]["category"] is None
    left = {k.removesuffix(".left"): v for k, v in reasons(found).items() if k.endswith(".left")}
    assert list(left.values()) == ["low_quality", "low_quality", "truncated", "not_a_composite"]
    nameless = found["train-00001-of-00002.parquet#1.left"]
    assert nameless.text is None and nameless.problem is None and nameless.data is not None


def test_subjects200k_choices_and_the_third_collection(tmp_path: Path) -> None:
    folder = published.subjects200k(tmp_path / "data")
    right = rows("subjects200k", folder, outputs="right", collections=["collection_1"])
    assert [r.location for r in right.values() if not r.problem] == ["train-00000-of-00002.parquet#1.right"]
    assert list(reasons(right).values()).count("other_collection") == 6
    unrated = rows("subjects200k", folder, outputs="right", min_quality=0)
    assert list(reasons(unrated).values()) == ["truncated", "not_a_composite"]
    raw = {"image_descriptions": {"descriptive_style": {"left_image": "Left words.", "right_image": "Right words."}}}
    record = {
        "collection": "collection_3",
        "image": {"bytes": published.composite(0, 1, ".jpg", 1024, 0), "path": None},
        "quality_assessment": {"compositeStructure": 5, "objectConsistency": 5, "imageQuality": 5},
        "description": {"item": None, "description_0": None, "description_1": None},
        "raw_json": json.dumps(raw),
    }
    pq.write_table(pa.Table.from_pylist([record]), tmp_path / "c3.parquet")
    third = rows("subjects200k", tmp_path / "c3.parquet")["c3.parquet#0.right"]
    assert third.text == f"Right words. Show the same subject as in {placeholder(1)}."
    assert third.data is not None and pixels(third.data).shape == (1024, 1024, 3)


def test_syncd_pairs_the_pictures_of_a_group(tmp_path: Path) -> None:
    folder = published.syncd(tmp_path / "syncd")
    found = rows("syncd", folder)
    name = "metadata_with_scores.json#{}".format
    first = found[name("0.0")]
    assert first.data == published.picture(20) and first.inputs == [("rigid/obj_1.jpg", published.picture(21))]
    assert first.text == f"A toy robot in place 0. The object is the one in {placeholder(1)}."
    assert first.meta["masks"] == ["rigid/masks/obj_0.jpg", "rigid/masks/obj_1.jpg"]
    assert (first.meta["output"], first.meta["inputs"]) == (0, [1]) and first.meta["task_type"] == "subject_driven"
    assert reasons(found) == {
        name("1.0"): "missing_image", name("1.1"): "missing_image", name("3.0"): "bad_metadata", name("3.1"): "bad_metadata",
    }  # fmt: skip
    two = rows("syncd", folder, references=2)[name("0.2")]
    assert [n for n, _ in two.inputs] == ["rigid/obj_0.jpg", "rigid/obj_1.jpg"]
    assert two.text == f"A toy robot in place 2. The object is the one in {placeholder(1)} and {placeholder(2)}."


def test_syncd_filters_by_its_scores(tmp_path: Path) -> None:
    folder = published.syncd(tmp_path / "syncd")
    found = rows("syncd", folder, min_similarity=0.7, min_aesthetics=6.05)
    name = "metadata_with_scores.json#{}".format
    assert found[name("0.1")].meta["inputs"] == [2]  # 0 is below the aesthetics
    assert reasons(found)[name("0.0")] == "low_aesthetics"
    assert rows("syncd", folder, min_similarity=0.7)[name("0.0")].meta["inputs"] == [2]  # 0.5 to 1, but 0.9 to 2
    assert reasons(found)[name("2.0")] == "low_similarity"  # 0.99: a copy


# -------------------------------------------------------------------------------------------------- JourneyDB


@pytest.mark.parametrize("unpacked", [False, True])
def test_journeydb_finds_the_annotations_of_each_archive(tmp_path: Path, unpacked: bool) -> None:
    folder = published.journeydb(tmp_path / "train", unpacked)
    found = rows("journeydb", folder)
    first = found["000.tgz#000/aa-1.jpg"]
    assert first.data == published.picture(30) and first.text == "A thing called aa-1 in studio light."
    assert first.meta["prompt"].endswith("--ar 1:1") and first.meta["Task1"]["Style"] == ["studio"]
    assert [found[f"000.tgz#000/aa-{i}.jpg"].text for i in (2, 3)] == [None, None]
    stranger = found["001.tgz#001/bb-9.jpg"]
    assert (stranger.text, stranger.meta, stranger.problem) == (None, {}, None)
    assert found["001.tgz#001/bb-2.jpg"].data == published.CORRUPT
    assert reasons(found) == {"001.tgz#./001/bb-3.jpg": "missing_image", "001.tgz#(annotation 7)": "bad_metadata"}
    prompts = rows("journeydb", folder, text="prompt")
    assert prompts["000.tgz#000/aa-2.jpg"].text == "aa-2, studio light, 8k --ar 1:1"
    assert prompts["000.tgz#000/aa-3.jpg"].text is None


def test_journeydb_whose_files_are_cut_loses_no_row(tmp_path: Path) -> None:
    folder = published.journeydb(tmp_path / "train")
    archive, annotations = folder / "imgs" / "000.tgz", folder / "train_anno_realease_repath.jsonl.tgz"
    archive.write_bytes(archive.read_bytes()[:4000])
    found = rows("journeydb", folder)
    assert found["000.tgz#000/aa-1.jpg"].text and "truncated_tar" in reasons(found).values()
    assert reasons(found)["000.tgz#./000/aa-3.jpg"] == "missing_image"
    annotations.write_bytes(annotations.read_bytes()[:100])
    found = rows("journeydb", folder)
    assert {r.problem.reason for r in found.values() if r.problem and r.location.startswith("001")} == {"unreadable"}
    annotations.unlink()
    with pytest.raises(RecipeError, match="no annotations"):
        list(source("journeydb", path=str(folder)).plan())


# --------------------------------------------------------------------------------------- records beside images


def test_sharegpt4v_becomes_messages(tmp_path: Path) -> None:
    folder = published.sharegpt4v(tmp_path / "s")
    found = rows("sharegpt4v", folder, images=str(folder / "data"), unit_rows=3)
    name = "sharegpt4v_instruct_gpt4-vision_cap100k.json#{}".format
    assert list(found) == [name(i) for i in range(8)]
    first = found[name(0)]
    assert first.data == published.picture(40) and first.text == "A caf\u00e9 table \u2014 with a cup."
    assert first.meta["messages"] == [
        {"role": "user", "content": "What do you see happening in this image?\n<image>"},
        {"role": "assistant", "content": first.text},
    ]
    assert first.meta["id"] == "2-coco/train2017/000000000009.jpg" and "conversations" not in first.meta
    assert reasons(found) == {
        name(2): "missing_image", name(3): "no_image", name(4): "bad_metadata", name(5): "bad_metadata",
        name(6): "bad_metadata",
    }  # fmt: skip
    assert [m["role"] for m in found[name(7)].meta["messages"]] == ["user", "assistant", "user", "assistant"]
    assert found[name(7)].meta["messages"][0]["content"] == "<image>\nHow many bowls?"
    moved = tmp_path / "elsewhere"
    (folder / "data" / "sam").rename(moved)
    found = rows("sharegpt4v", folder, images=str(folder / "data"), roots={"sam": str(moved)}, captions=False)
    assert found[name(1)].data == published.picture(41) and found[name(1)].text is None


def test_llava_layout_with_several_images_and_as_jsonl(tmp_path: Path) -> None:
    for n in ("coffee", "moon"):
        (tmp_path / f"{n}.jpg").write_bytes(photo(n))
    record = {
        "id": 7,
        "image": ["coffee.jpg", "moon.jpg"],
        "conversations": [{"from": "human", "value": "<image><image> Which?"}, {"from": "gpt", "value": "Neither."}],
    }
    (tmp_path / "a.jsonl").write_text("\n" + json.dumps(record) + "\n")
    row = rows("sharegpt4v", tmp_path)["a.jsonl#2"]
    assert row.data == photo("moon") and row.inputs == [("coffee.jpg", photo("coffee"))]


def test_multigen20m_is_map_to_image(tmp_path: Path) -> None:
    folder = published.multigen20m(tmp_path / "MultiGen-20M")
    found = rows("multigen20m", folder, unit_rows=4)
    name = "aesthetics_plus_all_group_canny_all.json#{}".format
    first = found[name(1)]
    assert first.data == published.picture(50) and first.meta["task_type"] == "canny_to_image"
    assert first.text == f"{placeholder(1)} canny edge to image: a woman in an orange suit" == first.meta["instruction"]
    path, data = first.inputs[0]
    assert (
        path == "conditions/aesthetics_6_25_plus_group_0_canny/control_0.jpg" and data == (folder / path).read_bytes()
    )
    assert (found[name(2)].text, found[name(2)].problem) == (None, None)
    assert reasons(found) == {name(3): "missing_image", name(4): "missing_image", name(6): "bad_metadata"}
    sketch = found["aesthetics_plus_all_group_hedsketch_all.json#1"]
    assert sketch.meta["task_type"] == "hedsketch_to_image" and "sketch to image: a cup" in (sketch.text or "")
    assert sketch.inputs[0][0] == "conditions/group_1_hedsketch/control_0.jpg"
    assert len(rows("multigen20m", folder, tasks=["hedsketch"])) == 1


def test_a_json_list_is_cut_like_json_itself_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [
        {"n": i, "text": '"],[{' + "\\" * (i % 3) + "\u4e2d\u00e9\U0001f600" * (i % 7), "l": [[i]]} for i in range(200)
    ]
    for chunk in (1, 7, 64, 4096):
        monkeypatch.setattr("x2i.pipelines.sources._published.CHUNK", chunk)
        for indent, ascii_only in ((None, True), (2, False)):
            data = json.dumps(values, indent=indent, ensure_ascii=ascii_only).encode()
            cut = list(elements(io.BytesIO(data)))
            assert [json.loads(p.data) for p in cut] == values and [p.number for p in cut] == list(range(200))
            assert all(data[p.start : p.start + len(p.data)] == p.data for p in cut)
            part = data[cut[5].start : cut[9].start + len(cut[9].data)]
            assert [json.loads(p.data) for p in elements(io.BytesIO(part), 5, True)] == values[5:10]
    for broken in (data[:-1], data[:-10], data[: cut[50].start], b"", b"{}"):
        with pytest.raises(Malformed):
            list(elements(io.BytesIO(broken)))


def test_a_list_that_is_cut_off_keeps_what_comes_before(tmp_path: Path) -> None:
    folder = published.sharegpt4v(tmp_path / "s")
    path = folder / "sharegpt4v_instruct_gpt4-vision_cap100k.json"
    path.write_bytes(path.read_bytes()[:900])
    found = rows("sharegpt4v", folder, images=str(folder / "data"), unit_rows=1)
    whole = [r for r in found.values() if r.data is not None]
    assert len(whole) == 2 and reasons(found)[f"{path.name}#(file)"] == "bad_metadata"


def test_a_list_that_grows_keeps_its_units_and_one_that_shrinks_its_rows(tmp_path: Path) -> None:
    folder = published.sharegpt4v(tmp_path / "s")
    path = folder / "sharegpt4v_instruct_gpt4-vision_cap100k.json"
    dialogues = source("sharegpt4v", path=str(path), images=str(folder / "data"), unit_rows=3)
    before = list(dialogues.plan())
    records = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps([*records, records[0]], indent=2, ensure_ascii=False), encoding="utf-8")
    after = list(dialogues.plan())
    assert [u.id for u in after][:2] == [u.id for u in before][:2] and after[2].id != before[2].id
    path.write_text("[]")
    assert [r.problem.reason for u in before for r in dialogues.read(u) if r.problem] == ["unreadable"] * 8


def test_rows_are_the_same_from_a_web_server(tmp_path: Path) -> None:
    folders = everything(tmp_path)
    with serve(tmp_path) as url:
        for kind in ("journeydb", "syncd", "multigen20m", "sharegpt4v", "grit"):
            there = f"{url}/{folders[kind].relative_to(tmp_path)}"
            assert read(source(kind, path=there)) == read(source(kind, path=str(folders[kind]))), kind


# -------------------------------------------------------------------------------------------------- end to end


def everything(root: Path) -> dict[str, Path]:
    """All datasets, by the kind of their source."""
    return {
        "grit": published.grit(root / "grit"),
        "recap_datacomp": published.recap_datacomp(root / "recap"),
        "subjects200k": published.subjects200k(root / "subjects"),
        "syncd": published.syncd(root / "syncd"),
        "journeydb": published.journeydb(root / "journeydb" / "train"),
        "sharegpt4v": published.sharegpt4v(root / "sharegpt4v"),
        "multigen20m": published.multigen20m(root / "multigen"),
    }


def test_every_importer_to_a_verified_corpus(tmp_path: Path) -> None:
    folders = everything(tmp_path)
    more: dict[str, dict[str, Any]] = {
        "sharegpt4v": {"images": "sharegpt4v/data"},
        "subjects200k": {"outputs": "right"},
    }
    recipe = {
        "name": "published",
        "lake": "lake",
        "out": "corpus",
        "sources": [
            {"kind": k, "name": k, "path": str(f.relative_to(tmp_path)), **more.get(k, {})} for k, f in folders.items()
        ],
        "select": {"dedup": {"exact": False}},
        "tasks": {"text_to_image": {}, "published": {}},
    }
    corpora.build(tmp_path, yaml.safe_dump(recipe))
    report = verify(tmp_path / "corpus", workers=1)
    assert report.ok, report.faults
    manifest = pq.read_table(tmp_path / "corpus" / "manifest.parquet").to_pylist()
    made: dict[str, list[str]] = {}
    for sample in manifest:
        made.setdefault(sample["source"], []).append(sample["task_type"])
    assert {k: sorted(v) for k, v in made.items()} == {
        "grit": ["text_to_image"] * 2,
        "recap_datacomp": ["text_to_image"] * 2,
        "subjects200k": ["subject_driven"] * 2,
        "syncd": ["subject_driven"] * 5,
        "journeydb": ["text_to_image"] * 2,
        "sharegpt4v": ["text_to_image"] * 3 + ["understanding"] * 3,
        "multigen20m": ["canny_to_image", "hedsketch_to_image"],
    }
    assert report.rows_in == 6 + 4 + 7 + 9 + 8 + 8 + 7  # none was lost on the way
    selection = pq.read_table(tmp_path / "corpus" / "selection.parquet").to_pylist()
    gone = {(r["source"], r["reason"]) for r in selection if r["reason"]}
    assert {
        ("grit", "not_downloaded"),
        ("grit", "missing_text"),
        ("grit", "truncated"),
        ("syncd", "missing_image"),
    } <= gone
    assert {("subjects200k", "low_quality"), ("journeydb", "missing_image"), ("multigen20m", "truncated")} <= gone
