"""`diff`: what sets two corpora apart, and by which rule: rows, samples, the recipe, the annotators.

    from x2i.corpus.diff import diff
    told = diff("runs/monday/corpus", "runs/tuesday/corpus")
    told["rows"]["went_by"]     # [{"stage": "where", "reason": "safe", "rows": 112}, …]

Rows are compared by their id (source and location), those that only one corpus has by their image. DuckDB joins both
selections and both manifests; every list of examples is bounded, the counts beside it are of all.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb

from x2i.base.errors import X2IError
from x2i.base.sql import connect, identifier, literal
from x2i.corpus.corpus import MANIFEST, SELECTION, Corpus
from x2i.corpus.rules import columns_in, scope

#: Verdicts on rows of one corpus that the other does not have.
ABSENT, MOVED = "not in its sources", "the same image is kept as another row"

#: What of an annotator's description tells one version from another.
ABOUT = ("version", "parameters", "weights", "where", "fingerprint")


def diff(a: str | Path, b: str | Path, limit: int = 10) -> dict[str, Any]:
    """What came, went and changed from corpus `a` to corpus `b`, as JSON types.

    Args:
        limit: most examples in each list.

    Raises:
        X2IError: one of them is no corpus, or its tables cannot be read.
    """
    first, second = Corpus(a), Corpus(b)
    try:
        return _Differ(first, second, limit).told()
    except duckdb.Error as error:
        line = str(error).splitlines()[0]
        raise X2IError(f"{a} or {b}: cannot be read: {line}. `x2i verify` says what is damaged.") from None


class _Differ:
    """Asks two corpora; `a` is the old one, `b` the new one."""

    def __init__(self, a: Corpus, b: Corpus, limit: int) -> None:
        self._a, self._b, self._limit = a, b, limit
        self._connection = connect()
        for side, corpus in (("a", a), ("b", b)):
            for table, name in (("s", SELECTION), ("m", MANIFEST)):
                if isinstance(corpus.path, Path):
                    relation = self._connection.read_parquet(str(corpus.path / name))
                else:
                    relation = self._connection.from_arrow(corpus.selection if table == "s" else corpus.manifest)
                relation.create_view(f"{table}{side}")

    def told(self) -> dict[str, Any]:
        """The whole difference."""
        a, b = self._a.info, self._b.info
        return {
            "a": {"corpus": str(self._a.path), "name": a["name"], "digest": self._a.digest},
            "b": {"corpus": str(self._b.path), "name": b["name"], "digest": self._b.digest},
            "same": self._a.digest == self._b.digest,
            "counts": [{"what": n, "a": a["counts"].get(n), "b": b["counts"].get(n)} for n in b["counts"]],
            "funnel": _funnel(a["funnel"], b["funnel"]),
            "recipe": list(_leaves(a["recipe"], b["recipe"])),
            "annotators": _annotators(a["annotators"], b["annotators"]),
            "sources": _sources(a["sources"], b["sources"]),
            "software": list(_leaves(a.get("software", {}), b.get("software", {}))),
            "rows": self._rows(),
            "samples": self._samples(),
        }

    def _ask(self, query: str) -> list[dict[str, Any]]:
        return list(self._connection.sql(query).to_arrow_table().to_pylist())

    def _rows(self) -> dict[str, Any]:
        self._moves("went", "sa", "sb")
        self._moves("came", "sb", "sa")
        (both,) = self._ask("select count(*) as n from sa join sb using (row_id) where sa.kept and sb.kept")
        changed = """from sa join sb using (row_id) where sa.kept and sb.kept
            and (sa.image_id, sa.text) is distinct from (sb.image_id, sb.text)"""
        otherwise = """select sa.stage as stage_a, sa.reason as reason_a, sb.stage as stage_b, sb.reason as reason_b,
            count(*) as rows from sa join sb using (row_id) where not sa.kept and not sb.kept
            and (sa.stage, sa.reason) is distinct from (sb.stage, sb.reason) group by all
            order by rows desc, stage_a, reason_a, stage_b, reason_b"""
        out: dict[str, Any] = {"kept_in_both": both["n"]}
        for what in ("went", "came"):
            query = f"select stage, reason, count(*) as rows from {what} group by all order by rows desc, stage, reason"
            out[f"{what}_by"] = self._ask(query)
            out[what] = sum(r["rows"] for r in out[f"{what}_by"] if r["reason"] != MOVED)
        out["moved"] = sum(r["rows"] for r in out["went_by"] if r["reason"] == MOVED)
        (out["changed"],) = (r["n"] for r in self._ask(f"select count(*) as n {changed}"))
        out["fell_otherwise"] = self._ask(otherwise)
        out["went_examples"] = self._examples("went", self._b, "sb")
        out["came_examples"] = self._examples("came", self._a, "sa")
        out["changed_examples"] = self._ask(
            f"""select row_id, sb.source, sb.location, sa.image_id <> sb.image_id as other_image,
            sa.text is distinct from sb.text as other_text {changed} order by sb.location, row_id limit {self._limit}"""
        )
        return out

    def _moves(self, name: str, source: str, other: str) -> None:
        """Create the table `name`: rows that `source` keeps and `other` does not, with the verdict that `other` has."""
        self._connection.execute(
            f"""create temp table {name} as
            with gone as (
                select x.row_id, x.image_id, x.source, x.location, y.row_id is not null as there,
                       y.stage, y.reason, y.detail, y.survivor
                from {source} x left join {other} y using (row_id) where x.kept and not coalesce(y.kept, false)
            ), elsewhere as (
                select image_id, bool_or(kept) as kept, arg_min(stage, row_id) as stage, arg_min(reason, row_id) as reason,
                       arg_min(detail, row_id) as detail
                from {other} where image_id in (select image_id from gone where not there) group by image_id
            )
            select g.row_id, g.image_id, g.source, g.location, g.survivor, g.there,
                   case when g.there then g.stage when e.kept then 'source' when e.image_id is null then 'source'
                        else e.stage end as stage,
                   case when g.there then g.reason when e.kept then {literal(MOVED)}
                        when e.image_id is null then {literal(ABSENT)} else e.reason end as reason,
                   case when g.there then g.detail else e.detail end as detail
            from gone g left join elsewhere e using (image_id)"""
        )

    def _examples(self, name: str, judge: Corpus, table: str) -> list[dict[str, Any]]:
        """Some rows for every reason, those of the commonest first, with what decided in the corpus that has not kept them."""
        rows = self._ask(
            f"""select * exclude (nth, often) from (
                select *, row_number() over (partition by stage, reason order by location, row_id) as nth,
                       count(*) over (partition by stage, reason) as often from {name} where reason <> {literal(MOVED)}
            ) order by nth, often desc, stage, reason limit {self._limit}"""
        )
        conditions = judge.info["recipe"]["select"]["where"]
        for row in rows:
            row["values"] = {}
            if row["stage"] == "where" and row["there"] and row["reason"] in conditions:
                row["condition"] = conditions[row["reason"]]
                row["values"] = self._values(row["row_id"], row["condition"])
            survivor = row.pop("survivor")
            if survivor:
                found = self._ask(f"select source, location from {table} where row_id = {literal(survivor)}")
                row["survivor"] = found[0] if found else {"row_id": survivor}
        return rows

    def _values(self, row_id: str, condition: str) -> dict[str, dict[str, Any]]:
        """Of each column that a condition names, its value in both corpora; None where one does not have it."""
        out: dict[str, dict[str, Any]] = {}
        for column in columns_in(self._connection, condition):
            values = out[".".join(column)] = {}
            for side, corpus in (("a", self._a), ("b", self._b)):
                names = [n["name"] for n in corpus.info["annotators"]]
                picked = f"with picked as (select * from s{side} where row_id = {literal(row_id)})"
                try:
                    found = self._ask(f"{picked} select {identifier(*column)} as x from {scope(names, 'picked')}")
                except duckdb.BinderException:
                    found = []
                values[side] = found[0]["x"] if found else None
        return out

    def _samples(self) -> dict[str, Any]:
        out: dict[str, Any] = {}
        totals = {"unchanged": "a.sha256 = b.sha256", "changed": "a.sha256 <> b.sha256"}
        totals |= {"went": "b.key is null", "came": "a.key is null"}
        counted = ", ".join(f"count(*) filter ({sql}) as {name}" for name, sql in totals.items())
        joined = "ma a full join mb b on a.key = b.key"
        out["tasks"] = self._ask(
            f"""select coalesce(b.task_type, a.task_type) as task, count(a.key) as a, count(b.key) as b, {counted}
            from {joined} group by all order by task"""
        )
        out |= {name: sum(t[name] for t in out["tasks"]) for name in totals}
        for what, mine, its, its_rows in (("went", "ma", "mb", "sb"), ("came", "mb", "ma", "sa")):
            there = {t["task"] for t in out["tasks"] if t["b" if what == "went" else "a"]}
            tasks = ", ".join(literal(t) for t in sorted(there)) or "null"
            query = f"""select r.stage, case when r.row_id is not null then r.reason
                when not coalesce(task_type in ({tasks}), false) then 'it does not make ' || task_type
                when key in ({self._partners(mine, its_rows)}) then 'another image in it is not kept'
                else 'it makes no such sample of the row' end as reason, count(*) as samples
                from {mine} x anti join {its} y using (key) left join {what} r using (row_id)
                group by all order by samples desc, stage nulls last, reason"""
            out[f"{what}_by"] = self._ask(query)
            keys = f"select key, task_type, source, location from {mine} anti join {its} using (key)"
            out[f"{what}_examples"] = self._ask(f"{keys} order by key limit {self._limit}")
        changed = "ma a join mb b using (key) where a.sha256 <> b.sha256"
        query = f"select key, b.task_type, b.source, b.location from {changed} order by key limit {self._limit}"
        out["changed_examples"] = self._ask(query)
        whose = "a.images is distinct from b.images" if self._has_images("ma") and self._has_images("mb") else "false"
        out["changed_by"] = self._ask(
            f"""select null as stage, case when {whose} then 'other images are in it'
                else 'the same images, but other bytes' end as reason, count(*) as samples
            from {changed} group by all order by samples desc, reason"""
        )
        return out

    def _has_images(self, samples: str) -> bool:
        """Whether a manifest says which images are in a sample; old ones do not."""
        return "images" in self._connection.sql(f"select * from {samples} limit 0").columns

    def _partners(self, samples: str, rows: str) -> str:
        """A query for the keys of samples with an image that these rows do not keep, neither as an input."""
        if not self._has_images(samples):
            return "select null where false"
        kept = f"select image_id from {rows} where kept union select unnest(inputs) from {rows} where kept"
        images = f"select key, unnest(images) as image_id from {samples}"
        return f"select key from ({images}) where image_id not in (select x from ({kept}) t(x) where x is not null)"


def _funnel(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that fell for each reason, in both; in the order of the stages."""
    old, new = ({(f["stage"], f["reason"]): f["rows"] for f in funnel} for funnel in (a, b))
    stages: list[str] = []
    for funnel in (a, b):
        at = 0
        for stage in dict.fromkeys(f["stage"] for f in funnel):
            if stage not in stages:
                stages.insert(at, stage)
            at = stages.index(stage) + 1
    steps = sorted([*old, *(s for s in new if s not in old)], key=lambda step: stages.index(step[0]))
    return [{"stage": s, "reason": r, "a": old.get((s, r), 0), "b": new.get((s, r), 0)} for s, r in steps]


