"""Exports in published layouts: what is written is what the corpus holds, and our importers read it back."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from tests import corpora
from tests.corpora import Built, build
from tests.pipelines.source_files import read
from x2i.base.errors import RecipeError
from x2i.cli.main import app
from x2i.corpus import export as exports
from x2i.corpus.corpus import Corpus
from x2i.corpus.export import Exported, export
from x2i.corpus.sample import Picture, Sample
from x2i.corpus.verify import verify
from x2i.pipelines.sources.multigen20m import MultiGen20M, MultiGen20MConfig
from x2i.pipelines.sources.sharegpt4v import ShareGPT4V, ShareGPT4VConfig
from x2i.pipelines.sources.x2i_jsonl import X2IJsonl, X2IJsonlConfig

RECIPE = corpora.RECIPE.replace(
    "  control:\n  restoration: {tasks: [deblur, inpaint]}\n",
    "  control:\n  restoration: {tasks: [deblur, derain]}\n  understanding:\n",
).replace("output:\n", "output:\n  carry: [image.format]\n")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(tmp_path_factory.mktemp("export"), RECIPE)


@pytest.fixture(scope="module")
def written(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """Exports of the corpus, each made once."""
    folder, done = tmp_path_factory.mktemp("written"), dict[str, Exported]()

    def get(format_: str) -> Exported:
        if format_ not in done:
            done[format_] = export(built.corpus, format_, folder / format_)
        return done[format_]

    return get


def samples(built: Built) -> dict[str, Sample]:
    return {s.key: s for s in Corpus(built.corpus)}


def provenance(told: Exported) -> list[dict[str, Any]]:
    return list(pq.read_table(told.out / "provenance.parquet").to_pylist())


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_omnigen_is_read_back_as_it_was(built: Built, written: Callable[[str], Exported]) -> None:
    told, there = written("omnigen"), samples(built)
    rows = read(X2IJsonl(X2IJsonlConfig(path=str(told.out / "x2i.jsonl"), name="back")))
    assert not any(r.problem for r in rows)
    assert len(rows) == told.records.total() == sum(s.output_image is not None for s in there.values())
    for row, origin in zip(rows, provenance(told), strict=True):
        sample = there[origin["key"]]
        assert sample.output_image
        assert row.data == sample.output_image.data
        assert [data for _, data in row.inputs] == [p.data for p in sample.input_images]
        assert (row.meta["task_type"], row.meta["instruction"]) == (sample.task_type, sample.instruction)
    assert told.left_out == {"describe: has no output image": told.left_out["describe: has no output image"]}


def test_omnigen_makes_the_same_corpus_again(written: Callable[[str], Exported], built: Built, tmp_path: Path) -> None:
    recipe = f"""\
