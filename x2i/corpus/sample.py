"""The X2I sample: what a task builder gives, what a shard holds, what a reader gets back.

Layout as OmniGen published it (`task_type`, `instruction` with `<img><|image_1|></img>` placeholders,
`input_images`, `output_image`), plus `provenance`. Understanding samples carry `messages` and `images` as ms-swift
reads them, instead of an output image. Samples of an edit may carry a `mask` of what changed, as large as the output.
In a tar the members of one sample follow each other: `KEY.json`, `KEY.input_1.png` …, `KEY.output.jpg`, `KEY.mask.png`.
"""

import io
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from x2i.base.seeds import canonical_json

if TYPE_CHECKING:
    from PIL import Image

PLACEHOLDER = re.compile(r"<img><\|image_(\d+)\|></img>")


def placeholder(number: int) -> str:
    """The text that stands for the `number`-th input image (from 1) in an instruction."""
    return f"<img><|image_{number}|></img>"


@dataclass(frozen=True)
class Picture:
    """An encoded image: `data` are the bytes of a file with this `extension`; sizes in pixels."""

    data: bytes
    extension: str
    width: int
    height: int

    def open(self) -> "Image.Image":
        """Decode to a PIL image (as stored: no orientation or colour handling is left to do)."""
        from PIL import Image

        return Image.open(io.BytesIO(self.data))


@dataclass(frozen=True)
class Sample:
    """One X2I sample. `key` is unique in a corpus and derives from content."""

    key: str
    task_type: str
    instruction: str
    input_images: tuple[Picture, ...] = ()
    output_image: Picture | None = None
    messages: tuple[dict[str, Any], ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)
    mask: Picture | None = None
    objects: dict[str, Any] = field(default_factory=dict)  # boxes that `messages` speak of, as ms-swift has them
    rejected_response: str | None = None  # an answer worse than the last of `messages`, as ms-swift has it

    def __post_init__(self) -> None:
        numbers = sorted({int(n) for n in PLACEHOLDER.findall(self.instruction)})
        if self.instruction and numbers != list(range(1, len(self.input_images) + 1)):
            raise ValueError(
                f"sample {self.key}: {len(self.input_images)} input images, but the instruction has placeholders {numbers}"
            )

    def record(self) -> dict[str, Any]:
        """The content of `KEY.json`."""
        record: dict[str, Any] = {"task_type": self.task_type, "instruction": self.instruction}
        record["input_images"] = [f"{self.key}.{name}" for name, _ in self._inputs()]
        if self.output_image is not None:
            record["output_image"] = f"{self.key}.{self._output_name()}"
        if self.mask is not None:
            record["mask"] = f"{self.key}.{self._mask_name()}"
        if self.messages:
            record["messages"] = list(self.messages)
            record["images"] = record["input_images"]
        if self.rejected_response is not None:
            record["rejected_response"] = self.rejected_response
        if self.objects:
            record["objects"] = self.objects
        record["provenance"] = self.provenance
        return record

    def members(self) -> list[tuple[str, bytes]]:
        """(suffix, bytes) of each tar member, in the order in which they are written."""
        out = [("json", canonical_json(self.record()).encode())]
        out += [(name, picture.data) for name, picture in self._inputs()]
        if self.output_image is not None:
            out.append((self._output_name(), self.output_image.data))
        if self.mask is not None:
            out.append((self._mask_name(), self.mask.data))
        return out

    def _inputs(self) -> list[tuple[str, Picture]]:
        return [(f"input_{i}.{p.extension}", p) for i, p in enumerate(self.input_images, 1)]

    def _output_name(self) -> str:
        assert self.output_image is not None
        return f"output.{self.output_image.extension}"

    def _mask_name(self) -> str:
        assert self.mask is not None
        return f"mask.{self.mask.extension}"