def _leaves(a: Any, b: Any, key: str = "") -> Iterator[dict[str, Any]]:
    """The leaves in which two values differ: `{"key": "select.where.safe", "a": "…", "b": "…"}`; absent ones are None."""
    if isinstance(a, list) and isinstance(b, list):
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if isinstance(a, dict) and isinstance(b, dict):
        for name in [*a, *(n for n in b if n not in a)]:
            yield from _leaves(a.get(name), b.get(name), f"{key}.{name}" if key else str(name))
    elif a != b:
        yield {"key": key, "a": a, "b": b}


def _annotators(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Annotators that came, went or changed, with what of them changed."""
    old, new = ({n["name"]: n for n in side} for side in (a, b))
    out: list[dict[str, Any]] = []
    for name in [*old, *(n for n in new if n not in old)]:
        if name not in new or name not in old:
            out.append({"name": name, "what": "went" if name in old else "came", "changes": []})
            continue
        before, now = ({w: side[name].get(w) for w in ABOUT} for side in (old, new))
        if changes := list(_leaves(before, now)):
            out.append({"name": name, "what": "changed", "changes": changes})
    return out


def _sources(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> list[dict[str, Any]]:
    old, new = ({s["name"]: s["fingerprint"] for s in side} for side in (a, b))
    out = []
    for name in [*old, *(n for n in new if n not in old)]:
        if old.get(name) != new.get(name):
            what = "changed" if name in old and name in new else "went" if name in old else "came"
            out.append({"name": name, "what": what})
    return out
