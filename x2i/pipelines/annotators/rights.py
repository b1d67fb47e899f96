"""`rights`: whose a picture is, under which licence, and whether it may be mined: from the file and from its source.

Read from the file: EXIF, XMP, IPTC-IIM, C2PA (see `_marks`). IPTC Photo Metadata Standard 2023.1 and 2025.1 (Data
Mining, after the PLUS vocabulary; Model Release Status; Digital Source Type; the system that generated it), TDMRep (W3C Community Group,
2024), C2PA 1.4 and 2.1 (`training-mining`, actions). Read from what the source says of the row (`meta`): licence,
people, `X-Robots-Tag` and flags of opting out, as img2dataset, Openverse, Flickr and Wikimedia Commons name them.
Nobody's signature is checked, and no address is asked. No weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
from pydantic import Field

from x2i.pipelines.annotators import _licences
from x2i.pipelines.annotators._c2pa import assertions
from x2i.pipelines.annotators._marks import blocks, exif_texts, iim_texts
from x2i.pipelines.annotators._permissions import PLUS, Said, data_mining, robots, truth
from x2i.pipelines.annotators._xmp import Properties, properties
from x2i.pipelines.annotators.base import Annotator, AnnotatorConfig, Item

DC = "http://purl.org/dc/elements/1.1/"
XMP_RIGHTS = "http://ns.adobe.com/xap/1.0/rights/"
IPTC_EXT = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
PHOTOSHOP = "http://ns.adobe.com/photoshop/1.0/"
CC = ("http://creativecommons.org/ns#", "http://web.resource.org/cc/")

#: EXIF's tags and IPTC's data sets.
EXIF_COPYRIGHT, EXIF_ARTIST, EXIF_AUTHOR = 0x8298, 0x013B, 0x9C9D
IIM_CREATOR, IIM_CREDIT, IIM_COPYRIGHT = (2, 80), (2, 110), (2, 116)

#: IPTC's digital source types of which a trained model made the picture, or a part of it.
GENERATED = ("trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia")

#: Longest text that a column holds, in characters.
LONGEST = 1000


class RightsConfig(AnnotatorConfig):
    """Which words of a source count."""

    robots: list[str] = Field(
        ["noai", "noimageai", "noindex", "noimageindex"],
        description="directives of X-Robots-Tag that are opting out (img2dataset's four), e.g. [noai, noimageai]",
    )
    agents: list[str] = Field(
        [], description="your crawler's names: directives for other agents do not count, e.g. [mybot]"
    )
    licence_keys: list[str] = Field(
        ["license", "licence", "license_name", "licence_name", "license_id", "license_url", "licence_url", "rights"],
        description="keys of a row's metadata that name its licence, e.g. [cc_license]; one with a version goes before others",
    )
    opt_out_keys: list[str] = Field(
        ["opt_out", "opted_out", "noai", "noimageai", "do_not_train"],
        description="keys of a row's metadata that are true where its owner has opted out, e.g. [spawning_opt_out]",
    )
    consent_keys: list[str] = Field(
        ["consent", "ai_consent", "training_consent"],
        description="keys of a row's metadata that are false where its owner, or who is in it, has not consented, e.g. [release]",
    )


class Rights(Annotator):
    """What file and source say; null where nothing is said, so that `not coalesce(rights.opt_out, false)` is a filter.

    `opt_out` is true where anything forbids training or mining, or puts conditions on it; false where something
    allows it and nothing forbids it. The file's own licence goes before the source's.
    """

    name = "rights"
    needs = "header"
    Config = RightsConfig
    columns = pa.schema(
        {
            "licence": pa.string(),  # an SPDX id where it is known to be one, e.g. CC-BY-4.0; else as written
            "licence_from": pa.string(),  # xmp, exif, iptc, meta
            "copyright": pa.string(),
            "creator": pa.string(),  # of several, with `; ` between them
            "credit": pa.string(),
            "terms": pa.string(),  # in the owner's words
            "terms_url": pa.string(),
            "data_mining": pa.string(),  # PLUS, e.g. DMI-PROHIBITED; else `tdm-reservation: 1` or 0
            "source_type": pa.string(),  # IPTC's digital source type, e.g. digitalCapture
            "ai_generated": pa.bool_(),  # a trained model made it, or a part of it
            "c2pa": pa.bool_(),  # the file has content credentials
            "noai": pa.bool_(),  # a directive of `robots` is there
            "consent": pa.bool_(),  # what the source's metadata say of it
            "model_release": pa.string(),  # PLUS: MR-NON none, MR-NAP no people, MR-UMR unlimited, MR-LMR limited
            "opt_out": pa.bool_(),
            "opt_out_reason": pa.string(),  # all of them, with `; ` between them
        }
    )

    @property
    def reads(self) -> tuple[str, ...]:
        return ("rows.meta",)

    def __call__(self, batch: Sequence[Item]) -> pa.Table:
        return pa.Table.from_pylist([self._look_at(item) for item in batch], schema=self.columns)

    def _look_at(self, item: Item) -> dict[str, Any]:
        found = blocks(item.data)
        xmp, exif, iim = properties(found.xmp), exif_texts(found.exif), iim_texts(found.iim)
        credentials = list(assertions(found.c2pa))
        meta = told(item.meta)
        directives = robots(meta, self.config.robots, self.config.agents)
        mining, permissions = data_mining(xmp, meta, credentials)
        permissions += [Said(False, f"robots: {d}") for d in directives]
        permissions += [Said(False, f"meta: {k}") for k in self.config.opt_out_keys if truth(meta.get(_key(k))) is True]
        given = {k: said for k in self.config.consent_keys if (said := truth(meta.get(_key(k)))) is not None}
        permissions += [Said(said, f"meta: no {k}") for k, said in given.items()]
        types = _source_types(xmp, credentials)
        model = bool(xmp.get((IPTC_EXT, "AISystemUsed"))) or any(t in GENERATED for t in types)
        licence, licence_from = self._licence(xmp, exif, iim, meta)
        cc = [v for namespace in CC for v in xmp.get((namespace, "license"), [])]
        forbidden = list(dict.fromkeys(p.why for p in permissions if not p.allowed))
        row = {
            "licence": licence,
            "licence_from": licence_from,
            "copyright": _first(
                xmp.get((DC, "rights")),
                iim.get(IIM_COPYRIGHT),
                exif.get(EXIF_COPYRIGHT),
                found.texts.get("Copyright"),
                meta.get("copyright"),
                meta.get("image_copyright"),
            ),
            "creator": _first(
                ["; ".join(xmp.get((DC, "creator"), []))],
                ["; ".join(iim.get(IIM_CREATOR, []))],
                exif.get(EXIF_ARTIST),
                exif.get(EXIF_AUTHOR),
                found.texts.get("Author"),
                *(meta.get(k) for k in _PEOPLE),
            ),
            "credit": _first(
                xmp.get((PHOTOSHOP, "Credit")), iim.get(IIM_CREDIT), meta.get("credit"), meta.get("attribution")
            ),
            "terms": _first(xmp.get((XMP_RIGHTS, "UsageTerms")), meta.get("usage_terms")),
            "terms_url": _first(
                xmp.get((XMP_RIGHTS, "WebStatement")), cc, meta.get("license_url"), meta.get("licence_url")
            ),
            "data_mining": mining,
            "source_type": types[0] if types else None,
            "ai_generated": True if model else False if types else None,
            "c2pa": bool(found.c2pa),
            "noai": bool(directives) if _has_robots(meta) or directives else None,
            "consent": all(given.values()) if given else None,
            "model_release": _first(_term(xmp.get((PLUS, "ModelReleaseStatus"), []))),
            "opt_out": bool(forbidden) if permissions else None,
            "opt_out_reason": "; ".join(forbidden) or None,
        }
        return {k: brief(v) if isinstance(v, str) else v for k, v in row.items()}

    def _licence(
        self, xmp: Properties, exif: dict[int, str], iim: dict[tuple[int, int], list[str]], meta: Mapping[str, Any]
    ) -> tuple[str | None, str | None]:
        """The licence and where it stands."""
        for namespace in CC:
            for said in xmp.get((namespace, "license"), []):
                return _licences.spdx(said) or said, "xmp"
        names = ((XMP_RIGHTS, "WebStatement"), (XMP_RIGHTS, "UsageTerms"), (DC, "rights"))
        places = [("xmp", text) for name in names for text in xmp.get(name, [])]
        places += [("iptc", t) for t in iim.get(IIM_COPYRIGHT, [])] + [("exif", exif.get(EXIF_COPYRIGHT, ""))]
        for place, said in places:
            if licence := _licences.mentioned(said):
                return licence, place
        told_names = [name for key in self.config.licence_keys if (name := _first(meta.get(_key(key))))]
        ids = [i for name in told_names if (i := _licences.spdx(name, _first(meta.get("license_version"))))]
        best = (
            sorted(ids, key=lambda i: not i[-1].isdigit()) or told_names
        )  # an address tells the version, a name may not
        return (best[0], "meta") if best else (None, None)


_PEOPLE = ("creator", "author", "photographer", "artist", "image_artist")


def told(meta: str) -> dict[str, Any]:
    """A row's metadata by keys in lower case with `_` for other signs; those of headers and of EXIF beside them."""
    out: dict[str, Any] = {}
    try:
        said = json.loads(meta)
    except (ValueError, RecursionError):
        return out
    if not isinstance(said, dict):
        return out
    for name in ("exif", "headers", "http_headers", "response_headers"):
        inner = said.get(name)
        if isinstance(inner, str) and len(inner) < 2**20:  # img2dataset writes EXIF as JSON in JSON
            try:
                inner = json.loads(inner)
            except (ValueError, RecursionError):
                continue
        if isinstance(inner, dict):
            out |= {_key(k): v for k, v in inner.items()}
    return out | {_key(k): v for k, v in said.items()}


