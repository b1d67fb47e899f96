"""The datasets source: what `datasets.load_dataset` opens from local files, downloaded or streamed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.pipelines.source_files import NAMES, photo, problems, read
from x2i.base.errors import RecipeError
from x2i.pipelines.sources.datasets import Datasets, DatasetsConfig


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def source(path: str, **options: Any) -> Datasets:
    return Datasets(DatasetsConfig(path=path, **options))


@pytest.fixture
def made(tmp_path: Path) -> dict[str, dict[str, Any]]:
    """The same eight pictures in three forms, as arguments of load_dataset."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in NAMES:
        (folder / f"{name}.jpg").write_bytes(photo(name))
    lines = [{"file_name": f"{n}.jpg", "text": n, "n": i} for i, n in enumerate(NAMES)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "paths.jsonl").write_text(
        "\n".join(json.dumps({"image": f"{folder}/{x['file_name']}", "text": x["text"], "n": x["n"]}) for x in lines)
    )
    for part in range(2):
        rows = [{"image": {"bytes": photo(n), "path": None}, "text": n, "n": i} for i, n in enumerate(NAMES)]
        pq.write_table(pa.Table.from_pylist(rows[part * 4 : part * 4 + 4]), tmp_path / f"part-{part}.parquet")
    return {
        "imagefolder": {"data_dir": str(folder)},
        "json": {"data_files": str(tmp_path / "paths.jsonl")},
        "parquet": {"data_files": str(tmp_path / "part-*.parquet")},
    }


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["imagefolder", "json", "parquet"])
def test_what_load_dataset_opens_gives_untouched_bytes(made: dict[str, Any], kind: str, streaming: bool) -> None:
    rows = read(source(kind, streaming=streaming, unit_rows=3, **made[kind]))
    found = sorted((r.meta["n"], r.text, r.data, tuple(r.meta)) for r in rows)
    assert found == [(i, n, photo(n), ("n",)) for i, n in enumerate(NAMES)]


def test_units_are_ranges_or_shards(made: dict[str, Any]) -> None:
    plain = list(source("parquet", unit_rows=3, **made["parquet"]).plan())
    assert [u.rows for u in plain] == [3, 3, 2]
    shards = list(source("parquet", streaming=True, **made["parquet"]).plan())
    assert [(u.spec["shard"], u.spec["shards"]) for u in shards] == [(0, 2), (1, 2)]
    rows = read(source("parquet", streaming=True, **made["parquet"]))
    assert rows[4].location == "train-00001-of-00002#0"


def test_changed_files_are_other_units(made: dict[str, Any], tmp_path: Path) -> None:
    before = {u.id for u in source("parquet", **made["parquet"]).plan()}
    assert before == {u.id for u in source("parquet", **made["parquet"]).plan()}
    os.utime(tmp_path / "part-1.parquet", (1, 1))
    assert not before & {u.id for u in source("parquet", **made["parquet"]).plan()}


@pytest.mark.parametrize("streaming", [False, True])
def test_missing_files_and_broken_shards_are_rows_with_problems(
    made: dict[str, Any], tmp_path: Path, streaming: bool
) -> None:
    (tmp_path / "photos" / "moon.jpg").unlink()
    rows = read(source("json", streaming=streaming, **made["json"]))
    assert list(problems(rows).values()) == ["missing_image"] and len(rows) == len(NAMES)
    (unit, _) = source("parquet", streaming=True, **made["parquet"]).plan()
    broken = source("parquet", streaming=True, **made["parquet"])
    assert len(list(broken.plan())) == 2
    (tmp_path / "part-0.parquet").write_bytes(b"PAR1")
    assert [r.problem.reason for r in broken.read(unit) if r.problem] == ["unreadable"]


def test_what_does_not_open_is_a_mistake_of_the_recipe(made: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"load_dataset\(path='parquet'"):
        list(source("parquet", data_files=str(tmp_path / "none.parquet")).plan())
    with pytest.raises(RecipeError, match="load_dataset.*test"):
        list(source("parquet", split="test", **made["parquet"]).plan())
    with pytest.raises(RecipeError, match="text_column: no column 'alt'"):
        list(source("parquet", text_column="alt", **made["parquet"]).plan())
