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
from x2i.pipelines.sources._text import Malformed
from x2i.pipelines.sources.base import Problem


class X2IConfig(LinesConfig):
    """X2I's JSON lines, and the archives and folders beside them."""

    kind: Literal["x2i"] = "x2i"


class X2I(PairLines):
    """Published X2I samples, from plain files and archives. Image paths start at the folder of the JSON lines."""

    kind = "x2i"
    Config = X2IConfig

    def drafts(self, record: dict[str, Any], location: str) -> Iterator[Draft]:
        """See `PairLines.drafts`."""
        task_type, instruction = record.get("task_type"), record.get("instruction")
        inputs, output = record.get("input_images") or [], record.get("output_image")
        draft = Draft(
            location, task_type, meta={k: v for k, v in record.items() if k not in ("input_images", "output_image")}
        )
        if not isinstance(inputs, list) or not all(isinstance(p, str) and p for p in inputs):
            raise Malformed("bad_metadata", "'input_images' is not a list of paths")
        draft.problem = _x2i.check(task_type, instruction, len(inputs))
        if isinstance(instruction, str) and instruction.strip():
            draft.text = instruction.strip()
        draft.inputs = [self.path(p) for p in inputs]
        if isinstance(output, str) and output:
            draft.output = self.path(output)
        else:
            draft.problem = draft.problem or Problem(
                "no_output_image", "a record with no output image (an understanding task)"
            )
        yield draft
