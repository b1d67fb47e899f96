"""What is forgotten goes from everything made of it, stays away, and takes nothing else along."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.corpus.forgetting import PAIRS, URL, build, make
from tests.corpus.test_verify import edit_info, edit_table, kinds
from x2i import corpus
from x2i.base.errors import RecipeError, X2IError
from x2i.base.files import exclusive
from x2i.cli.main import app
from x2i.corpus import forget, place, tombstones
from x2i.corpus.verify import verify
from x2i.pipelines.engine import publish

FEEDS = {"text_to_image", "canny_to_image", "deblur", "inpaint", "few_shot_deblur", "few_shot_inpaint", "image_edit"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    return make(tmp_path_factory.mktemp("shared"))


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy to forget from, as the current directory."""
    shutil.copytree(made, tmp_path / "x")
    with contextlib.chdir(tmp_path / "x"):
        yield tmp_path / "x"


def image(name: str) -> str:
    return hashlib.sha256(Path("photos", name).read_bytes()).hexdigest()


def blobs(folder: str | Path = "corpus") -> dict[str, bytes]:
    """The bytes of every sample, by its key."""
    out = {}
    for row in corpus.open(folder).manifest.to_pylist():
        with Path(folder, row["shard"]).open("rb") as shard:
            shard.seek(row["offset"])
            out[row["key"]] = shard.read(row["size"])
    return out


def images(folder: str = "corpus") -> dict[str, set[str]]:
    return {r["key"]: set(r["images"]) for r in corpus.open(folder).manifest.to_pylist()}


def verdict(location: str, folder: str = "corpus") -> tuple[str | None, str | None]:
    (row,) = (r for r in corpus.open(folder).selection.to_pylist() if r["location"] == location)
    return row["stage"], row["reason"]


def whole(folder: str = "corpus") -> None:
    report = verify(folder, images=False, workers=1)  # no picture is ever encoded here
    assert report.ok, report.faults


def everything(folder: str) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def test_it_goes_from_all_that_was_made_of_it_and_no_other_byte_changes(root: Path) -> None:
    coffee, before, held = image("coffee.png"), blobs(), images()
    # the ready sample that has it as an input goes as a row, so that pairs with its picture go, too
    of_input = hashlib.sha256(Path("ready/chelsea.jpg").read_bytes()).hexdigest()
    gone = {key for key, originals in held.items() if originals & {coffee, of_input}}
    tasks = {r["key"]: r["task_type"] for r in corpus.open("corpus").manifest.to_pylist()}
    assert {tasks[k] for k in gone} == FEEDS
    inodes = {p.stat().st_ino for p in Path("corpus/shards").iterdir()}
    done = forget.forget("corpus", [coffee])
    whole()
    after = blobs()
    assert after == {k: b for k, b in before.items() if k not in gone}
    assert not any(coffee in originals for originals in images().values())
    assert not any(coffee.encode() in p.read_bytes() for p in Path("corpus/shards").iterdir())
    assert sum(done.samples.values()) == len(gone) and set(done.samples) == FEEDS
    kept = [p for p in Path("corpus/shards").iterdir() if p.stat().st_ino in inodes]
    assert len(kept) == done.untouched > 0 and done.dropped == 2
    info = corpus.open("corpus").info
    assert info["forgotten"] == [{"image_id": coffee, "why": "asked"}]
    assert [s["name"] for s in info["shards"]] == [f"shards/{i:05d}.tar" for i in range(len(info["shards"]))]
    assert done.seconds < 20


def test_its_rows_say_so_and_nothing_else_of_it(root: Path) -> None:
    whose = {r["location"]: r for r in corpus.open("corpus").selection.to_pylist()}
    forget.forget("corpus", [image("coffee.png")])
    rows = {r["location"]: r for r in corpus.open("corpus").selection.to_pylist()}
    assert rows.keys() == whose.keys()
    for location in ("coffee.png", "edits.jsonl#1"):  # its own row, and that of which it was an input
        row = rows[location]
        assert (row["kept"], row["stage"], row["reason"]) == (False, "forgotten", "forgotten")
        assert (row["text"], row["meta"], row["inputs"]) == (None, "{}", [])
        assert all(v is None for a in ("image", "phash", "quality") for v in row[a].values())
        assert row["row_id"] == whose[location]["row_id"]
    # what had fallen to it stays where it is, and its other neighbours are as they were
    assert rows["coffee_smaller.jpg"] == whose["coffee_smaller.jpg"]
    assert rows["coffee_smaller.jpg"]["survivor"] == rows["coffee.png"]["row_id"]
    assert rows["chelsea.png"] == whose["chelsea.png"]


