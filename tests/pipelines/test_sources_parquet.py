"""The parquet source: three kinds of image columns, units of row groups, broken files and cells."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.pipelines.source_files import NAMES, photo, problems, read, serve
from x2i.base.errors import RecipeError
from x2i.pipelines.sources.parquet import Parquet, ParquetConfig


def source(path: Path | str, **options: Any) -> Parquet:
    return Parquet(ParquetConfig(path=str(path), **options))


def records(count: int = 8) -> list[dict[str, Any]]:
    return [
        {"image": {"bytes": photo(n), "path": f"{n}.jpg"}, "text": f" {n} ", "n": i}
        for i, n in enumerate(NAMES[:count])
    ]


def write(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def test_bytes_structs_and_paths_are_images(tmp_path: Path) -> None:
    write(tmp_path / "hf.parquet", records())
    write(tmp_path / "raw.parquet", [{"jpg": r["image"]["bytes"], "text": r["text"], "n": r["n"]} for r in records()])
    (tmp_path / "images").mkdir()
    for name in NAMES:
        (tmp_path / "images" / f"{name}.jpg").write_bytes(photo(name))
    write(tmp_path / "rel.parquet", [{"path": f"images/{n}.jpg", "text": n, "n": i} for i, n in enumerate(NAMES)])
    write(
        tmp_path / "abs.parquet",
        [{"image": f"{tmp_path}/images/{n}.jpg", "text": n, "n": i} for i, n in enumerate(NAMES)],
    )
    with serve(tmp_path) as url:
        write(
            tmp_path / "url.parquet", [{"url": f"{url}/images/{n}.jpg", "text": n, "n": i} for i, n in enumerate(NAMES)]
        )
        for kind in ("hf", "raw", "rel", "abs", "url"):
            rows = read(source(tmp_path / f"{kind}.parquet"))
            assert [(r.location, r.text, r.data, r.meta) for r in rows] == [
                (f"{kind}.parquet#{i}", n, photo(n), {"n": i}) for i, n in enumerate(NAMES)
            ], kind
        (tmp_path / "images" / "my moon.jpg").write_bytes(photo("moon"))
        write(tmp_path / "odd.parquet", [{"url": f"{url}/images/my%20moon.jpg?width=64"}, {"url": f"{url}/gone.jpg"}])
        odd = read(source(tmp_path / "odd.parquet"))
        assert odd[0].data == photo("moon") and problems(odd) == {"odd.parquet#1": "missing_image"}
        remote = read(source(f"{url}/hf.parquet"))
        assert [r.data for r in remote] == [photo(n) for n in NAMES]
    assert read(source(tmp_path / "rel.parquet", root=str(tmp_path)))[3].data == photo(NAMES[3])


def test_columns_can_be_named_and_what_json_cannot_hold_is_left_out(tmp_path: Path) -> None:
    day = datetime.datetime(2024, 2, 3, 4, 5)
    rows = [
        {"source_img": {"bytes": photo("moon"), "path": None}, "edited_img": {"bytes": photo("page"), "path": None}}
        | {
            "prompt_list": ["", "first", "second"],
            "day": day,
            "score": float("nan"),
            "vector": [0.1, 0.2],
            "blob": b"x",
        }
    ]
    path = write(tmp_path / "a.parquet", rows)
    (row,) = read(source(path, image_column="edited_img", text_column="prompt_list"))
    assert (row.data, row.text) == (photo("page"), "first")
    assert row.meta == {"prompt_list": ["", "first", "second"], "day": "2024-02-03T04:05:00", "score": None}
    for options in ({"image_column": "img"}, {"text_column": "title"}):
        with pytest.raises(RecipeError, match=r"_column: no column '\w+'; there are: source_img, edited_img"):
            list(source(path, **options).plan())
    with pytest.raises(RecipeError, match="image_column"):
        list(source(write(tmp_path / "b.parquet", [{"x": 1}])).plan())


def test_units_are_runs_of_row_groups(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", records(), row_group_size=1)
    units = list(source(path, unit_rows=3).plan())
    assert [(u.rows, u.spec["groups"], u.spec["first"]) for u in units] == [
        (3, [0, 3], 0),
        (3, [3, 6], 3),
        (2, [6, 8], 6),
    ]
    assert [r.location for r in read(source(path, unit_rows=3))] == [f"a.parquet#{i}" for i in range(8)]
    write(path, records(), row_group_size=2)
    assert not {u.id for u in units} & {u.id for u in source(path, unit_rows=3).plan()}


def test_bad_cells_are_problems_of_their_rows(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"image": None, "text": "null"},
        {"image": {"bytes": None, "path": None}, "text": "nothing in it"},
        {"image": {"bytes": None, "path": "gone.jpg"}, "text": "gone"},
        {"image": {"bytes": b"", "path": "a.jpg"}, "text": "empty"},
        {"image": {"bytes": photo("moon"), "path": "moon.jpg"}, "text": None},
    ]
    found = read(source(write(tmp_path / "a.parquet", rows)))
    assert list(problems(found).values()) == ["missing_image"] * 3 + ["empty_file"]
    assert (found[4].data, found[4].text) == (photo("moon"), None)


def test_a_text_that_is_not_utf8_costs_its_row(tmp_path: Path) -> None:
    text = pa.array([b"good", b"M\xfcller", b"good too"], pa.binary()).view(pa.string())
    images = pa.array([photo(n) for n in NAMES[:3]])
    pq.write_table(pa.table({"image": images, "text": text}), tmp_path / "a.parquet")
    rows = read(source(tmp_path))
    assert problems(rows) == {"a.parquet#1": "bad_text"}
    assert [r.text for r in rows if not r.problem] == ["good", "good too"]


def test_broken_files_and_pages_cost_what_is_broken(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", records())
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(data[: len(data) // 2])
    (tmp_path / "no.parquet").write_text("<html></html>")
    rows = read(source(tmp_path))
    assert problems(rows) == {"cut.parquet": "bad_parquet", "no.parquet": "bad_parquet"} and len(rows) == 10

    path = tmp_path / "pages.parquet"
    write(path, records(), row_group_size=4, compression="zstd", write_page_checksum=True)
    damaged = bytearray(path.read_bytes())
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    middle = (column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size // 2
    damaged[middle : middle + 8] = b"\0" * 8
    path.write_bytes(damaged)
    rows = read(source(path))
    assert problems(rows) == {f"pages.parquet#{i}": "bad_parquet" for i in range(4)}
    assert [r.data for r in rows[4:]] == [photo(n) for n in NAMES[4:]]
