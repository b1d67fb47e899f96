"""Subject pairs: what instructions say of them, and builds from captions to a verified corpus."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from tests.pipelines.annotators.test_caption_server import Fake, completion, fake
from tests.pipelines.builds import build
from tests.pipelines.tasks.inline import build as build_here
from tests.pipelines.tasks.pairing import ALBUM, PEOPLE, entities, family
from tests.pipelines.tasks.rows import row
from x2i.base.errors import RecipeError
from x2i.corpus.manifest import originals
from x2i.corpus.sample import Sample
from x2i.corpus.verify import verify
from x2i.pipelines.quickstart import photographs
from x2i.pipelines.recipe import load
from x2i.pipelines.tasks.base import Found, Selected, Skipped
from x2i.pipelines.tasks.subject_pairs import SubjectPairs

__all__ = ["fake"]  # the fixture


def selected(text: str | None, *others: Selected, subjects: tuple[str, ...] = (), **about: Any) -> Selected:
    """A row with one group of others."""
    made = row("chelsea.png", text=text, values={"entities": {"entities": entities(text or "")}})
    kind = "subjects_together" if len(others) > 1 else "same_subject"
    keyed = [{"key": s.lower(), "name": s, "label": "PERSON"} for s in subjects]
    made.groups = (Found(kind, others, {"by": "name", "noun": "person", "subjects": keyed} | about),)
    return made


def said(task: SubjectPairs, given: Selected) -> Sample:
    (sample,) = [s for s in task.build(given) if isinstance(s, Sample)]
    return sample


@pytest.fixture
def plain(tmp_path: Path) -> SubjectPairs:
    """One wording each, to see what becomes of captions."""
    path = tmp_path / "words.yaml"
    words = {
        "in_caption": "{text}", "place": "the {noun} in {image}", "again": "the {noun}",
        "beside": "With {subjects}: {text}", "alone": "Again {subjects}.",
    }  # fmt: skip
    path.write_text(yaml.safe_dump({k: [v] for k, v in words.items()}))
    return family(instructions=str(path))


ONE, TWO = "<img><|image_1|></img>", "<img><|image_2|></img>"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Ada Lovelace runs", f"The person in {ONE} runs."),
        ("Here runs the Dr. Ada Lovelace!", f"Here runs the person in {ONE}!"),
        ("In Ada Lovelace's coat Lovelace runs", f"In the person in {ONE}'s coat the person runs."),
        ("Nobody runs", f"With the person in {ONE}: Nobody runs."),
        (None, f"Again the person in {ONE}."),
    ],
)
def test_pictures_stand_for_names(plain: SubjectPairs, text: str | None, expected: str) -> None:
    other = row("astronaut.png")
    sample = said(plain, selected(text, other, subjects=("Ada Lovelace",)))
    assert sample.instruction == expected
    assert sample.input_images == (other.picture,)
    assert sample.output_image == row("chelsea.png").picture
    assert sample.provenance["others"][0]["location"] == "astronaut.png"
    assert sample.provenance["parameters"]["subjects"][0]["name"] == "Ada Lovelace"
    assert originals(sample.provenance) == [row("chelsea.png").image_id, other.image_id]


def test_two_subjects_are_first_and_second(plain: SubjectPairs) -> None:
    others = row("astronaut.png"), row("coffee.png")
    sample = said(plain, selected("Alan Turing greets Ada Lovelace; Turing smiles", *others, subjects=PEOPLE[1::-1]))
    assert (
        sample.instruction == f"The first person in {ONE} greets the second person in {TWO}; the first person smiles."
    )
    assert sample.input_images == tuple(o.picture for o in others)
    # a caption that lacks one of them cannot speak of both
    sample = said(plain, selected("Alan Turing smiles.", *others, subjects=PEOPLE[1::-1]))
    assert sample.instruction == f"With the first person in {ONE} and the second person in {TWO}: Alan Turing smiles."


def test_every_wording_holds_every_picture_once() -> None:
    task, others = family(), (row("astronaut.png"), row("coffee.png"))
    seen = set()
    for seed in range(60):
        for text in ("Alan Turing and Ada Lovelace run; Lovelace wins", "Two people run", None):
            given = selected(text, *others, subjects=PEOPLE[1::-1])
            given.seed = seed
            instruction = said(task, given).instruction
            assert instruction.count("<|image_1|>") == instruction.count("<|image_2|>") == 1
            assert "{" not in instruction
            seen.add(instruction)
    assert len(seen) > 60


def test_rows_without_a_partner_or_with_a_lost_one_say_so() -> None:
    given = selected("Ada Lovelace runs", subjects=("Ada Lovelace",))
    given.groups = (Found("same_subject", (), {}, "source_changed"),)
    assert list(family().build(given)) == [
        Skipped("same_subject", "partner_source_changed"),
        Skipped("subjects_together", "no_partner"),
    ]
    marked = selected("A <|image_1|> runs", row("astronaut.png"))
    assert Skipped("same_subject", "text_has_placeholders") in list(family().build(marked))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"by": "column", "tasks": ["subjects_together"]}, "subjects_together needs by: name"),
        ({"by": "column", "subject": "person"}, r"must be folder, folder.N or meta.KEY"),
        ({"verify": {}}, "give either `column` .* or `chat`"),
        ({"verify": {"chat": {"backend": "transformers", "weights": "x"}}}, "shown to a server only"),
        ({"features": ["clip"]}, "'clip' is no column"),
        ({"judge": {"names": "no_such_names.txt"}}, "no_such_names.txt: cannot be read as a list of names"),
    ],
)
def test_what_does_not_fit_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        family(**given)


def album(root: Path) -> dict[str, Any]:
    """The album as photographs with captions, a pipeline that knows its people's names, and a recipe over them."""
    import spacy

    nlp = spacy.blank("en")
    ruler: Any = nlp.add_pipe("entity_ruler")
    ruler.add_patterns([{"label": "PERSON", "pattern": p} for p in PEOPLE])
    nlp.to_disk(root / "names")
    (root / "photos").mkdir()
    files = [f for f in sorted(photographs()) if not f.endswith(".txt")]
    texts = {r["name"]: r["text"] for r in ALBUM}
    for number, (name, text) in enumerate(texts.items()):
        picture = Image.open(io.BytesIO(photographs()[files[number % len(files)]])).convert("RGB")
        picture.crop((8 * number, 0, 8 * number + 160, 160)).save(root / "photos" / f"{name}.png")
        (root / "photos" / f"{name}.txt").write_text(text)
    return {
        "name": "pairs",
        "lake": "lake",
        "out": "corpus",
        "sources": [{"kind": "folder", "name": "photos", "path": "photos", "unit_files": 3}],
        "annotators": {"phash": {}, "entities": {"pipeline": "names"}},
        "tasks": {"subject_pairs": {}},
    }


