"""GRIT (`zzliang/GRIT`, of Kosmos-2): captions whose phrases are tied to boxes, fetched with img2dataset.

The dataset's card gives the command: --caption_col caption --output_format webdataset
--save_additional_columns '["id","noun_chunks","ref_exps","clip_similarity_vitb32","clip_similarity_vitl14"]'.
`meta.noun_chunks` and `meta.ref_exps` are lists of [start, end, x1, y1, x2, y2, score]: characters
[start, end) of `meta.caption` (not of the row's text, which is stripped), and a box in shares of width and height.
"""

from __future__ import annotations

from typing import Any, Literal

from x2i.pipelines.sources._img2dataset import Img2Dataset, Img2DatasetConfig
from x2i.pipelines.sources._text import pick
from x2i.pipelines.sources.base import Problem, Row

SPANS = ("noun_chunks", "ref_exps")

#: How far beyond the picture's edge (a share) a box may reach: detectors round.
SLACK = 0.01


class GritConfig(Img2DatasetConfig):
    """GRIT as img2dataset writes it."""

    kind: Literal["grit"] = "grit"


class Grit(Img2Dataset):
    """Image, caption, and phrases with boxes in `meta`. A row whose spans are unsound has the problem `bad_metadata`."""

    kind = "grit"
    Config = GritConfig
    config: GritConfig

    def describe(self, row: Row) -> Problem | None:
        """See `Img2Dataset.describe`."""
        row.text = row.text or pick(row.meta, "caption")
        caption = row.meta.get("caption")
        characters = len(caption) if isinstance(caption, str) else 0
        for key in SPANS:
            spans = row.meta.get(key)
            if spans is not None and not (isinstance(spans, list) and all(_sound(s, characters) for s in spans)):
                return Problem("bad_metadata", f"'{key}' holds more than [start, end, x1, y1, x2, y2, score]")
        return None


def _sound(span: Any, characters: int) -> bool:
    if not isinstance(span, list) or len(span) != 7 or not all(type(v) in (int, float) for v in span):
        return False
    start, end, *box, _ = span
    x1, y1, x2, y2 = box
    return 0 <= start < end <= characters and x1 < x2 and y1 < y2 and -SLACK <= min(box) <= max(box) <= 1 + SLACK
