"""The x2i_jsonl source: records as published, typos and all; images and instructions that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.pipelines.source_files import NAMES, photo, problems, read, serve
from x2i.base.errors import RecipeError
from x2i.corpus.sample import placeholder
from x2i.pipelines.sources.x2i_jsonl import X2IJsonl, X2IJsonlConfig


def source(path: Path | str, **options: Any) -> X2IJsonl:
    return X2IJsonl(X2IJsonlConfig(path=str(path), **options))


def edit(number: int, **changes: Any) -> dict[str, Any]:
    names = [NAMES[(number + i) % len(NAMES)] for i in range(3)]
    record = {
        "task_type": "image_edit",
        "instruction": f"join {placeholder(1)} with {placeholder(2)}",
        "input_images": [f"./in/{n}.jpg" for n in names[:2]],
        "output_image": f"out/{names[2]}.jpg",
    }
    return record | changes


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for folder in ("in", "out"):
        (tmp_path / "images" / folder).mkdir(parents=True)
        for name in NAMES:
            (tmp_path / "images" / folder / f"{name}.jpg").write_bytes(photo(name))
    return tmp_path / "images"


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def test_records_become_rows_with_inputs(images: Path) -> None:
    typo = {
        "task_type": "text_to_iamge",
        "instruction": " coffee ",
        "input_images": None,
        "output_image": "out/coffee.jpg",
    }
    path = write(images / "edit.jsonl", [edit(0), "", typo])
    rows = read(source(path))
    assert [r.location for r in rows] == ["edit.jsonl#1", "edit.jsonl#3"] and not problems(rows)
    assert rows[0].inputs == [("./in/astronaut.jpg", photo("astronaut")), ("./in/chelsea.jpg", photo("chelsea"))]
    assert rows[0].data == photo("coffee") and rows[0].text == edit(0)["instruction"]
    assert rows[0].meta == {"task_type": "image_edit", "instruction": edit(0)["instruction"]}
    assert (rows[1].text, rows[1].meta["task_type"]) == ("coffee", "text_to_iamge")
    elsewhere = write(images.parent / "edit.jsonl", [edit(0)])
    assert read(source(elsewhere, images=str(images)))[0].data == photo("coffee")
    with serve(images.parent) as url:
        assert read(source(f"{url}/edit.jsonl", images=f"{url}/images"))[0].inputs == rows[0].inputs


def test_every_fault_is_a_row_with_its_reason(images: Path) -> None:
    (images / "out" / "empty.jpg").write_bytes(b"")
    records = [
        edit(0, output_image="out/gone.jpg"),
        edit(0, input_images=["in/gone.jpg", "in/moon.jpg"]),
        edit(0, input_images=["in/moon.jpg"]),
        edit(0, instruction=f"only {placeholder(2)}", input_images=["in/moon.jpg"]),
        edit(0, instruction=None),
        edit(0, task_type=None),
        edit(0, input_images="in/moon.jpg"),
        edit(0, output_image=None),
        edit(0, output_image="out/empty.jpg"),
        '{"task_type": "cut',
        "[1, 2]",
        edit(1),
    ]
    rows = read(source(write(images / "a.jsonl", records)))
    assert list(problems(rows).values()) == [
        "missing_image", "missing_image", "bad_instruction", "bad_instruction", "bad_instruction", "bad_metadata",
        "bad_metadata", "no_output_image", "empty_file", "bad_metadata", "bad_metadata",
    ]  # fmt: skip
    assert rows[-1].problem is None and rows[-1].location == "a.jsonl#12"


def test_a_file_that_grows_keeps_its_units(images: Path) -> None:
    path = write(images / "a.jsonl", [edit(i) for i in range(10)])
    before = [u.id for u in source(path, unit_rows=4).plan()]
    assert len(read(source(path, unit_rows=4))) == 10
    with path.open("a") as file:
        file.write(json.dumps(edit(10)))
    after = list(source(path, unit_rows=4).plan())
    assert [u.id for u in after][:2] == before[:2] and after[2].id != before[2]
    assert sum(u.rows or 0 for u in after) == 11


def test_a_file_that_shrinks_after_the_plan_is_rows_with_a_problem(images: Path) -> None:
    path = write(images / "a.jsonl", [edit(i) for i in range(4)])
    (unit,) = source(path).plan()
    path.write_text("")
    assert [r.problem.reason for r in source(path).read(unit) if r.problem] == ["unreadable"] * 4


def test_no_records_is_a_mistake_of_the_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no JSONL files"):
        list(source(tmp_path).plan())


def test_a_file_without_a_record_is_a_row_that_says_so(images: Path) -> None:
    write(images / "a.jsonl", [edit(0)])
    (images / "b.jsonl").write_text("\n")
    rows = read(source(images / "*.jsonl"))
    assert [r.problem.reason if r.problem else None for r in rows] == [None, "empty_file"]
    assert rows[1].location == "b.jsonl#(file)"
