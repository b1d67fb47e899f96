"""The bookkeeping: every row of the sources either has samples or one reason, and all counts agree.

Plain DuckDB over `selection.parquet` (`s`) and `manifest.parquet` (`m`); nothing of the code that wrote them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from x2i.base.sql import connect
from x2i.corpus.faults import Faults
from x2i.corpus.rules import said, scope
from x2i.corpus.verify_files import MANIFEST, SELECTION
from x2i.corpus.verify_quotas import check_quotas, quota_queries

if TYPE_CHECKING:
    import duckdb


#: kind, file, query giving the ids that are wrong, what is wrong with them.
CHECKS = (
    ("key_twice", MANIFEST, "select key from m group by key having count(*) > 1", "keys occur more than once"),
    (
        "row_twice",
        SELECTION,
        "select row_id from s group by row_id having count(*) > 1",
        "row ids occur more than once",
    ),
    (
        "verdict",
        SELECTION,
        "select row_id from s where kept is null or kept <> (reason is null) or (stage is null) <> (reason is null)",
        "rows are neither kept nor fallen for a reason, or both",
    ),
    (
        "kept_without_sample",
        SELECTION,
        "select row_id from s anti join m using (row_id) where kept",
        "rows count as kept, but the manifest has no sample of them",
    ),
    (
        "sample_not_kept",
        MANIFEST,
        "select key from m left join s using (row_id) where not coalesce(kept, false)",
        "samples are of rows that the selection does not have, or that fell",
    ),
    (
        "lineage",
        MANIFEST,
        """select key from m join s using (row_id)
           where (m.image_id, m.source, m.location) is distinct from (s.image_id, s.source, s.location)""",
        "samples name another image, source or location than their row",
    ),
    (
        "survivor",
        SELECTION,
        """select d.row_id from s d left join s k on k.row_id = d.survivor
           where (d.stage is not distinct from 'duplicate') <> (d.survivor is not null)
              or (d.survivor is not null and (k.row_id is null or k.row_id = d.row_id
                  or not (k.kept or k.stage in ('contaminated', 'duplicate', 'quota', 'assembly', 'forgotten'))))""",
        "duplicates fell to a row that is not there, or that had fallen before",
    ),
    (
        "not_a_copy",
        SELECTION,
        """select d.row_id from s d join s k on k.row_id = d.survivor
           where d.reason = 'duplicate_exact' and d.image_id is distinct from k.image_id""",
        "exact duplicates have other bytes than the row that they fell to",
    ),
)


def check_rows(manifest: Path, selection: Path, info: dict[str, Any] | None, faults: Faults) -> dict[str, int]:
    """Check both tables against each other and against `corpus.json`; returns `rows_in` and `rows_out` as found.

    Args:
        manifest, selection: local files.
        info: `corpus.json` (`counts`, `funnel`, `tasks`, and `recipe` if it is there), if it can be read.
    """
    import duckdb

    with connect() as connection:
        try:
            connection.read_parquet(str(selection)).create_view("s")
            connection.read_parquet(str(manifest)).create_view("m")
            for kind, file, query, problem in CHECKS:
                _run(connection, faults, kind, file, query, problem)
            _check_scores(connection, faults)
            found = _count(connection, info, faults)
            if info is not None:
                _check_rules(connection, info, faults)
                _check_forgotten(connection, info, faults)
            return found
        except (duckdb.Error, RuntimeError, ValueError) as error:  # its binding raises these on text that is no UTF-8
            first = (str(error).splitlines() or [type(error).__name__])[0]
            problem = f"the rows cannot be counted and compared with the manifest's: {first}"
            faults.add("rows_unreadable", SELECTION, problem)
            return {}


def _run(connection: duckdb.DuckDBPyConnection, faults: Faults, kind: str, file: str, query: str, problem: str) -> None:
    count, examples = connection.sql(f"select count(*), list(x)[:3] from ({query}) t(x)").fetchall()[0]
    if count:
        shown = ", ".join(map(str, examples)) + (" …" if count > len(examples) else "")
        faults.add(kind, file, f"{count} {problem}: {shown}")


def _check_scores(connection: duckdb.DuckDBPyConnection, faults: Faults) -> None:
    """The manifest's scores are the annotators' values that the selection saw."""
    names = connection.sql("select distinct unnest(map_keys(scores)) as name from m order by name").fetchall()
    for (name,) in names:
        annotator, _, column = (part.replace('"', '""') for part in name.partition("."))
        quoted = name.replace("'", "''")
        value = f's."{annotator}"."{column}"::double'
        query = f"""select key from m join s using (row_id)
                    where m.scores['{quoted}'] is distinct from case when isfinite({value}) then {value} end"""
        _run(connection, faults, "scores", MANIFEST, query, f"samples have another {name} than their row")


def _count(connection: duckdb.DuckDBPyConnection, info: dict[str, Any] | None, faults: Faults) -> dict[str, int]:
    """Rows in = rows out + the sum of all reasons; and `corpus.json` says the same numbers."""
    # of these rows the selection kept, nothing was made, or nothing is left
    query = "select count(*), count(*) filter (where stage = 'assembly' or reason = 'lost_samples') from s"
    rows_in, assembly = connection.sql(query).fetchall()[0]
    samples, rows_out = connection.sql("select count(*), count(distinct row_id) from m").fetchall()[0]
    fell = connection.sql("select stage, reason, count(*) from s where reason is not null group by all").fetchall()
    lost = sum(n for _, _, n in fell)
    if rows_in != rows_out + lost:
        faults.add(
            "equation", SELECTION, f"{rows_in} rows in, but {rows_out} out + {lost} that fell = {rows_out + lost}"
        )
    found = {"rows_in": rows_in, "selected": rows_out + assembly, "rows_out": rows_out, "samples": samples}
    if info is None:
        return found
    for name, count in found.items():
        _equal(faults, f"counts.{name}", info["counts"][name], count)
    told = {(f["stage"], f["reason"]): f["rows"] for f in info["funnel"]}
    counted = {(stage, reason): n for stage, reason, n in fell}
    for step in sorted(told.keys() | counted.keys(), key=str):
        _equal(faults, f"funnel {step[0]}/{step[1]}", told.get(step, 0), counted.get(step, 0))
    made = dict(connection.sql("select task_type, count(*) from m group by all").fetchall())
    for task in sorted(made.keys() | info["tasks"].keys()):
        _equal(faults, f"tasks.{task}.made", info["tasks"].get(task, {"made": 0})["made"], made.get(task, 0))
    return found


def _equal(faults: Faults, what: str, told: int, found: int) -> None:
    if told != found:
        faults.add("count", "corpus.json", f"{what} says {told}, the tables hold {found}")


def _check_rules(connection: duckdb.DuckDBPyConnection, info: dict[str, Any], faults: Faults) -> None:
    """The recipe's own rules, asked again of the rows that stayed."""
    import duckdb

    select = info["recipe"]["select"]
    described = connection.sql("select * from s limit 0")
    structs = [n for n, kind in zip(described.columns, described.types, strict=True) if kind.id == "struct"]
    connection.execute("create view kept as select * from s where kept")
    for name, condition in select["where"].items():
        query = f"select rows.row_id from {scope(structs, 'kept')} where not coalesce(({condition}\n), false)"
        problem = f"kept rows do not meet the condition {name} ({condition})"
        try:
            _run(connection, faults, "rule", SELECTION, query, problem)
        except duckdb.BinderException:
            continue  # it asks for a column that the selection does not carry
    if select["dedup"].get("exact"):
        query = f"select image_id from kept group by image_id, {said('kept')} having count(*) > 1"
        _run(connection, faults, "rule", SELECTION, query, "images were kept more than once, though dedup.exact is set")
    whole = not info["forgotten"]
    asked = quota_queries(select, info["recipe"]["seed"], structs, whole)
    for query, problem in check_quotas(connection, asked):
        _run(connection, faults, "rule", SELECTION, query, problem)


