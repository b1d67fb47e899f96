"""Subject pairs: who is grouped with whom by names, by the source and by features; what instructions say; a build of them."""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
import tarfile
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
import yaml
from PIL import Image

from tests.pipelines.annotators.test_caption_server import Fake, completion, fake
from tests.pipelines.builds import build
from tests.pipelines.tasks.rows import row
from x2i.base.config import parse_config
from x2i.base.errors import RecipeError, X2IError
from x2i.corpus.manifest import originals
from x2i.corpus.sample import Sample
from x2i.corpus.verify import verify
from x2i.pipelines.quickstart import photographs
from x2i.pipelines.recipe import load
from x2i.pipelines.tasks._described import pattern
from x2i.pipelines.tasks.base import Found, Group, Selected, Skipped
from x2i.pipelines.tasks.subject_pairs import SubjectPairs

__all__ = ["fake"]  # the fixture

ENTITY = pa.struct({"text": pa.string(), "label": pa.string(), "start": pa.int32(), "end": pa.int32()})
KEPT = pa.schema(
    {
        "row_id": pa.string(), "source": pa.string(), "location": pa.string(), "image_id": pa.string(),
        "text": pa.string(), "meta": pa.string(), "entities": pa.struct({"entities": pa.list_(ENTITY)}),
        "phash": pa.struct({"hash": pa.uint64()}), "faces": pa.struct({"count": pa.int32()}),
    }
)  # fmt: skip
PEOPLE = ("Ada Lovelace", "Alan Turing", "Grace Hopper", "Jim")


def family(**changes: Any) -> SubjectPairs:
    return SubjectPairs(parse_config(SubjectPairs.Config, changes, "tasks.subject_pairs"))


