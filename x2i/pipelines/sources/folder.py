"""A folder of images, with texts in files beside them or in a metadata file.

Where a row's text comes from, the first that has one:
1. `cat.jpg.txt` or `cat.txt` beside `cat.jpg`, as a whole;
2. `cat.jpg.json` or `cat.json`, under `text_key`; the whole object goes to `meta`;
3. the image's row in a `metadata.jsonl`, `.csv` or `.parquet` (Hugging Face's imagefolder: a column
   `file_name`, relative to the metadata file's folder), under `text_key`; its columns go to `meta`. Another table is
   named by `metadata`, its column by `file_key`: Flickr8k's is {metadata: captions.csv, file_key: image, file_root: images}.

A text file without an image is a row with the problem `missing_image` where it clearly belongs to a
lost image: an image of the same folder has such a file, and its name is not that of a document
(README, LICENSE …). Otherwise it is counted among the ignored files.
"""

from __future__ import annotations

import difflib
import posixpath
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from typing import Any, Literal

from pydantic import Field

from x2i.base.errors import RecipeError
from x2i.pipelines.sources import _metadata
from x2i.pipelines.sources._cut import cut
from x2i.pipelines.sources._files import File, Root, default_name, extension, why
from x2i.pipelines.sources._text import Malformed, describe, jsonable
from x2i.pipelines.sources.base import IMAGE_EXTENSIONS, Problem, Row, Source, SourceConfig, Unit

SIDECARS = ("txt", "json")
PARTS = (*SIDECARS, "file")

#: Stems of text files that describe a folder, not a lost image.
DOCUMENTS = re.compile(
    r"readme|licen[cs]es?|copying|copyright|notice|changelog|authors|contributors|citation|requirements|config|stats"
    r"|classes|labels|categories|train|val|valid|validation|test|files|urls|info|index|metadata|annotations|captions"
    r"|dataset_?(infos?|description)|package",
    re.IGNORECASE,
)


class FolderConfig(SourceConfig):
    """A folder of images with sidecar texts or a metadata file."""

    kind: Literal["folder"] = "folder"
    path: str = Field(description="the folder: a path or an fsspec URL, e.g. photos, s3://bucket/photos, zip://::a.zip")
    text_key: str | None = Field(
        None,
        description="key of .json sidecars, or column of the metadata file, that holds the text, e.g. title; "
        "default: the first of caption, text, prompt that has one",
    )
    metadata: str | None = Field(
        None,
        description="the table of texts, below `path`, e.g. captions.csv (csv, tsv, txt with commas, jsonl or parquet); "
        "default: every metadata.jsonl, .csv and .parquet",
    )
    file_key: str = Field("file_name", description="column of that table that names the image, e.g. image")
    file_root: str | None = Field(
        None, description="folder below `path` where those names start, e.g. images; default: the table's own"
    )
    several: Literal["rows", "merge"] = Field(
        "rows",
        description="what an image becomes that several records of a table name: a row each, or (merge) one row, in "
        "whose `meta` values that differ are lists, and whose text is the first",
    )
    unit_files: int = Field(256, ge=2, le=100_000, description="files in a unit of work, on average")


