"""WebDataset tars: plain ones, img2dataset's with a Parquet file beside each, and X2I corpora.

Members that follow each other and share a key (the name up to the first dot of its last part) are one
sample, as the webdataset library has it. Which of its members is the row's image:
- `KEY.output.png` where there is a `KEY.json` and no plain image: an X2I sample. Its `KEY.input_N.*` are
  the row's inputs, its instruction the text;
- else the first with a plain extension (`KEY.jpg`); further images are named in `meta.other_images`;
- else every `KEY.part.jpg` is a row of its own (keys with dots in them, such as `v1.5_003.jpg`).
Text comes from `KEY.txt` (or `KEY.part.txt`), else from `KEY.json` under `text_key`. The JSON object goes to `meta`.

A key that comes again is a row again; its location then ends in `@2`. A sample that has a text but
no image is a row with the problem `missing_image`; one that has neither (`.cls`, `.mp4` …) is no row.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Collection, Iterator
from typing import Any, Literal

from pydantic import Field

from x2i.pipelines.sources import _x2i
from x2i.pipelines.sources._files import File, Root, default_name, extension, why
from x2i.pipelines.sources._paths import find
from x2i.pipelines.sources._tar import Damaged, Member, open_tar
from x2i.pipelines.sources._text import Malformed, describe, jsonable, parse_object
from x2i.pipelines.sources.base import IMAGE_EXTENSIONS, Problem, Row, Source, SourceConfig, Unit

ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
TABLE = "parquet"
KEY = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)")
NUMBERED = re.compile(r"input_(\d+)\.\w+")

#: What img2dataset writes into the column `status` of an image that is in the tar.
SUCCESS = "success"


class WebDatasetConfig(SourceConfig):
    """Tars in the layout of WebDataset."""

    kind: Literal["webdataset"] = "webdataset"
    path: str | list[str] = Field(
        description="tars: a path or fsspec URL, a pattern (laion/{00000..00099}.tar, s3://b/cc12m/*.tar), a folder, "
        "or a list of these"
    )
    text_key: str | None = Field(
        None, description="key of KEY.json that holds the text, e.g. alt; default: the first of caption, text, prompt"
    )


class WebDataset(Source):
    """One tar is one unit. A remote one is copied to the temporary folder while it is read."""

    kind = "webdataset"
    Config = WebDatasetConfig
    config: WebDatasetConfig

    def __init__(self, config: WebDatasetConfig) -> None:
        super().__init__(config)
        first = config.path if isinstance(config.path, str) else next(iter(config.path), "")
        self.name = config.name or default_name(first, self.kind)
        self._ignored: dict[str, int] = {}

    @cached_property
    def _root(self) -> Root:
        return root_of(self.config.path, ENDINGS)

    def plan(self) -> Iterator[Unit]:
        """See `Source.plan`. A unit's `tar`, and `table` beside it, are [path, size, version]."""
        found = find(self.config.path, ENDINGS, "tars")
        tables = found.root.stat_many([_stem(f.path) + ".parquet" for f in found.files])
        self._ignored = found.ignored() - Counter({"parquet": sum(t in found.others for t in tables)})
        for file, table in zip(found.files, tables, strict=True):
            yield Unit(self.name, {"tar": list(file)} | ({"table": list(table)} if table else {}))

    def read(self, unit: Unit, only: Collection[int] | None = None) -> Iterator[Row]:
        """See `Source.read`. First what the tar holds, then what is wrong with it, then what should be in it."""
        path = unit.spec["tar"][0]
        rows = _Rows(path, self.config.text_key, only)
        try:
            file, tar = open_tar(self._root, path)
        except Damaged as damaged:
            yield from rows.lost(path, damaged.problem, {})
            tar = None
        if tar is not None:
            with file:
                for group in groups(tar):
                    yield from rows.of(group)
            if tar.ended and not rows.cut:
                yield from rows.lost(f"{path}#(end)", tar.ended, {})
        if "table" in unit.spec:
            yield from self._missing(unit.spec["table"][0], rows)

    def _missing(self, table: str, rows: _Rows) -> Iterator[Row]:
        """Rows for what img2dataset's table lists and the tar does not hold."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with self._root.open(table) as file:
                listed = pq.read_table(file)
        except (pa.ArrowException, OSError) as error:
            yield from rows.lost(table, Problem("bad_parquet", str(error)), {})
            return
        if not {"key", "status"} <= set(listed.column_names):
            return  # a table of something else
        for record in listed.to_pylist():
            key = str(record["key"])
            problem = Problem("missing_from_tar", "the table says that this image is in the tar")
            if record["status"] != SUCCESS:
                problem = Problem("not_downloaded", str(record.get("error_message") or record["status"]))
            elif key in rows.keys:
                continue
            yield from rows.lost(f"{rows.path}#{key}", problem, jsonable(record))

    def ignored(self) -> dict[str, int]:
        """Files beside the tars that are no tars, counted by extension (after `plan`)."""
        return dict(sorted(self._ignored.items()))


def _stem(path: str) -> str:
    return path[: -len(next((e for e in ENDINGS if path.lower().endswith(e)), ""))] or path


@dataclass
class Group:
    """Members of one key by suffix (in lower case), in the order of the tar."""

    key: str
    members: dict[str, Member]


def groups(tar: TarReader) -> Iterator[Group]:
    """Runs of members with the same key. A suffix that comes again begins a new group."""
    group: Group | None = None
    for member in tar:
        match = KEY.fullmatch(member.name)
        if match is None:
            continue
        key, suffix = match[1], match[2].lower()
        if group is None or group.key != key or suffix in group.members:
            if group is not None:
                yield group
            group = Group(key, {})
        if not tar.seekable and (extension(suffix) in IMAGE_EXTENSIONS or extension(suffix) in ("txt", "json")):
            member = _held(member)
        group.members[suffix] = member
    if group is not None:
        yield group


def _held(member: Member) -> Member:
    """A member of a stream, loaded now, since there is no way back to it."""
    try:
        data = member.load()
    except Damaged as damaged:
        problem = damaged.problem

        def fail() -> bytes:
            raise Damaged(problem)

        return Member(member.name, fail)
    return Member(member.name, lambda: data)


class _Rows:
    """Makes rows of groups: counts them, keeps their locations apart, loads those that are wanted."""

    def __init__(self, path: str, text_key: str | None, only: Collection[int] | None) -> None:
        self.path = path
        self.keys: set[str] = set()  # last parts of the keys seen
        self.cut = False  # whether a row has told already that the tar is cut
        self._text_key = text_key
        self._only = only
        self._next = 0
        self._locations: Counter[str] = Counter()

    def lost(self, location: str, problem: Problem, meta: dict[str, Any]) -> Iterator[Row]:
        """A row that there is nothing of but a problem."""
        row = self._row(location)
        if row:
            row.problem, row.meta = problem, meta
            yield row

    def of(self, group: Group) -> Iterator[Row]:
        """The rows of one group, those that are wanted."""
        self.keys.add(posixpath.basename(group.key))
        images = [s for s in group.members if extension(s) in IMAGE_EXTENSIONS]
        texts = [s for s in group.members if extension(s) in ("txt", "json")]
        plain = [s for s in images if "." not in s]
        if "json" in texts and not plain and any(s.startswith("output.") or NUMBERED.fullmatch(s) for s in images):
            yield from self._load(group, "json", self._x2i)
        elif not images and texts:
            missing = Problem("missing_image", "a text with no image of that key")
            yield from self.lost(f"{self.path}#{group.members[texts[0]].name}", missing, {})
        for suffix in plain[:1] or images:
            yield from self._load(group, suffix, self._pair)

    def _load(self, group: Group, suffix: str, fill: Callable[[Group, str, Row], None]) -> Iterator[Row]:
        ...

    def _pair(self, group: Group, suffix: str, row: Row) -> None:
        """An image with its text."""

    def _x2i(self, group: Group, suffix: str, row: Row) -> None:
        """A ready X2I sample."""
