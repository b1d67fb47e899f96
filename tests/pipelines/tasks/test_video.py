"""Frames of clips: which make a pair, which are key frames, and a corpus of both from video files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")

import cv2
import duckdb
import numpy as np
import pyarrow as pa
import pytest

from tests.pipelines.annotators.clips import tiny
from tests.pipelines.builds import recipe
from tests.pipelines.tasks.inline import build
from tests.pipelines.tasks.rows import PHOTOS, row
from x2i.base.errors import RecipeError
from x2i.corpus.sample import Sample
from x2i.corpus.verify import verify
from x2i.pipelines import recipe as recipes
from x2i.pipelines.images import decode, read_header
from x2i.pipelines.select.mdp3 import mdp3
from x2i.pipelines.tasks.base import Found, Group, Selected, Skipped
from x2i.pipelines.tasks.video import Video, VideoConfig, lifted

RATE = 10.0


def pan(path: Path, name: str, step: int, frames: int = 20) -> None:
    """A clip of a window that moves over a photograph, `step` pixels a frame."""
    photo = decode(PHOTOS[name], read_header(PHOTOS[name]))
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*"mp4v"), RATE, (128, 96))
    for number in range(frames):
        x = step * number
        writer.write(cv2.cvtColor(np.ascontiguousarray(photo[100:196, x : x + 128]), cv2.COLOR_RGB2BGR))
    writer.release()


def kept(clips: dict[str, list[tuple[int, int]]], lake: dict[str, list[Any]] | None = None) -> Any:
    """A selection of frames, (number, pHash) by clip, a tenth of a second apart; `lake.clip` may have vectors, cosines."""
    rows = [
        {
            "row_id": f"{clip}/{number}",
            "image_id": f"{clip}/{number}",
            "source": "clips",
            "meta": json.dumps({"clip": clip, "frame": number, "time": number / RATE}),
            "phash": {"hash": hash_},
        }
        for clip, frames in clips.items()
        for number, hash_ in frames
    ]
    still = {"row_id": "still", "image_id": "still", "source": "photos", "meta": "{}", "phash": {"hash": 0}}
    struct = pa.struct({"hash": pa.uint64()})
    table = pa.Table.from_pylist(
        [still, *rows[::-1]], pa.schema([(n, pa.string()) for n in list(still)[:4]] + [("phash", struct)])
    )
    connection = duckdb.connect()
    connection.register("given", table)
    connection.execute("create view kept as select * from given; create schema lake")
    if lake is not None:
        columns = {"row_id": [r["row_id"] for r in rows], **lake}
        connection.register("embedded", pa.table(columns))
        connection.execute("create view lake.clip as select * from embedded")
    return connection


def groups(connection: Any, seed: int = 0, **config: Any) -> list[Group]:
    return list(Video(VideoConfig(**config)).groups(connection, seed))


def bits(number: int) -> int:
    """A hash with so many bits set."""
    return (1 << number) - 1


def test_a_pair_is_of_one_clip_in_the_order_of_time_and_moves_enough() -> None:
    clips = {"a": [(i, bits(i)) for i in range(30)], "b": [(i, 0) for i in range(30)], "c": [(4, 0), (9, bits(9))]}
    found = groups(kept(clips), pairs=50, seconds=(0.4, 1.0), bits=(5, 9))
    assert {g.about["clip"] for g in found} == {"a", "c"}  # nothing moves in b
    for group in found:
        (earlier,), later = group.others, group.anchor
        (clip, first), (other, last) = (n.split("/") for n in (earlier, later))
        assert clip == other == group.about["clip"]
        assert group.about["frames"] == [int(first), int(last)]
        assert 4 <= int(last) - int(first) <= 10
        assert group.about["seconds"] == pytest.approx((int(last) - int(first)) / RATE)
        assert 5 <= group.about["bits"] <= 9
    of_a = [(g.others[0], g.anchor) for g in found if g.about["clip"] == "a"]
    assert len(set(of_a)) == len(of_a) == 50
    (far,) = (g for g in groups(kept(clips), choose="ends", bits=(5, 9)) if g.about["clip"] == "a")
    assert far.about["frames"] == [0, 9]  # the first of those that are as far apart


def test_pairs_are_drawn_by_content() -> None:
    clips = {f"clip{c}": [(i, bits(3 * i)) for i in range(20)] for c in range(5)}
    found = groups(kept(clips))
    assert len(found) == 5
    assert found == groups(kept(dict(reversed(clips.items()))))
    assert found != groups(kept(clips), seed=1)
    again = {g.about["clip"]: g.about["frames"] for g in groups(kept({"clip3": clips["clip3"]}))}
    assert again["clip3"] == next(g.about["frames"] for g in found if g.about["clip"] == "clip3")


def test_two_rows_of_the_same_frame_are_one_picture() -> None:
    assert groups(kept({"a": [(7, 0), (7, bits(20))]}), seconds=(0, 9)) == []


def test_key_frames_are_those_that_the_text_itself_would_give() -> None:
    """The cosines alone lead MDP3 to the same frames as the text's embedding, which the lake does not have."""
    rng = np.random.default_rng(3)
    changed = 0
    for _ in range(30):
        frames = rng.standard_normal((12, 40)) + 2 * rng.standard_normal(40)
        frames /= np.linalg.norm(frames, axis=1, keepdims=True)
        text = rng.standard_normal(40) + frames[rng.integers(12)] * 3
        text /= np.linalg.norm(text)
        vectors, query = lifted(frames, frames @ text)
        assert np.allclose(vectors @ query, frames @ text) and np.linalg.norm(query) == pytest.approx(1)
        assert mdp3(vectors, query, 4) == mdp3(frames, text, 4)
        changed += mdp3(*lifted(frames, None), 4) != mdp3(frames, text, 4)
    assert changed > 15  # and the text matters
    same = np.repeat(frames[:1], 5, axis=0)
    vectors, query = lifted(same, np.array([0.3, 0.301, 0.299, 0.3, 0.3]))
    assert np.allclose(vectors @ query, 0.3, atol=0.01) and np.linalg.norm(query) == pytest.approx(1)


