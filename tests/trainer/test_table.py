"""The table and its plan over manifests of several row groups: what is drawn, from where, and what it may depend on."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from x2i import corpus
from x2i.base.errors import RecipeError
from x2i.corpus.manifest import SCHEMA, SPLIT, ManifestWriter
from x2i.trainer import index
from x2i.trainer.kept import Kept
from x2i.trainer.lengths import tokens
from x2i.trainer.mixture import held_out_of, plan_of, tasks_of, training_of
from x2i.trainer.plan import StagePlan
from x2i.trainer.stage import Stage
from x2i.trainer.table import SampleTable

TASKS = ("deblur", "describe", "text_to_image")


def rows_of(images: range, source: str = "here") -> list[dict[str, Any]]:
    """Of each image a sample for one to three tasks; `describe` has no output image; every tenth has a second image."""
    out: list[dict[str, Any]] = []
    for number in images:
        image = hashlib.sha256(b"%d" % number).hexdigest()
        other = hashlib.sha256(b"%d" % (number // 2)).hexdigest()
        for task in TASKS[: 1 + number % 3]:
            place = {"shard": f"shards/{number // 50:05d}.tar", "offset": len(out) * 1024, "size": 1024}
            size = None if task == "describe" else {"width": 64, "height": 64}
            said = {"instruction_chars": 9, "input_sizes": [], "output_size": size, "scores": [], "location": ""}
            images_of = list(dict.fromkeys([image, other] if number % 10 == 0 else [image]))
            about = {"image_id": image, "images": images_of, "row_id": image, "source": source, "sha256": ""}
            members = [{"suffix": "json", "offset": len(out) * 1024 + 512, "size": 9}]
            out.append({"key": f"{image[:12]}-{task}", "task_type": task, "members": members, **place, **said, **about})
    return out


def write(folder: Path, rows: list[dict[str, Any]], row_group: int = 32, name: str | None = None) -> corpus.Corpus:
    """A corpus without its shards: a plan must not miss them."""
    folder.mkdir(parents=True)
    with ManifestWriter(folder / "manifest.parquet", row_group) as manifest:
        manifest.write(pa.Table.from_pylist(rows, SCHEMA))
    (folder / "corpus.json").write_text(json.dumps({"format": 1, "digest": "0", "name": name or folder.name}))
    return corpus.open(folder)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[corpus.Corpus]:
    folder = tmp_path_factory.mktemp("two")
    first = rows_of(range(150), "camera") + rows_of(range(150, 300), "web")
    return [write(folder / "first", first), write(folder / "second", rows_of(range(300, 400), "web"), 1000)]


def stage(**changes: Any) -> Stage:
    given = {"name": "one", "resolution": 16, "steps": 9, "batch": 8, "lr": 1, "mixture": {"deblur": 3, "describe": 1}}
    return Stage.model_validate(given | changes)


def keys(table: SampleTable, samples: Any) -> list[str]:
    return [table[s].key for s in samples]


def test_every_sample_is_found_as_its_manifest_has_it(two: list[corpus.Corpus]) -> None:
    table = SampleTable(two, 0.2)
    rows = [(place, row) for place, c in enumerate(two) for row in c.manifest.to_pylist()]
    assert len(table) == len(rows)
    for sample in np.random.default_rng(0).permutation(len(rows)).tolist():
        place, row = rows[sample]
        ref = table[sample]
        assert (ref.key, ref.task, ref.place, ref.corpus) == (row["key"], row["task_type"], place, two[place])
        assert ref.members == tuple((m["suffix"], m["offset"], m["size"]) for m in row["members"])
        assert (ref.shard, ref.offset, ref.size, ref.source) == (
            row["shard"],
            row["offset"],
            row["size"],
            row["source"],
        )
    with pytest.raises(IndexError):
        table[len(rows)]


def test_the_sides_are_those_of_the_images_and_together_they_are_all(two: list[corpus.Corpus]) -> None:
    table = SampleTable(two, 0.2)
    rows = {row["key"]: row for c in two for row in c.manifest.to_pylist()}
    held = {r["image_id"] for r in rows.values() if r["split"] < 0.2 * 2**32}
    told = {key for part in table.held_out.values() for key in keys(table, part)}
    trained = {key for part in table.train.values() for key in keys(table, part)}
    assert told == {k for k, r in rows.items() if r["image_id"] in held}
    assert trained == {k for k, r in rows.items() if not held.intersection(r["images"])}
    assert table.apart == len(rows) - len(told) - len(trained) > 0
    assert table.chats == {"describe"} and table.tasks == sorted(TASKS)
    assert all(table.train[task][-1] == list(table.train[task])[-1] for task in TASKS)
    assert 0.1 < len(held) / 400 < 0.3


def test_a_table_that_keeps_nothing_and_one_without_the_split_columns_say_the_same(
    two: list[corpus.Corpus], tmp_path: Path
) -> None:
    manifest = two[0].manifest.drop_columns(SPLIT.names)
    (tmp_path / "old").mkdir()
    pq.write_table(manifest, tmp_path / "old/manifest.parquet", row_group_size=32)
    (tmp_path / "old/corpus.json").write_text(json.dumps({"format": 1, "digest": "0", "name": "first"}))
    tables = [
        SampleTable(two[:1], 0.2),
        SampleTable(two[:1], 0.2, memory=4),
        SampleTable([corpus.open(tmp_path / "old")], 0.2),
    ]
    plans = [plan_of(table, stage(), 0) for table in tables]
    for step in range(30):
        one, *others = (plan.step(step) for plan in plans)
        assert all(one == other for other in others)
    assert len({tuple(keys(table, range(0, 300, 7))) for table in tables}) == 1
    assert tables[2].derived and not tables[0].derived


def test_each_epoch_has_every_training_sample_once_and_no_other(two: list[corpus.Corpus]) -> None:
    table = SampleTable(two, 0.2)
    plan = StagePlan(table.train, {"deblur": 2, "describe": 1}, 8, 0, "one", window=48, span=64)
    for task, part in table.train.items():
        if task in plan.strata:
            drawn = [d.sample for i in range(len(part) * 12) if (d := plan.draw(i)).task == task]
            for epoch in range(2):
                assert sorted(drawn[epoch * len(part) : (epoch + 1) * len(part)]) == list(part)
            assert drawn[: len(part)] != drawn[len(part) : 2 * len(part)]


def test_a_thousand_steps_asked_for_at_random_are_those_of_a_straight_run(two: list[corpus.Corpus]) -> None:
    straight = plan_of(SampleTable(two, 0.2), stage(), 7)
    wanted = [straight.step(step) for step in range(1000)]
    other = plan_of(SampleTable(two, 0.2, memory=1 << 16), stage(), 7)
    assert all(other.step(step) == wanted[step] for step in np.random.default_rng(0).permutation(1000).tolist())


def test_a_corpus_that_grows_moves_no_image_to_the_other_side(tmp_path: Path) -> None:
    rows = rows_of(range(200))
    small = SampleTable([write(tmp_path / "small", rows)], 0.1)
    large = SampleTable([write(tmp_path / "large", rows_of(range(500, 600)) + rows + rows_of(range(200, 400)))], 0.1)
    for side in ("train", "held_out"):
        before, after = (
            {key for part in getattr(table, side).values() for key in keys(table, part)} for table in (small, large)
        )
        assert before <= after and len(before) < len(after)


def test_where_no_image_falls_below_the_share_the_lowest_is_held_out(tmp_path: Path) -> None:
    opened = write(tmp_path / "few", rows_of(range(5)))
    table = SampleTable([opened], 1e-9)
    held = {table[s].image_id for part in table.held_out.values() for s in part}
    lowest = min(opened.manifest.to_pylist(), key=lambda r: r["split"])["image_id"]
    assert held == {lowest}
    assert not any(map(len, SampleTable([opened], 0).held_out.values()))
    assert not any(map(len, SampleTable([write(tmp_path / "one", rows_of(range(1)))], 1e-9).held_out.values()))


@pytest.mark.parametrize(
    ("by", "mixture"),
    [
        ("task", {"deblur": 3, "describe": 1}),
        ("source", {"web": 3, "camera": 1}),
        ("corpus", {"second": 3, "first": 1}),
    ],
)
def test_a_mixture_may_be_by_task_source_or_corpus(
    two: list[corpus.Corpus], by: str, mixture: dict[str, float]
) -> None:
    table = SampleTable(two, 0.2)
    of = stage(mixture_by=by, mixture=mixture)
    plan = plan_of(table, of, 0)
    dealt: Counter[str] = Counter()
    for draw in (plan.draw(i) for i in range(4096)):
        ref = table[draw.sample]
        dealt[{"task": ref.task, "source": ref.source, "corpus": ref.corpus.info["name"]}[by]] += 1
        assert draw.task == ref.task
    assert dealt == {name: 1024 * weight for name, weight in mixture.items()}
    tasks = {"deblur", "describe"} if by == "task" else set(TASKS)
    assert tasks_of(table, of) == held_out_of(table, of).keys() == training_of(table, of).keys() == tasks
    with pytest.raises(RecipeError, match="no training samples of sea; they have"):
        plan_of(table, stage(mixture_by=by, mixture={"sea": 1}), 0)


def test_a_mixture_by_tokens_gives_each_its_share_of_them(two: list[corpus.Corpus]) -> None:
    table = SampleTable(two, 0.2)
    of = stage(mixture={"deblur": 3, "describe": 1}, mixture_unit="tokens", resolution=64, chat_resolution=32)
    plan = plan_of(table, of, 0)
    assert isinstance(plan, StagePlan)
    manifests = [c.manifest for c in two]
    length = np.concatenate([tokens(m, of) for m in manifests])
    assert set(length[:2]) == {16 + 9 / 4} and set(length[3:5]) == {16 + 9 / 4, 9 / 4}
    total: Counter[str] = Counter()
    for draw in (plan.draw(i) for i in range(4096)):
        total[draw.stratum] += length[draw.sample]
    assert total["deblur"] / total["describe"] == pytest.approx(3, rel=0.01)
    again = plan_of(SampleTable(two, 0.2), of, 0)
    assert isinstance(again, StagePlan) and again.counts == plan.counts


def test_a_conversation_is_as_long_as_its_record_and_its_pictures(two: list[corpus.Corpus]) -> None:
    row = rows_of(range(1, 2))[1] | {"input_sizes": [{"width": 300, "height": 100}, {"width": 20, "height": 20}]}
    row["members"] = [{"suffix": "jpg", "offset": 0, "size": 9999}, {"suffix": "json", "offset": 9, "size": 400}]
    of = stage(resolution=64, chat_resolution=32)
    drawn = rows_of(range(1, 2))[0] | {"input_sizes": row["input_sizes"], "instruction_chars": 40}
    found = tokens(pa.Table.from_pylist([row, drawn], SCHEMA), of)
    assert found.tolist() == [3 * 4 + 4 + 100, 3 * 16 + 10]


def test_a_stage_is_evaluated_on_what_its_mixture_names(two: list[corpus.Corpus]) -> None:
    table = SampleTable(two, 0.2)
    of = stage(mixture_by="corpus", mixture={"second": 1})
    found = [table[s] for part in held_out_of(table, of).values() for s in part.spread(5)]
    assert found and all(ref.place == 1 for ref in found)


def test_corpora_of_one_name_are_called_by_their_paths(tmp_path: Path) -> None:
    made = [write(tmp_path / n, rows_of(range(20)), name="photographs") for n in ("a", "b")]
    table = SampleTable(made, 0)
    assert table.samples(index.TRAIN, "corpus").keys() == {str(tmp_path / "a"), str(tmp_path / "b")}


def test_tasks_without_output_images_are_known_where_a_file_has_no_statistics(
    two: list[corpus.Corpus], tmp_path: Path
) -> None:
    (tmp_path / "bare").mkdir()
    pq.write_table(two[0].manifest, tmp_path / "bare/manifest.parquet", row_group_size=40, write_statistics=False)
    (tmp_path / "bare/corpus.json").write_text(json.dumps({"format": 1, "digest": "0"}))
    table = SampleTable([corpus.open(tmp_path / "bare")], 0.2)
    assert table.chats == {"describe"} and len(table.sizes) > 5


class Part:
    """Something of so many bytes."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes


def test_what_is_kept_stays_within_its_bytes_and_is_made_once() -> None:
    kept: Kept[Part] = Kept(100)
    made: list[int] = []

    def make(number: int) -> Part:
        made.append(number)
        time.sleep(0.001)
        return Part(30)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: kept.get(n, lambda: make(n)), [0, 1, 2] * 20))
    assert sorted(made) == [0, 1, 2] and len(set(map(id, found))) == 3
    kept.get(0, lambda: make(0))
    kept.get(3, lambda: make(3))  # 120 bytes: the one that was not asked for longest goes
    kept.get(0, lambda: make(0))
    assert made[3:] == [3]
    kept.get(9, lambda: Part(1000))  # larger than all: it is kept alone
    kept.get(3, lambda: make(3))
    assert made[3:] == [3, 3]
