"""SEED-Data-Edit as published (`AILab-CVC/SEED-Data-Edit-Part1-Openimages`, `…-Unsplash`, `…-Part2-3`).

    auto_editing/openimages/annotations/split_0001.jsonl   {"source_image", "target_image", "instruction"}
    auto_editing/openimages/annotations_GPT4V/…            the same with "instruction_new", worded by GPT-4V
    auto_editing/openimages/images/source_images.tar.gz.part-aa …, target_images.tar.gz.part-aa …
    real_editing/annotations/…, real_editing/images/images.tar.gz
    multi_turn_editing/annotations/…                       {"source_image", "instruction_1", "edit_image_1", …, up to 5}
    multi_turn_editing/images/multi_turn.tar.gz.part-aa …

Each turn is a row: from the picture that the turn before left. Where a turn's picture is null, it and the turn
after it are rows with a problem. Of `instruction` and `instruction_new` one is drawn by the record;
`wordings` in `meta` holds both.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal

from x2i.pipelines.sources._pairs import EDIT, Draft, edit, worded
from x2i.pipelines.sources._pairs_lines import LinesConfig, PairLines
from x2i.pipelines.sources._text import Malformed
from x2i.pipelines.sources.base import Problem

_TURN = re.compile(r"(?:instruction|edit_image)_(\d+)")


class SeedDataEditConfig(LinesConfig):
    """SEED-Data-Edit's annotations, and the archives and folders in `images` beside them."""

    kind: Literal["seed_data_edit"] = "seed_data_edit"


class SeedDataEdit(PairLines):
    """Edits of all three parts. `meta` has `session`, `turn` and `turns` where there are several turns."""

    kind = "seed_data_edit"
    version = 2
    Config = SeedDataEditConfig
    turns = True
    place = "../images"

    def drafts(self, record: dict[str, Any], location: str) -> Iterator[Draft]:
        """See `PairLines.drafts`."""
        numbers = sorted({int(m[1]) for k, v in record.items() if v is not None and (m := _TURN.fullmatch(k))})
        if not numbers:
            texts = [record.get("instruction"), record.get("instruction_new")]
            yield self._draft(location, record, texts, record.get("source_image"), record.get("target_image"))
            return
        common = {k: v for k, v in record.items() if not _TURN.fullmatch(k)}
        source, before = record.get("source_image"), 0
        for turn in numbers:
            texts, target = [record.get(f"instruction_{turn}")], record.get(f"edit_image_{turn}")
            meta = common | {"session": location, "turn": turn, "turns": len(numbers)}
            meta |= {"input_image": source, "target_image": target}
            draft = self._draft(f"{location}:{turn}", meta, texts, source, target)
            if before != turn - 1 and target:
                draft.problem = Problem("missing_image", f"the picture before turn {turn} is null")
                draft.inputs = []
            yield draft
            if isinstance(target, str) and target:
                source, before = target, turn

    def _draft(self, location: str, meta: dict[str, Any], texts: list[Any], source: Any, target: Any) -> Draft:
        wordings = [t for t in texts if isinstance(t, str) and t.strip()]
        draft = Draft(location, EDIT, meta=meta | ({"wordings": wordings} if len(wordings) > 1 else {}))
        try:
            draft.text = edit(worded(texts, self.kind, source, target, texts))
        except Malformed as error:
            draft.problem = error.problem
        for name, path in (("source_image", source), ("target_image", target)):
            if not isinstance(path, str) or not path:
                draft.problem = Problem(
                    "missing_image", f"the {name} is null" if path is None else f"{name} is no path"
                )
        draft.inputs = [self.path(source)] if isinstance(source, str) and source else []
        draft.output = self.path(target) if isinstance(target, str) and target else None
        return draft