def test_a_build_from_captions_to_a_verified_corpus(tmp_path: Path) -> None:
    recipe = album(tmp_path)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    result = build(tmp_path / "recipe.yaml", "--workers", "1")
    report = verify(tmp_path / "corpus")
    assert report.ok, report.faults
    found = {}
    for shard in (tmp_path / "corpus").rglob("*.tar"):
        with tarfile.open(shard) as tar:
            for member in (m for m in tar if m.name.endswith(".json")):
                sample = json.load(tar.extractfile(member) or io.BytesIO())
                location = sample["provenance"]["location"].removesuffix(".png")
                found[location] = sample["task_type"], [o["location"] for o in sample["provenance"]["others"]]
                assert "Ada" not in sample["instruction"]
    assert len(found) == result["samples"] == 6
    assert {k: t for k, (t, _) in found.items()} == {
        "ada1": "same_subject", "ada2": "same_subject", "alan1": "same_subject", "alan2": "same_subject",
        "both1": "subjects_together", "both2": "subjects_together",
    }  # fmt: skip
    assert found["alan1"][1] == ["alan2.png"]
    assert found["both1"][1][0] in ("alan1.png", "alan2.png")

    lacking = tmp_path / "lacking.yaml"
    lacking.write_text(yaml.safe_dump(recipe | {"annotators": {"phash": {}}}))
    with pytest.raises(RecipeError, match=r"reads entities.entities: .* add it .*, e.g. `entities: {kind: entities}`"):
        load(lacking)


def test_a_model_is_shown_the_files_of_both_pictures_and_asked_once(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.reply = lambda body: completion("Yes" if len(fake.requests) % 2 else "No")
    chat = {"server": fake.url, "model": "tiny", "concurrency": 1}
    recipe = album(tmp_path) | {"tasks": {"subject_pairs": {"verify": {"chat": chat, "min_yes": 1}}}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir(tmp_path)
    some = len(build_here(Path("recipe.yaml")))
    asked = len(fake.requests)
    assert 0 < some < 6, "pairs of which the model said no are left out"
    assert asked
    assert verify(tmp_path / "corpus").ok
    assert len(build_here(Path("recipe.yaml"))) == some
    assert len(fake.requests) == asked, "what it said lies in the lake"