def test_key_frames_of_a_clip_come_in_order_and_their_first_is_the_anchor() -> None:
    rng = np.random.default_rng(0)
    count = 40
    vectors = rng.standard_normal((count, 16))
    text = vectors[25] / np.linalg.norm(vectors[25])
    cosines = vectors @ text / np.linalg.norm(vectors, axis=1)
    clips = {"a": [(i, 0) for i in range(count)]}
    table = {"embedding": pa.array(list(vectors.astype(np.float32))), "similarity": pa.array(cosines)}
    config: dict[str, Any] = {"tasks": ("keyframes",), "frames": 4}
    (group,) = groups(kept(clips, table), **config)
    numbers = group.about["frames"]
    assert numbers == sorted(numbers) and len(numbers) == 4 and 25 in numbers
    assert [group.anchor, *group.others] == [f"a/{n}" for n in numbers]
    expected = mdp3(vectors, text, 4)
    assert numbers == expected
    (every,) = groups(kept(clips, table), tasks=("keyframes",), frames=4, candidates=4)
    assert every.about["frames"] == [5, 15, 25, 35]
    silent = {**table, "similarity": pa.nulls(count, pa.float32())}
    assert groups(kept(clips, silent), **config) == []
    (typical,) = groups(kept(clips, silent), relevance=None, **config)
    assert typical.about["frames"] == mdp3(*lifted(vectors, None), 4)
    assert groups(kept({"a": [(0, 0)]}, {n: v[:1] for n, v in table.items()}), **config) == []


def frame(name: str, number: int) -> Selected:
    return row(name, meta={"clip": "a", "frame": number}, text="moving a cup")


