"""A corpus's files as `verify` reads them: the folder, `corpus.json`, the manifest's rows by shard."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import posixpath
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from x2i.base.errors import RecipeError
from x2i.corpus.faults import Faults
from x2i.corpus.verify_sample import STRANGE

INFO, MANIFEST, SELECTION, SHARDS, FORMAT = "corpus.json", "manifest.parquet", "selection.parquet", "shards", 1

SIZE = pa.struct([("width", pa.int32()), ("height", pa.int32())])
MEMBER = pa.struct([("suffix", pa.string()), ("offset", pa.int64()), ("size", pa.int64())])
TEXTS = ("key", "shard", "sha256", "task_type", "image_id", "row_id", "source", "location")

#: The manifest's columns; only `output_size` may be null.
COLUMNS: dict[str, pa.DataType] = {
    **dict.fromkeys(TEXTS, pa.string()),
    "offset": pa.int64(),
    "size": pa.int64(),
    "instruction_chars": pa.int32(),
    "images": pa.list_(pa.string()),
    "input_sizes": pa.list_(SIZE),
    "output_size": SIZE,
    "scores": pa.map_(pa.string(), pa.float64()),
    "members": pa.list_(MEMBER),
}

#: Further columns, which follow from the images' ids and from the text; no part of the digest; earlier builds wrote none.
DERIVED: dict[str, pa.DataType] = {
    "split": pa.uint32(),
    "split_others": pa.uint32(),
    "text_tokens": pa.int32(),
    "rejected_tokens": pa.int32(),
}

#: What reading damaged Parquet raises; ValueError covers text that is no UTF-8.
UNREADABLE = (pa.ArrowException, OSError, ValueError)


class Folder:
    """The corpus's folder: local, or anything that fsspec opens.

    Raises:
        RecipeError: it holds none of a corpus's files, or the URL cannot be opened.
    """

    def __init__(self, path: str) -> None:
        try:
            self._fs, self.root = fsspec.core.url_to_fs(path)
        except (ValueError, ImportError) as error:
            raise RecipeError(f"{path}: {error}") from None
        self.is_local = isinstance(self._fs, fsspec.implementations.local.LocalFileSystem)
        if not any(self._fs.exists(self._at(name)) for name in (INFO, MANIFEST, SELECTION)):
            raise RecipeError(f"{path}: not a corpus (no {INFO}). `x2i build RECIPE` makes one.")

    def open(self, name: str) -> IO[bytes]:
        """Open a file of the corpus. Raises OSError."""
        return self._fs.open(self._at(name), "rb")

    def shards(self) -> list[str]:
        """What lies in the folder of shards, as the manifest would name it; sorted."""
        try:
            found = self._fs.ls(self._at(SHARDS), detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(f"{SHARDS}/{posixpath.basename(str(name).rstrip('/'))}" for name in found)

    @contextlib.contextmanager
    def local(self, *names: str) -> Iterator[list[Path] | None]:
        """Paths on this machine, copied for the length of the block if need be; None if one of the files is missing."""
        if not all(self._fs.isfile(self._at(n)) for n in names):
            yield None
        elif self.is_local:
            yield [Path(self._at(n)) for n in names]
        else:
            with tempfile.TemporaryDirectory() as copies:
                for name in names:
                    self._fs.get_file(self._at(name), f"{copies}/{name}")
                yield [Path(copies, n) for n in names]

    def _at(self, name: str) -> str:
        return posixpath.join(self.root, name)


class _Part(BaseModel):
    model_config = ConfigDict(strict=True)


class Counts(_Part):
    """Totals: rows of the sources, rows that the selection kept, rows with samples, samples, shards, their bytes."""

    rows_in: int
    selected: int
    rows_out: int
    samples: int
    shards: int
    bytes: int


class Fell(_Part):
    """So many rows fell at this stage for this reason."""

    stage: str
    reason: str
    rows: int


class Made(_Part):
    """So many samples of a task."""

    made: int


class Listed(_Part):
    """A shard as `corpus.json` lists it."""

    name: str
    size: int
    samples: int
    sha256: str


class Tombstone(_Part):
    """An image that was forgotten, and why, in a word."""

    image_id: str
    why: str


class Select(_Part):
    """The recipe's rules that can be asked again of the rows."""

    where: dict[str, str] = {}
    dedup: dict[str, Any] = {}
    quotas: dict[str, dict[str, Any]] = {}


class Recipe(_Part):
    """What of the recipe is checked."""

    select: Select
    seed: int = 0


class Info(_Part):
    """What of `corpus.json` is checked."""

    format: int
    digest: str
    counts: Counts
    funnel: list[Fell]
    tasks: dict[str, Made]
    files: dict[str, str]
    forgotten: list[Tombstone] = []
    shards: list[Listed]
    recipe: Recipe


def read_info(folder: Folder, faults: Faults) -> Info | None:
    """Read `corpus.json`; what is wrong with it goes to `faults`."""
    try:
        with folder.open(INFO) as file:
            text = file.read()
        info = Info.model_validate_json(text)
    except OSError as error:
        faults.add("info", INFO, f"cannot be read: {error}")
    except ValidationError as error:
        for wrong in error.errors(include_url=False)[:5]:
            faults.add("info", INFO, f"damaged: {'.'.join(map(str, wrong['loc']))} {wrong['msg']}".replace(":  ", ": "))
    else:
        if info.format <= FORMAT:
            _check_seal(text, faults)
            return info
        remedy = "Check it with the x2i that built it (its version stands under `software`), or a later one."
        faults.add("info", INFO, f"written in format {info.format}; this x2i knows {FORMAT}", remedy=remedy)
    return None


