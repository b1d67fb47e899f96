"""The folder source: texts from sidecars and metadata files, every fault a row, units that stay when files come."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.pipelines.source_files import NAMES, photo, problems, read, serve
from x2i.base.errors import RecipeError
from x2i.pipelines.sources.folder import Folder, FolderConfig


def folder(path: Path | str, **options: Any) -> Folder:
    return Folder(FolderConfig(path=str(path), **options))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    root = tmp_path / "my photos"
    for i, name in enumerate(NAMES):
        file = root / f"part {i % 2}" / f"{name}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(photo(name))
        file.with_suffix(".txt").write_text(f"  a picture: {name}\n")
    return root


def test_texts_come_from_sidecars_and_bytes_are_untouched(photos: Path) -> None:
    (photos / "part 0" / "UPPER.JPG").write_bytes(photo("moon", 32))
    (photos / "part 0" / "UPPER.JPG.TXT").write_text("\ufeffupper", encoding="utf-8")
    (photos / "part 0" / "bare.png").write_bytes(photo("page", 32, "PNG"))
    (photos / "part 0" / "blank.png").write_bytes(photo("page", 40, "PNG"))
    (photos / "part 0" / "blank.txt").write_text(" \n")
    (photos / "part 0" / ".hidden.jpg").write_bytes(photo("moon"))
    (photos / "notes.pdf").write_bytes(b"%PDF")
    source = folder(photos)
    rows = {r.location: r for r in read(source)}
    assert list(rows) == sorted(rows)
    assert rows["part 1/chelsea.jpg"].text == "a picture: chelsea"
    assert rows["part 1/chelsea.jpg"].data == photo("chelsea")
    assert rows["part 0/UPPER.JPG"].text == "upper"
    assert rows["part 0/bare.png"].text is None and rows["part 0/blank.png"].text is None
    assert not problems(list(rows.values()))
    assert len(rows) == len(NAMES) + 3 and source.ignored() == {"pdf": 1}
    assert source.name == "my_photos"


def test_json_sidecars_give_text_and_meta(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(photo("coffee"))
    (tmp_path / "a.json").write_text('{"caption": "coffee", "alt": "a cup", "score": NaN, "odd": "\\ud800"}')
    (row,) = read(folder(tmp_path))
    assert row.text == "coffee"
    assert row.meta == {"caption": "coffee", "alt": "a cup", "score": None, "odd": "?"}
    assert read(folder(tmp_path, text_key="alt"))[0].text == "a cup"
    (tmp_path / "a.txt").write_text("by hand")  # img2dataset writes both
    (row,) = read(folder(tmp_path))
    assert (row.text, row.meta["alt"]) == ("by hand", "a cup")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_metadata_files_as_imagefolder_has_them(tmp_path: Path, kind: str) -> None:
    inner = tmp_path / "train"
    (inner / "deep").mkdir(parents=True)
    (inner / "a.jpg").write_bytes(photo("coffee"))
    (inner / "deep" / "b.jpg").write_bytes(photo("rocket"))
    (inner / "nobody.jpg").write_bytes(photo("moon"))
    records = [
        {"file_name": "a.jpg", "text": "coffee", "author": "x"},
        {"file_name": "deep/b.jpg", "text": "rocket", "author": "y"},
        {"file_name": "a.jpg", "text": "the same picture, said otherwise", "author": "z"},
        {"file_name": "gone.jpg", "text": "gone", "author": "w"},
        {"file_name": "../../etc/passwd", "text": "?", "author": "v"},
        {"file_name": "", "text": "nameless", "author": "u"},
    ]
    path = inner / f"metadata.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps(r) for r in records) + "\n{not json\n")
    elif kind == "csv":
        lines = [",".join(records[0]), *(f'{r["file_name"]},"{r["text"]}",{r["author"]}' for r in records)]
        path.write_text("\n".join(lines) + "\nx.jpg,too,many,fields\n")
    else:
        pq.write_table(pa.Table.from_pylist(records), path)
    rows = read(folder(tmp_path))
    good = {r.location: (r.text, r.meta) for r in rows if not r.problem}
    third = next(location for location in good if "@" in location)
    assert third.startswith(f"train/a.jpg@train/metadata.{kind}#")
    assert good == {
        "train/a.jpg": ("coffee", {"text": "coffee", "author": "x"}),
        third: (records[2]["text"], {"text": records[2]["text"], "author": "z"}),
        "train/deep/b.jpg": ("rocket", {"text": "rocket", "author": "y"}),
        "train/nobody.jpg": (None, {}),
    }
    reasons = list(problems(rows).values())
    assert sorted(reasons) == ["bad_metadata"] * (2 if kind == "parquet" else 3) + ["missing_image"]
    with pytest.raises(RecipeError, match=r"text_key.*'title'.*author, text"):
        list(folder(tmp_path, text_key="title").plan())


def test_every_fault_is_a_row_with_its_reason(photos: Path) -> None:
    part = photos / "part 0"
    (part / "empty.jpg").write_bytes(b"")
    (part / "latin.jpg").write_bytes(photo("moon", 20))
    (part / "latin.txt").write_bytes("Müller".encode("latin-1"))
    (part / "broken.jpg").write_bytes(photo("moon", 21))
    (part / "broken.json").write_text('{"caption": ')
    (part / "number.jpg").write_bytes(photo("moon", 22))
    (part / "number.json").write_text('{"caption": 7}')
    (part / "orphan.txt").write_text("the picture was lost")
    (part / "README.txt").write_text("about this folder")
    (photos / "labels.txt").write_text("no picture lies beside this one")
    os.symlink(photos, part / "circle")
    os.symlink(part / "nowhere.jpg", part / "link.jpg")
    with open(os.fsencode(part) + b"/\xff.jpg", "wb") as file:
        file.write(photo("moon", 23))
    source = folder(photos)
    rows = read(source)
    assert problems(rows) == {
        "part 0/\\xff.jpg": "bad_name",
        "part 0/broken.jpg": "bad_metadata",
        "part 0/empty.jpg": "empty_file",
        "part 0/latin.jpg": "bad_text",
        "part 0/link.jpg": "unreadable",
        "part 0/number.jpg": "bad_text",
        "part 0/orphan.txt": "missing_image",
    }
    assert len(rows) == len(NAMES) + 7
    assert next(r for r in rows if r.location == "part 0/orphan.txt").text == "the picture was lost"
    assert next(r for r in rows if r.location == "part 0/latin.jpg").data == photo("moon", 20)  # hashed all the same
    assert source.ignored() == {"txt": 2}


def test_a_file_that_vanishes_after_the_plan_costs_one_row(photos: Path) -> None:
    source = folder(photos)
    (unit,) = source.plan()
    (photos / "part 1" / "rocket.jpg").unlink()
    rows = list(source.read(unit))
    assert problems(rows) == {"part 1/rocket.jpg": "unreadable"}
    assert str(photos) not in str(rows[-1].problem)


def test_a_new_file_changes_the_unit_that_it_falls_into(tmp_path: Path) -> None:
    for i in range(600):
        (tmp_path / f"{i * 7 % 600:04d}.jpg").write_bytes(b"x")
    before = {u.id: u.rows for u in folder(tmp_path, unit_files=16).plan()}
    sizes = [rows or 0 for rows in before.values()]
    assert len(before) > 20 and 12 < 600 / len(before) < 24 and max(sizes) <= 4 * 16
    changed = []
    for i in range(0, 600, 29):
        new = tmp_path / f"{i:04d}b.jpg"
        new.write_bytes(b"y")
        changed.append(len({u.id for u in folder(tmp_path, unit_files=16).plan()} - before.keys()))
        new.unlink()
    assert max(changed) <= 3 and sum(c <= 2 for c in changed) >= 0.9 * len(changed)
    (tmp_path / "0100.jpg").write_bytes(b"other")
    assert len({u.id for u in folder(tmp_path, unit_files=16).plan()} - before.keys()) == 1
    assert {u.id for u in folder(tmp_path, unit_files=16).plan()} != set(before)


@pytest.mark.parametrize("make", ["missing", "empty", "texts", "file"])
def test_a_folder_without_images_is_refused(tmp_path: Path, make: str) -> None:
    path = tmp_path / "photos"
    if make == "file":
        path.write_text("x")
    elif make != "missing":
        path.mkdir()
    if make == "texts":
        (path / "a.txt").write_text("x")
    with pytest.raises(RecipeError, match="photos.*(no such folder|it is empty|it holds 1 .txt|a file; `path`)"):
        list(folder(path).plan())


def test_urls_give_the_rows_that_the_folder_gives(photos: Path, tmp_path: Path) -> None:
    expected = [(r.location, r.text, r.data) for r in read(folder(photos))]
    assert [(r.location, r.text, r.data) for r in read(folder(photos.as_uri().replace("%20", " ")))] == expected
    archive = Path(shutil.make_archive(str(tmp_path / "all"), "zip", photos))
    assert [(r.location, r.text, r.data) for r in read(folder(f"zip://::{archive}"))] == expected
    with serve(tmp_path) as url:
        remote = folder(f"{url}/my%20photos")
        assert [(r.location, r.text, r.data) for r in read(remote)] == expected
        before = {u.id for u in remote.plan()}
        os.utime(photos / "part 0" / "coffee.jpg", (1, 1))
        assert {u.id for u in remote.plan()} != before
        with pytest.raises(RecipeError, match="no such folder"):
            list(folder(f"{url}/nothing").plan())
    with zipfile.ZipFile(archive, "a") as file:  # an archive that has changed is not taken from a cache
        file.writestr("new.jpg", photo("moon", 16))
    assert len(read(folder(f"zip://::{archive}"))) == len(expected) + 1


def test_a_server_that_stumbles_loses_nothing(tmp_path: Path) -> None:
    for name in NAMES[:2]:
        (tmp_path / f"{name}.jpg").write_bytes(photo(name))
    with serve(tmp_path, stumbling=True) as url:
        source = folder(url)
        rows = [r for u in source.plan() for r in source.read(u)]
    assert [r.data for r in rows] == [photo(n) for n in NAMES[:2]]


FLICKR = {"metadata": "captions.csv", "file_key": "image", "file_root": "images"}


def flickr(root: Path) -> Path:
    """Two pictures and their captions as Flickr8k has them: a table beside the folder, several captions for a picture."""
    (root / "images").mkdir()
    for name in ("a.jpg", "b.jpg"):
        (root / "images" / name).write_bytes(photo("coffee", 32))
    lines = ["image,caption", "a.jpg,A cup .", 'a.jpg,"Tea, and more ."', "b.jpg,A lamp .", "c.jpg,Lost ."]
    (root / "captions.csv").write_text("\n".join(lines))
    return root


def test_a_table_of_ones_own_describes_the_images(tmp_path: Path) -> None:
    flickr(tmp_path)
    rows = read(folder(tmp_path, **FLICKR))
    assert [(r.text, r.problem.reason if r.problem else None) for r in rows] == [
        ("A cup .", None),
        ("Tea, and more .", None),
        ("A lamp .", None),
        ("Lost .", "missing_image"),
    ]
    merged = read(folder(tmp_path, **FLICKR, several="merge"))
    assert [r.location for r in merged] == ["images/a.jpg", "images/b.jpg", "images/c.jpg"]
    assert merged[0].text == "A cup ."
    assert merged[0].meta == {"caption": ["A cup .", "Tea, and more ."]}
    assert merged[1].meta == {"caption": "A lamp ."}


def test_a_table_that_does_not_fit_is_refused_with_the_remedy(tmp_path: Path) -> None:
    flickr(tmp_path)
    with pytest.raises(RecipeError, match=r"no file caption\.csv; did you mean captions\.csv"):
        list(folder(tmp_path, metadata="caption.csv").plan())
    with pytest.raises(RecipeError, match="no column 'file_name' in the header, which has image, caption"):
        list(folder(tmp_path, metadata="captions.csv").plan())
    with pytest.raises(RecipeError, match=r"images/a\.jpg: not one of \.jsonl"):
        list(folder(tmp_path, metadata="images/a.jpg").plan())
