"""`forget`: take images out of a corpus, with everything that was made of them, and leave tombstones.

    from x2i.corpus import forget
    found = forget.find("runs/quickstart/corpus", sha256=["596aa1e7cb"])
    forget.forget("runs/quickstart/corpus", [m.image_id for m in found])

Crops, maps, pairs and few-shot sequences go with the image: the manifest says of every sample which originals are in
it. The corpus changes places with the new one at the end, so that a killed run leaves the old one or the new one.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from x2i.base.digests import sha256_of
from x2i.base.errors import RecipeError, X2IError
from x2i.base.files import exclusive, remove, write_text
from x2i.base.seeds import canonical_json
from x2i.base.sql import connect, literal
from x2i.corpus import tombstones
from x2i.corpus.card import card
from x2i.corpus.corpus import CARD, INFO, MANIFEST, RECIPE, SELECTION, Corpus
from x2i.corpus.lookup import Match
from x2i.corpus.lookup import find as find
from x2i.corpus.manifest import corpus_digest
from x2i.corpus.place import is_away, put, recover
from x2i.corpus.takeout import Taken, effect_on, link, take_out

__all__ = ["Forgotten", "Match", "find", "forget", "put_right", "would_go"]


@dataclass
class Forgotten:
    """What a forget did, or would do.

    Attributes:
        images: forgotten now; `already`: how many of those asked for had been before.
        rows: that hold them, kept or not; `lost`: other rows that keep no sample.
        samples: by task type.
        rewritten, dropped, untouched: shards.
        lake: the lake that has the tombstones; None if it cannot be reached from here.
        notes: what the user should know.
    """

    corpus: str
    before: str
    digest: str
    images: list[str] = field(default_factory=list)
    already: int = 0
    rows: int = 0
    lost: int = 0
    samples: dict[str, int] = field(default_factory=dict)
    rewritten: int = 0
    dropped: int = 0
    untouched: int = 0
    lake: str | None = None
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0


def put_right(path: str | Path) -> None:
    """Put the old corpus back if a run was killed at the very moment of replacing it; else nothing is done."""
    folder = _folder(path)
    if not folder.exists() and is_away(folder):
        with exclusive(folder, "building a corpus, or forgetting images"):
            recover(folder)


def would_go(path: str | Path, image_ids: Iterable[str]) -> Forgotten:
    """What `forget` would take out; nothing is written. Raises X2IError if there is no corpus, or an old one."""
    return _effect(Corpus(_folder(path)), set(image_ids))[0]


def forget(path: str | Path, image_ids: Iterable[str], why: str = "asked", lake: str | Path | None = None) -> Forgotten:
    """Take images out of a corpus, and bury them in it and in its lake. A second call changes nothing.

    Args:
        path: the corpus's folder.
        image_ids: SHA-256 of the images' bytes.
        why: one plain word for the tombstones.
        lake: the lake's folder; None takes the corpus's own.

    Raises:
        RecipeError: `why` is no plain word, or `path` no local folder.
        X2IError: there is no corpus; it is damaged; another process builds it. Then it is as it was.
    """
    began = time.perf_counter()
    folder, wanted = _folder(path), set(image_ids)
    tombstones.check_word(why)
    with exclusive(folder, "building a corpus, or forgetting images"):
        recover(folder)
        corpus = Corpus(folder)
        result, held = _effect(corpus, wanted)
        old = tombstones.of_corpus(corpus.info)
        buried = dict.fromkeys(wanted, why) | old
        _check_sizes(folder, corpus.info)
        # the lake first: if this is killed, a build does what is left to do
        result.lake = _bury(Path(lake if lake is not None else corpus.info["lake"]), buried, result.notes)
        if result.images:
            _rewrite(folder, corpus.info, wanted - old.keys(), buried, result)
            result.digest = Corpus(folder).digest
        # what a killed build has left may hold the images
        remove(folder.with_name(f".{folder.name}.building"))
    report = folder.resolve().with_name(f"{folder.name}-report.html")
    if held and report.is_file():
        result.notes.append(f"{report}: an older report, which may show the images: write it again with `x2i audit`")
    result.seconds = round(time.perf_counter() - began, 3)
    return result


def _folder(path: str | Path) -> Path:
    """The corpus's folder, with a name that others can be put beside. Raises RecipeError."""
    if "://" in str(path):
        raise RecipeError(f"{path}: images are forgotten in a local folder only: copy the corpus here and back")
    folder = Path(path) if Path(path).name not in ("", "..") else Path(path).resolve()
    if folder.is_symlink():  # the link would be replaced, and the folder would stay as it is
        raise RecipeError(f"{path}: is a link: name the folder itself, {folder.resolve()}")
    return folder


def _check_sizes(folder: Path, info: dict[str, Any]) -> None:
    """Hard links would carry a damaged shard into the new corpus, which then looks newly made."""
    for shard in info["shards"]:
        path = folder / shard["name"]
        if not path.is_file() or path.stat().st_size != shard["size"]:
            raise X2IError(
                f"{path}: missing, or not of its size; nothing was changed. `x2i verify {folder}` says more."
            )
    for name, digest in info["files"].items():
        if not (folder / name).is_file() or sha256_of(folder / name) != digest:
            raise X2IError(
                f"{folder / name}: not as it was written; nothing was changed. `x2i verify {folder}` says more."
            )


