"""MagicBrush as published: Parquet files (`osunlp/MagicBrush`: train, dev), or the unzipped folder of the test split.

    img_id, turn_index, source_img, mask_img, instruction, target_img

    edit_turns.json    [{"input": "242679-input.png", "mask": "242679-mask1.png", "output": "242679-output1.png",
                         "instruction": ...}, ...]
    global_descriptions.json, local_descriptions.json    {"242679": {"242679-input.png": ..., ...}, ...}
    images/242679/242679-input.png, ...

Each turn is a row of its own: from turn 2 on, its source is the picture that the turn before left. A mask is published
as the source picture made transparent where the edit took place (soft at the rim; white shows there when the
transparency is ignored). Here it becomes what masks are everywhere else: grey values, white where the edit took place.
"""

from __future__ import annotations

import io
import json
from typing import Any, Literal

from pydantic import Field

from x2i.pipelines.sources._cells import Record
from x2i.pipelines.sources._files import Root
from x2i.pipelines.sources._pairs import EDIT, Draft, Get, TableConfig, edit
from x2i.pipelines.sources._pairs_lists import PairTableOrList
from x2i.pipelines.sources._text import Malformed, parse_list
from x2i.pipelines.sources.base import Problem, Row

DESCRIPTIONS = ("global_descriptions", "local_descriptions")


class MagicBrushConfig(TableConfig):
    """MagicBrush's Parquet files, or the folder that holds `edit_turns.json`."""

    kind: Literal["magicbrush"] = "magicbrush"
    path: str | list[str] = Field(
        description="the Parquet files (data/train-*.parquet), a folder of them, or the unzipped test folder with edit_turns.json"
    )


class MagicBrush(PairTableOrList):
    """Turns with masks. `meta` has `session` (the image's id) and `turn` (from 1)."""

    kind = "magicbrush"
    Config = MagicBrushConfig
    source, output, masks = "source_img", "target_img", "mask_img"
    list_file = "edit_turns.json"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._descriptions: dict[str, dict[str, dict[str, Any]]] = {}

    def describe(self, record: Record) -> tuple[Any, str]:
        """See `PairTable.describe`."""
        return EDIT, edit(record.get("instruction"))

    def about(self, record: Record) -> dict[str, Any]:
        """See `PairTable.about`."""
        return {"session": record.get("img_id"), "turn": record.get("turn_index")}

    def mask(self, data: bytes, source: bytes | None) -> bytes:
        """See `PairTable.mask`."""
        return region(data, source)

    def entries(self, name: str, data: bytes) -> list[Any]:
        """See `PairLists.entries`."""
        return parse_list(data)

    def draft(self, root: Root, name: str, number: int, entry: Any) -> Draft:
        """See `PairLists.draft`."""
        draft = _Turn(f"{name}#{number}")
        if not isinstance(entry, dict):
            draft.problem = Problem("bad_metadata", "expected an object")
            return draft
        draft.meta = dict(entry)
        given = {k: v for k in ("input", "mask", "output") if isinstance(v := entry.get(k), str) and v}
        session = next(iter(given.values()), "").partition("-")[0]
        turn = "".join(c for c in given.get("output", "").rpartition("-")[2] if c.isdigit())
        draft.meta |= {"session": session, "turn": int(turn) if turn else None}
        for kind in DESCRIPTIONS:
            said = self._described(root, kind).get(session, {})
            draft.meta[kind] = {k: said.get(given[k]) for k in ("input", "output") if k in given}
        paths = {k: f"images/{session}/{v}" for k, v in given.items()}
        draft.inputs = [paths["input"]] if "input" in paths else []
        draft.output, draft.mask = paths.get("output"), paths.get("mask")
        try:
            draft.text = edit(entry.get("instruction"))
        except Malformed as error:
            draft.problem = error.problem
        if "input" not in paths:
            draft.problem = Problem("missing_image", "no 'input'")
        return draft

    def _described(self, root: Root, kind: str) -> dict[str, dict[str, Any]]:
        """Descriptions by session and file name; none if the file is not there or is not what it should be."""
        if kind not in self._descriptions:
            try:
                said = json.loads(root.read(f"{kind}.json"))
            except (OSError, ValueError):
                said = None
            by_session = said.items() if isinstance(said, dict) else ()
            self._descriptions[kind] = {k: v for k, v in by_session if isinstance(v, dict)}
        return self._descriptions[kind]


class _Turn(Draft):
    """A turn of the test split: its mask is published as the others are."""

    def row(self, index: int, get: Get) -> Row:
        row = super().row(index, get)
        if row.mask is not None and row.problem is None:
            try:
                row.mask = region(row.mask, row.inputs[0][1])
            except Malformed as error:
                row.mask, row.problem = None, error.problem
        return row


def region(mask: bytes, source: bytes | None) -> bytes:
    """A published mask as a PNG of uint8 [height, width], white where the edit took place.

    Without an alpha channel (a copy that has lost it) the region is what is white, and was not so in the source.

    Raises:
        Malformed: `bad_mask`: it cannot be decoded, or shows no region by alpha nor by white.
    """
    import numpy as np
    from PIL import Image

    try:
        picture = Image.open(io.BytesIO(mask))
        if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
            changed = 255 - np.asarray(picture.convert("RGBA"))[..., 3]
        else:
            changed = _white(picture)
            if source is not None:
                before = Image.open(io.BytesIO(source))
                if before.size == picture.size:
                    changed = changed & ~_white(before)
    except Exception as error:  # noqa: BLE001 - decoders of untrusted bytes raise anything
        raise Malformed("bad_mask", f"mask_img: {type(error).__name__}: {error}") from None
    if not changed.any():
        raise Malformed("bad_mask", "mask_img: nothing in it is transparent or white")
    out = io.BytesIO()
    Image.fromarray(changed, "L").save(out, "PNG")
    return out.getvalue()


def _white(picture: Any) -> Any:
    import numpy as np

    return np.where((np.asarray(picture.convert("RGB")) >= 250).all(axis=-1), 255, 0).astype(np.uint8)