class Folder(Source):
    """Images of a folder and all folders below it, in the order of their paths. Hidden files are skipped."""

    kind = "folder"
    Config = FolderConfig
    config: FolderConfig

    def __init__(self, config: FolderConfig) -> None:
        super().__init__(config)
        self.name = config.name or default_name(config.path, self.kind)
        self._ignored: Counter[str] = Counter()

    def plan(self) -> Iterator[Unit]:
        """See `Source.plan`. A unit's `files` are the entries that `read` needs, one per row."""
        root = Root(self.config.path)
        try:
            files, faults = root.walk()
        except FileNotFoundError:
            raise RecipeError(
                f"{self.config.path}: no such folder; `path` names the folder that holds the images"
            ) from None
        except NotADirectoryError:
            raise RecipeError(f"{self.config.path}: a file; `path` names the folder that holds the images") from None
        except OSError as error:
            raise RecipeError(f"{self.config.path}: cannot be listed: {why(error)}") from None
        catalogue = _Catalogue(root, files, self.config)
        entries = catalogue.entries()
        entries += [_fault(path, "unreadable", f"folder cannot be listed: {text}") for path, text in faults.items()]
        self._ignored = catalogue.ignored
        if not any("file" in e for e in entries):
            raise RecipeError(f"{self.config.path}: {self._nothing(entries)}; images end in .jpg, .png, .webp …")
        entries.sort(key=lambda e: e["location"])
        for run in cut([e["location"] for e in entries], self.config.unit_files):
            mine = [entries[i] for i in run]
            size = sum(e["file"][1] or 0 for e in mine if "file" in e)
            yield Unit(self.name, {"files": mine}, rows=len(run), size=size)

    def _nothing(self, entries: list[dict[str, Any]]) -> str:
        if entries:
            return f"no image in this folder, though {len(entries)} texts speak of images ({entries[0]['location']} …)"
        kinds = ", ".join(f"{n} .{e}" for e, n in self._ignored.most_common(3))
        return f"no image in this folder ({'it holds ' + kinds if kinds else 'it is empty'})"

    def read(self, unit: Unit, only: Collection[int] | None = None) -> Iterator[Row]:
        """See `Source.read`."""
        wanted = [(i, e) for i, e in enumerate(unit.spec["files"]) if only is None or i in only]
        contents = Root(self.config.path).read_many(e[part][0] for _, e in wanted for part in PARTS if part in e)
        for index, entry in wanted:
            yield self._row(index, entry, {part: next(contents) for part in PARTS if part in entry})

    def _row(self, index: int, entry: dict[str, Any], parts: dict[str, bytes | OSError]) -> Row:
        row = Row(index, entry["location"], None, meta=dict(entry.get("record", {})))
        data = parts.pop("file", None)
        failed = next(((part, e) for part, e in parts.items() if isinstance(e, OSError)), None)
        texts = {part: d for part, d in parts.items() if isinstance(d, bytes)}
        if failed:
            row.problem = Problem("unreadable", f"{entry[failed[0]][0]}: {why(failed[1])}")
        else:
            try:
                row.text = describe(row.meta, self.config.text_key, texts.get("txt"), texts.get("json"))
            except Malformed as error:
                row.problem = error.problem
        if "problem" in entry:
            row.problem = Problem(*entry["problem"])
        elif isinstance(data, OSError):
            row.problem = Problem("unreadable", why(data))
        elif not data:
            row.problem = Problem("empty_file", "the file has no bytes")
        else:
            row.data = data
        return row

    def ignored(self) -> dict[str, int]:
        """Files that are neither images nor their texts, counted by extension (after `plan`)."""
        return dict(sorted(self._ignored.items()))


def _fault(location: str, reason: str, detail: str) -> dict[str, Any]:
    return {"location": location, "problem": [reason, detail]}


