"""`texts`: what a caption is as a text: language, length, boilerplate, and keys for finding its duplicates.

Language: py3langid (BSD-3-Clause; Lui and Baldwin 2012, "langid.py: an off-the-shelf language identification tool"),
whose model comes with the package. MinHash: Broder 1997, "On the resemblance and containment of documents". No other
weights, no model hub.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field

from x2i.base.errors import X2IError
from x2i.base.packages import version
from x2i.pipelines.annotators._boilerplate import alphabetic, boilerplate, words
from x2i.pipelines.annotators._columns import texts
from x2i.pipelines.annotators._languages import identifier
from x2i.pipelines.annotators._texts import PERMUTATIONS, SEED, key, minhash, normalise, shingles
from x2i.pipelines.annotators.base import Annotator, AnnotatorConfig, Item

#: Languages are told from this many characters at the start.
_READ = 2000


class TextsConfig(AnnotatorConfig):
    """Which text, and how it is compared."""

    text: str = Field("rows.text", description="the column to read: rows.text, or another's, e.g. caption.long")
    languages: list[str] | None = Field(
        None, min_length=1, description="ISO 639-1 codes to choose from, e.g. [en, de, zh]; null: all 140 of py3langid"
    )
    least_score: float = Field(
        0.2,
        ge=0,
        le=1,
        description="a language less probable than this is `und` (undetermined), as of single words, e.g. 0.2",
    )
    shingle: Literal["characters", "words"] = Field(
        "characters", description="what a MinHash shingle is a run of, e.g. words"
    )
    shingle_size: int = Field(
        5, gt=0, le=50, description="characters or words in a shingle, e.g. 5 characters, 3 words"
    )


class Texts(Annotator):
    """Columns only: no image is read.

    A row without a text (null) has null everywhere, so that `texts.boilerplate is not true` keeps it; a text of nothing
    but spaces or punctuation is boilerplate, for the reason `empty`. `key` and `minhash` are of the normalised text (NFKC, case folded, no punctuation), null where nothing is
    left of it. The share of places in which two signatures agree estimates the Jaccard similarity of the
    texts' shingles (see `x2i.pipelines.select.near_text`).
    """

    name = "texts"
    version = 2
    needs = "row"
    Config = TextsConfig
    columns = pa.schema(
        {
            "language": pa.string(),  # ISO 639-1; `zxx` no language, `und` undetermined; null of an empty text
            "language_score": pa.float32(),  # its probability, 0 to 1
            "chars": pa.int32(),
            "words": pa.int32(),
            "alphabetic": pa.float32(),  # share of letters among the characters that are not spaces
            "boilerplate": pa.bool_(),
            "boilerplate_reason": pa.string(),  # the rule's name, e.g. file_name; null where it is none
            "key": pa.uint64(),  # equal for texts that read the same
            "minhash": pa.list_(pa.uint32(), PERMUTATIONS),
        }
    )
    heavy = frozenset({"minhash"})

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.config.text,)

    def description(self) -> dict[str, Any]:
        return super().description() | {"py3langid": version("py3langid"), "minhash_seed": SEED}

    def setup(self) -> None:
        self._languages = identifier(self.name)
        if self.config.languages:
            unknown = sorted(set(self.config.languages) - set(self._languages.labels))
            if unknown:
                raise X2IError(
                    f"annotator texts: languages: py3langid does not know {', '.join(unknown)}; "
                    f"it knows {', '.join(sorted(self._languages.labels))}"
                )
            self._languages.set_languages(self.config.languages)

    def __call__(self, batch: Sequence[Item]) -> pa.Table:
        rows = [{} if t is None else self._look_at(t.strip()) for t in texts(batch, self.config.text, self.name)]
        return pa.Table.from_pylist(rows, schema=self.columns)

    def _look_at(self, said: str) -> dict[str, Any]:
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
