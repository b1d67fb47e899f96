"""Names of licences: Creative Commons' in all their spellings as SPDX ids."""

from __future__ import annotations

import re

_URL = re.compile(r"creativecommons\.org/(?:licenses|publicdomain)/([a-z+-]+)(?:/(\d\.\d))?", re.IGNORECASE)
_SHORT = re.compile(r"\bcc[\s_-]*(by(?:[\s_-]*(?:nc|sa|nd))*|0|zero)(?![a-z])[\s_-]*(?:v?\s*(\d\.\d))?", re.IGNORECASE)
_BARE = re.compile(r"(by(?:-(?:nc|sa|nd))*|cc0|pdm)", re.IGNORECASE)
_LONG = re.compile(r"(?:creative commons|^)\W*attribution", re.IGNORECASE)
_VERSION = re.compile(r"\d\.\d")
_WORDS = {"noncommercial": "NC", "noderiv": "ND", "sharealike": "SA"}


def spdx(said: str, version: str | None = None) -> str | None:
    """The SPDX id of a licence's name or address, e.g. CC-BY-SA-4.0; without a version where none is known.

    Args:
        version: what is said of it elsewhere, as Openverse does (`license: by-sa`, `license_version: "2.0"`).
    """
    if found := mentioned(said):
        return found
    if bare := _BARE.fullmatch(said.strip()):
        return _id(bare[1], version)
    return None


def mentioned(text: str) -> str | None:
    """The Creative Commons licence that a text speaks of, as `© J. Doe, CC BY 4.0`."""
    if found := _URL.search(text):
        return _id(found[1], found[2])
    if found := _SHORT.search(text):
        return _id(found[1], found[2])
    if _LONG.search(text):
        plain = re.sub(r"[^a-z]", "", text.lower())
        parts = [short for word, short in _WORDS.items() if word in plain]
        version = _VERSION.search(text)
        return _id("-".join(["by", *(p for p in ("NC", "ND", "SA") if p in parts)]), version and version[0])
    return None


def _id(kind: str, version: str | None) -> str:
    kind = re.sub(r"[\s_-]+", "-", kind.strip().upper()).strip("-")
    if kind in ("0", "ZERO", "CC0"):
        return "CC0-1.0"
    if kind in ("MARK", "PDM"):
        return "CC-PDM-1.0"
    parts = re.findall("BY|NC|ND|SA", kind)
    tail = f"-{version}" if version else ""
    return f"CC-{'-'.join(parts)}{tail}" if parts else f"CC-{kind}{tail}"
