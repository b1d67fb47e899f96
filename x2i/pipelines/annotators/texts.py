"""`texts`: what a caption is as a text: language, length, boilerplate, and keys for finding its duplicates.

Language: py3langid (BSD-3-Clause; Lui and Baldwin 2012, "langid.py: an off-the-shelf language
identification tool"), whose model comes with the package. MinHash: Broder 1997, "On the resemblance and
containment of documents".
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field

from x2i.base.errors import X2IError
from x2i.pipelines.annotators._boilerplate import alphabetic, boilerplate, words
from x2i.pipelines.annotators._need import need
from x2i.pipelines.annotators._texts import PERMUTATIONS, SEED, key, minhash, normalise, shingles, texts
from x2i.pipelines.annotators.base import Annotator, AnnotatorConfig, Item

#: Languages are told from this many characters at the start.
_READ = 2000


class TextsConfig(AnnotatorConfig):
    """Which text, and how it is compared."""

    text: str = Field("rows.text", description="the column to look at: rows.text, or e.g. caption.long")
    languages: list[str] | None = Field(
        None, min_length=1, description="ISO 639-1 codes to choose from, e.g. [en, de, zh]; null: all 140 of py3langid"
    )
    least_score: float = Field(
        0.2, ge=0, le=1, description="a language less probable than this is `und` (undetermined), as of single words"
    )
    shingle: Literal["characters", "words"] = Field("characters", description="what a MinHash shingle is a run of")
    shingle_size: int = Field(
        5, gt=0, le=50, description="characters or words in a shingle, e.g. 5 characters, 3 words"
    )


class Texts(Annotator):
    """Columns only: no image is read.

    `key` and `minhash` are of the normalised text (NFKC, case folded, no punctuation), null where nothing is
    left of it. The share of places in which two signatures agree estimates the Jaccard similarity of the
    texts' shingles (see `x2i.pipelines.select.near_text`).
    """

    name = "texts"
    needs = "row"
    Config = TextsConfig
    columns = pa.schema(
        {
            "language": pa.string(),  # ISO 639-1; `zxx` no language, `und` undetermined; null without a text
            "language_score": pa.float32(),  # its probability, 0 to 1
            "chars": pa.int32(),
            "words": pa.int32(),
            "alphabetic": pa.float32(),  # share of letters among the characters that are not spaces
            "boilerplate": pa.bool_(),
            "boilerplate_reason": pa.string(),
            "key": pa.uint64(),  # equal for texts that read the same
            "minhash": pa.list_(pa.uint32(), PERMUTATIONS),
        }
    )
    heavy = frozenset({"minhash"})

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.config.text,)

    def description(self) -> dict[str, Any]:
        try:
            version = importlib.metadata.version("py3langid")
        except importlib.metadata.PackageNotFoundError:
            version = "missing"  # setup will say so
        return super().description() | {"py3langid": version, "minhash_seed": SEED}

    def setup(self) -> None:
        langid = need("py3langid.langid", "py3langid", "texts")
        self._languages: Any = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
        if self.config.languages:
            unknown = sorted(set(self.config.languages) - set(self._languages.labels))
            if unknown:
                raise X2IError(
                    f"annotator text: languages: py3langid does not know {', '.join(unknown)}; "
                    f"it knows {', '.join(sorted(self._languages.labels))}"
                )
            self._languages.set_languages(self.config.languages)

    def __call__(self, batch: Sequence[Item]) -> pa.Table:
        rows = [self._look_at(t) for t in texts(batch, self.config.text)]
        return pa.Table.from_pylist(rows, schema=self.columns)

    def _look_at(self, text: str | None) -> dict[str, Any]:
        said = (text or "").strip()
        reason = boilerplate(said)
        row: dict[str, Any] = {
            "chars": len(said),
            "words": len(words(said)),
            "alphabetic": alphabetic(said),
            "boilerplate": reason is not None,
            "boilerplate_reason": reason,
        }
        if said:
            language, score = self._languages.classify(said[:_READ])
            row["language"] = language if score >= self.config.least_score else "und"
            row["language_score"] = score
        plain = normalise(said)
        if plain:
            row["key"] = key(plain)
            row["minhash"] = minhash(shingles(plain, self.config.shingle_size, self.config.shingle == "words"))
        return row
