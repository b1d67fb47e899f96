"""`verify` passes a whole corpus, and says what and where of every damage; it never dies of one."""

from __future__ import annotations

import hashlib
import io
import json
import random
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.corpora import Built
from x2i import corpus
from x2i.base.errors import RecipeError
from x2i.corpus.verify import Report, verify

SHARD = "shards/00001.tar"


@pytest.fixture
def folder(built: Built, tmp_path: Path) -> Path:
    """A copy of the corpus, to be damaged."""
    return Path(shutil.copytree(built.corpus, tmp_path / "corpus"))


def kinds(report: Report) -> set[str]:
    return {fault.kind for fault in report.faults}


def edit_info(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "corpus.json"
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))


def edit_table(folder: Path, name: str, change: Callable[[list[dict[str, Any]]], object], cover: bool = True) -> None:
    """Change a table's rows; with `cover`, its recorded hash follows, as one who hides a change would do."""
    path = folder / name
    table = pq.read_table(path)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    if cover:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        edit_info(folder, lambda info: info["files"].update({name: found}))


def rewrite_shard(folder: Path, change: Callable[[tarfile.TarInfo, bytes], tuple[tarfile.TarInfo, bytes]]) -> None:
    """Write a shard again with tarfile, each member through `change`."""
    out = io.BytesIO()
    with tarfile.open(folder / SHARD) as old, tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as new:
        for info in old.getmembers():
            file = old.extractfile(info)
            assert file is not None
            info, data = change(info, file.read())
            info.size = len(data)
            new.addfile(info, io.BytesIO(data))
    (folder / SHARD).write_bytes(out.getvalue())


def test_a_whole_corpus_passes_with_the_digest_that_the_build_recorded(built: Built) -> None:
    done: list[tuple[int, int]] = []
    report = verify(built.corpus, webdataset=True, on_shard=lambda *at: done.append(at))
    assert report.ok, report.faults
    opened = corpus.open(built.corpus)
    assert report.digest == opened.digest
    assert (report.samples, report.shards) == (len(opened), len(opened.info["shards"]))
    assert report.images == sum(len(s.members()) - 1 for s in opened)
    assert (report.rows_in, report.rows_out) == (12, 6)
    assert done[-1] == (report.shards, report.shards)


def test_the_number_of_threads_changes_nothing(built: Built) -> None:
    one, four = verify(built.corpus, workers=1), verify(built.corpus, workers=4)
    one.seconds = four.seconds = 0
    assert one == four


def test_images_are_left_alone_if_so_wished(built: Built) -> None:
    report = verify(built.corpus, images=False)
    assert report.ok
    assert report.images == 0


def test_one_flipped_byte_is_found_in_its_shard_and_its_sample(folder: Path) -> None:
    row = next(r for r in corpus.open(folder).manifest.to_pylist() if r["shard"] == SHARD)
    data = bytearray((folder / SHARD).read_bytes())
    data[row["members"][-1]["offset"] + 100] ^= 1
    (folder / SHARD).write_bytes(data)
    report = verify(folder)
    assert {"shard_sha256", "sample_sha256", "digest"} <= kinds(report)
    (fault,) = (f for f in report.faults if f.kind == "sample_sha256")
    assert (fault.file, fault.key, fault.offset) == (SHARD, row["key"], row["offset"])
    assert report.digest != corpus.open(folder).digest


@pytest.mark.parametrize("cover", [False, True])
def test_a_deleted_line_of_the_manifest_is_found_even_if_its_hash_is_mended(folder: Path, cover: bool) -> None:
    gone = corpus.open(folder).manifest.to_pylist()[10]
    edit_table(folder, "manifest.parquet", lambda rows: rows.pop(10), cover)
    report = verify(folder)
    assert ("file_sha256" in kinds(report)) is not cover
    (fault,) = (f for f in report.faults if f.kind == "sample_unlisted")
    assert (fault.file, fault.key, fault.offset) == (gone["shard"], gone["key"], gone["offset"])
    assert {"count", "digest"} <= kinds(report)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_tar_is_found_and_its_lost_samples_are_counted(folder: Path, share: float) -> None:
    data = (folder / SHARD).read_bytes()
    cut = int(len(data) * share)
    (folder / SHARD).write_bytes(data[:cut])
    report = verify(folder)
    assert {"shard_size", "shard_sha256"} <= kinds(report)
    lost = [
        r for r in corpus.open(folder).manifest.to_pylist() if r["shard"] == SHARD and r["offset"] + r["size"] > cut
    ]
    if lost:
        (fault,) = (f for f in report.faults if f.kind == "sample_cut")
        assert (fault.key, fault.offset) == (lost[0]["key"], lost[0]["offset"])
        assert f"{len(lost)} samples" in fault.problem