class _Catalogue:
    """Which files of a listing are images, which are texts, and what belongs to what."""

    def __init__(self, root: Root, files: list[File], config: FolderConfig) -> None:
        self.root, self.config = root, config
        self.files = {f.path: f for f in files if _sound(f.path)}
        self.tables = sorted(p for p in self.files if posixpath.basename(p).lower() in _metadata.NAMES)
        if config.metadata is not None:
            self.tables = [posixpath.normpath(config.metadata)]
            self._check_table(self.tables[0])
        self.misnamed = [f.path for f in files if not _sound(f.path)]
        self.images = {path for path in self.files if extension(path) in IMAGE_EXTENSIONS}
        self.ignored: Counter[str] = Counter()

    def entries(self) -> list[dict[str, Any]]:
        """One entry per row: `location`; `file`, `txt` and `json` as [path, size, version]; `record`; `problem`."""
        described, faults = self._metadata()
        used: set[str] = {*self.tables}
        entries = faults + [
            _fault(_escaped(p), "bad_name", "the file's name is not UTF-8; rename it") for p in self.misnamed
        ]
        for path in self.images | {p for p in described if p in self.files}:
            sidecars = {kind: self._sidecar(path, kind) for kind in SIDECARS}
            entry: dict[str, Any] = {"location": path, "file": list(self.files[path])}
            entry |= {kind: list(self.files[p]) for kind, p in sidecars.items() if p}
            used |= {path, *(p for p in sidecars.values() if p)}
            entries += self._with_records(entry, described.pop(path, []))
        for path, rows in described.items():
            entry = _fault(path, "missing_image", f"{rows[0][0]} names this file, which is not there")
            entries += self._with_records(entry, rows)
        entries += self._orphans(used)
        self.ignored.update(extension(p) or "(none)" for p in self.files if p not in used)
        return entries

    def _with_records(self, entry: dict[str, Any], rows: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
        """The entry once for each metadata row that names it; the second and later ones say which row it is."""
        if not rows:
            return [entry]
        if self.config.several == "merge":
            rows = [(rows[0][0], _merged([record for _, record in rows]))]
        return [
            entry | {"record": record} | ({"location": f"{entry['location']}@{place}"} if i else {})
            for i, (place, record) in enumerate(rows)
        ]

    def _sidecar(self, path: str, kind: str) -> str | None:
        for stem in (path, posixpath.splitext(path)[0]):
            for name in (f"{stem}.{kind}", f"{stem}.{kind.upper()}"):
                if name in self.files:
                    return name
        return None

    def _orphans(self, used: set[str]) -> Iterable[dict[str, Any]]:
        customary = {(posixpath.dirname(p), extension(p)) for p in used if extension(p) in SIDECARS}
        for path in sorted(self.files.keys() - used):
            kind, stem = extension(path), posixpath.splitext(posixpath.basename(path))[0]
            if (posixpath.dirname(path), kind) in customary and not DOCUMENTS.fullmatch(stem):
                used.add(path)
                fault = _fault(path, "missing_image", "a text with no image of that name")
                yield fault | {kind: list(self.files[path])}

    def _check_table(self, table: str) -> None:
        if table not in self.files:
            near = difflib.get_close_matches(table, self.files, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise RecipeError(f"metadata: {self.root.url} has no file {table}{hint}")
        if table.rpartition(".")[2].lower() not in _metadata.ENDINGS:
            raise RecipeError(f"metadata: {table}: not one of {', '.join('.' + e for e in _metadata.ENDINGS)}")

    def _metadata(self) -> tuple[dict[str, list[tuple[str, dict[str, Any]]]], list[dict[str, Any]]]:
        """Rows of all metadata files by the path that they name, each with its place; and the faulty ones."""
        described: dict[str, list[tuple[str, dict[str, Any]]]] = {}
        faults: list[dict[str, Any]] = []
        columns: set[str] = set()
        key = self.config.file_key
        for path in self.tables:
            try:
                data = self.root.read(path)
            except OSError as error:
                faults.append(_fault(path, "unreadable", why(error)))
                continue
            folder = posixpath.dirname(path) if self.config.file_root is None else self.config.file_root
            for number, record in _metadata.records(path, data, key):
                place = f"{path}#{number}" if number else path
                if not isinstance(record, dict):
                    faults.append(_fault(place, "bad_metadata", record))
                    continue
                columns |= record.keys()
                named = posixpath.normpath(posixpath.join(folder, record.pop(key)))
                if named.startswith(("../", "/")):
                    faults.append(_fault(place, "bad_metadata", f"'{named}' lies outside of the folder"))
                else:
                    described.setdefault(named, []).append((place, record))
        if self.config.metadata is not None and faults and not described:
            raise RecipeError(f"metadata: {faults[0]['location']}: {faults[0]['problem'][1]}; `file_key` is {key!r}")
        text_key = self.config.text_key
        if text_key and described and text_key not in columns:
            raise RecipeError(
                f"text_key: no metadata file of {self.root.url} has a column '{text_key}'; "
                f"there are: {', '.join(sorted(columns - {key}))}"
            )
        return described, faults


def _merged(records: list[dict[str, Any]]) -> dict[str, Any]:
    """One record of several: what they all say once, else a list in their order."""
    keys = dict.fromkeys(k for record in records for k in record)
    values = {k: [record.get(k) for record in records] for k in keys}
    return {k: v[0] if all(x == v[0] for x in v) else v for k, v in values.items()}


def _escaped(path: str) -> str:
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _sound(path: str) -> bool:
    """Whether a file's name can be written in UTF-8."""
    return path.isascii() or jsonable(path) == path
