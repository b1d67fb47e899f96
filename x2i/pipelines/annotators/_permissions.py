"""What is said of mining and training: PLUS, TDMRep, C2PA, robots' directives."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from x2i.pipelines.annotators._xmp import Properties

PLUS = "http://ns.useplus.org/ldf/xmp/1.0/"
#: The reservation's namespace, with and without a last sign.
TDM = re.compile(r"https?://www\.w3\.org/ns/tdmrep[/#]?")
_DMI = re.compile(r"DMI-[A-Z]+(?:-[A-Z]+)*", re.IGNORECASE)
#: What C2PA's and CAWG's assertion tells apart; using a picture as a model's input is no training.
_USES = ("data_mining", "ai_training", "ai_generative_training")
#: Parts of X-Robots-Tag whose colon does not follow an agent's name.
_VALUED = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")

_YES = ("1", "true", "yes", "y", "on", "given", "granted")
_NO = ("0", "false", "no", "n", "off", "denied", "refused", "withheld", "revoked", "withdrawn")


@dataclass(frozen=True)
class Said:
    """That something allows training, or does not, and what says so."""

    allowed: bool
    why: str


def data_mining(
    xmp: Properties, meta: Mapping[str, Any], credentials: Sequence[tuple[str, Any]]
) -> tuple[str | None, list[Said]]:
    """The value for the column, and all that is said of mining.

    Whatever is prohibited in part, or on conditions that only a person can read, counts as not allowed.
    """
    out: list[Said] = []
    value: str | None = None
    given = [*xmp.get((PLUS, "DataMining"), []), meta.get("data_mining"), meta.get("plus_datamining")]
    for term in (m[0].upper() for g in given if isinstance(g, str) and (m := _DMI.search(g))):
        value = value or term
        if term == "DMI-ALLOWED":
            out.append(Said(True, term))
        elif term != "DMI-UNSPECIFIED":
            out.append(Said(False, f"data_mining: {term}"))
    reserved = [
        v for (namespace, name), vs in xmp.items() if name == "reservation" and TDM.fullmatch(namespace) for v in vs
    ]
    for said in (*reserved, meta.get("tdm_reservation")):
        held = truth(said)
        if held is not None:
            value = value or f"tdm-reservation: {int(held)}"
            out.append(Said(not held, "tdm-reservation"))
    for label, content in credentials:
        if ".training-mining" in label and isinstance(content, dict):
            out += _uses(content)
    return value, out


def _uses(content: Mapping[str, Any]) -> list[Said]:
    entries = content.get("entries")
    if isinstance(entries, dict):
        pairs = list(entries.items())
    else:  # the first versions had the entries beside each other
        pairs = [(k, v) for k, v in content.items() if isinstance(v, dict)]
    out = []
    for name, entry in pairs:
        use = entry.get("use") if isinstance(entry, dict) else None
        if isinstance(use, str) and str(name).rpartition(".")[2] in _USES:
            out.append(Said(use == "allowed", f"c2pa: {name} {use}"))
    return out


def robots(meta: Mapping[str, Any], directives: Sequence[str], agents: Sequence[str]) -> list[str]:
    """Those of `directives` that a row's `X-Robots-Tag` has, for everybody or for one of `agents`; each once."""
    out: list[str] = []
    ours, wanted = {a.lower() for a in agents} | {"*"}, {d.lower() for d in directives}
    for key in ("x_robots_tag", "robots", "robots_tag"):
        values = meta.get(key)
        for value in values if isinstance(values, list) else [values]:
            concerned = True  # an agent's name holds for what follows it in the same header
            for part in value.lower().split(",") if isinstance(value, str) else ():
                name, colon, rest = part.strip().partition(":")
                if colon and name.strip() not in _VALUED:
                    concerned, part = name.strip() in ours, rest
                if concerned and part.strip() in wanted:
                    out.append(part.strip())
    return list(dict.fromkeys(out))


def truth(value: Any) -> bool | None:
    """What a flag says, in whatever words; None if it says neither yes nor no."""
    if isinstance(value, bool):
        return value
    word = str(value).strip().lower() if isinstance(value, str | int | float) else ""
    word = word.removesuffix(".0")
    return True if word in _YES else False if word in _NO else None
