"""Texts and metadata as sources say them: decoded, picked, and reduced to what JSON can hold."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping
from typing import Any

from x2i.pipelines.sources.base import Problem

#: Where a text is looked for if the recipe does not say: the first of these that has one.
TEXT_KEYS = ("caption", "text", "prompt")


class Malformed(Exception):
    """A text or a record is not what it should be; `problem` is the row's."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.problem = Problem(reason, detail)


def describe(meta: dict[str, Any], key: str | None, txt: bytes | None, described: bytes | None) -> str | None:
    """A row's text: from `txt` as a whole, else out of the JSON object `described`, else out of `meta`.

    What the JSON object says is added to `meta`.

    Raises:
        Malformed: `bad_metadata` for the JSON, `bad_text` for a text that is none.
    """
    before = dict(meta)
    sidecar = parse_object(described) if described is not None else {}
    meta.update(sidecar)
    text = decode(txt) if txt is not None else None
    return text or pick(sidecar, key) or pick(before, key)


def decode(data: bytes) -> str | None:
    """UTF-8 (with or without a byte order mark), stripped; None if nothing is left. Raises Malformed."""
    try:
        return data.decode("utf-8-sig").strip() or None
    except UnicodeDecodeError as error:
        raise Malformed("bad_text", f"not UTF-8: {error.reason} at byte {error.start}") from None


def parse_object(data: bytes) -> dict[str, Any]:
    """A JSON object. Raises Malformed: it is not UTF-8, not JSON, or not an object."""
    out: dict[str, Any] = jsonable(_parsed(data, dict, "object"))
    return out


def parse_list(data: bytes) -> list[Any]:
    """A JSON list, its elements as they are. Raises Malformed: it is not UTF-8, not JSON, or not a list."""
    out: list[Any] = _parsed(data, list, "list")
    return out


def _parsed(data: bytes, kind: type, called: str) -> Any:
    try:
        value = json.loads(data.decode("utf-8-sig").rstrip())
    except ValueError as error:
        raise Malformed("bad_metadata", f"not JSON: {error}") from None
    except RecursionError:
        raise Malformed("bad_metadata", "JSON that is nested too deeply") from None
    if not isinstance(value, kind):
        raise Malformed("bad_metadata", f"expected a JSON {called}, found {type(value).__name__}")
    return value


def pick(record: Mapping[str, Any], key: str | None) -> str | None:
    """The text of a record: under `key`, or under the first of TEXT_KEYS that has one. Stripped; None if empty.

    Of a list of texts the first that is not empty counts (the others stay in the metadata).

    Raises:
        Malformed: what is there is not text.
    """
    for name in (key,) if key else TEXT_KEYS:
        value = record.get(name)
        for item in value if isinstance(value, list) else [value]:
            if item is None:
                continue
            if not isinstance(item, str):
                raise Malformed("bad_text", f"'{name}' holds {type(item).__name__}, not text")
            if item.strip():
                return item.strip()
    return None


def jsonable(value: Any) -> Any:
    """The same value in JSON types: dates as ISO text, NaN and infinity as null, bytes as their number.

    Strings that UTF-8 cannot hold (lone surrogates) get `?` in their place.
    """
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "replace").decode()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {jsonable(str(k)): jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [jsonable(v) for v in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    return jsonable(value.item()) if hasattr(value, "item") else jsonable(str(value))
