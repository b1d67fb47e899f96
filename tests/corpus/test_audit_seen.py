"""What annotators saw is drawn where they saw it, over the row's own picture, and told below it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.corpora import Built
from tests.corpus.auditing import Page, edit_info, edit_selection, report
from x2i import corpus
from x2i.corpus.audit.overlay import BONES, HEIGHT, WIDTH, overlay
from x2i.corpus.audit.seen import LABELS, MARKS, Look, Mark, seen, showable
from x2i.pipelines import annotators, registry
from x2i.pipelines.annotators._openpose import LIMBS, PARTS
from x2i.pipelines.annotators.base import Annotator

#: Columns as annotators give them, in SQL: every kept row has the same.
SEEN = {
    "cats": """{boxes: [[0.25, 0.5, 0.75, 1.0], [0.0, 0.0, 0.1, 0.1]]::float[][], labels: ['<b>tabby</b>', 'kitten'],
               scores: [0.875, 0.5]::float[]}""",
    "words": "{boxes: [[i / 40, 0.1, i / 40 + 0.02, 0.2] for i in range(30)]::float[][], texts: ['w' || i for i in range(30)],"
    " confidence: [i / 30 for i in range(30)]::float[]}",
    "odd": "{boxes: [[0.1, 0.1, 'nan'::float, 0.5], [0.9, 0.1, 0.2, 0.5], [-3, 0.5, 7, 0.6], [0.1]]::float[][], labels: ['one']}",
    "things": "{labels: [1, 2, 3, 4, 5, 6, 7]::varchar[], scores: [0.9, 0.05, 0.01, 0, 0, 0, 0]::float[]}",
    "best": "{top: 'coffee mug', top_score: 0.625::float}",
    "body": """{people: [{keypoints: [{x: 0.5::float, y: 0.25::float, score: 0.9::float}, {x: 0.5::float, y: 0.5::float,
               score: 0.9::float}] || [{x: null::float, y: null::float, score: 0::float} for i in range(16)], score: 0.75::float,
               box: [0.5, 0.25, 0.5, 0.5]::float[]}], layout: 'coco18'}""",
    "map": "{labels: [{id: 3, name: 'sky', area: 0.625::float}, {id: 5, name: 'sea', area: 0.25::float}]}",
    "blind": "{boxes: []::float[][], scores: []::float[]}",
    "asked_little": "case when location = 'cup.jpg' then {boxes: [[0, 0, 1, 1]]::float[][]} end",
    "score": "{score: 0.5::float, boxes: 3}",
}


def sighted(built: Built, target: Path) -> Built:
    """A copy of a corpus to which such annotators were added."""
    mine = built.copy(target)
    made = [f"{sql} as {name}" for name, sql in SEEN.items()]
    edit_selection(mine, f"select *, {', '.join(made)} from old")

    def add(info: dict[str, Any]) -> None:
        one = {"version": 1, "kind": "x", "fingerprint": "0" * 64, "weights": {}, "where": None, "columns": {}}
        info["annotators"] += [one | {"name": n, "parameters": {"classes": ["a", "b"], "none": None}} for n in SEEN]

    edit_info(mine, add)
    return mine


@pytest.fixture(scope="module")
def page(built: Built, tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, str, Built]:
    mine = sighted(built, tmp_path_factory.mktemp("seen"))
    return *report(mine), mine


def drawings(text: str, annotator: str) -> list[str]:
    article = text[text.index(f'id="seen-{annotator}"') :].partition("</article>")[0]
    return re.findall(r'<svg class="marks".*?</svg>', article, re.S)


def test_each_annotator_that_sees_something_has_a_gallery(page: tuple[Page, str, Built]) -> None:
    shown = [a["id"] for t, a in page[0].tags if t == "article" and (a.get("id") or "").startswith("seen-")]
    assert shown == [f"seen-{name}" for name in SEEN if name != "score"]
    texts = page[0].texts
    assert "12 boxes in 6 of 6 pictures" in texts["seen-cats"]
    assert "6 people in 6 of 6 pictures" in texts["seen-body"]
    assert "1 box in 1 of 1 pictures that stayed and that it was asked about" in texts["seen-asked_little"]
    assert "It found nothing in any of them." in texts["seen-blind"]
    for words in ("<b>tabby</b>", "0.88", "kitten", "0.50"):
        assert words in texts["seen-cats"]
    assert "<b>tabby" not in page[1]
    assert "coffee mug" in texts["seen-best"] and "0.62" in texts["seen-best"]
    assert "sky" in texts["seen-map"] and "0.62" in texts["seen-map"]
    assert "0.75" in texts["seen-body"] and "2 of 18 joints" in texts["seen-body"]


def test_boxes_lie_where_the_annotator_saw_them(page: tuple[Page, str, Built]) -> None:
    sizes = corpus.open(page[2].corpus).sql(
        "select image.width, image.height from selection where kept order by row_id"
    )
    pictures = drawings(page[1], "cats")
    assert len(pictures) == 6
    for drawing, (width, height) in zip(pictures, sizes.fetchall(), strict=True):
        w, h = map(float, re.search(r'viewBox="0 0 (\S+) (\S+)"', drawing).groups())  # type: ignore[union-attr]
        assert w / h == pytest.approx(width / height, rel=0.01)  # as the picture, so that one covers the other
        assert w <= WIDTH and h <= HEIGHT
        box = re.search(r'class="edge" x="(\S+)" y="(\S+)" width="(\S+)" height="(\S+)"', drawing)
        assert box is not None
        assert [float(v) for v in box.groups()] == pytest.approx([w / 4, h / 2, w / 2, h / 2], abs=0.11)
        for x, wide in re.findall(r'class="chip" x="(\S+)" y="\S+" width="(\S+)"', drawing):
            assert float(x) >= 0 and float(x) + float(wide) <= w + 0.2  # no name is cut off
        assert "&lt;b&gt;tabby" in drawing or ">1</text>" in drawing


def test_lists_are_bounded_and_nonsense_is_left_out(page: tuple[Page, str, Built]) -> None:
    assert all(d.count('class="edge"') == MARKS for d in drawings(page[1], "words"))
    assert f"and {30 - MARKS} more" in page[0].texts["seen-words"]
    assert f"and {7 - LABELS} more" in page[0].texts["seen-things"]
    for drawing in drawings(page[1], "odd"):  # of four, one can be drawn, within the picture
        (box,) = re.findall(r'class="edge" x="(\S+)" y="\S+" width="(\S+)"', drawing)
        assert (float(box[0]), box[1]) == (0, re.search(r'viewBox="0 0 (\S+)', drawing)[1])  # type: ignore[index]
    for s in seen(corpus.open(page[2].corpus), 2):
        assert len(s.looks) <= 2


def test_joints_are_joined_as_the_layout_says(page: tuple[Page, str, Built]) -> None:
    for drawing in drawings(page[1], "body"):
        assert drawing.count("<circle") == 2  # the others were not found
        path = re.search(r'class="edge" d="(\S+)"', drawing)
        assert path is not None and path[1].count("M") == 1  # nose and neck
    limbs = {frozenset(limb[:2]) for limb in LIMBS}
    assert {frozenset(bone) for bone in BONES["coco18"]} <= limbs
    for layout, joints in (("coco18", len(PARTS)), ("coco17", 17)):
        assert {j for bone in BONES[layout] for j in bone} == set(range(joints))
    strange = Look({"width": 4, "height": 3}, (Mark("person", 1.0, None, ((0.5, 0.5), None)),), 0, "another")
    assert str(overlay(strange)).count("<circle") == 1


def test_rows_that_fell_are_not_shown(page: tuple[Page, str, Built]) -> None:
    fell = corpus.open(page[2].corpus).sql("select location from selection where not kept").fetchall()
    assert len(fell) == 6
    assert not any(location in page[0].texts["seen"] for (location,) in fell)


def test_without_such_annotators_there_is_no_such_section(built: Built, tmp_path: Path) -> None:
    shown, text = report(built.copy(tmp_path))
    assert "seen" not in shown.texts
    assert 'href="#seen"' not in text


@pytest.mark.parametrize(
    ("name", "what"),
    [
        *((n, "boxes") for n in ("faces", "grounding", "masks", "nudenet", "ocr", "regions")),
        ("classes", "labels"),
        ("semantic", "labels"),
        ("pose", "people"),
        ("texts", None),
        ("quality", None),
    ],
)
def test_the_columns_of_x2i_s_own_annotators_are_known(name: str, what: str | None) -> None:
    columns = registry.find(annotators, name, Annotator, "").columns
    assert showable(pa.struct(list(columns))) == what
