"""UltraEdit as published (`BleachNick/UltraEdit`, `…_Region_Based_100k`, `…_500k`): Parquet, a row per edit.

    clip_sim_source, clip_sim_target, clip_sim_dir, clip_sim_image, dinov2_sim, ssim, source_caption, target_caption,
    idx, edit_prompt, edit_object, source_image, edited_image, mask_image

`mask_image` is white where the edit took place (the authors' blank mask, for edits of the whole picture, is all
white), and null or absent in the free-form splits.
"""

from __future__ import annotations

from typing import Any, Literal

from x2i.pipelines.sources._cells import Record
from x2i.pipelines.sources._pairs import EDIT, PairTable, TableConfig, edit


class UltraEditConfig(TableConfig):
    """UltraEdit's Parquet files."""

    kind: Literal["ultraedit"] = "ultraedit"


class UltraEdit(PairTable):
    """Edits, free-form or of a region. Captions and similarities stay in `meta`."""

    kind = "ultraedit"
    Config = UltraEditConfig
    source, output, masks = "source_image", "edited_image", "mask_image"

    def describe(self, record: Record) -> tuple[Any, str]:
        """See `PairTable.describe`."""
        return EDIT, edit(record.get("edit_prompt"))