def made(anchor: Selected, found: Found) -> list[Sample | Skipped]:
    anchor.groups = (found,)
    return list(Video(VideoConfig(tasks=("motion", "keyframes"))).build(anchor))


def test_a_pair_becomes_before_and_after() -> None:
    later, earlier = frame("coffee.png", 9), frame("chelsea.png", 2)
    skipped, sample = made(later, Found("motion", (earlier,), {"frames": [2, 9], "clip": "a"}))
    assert skipped == Skipped("keyframes", "not_chosen")
    assert isinstance(sample, Sample)
    assert (sample.input_images, sample.output_image) == ((earlier.picture,), later.picture)
    assert "Moving a cup." in sample.instruction
    assert sample.provenance["untouched"] is True
    assert sample.provenance["others"][0]["location"] == "chelsea.png"


def test_key_frames_become_a_question_about_all_of_them() -> None:
    first, others = frame("coffee.png", 2), (frame("chelsea.png", 5), frame("rocket.jpg", 9))
    _, sample = made(first, Found("keyframes", others, {"frames": [2, 5, 9], "clip": "a"}))
    assert isinstance(sample, Sample)
    assert sample.input_images == (first.picture, *(o.picture for o in others)) and sample.output_image is None
    user, assistant = sample.messages
    assert user["content"].startswith("<image>" * 3) and user["content"].count("<image>") == 3
    assert assistant == {"role": "assistant", "content": "Moving a cup."}
    assert sample.provenance["parameters"]["relevance"] == "clip.similarity"


def test_what_cannot_be_made_says_why() -> None:
    assert list(Video(VideoConfig()).build(row())) == [Skipped("motion", "not_a_frame")]
    lost = Found("motion", (), {"frames": [0, 1]}, "source_changed")
    assert Skipped("motion", "other_source_changed") in made(frame("coffee.png", 1), lost)
    mute = frame("coffee.png", 1)
    mute.text = None
    assert Skipped("motion", "no_text") in made(mute, Found("motion", (mute,), {"frames": [0, 1]}))


def test_a_recipe_without_the_annotators_is_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(RecipeError, match=r"phash\.hash.*phash: \{kind: phash\}"):
        recipes.load(recipe(tmp_path, annotators={}, select={}, tasks={"video": {}}))
    with pytest.raises(RecipeError, match=r"clip\.embedding.*classes\.embedding, relevance: null"):
        recipes.load(recipe(tmp_path, select={}, tasks={"video": {"tasks": ["keyframes"]}}))


def test_clips_become_a_corpus(tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    for i, (name, step) in enumerate((("astronaut.png", 12), ("coffee.png", 20), ("china.jpg", 0))):
        pan(folder / f"{i}.mp4", name, step)
    labels = [{"id": str(i), "label": f"moving the camera over picture {i}"} for i in range(3)]
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    weights = tiny(tmp_path / "clip")
    path = recipe(
        tmp_path,
        sources=[{"kind": "clips", "name": "clips", "path": str(folder), "labels": str(tmp_path / "labels.json")}],
        annotators={"phash": {}, "clip": {"model": str(weights), "weights": str(weights)}},
        select={},
        tasks={"video": {"tasks": ["motion", "keyframes"], "frames": 3, "seconds": [0.2, 2]}},
    )
    samples = list(build(path))
    assert verify(tmp_path / "corpus").ok
    motion = [s for s in samples if s.task_type == "motion"]
    frames = [s for s in samples if s.task_type == "keyframes"]
    assert {s.provenance["parameters"]["clip"] for s in motion} == {"0.mp4", "1.mp4"}  # nothing moves in the third
    assert {s.provenance["parameters"]["clip"] for s in frames} == {"0.mp4", "1.mp4", "2.mp4"}
    assert all(len(s.input_images) == 3 for s in frames)
    for sample in motion:
        about = sample.provenance["parameters"]
        assert f"picture {about['clip'][0]}." in sample.instruction
        assert about["frames"][0] < about["frames"][1]
