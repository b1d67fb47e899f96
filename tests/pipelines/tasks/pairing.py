"""An album to find pairs in: people named in captions, a selection of its rows, a family and its groups."""

from __future__ import annotations

import hashlib
import json
import random
import re
from typing import Any

import duckdb
import pyarrow as pa

from x2i.base.config import parse_config
from x2i.pipelines.tasks.base import Group
from x2i.pipelines.tasks.subject_pairs import SubjectPairs

ENTITY = pa.struct({"text": pa.string(), "label": pa.string(), "start": pa.int32(), "end": pa.int32()})
KEPT = pa.schema(
    {
        "row_id": pa.string(), "source": pa.string(), "location": pa.string(), "image_id": pa.string(),
        "text": pa.string(), "meta": pa.string(), "entities": pa.struct({"entities": pa.list_(ENTITY)}),
        "phash": pa.struct({"hash": pa.uint64()}), "faces": pa.struct({"count": pa.int32()}),
    }
)  # fmt: skip
PEOPLE = ("Ada Lovelace", "Alan Turing", "Grace Hopper", "Jim")


def family(**changes: Any) -> SubjectPairs:
    return SubjectPairs(parse_config(SubjectPairs.Config, changes, "tasks.subject_pairs"))


def image_id(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def entities(text: str) -> list[dict[str, Any]]:
    """Where a text has `PEOPLE`, and the like."""
    found = re.finditer("|".join((*PEOPLE, "Lovelace", "Turing")), text)
    return [{"text": m[0], "label": "PERSON", "start": m.start(), "end": m.end()} for m in found]


def kept(rows: list[dict[str, Any]], seed: int = 0, **lake: dict[str, list[float]]) -> duckdb.DuckDBPyConnection:
    """A selection of rows, in any order: `name` (also the location), `text` and what else there is; embeddings by name."""
    table = []
    for i, given in enumerate(rows):
        text = given.get("text")
        table.append(
            {
                "row_id": given["name"],
                "source": "photos",
                "location": given["name"],
                "image_id": image_id(given.get("image", given["name"])),
                "text": text,
                "meta": json.dumps(given.get("meta", {})),
                "entities": {"entities": entities(text or "")},
                "phash": {"hash": given.get("hash", int(image_id(str(i))[:16], 16))},
                "faces": {"count": given.get("faces", 1)},
            }
        )
    random.Random(seed).shuffle(table)
    connection = duckdb.connect()
    connection.register("given", pa.Table.from_pylist(table, schema=KEPT))
    connection.execute("create table kept as from given; create schema lake")
    for name, values in lake.items():
        embedded = pa.table(
            {"row_id": list(values), "embedding": pa.array(list(values.values()), pa.list_(pa.float32()))}
        )
        connection.register("embedded", embedded)
        connection.execute(f"create table lake.{name} as from embedded")
    return connection


def groups(task: SubjectPairs, connection: duckdb.DuckDBPyConnection, seed: int = 0) -> dict[str, list[Group]]:
    """By task type, in order of the anchors."""
    out: dict[str, list[Group]] = {t: [] for t in task.task_types()}
    for group in task.groups(connection, seed):
        out[group.task_type].append(group)
    return out


WEARS = "in a red coat walks home"
ALBUM = [
    {"name": "ada1", "text": f"Ada Lovelace {WEARS}"},
    {"name": "ada2", "text": f"Dr. Ada Lovelace {WEARS}, and Lovelace smiles"},
    {"name": "ada3", "text": "A portrait of Ada Lovelace"},  # tells neither clothes nor action
    {"name": "alan1", "text": f"Alan Turing's dog {WEARS}"},
    {"name": "alan2", "text": f"Alan Turing {WEARS}"},
    {"name": "both1", "text": f"Alan Turing and Ada Lovelace, both {WEARS}"},
    {"name": "both2", "text": f"Ada Lovelace next to Alan Turing {WEARS}"},
    {"name": "jims", "text": f"Ada Lovelace and Jim {WEARS}"},  # nobody has a picture of Jim alone
    {"name": "grace", "text": f"Grace Hopper {WEARS}"},  # the only one
    {"name": "three", "text": f"Ada Lovelace, Alan Turing and Grace Hopper {WEARS}"},
    {"name": "none", "text": f"Somebody {WEARS}"},
]