def _effect(corpus: Corpus, wanted: set[str]) -> tuple[Forgotten, bool]:
    """What goes with these images; and whether any shard held one of them, or a row."""
    assert isinstance(corpus.path, Path)
    new = wanted - tombstones.of_corpus(corpus.info).keys()
    result = Forgotten(str(corpus.path), corpus.digest, corpus.digest, sorted(new), len(wanted) - len(new))
    result.untouched = len(corpus.info["shards"])
    if not new:
        return result, False
    effect = effect_on(corpus.path, corpus.info, new)
    with connect() as connection:
        selection = f"read_parquet({literal(corpus.path / SELECTION)})"
        tombstones.find_hits(connection, selection, new)
        (rows,) = connection.sql("select count(*) from hits").fetchall()[0]
        hit = (
            {r for (r,) in connection.sql("select row_id from hits").fetchall()} & effect.lost if effect.lost else set()
        )
        # rows that fell as duplicates of a row hit, by what their pictures look like
        twins = connection.sql(
            f"""select location from {selection} d where survivor in (select row_id from hits)
            and row_id not in (select row_id from hits) and reason = 'duplicate_near' order by location"""
        ).fetchall()
    if twins:
        result.notes.append(
            f"{len(twins)} near duplicates of these images ({_some([t for (t,) in twins])}) stay out as long as the recipe "
            "drops near duplicates; they are images of their own: --near forgets them as well"
        )
    result.rows, result.samples = rows, effect.by_task
    result.lost = len(effect.lost - hit)
    result.dropped = len(effect.dropped)
    result.rewritten = len(effect.keys) - result.dropped
    result.untouched -= len(effect.keys)
    return result, True


def _bury(lake: Path, buried: dict[str, str], notes: list[str]) -> str | None:
    if not lake.is_dir():
        notes.append(
            f"the lake {lake} is not here: it has no tombstones of these images, and other recipes on it may bring them "
            "back. Run this again from the folder that the recipe's paths are relative to, or give --lake."
        )
        return None
    tombstones.bury(lake, buried)
    return str(lake)


def _rewrite(folder: Path, info: dict[str, Any], new: set[str], buried: dict[str, str], result: Forgotten) -> None:
    """Make the corpus without the images `new` beside the old one, and put it in its place."""
    target = folder.with_name(f".{folder.name}.forgetting")
    remove(target)
    (target / "shards").mkdir(parents=True)
    try:
        taken = take_out(folder, info, new, target)
        tombstones.write_selection(folder / SELECTION, target / SELECTION, buried, (), taken.effect.lost)
        renewed = _info(info, target, taken, buried)
        write_text(target / INFO, json.dumps(renewed, indent=1, ensure_ascii=False) + "\n")
        write_text(target / CARD, card(renewed))
        if (folder / RECIPE).is_file():
            link(folder / RECIPE, target / RECIPE)
        put(target, folder)
    except BaseException:
        remove(target)
        raise


def _info(old: dict[str, Any], folder: Path, taken: Taken, buried: dict[str, str]) -> dict[str, Any]:
    """`corpus.json` of what lies in `folder`."""
    with connect() as connection:
        connection.read_parquet(str(folder / SELECTION)).create_view("selection")
        connection.read_parquet(str(folder / MANIFEST)).create_view("manifest")
        selected = f"kept or stage = 'assembly' or reason = {literal(tombstones.LOST)}"
        counted = f"select count(*) from selection where {selected}"
        (chosen,) = connection.sql(counted).fetchall()[0]
        rows_out, samples = connection.sql("select count(distinct row_id), count(*) from manifest").fetchall()[0]
        reasons = "select stage, reason, count(*) from selection where not kept group by all"
        fell = {(stage, reason): rows for stage, reason, rows in connection.sql(reasons).fetchall()}
    with pq.ParquetFile(folder / MANIFEST) as file:
        identity = corpus_digest(taken.shards, file.iter_batches(4096))
    # nothing but these two reasons can be new, and they come last
    steps = [(f["stage"], f["reason"]) for f in old["funnel"] if f["stage"] != tombstones.FORGOTTEN]
    steps += [(tombstones.FORGOTTEN, reason) for reason in (tombstones.FORGOTTEN, tombstones.LOST)]
    info = {
        **old,
        "digest": identity,
        "counts": {
            **old["counts"],
            "selected": chosen,
            "rows_out": rows_out,
            "samples": samples,
            "shards": len(taken.shards),
            "bytes": sum(s["size"] for s in taken.shards),
        },
        "funnel": [{"stage": s, "reason": r, "rows": fell[s, r]} for s, r in steps if (s, r) in fell],
        "tasks": taken.tasks,
        "forgotten": tombstones.listed(buried),
        "files": {name: sha256_of(folder / name) for name in (MANIFEST, SELECTION)},
        "shards": taken.shards,
    }
    del info["seal"]
    counts = info["counts"]
    if counts["rows_in"] != counts["rows_out"] + sum(fell.values()):
        raise X2IError(
            f"rows do not add up: {counts['rows_in']} in, {counts['rows_out']} out, {sum(fell.values())} fell. "
            "This is a defect of x2i: nothing was changed."
        )
    return info | {"seal": hashlib.sha256(canonical_json(info).encode()).hexdigest()}


def _some(names: list[str], many: int = 3) -> str:
    return ", ".join(names[:many]) + (" …" if len(names) > many else "")
