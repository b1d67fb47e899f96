"""X2I as OmniGen published it (`yzwang/X2I-…`): JSON lines beside archives, some of them split.

    fashiontryon.jsonl, hr-viton.jsonl, pix2pix.jsonl, … beside
    fashiontryon/fashiontryon.tar.gz, pix2pix/images.tar.gz.aa, .ab, …, grit/images1/00000.tar.gz, …

Records are those of `x2i_jsonl`, which reads them where the archives are unpacked; here both ways work. Task types
are kept as they are, typos too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from x2i.pipelines.sources import _x2i
from x2i.pipelines.sources._pairs import Draft
from x2i.pipelines.sources._pairs_lines import LinesConfig, PairLines


class X2IConfig(LinesConfig):
    """X2I's JSON lines, and the archives and folders beside them."""

    kind: Literal["x2i"] = "x2i"


class X2I(PairLines):
    """Published X2I samples, from plain files and archives. Image paths start at the folder of the JSON lines."""

    kind = "x2i"
    version = 3  # conversations
    Config = X2IConfig

    def drafts(self, record: dict[str, Any], location: str) -> Iterator[Draft]:
        """See `PairLines.drafts`."""
        said = _x2i.parsed(record)
        draft = Draft(location, record.get("task_type"), said.text, said.meta, problem=said.problem)
        draft.inputs = [self.path(p) for p in said.inputs]
        draft.output = self.path(said.output) if said.output else None
        yield draft
