"""`entities`: named entities and noun chunks of a text, by any spaCy pipeline.

spaCy (MIT; Honnibal et al. 2020, "spaCy: industrial-strength natural language processing in Python",
https://spacy.io). The default pipeline en_core_web_sm (MIT, 12.8 MB, https://spacy.io/models/en) does not lie
in the package registry, where a package of that name may be anybody's: fetch it with
`python -m spacy download en_core_web_sm`, or give a folder that `nlp.to_disk` wrote.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import Field

from x2i.base.errors import X2IError
from x2i.base.packages import need, version
from x2i.base.weights import Weights
from x2i.pipelines.annotators._columns import texts
from x2i.pipelines.annotators.base import Annotator, AnnotatorConfig, Item

log = logging.getLogger(__name__)

#: Size and licence of the pipelines that are mostly used.
KNOWN = {
    "en_core_web_sm": (12_800_000, "MIT"),
    "en_core_web_md": (33_500_000, "MIT"),
    "en_core_web_lg": (400_700_000, "MIT"),
    "en_core_web_trf": (457_400_000, "MIT"),
}
#: Components whose results are not stored.
_UNUSED = ("lemmatizer", "textcat", "textcat_multilabel", "entity_linker")
_PROBE = "A red car stands near the old house."

_ENTITY = pa.struct({"text": pa.string(), "label": pa.string(), "start": pa.int32(), "end": pa.int32()})
_CHUNK = pa.struct({"text": pa.string(), "start": pa.int32(), "end": pa.int32(), "root": pa.string()})


@dataclass(frozen=True)
class Pipeline(Weights):
    """A spaCy pipeline as weights: `spec` is a folder, or the name of an installed package, which is not imported."""

    def local(self) -> Path | None:
        """The folder with the pipeline's config.cfg, or None."""
        folder = Path(self.spec).expanduser()
        if not folder.is_dir():
            found = importlib.util.find_spec(self.spec) if self.spec.isidentifier() else None
            if found is None or not found.origin:
                return None
            folder = Path(found.origin).parent
        return _data(folder)

    def fetch(self) -> Path:
        path = self.local()
        if path is None:
            raise X2IError(f"spaCy pipeline {self.spec}: not installed, and no such folder. {self.remedy}")
        found = self._digest(path) if self.sha256 else None
        if found != self.sha256:
            raise X2IError(f"spaCy pipeline {self.spec}: {path} has SHA-256 {found}, expected {self.sha256}")
        return path

    @property
    def remedy(self) -> str:
        return (
            f"Run `python -m spacy download {self.spec}`, or give a folder in `pipeline:`. "
            "(A package of that name in the package registry is not spaCy's: do not install it.)"
        )

    def _names(self, folder: Path) -> list[str] | None:
        return None  # all files of the folder count


def _data(folder: Path) -> Path | None:
    """A package's folder holds the pipeline in a folder of its own, LANGUAGE_NAME-VERSION."""
    if (folder / "config.cfg").is_file():
        return folder
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        inner = folder / f"{meta['lang']}_{meta['name']}-{meta['version']}"
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return inner if (inner / "config.cfg").is_file() else None


class EntitiesConfig(AnnotatorConfig):
    """Which pipeline reads which text."""

    pipeline: str = Field(
        "en_core_web_sm", description="an installed pipeline by name, or a folder, e.g. ./my_pipeline"
    )
    sha256: str | None = Field(None, description="SHA-256 that the pipeline's folder must have, e.g. 21dd590f…")
    text: str = Field("rows.text", description="the column to read: rows.text, or another's, e.g. caption.long")
    max_chars: int = Field(10_000, gt=0, description="of longer texts, only so many characters are read, e.g. 5000")


class Entities(Annotator):
    """Columns only: no image is read. Offsets count Unicode characters of the text: text[start:end] is the span.

    Noun chunks need a part of speech and a dependency parse; a pipeline that gives none has none, and says so
    once in the log. Rows without a text have empty lists.
    """

    name = "entities"
    needs = "row"
    Config = EntitiesConfig
    columns = pa.schema(
        {
            "entities": pa.list_(_ENTITY),  # label: the pipeline's own, e.g. PERSON, GPE, WORK_OF_ART
            "noun_chunks": pa.list_(_CHUNK),  # root: the chunk's head word, e.g. "car" of "a red car"
        }
    )

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.config.text,)

    def weights(self) -> list[Weights]:
        size, licence = KNOWN.get(self.config.pipeline, (None, None))
        return [Pipeline(self.config.pipeline, self.config.sha256, size, licence)]

    def description(self) -> dict[str, Any]:
        return super().description() | {"spacy": ".".join(version("spacy").split(".")[:2])}

    def setup(self) -> None:
        spacy = need("spacy", "spacy", self.name)
        folder = self.weights()[0].fetch()
        try:
            self._nlp: Any = spacy.load(folder, exclude=_UNUSED)
        except (OSError, ValueError, ImportError, KeyError) as error:
            raise X2IError(f"spaCy pipeline {self.config.pipeline}: {folder} cannot be loaded: {error}") from error
        probe = self._nlp(_PROBE)
        if "noun_chunks" not in self._nlp.Defaults.syntax_iterators:
            log.warning("entities: spaCy has no rules for noun chunks in %s: noun_chunks is empty", self._nlp.lang)
        elif not (probe.has_annotation("DEP") and probe.has_annotation("POS")):
            log.warning("entities: the pipeline %s has no parser or tagger: noun_chunks is empty", self.config.pipeline)
        if not any(c.startswith("ner") or c in ("entity_ruler", "span_ruler") for c in self._nlp.pipe_names):
            log.warning("entities: the pipeline %s has no `ner`: entities is empty", self.config.pipeline)

    def __call__(self, batch: Sequence[Item]) -> pa.Table:
        said = [(t or "")[: self.config.max_chars] for t in texts(batch, self.config.text, self.name)]
        docs = self._nlp.pipe(said, batch_size=max(1, len(said)))
        rows = [{"entities": _entities(d), "noun_chunks": _noun_chunks(d)} for d in docs]
        return pa.Table.from_pylist(rows, schema=self.columns)


def _entities(doc: Any) -> list[dict[str, Any]]:
    return [{"text": e.text, "label": e.label_, "start": e.start_char, "end": e.end_char} for e in doc.ents]


def _noun_chunks(doc: Any) -> list[dict[str, Any]]:
    if not doc.has_annotation("DEP"):
        return []
    try:
        return [
            {"text": c.text, "start": c.start_char, "end": c.end_char, "root": c.root.text} for c in doc.noun_chunks
        ]
    except NotImplementedError:  # a language without rules for them
        return []