def _check_seal(text: bytes | str, faults: Faults) -> None:
    """`seal` is the SHA-256 of the rest of `corpus.json`, keys sorted, no spaces, UTF-8."""
    whole = json.loads(text)
    told = whole.pop("seal", None)
    rest = json.dumps(whole, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    if hashlib.sha256(rest).hexdigest() != told:
        faults.add("seal", INFO, "is not as it was written: its `seal` does not fit the rest of it")


def check_hash(folder: Folder, name: str, info: Info | None, faults: Faults) -> None:
    """A table's SHA-256 must be the one that `corpus.json` records."""
    try:
        with folder.open(name) as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    except FileNotFoundError:
        faults.add("file_missing", name, "is not there")
        return
    except OSError as error:
        faults.add("file_unreadable", name, f"cannot be read: {error}")
        return
    told = info.files.get(name) if info else found
    if found != told:
        faults.add("file_sha256", name, f"SHA-256 is {found}, corpus.json says {told}")


class Manifest:
    """The manifest's rows, read as a stream; `whole` turns False where it cannot be read (a fault says so)."""

    def __init__(self, folder: Folder, faults: Faults) -> None:
        self._folder, self._faults = folder, faults
        self._hash = hashlib.sha256()
        self.whole = True

    @property
    def sha256(self) -> str:
        """Over every row that was read, a line of canonical JSON each: the digest's part of the manifest."""
        return self._hash.hexdigest()

    def by_shard(self) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """The rows of each shard, in the order of the manifest."""
        try:
            with self._folder.open(MANIFEST) as raw, pq.ParquetFile(raw) as file:
                if not self._fits(file.schema_arrow):
                    self.whole = False
                    return
                rows = self._rows(file)
                if not self._in_order(file):
                    rows = iter(sorted(rows, key=lambda row: str(row["shard"])))
                for shard, group in itertools.groupby(rows, key=lambda row: row["shard"]):
                    yield shard, list(group)
        except FileNotFoundError:
            self.whole = False  # said already
        except UNREADABLE as error:
            self.whole = False
            self._faults.add("manifest_unreadable", MANIFEST, f"cannot be read: {type(error).__name__}: {error}")

    def _fits(self, schema: pa.Schema) -> bool:
        there = {field.name: field.type for field in schema}
        wrong = [f"{name} ({kind})" for name, kind in COLUMNS.items() if there.get(name) != kind]
        wrong += [f"{name} ({kind})" for name, kind in DERIVED.items() if there.get(name, kind) != kind]
        if wrong:
            problem = f"has no columns {', '.join(wrong)}; it has {', '.join(f'{n} ({t})' for n, t in there.items())}"
            self._faults.add("manifest_unreadable", MANIFEST, problem, remedy=STRANGE)
        return not wrong

    def _in_order(self, file: pq.ParquetFile) -> bool:
        """Whether the rows of each shard are neighbours: readers go through shards one after the other."""
        last, seen, number = None, set(), 0
        for batch in file.iter_batches(columns=["shard"]):
            for shard in batch["shard"].to_pylist():
                if shard != last and shard in seen:
                    problem = f"row {number} goes back to {shard}: the rows are not in the order of the shards"
                    self._faults.add("manifest_order", MANIFEST, problem)
                    return False
                last = shard
                seen.add(shard)
                number += 1
        return True

    def _rows(self, file: pq.ParquetFile) -> Iterator[dict[str, Any]]:
        """Rows as plain values; each goes into the hash. Rows with nulls where none may be are left out."""
        number = 0
        for batch in file.iter_batches(4096):
            for row in batch.to_pylist():
                empty = [name for name in COLUMNS if row[name] is None and name != "output_size"]
                if empty:
                    problem = f"row {number} has no {', '.join(empty)}"
                    self._faults.add("manifest_null", MANIFEST, problem, row["key"])
                else:
                    split = {name: row.pop(name) for name in DERIVED if name in row}
                    texts = {name: split.pop(name, None) for name in ("text_tokens", "rejected_tokens")}
                    if any(split[name] != value for name, value in split_of(row).items() if name in split):
                        problem = f"row {number} has {split}, by its images it is {split_of(row)}"
                        self._faults.add("manifest_split", MANIFEST, problem, row["key"])
                    self._hash.update(line(row))
                    yield row | texts
                number += 1


def split_of(row: dict[str, Any]) -> dict[str, int | None]:
    """What the derived columns must hold: where the image lies in [0, 2^32), and the least of the sample's others."""
    others = [_point(i) for i in row["images"] if i != row["image_id"]]
    return {"split": _point(row["image_id"]), "split_others": min(others, default=None)}


def _point(image_id: str) -> int:
    """The first 32 bits of the SHA-256 of the JSON list ["held-out/1", image_id]."""
    text = json.dumps(["held-out/1", image_id], separators=(",", ":"), ensure_ascii=False)
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)


def line(row: dict[str, Any]) -> bytes:
    """A row as the digest takes it: JSON with sorted keys, no spaces, scores as sorted pairs, and a newline."""
    plain = {**row, "scores": sorted(row["scores"])}
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"
