"""Which images are meant: by their SHA-256, an address in their rows' metadata, their source, or what they look like."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from x2i.base.errors import RecipeError, X2IError
from x2i.base.sql import connect, identifier, literal
from x2i.corpus import tombstones
from x2i.corpus.corpus import SELECTION, Corpus
from x2i.corpus.lake import Lake

#: Rows that are named as examples of a match.
SHOWN = 3

#: A beginning of a SHA-256 must have so many digits.
SHORTEST = 8


@dataclass(frozen=True)
class Near:
    """A picture to look for: what to call it, its pHash, the bits that may differ, SHA-256 of its own bytes."""

    name: str
    hash: int
    bits: int
    image_id: str = ""


@dataclass
class Match:
    """One image that was asked for.

    Attributes:
        by: what asked for it, e.g. `--source photos`.
        rows: of the sources that hold it, as their own image or among their inputs; `locations`: some of them.
        distance: bits of the pHash, of pictures that look alike.
        forgotten: whether it was forgotten before.
    """

    image_id: str
    by: str
    rows: int = 0
    locations: list[str] = field(default_factory=list)
    distance: int | None = None
    forgotten: bool = False


def find(
    path: str | Path,
    *,
    sha256: Sequence[str] = (),
    urls: Sequence[str] = (),
    sources: Sequence[str] = (),
    locations: Sequence[str] = (),
    near: Sequence[Near] = (),
) -> list[Match]:
    """The images of a corpus that are asked for, each once, in the order of the questions.

    Args:
        path: the corpus's folder.
        sha256: of the images' bytes; beginnings will do that no other image has.
        urls: in the rows' metadata, under any key that speaks of a URL.
        sources: names of sources: all their images; with `locations` (of the one source) only these.
        near: pictures that look like theirs.

    Raises:
        RecipeError: a question has no answer; says what comes near.
    """
    finder = _Finder(Corpus(path))
    if locations and len(sources) != 1:
        raise RecipeError("--location: give the one --source whose rows are meant")
    found: dict[str, Match] = {}
    parts = [*(finder.by_sha256(h) for h in sha256), *(finder.by_url(u) for u in urls)]
    parts += [finder.by_source(sources[0], at) for at in locations] or [finder.by_source(s) for s in sources]
    parts += [finder.by_look(n) for n in near]
    for matches in parts:
        for match in matches:
            found.setdefault(match.image_id, match)
    finder.describe(found)
    return list(found.values())


class _Finder:
    """Asks one corpus."""

    def __init__(self, corpus: Corpus) -> None:
        if not isinstance(corpus.path, Path):
            raise RecipeError(f"{corpus.path}: images are forgotten in a local folder only")
        self._corpus, self._path = corpus, corpus.path
        self._old = tombstones.of_corpus(corpus.info)
        self._connection = connect()
        self._connection.read_parquet(str(corpus.path / SELECTION)).create_view("selection")
        self._connection.execute(
            """create view images as select image_id from selection where image_id is not null
            union select unnest(inputs) from selection"""
        )

    def ask(self, query: str) -> list[tuple[Any, ...]]:
        """Rows of a query over `selection` and `images`. Raises X2IError if they cannot be read."""
        import duckdb

        try:
            return self._connection.sql(query).fetchall()
        except duckdb.Error as error:
            first = str(error).splitlines()[0]
            raise X2IError(f"{self._path}: cannot be read: {first}. `x2i verify` says what is damaged.") from None

    def by_sha256(self, text: str) -> list[Match]:
        """The image of this SHA-256, or of this beginning."""
        wanted, by = text.strip().lower(), f"--sha256 {text[:16]}"
        if len(wanted) < SHORTEST:
            raise RecipeError(f"--sha256 {text!r}: too short: give at least {SHORTEST} of its 64 digits")
        ids = {
            i
            for (i,) in self.ask(f"select image_id from images where starts_with(image_id, {literal(wanted)}) limit 5")
        }
        ids |= {i for i in self._old if i.startswith(wanted)}
        if len(ids) > 1:
            raise RecipeError(f"--sha256 {text!r}: {len(ids)} images or more begin so: give more of it")
        if not ids:
            raise RecipeError(f"{self._path}: no row holds the image {text!r}{self._nearest(wanted)}")
        return [Match(ids.pop(), by)]

    def _nearest(self, wanted: str) -> str:
        key = wanted.partition("-")[0]
        rows = self.ask(
            f"""select image_id, levenshtein(left(image_id, {len(wanted)}), {literal(wanted)}) as far from images
            order by far, image_id limit 2"""
        )
        if "-" in wanted and any(i.startswith(key) for i, _ in rows):
            return f": it looks like a sample's key, of the image {next(i for i, _ in rows if i.startswith(key))}"
        told = "; ".join(f"{i} ({far} of its digits differ{self._where(i)})" for i, far in rows)
        return f"; the nearest: {told}" if told else ": it has none"

    def _where(self, image_id: str) -> str:
        rows = self.ask(f"select source, location from selection where image_id = {literal(image_id)} limit 1")
        return f", {rows[0][0]}: {rows[0][1]}" if rows else ""

    def by_url(self, url: str) -> list[Match]:
        """The images of rows whose metadata have this address, or that lie there."""
        found = _by_url(self, "selection", url)
        if not found:  # a row that was forgotten has no metadata any more; the lake still tells which it was
            found = [i for i in self._in_lake(url) if i in self._old]
        if not found:
            keys = sorted(
                {k for (meta,) in self.ask("select meta from selection limit 1000") for k, _ in _urls(json.loads(meta))}
            )
            there = f"their addresses are under {', '.join(keys)}" if keys else "the rows' metadata have no addresses"
            raise RecipeError(f"{self._path}: no row has the address {url!r}; {there}")
        return [Match(i, f"--url {url}") for i in found]

    def _in_lake(self, url: str) -> list[str]:
        import duckdb

        try:
            with Lake(self._corpus.info["lake"]).connect(self._corpus.info["name"]) as views:
                self._connection.register("lake_rows", views.sql("select * from rows").to_arrow_table())
            return _by_url(self, "lake_rows", url)
        except (X2IError, duckdb.Error, OSError):
            return []

    def by_source(self, source: str, location: str | None = None) -> list[Match]:
        """The images of a source, or of one of its rows, with the inputs of ready samples."""
        names = [s["name"] for s in self._corpus.info["sources"]]
        if source not in names:
            raise RecipeError(f"--source {source!r}: the corpus has {', '.join(names)}")
        where, by = f"source = {literal(source)}", f"--source {source}"
        if location is not None:
            where, by = f"{where} and location = {literal(location)}", f"{by} --location {location}"
        rows = self.ask(f"select image_id, inputs, problem from selection where {where}")
        ids = list(dict.fromkeys(i for image_id, inputs, _ in rows for i in (image_id, *inputs) if i is not None))
        if rows and not ids:
            why = rows[0][2] or "it could not be read"
            raise RecipeError(f"{self._path}: {by[2:]}: no image to forget: {why}")
        if not rows and location is not None:
            close = f"jaro_winkler_similarity(location, {literal(location)})"
            near = self.ask(
                f"select location from selection where source = {literal(source)} and {close} > 0.8 order by {close} desc limit 3"
            )
            hint = f"; near: {', '.join(n for (n,) in near)}" if near else ""
            raise RecipeError(f"{self._path}: the source {source!r} has no row {location!r}{hint}")
        if not rows:
            raise RecipeError(f"{self._path}: the source {source!r} has no rows")
        return [Match(i, by) for i in ids]

    def by_look(self, near: Near) -> list[Match]:
        """The images whose pHash differs in few bits."""
        name = phash_name(self._corpus.info)
        far = f"bit_count(xor({identifier(name, 'hash')}, {near.hash}::ubigint))::integer"
        table = f"(select image_id, location, {far} as far from selection where image_id is not null)"
        rows = self.ask(
            f"select image_id, min(far) from {table} where far <= {near.bits} group by image_id order by min(far), image_id"
        )
        if not rows and near.image_id in self._old:  # those that look like it went with it
            return [Match(near.image_id, f"--near {near.name}", distance=0)]
        if not rows:
            closest = self.ask(
                f"select location, far from {table} where far is not null order by far, location limit 1"
            )
            hint = f"; the nearest is {closest[0][0]}, {closest[0][1]} bits away" if closest else ""
            raise RecipeError(f"{self._path}: no picture within {near.bits} bits of {near.name}{hint}")
        return [Match(i, f"--near {near.name}", distance=bits) for i, bits in rows]

    def describe(self, found: dict[str, Match]) -> None:
        """Count the rows of each image, and name some."""
        tombstones.find_hits(self._connection, "selection", found)
        rows = self.ask(
            """select image_id, count(*), list(source || ': ' || location order by own desc, location) from (
                select image_id, source, location, true as own from selection
                union all select unnest(inputs), source, location, false from selection
            ) where image_id in (select image_id from tombs) group by image_id"""
        )
        for image_id, count, places in rows:
            found[image_id].rows, found[image_id].locations = count, places[:SHOWN]
        for image_id, match in found.items():
            match.forgotten = image_id in self._old


def phash_name(info: dict[str, Any]) -> str:
    """What the corpus calls its `phash` annotator. Raises RecipeError if it has none."""
    for annotator in info["annotators"]:
        if annotator.get("kind", annotator["name"]) in ("phash", "PHash") or annotator["name"] == "phash":
            return str(annotator["name"])
    raise RecipeError(
        "--near: the corpus has no pictures' hashes: add `phash:` under `annotators` in its recipe and build again, or "
        "name the image by --sha256, --url or --source"
    )


def _by_url(finder: _Finder, table: str, url: str) -> list[str]:
    spellings = {json.dumps(url)[1:-1], json.dumps(url, ensure_ascii=False)[1:-1]}
    there = " or ".join(f"contains(meta, {literal(s)})" for s in sorted(spellings))
    rows = finder.ask(f"select image_id, location, meta from {table} where location = {literal(url)} or {there}")
    found = [
        i for i, location, meta in rows if i and (location == url or any(v == url for _, v in _urls(json.loads(meta))))
    ]
    return list(dict.fromkeys(found))


def _urls(meta: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(key, value) of every text under a key that speaks of an address, at any depth."""
    if isinstance(meta, dict):
        for name, value in meta.items():
            yield from _urls(value, str(name))
    elif isinstance(meta, list):
        for value in meta:
            yield from _urls(value, key)
    elif isinstance(meta, str) and any(word in key.lower() for word in ("url", "uri", "link", "href")):
        yield key, meta
