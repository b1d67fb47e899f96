"""Understanding: what is said of a picture is what its annotations say, in the layout that ms-swift reads."""

from __future__ import annotations

import json
from typing import Any

from tests.pipelines.tasks.rows import row
from x2i.corpus.sample import Sample
from x2i.pipelines.tasks.base import Selected, Skipped
from x2i.pipelines.tasks.understanding import Understanding

BOXES = [[0.1, 0.2, 0.5, 0.9], [0.55, 0.2, 0.9, 0.9], [0.0, 0.0, 1.0, 0.3]]
VALUES = {
    "grounding": {"boxes": BOXES, "scores": [0.9, 0.7, 0.4], "phrases": ["an eye", "an eye", "a wall"]},
    "ocr": {"texts": ["STOP", "here"], "confidence": [0.99, 0.95]},
    "classes": {"top": "tabby", "top_score": 0.71},
}
ALL = ("describe", "locate", "count", "read", "classify")


def talk(on: Selected, **config: Any) -> dict[str, Sample | Skipped]:
    task = Understanding(Understanding.Config(**({"tasks": ALL} | config)))
    made = list(task.build(on))
    assert [m.task_type for m in made] == task.task_types()
    return {m.task_type: m for m in made}


def answers(sample: Sample | Skipped) -> list[str]:
    assert isinstance(sample, Sample)
    return [m["content"] for m in sample.messages if m["role"] == "assistant"]


def test_answers_are_the_annotations() -> None:
    made = talk(row(values=VALUES))
    assert answers(made["describe"]) == ["A cat."]
    assert answers(made["count"]) == ["2"]
    assert answers(made["read"]) == ["STOP\nhere"]
    assert answers(made["classify"]) == ["tabby"]
    assert answers(made["locate"]) == ["<bbox>, <bbox>"]
    located = made["locate"]
    assert isinstance(located, Sample)
    assert located.objects == {"ref": ["an eye"], "bbox": BOXES[:2], "bbox_type": "norm1"}


def test_the_record_is_what_ms_swift_reads() -> None:
    for made in talk(row(values=VALUES)).values():
        assert isinstance(made, Sample)
        record = json.loads(dict(made.members())["json"])
        said = "".join(m["content"] for m in record["messages"])
        assert [m["role"] for m in record["messages"][:2]] == ["user", "assistant"]
        assert said.count("<image>") == len(record["images"]) == 1
        assert said.count("<bbox>") == len(record.get("objects", {}).get("bbox", []))
        assert said.count("<ref-object>") == len(record.get("objects", {}).get("ref", []))
        assert "output_image" not in record
        assert [s for s, _ in made.members()] == ["json", "input_1.png"]


def test_several_objects_are_asked_for_in_turns() -> None:
    made = talk(row(values=VALUES), min_score=0.3)["locate"]
    assert isinstance(made, Sample)
    assert len(made.messages) == 4
    assert made.objects["ref"] == ["an eye", "a wall"]
    assert len(answers(talk(row(values=VALUES), min_score=0.3, max_objects=1)["locate"])) == 1


def test_boxes_without_phrases_get_a_name() -> None:
    values = {"faces": {"boxes": BOXES[:1], "scores": [0.99]}}
    made = talk(row(values=values), tasks=("locate", "count"), objects="faces", object_name="face")
    assert answers(made["count"]) == ["1"]
    task = Understanding(Understanding.Config(tasks=("count",), objects="faces", object_name="face"))
    assert task.reads == {"faces.boxes": "faces: {kind: faces}", "faces.scores": "faces: {kind: faces}"}


def test_what_cannot_be_asked_is_skipped_with_a_reason() -> None:
    nothing = {"grounding": {"boxes": [], "scores": [], "phrases": []}, "ocr": {"texts": [], "confidence": []}}
    made = talk(row(text=None, values=nothing | {"classes": {"top": "tabby", "top_score": 0.3}}))
    assert {k: m.reason for k, m in made.items() if isinstance(m, Skipped)} == {
        "describe": "no_text",
        "locate": "no_object",
        "count": "no_object",
        "read": "no_text_in_picture",
        "classify": "unsure_class",
    }
    assert {m.reason for m in talk(row()).values() if isinstance(m, Skipped)} == {"not_annotated"}
    unsure = VALUES | {"ocr": {"texts": ["STOP", "h??e"], "confidence": [0.99, 0.2]}}
    assert talk(row(values=unsure))["read"] == Skipped("read", "unsure_text")
    assert talk(row(text="see <image>"))["describe"] == Skipped("describe", "text_has_placeholders")