def test_a_rebuild_is_idle_and_does_not_bring_it_back(root: Path) -> None:
    done = forget.forget("corpus", [image("coffee.png")])
    before = everything("corpus")
    again = build(root)
    assert again.idle and again.digest == done.digest
    assert everything("corpus") == before


@pytest.mark.parametrize("change", [("    perceptual: {bits: 6}\n", ""), ("license:", "seed: 5\nlicense:")])
def test_a_changed_recipe_does_not_bring_it_back_either(root: Path, change: tuple[str, str]) -> None:
    coffee = image("coffee.png")
    forget.forget("corpus", [coffee])
    shutil.rmtree("lake/recipes")
    assert not build(root, change).idle
    whole()
    assert not any(coffee in originals for originals in images().values())
    assert verdict("coffee.png") == ("forgotten", "forgotten")
    assert corpus.open("corpus").info["forgotten"] == [{"image_id": coffee, "why": "asked"}]


def test_a_corpus_built_afresh_is_the_one_from_which_it_was_taken(root: Path) -> None:
    """Taking samples out, and not putting them in, come to the same bytes."""
    done = forget.forget("corpus", [image("coffee.png"), image("camera.png")])
    fresh = build(root, out="fresh")
    assert fresh.groups_built > 0 and fresh.digest == done.digest
    assert blobs("fresh") == blobs()
    whole("fresh")
    there, here = (corpus.open(c).info for c in ("fresh", "corpus"))
    assert [there[k] for k in ("counts", "funnel", "forgotten", "files")] == [
        here[k] for k in ("counts", "funnel", "forgotten", "files")
    ]


def test_other_corpora_on_the_lake_obey_without_building_anything(root: Path) -> None:
    build(root, out="second")
    done = forget.forget("corpus", [image("coffee.png")])
    second = build(root, out="second")
    assert second.groups_built == 0 and second.digest == done.digest
    whole("second")
    assert build(root, out="second").idle


def test_the_corpus_keeps_its_tombstones_where_the_lake_has_lost_them(root: Path) -> None:
    done = forget.forget("corpus", [image("coffee.png")])
    Path("lake/forgotten.jsonl").unlink()
    assert build(root).digest == done.digest
    assert tombstones.of_lake(Path("lake")) == {image("coffee.png"): "asked"}


def test_a_second_time_changes_nothing_and_the_order_does_not_matter(root: Path) -> None:
    shutil.copytree("corpus", "other")
    first, second = image("coffee.png"), image("flower.png")
    forget.forget("corpus", [first])
    done = forget.forget("corpus", [second])
    before = everything("corpus")
    again = forget.forget("corpus", [first, second], why="licence")
    assert (again.images, again.already, again.digest) == ([], 2, done.digest)
    assert everything("corpus") == before
    forget.forget("other", [second])
    forget.forget("other", [first])
    assert everything("other") == before
    whole()


