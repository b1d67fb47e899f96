"""Reading by the plan: aligned crops, exactness, and bad bytes that cost one sample each, never the run."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.trainer import corpora
from x2i import corpus
from x2i.base.errors import RecipeError, X2IError
from x2i.corpus.manifest import SCHEMA, SPLIT, STORED, ManifestWriter
from x2i.trainer.config import Reading
from x2i.trainer.data import DamagedSample, Example, SampleReader
from x2i.trainer.loader import Loader
from x2i.trainer.mixture import plan_of
from x2i.trainer.stage import Stage
from x2i.trainer.table import SampleTable

MIXTURE = {"deblur": 2.0, "text_to_image": 1.0, "colorize": 1.0}


def stage(**changes: object) -> Stage:
    given = {"name": "one", "resolution": 16, "steps": 12, "batch": 4, "lr": 1e-3, "mixture": MIXTURE}
    return Stage.model_validate(given | changes)


def read(table: SampleTable, of: Stage, start: int = 0, **reading: int) -> tuple[list[Example], SampleReader]:
    reader = SampleReader(table, cache_bytes=1 << 20)
    plan = plan_of(table, of, 0)
    found = [e for batch in Loader(reader, plan, of, start, Reading(**reading)) for e in batch]
    reader.close()
    return found, reader


def same(a: Example, b: Example) -> bool:
    pictures = zip((*a.inputs, a.output), (*b.inputs, b.output), strict=True)
    return (a.draw, a.key) == (b.draw, b.key) and all(np.array_equal(x, y) for x, y in pictures)


def test_images_are_held_out_with_all_their_samples(corpus_folder: Path) -> None:
    opened = corpus.open(corpus_folder)
    table = SampleTable([opened], held_out=0.2)
    ids = dict(zip(opened.manifest["key"].to_pylist(), opened.manifest["image_id"].to_pylist(), strict=True))
    train = {ids[table[i].key] for rows in table.train.values() for i in rows}
    held = {ids[table[i].key] for rows in table.held_out.values() for i in rows}
    assert held and not train & held and len(train | held) == 36
    assert sum(map(len, (*table.train.values(), *table.held_out.values()))) == len(table) == 108
    smaller = SampleTable([opened], held_out=0.1)  # a smaller share is a part of the larger one
    assert {ids[smaller[i].key] for rows in smaller.held_out.values() for i in rows} <= held


def test_no_training_sample_holds_a_held_out_image_of_another_row(corpus_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus_folder, tmp_path / "mixed")
    file = tmp_path / "mixed" / "manifest.parquet"
    rows = pq.read_table(file).to_pylist()
    for row, partner in zip(rows, rows[60:] + rows[:60], strict=True):  # as few-shot samples have an example
        row["images"] = [row["image_id"], partner["image_id"]]
        if row["task_type"] == "deblur":
            row["output_size"] = None  # as samples of understanding
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), file)
    table = SampleTable([corpus.open(tmp_path / "mixed")], held_out=0.2)
    of = {r["key"]: r for r in rows}
    held = {of[table[int(i)].key]["image_id"] for places in table.held_out.values() for i in places}
    trained = [of[table[int(i)].key] for places in table.train.values() for i in places]
    assert trained and not any(held.intersection(r["images"]) for r in trained)
    apart = [r for r in rows if r["image_id"] not in held and held.intersection(r["images"])]
    assert table.apart == len(apart) > 0
    assert table.chats == {"deblur"}


def test_a_corpus_of_before_there_were_groups_can_be_trained_on(corpus_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus_folder, tmp_path / "old")
    file = tmp_path / "old" / "manifest.parquet"
    pq.write_table(pq.read_table(file).drop_columns(["images", *SPLIT.names]), file)
    old, new = (SampleTable([corpus.open(f)], held_out=0.2) for f in (tmp_path / "old", corpus_folder))
    assert old.apart == new.apart == 0
    for task in new.tasks:
        assert list(old.train[task]) == list(new.train[task]) and list(old.held_out[task]) == list(new.held_out[task])
    assert old.derived == [str(tmp_path / "old")] and not new.derived


@pytest.mark.parametrize("min_crop", [1.0, 0.4])
def test_threads_and_memory_change_nothing_and_a_stage_can_begin_anywhere(corpus_folder: Path, min_crop: float) -> None:
    table = SampleTable([corpus.open(corpus_folder)], 0.2)
    whole = read(table, stage(min_crop=min_crop), threads=1, prefetch=1)[0]
    again = read(table, stage(min_crop=min_crop), threads=4, prefetch=7, cache_mib=0)[0]
    rest = read(table, stage(min_crop=min_crop), start=5)[0]
    assert len(whole) == 48 and len(rest) == 28
    assert all(map(same, whole, again)) and all(map(same, whole[20:], rest))


def test_random_crops_cut_inputs_and_output_at_one_place(corpus_folder: Path) -> None:
    table = SampleTable([corpus.open(corpus_folder)], 0.2)
    found = read(table, stage(min_crop=0.4, mixture={"deblur": 1, "text_to_image": 1}))[0]
    plain = SampleReader(table)
    moved = 0
    for example in (e for e in found if e.inputs):
        blurred, sharp = example.inputs[0].astype(float), example.output.astype(float)
        assert np.corrcoef(blurred.ravel(), sharp.ravel())[0, 1] > 0.8
        centre = next(plain.read(int(i), 16) for i in table.train["deblur"] if table[int(i)].key == example.key)
        moved += not np.array_equal(centre.output, example.output)
    assert moved > 10
    for example in (e for e in found if not e.inputs):  # a caption speaks of the whole picture: the centre
        centre = next(plain.read(int(i), 16) for i in table.train["text_to_image"] if table[int(i)].key == example.key)
        assert np.abs(centre.output.astype(int) - example.output).mean() < 4


def damage(folder: Path, key: str, kind: str) -> None:
    """Spoil one sample. `json` and `image` also put the new hash into the manifest, so that only decoding fails."""
    import hashlib

    table = pq.read_table(folder / "manifest.parquet")
    rows = table.to_pylist()
    row = next(r for r in rows if r["key"] == key)
    shard = folder / row["shard"]
    data = bytearray(shard.read_bytes())
    if kind == "flip":
        data[row["members"][-1]["offset"] + 40] ^= 1
    elif kind == "cut":
        del data[row["offset"] + 700 :]
    else:
        member = next(m for m in row["members"] if m["suffix"].startswith("json" if kind == "json" else "output"))
        data[member["offset"] + 20 : member["offset"] + member["size"]] = bytes(member["size"] - 20)
        row["sha256"] = hashlib.sha256(data[row["offset"] : row["offset"] + row["size"]]).hexdigest()
        with ManifestWriter(folder / "manifest.parquet", row_group=16) as manifest:
            manifest.write(pa.Table.from_pylist(rows, schema=STORED))
    shard.write_bytes(data)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("flip", "SHA-256"), ("cut", "too early"), ("json", "JSON cannot be read"), ("image", "does not decode")],
)
def test_a_damaged_sample_is_replaced_by_its_spare_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, reason: str
) -> None:
    made = list(corpora.samples(6))
    folder = corpora.write(tmp_path / "corpus", made, per_shard=1)
    before = read(SampleTable([corpus.open(folder)], 0.0), stage())[0]
    victim = next(e.key for e in before if e.task == "deblur")
    damage(folder, victim, kind)
    table = SampleTable([corpus.open(folder)], 0.0)
    with caplog.at_level(logging.WARNING):
        after, reader = read(table, stage())
    assert [(e.draw, e.task) for e in after] == [(e.draw, e.task) for e in before]
    replaced = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if not same(a, b)]
    assert replaced == [i for i, e in enumerate(before) if e.key == victim] and replaced
    assert all(e.key != victim for e in after)
    (found,) = reader.damaged.values()
    assert (found.key, reason in found.reason) == (victim, True)
    assert sum(victim in r.message and found.shard in r.message for r in caplog.records) == 1
    assert all(map(same, after, read(table, stage(), threads=1)[0]))  # the same spares again


def test_a_corpus_that_is_all_damaged_ends_the_run_with_a_remedy(tmp_path: Path) -> None:
    folder = corpora.write(tmp_path / "corpus", list(corpora.samples(2)))
    (folder / "shards/00000.tar").write_bytes(b"")
    table = SampleTable([corpus.open(folder)], 0.0)
    with pytest.raises(X2IError, match="x2i verify"):
        read(table, stage())
    with pytest.raises(DamagedSample, match="too early"):
        SampleReader(table).text(0)


def test_an_empty_corpus_is_refused(tmp_path: Path, corpus_folder: Path) -> None:
    table = pq.read_table(corpus_folder / "manifest.parquet")
    empty = table.slice(0, 0)
    (tmp_path / "corpus").mkdir()
    pq.write_table(empty, tmp_path / "corpus/manifest.parquet")
    (tmp_path / "corpus/corpus.json").write_text(json.dumps({"format": 1, "digest": "0"}))
    with pytest.raises(RecipeError, match="no sample; nothing to train on"):
        SampleTable([corpus.open(tmp_path / "corpus")], 0.1)