name: again
lake: lake
out: corpus
sources: [{{kind: x2i_jsonl, name: back, path: {written("omnigen").out}/x2i.jsonl}}]
tasks: {{published: }}
"""
    again = build(tmp_path, recipe)
    assert not verify(again.corpus).faults

    def content(built: Built) -> list[Any]:
        made = [s for s in Corpus(built.corpus) if s.output_image]
        pictures = [[p.data for p in (*s.input_images, s.output_image) if p] for s in made]
        return sorted((s.task_type, s.instruction, p) for s, p in zip(made, pictures, strict=True))

    assert content(again) == content(built)


@pytest.mark.parametrize("format_", ["llava", "sharegpt4v"])
def test_dialogues_are_read_back_as_they_were(built: Built, written: Callable[[str], Exported], format_: str) -> None:
    told, there = written(format_), samples(built)
    rows = read(ShareGPT4V(ShareGPT4VConfig(path=str(told.out / f"{format_}.json"), name="back")))
    assert not any(r.problem for r in rows)
    assert len(rows) == told.records["describe"] > 0
    for row in rows:
        sample = there[row.meta["id"]]
        assert row.data == sample.input_images[-1].data
        said = [(m["role"], m["content"].replace("<image>\n", "<image>")) for m in row.meta["messages"]]
        assert said == [(m["role"], m["content"]) for m in sample.messages]
    first = json.loads((told.out / f"{format_}.json").read_text())[0]
    assert list(first) == ["id", "image", "conversations"]
    assert first["conversations"][0]["from"] == "human"
    assert first["conversations"][0]["value"].startswith("<image>\n")


def test_ms_swift_has_the_messages_as_they_are(built: Built, written: Callable[[str], Exported]) -> None:
    told, there = written("ms-swift"), samples(built)
    for record, origin in zip(lines(told.out / "swift.jsonl"), provenance(told), strict=True):
        sample = there[origin["key"]]
        assert record["messages"] == list(sample.messages)
        assert [(told.out / p).read_bytes() for p in record["images"]] == [p.data for p in sample.input_images]
        assert sum(m["content"].count("<image>") for m in record["messages"]) == len(record["images"])


def test_multigen_is_read_back_under_its_own_names(built: Built, written: Callable[[str], Exported]) -> None:
    told, there = written("multigen"), samples(built)
    texts = {r["location"]: r["text"] for r in Corpus(built.corpus).selection.to_pylist()}
    assert set(told.records) == {"canny_to_image", "deblur"}
    assert any(w.startswith("derain: is none") for w in told.left_out)
    rows = read(MultiGen20M(MultiGen20MConfig(path=str(told.out), name="back")))
    assert not any(r.problem for r in rows)
    assert {r.meta["task_type"] for r in rows} == {"canny_to_image", "blur_to_image"}
    origins = {(o["file"], o["record"]): o for o in provenance(told)}
    for row in rows:
        file, _, number = row.location.rpartition("#")
        origin = origins[f"json_files/{Path(file).name}", int(number) - 1]
        sample = there[origin["key"]]
        assert sample.output_image
        assert row.data == sample.output_image.data
        assert [data for _, data in row.inputs] == [sample.input_images[0].data]
        assert row.meta["prompt"] == texts[origin["location"]]
    record = lines(told.out / "json_files/aesthetics_plus_all_group_canny_all.json")[0]
    assert list(record) == ["source", "prompt", "control_canny"]


def test_each_picture_is_written_once_under_its_content(built: Built, written: Callable[[str], Exported]) -> None:
    told = written("omnigen")
    files = [p for p in (told.out / "images").rglob("*") if p.is_file()]
    assert len(files) == told.pictures
    assert sum(p.stat().st_size for p in files) == told.bytes
    pictures = [p for s in samples(built).values() if s.output_image for p in (*s.input_images, s.output_image)]
    assert len(files) == len({p.data for p in pictures}) < len(pictures)
    for path in files:
        assert hashlib.sha256(path.read_bytes()).hexdigest().startswith(path.stem)


def test_provenance_tells_where_each_record_comes_from(built: Built, written: Callable[[str], Exported]) -> None:
    there = samples(built)
    for origin in provenance(written("omnigen")):
        sample = there[origin["key"]]
        assert {n: origin[n] for n in ("image_id", "source", "location")} == {
            n: sample.provenance[n] for n in ("image_id", "source", "location")
        }
        assert json.loads(origin["carried"]) == sample.provenance["carried"] != {}
    text = (written("omnigen").out / "README.md").read_text()
    assert Corpus(built.corpus).digest in text
    assert "describe: has no output image" in text


def sample(messages: list[dict[str, Any]], objects: dict[str, Any] | None = None, pictures: int = 1) -> Sample:
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "PNG")
    picture = Picture(out.getvalue(), "png", 8, 8)
    return Sample("key", "locate", "", (picture,) * pictures, None, tuple(messages), {}, objects=objects or {})


def talk(tmp_path: Path, made: Sample) -> dict[str, Any] | str:
    told = Exported("llava", tmp_path)
    with exports._Folder(tmp_path, True, str, told) as folder:
        record = exports.FORMATS["llava"].record(made, folder)
    return record if isinstance(record, str) else record[1]


def test_boxes_are_written_out_where_a_layout_has_no_place_for_them(tmp_path: Path) -> None:
    boxes = [[0.1, 0.25, 0.5, 1.0], [0.0, 0.0, 0.3333, 0.5]]
    said = [
        {"role": "user", "content": "<image>Where is <ref-object>?"},
        {"role": "assistant", "content": "<bbox>, <bbox>"},
        {"role": "user", "content": "And <ref-object>?"},
        {"role": "assistant", "content": "I see no <ref-object>."},
    ]
    record = talk(tmp_path, sample(said, {"ref": ["a <bbox>", "a dog"], "bbox": boxes, "bbox_type": "norm1"}))
    assert isinstance(record, dict)
    assert [t["value"] for t in record["conversations"]] == [
        "<image>\nWhere is a <bbox>?",  # what a phrase says is not taken for a mark
        "[0.1, 0.25, 0.5, 1], [0, 0, 0.3333, 0.5]",
        "And a dog?",
        "I see no <ref-object>.",  # there is nothing that it stands for
    ]


def test_several_pictures_are_a_list_and_strange_messages_are_left_out(tmp_path: Path) -> None:
    said = [{"role": "user", "content": "<image><image>Which?"}, {"role": "assistant", "content": "The first."}]
    record = talk(tmp_path, sample(said, pictures=2))
    assert isinstance(record, dict)
    assert len(record["image"]) == 2
    assert record["conversations"][0]["value"] == "<image><image>Which?"
    tool = [{"role": "tool", "content": "<image>"}]
    assert talk(tmp_path, sample(tool)) == "has messages of another kind"


def test_only_the_tasks_that_are_asked_for(built: Built, tmp_path: Path) -> None:
    told = export(built.corpus, "omnigen", tmp_path / "some", ["deblur"])
    assert set(told.records) == {"deblur"}
    assert not told.left_out
    with pytest.raises(RecipeError, match="no task deblurr; it has canny_to_image, deblur"):
        export(built.corpus, "omnigen", tmp_path / "none", ["deblurr"])


def test_the_same_corpus_is_exported_the_same(built: Built, written: Callable[[str], Exported], tmp_path: Path) -> None:
    first, again = written("multigen").out, export(built.corpus, "multigen", tmp_path / "again").out

    def files(folder: Path) -> dict[str, bytes]:
        return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

    assert files(first) == files(again)


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(built: Built, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="nothing fits the format llava: deblur: has no messages"):
        export(built.corpus, "llava", tmp_path / "out", ["deblur"])
    with pytest.raises(RecipeError, match="no such format; there are llava, sharegpt4v"):
        export(built.corpus, "lava", tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("mine")
    with pytest.raises(RecipeError, match="holds something already"):
        export(built.corpus, "llava", tmp_path / "full")
    with pytest.raises(RecipeError, match="lies in the corpus's folder"):
        export(built.corpus, "llava", Path(built.corpus) / "exported")
    assert [p.name for p in tmp_path.iterdir()] == ["full"]


def test_a_failure_in_the_middle_leaves_nothing(built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        export(built.corpus, "omnigen", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_what_it_wrote(built: Built, tmp_path: Path) -> None:
    asked = ["export", str(built.corpus), "--format", "multigen", "--out", str(tmp_path / "out"), "--json"]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["records"]["deblur"] == len(lines(tmp_path / "out/json_files/aesthetics_plus_all_group_blur_all.json"))
    again = CliRunner().invoke(app, asked)
    assert isinstance(again.exception, RecipeError)
    help_ = CliRunner().invoke(app, ["export", "--help"]).output
    assert all(name in help_ for name in exports.FORMATS)
