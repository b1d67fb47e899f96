"""Files of instructions: what they must hold, and that a file of one's own takes the place of x2i's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.pipelines.tasks.rows import row
from x2i.base.errors import RecipeError
from x2i.corpus.sample import Sample
from x2i.pipelines import registry
from x2i.pipelines import tasks as task_files
from x2i.pipelines.tasks._instructions import Instructions
from x2i.pipelines.tasks.base import Task
from x2i.pipelines.tasks.few_shot import FewShot
from x2i.pipelines.tasks.restoration import Restoration
from x2i.pipelines.tasks.understanding import Understanding

WORDS = {"edit": ("image_1", "image_2", "text")}
TEXTS = {"edit": ["{image_1} {image_2}"]}


def file(folder: Path, text: str) -> str:
    path = folder / "words.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("family", registry.names(task_files))
def test_every_family_brings_its_wordings(family: str) -> None:
    kind: type[Task] = registry.find(task_files, family, Task, "tasks")
    texts = Instructions(kind.words, None, family).texts
    assert set(texts) == set(kind.words)
    assert all(len(set(t)) == len(t) for t in texts.values()), "a wording is there twice"


def test_images_are_numbered_and_words_filled_in(tmp_path: Path) -> None:
    words = Instructions(WORDS, file(tmp_path, 'edit: "{image_2} after {image_1}: {text} {{so}}"'), "x", TEXTS)
    said = words.draw("edit", np.random.default_rng(0), text="{image_1} {odd}")
    assert said == "<img><|image_2|></img> after <img><|image_1|></img>: {image_1} {odd} {so}"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("edit: ['{image_1} {text}']", "lacks {image_2}"),
        ("edit: ['{image_1} {image_2} {colour}']", "has {colour}; there are image_1, image_2, text"),
        ("edit: ['{image_1} {image_2']", "expected '}'"),
        ("edit: ['{image_1} {image_2} <img><|image_3|></img>']", "stands as {image_1}, {image_2}"),
        ("edit: []", "at least one"),
        ("edit: [3]", "expected a list of texts"),
        ("edits: ['{image_1} {image_2}']", "has 'edits', which means nothing here; did you mean edit?"),
        ("- edit", "Its keys may be edit"),
    ],
)
def test_a_bad_file_is_refused_with_its_name_key_and_remedy(tmp_path: Path, text: str, told: str) -> None:
    path = file(tmp_path, text)
    with pytest.raises(RecipeError, match=r"words\.yaml") as error:
        Instructions(WORDS, path, "x", TEXTS)
    assert told in str(error.value)


def test_a_file_of_ones_own_changes_what_is_said_and_the_fingerprint(tmp_path: Path) -> None:
    shipped = Understanding(Understanding.Config())
    task = Understanding(Understanding.Config(instructions=file(tmp_path, "describe: Was?")))
    assert task.instructions.texts["read"] == shipped.instructions.texts["read"], (
        "a key that it lacks keeps its wordings"
    )
    (sample,) = (s for s in task.build(row()) if isinstance(s, Sample))
    assert sample.messages[0]["content"] == "<image>Was?"
    assert task.fingerprint != shipped.fingerprint
    assert Understanding(Understanding.Config()).fingerprint == shipped.fingerprint


def test_wordings_that_x2i_brings_go_by_their_name() -> None:
    plain = Restoration(Restoration.Config(instructions="restoration_plain"))
    assert len(plain.instructions.texts["deblur"]) == 1
    assert len(plain.instructions.texts["derain"]) > 1
    with pytest.raises(RecipeError, match="no wordings named 'restoration_plane'"):
        Restoration(Restoration.Config(instructions="restoration_plane"))


def test_few_shot_refuses_a_family_of_groups() -> None:
    with pytest.raises(RecipeError, match="looks at several rows itself"):
        FewShot(FewShot.Config(of={"few_shot": {"of": {"control": None}}}))
    with pytest.raises(RecipeError, match="of.editing: background_swap: looks at several rows itself"):
        FewShot(FewShot.Config(of={"editing": {"tasks": ["style", "background_swap"]}}))
    assert FewShot(FewShot.Config(of={"editing": {"tasks": ["style"]}})).task_types() == ["few_shot_style"]
    with pytest.raises(RecipeError, match="an instruction of its own"):
        FewShot(FewShot.Config(of={"published": None}))
