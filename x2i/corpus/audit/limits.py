"""Rows that fell although nothing is wrong with them: too near to a benchmark's images, or beyond a quota."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from x2i.base.sql import literal
from x2i.corpus.audit.ask import SHUFFLED, ask, one_of, rows
from x2i.corpus.audit.evidence import COSINE, Row
from x2i.corpus.audit.pictures import shrink
from x2i.corpus.audit.scores import FEW, Value
from x2i.corpus.rules import quota_said, scope

if TYPE_CHECKING:
    from x2i.corpus.corpus import Corpus


@dataclass(frozen=True)
class Match:
    """A row and the benchmark's image that it is too near to; its picture is None where it is out of reach."""

    row: Row
    file: str
    picture: bytes | None


@dataclass(frozen=True)
class Benchmark:
    """A benchmark that the corpus was kept clear of, how many rows fell for it, and some of them."""

    name: str
    folder: str
    fell: int
    matches: list[Match]


def benchmarks(corpus: Corpus, count: int, side: int, pictures: bool) -> list[Benchmark]:
    """Each benchmark of the recipe with at most `count` matches of all together, those that lie farthest apart first.

    Args:
        side: the longer side of a thumbnail, in pixels.
        pictures: whether to look into the benchmarks' folders.
    """
    clean = corpus.info.get("recipe", {}).get("select", {}).get("decontaminate") or {}
    folders: dict[str, str] = clean.get("benchmarks", {})
    out = []
    for name, folder in folders.items():
        where = f"not kept and stage = 'contaminated' and reason = {literal(name)}"
        (fell,) = ask(corpus, f"select count(*) as n from selection where {where}")
        found = rows(
            corpus, where, f"distance desc nulls last, {COSINE} nulls last, {SHUFFLED}", -(-count // len(folders))
        )
        matches = []
        for row in found:
            file = str(row["detail"] or "").partition(f" {name}/")[2]  # the detail ends with the image's name
            matches.append(Match(row, file, _picture(Path(folder), file, side) if pictures and file else None))
        out.append(Benchmark(name, folder, fell["n"], matches))
    return out


def _picture(folder: Path, file: str, side: int) -> bytes | None:
    path = folder / file
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
        return shrink(path.read_bytes(), side) if inside else None
    except (OSError, ValueError):
        return None


@dataclass(frozen=True)
class Quota:
    """A quota: what it allows, how many rows fell for it, and the largest groups of the rows that met it.

    Rows that it let through count as kept, whatever they fell for later.
    """

    name: str
    said: str
    fell: int
    values: tuple[Value, ...]
    further: int


def quotas(corpus: Corpus) -> list[Quota]:
    """The recipe's quotas, in their order."""
    asked: dict[str, dict[str, Any]] = corpus.info.get("recipe", {}).get("select", {}).get("quotas") or {}
    names = list(asked)
    return [_quota(corpus, name, quota, names[i + 1 :]) for i, (name, quota) in enumerate(asked.items())]


def _quota(corpus: Corpus, name: str, quota: dict[str, Any], later: list[str]) -> Quota:
    import duckdb

    mine = f"(not kept and stage = 'quota' and reason = {literal(name)})"
    through = f"(kept or stage = 'assembly' or (stage = 'quota' and reason in {one_of(later)}))"
    (fell,) = ask(corpus, f"select count(*) filter ({mine}) as n from selection")
    tables = scope([a["name"] for a in corpus.info["annotators"]], "selection")
    try:
        groups = ask(
            corpus,
            f"""select left(coalesce(q.value::varchar, 'null'), 60) as label, count(*) filter ({through}) as kept,
                       count(*) filter ({mine}) as fell, count(*) over () as groups
                from (select rows.row_id as id, ({quota["by"] or "'all rows'"}\n) as value from {tables}) q
                join selection on row_id = q.id where {through} or {mine}
                group by all order by count(*) desc, label limit {FEW}""",
        )
    except duckdb.Error:  # it asks for what the selection does not carry
        groups = []
    values = tuple(Value(g["label"], g["kept"], g["fell"]) for g in groups)
    return Quota(name, quota_said(quota), fell["n"], values, groups[0]["groups"] - len(groups) if groups else 0)
