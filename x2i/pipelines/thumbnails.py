"""Small pictures of a corpus's source rows, for reports: of those that fell, too."""

from __future__ import annotations

import itertools
import json
import logging
from pathlib import Path
from typing import Any

from x2i.base.errors import X2IError
from x2i.pipelines.images import BadImage, decode, encode, read_header, resize
from x2i.pipelines.recipe import Recipe, make
from x2i.pipelines.sources.base import Unit

log = logging.getLogger(__name__)


def thumbnails(info: dict[str, Any], rows: list[dict[str, Any]], side: int) -> dict[str, bytes]:
    """Read rows from their sources again and shrink them.

    Args:
        info: the content of `corpus.json`.
        rows: of the selection; `row_id`, `source`, `unit` and `index` are used.
        side: the longer side of a thumbnail, in pixels.

    Returns:
        JPEG bytes by row_id, without the rows that give no picture or whose source is gone.
    """
    try:
        plan = make(Recipe.model_validate(info["recipe"]))
    except (X2IError, ValueError) as error:
        log.warning("no thumbnails of rows that fell: %s", error)
        return {}
    sources = {s.name: s for s in plan.sources}
    units = {}
    for source in plan.sources:
        path = Path(plan.recipe.lake) / "plans" / f"{source.name}-{source.fingerprint[:16]}.jsonl"
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                unit = json.loads(line)
                units[unit["unit"]] = Unit(unit["source"], unit["spec"], unit["rows"], unit["unit"])
    found: dict[str, bytes] = {}
    ordered = sorted(rows, key=lambda r: (r["unit"], r["index"]))
    for unit_id, members in itertools.groupby(ordered, key=lambda r: r["unit"]):
        if unit_id not in units:
            continue
        wanted = {r["index"]: r["row_id"] for r in members}
        for row in sources[units[unit_id].source].read(units[unit_id], wanted.keys()):
            if row.data is not None and row.problem is None:
                small = _shrink(row.data, side, plan.recipe.decode.max_pixels)
                if small is not None:
                    found[wanted[row.index]] = small
    return found


def _shrink(data: bytes, side: int, max_pixels: int) -> bytes | None:
    try:
        header = read_header(data, max_pixels)
        pixels = decode(data, header)
    except BadImage:
        return None
    scale = min(1.0, side / max(header.width, header.height))
    size = (max(1, round(header.width * scale)), max(1, round(header.height * scale)))
    return encode(resize(pixels, *size), "jpg", 82)