@pytest.mark.parametrize(("nth", "error"), [(1, OSError("no space")), (2, OSError("gone")), (2, KeyboardInterrupt())])
def test_killed_at_any_rename_it_leaves_the_old_corpus(
    root: Path, monkeypatch: pytest.MonkeyPatch, nth: int, error: BaseException
) -> None:
    before, replace = everything("corpus"), os.replace
    calls: list[Path] = []

    def fails(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == nth:
            raise error
        replace(source, target)

    monkeypatch.setattr(place.os, "replace", fails)
    with pytest.raises(type(error)):
        forget.forget("corpus", [image("coffee.png")])
    monkeypatch.setattr(place.os, "replace", replace)
    forget.put_right("corpus")
    assert everything("corpus") == before
    whole()
    assert sorted(p.name for p in root.glob(".corpus.*")) == [".corpus.lock"]
    forget.forget("corpus", [image("coffee.png")])
    whole()


def test_the_lock_of_a_build_keeps_it_out(root: Path) -> None:
    with exclusive("corpus", "building"), pytest.raises(X2IError, match="another process"):
        forget.forget("corpus", [image("coffee.png")])


def test_what_a_killed_build_left_is_gone_too(root: Path) -> None:
    left = Path(".corpus.building/0123/000000/00.tar")
    left.parent.mkdir(parents=True)
    left.write_bytes(Path("photos/coffee.png").read_bytes())
    forget.forget("corpus", [image("coffee.png")])
    assert not left.exists()


def test_groups_of_a_killed_build_are_not_used_once_one_of_their_images_is_forgotten(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    seed = ("license:", "seed: 5\nlicense:")
    with monkeypatch.context() as patch:
        patch.setattr(publish, "publish", killed)
        with pytest.raises(KeyboardInterrupt):
            build(root, seed)
    assert list(Path(".corpus.building").glob("*/000000"))
    tombstones.bury(Path("lake"), {image("coffee.png"): "asked"})  # by way of another corpus
    assert build(root, seed).groups_built > 0
    assert not any(image("coffee.png") in originals for originals in images().values())
    whole()


def test_nothing_is_built_while_it_cannot_be_told_what_was_forgotten(root: Path) -> None:
    Path("lake/forgotten.jsonl").write_text('{"image_id": 3')
    with pytest.raises(X2IError, match=r"forgotten\.jsonl: damaged"):
        build(root)


def test_rows_that_lose_their_partners_say_so(tmp_path: Path) -> None:
    make(tmp_path, PAIRS)
    with contextlib.chdir(tmp_path):
        pairs = {r["location"]: r["images"] for r in corpus.open("corpus").manifest.to_pylist()}
        anchor, (_, partner, *_) = next((k, v) for k, v in pairs.items() if k.endswith("png"))
        done = forget.forget("corpus", [partner])
        assert done.lost == 1
        assert verdict(anchor) == ("forgotten", "lost_samples")
        (row,) = (r for r in corpus.open("corpus").selection.to_pylist() if r["location"] == anchor)
        assert row["text"] and row["image"]["width"]  # it is another image: nobody asked for that
        whole()
        assert build(tmp_path).idle
        assert build(tmp_path, out="fresh").digest == done.digest
        assert verdict(anchor, "fresh") == ("forgotten", "lost_samples")
        whole("fresh")


def test_unknown_images_are_refused_with_what_comes_near(root: Path) -> None:
    coffee = image("coffee.png")
    typed = coffee[:20] + ("0" if coffee[20] != "0" else "1") + coffee[21:]
    with pytest.raises(RecipeError, match=f"no row holds the image .* the nearest: {coffee} \\(1 of its digits"):
        forget.find("corpus", sha256=[typed])
    with pytest.raises(RecipeError, match="too short"):
        forget.find("corpus", sha256=[coffee[:5]])
    with pytest.raises(RecipeError, match="addresses are under image_url"):
        forget.find("corpus", urls=["https://photos.example/other"])
    with pytest.raises(RecipeError, match=r"has no row 'cofee.png'; near: coffee.png"):
        forget.find("corpus", sources=["photos"], locations=["cofee.png"])
    with pytest.raises(RecipeError, match="the corpus has photos, ready"):
        forget.find("corpus", sources=["web"])
    with pytest.raises(RecipeError, match="one word"):
        forget.forget("corpus", [coffee], why="Jane Doe, 3 May")
    key = next(k for k in images() if k.startswith(coffee[:16]))
    with pytest.raises(RecipeError, match=f"a sample's key, of the image {coffee}"):
        forget.find("corpus", sha256=[key])


def test_images_are_found_by_address_by_source_and_by_looks(root: Path) -> None:
    (by_url,) = forget.find("corpus", urls=[URL])
    assert by_url.image_id == image("flower.png")
    (one,) = forget.find("corpus", sources=["photos"], locations=["copy.png"])
    assert (one.image_id, one.rows) == (image("astronaut.png"), 3)  # the picture, its copy, the ready sample's input
    assert {m.image_id for m in forget.find("corpus", sources=["ready"])} >= {
        image("coffee.png"),
        image("astronaut.png"),
    }
    forget.forget("corpus", [by_url.image_id])
    (again,) = forget.find("corpus", urls=[URL])  # the row no longer tells, the lake does
    assert again.forgotten


def invoke(*arguments: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["forget", "corpus", *arguments, "--json"])
    assert done.exit_code == 0, done.output or done.exception
    return dict(json.loads(done.stdout))


def test_the_command_tells_what_would_go_then_does_it(root: Path) -> None:
    before = everything("corpus")
    plan = invoke("--near", "photos/coffee_smaller.jpg", "--bits", "4", "--dry-run")
    assert everything("corpus") == before and not Path("lake/forgotten.jsonl").exists()
    found = {m["image_id"]: m["distance"] for m in plan["matches"]}
    assert found == {image("coffee_smaller.jpg"): 0, image("coffee.png"): 0}
    done = invoke("--near", "photos/coffee_smaller.jpg", "--bits", "4", "--why", "takedown", "--yes")
    assert done["samples"] == plan["samples"] and done["changed"]
    assert tombstones.of_lake(Path("lake")) == dict.fromkeys(found, "takedown")
    assert not invoke("--near", "photos/coffee_smaller.jpg", "--bits", "0", "--yes")["changed"]
    refused = CliRunner().invoke(app, ["forget", "corpus", "--sha256", image("flower.png")], input="n\n")
    assert refused.exit_code == 1
    assert verdict("flower.png") == (None, None)
    whole()


def test_without_hashes_looks_cannot_be_asked_for(root: Path) -> None:
    edit_info(Path("corpus"), lambda info: info["annotators"].pop(1))
    done = CliRunner().invoke(app, ["forget", "corpus", "--near", "photos/coffee.png", "--dry-run"])
    assert "add `phash:`" in str(done.exception)


def test_a_lake_out_of_reach_is_said(root: Path) -> None:
    Path("lake").rename("away")
    done = forget.forget("corpus", [image("coffee.png")])
    assert done.lake is None and any("--lake" in note for note in done.notes)
    whole()
    again = forget.forget("corpus", [image("coffee.png")], lake="away")
    assert again.lake == "away" and image("coffee.png") in tombstones.of_lake(Path("away"))


def test_a_folder_is_asked_for_and_not_a_link_to_one(root: Path) -> None:
    Path("link").symlink_to("corpus")
    for path in ("link", "memory://corpus"):
        with pytest.raises(RecipeError, match=r"link: name the folder|local folder"):
            forget.forget(path, [image("coffee.png")])
    with contextlib.chdir("corpus"):
        assert forget.would_go(".", ["0" * 64]).rows == 0


def test_a_damaged_corpus_is_left_alone(root: Path) -> None:
    rows = corpus.open("corpus").manifest.to_pylist()
    row = next(r for r in rows if (r["location"], r["task_type"]) == ("chelsea.png", "deblur"))
    data = bytearray(Path("corpus", row["shard"]).read_bytes())
    data[row["offset"] + 700] ^= 1
    Path("corpus", row["shard"]).write_bytes(data)
    mates = [r for r in corpus.open("corpus").manifest.to_pylist() if r["shard"] == row["shard"]]
    partner = next(r["images"][1] for r in mates if len(r["images"]) > 1 and r["key"] != row["key"])
    before = everything("corpus")
    with pytest.raises(X2IError, match="damaged"):
        forget.forget("corpus", [partner])
    assert everything("corpus") == before


@pytest.mark.parametrize(
    ("kind", "name", "change"),
    [
        ("forgotten_told", "selection.parquet", lambda r: r.update(text="a cup of coffee")),
        ("forgotten_told", "selection.parquet", lambda r: r["phash"].update(hash=7)),
        ("forgotten_row", "selection.parquet", lambda r: r.update(stage="where", reason="safe")),
    ],
)
def test_verify_finds_what_was_not_forgotten(
    root: Path, kind: str, name: str, change: Callable[[dict[str, Any]], None]
) -> None:
    forget.forget("corpus", [image("coffee.png")])
    edit_table(Path("corpus"), name, lambda rows: change(next(r for r in rows if r["location"] == "coffee.png")))
    assert kind in kinds(verify("corpus"))


def test_verify_finds_a_sample_of_a_forgotten_image(root: Path) -> None:
    edit_info(Path("corpus"), lambda info: info.update(forgotten=[{"image_id": image("coffee.png"), "why": "asked"}]))
    assert {"forgotten_kept", "forgotten_row", "seal"} <= kinds(verify("corpus"))


def test_a_report_shows_no_picture_of_it(root: Path) -> None:
    from x2i.corpus.audit import audit

    forget.forget("corpus", [image("coffee.png")])
    asked: list[str] = []

    def thumbnails(rows: list[dict[str, Any]]) -> dict[str, bytes]:
        asked.extend(r["location"] for r in rows)
        return {}

    written = audit("corpus", None, thumbnails)
    assert written.sound
    assert "coffee_smaller.jpg" in asked and "coffee.png" not in asked
    notes = forget.forget("corpus", [image("flower.png")]).notes
    assert any("corpus-report.html" in note for note in notes)
