"""Where a sample comes from: from the source's file through every value and rule to a byte range in a shard.

    from x2i.corpus.trace import trace, trace_image, trace_row
    trace("runs/quickstart/corpus", "596aa1e7cb875eb7-fda7cb4e-deblur")["row"]["location"]  # a key, or its beginning
    trace_row("runs/quickstart/corpus", "broken.jpg")["rows"][0]["verdict"]["reason"]

All of it is read from the corpus itself; the lake and the sources are pointed at where they are still there.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from x2i.base.errors import RecipeError, X2IError
from x2i.base.seeds import digest
from x2i.base.sql import connect, identifier, literal
from x2i.corpus.corpus import Corpus
from x2i.corpus.lake import Column, Lake
from x2i.corpus.manifest import refuse_older
from x2i.corpus.rules import columns_in, quota_said, scope
from x2i.corpus.tombstones import FORGOTTEN

#: Most rows or samples that are listed.
MANY = 1000


def trace(path: str | Path, key: str) -> dict[str, Any]:
    """The lineage of one sample: `sample` (what and where it is) and `row` (what it was made of, and why).

    Args:
        path: the corpus, a folder or an fsspec URL.
        key: the sample's key, or a beginning that no other key has.

    Raises:
        RecipeError: there is no such sample, or more than one; says which come near.
        X2IError: there is no corpus at `path`.
    """
    tracer = _Tracer(Corpus(path))
    found = tracer.ask(f"select * from samples where key = {literal(key)}")
    found = found or tracer.ask(f"select * from samples where starts_with(key, {literal(key)}) limit 6")
    if not found:
        raise RecipeError(f"{path}: no sample's key begins with {key!r}{tracer.hint(key)}")
    if len(found) > 1:
        keys = ", ".join(r["key"] for r in found[:5]) + (" …" if len(found) > 5 else "")
        raise RecipeError(f"{path}: {key!r} is the beginning of several keys: {keys}. Give more of it.")
    return {**tracer.about(), "sample": tracer.sample(found[0]), "row": tracer.rows([found[0]["row_id"]])[0]}


def trace_image(path: str | Path, image: str) -> dict[str, Any]:
    """Every row that holds an image, kept or not, with its verdict and its samples: `image_id` and `rows`.

    Args:
        image: SHA-256 of the image's bytes, or a beginning that no other image has; inputs of ready samples count.

    Raises:
        RecipeError: no row holds such an image, or the beginning fits more than one.
    """
    tracer = _Tracer(Corpus(path))
    wanted = literal(image.lower())
    found = tracer.ask(
        f"""select image_id, inputs, row_id from selection where starts_with(image_id, {wanted})
            or contains(' ' || array_to_string(inputs, ' '), ' ' || {wanted}) limit {MANY}"""
    )
    ids = {i for r in found for i in (r["image_id"], *r["inputs"]) if i and i.startswith(image.lower())}
    if len(ids) != 1:
        fault = (
            f"{len(ids)} images begin with {image!r}: give more of it" if ids else f"no row holds the image {image!r}"
        )
        raise RecipeError(f"{path}: {fault}")
    return {**tracer.about(), "image_id": ids.pop(), "rows": tracer.rows([r["row_id"] for r in found])}


def trace_row(path: str | Path, row: str) -> dict[str, Any]:
    """One row of a source, kept or not, with its verdict and its samples, as the only element of `rows`.

    Args:
        row: its location as the source names it (`photos/cat.jpg`), its id, or a beginning of its id.

    Raises:
        RecipeError: there is no such row, or more than one.
    """
    tracer = _Tracer(Corpus(path))
    found = tracer.ask(f"select row_id, source, location from selection where location = {literal(row)} limit 6")
    found = found or tracer.ask(
        f"select row_id, source, location from selection where starts_with(row_id, {literal(row)}) limit 6"
    )
    if not found:
        raise RecipeError(f"{path}: no row has the location {row!r}, or an id that begins so{tracer.near(row)}")
    if len(found) > 1:
        shown = ", ".join(f"{r['row_id']} ({r['source']}: {r['location']})" for r in found)
        raise RecipeError(f"{path}: {row!r} fits more than one row: {shown}. Give the row's id.")
    return {**tracer.about(), "rows": tracer.rows([found[0]["row_id"]])}


class _Tracer:
    """Asks one corpus."""

    def __init__(self, corpus: Corpus) -> None:
        self._corpus = corpus
        self._info = corpus.info
        self._recipe = self._info["recipe"]
        self._lake = Lake(self._info["lake"])
        self._expressions = connect()  # parses, reads nothing
        refuse_older(self._asked("from samples limit 0").schema.names, corpus.path)

    def ask(self, query: str) -> list[dict[str, Any]]:
        """Rows of a query over `samples` and `selection`. Raises BinderException if it names what is not there."""
        return list(self._asked(query).to_pylist())

    def _asked(self, query: str) -> pa.Table:
        try:
            return self._corpus.sql(query).to_arrow_table()
        except duckdb.BinderException:
            raise
        except duckdb.Error as error:
            first = str(error).splitlines()[0]
            raise X2IError(
                f"{self._corpus.path}: cannot be read: {first}. `x2i verify` says what is damaged."
            ) from None

    def about(self) -> dict[str, Any]:
        """The corpus itself."""
        return {
            "corpus": str(self._corpus.path),
            "name": self._info["name"],
            "digest": self._corpus.digest,
            "recipe_digest": digest("recipe/1", self._recipe),
            "software": self._info["software"],
        }

    def hint(self, key: str) -> str:
        """What else a string that is no key may be."""
        for column, option in (("image_id", "--image"), ("row_id", "--row"), ("location", "--row")):
            there = f"starts_with({column}, {literal(key)})" if option == "--image" else f"{column} = {literal(key)}"
            if self.ask(f"select 1 as x from selection where {there} limit 1"):
                return f"; but it is a row's {column}: `x2i trace {self._corpus.path} {option} {shlex.quote(key)}`"
        return ""

    def near(self, location: str) -> str:
        """Locations like the one asked for."""
        close = f"jaro_winkler_similarity(location, {literal(location)})"
        rows = self.ask(f"select location from selection where {close} > 0.85 order by {close} desc limit 3")
        return f"; near: {', '.join(r['location'] for r in rows)}" if rows else ""

    def sample(self, row: dict[str, Any]) -> dict[str, Any]:
        """What a sample is, how it was made, where it lies."""
        shard = f"{self._corpus.path}/{row['shard']}"
        cut = f"tail -c +{row['offset'] + 1} {shlex.quote(shard)} | head -c {row['size']} | tar -xvf -"
        python = f"x2i.corpus.open({str(self._corpus.path)!r})[{row['key']!r}]"
        out_size = [row["output_size"]] if row["output_size"] else []
        sizes = [*row["input_sizes"], *out_size, *out_size]  # a mask is as large as the output
        pictures = [m for m in row["members"] if m["suffix"] != "json"]
        out: dict[str, Any] = {name: row[name] for name in ("key", "task_type", "shard", "offset", "size", "sha256")}
        out["images"] = [
            {"file": f"{row['key']}.{m['suffix']}", **size, "offset": m["offset"], "bytes": m["size"]}
            for m, size in zip(pictures, sizes, strict=False)
        ]
        out["extract"] = cut if isinstance(self._corpus.path, Path) else python
        try:
            sample = self._corpus[row["key"]]
        except (OSError, ValueError, KeyError) as error:  # a damaged shard hides the sample, not its lineage
            return out | {"problem": f"cannot be read ({type(error).__name__}: {error}); `x2i verify` says more"}
        told = {name: sample.provenance.get(name) for name in ("seed", "parameters", "untouched", "carried")}
        told["others"] = sample.provenance.get("others", [])  # further rows whose pictures are in it
        if sample.rejected_response is not None:
            told["rejected_response"] = sample.rejected_response
        return out | {"instruction": sample.instruction, "messages": list(sample.messages), **told}

    def rows(self, row_ids: list[str]) -> list[dict[str, Any]]:
        """Everything about these rows, in the order of the sources."""
        wanted = ", ".join(literal(r) for r in row_ids)
        return [self._row(r) for r in self.ask(f"select * from selection where row_id in ({wanted})")]

    def _row(self, row: dict[str, Any]) -> dict[str, Any]:
        row_id = literal(row["row_id"])
        image = literal(row["image_id"]) if row["image_id"] else "null"
        brief = "row_id, source, location, kept, stage, reason"
        survivor = row["survivor"] and self.ask(
            f"select {brief} from selection where row_id = {literal(row['survivor'])}"
        )
        return {
            **{name: row[name] for name in ("row_id", "source", "location", "unit", "index", "image_id", "text")},
            "meta": json.loads(row["meta"]),
            "inputs": row["inputs"],
            "origin": self._origin(row),
            "verdict": {
                **{name: row[name] for name in ("kept", "stage", "reason", "detail", "distance")},
                "survivor": survivor[0] if survivor else None,
            },
            "rules": self._rules(row),
            "annotations": self._annotations(row),
            "duplicates": self._fallen_to(row["row_id"]),
            "same_image": self.ask(
                f"select {brief} from selection where image_id = {image} and row_id <> {row_id} limit {MANY}"
            ),
            "samples": self.ask(f"select key, task_type, shard from samples where row_id = {row_id} limit {MANY}"),
            "in_samples_of_others": self.ask(
                f"select key, task_type, shard from samples where list_contains(images, {image}) "
                f"and row_id <> {row_id} and image_id is distinct from {image} limit {MANY}"
            ),
        }

    def _origin(self, row: dict[str, Any]) -> dict[str, Any]:
        """The source as the recipe has it; its file if it is still there, and whether that is still the same."""
        specs = zip(self._info["sources"], self._recipe["sources"], strict=True)
        source, spec = next((i, s) for i, s in specs if i["name"] == row["source"])
        path = str(spec.get("path") or "")
        name, _, inner = row["location"].partition("#")
        found = next((p for p in (Path(path, name), Path(path)) if path and p.is_file()), None)
        unchanged = None
        if found is not None and not inner and row["image_id"]:
            with found.open("rb") as file:
                unchanged = hashlib.file_digest(file, "sha256").hexdigest() == row["image_id"]
        return {
            "kind": source["kind"],
            "fingerprint": source["fingerprint"],
            "spec": spec,
            "file": str(found) if found else None,
            "unchanged": unchanged,
        }

    def _annotations(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """Each annotator's values of the row, what made them, and whether its `where` let the row in (None: unknown)."""
        out = []
        source = next(s["fingerprint"] for s in self._info["sources"] if s["name"] == row["source"])
        for annotator in self._info["annotators"]:
            where = annotator.get("where")
            column = Column(annotator["name"], annotator["fingerprint"], where, annotator.get("texts", False))
            file = self._lake.file(column, row["unit"], source)
            about = {name: annotator[name] for name in ("name", "version", "fingerprint", "parameters", "weights")}
            asked, because = self._condition(row["row_id"], where) if where else (True, {})
            out.append(
                {
                    **about,
                    "where": where,
                    "asked": asked,
                    "because": because,
                    "values": row[annotator["name"]],
                    "lake_file": str(file) if file.is_file() else None,
                }
            )
        return out

    def _rules(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """Every rule in its order; `holds` is None where the row did not come so far, or it cannot be told."""
        select, stage = self._recipe["select"], row["stage"]
        stages = ("source", "decode", "text", "where", "contaminated", "duplicate", "quota", "assembly", "forgotten")
        came = stages.index(stage) if stage in stages else len(stages)
        if row["reason"] == FORGOTTEN:  # what the rules saw is gone with the image
            came = -1

        def rule(at: str, name: str, condition: str, **more: Any) -> dict[str, Any]:
            holds = None if stages.index(at) > came else at != stage
            return {"stage": at, "rule": name, "condition": condition, "holds": holds, "values": {}} | more

        rules = [
            rule("source", "readable", "the source gives the image"),
            rule("decode", "decodable", "it can be decoded"),
        ]
        if select["require_text"]:
            rules.append(rule("text", "text", "the row has a text"))
        for name, condition in select["where"].items():
            holds, values = self._condition(row["row_id"], condition) if came >= stages.index("where") else (None, {})
            rules.append(rule("where", name, condition, holds=holds, values=values))
        best = (
            {e: self._value(row["row_id"], e) for e in select["dedup"]["best"]} if came > stages.index("where") else {}
        )  # what the rules that compare rows go by; a row that fell before has none

        def compared(holds: bool | None, annotator: str, column: str) -> dict[str, Any]:
            """Rows that have nothing to compare stay, unasked."""
            if row[annotator][column] is None:
                return {"holds": None, "values": {f"{annotator}.{column}": None}}
            return {"holds": holds, "values": best}

        dedup, reason, fell = select["dedup"], row["reason"], False

        def step(at: str, name: str, condition: str, gone: bool, *compares: str) -> None:
            """A rule of those that compare rows; `gone`: this one it broke. The later ones it did not meet."""
            nonlocal fell
            holds = not gone if best and not fell else None
            more = compared(holds, *compares) if compares else {"holds": holds, "values": best}
            rules.append(rule(at, name, condition, **more))
            fell = fell or gone

        if dedup["exact"]:
            step("duplicate", "exact", "no better row has the same bytes", reason == "duplicate_exact")
        for name, folder in ((select.get("decontaminate") or {}).get("benchmarks") or {}).items():
            gone = stage == "contaminated" and reason == name
            step("contaminated", name, f"it is not near to an image of {folder}", gone)
        if near := dedup["perceptual"]:
            condition = f"no better row that stays has a pHash within {near['bits']} of 64 bits"
            step("duplicate", "near", condition, reason == "duplicate_near", near.get("annotator", "phash"), "hash")
        if same := dedup.get("semantic"):
            condition = f"no better row that stays has a cosine of {same['similarity']} or more in {same['column']}"
            step("duplicate", "semantic", condition, reason == "duplicate_semantic")
        if text := dedup.get("text"):
            condition = f"no better row that stays has a caption that agrees in {text['similarity']:.0%} of its MinHash"
            step("duplicate", "text", condition, reason == "duplicate_text", text["annotator"], "key")
        for name, quota in select.get("quotas", {}).items():
            asked = [quota["by"]] if quota["by"] and came >= stages.index("quota") else []
            values = {by: self._value(row["row_id"], by) for by in asked}
            rules.append(rule("quota", name, quota_said(quota), values=values))
            if stage == "quota":
                rules[-1]["holds"] = None if any(r["holds"] is False for r in rules[:-1]) else reason != name
        left = rule("forgotten", "not_forgotten", "neither it nor all that its samples need was forgotten")
        if row["reason"] == FORGOTTEN:
            left["holds"] = False
        return [*rules, rule("assembly", "samples", "a task makes a sample of it"), left]

    def _condition(self, row_id: str, condition: str) -> tuple[bool | None, dict[str, Any]]:
        columns = columns_in(self._expressions, condition)
        values = {".".join(c): self._value(row_id, identifier(*c)) for c in columns}
        try:
            return bool(self._evaluate(row_id, condition)), values
        except duckdb.BinderException:  # it asks for something that the selection does not carry
            return None, values

    def _value(self, row_id: str, expression: str) -> Any:
        try:
            return self._evaluate(row_id, expression)
        except duckdb.BinderException:
            return None

    def _evaluate(self, row_id: str, expression: str) -> Any:
        picked = f"with picked as (select * from selection where row_id = {literal(row_id)})"
        names = [a["name"] for a in self._info["annotators"]]
        return self.ask(f"{picked} select ({expression}\n) as x from {scope(names, 'picked')}")[0]["x"]

    def _fallen_to(self, row_id: str) -> list[dict[str, Any]]:
        """Rows that fell to this one as duplicates, and those that had fallen to them."""
        out: list[dict[str, Any]] = []
        waiting = [row_id]
        while waiting and len(out) < MANY:
            them = ", ".join(literal(r) for r in waiting)
            columns = "row_id, source, location, image_id, reason, distance, survivor"
            fell = self.ask(f"select {columns} from selection where survivor in ({them}) limit {MANY}")
            out += fell
            waiting = [f["row_id"] for f in fell]
        return out
