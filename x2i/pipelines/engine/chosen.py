"""Selected rows as tasks meet them: their pictures read and checked, their values, the other rows of their groups."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from x2i.base.errors import X2IError
from x2i.corpus.lake import Lake
from x2i.corpus.sample import Picture
from x2i.pipelines.images import BadImage, Header, decode, encode, fit, read_header, resize
from x2i.pipelines.recipe import Plan
from x2i.pipelines.sources.base import Row, Unit
from x2i.pipelines.tasks.base import Found, Selected

#: The column of a row's groups, under a name that no annotator can have.
GROUPED = "x2i groups"


def read_rows(
    plan: Plan, units: dict[str, Unit], rows: Sequence[dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], Row]]:
    """Rows of the selection with what their sources hold of them; rows of one unit must be neighbours."""
    sources = {s.name: s for s in plan.sources}
    for unit, members in itertools.groupby(rows, key=lambda r: r["unit"]):
        wanted = {r["index"]: r for r in members}
        for got in sources[units[unit].source].read(units[unit], wanted.keys()):
            yield wanted[got.index], got


class Heavy:
    """Values that stay in the lake, of the columns that the tasks read: a unit at a time."""

    def __init__(self, plan: Plan, units: dict[str, Unit]) -> None:
        self._units = units
        self._lake = Lake(plan.recipe.lake)
        self._sources = {s.name: s.fingerprint for s in plan.sources}
        self._columns = {name: (plan.column(a), columns) for name, (a, columns) in plan.heavy_reads().items()}
        self._unit = ""
        self._tables: dict[str, pa.Table] = {}

    def values(self, row: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """By annotator, the heavy values of a row that the annotator saw.

        Raises:
            X2IError: the lake lacks them.
        """
        out: dict[str, dict[str, Any]] = {}
        for name, (_, columns) in self._columns.items():
            if all(v is None for v in (row[name] or {}).values()):
                continue  # its `where` did not let the row in, whatever another recipe has put in the lake
            table = self._table(row["unit"], name)
            place = pc.index(table["row_id"], pa.scalar(row["row_id"])).as_py()
            if place < 0:
                raise X2IError(f"{name}: the lake lacks the values of {row['location']}: build again")
            out[name] = {c: table[c][place].as_py() for c in columns}
        return out

    def _table(self, unit: str, name: str) -> pa.Table:
        if unit != self._unit:
            self._unit, self._tables = unit, {}
        if name not in self._tables:
            column, columns = self._columns[name]
            path = self._lake.file(column, unit, self._sources[self._units[unit].source])
            try:
                self._tables[name] = pq.read_table(path, columns=["row_id", *columns])
            except (OSError, pa.ArrowInvalid) as error:
                raise X2IError(f"{path}: cannot be read ({error}). Remove it, and build again.") from None
        return self._tables[name]


class Others:
    """The other rows of the groups whose anchors are among some rows: read once, kept on disk, decoded when asked for.

    Args:
        rows: anchors, with their groups as `x2i.pipelines.engine.groups` gives them.
        folder: where the pictures are kept meanwhile.
    """

    def __init__(
        self, plan: Plan, units: dict[str, Unit], heavy: Heavy, rows: Sequence[dict[str, Any]], folder: Path
    ) -> None:
        self._plan, self._heavy = plan, heavy
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by __exit__
        self._rows: dict[str, dict[str, Any]] = {}
        for row in rows:
            for group in row.get(GROUPED) or ():
                self._rows |= {o["row_id"]: o for o in group["others"]}
        self._places: dict[str, tuple[Row, int, list[int]]] = {}
        wanted = sorted(self._rows.values(), key=lambda r: (r["unit"], r["index"]))
        for row, got in read_rows(plan, units, wanted):
            at = self._file.tell()
            # its bytes are put aside: what stays in memory of a row is small
            sizes = [self._file.write(data) for data in (got.data or b"", *(data for _, data in got.inputs))]
            got.data, got.inputs = None, [(name, b"") for name, _ in got.inputs]
            self._places[row["row_id"]] = (got, at, sizes)

    def __enter__(self) -> Others:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def of(self, row: dict[str, Any], task: str) -> tuple[Found, ...]:
        """The groups of a task that a row is the anchor of."""
        out = []
        for group in row.get(GROUPED) or ():
            if group["task"] != task:
                continue
            try:
                others = tuple(self._selected(o["row_id"]) for o in group["others"])
            except BadImage as bad:
                out.append(Found(group["task_type"], (), json.loads(group["about"]), bad.reason))
            else:
                out.append(Found(group["task_type"], others, json.loads(group["about"])))
        return tuple(out)

    def _selected(self, row_id: str) -> Selected:
        if row_id not in self._places:
            raise BadImage("missing_image", "the source no longer has the row")
        got, at, sizes = self._places[row_id]
        self._file.seek(at)
        data, *inputs = [self._file.read(size) for size in sizes]
        named = [(name, one) for (name, _), one in zip(got.inputs, inputs, strict=True)]
        return selected_row(self._plan, self._rows[row_id], replace(got, data=data or None, inputs=named), self._heavy)


def selected_row(plan: Plan, row: dict[str, Any], got: Row, heavy: Heavy) -> Selected:
    """A row of the selection with its picture as it will be stored.

    Raises:
        BadImage: the source cannot give the picture, or gives another one now.
    """
    if got.problem is not None or got.data is None:
        reason, detail = (got.problem.reason, got.problem.detail) if got.problem else ("missing_image", "no bytes")
        raise BadImage(reason, detail)
    found = hashlib.sha256(got.data).hexdigest()
    if found != row["image_id"]:
        raise BadImage("source_changed", f"annotated as {row['image_id'][:16]}, now {found[:16]}: build again")
    known = {f.name: row["image"][f.name] for f in fields(Header)}  # the same bytes have the same header
    picture, pixels = _picture(plan, got.data, Header(**known))
    kept = heavy.values(row)
    most = plan.recipe.decode.max_pixels
    selected = Selected(
        row_id=row["row_id"],
        image_id=row["image_id"],
        source=row["source"],
        location=row["location"],
        text=row["text"],
        meta=json.loads(row["meta"]),
        values={a.name: (row[a.name] or {}) | kept.get(a.name, {}) for a in plan.annotators},
        picture=picture,
        inputs=tuple(_picture(plan, data, read_header(data, most))[0] for _, data in got.inputs),
        input_ids=tuple(hashlib.sha256(data).hexdigest() for _, data in got.inputs),
        mask=_mask(got.mask, picture, most) if got.mask else None,
        seed=plan.recipe.seed,
        untouched=pixels is not None,
        carried={column: _carried(row, column) for column in plan.recipe.output.carry},
    )
    if pixels is not None:
        selected.__dict__["pixels"] = pixels  # fills the cached property: no second decode
    return selected


def _carried(row: dict[str, Any], column: str) -> Any:
    """A value as a sample's provenance has it: JSON knows no infinity, nor what is no number."""
    name, _, part = column.partition(".")
    value = (row[name] or {}).get(part)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _picture(plan: Plan, data: bytes, header: Header) -> tuple[Picture, np.ndarray | None]:
    """The picture as it is stored: the file's own bytes, and its pixels, if nothing has to change; else encoded anew."""
    output = plan.recipe.output
    width, height = fit(header.width, header.height, output.shorter_side, output.max_pixels)
    pixels = decode(data, header)  # a file that is passed on must be whole, too
    if header.plain and (width, height) == (header.width, header.height):
        return Picture(data, header.extension, width, height), pixels
    small = resize(pixels, width, height)
    return Picture(encode(small, "jpg", output.jpeg_quality, output.jpeg_subsampling), "jpg", width, height), None


def _mask(data: bytes, picture: Picture, max_pixels: int) -> Picture:
    """A source's mask as it is stored: black and white, as large as the output picture."""
    import cv2

    grey = cv2.cvtColor(decode(data, read_header(data, max_pixels)), cv2.COLOR_RGB2GRAY)
    if grey.shape != (picture.height, picture.width):
        grey = cv2.resize(grey, (picture.width, picture.height), interpolation=cv2.INTER_AREA)
    white = np.where(grey >= 128, 255, 0).astype(np.uint8)
    return Picture(encode(white, "png"), "png", picture.width, picture.height)
