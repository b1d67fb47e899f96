"""Subject pairs: who is grouped with whom, by names, by the source and by features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest

from tests.pipelines.annotators.test_caption_server import Fake, completion, fake
from tests.pipelines.tasks.pairing import ALBUM, WEARS, family, groups, kept
from x2i.base.errors import RecipeError, X2IError
from x2i.pipelines.quickstart import photographs
from x2i.pipelines.tasks._described import pattern

__all__ = ["fake"]  # the fixture


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
