"""OmniEdit-Filtered-1.2M as published (`TIGER-Lab/OmniEdit-Filtered-1.2M`): Parquet, a row per edit, no masks.

    omni_edit_id, task, src_img, edited_img, edited_prompt_list, width, height,
    sc_score_1, sc_score_2, sc_reasoning, pq_score, pq_reasoning, o_score

`edited_prompt_list` holds several wordings of one instruction: one is drawn by the row's id. `task` is the task type.
"""

from __future__ import annotations

from typing import Any, Literal

from x2i.pipelines.sources._cells import Record
from x2i.pipelines.sources._pairs import PairTable, TableConfig, edit, worded


class OmniEditConfig(TableConfig):
    """OmniEdit's Parquet files."""

    kind: Literal["omniedit"] = "omniedit"


class OmniEdit(PairTable):
    """Edits with scores of a judge in `meta`: `o_score` and the rest can be selected by."""

    kind = "omniedit"
    Config = OmniEditConfig
    source, output = "src_img", "edited_img"

    def describe(self, record: Record) -> tuple[Any, str]:
        """See `PairTable.describe`."""
        texts = record.get("edited_prompt_list")
        return record.get("task"), edit(worded(texts, self.kind, record.get("omni_edit_id"), texts))