def test_a_missing_shard_is_named_with_the_samples_that_it_held(folder: Path) -> None:
    (folder / SHARD).unlink()
    report = verify(folder)
    (fault,) = (f for f in report.faults if f.kind == "shard_missing")
    assert fault.file == SHARD
    assert "8 samples" in fault.problem
    assert report.digest is None
    assert report.shards == 2  # the others were looked at all the same


def test_a_broken_header_hides_no_sample_behind_it(folder: Path) -> None:
    rows = [r for r in corpus.open(folder).manifest.to_pylist() if r["shard"] == SHARD]
    data = bytearray((folder / SHARD).read_bytes())
    data[rows[1]["offset"]] ^= 0xFF  # readers stop here
    data[rows[5]["members"][-1]["offset"]] ^= 0xFF  # and would never see this
    (folder / SHARD).write_bytes(data)
    report = verify(folder)
    assert "tar_unreadable" in kinds(report)
    assert {f.key for f in report.faults if f.kind == "sample_sha256"} == {rows[1]["key"], rows[5]["key"]}
    assert "sample_missing" not in kinds(report)


def test_a_strange_file_among_the_shards_is_found(folder: Path) -> None:
    shutil.copyfile(folder / SHARD, folder / "shards/00009.tar")
    (fault,) = verify(folder).faults
    assert (fault.kind, fault.file) == ("file_unlisted", "shards/00009.tar")
    assert "Remove" in fault.remedy


def test_headers_with_a_time_or_an_owner_are_found(folder: Path) -> None:
    def touch(info: tarfile.TarInfo, data: bytes) -> tuple[tarfile.TarInfo, bytes]:
        info.mtime, info.uid = 1_700_000_000, 1000
        return info, data

    rewrite_shard(folder, touch)
    (fault,) = (f for f in verify(folder).faults if f.kind == "tar_header")
    assert "mtime" in fault.problem
    assert "uid" in fault.problem


def test_an_image_of_another_size_or_kind_is_found_behind_mended_hashes(folder: Path, built: Built) -> None:
    picture = (built.root / "photos/cup.jpg").read_bytes()

    def swap(info: tarfile.TarInfo, data: bytes) -> tuple[tarfile.TarInfo, bytes]:
        if info.name.endswith((".output.jpg", ".input_1.png")) and len(data) > len(picture):
            return info, picture.ljust(len(data), b"\0")  # the members behind it stay where they are
        return info, data

    rewrite_shard(folder, swap)
    images = [f.problem for f in verify(folder).faults if f.kind == "image"]
    assert any("the manifest says" in p for p in images)
    assert any("is a JPEG by its content" in p for p in images)


def test_a_record_that_does_not_say_what_the_manifest_says_is_found(folder: Path) -> None:
    def lie(info: tarfile.TarInfo, data: bytes) -> tuple[tarfile.TarInfo, bytes]:
        if not info.name.endswith(".json"):
            return info, data
        record = json.loads(data)
        record["task_type"], record["instruction"] = "?", "?"
        return info, json.dumps(record, separators=(",", ":")).encode().ljust(len(data))

    rewrite_shard(folder, lie)
    report = verify(folder)
    assert any(f.kind == "manifest_row" and "task_type: '?'" in f.problem for f in report.faults)
    assert any(f.kind == "placeholders" for f in report.faults)


def test_a_manifest_in_another_order_is_found(folder: Path) -> None:
    edit_table(folder, "manifest.parquet", lambda rows: rows.sort(key=lambda r: r["key"]))
    assert {"manifest_order", "sample_order", "digest"} <= kinds(verify(folder))


