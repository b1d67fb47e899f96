"""Recap-DataComp-1B (`UCSC-VLAA/Recap-DataComp-1B`): web images with two captions, fetched with img2dataset.

Columns: url, re_caption, org_caption, sha256, key, re_clip_score, org_clip_score, re_length … Name in
--save_additional_columns those that --caption_col does not name. (img2dataset's own `key` and `sha256`
take the place of the dataset's.) Both captions are in `meta`, under their published names.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from x2i.pipelines.sources._img2dataset import Img2Dataset, Img2DatasetConfig
from x2i.pipelines.sources._text import pick
from x2i.pipelines.sources.base import Problem, Row


class RecapDatacompConfig(Img2DatasetConfig):
    """Recap-DataComp-1B as img2dataset writes it."""

    kind: Literal["recap_datacomp"] = "recap_datacomp"
    text: Literal["recaption", "original"] = Field(
        "recaption", description="which caption is the row's text: the model's (recaption) or the web page's (original)"
    )
    recaption: str = Field(
        "re_caption",
        description="the column of the model's caption; of the second subset: re_caption_condition_diverse_topk",
    )
    original: str = Field("org_caption", description="the column of the web page's caption")
    caption_column: str | None = Field(
        None,
        description="what img2dataset was given as --caption_col, and calls `caption`; default: of `recaption` and "
        "`original` the one that is not among the additional columns",
    )


class RecapDatacomp(Img2Dataset):
    """Image, the chosen caption, both in `meta`. A row without the chosen caption has no text."""

    kind = "recap_datacomp"
    Config = RecapDatacompConfig
    config: RecapDatacompConfig

    def describe(self, row: Row) -> Problem | None:
        """See `Img2Dataset.describe`."""
        config, meta = self.config, row.meta
        absent = [c for c in (config.recaption, config.original) if c not in meta]
        renamed = config.caption_column or (absent[0] if len(absent) == 1 else None)
        if renamed and "caption" in meta:
            meta[renamed] = meta["caption"]
        row.text = pick(meta, config.recaption if config.text == "recaption" else config.original)
        if len(absent) == 2 and renamed is None and meta:
            return Problem("bad_metadata", f"neither '{config.recaption}' nor '{config.original}' is there")
        return None
