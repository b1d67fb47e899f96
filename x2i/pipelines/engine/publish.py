"""From verdicts to groups, and from built groups to a corpus that appears whole or not at all.

.OUT.building/verdicts.parquet          the selection's verdicts
.OUT.building/<assembly>/rows.parquet   the rows that stay: one row group is one group to build
.OUT.building/<assembly>/000000/        a built group
OUT/                                    the corpus
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from x2i.base.errors import RecipeError, X2IError
from x2i.base.files import remove, write_text, writing
from x2i.base.seeds import canonical_json, digest
from x2i.base.sql import connect, identifier, literal
from x2i.base.weights import digest_of
from x2i.corpus import place, tombstones
from x2i.corpus.card import card
from x2i.corpus.corpus import CARD, FORMAT, INFO, MANIFEST, RECIPE, SELECTION
from x2i.corpus.lake import Column, Lake, count_rows
from x2i.corpus.manifest import MADE, SCHEMA, ManifestWriter, corpus_digest, renew
from x2i.corpus.takeout import link, take_out
from x2i.pipelines.annotators.base import Annotator
from x2i.pipelines.engine.assemble import OUTCOME, PART
from x2i.pipelines.engine.chosen import GROUPED
from x2i.pipelines.engine.groups import PLACE, join_groups
from x2i.pipelines.recipe import Plan
from x2i.pipelines.select.query import STAGES
from x2i.pipelines.select.quotas import NOT_DRAWN

#: What can change the bytes of an encoded image, besides our own code.
SOFTWARE = ("x2i", "numpy", "opencv-python-headless", "pillow", "simplejpeg", "onnxruntime", "duckdb", "pyarrow", "ray")


def refuse_strangers(out: Path, where: str) -> None:
    """Raise RecipeError if `out` is there and is neither empty nor a corpus: it is not ours to replace."""
    if out.exists() and not (out / INFO).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise RecipeError(f"{where}: out: {out} holds something that is not a corpus; name another folder")


def recover(out: Path) -> None:
    """Put back the old corpus if a run was killed between moving it away and moving the new one in."""
    place.recover(out)


@dataclass
class Groups:
    """The rows that stay, cut into groups. `reused`: the published corpus has these very samples already.

    `assembly` names what would be built if nothing had been forgotten; `tombstones` say why each image was.
    """

    rows: Path
    assembly: str
    units: list[list[str]]  # of each group
    selected: int
    reused: bool
    tombstones: dict[str, str] = field(default_factory=dict)
    bereaved: frozenset[str] = frozenset()  # rows that lost a group, because another row in it was forgotten

    def folder(self, number: int) -> Path:
        """Where a group is built."""
        return self.rows.parent / f"{number:06d}"


class Staging:
    """The folder beside the corpus in which the next one is made."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out.with_name(f".{out.name}.building")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.verdicts = self.folder / "verdicts.parquet"

    def group(self, plan: Plan, found: pa.Table | None = None) -> Groups:
        """Cut the rows that stay into groups to build, one per about `shard_samples` samples, and name the assembly.

        Args:
            found: rows that make samples together (`x2i.pipelines.engine.groups`).
        """
        per_group = max(1, plan.recipe.output.shard_samples // max(1, sum(len(t.task_types()) for t in plan.tasks)))
        scores = _scores(plan)
        quoted = [f"{identifier(*s.split('.', 1))}::double" for s in scores]
        values = ", ".join(f"case when isfinite({s}) then {s} end" for s in quoted)
        names = ", ".join(literal(s) for s in scores)
        query = f"""select * exclude (kept, stage, reason, detail, survivor, distance),
                    map([{names}]::varchar[], [{values}]::double[]) as scores
                    from {{table}} where kept"""
        verdicts = f"read_parquet({literal(self.verdicts)})"
        rows = self.folder / "rows.parquet"
        units: list[list[str]] = []
        with connect() as connection:
            query = query.format(table=verdicts)
            if found is not None and found.num_rows:
                placed = f'(select *, row_number() over () as "{PLACE}" from {verdicts})'
                query = join_groups(connection, plan, found, query.replace(verdicts, placed))
            reader = connection.sql(query).to_arrow_reader(per_group)
            with writing(rows), pq.ParquetWriter(rows, reader.schema, compression="zstd") as writer:
                for table in tombstones.regroup(reader, per_group):
                    units.append(_units(table))
                    writer.write_table(table, row_group_size=per_group)
        selected = pq.read_metadata(rows).num_rows
        assembly = digest(
            "assembly/3",
            digest_of(rows),
            [t.fingerprint for t in plan.tasks],
            {n: [a.fingerprint, columns] for n, (a, columns) in plan.heavy_reads().items()},
            plan.recipe.output.model_dump(mode="json"),
            plan.recipe.decode.model_dump(mode="json"),
            plan.recipe.seed,
            *([plan.recipe.select.tasks] if plan.recipe.select.tasks else []),
        )
        buried, hits = self._forgotten(plan.recipe.lake)
        # groups that a killed run left are of use only to one that is to forget the same images
        folder = self.folder / (digest("staging/1", assembly, sorted(buried)) if len(hits) else assembly)[:16]
        for other in self.folder.iterdir():  # what an earlier recipe left unfinished
            if other not in (folder, rows, self.verdicts):
                remove(other)
        folder.mkdir(exist_ok=True)
        os.replace(rows, folder / "rows.parquet")
        old = _read_info(self.out)
        reused = old is not None and old.get("assembly") == assembly and _whole(self.out, old)
        if old and reused and not buried.keys() <= tombstones.of_corpus(old).keys():
            reused = "images" in pq.read_schema(self.out / MANIFEST).names  # else it cannot be told what must go
        groups = Groups(folder / "rows.parquet", assembly, units, selected, reused, buried)
        if len(hits):
            groups.units, groups.selected, groups.bereaved = _leave_out(groups.rows, hits, per_group)
        return groups

    def _forgotten(self, lake: str) -> tuple[dict[str, str], pa.Array]:
        """The tombstones that concern this corpus (its own, and of the lake's those that hit a row), and the rows hit."""
        own = tombstones.of_corpus(_read_info(self.out) or {})
        known = tombstones.bury(Path(lake), own)
        with connect() as connection:
            verdicts = f"read_parquet({literal(self.verdicts)})"
            tombstones.find_hits(connection, verdicts, known)
            held = connection.sql(
                f"""select image_id from tombs where image_id in (select image_id from {verdicts})
                or image_id in (select unnest(inputs) from {verdicts})"""
            ).fetchall()
            hits = connection.sql("select row_id from hits").to_arrow_table()["row_id"].combine_chunks()
        return {i: known[i] for i in sorted({*own, *(i for (i,) in held)})}, hits


def _leave_out(rows: Path, hits: pa.Array, per_group: int) -> tuple[list[list[str]], int, frozenset[str]]:
    """Write the rows again without those hit and without groups that need one; the others stay in the groups they were in.

    Returns:
        the units of each group, the number of rows, and the rows that lost a group.
    """
    units, bereaved = [], set[str]()
    temporary = rows.with_name(f".{rows.name}.tmp")
    with pq.ParquetFile(rows) as file, pq.ParquetWriter(temporary, file.schema_arrow, compression="zstd") as writer:
        for number in range(file.num_row_groups):
            table = file.read_row_group(number)
            table = table.filter(pc.invert(pc.is_in(table["row_id"], value_set=hits)))
            if GROUPED in table.column_names:
                table = _without_groups(table, hits, bereaved)
            if table.num_rows:
                units.append(_units(table))
                writer.write_table(table, row_group_size=per_group)
    os.replace(temporary, rows)
    return units, pq.read_metadata(rows).num_rows, frozenset(bereaved)


def _without_groups(table: pa.Table, hits: pa.Array, bereaved: set[str]) -> pa.Table:
    """The rows without the groups that hold one of `hits`."""
    others = pc.list_flatten(pc.struct_field(pc.list_flatten(table[GROUPED]), "others"))
    if not pc.any(pc.is_in(pc.struct_field(others, "row_id"), value_set=hits)).as_py():
        return table
    gone = set(hits.to_pylist())
    column = table[GROUPED].to_pylist()
    for at, groups in enumerate(column):
        left = [g for g in groups or () if not gone & {o["row_id"] for o in g["others"]}]
        if len(left) < len(groups or ()):
            column[at] = left
            bereaved.add(table["row_id"][at].as_py())
    where = table.schema.get_field_index(GROUPED)
    return table.set_column(where, table.schema.field(where), pa.array(column, table.schema.field(where).type))


def _units(table: pa.Table) -> list[str]:
    """The units that the rows of a group come from, and those of the other rows that they need."""
    found = dict.fromkeys(table["unit"].to_pylist())
    for groups in table[GROUPED].to_pylist() if GROUPED in table.column_names else []:
        found |= dict.fromkeys(other["unit"] for group in groups or () for other in group["others"])
    return list(found)


def _scores(plan: Plan) -> list[str]:
    if plan.recipe.output.scores is not None:
        return sorted(set(plan.recipe.output.scores))
    return sorted(f"{a.name}.{c.name}" for a in plan.annotators for c in a.columns if pa.types.is_floating(c.type))


def publish(plan: Plan, lake: Lake, staging: Staging, groups: Groups, units: dict[str, list[str]]) -> dict[str, Any]:
    """Make the new corpus of the built groups and put it in place; leave an equal one alone. Returns corpus.json.

    Args:
        units: unit ids by source fingerprint, as planned.

    Raises:
        X2IError: rows in are not rows out plus the sum of all reasons.
    """
    old = _read_info(staging.out)
    new = staging.folder / "corpus"
    remove(new)
    (new / "shards").mkdir(parents=True)
    outcome = _link_published(staging.out, old, groups, new) if old and groups.reused else _link_groups(groups, new)
    tombstones.write_selection(staging.verdicts, new / SELECTION, groups.tombstones, outcome["fallen"], outcome["lost"])
    info = _info(plan, lake, groups, outcome, units, new)
    _check_equation(info)
    if old == info and _whole(staging.out, info):
        remove(staging.folder)
        return info
    write_text(new / INFO, json.dumps(info, indent=1, ensure_ascii=False) + "\n")
    write_text(new / CARD, card(info))
    write_text(new / RECIPE, plan.text or json.dumps(plan.recipe.model_dump(mode="json"), indent=1))
    place.put(new, staging.out)
    remove(staging.folder)
    return info


def _link_groups(groups: Groups, new: Path) -> dict[str, Any]:
    """Number the groups' shards through, and write the manifest over all of them."""
    shards: list[dict[str, Any]] = []
    made: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    fallen: list[dict[str, str]] = []
    outcomes = [json.loads((groups.folder(n) / OUTCOME).read_text()) for n in range(len(groups.units))]
    width = max(5, len(str(sum(len(o["shards"]) for o in outcomes))))
    with writing(new / MANIFEST), ManifestWriter(new / MANIFEST) as writer:
        for number, outcome in enumerate(outcomes):
            names = {}
            for shard in outcome["shards"]:
                names[shard["name"]] = f"shards/{len(shards):0{width}d}.tar"
                link(groups.folder(number) / shard["name"], new / names[shard["name"]])
                shards.append({**shard, "name": names[shard["name"]]})
            part = pq.read_table(groups.folder(number) / PART, schema=MADE)
            column = pa.array([names[n] for n in part["shard"].to_pylist()], pa.string())
            writer.write(part.set_column(1, SCHEMA.field("shard"), column))
            made.update(outcome["made"])
            skipped.update(outcome["skipped"])
            fallen += outcome["fallen"]
    tasks: dict[str, dict[str, Any]] = {t: {"made": n, "skipped": {}} for t, n in made.items()}
    for name, count in sorted(skipped.items()):
        task, _, reason = name.rpartition("/")
        tasks.setdefault(task, {"made": 0, "skipped": {}})["skipped"][reason] = count
    lost = {f["row_id"] for f in fallen if f["reason"] in ("no_task", NOT_DRAWN)} & groups.bereaved
    fallen = [f for f in fallen if f["row_id"] not in lost]
    return {"shards": shards, "tasks": dict(sorted(tasks.items())), "fallen": fallen, "lost": lost}


def _link_published(out: Path, old: dict[str, Any], groups: Groups, new: Path) -> dict[str, Any]:
    """The published corpus holds these samples: take its shards and its manifest over, less what is to be forgotten."""
    shards, tasks = old["shards"], old["tasks"]
    verdicts = pq.read_table(out / SELECTION, columns=["row_id", "stage", "reason", "detail"])
    verdicts = verdicts.filter(pc.field("stage").isin(["assembly", tombstones.FORGOTTEN])).to_pylist()
    fallen = [{k: v[k] for k in ("row_id", "reason", "detail")} for v in verdicts if v["stage"] == "assembly"]
    lost = {v["row_id"] for v in verdicts if v["reason"] == tombstones.LOST}
    if further := groups.tombstones.keys() - tombstones.of_corpus(old).keys():
        taken = take_out(out, old, further, new)
        shards, tasks, lost = taken.shards, taken.tasks, lost | taken.effect.lost
    else:
        for name in [s["name"] for s in old["shards"]]:
            link(out / name, new / name)
        if not renew(out / MANIFEST, new / MANIFEST):
            link(out / MANIFEST, new / MANIFEST)
    return {"shards": shards, "tasks": tasks, "fallen": fallen, "lost": lost}


def _info(
    plan: Plan, lake: Lake, groups: Groups, outcome: dict[str, Any], units: dict[str, list[str]], new: Path
) -> dict[str, Any]:
    with connect() as connection:
        selection = connection.read_parquet(str(new / SELECTION))
        fell = connection.sql(
            "select stage, reason, count(*) as rows from selection where not kept group by all"
        ).fetchall()
        manifest = connection.read_parquet(str(new / MANIFEST))
        rows_out, samples = connection.sql("select count(distinct row_id), count(*) from manifest").fetchall()[0]
        del selection, manifest
    conditions = [*plan.recipe.select.where, *plan.recipe.select.quotas]
    fell.sort(key=lambda f: (STAGES.index(f[0]), conditions.index(f[1]) if f[1] in conditions else 0, f[1]))
    read = (lake.file(Column("rows", source), unit) for source, ids in units.items() for unit in ids)
    rows_in = sum(count_rows(path) for path in read)
    with pq.ParquetFile(new / MANIFEST) as file:
        identity = corpus_digest(outcome["shards"], file.iter_batches(4096))
    info = {
        "format": FORMAT,
        "name": plan.recipe.name,
        "description": plan.recipe.description,
        "license": plan.recipe.license,
        "digest": identity,
        "assembly": groups.assembly,
        "counts": {
            "rows_in": rows_in,
            "selected": groups.selected,
            "rows_out": rows_out,
            "samples": samples,
            "shards": len(outcome["shards"]),
            "bytes": sum(s["size"] for s in outcome["shards"]),
            "units": sum(map(len, units.values())),
        },
        "funnel": [{"stage": s, "reason": r, "rows": n} for s, r, n in fell],
        "tasks": outcome["tasks"],
        "sources": [{"name": s.name, "kind": s.kind, "fingerprint": s.fingerprint} for s in plan.sources],
        "annotators": [_about(plan, a) for a in plan.annotators],
        "lake": plan.recipe.lake,
        "recipe": plan.recipe.model_dump(mode="json"),
        "software": {name: _version(name) for name in SOFTWARE},
        "forgotten": tombstones.listed(groups.tombstones),
        "files": {name: digest_of(new / name) for name in (MANIFEST, SELECTION)},
        "shards": outcome["shards"],
    }
    return info | {"seal": hashlib.sha256(canonical_json(info).encode()).hexdigest()}


def _about(plan: Plan, annotator: Annotator) -> dict[str, Any]:
    """What made an annotator's columns, under the name that the recipe gives it, and which rows it saw."""
    about = {"fingerprint": annotator.fingerprint, **annotator.description()}
    column = plan.column(annotator)
    return about | {"name": annotator.name, "kind": type(annotator).name, "where": column.where, "texts": column.texts}


def _check_equation(info: dict[str, Any]) -> None:
    counts, fell = info["counts"], sum(f["rows"] for f in info["funnel"])
    if counts["rows_in"] != counts["rows_out"] + fell:
        raise X2IError(
            f"rows do not add up: {counts['rows_in']} in, {counts['rows_out']} out, {fell} fell for a reason. "
            "This is a defect of x2i, not of the data: the corpus was not published."
        )


def _whole(out: Path, info: dict[str, Any]) -> bool:
    """Whether the published shards are there with their sizes, and the tables as written (`x2i verify` looks closer)."""
    sizes = {s["name"]: s["size"] for s in info["shards"]}
    shards = all((out / n).is_file() and (out / n).stat().st_size == size for n, size in sizes.items())
    return shards and all((out / n).is_file() and digest_of(out / n) == sha for n, sha in info["files"].items())


def _read_info(out: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads((out / INFO).read_text()))
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