def image_id(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def entities(text: str) -> list[dict[str, Any]]:
    """Where a text has `PEOPLE`, and the like."""
    found = re.finditer("|".join((*PEOPLE, "Lovelace", "Turing")), text)
    return [{"text": m[0], "label": "PERSON", "start": m.start(), "end": m.end()} for m in found]


def kept(rows: list[dict[str, Any]], seed: int = 0, **lake: dict[str, list[float]]) -> duckdb.DuckDBPyConnection:
    """A selection of rows, in any order: `name` (also the location), `text` and what else there is; embeddings by name."""
    table = []
    for i, given in enumerate(rows):
        text = given.get("text")
        table.append(
            {
                "row_id": given["name"],
                "source": "photos",
                "location": given["name"],
                "image_id": image_id(given.get("image", given["name"])),
                "text": text,
                "meta": json.dumps(given.get("meta", {})),
                "entities": {"entities": entities(text or "")},
                "phash": {"hash": given.get("hash", int(image_id(str(i))[:16], 16))},
                "faces": {"count": given.get("faces", 1)},
            }
        )
    random.Random(seed).shuffle(table)
    connection = duckdb.connect()
    connection.register("given", pa.Table.from_pylist(table, schema=KEPT))
    connection.execute("create table kept as from given; create schema lake")
    for name, values in lake.items():
        embedded = pa.table(
            {"row_id": list(values), "embedding": pa.array(list(values.values()), pa.list_(pa.float32()))}
        )
        connection.register("embedded", embedded)
        connection.execute(f"create table lake.{name} as from embedded")
    return connection


def groups(task: SubjectPairs, connection: duckdb.DuckDBPyConnection, seed: int = 0) -> dict[str, list[Group]]:
    """By task type, in order of the anchors."""
    out: dict[str, list[Group]] = {t: [] for t in task.task_types()}
    for group in task.groups(connection, seed):
        out[group.task_type].append(group)
    return out


WEARS = "in a red coat walks home"
ALBUM = [
    {"name": "ada1", "text": f"Ada Lovelace {WEARS}"},
    {"name": "ada2", "text": f"Dr. Ada Lovelace {WEARS}, and Lovelace smiles"},
    {"name": "ada3", "text": "A portrait of Ada Lovelace"},  # tells neither clothes nor action
    {"name": "alan1", "text": f"Alan Turing's dog {WEARS}"},
    {"name": "alan2", "text": f"Alan Turing {WEARS}"},
    {"name": "both1", "text": f"Alan Turing and Ada Lovelace, both {WEARS}"},
    {"name": "both2", "text": f"Ada Lovelace next to Alan Turing {WEARS}"},
    {"name": "jims", "text": f"Ada Lovelace and Jim {WEARS}"},  # nobody has a picture of Jim alone
    {"name": "grace", "text": f"Grace Hopper {WEARS}"},  # the only one
    {"name": "three", "text": f"Ada Lovelace, Alan Turing and Grace Hopper {WEARS}"},
    {"name": "none", "text": f"Somebody {WEARS}"},
]


def test_names_are_paired_across_pictures_and_with_pictures_of_several() -> None:
    found = groups(family(), kept(ALBUM))
    same = {g.anchor: g.others for g in found["same_subject"]}
    # ada3 says too little to be an output, but is a picture of hers; the rest have another name in their captions
    assert set(same) == {"ada1", "ada2", "alan1", "alan2"}
    assert same["alan1"] == ("alan2",)
    assert set(same["ada1"]) <= {"ada2", "ada3"}
    together = {g.anchor: g for g in found["subjects_together"]}
    assert set(together) == {"both1", "both2"}
    for anchor, first, second in (("both1", "alan", "ada"), ("both2", "ada", "alan")):
        one, two = together[anchor].others
        assert one.startswith(first)
        assert two.startswith(second)
    assert [s["name"] for s in together["both1"].about["subjects"]] == ["Alan Turing", "Ada Lovelace"]


def test_the_order_of_rows_changes_nothing_and_the_seed_does() -> None:
    many = [{"name": f"a{i:02d}", "text": f"Ada Lovelace {WEARS}"} for i in range(30)]
    first = groups(family(), kept(many, 1))["same_subject"]
    assert len(first) == 30
    assert groups(family(), kept(many, 2))["same_subject"] == first
    other = groups(family(), kept(many, 1), seed=1)["same_subject"]
    assert [g.anchor for g in other] == [g.anchor for g in first]
    assert [g.others for g in other] != [g.others for g in first]
    twice = groups(family(most=2), kept(many))["same_subject"]
    assert len(twice) == 60
    assert len({(g.anchor, g.others) for g in twice}) == 60
    assert all(g.anchor not in g.others for g in twice)


def test_how_often_names_must_be_there() -> None:
    assert [g.anchor for g in groups(family(min_images=8), kept(ALBUM))["same_subject"]] == []
    # Ada is in seven pictures, Alan in five
    assert {g.anchor for g in groups(family(min_images=6), kept(ALBUM))["same_subject"]} == {"ada1", "ada2"}
    assert {g.anchor for g in groups(family(max_images=6), kept(ALBUM))["same_subject"]} == {"alan1", "alan2"}
    assert len(groups(family(min_together=2), kept(ALBUM))["subjects_together"]) == 2
    assert len(groups(family(min_together=3), kept(ALBUM))["subjects_together"]) == 0
    of_three = groups(family(max_subjects=3, min_images=1), kept(ALBUM))["subjects_together"]
    assert {g.anchor: len(g.others) for g in of_three} == {"both1": 2, "both2": 2, "three": 3}


def test_a_list_of_names_and_faces_decide(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_text("ada lovelace\n")
    listed = groups(family(judge={"names": str(path)}), kept(ALBUM))
    assert {g.anchor for g in listed["same_subject"]} == {"ada1", "ada2"}
    assert listed["subjects_together"] == []
    seen = [r | {"faces": 2 if r["name"] in ("both1", "ada2") else 1} for r in ALBUM]
    faced = groups(family(faces="faces"), kept(seen))
    assert {g.anchor for g in faced["same_subject"]} == {"ada1", "alan1", "alan2"}
    assert {g.anchor for g in faced["subjects_together"]} == {"both1"}


def test_a_model_judges_once(fake: Fake, tmp_path: Path) -> None:
    fake.reply = lambda body: completion("No." if "Alan" in body["messages"][-1]["content"] else "Yes.")
    chat = {"server": fake.url, "model": "tiny"}
    for _ in range(2):
        connection = kept(ALBUM)
        connection.execute(f"set variable lake = '{tmp_path}'")
        found = groups(family(judge={"chat": chat}), connection)
        assert {g.anchor for g in found["same_subject"]} == {"ada1", "ada2"}
    assert len(fake.requests) == 3  # Ada, Alan and Grace: Jim is in one picture only
    assert len(list((tmp_path / "judgements").glob("*.parquet"))) == 1
    asked = family(judge={"chat": chat})
    assert asked.fingerprint == family(judge={"chat": chat | {"server": "http://x/v1", "timeout": 1}}).fingerprint
    assert asked.fingerprint != family(judge={"chat": chat | {"model": "other"}}).fingerprint


def test_what_captions_must_tell(tmp_path: Path) -> None:
    path = tmp_path / "weather.txt"
    path.write_text("rain\nsnow\n")
    album = [*ALBUM, {"name": "ada4", "text": "Ada Lovelace in the rain"}]
    assert {g.anchor for g in groups(family(must_say=[str(path)]), kept(album))["same_subject"]} == {"ada4"}
    assert len(groups(family(must_say=[]), kept(album))["same_subject"]) == 6
    assert {g.anchor for g in groups(family(must_say=[], min_chars=40), kept(album))["same_subject"]} == {
        "ada2",
        "alan1",
    }
    with pytest.raises(RecipeError, match="must_say: 'cloths' is none of clothes, action, and no file of words"):
        family(must_say=["cloths"])


@pytest.mark.parametrize(
    ("text", "clothes", "action"),
    [
        ("A man in a RED COAT runs", True, True), ("She is wearing a hat.", True, False), ("Two boys were swimming", False, True),
        ("He carries a box", False, True), ("The dog waits", False, True), ("A portrait of a woman", False, False),
        ("A coatrack and a runway", False, False), ("", False, False),
    ],
)  # fmt: skip
def test_clothes_and_action_are_found_as_words(text: str, clothes: bool, action: bool) -> None:
    for name, expected in (("clothes", clothes), ("action", action)):
        found = duckdb.execute("select regexp_matches(?, ?)", [text, pattern(name)]).fetchall()
        assert found == [(expected,)]


@pytest.mark.parametrize(("subject", "expected"), [("folder", 3), ("folder.1", 5), ("folder.2", 3), ("meta.who", 2)])
def test_the_source_says_who_it_is(subject: str, expected: int) -> None:
    names = ["dogs/rex/1.jpg", "dogs/rex/2.jpg", "dogs/rex/3.jpg", "dogs/ace/1.jpg", "dogs/zoe/1.jpg", "top.jpg"]
    rows: list[dict[str, Any]] = [{"name": n} for n in names]
    rows[3]["meta"] = rows[5]["meta"] = {"who": "ace"}
    task = family(by="column", subject=subject)
    assert task.task_types() == ["same_subject"]
    found = groups(task, kept(rows))["same_subject"]
    assert len(found) == expected
    for group in found:
        assert group.anchor not in group.others
        assert group.about["noun"] == "subject"
    if subject == "folder":
        assert {g.about["subjects"][0]["name"] for g in found} == {"dogs/rex"}
    assert not groups(family(by="column", subject=subject, min_images=6), kept(rows))["same_subject"]


def test_copies_do_not_go_together() -> None:
    rows = [{"name": f"a/{i}", "hash": 0b1111 << 4 * i} for i in range(3)]
    rows += [{"name": "a/copy", "hash": 0b1110}, {"name": "a/again", "image": "a/0", "hash": 0b1111}]
    for group in groups(family(by="column", near=2, most=9), kept(rows))["same_subject"]:
        assert len({group.anchor, *group.others} & {"a/0", "a/copy", "a/again"}) < 2
    near = groups(family(by="column", near=None, most=9), kept(rows))["same_subject"]
    assert any({g.anchor, *g.others} == {"a/0", "a/copy"} for g in near)
    assert not any({g.anchor, *g.others} == {"a/0", "a/again"} for g in near)  # the same bytes


def embedded(subjects: int = 6, photos: int = 3, loners: int = 120) -> dict[str, list[float]]:
    rng = np.random.default_rng(0)
    out = {f"x{i}": rng.normal(size=128) for i in range(loners)}
    for s in range(subjects):
        centre = 3.0 * rng.normal(size=128)
        out |= {f"s{s}/{i}": centre + rng.normal(size=128) for i in range(photos)}
    return {name: values.tolist() for name, values in out.items()}


def test_features_find_planted_subjects() -> None:
    values = embedded()
    rows = [{"name": n} for n in [*values, "blank"]]
    values["blank"] = [0.0] * 128
    task = family(by="features", features=["clip.embedding"], noun="dog")
    assert set(task.reads) == {"clip.embedding", "phash.hash"}
    found = groups(task, kept(rows, clip=values))["same_subject"]
    assert {g.anchor for g in found} == {n for n in values if n.startswith("s")}
    for group in found:
        assert group.others[0][:2] == group.anchor[:2]
        assert group.about["score"] >= 2.5 * (2 * np.log(len(values) - 1)) ** 0.5
        assert group.about["noun"] == "dog"
    assert groups(task, kept(rows, 7, clip=values))["same_subject"] == found
    strict = family(by="features", features=["clip.embedding"], min_score=1000.0)
    assert not groups(strict, kept(rows, clip=values))["same_subject"]


def test_a_second_look_by_cosine() -> None:
    values = {"ada1": [1.0, 0.0, 0.0], "ada2": [0.9, 0.1, 0.0], "ada3": [0.0, 0.0, 1.0], "alan1": [0.0, 1.0, 0.0]}
    values |= {"alan2": [0.0, 1.0, 0.1], "both1": [1.0, 1.0, 0.0], "grace": [0.0, 0.0, 1.0]}
    values["both2"] = [1.0, 0.0, 0.0]  # shows nobody like Alan
    verify = {"column": "clip.embedding", "min_cosine": 0.6, "min_yes": 0.6}
    task = family(verify=verify, must_say=[])
    assert "clip.embedding" in task.reads
    found = groups(task, kept(ALBUM, clip=values))
    assert {g.anchor for g in found["subjects_together"]} == {"both1"}
    (pair,) = found["subjects_together"]
    assert pair.about["yes"] == [1.0, 0.6667]  # of three pictures of Ada, ada3 is not like it
    assert pair.others[1] in ("ada1", "ada2")
    assert {g.anchor for g in found["same_subject"]} == {"alan1", "alan2"}
    lax = family(verify=verify | {"min_yes": 0.5}, must_say=[])
    same = {g.anchor: g.others for g in groups(lax, kept(ALBUM, clip=values))["same_subject"]}
    assert same["ada1"] == ("ada2",)
    assert "ada3" not in same


def test_a_model_that_sees_both_pictures_needs_the_engine_to_read_them(fake: Fake, tmp_path: Path) -> None:
    files = sorted(f for f in photographs() if f.endswith((".jpg", ".png")))
    shown = {r["name"]: photographs()[files[i % len(files)]] for i, r in enumerate(ALBUM)}
    fake.reply = lambda body: completion("Yes")
    task = family(verify={"chat": {"server": fake.url, "model": "tiny"}, "min_yes": 0.5}, cache=str(tmp_path))
    with pytest.raises(X2IError, match="pictures cannot be read while groups are made: use `column`"):
        groups(task, kept(ALBUM))
    task.pictures = lambda rows: {r: shown[r] for r in rows}
    found = groups(task, kept(ALBUM))
    assert {g.anchor for g in found["subjects_together"]} == {"both1", "both2"}
    assert found["subjects_together"][0].about["yes"] == [1.0, 1.0]
    count = len(fake.requests)
    groups(task, kept(ALBUM))
    assert len(fake.requests) == count


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


def test_a_build_from_captions_to_a_verified_corpus(tmp_path: Path) -> None:
    import spacy

    nlp = spacy.blank("en")
    ruler: Any = nlp.add_pipe("entity_ruler")
    ruler.add_patterns([{"label": "PERSON", "pattern": p} for p in PEOPLE])
    nlp.to_disk(tmp_path / "names")
    (tmp_path / "photos").mkdir()
    files = [f for f in sorted(photographs()) if not f.endswith(".txt")]
    texts = {r["name"]: r["text"] for r in ALBUM}
    for number, (name, text) in enumerate(texts.items()):
        picture = Image.open(io.BytesIO(photographs()[files[number % len(files)]])).convert("RGB")
        picture.crop((8 * number, 0, 8 * number + 160, 160)).save(tmp_path / "photos" / f"{name}.png")
        (tmp_path / "photos" / f"{name}.txt").write_text(text)
    recipe = {
        "name": "pairs",
        "lake": "lake",
        "out": "corpus",
        "sources": [{"kind": "folder", "name": "photos", "path": "photos", "unit_files": 3}],
        "annotators": {"phash": {}, "entities": {"pipeline": "names"}},
        "tasks": {"subject_pairs": {}},
    }
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
