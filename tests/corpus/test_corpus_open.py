"""Opening a corpus and a lake: iterate, look up, slice, ask in SQL; plain readers need no help from us."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.corpora import Built
from x2i import corpus
from x2i.base.errors import X2IError
from x2i.corpus.lake import Column, Lake
from x2i.corpus.manifest import corpus_digest


def test_samples_come_in_the_order_of_the_shards_with_their_pictures(built: Built) -> None:
    opened = corpus.open(built.corpus)
    rows = opened.manifest.to_pylist()
    samples = list(opened)
    assert [s.key for s in samples] == [r["key"] for r in rows]
    assert len(samples) == len(opened) == 24
    for sample, row in zip(samples, rows, strict=True):
        assert sample.output_image is not None
        assert sample.output_image.open().size == (row["output_size"]["width"], row["output_size"]["height"])
        assert [p.open().size for p in sample.input_images] == [(s["width"], s["height"]) for s in row["input_sizes"]]
        assert sample.provenance["image_id"] == row["image_id"]


def test_a_key_gives_its_sample_and_a_wrong_one_the_nearest(built: Built) -> None:
    opened = corpus.open(built.corpus)
    key = opened.manifest["key"][5].as_py()
    assert opened[key] == list(opened)[5]
    with pytest.raises(KeyError, match="did you mean"):
        opened[key[:-2]]
    with pytest.raises(KeyError, match="no sample 'xyz'"):
        opened["xyz"]


def test_an_untouched_picture_is_the_source_s_own_bytes(built: Built) -> None:
    (row,) = (r for r in corpus.open(built.corpus).task("text_to_image") if r.provenance["location"] == "cup.jpg")
    assert row.output_image is not None
    assert row.provenance["untouched"] is True
    assert row.output_image.data == (built.root / "photos/cup.jpg").read_bytes()


def test_a_slice_holds_one_task_everywhere(built: Built) -> None:
    opened = corpus.open(built.corpus)
    assert opened.tasks == ["canny_to_image", "deblur", "inpaint", "text_to_image"]
    deblur = opened.task("deblur")
    assert {s.task_type for s in deblur} == {"deblur"}
    assert deblur.sql("select count(*) from samples").fetchall() == [(len(deblur),)]
    assert deblur.sql("select count(*) from selection").fetchall() == [(12,)]  # the rows are those of all
    with pytest.raises(KeyError, match="it has canny_to_image"):
        opened.task("deblurr")


def test_sql_joins_samples_with_the_verdicts(built: Built) -> None:
    opened = corpus.open(built.corpus)
    found = opened.sql(
        "select m.scores['quality.sharpness'] - s.quality.sharpness from samples m join selection s using (row_id)"
    ).fetchall()
    assert len(found) == 24
    assert {difference for (difference,) in found} == {0}
    assert "samples=24" in repr(opened)


def test_it_reads_over_fsspec_as_well(built: Built) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(built.corpus), "/opened", recursive=True)
    far, near = corpus.open("memory://opened"), corpus.open(built.corpus)
    assert list(far) == list(near)
    query = "select key from samples where task_type = 'deblur' order by key"
    assert far.sql(query).fetchall() == near.sql(query).fetchall()


def test_what_is_no_corpus_is_refused_with_a_remedy(built: Built, tmp_path: Path) -> None:
    with pytest.raises(X2IError, match="x2i build"):
        corpus.open(tmp_path)
    info = json.loads((built.corpus / "corpus.json").read_text())
    (tmp_path / "corpus.json").write_text(json.dumps(info | {"format": 99}))
    with pytest.raises(X2IError, match="newer x2i"):
        corpus.open(tmp_path)
    (tmp_path / "corpus.json").write_text("{")
    with pytest.raises(X2IError, match="damaged"):
        corpus.open(tmp_path)


def test_the_digest_sees_every_shard_and_every_row_in_order(built: Built) -> None:
    opened = corpus.open(built.corpus)
    shards, table = opened.info["shards"], opened.manifest

    def of(shards: list[dict[str, object]], table: pa.Table, size: int = 4096) -> str:
        return corpus_digest(shards, table.to_batches(size))

    assert of(shards, table) == opened.digest == of(shards, table, 5)  # however the rows are batched
    others = [
        of(shards[::-1], table),
        of([shards[0] | {"sha256": "0" * 64}, *shards[1:]], table),
        of(shards, table.slice(1)),
        of(shards, table.take([1, 0, *range(2, 24)])),
        of(shards, table.set_column(12, "location", pa.array(["x"] * 24))),
    ]
    assert len({opened.digest, *others}) == 6


def test_plain_webdataset_reads_what_we_read(built: Built) -> None:
    """In a process of its own, which imports nothing of x2i."""
    script = """if True:
        import hashlib, json, sys, webdataset
        for sample in webdataset.WebDataset(sys.argv[1:], shardshuffle=False):
            files = {k: hashlib.sha256(v).hexdigest() for k, v in sample.items() if not k.startswith("__")}
            print(json.dumps([sample["__key__"], files]))
        assert "x2i" not in sys.modules
    """
    opened = corpus.open(built.corpus)
    shards = [str(built.corpus / s["name"]) for s in opened.info["shards"]]
    done = subprocess.run([sys.executable, "-c", script, *shards], capture_output=True, text=True, check=True)
    ours = [[s.key, {n: hashlib.sha256(data).hexdigest() for n, data in s.members()}] for s in opened]
    assert [json.loads(line) for line in done.stdout.splitlines()] == ours


def test_the_lake_answers_sql_over_rows_and_annotators(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(built.root)
    lake = corpus.open_lake("lake")
    assert lake.recipes() == ["small"]
    found = lake.sql("select location, width from rows join image using (row_id) where error is null order by 1")
    assert len(found.fetchall()) == 11
    with pytest.raises(X2IError, match="it has small"):
        lake.sql("select 1", recipe="large")
    with pytest.raises(X2IError, match="no such lake"):
        corpus.open_lake("lagoon")


def test_a_unit_that_is_gone_from_the_sources_is_not_shown(built: Built, tmp_path: Path) -> None:
    copy = built.copy(tmp_path)
    lake = Lake(copy.root / "lake")
    folder = next((lake.path / "rows").iterdir())
    stale = next(folder.glob("*.parquet"))
    before = lake.sql("select count(*) from rows").fetchall()
    shutil.copyfile(stale, folder / "0123456789abcdef.parquet")
    assert lake.sql("select count(*) from rows").fetchall() == before
    (fingerprint,) = json.loads(lake.record("small").read_text())["units"]
    assert "0123456789abcdef" in lake.done(Column("rows", fingerprint))


def test_the_lake_needs_nobody_s_help_to_be_read(built: Built) -> None:
    (folder,) = (built.root / "lake/quality").iterdir()
    described = json.loads((folder / "annotator.json").read_text())
    assert described["fingerprint"].startswith(folder.name)
    columns = set(pq.read_table(next(folder.glob("*.parquet"))).column_names)
    assert columns == {"row_id", *described["columns"], "error", "error_detail"}


def test_what_is_no_corpus_is_told(tmp_path: Path) -> None:
    for path, reason in {"foo://bucket": "foo", "http://127.0.0.1:1/corpus": "cannot be read"}.items():
        with pytest.raises(X2IError, match=rf"{path}.*{reason}"):
            corpus.open(path)
    (tmp_path / "corpus.json").write_text('{"format": 1, "digest": "x"}')
    with pytest.raises(X2IError, match=r"manifest\.parquet: no such file"):
        corpus.open(tmp_path).open_manifest()
    (tmp_path / "manifest.parquet").write_bytes(b"no parquet")
    with pytest.raises(X2IError, match=r"manifest\.parquet: cannot be read"):
        corpus.open(tmp_path).open_manifest()
