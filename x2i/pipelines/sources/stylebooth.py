"""StyleBooth's pairs as published (`stylebooth_dataset.zip`): a table of styles, sources and targets, and their pictures.

    train.csv    EnStyle,ZhStyle,ShortStyleName,Target:FILE,Source:FILE,SearchResult:DICT

Paths start at the table's folder. The last column holds commas without being quoted. There are no instructions: they
are worded here, with the English name of the style.
"""

from __future__ import annotations

import csv
from typing import Any, Literal

from x2i.corpus.sample import placeholder
from x2i.pipelines.sources._files import Root
from x2i.pipelines.sources._pairs import Draft, worded
from x2i.pipelines.sources._pairs_lists import ListConfig, PairLists
from x2i.pipelines.sources._text import Malformed, decode
from x2i.pipelines.sources.base import Problem

TASK = "style_transfer"

NEEDED = ("EnStyle", "Target:FILE", "Source:FILE")

WORDINGS = (
    "Redraw {picture} in the style of {style}.",
    "Turn {picture} into {style}.",
    "{picture} Give this picture the style {style}.",
    "Keep what {picture} shows, and change its style to {style}.",
)


class StyleBoothConfig(ListConfig):
    """The folder that holds `train.csv`."""

    kind: Literal["stylebooth"] = "stylebooth"


class StyleBooth(PairLists):
    """Changes of style."""

    kind = "stylebooth"
    Config = StyleBoothConfig
    lists = ("train.csv",)

    def entries(self, name: str, data: bytes) -> list[Any]:
        """See `PairLists.entries`. An entry is a line's number and its columns by name."""
        lines = (decode(data) or "").splitlines()
        header = next(csv.reader(lines[:1]), [])
        if absent := [c for c in NEEDED if c not in header]:
            raise Malformed("bad_metadata", f"{name}: no column {', '.join(absent)}; there are: {', '.join(header)}")
        entries: list[Any] = []
        for number, line in enumerate(lines[1:], 2):
            if line.strip():
                cells = next(csv.reader([line]), [])
                cells[len(header) - 1 :] = [",".join(cells[len(header) - 1 :])]  # the last column's own commas
                entries.append([number, dict(zip(header, cells, strict=False))])
        return entries

    def draft(self, root: Root, name: str, number: int, entry: Any) -> Draft:
        """See `PairLists.draft`."""
        line, record = entry
        style, source, target = (record.get(c, "").strip() for c in ("EnStyle", "Source:FILE", "Target:FILE"))
        draft = Draft(f"{name}#{line}", TASK, meta=record)
        draft.inputs, draft.output = [source] if source else [], target or None
        if not source or not target:
            draft.problem = Problem("missing_image", f"no {'Source:FILE' if not source else 'Target:FILE'}")
        elif not style:
            draft.problem = Problem("bad_instruction", "no style")
        if style:
            wording = worded(WORDINGS, self.kind, style, source, target)
            draft.text = wording.format(picture=placeholder(1), style=style)
        return draft