def _check_forgotten(connection: duckdb.DuckDBPyConnection, info: dict[str, Any], faults: Faults) -> None:
    """No sample holds an image that was forgotten; the rows that did say so, and nothing else of it."""
    import pyarrow as pa

    ids = pa.array([t["image_id"] for t in info["forgotten"]], pa.string())
    connection.register("tombstones", pa.table({"image_id": ids}))
    gone = "select image_id from tombstones"
    fell = "stage is not distinct from 'forgotten' and reason is not distinct from 'forgotten'"
    query = f"""select distinct key from (select key, image_id as i from m union all select key, unnest(images) from m)
                where i in ({gone})"""
    _run(connection, faults, "forgotten_kept", MANIFEST, query, "samples hold an image that was forgotten")
    query = f"""select row_id from (select row_id, stage, reason, image_id as i from s
                    union all select row_id, stage, reason, unnest(inputs) from s)
                where i in ({gone}) and not ({fell})"""
    _run(connection, faults, "forgotten_row", SELECTION, query, "rows of forgotten images do not say that they are")
    if not len(ids):
        query = "select row_id from s where stage = 'forgotten'"
        problem = "rows fell as forgotten, but corpus.json has no tombstone"
        _run(connection, faults, "forgotten_row", SELECTION, query, problem)
    described = connection.sql("select * from s limit 0")
    told = ["text is not null", "meta <> '{}'", "len(inputs) > 0"]
    for name, kind in zip(described.columns, described.types, strict=True):
        if kind.id == "struct":
            told += [f"s.{_quoted(name)}.{_quoted(field)} is not null" for field, _ in kind.children]
    query = f"select row_id from s where {fell} and ({' or '.join(told)})"
    problem = "rows of forgotten images still tell their text, metadata, inputs or annotations"
    _run(connection, faults, "forgotten_told", SELECTION, query, problem)


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