@pytest.mark.parametrize(
    ("kind", "name", "change"),
    [
        ("equation", "selection.parquet", lambda rows: rows.append(rows[0] | {"row_id": "f" * 32})),
        ("count", "selection.parquet", lambda rows: rows.pop(1)),
        ("verdict", "selection.parquet", lambda rows: rows[1].update(reason=None)),
        ("kept_without_sample", "selection.parquet", lambda rows: rows[1].update(kept=True, stage=None, reason=None)),
        ("row_twice", "selection.parquet", lambda rows: rows.append(rows[1])),
        ("sample_not_kept", "selection.parquet", lambda rows: rows[0].update(kept=False, stage="where", reason="safe")),
        ("rule", "selection.parquet", lambda rows: rows[0]["quality"].update(sharpness=1.0)),
        ("scores", "selection.parquet", lambda rows: rows[0]["quality"].update(sharpness=99.0)),
        ("lineage", "manifest.parquet", lambda rows: rows[0].update(location="elsewhere.png")),
        ("key_twice", "manifest.parquet", lambda rows: rows[1].update(key=rows[0]["key"])),
        ("count", "selection.parquet", lambda rows: rows[1].update(reason="ugly")),
    ],
)
def test_books_that_do_not_balance_are_found(
    folder: Path, kind: str, name: str, change: Callable[[list[dict[str, Any]]], object]
) -> None:
    edit_table(folder, name, change)
    assert kind in kinds(verify(folder))


def test_a_duplicate_that_fell_to_nothing_is_found(folder: Path) -> None:
    def orphan(rows: list[dict[str, Any]]) -> None:
        next(r for r in rows if r["reason"] == "duplicate_exact")["survivor"] = "0" * 32

    edit_table(folder, "selection.parquet", orphan)
    assert "survivor" in kinds(verify(folder))


@pytest.mark.parametrize("name", ["corpus.json", "manifest.parquet", "selection.parquet"])
def test_a_missing_file_is_a_fault_and_the_shards_are_looked_at_all_the_same(folder: Path, name: str) -> None:
    (folder / name).unlink()
    report = verify(folder)
    assert name in {f.file for f in report.faults}
    assert report.images == 48


@pytest.mark.parametrize("name", ["corpus.json", "manifest.parquet", "selection.parquet", SHARD])
def test_no_damage_of_any_file_kills_it(folder: Path, name: str) -> None:
    whole = (folder / name).read_bytes()
    rng = random.Random(name)
    for _ in range(6):
        data = bytearray(whole)
        at = rng.randrange(len(data))
        data[at : at + 600] = rng.randbytes(rng.choice([0, 1, 600]))
        (folder / name).write_bytes(data)
        assert not verify(folder, workers=1).ok


def test_faults_are_bounded_and_the_rest_is_counted(folder: Path) -> None:
    for shard in (folder / "shards").iterdir():
        shard.write_bytes(bytes(shard.stat().st_size))
    few, all_of_them = verify(folder, limit=5), verify(folder, limit=1000)
    assert (len(few.faults), all_of_them.more) == (5, 0)
    assert few.more == len(all_of_them.faults) - 5


def test_what_is_no_corpus_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere", "strange://x"):
        with pytest.raises(RecipeError):
            verify(path)


def test_it_shares_no_code_with_the_writer() -> None:
    import ast

    import x2i.corpus

    for path in Path(x2i.corpus.__file__).parent.glob("verify*.py"):
        imported = {n.module for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)}
        assert not imported & {"x2i.corpus.shard", "x2i.corpus.manifest", "x2i.corpus.sample", "x2i.base.seeds"}, path


def test_it_reads_over_fsspec_as_well(built: Built) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(built.corpus), "/verified", recursive=True)
    report = verify("memory://verified")
    assert report.ok, report.faults
    assert report.digest == corpus.open(built.corpus).digest


def test_the_selection_satisfies_the_published_equation(built: Built) -> None:
    """The figures that `verify` checks are the ones that anyone gets with DuckDB alone."""
    with duckdb.connect() as connection:
        rows = connection.read_parquet(str(built.corpus / "selection.parquet"))
        kept, fell = rows.aggregate("count_if(kept), count_if(not kept)").fetchall()[0]
    counts = corpus.open(built.corpus).info["counts"]
    assert (kept, kept + fell) == (counts["rows_out"], counts["rows_in"])