def brief(text: str) -> str | None:
    """A text on one line, no longer than a column holds; None if nothing is left of it."""
    plain = "".join(c if c.isprintable() else " " for c in text[: 4 * LONGEST])
    return " ".join(plain.split())[:LONGEST] or None


def _key(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in str(name).lower())


def _first(*said: Any) -> str | None:
    """The first text of these, each of which is a text, a list of texts, or nothing."""
    for value in said:
        values = value if isinstance(value, list) else [value]
        for text in values:
            if isinstance(text, dict):
                text = text.get("name") or text.get("id") or text.get("url")
            if isinstance(text, int | float) and not isinstance(text, bool):
                text = str(text)
            if isinstance(text, str) and (plain := brief(text)):
                return plain
    return None


def _term(values: list[str]) -> list[str]:
    """The last part of an address in a vocabulary."""
    return [v.rstrip("/").rpartition("/")[2] for v in values]


def _has_robots(meta: Mapping[str, Any]) -> bool:
    return any(meta.get(k) is not None for k in ("x_robots_tag", "robots", "robots_tag"))


def _source_types(xmp: Properties, credentials: list[tuple[str, Any]]) -> list[str]:
    """IPTC's digital source types of the picture and of what was done to it; the picture's own first."""
    said: list[Any] = list(xmp.get((IPTC_EXT, "DigitalSourceType"), []))
    for label, content in credentials:
        if label.startswith("c2pa.actions") and isinstance(content, dict):
            actions = content.get("actions")
            said += (
                [a.get("digitalSourceType") for a in actions or [] if isinstance(a, dict)]
                if isinstance(actions, list)
                else []
            )
        elif isinstance(content, dict):
            said.append(content.get("Iptc4xmpExt:DigitalSourceType"))
    return list(dict.fromkeys(t for t in _term([s for s in said if isinstance(s, str)]) if t))
