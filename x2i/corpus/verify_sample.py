"""One sample of a shard: its bytes against its manifest row, its `KEY.json`, its images.

It reads with plain `tarfile`, `json` and Pillow, and shares nothing with the code that writes samples but the estimate
of their texts' lengths.
"""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
from typing import Any

from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError

from x2i.corpus.faults import AGAIN, Faults
from x2i.corpus.text import rejected_tokens, sample_tokens

#: How the published layout names the images of an instruction, from 1.
IMAGE_MARK = re.compile(r"<img><\|image_(\d+)\|></img>")

#: Pillow's names of the formats that may lie under an extension.
FORMATS = {"jpg": ("JPEG", "MPO"), "png": ("PNG",), "webp": ("WEBP",)}

#: Largest picture that is decoded on a file's own word, where no manifest row says its size.
MAX_PIXELS = 178_956_970

STRANGE = "The manifest and the shards come from different builds: remove the corpus's folder and build it again."


class Record(BaseModel):
    """`KEY.json`, as published readers expect it."""

    model_config = ConfigDict(strict=True)

    task_type: str
    instruction: str
    input_images: list[str]
    output_image: str | None = None
    mask: str | None = None
    messages: list[dict[str, Any]] = []
    images: list[str] = []
    objects: dict[str, Any] = {}
    rejected_response: str | None = None
    provenance: dict[str, Any]


class SampleCheck:
    """Checks one sample. `images` counts those that were decoded; what is wrong goes to `faults`."""

    def __init__(
        self, faults: Faults, shard: str, key: str, offset: int, blob: bytes, row: dict[str, Any] | None
    ) -> None:
        """`blob` are the shard's bytes from `offset` on; `row` is the manifest's, if it has one of this key."""
        self._faults, self._shard, self._key, self._offset = faults, shard, key, offset
        self._blob, self._row = blob, row
        self._files: dict[str, bytes] = {}
        self.images = 0

    def run(self, decode: bool) -> None:
        """Check the hash and the members, then `KEY.json`, then (with `decode`) each image to its last pixel."""
        found = hashlib.sha256(self._blob).hexdigest()
        if self._row is not None and found != self._row["sha256"]:
            self._fault("sample_sha256", f"its bytes have SHA-256 {found}, the manifest says {self._row['sha256']}")
        if not self._read_members():
            return
        record = self._read_record()
        if record is None:
            return
        suffixes = self._check_names(record)
        if self._row is not None:
            self._compare(record, self._row)
        if record.provenance.get("untouched") is True and record.output_image is not None:
            self._check_untouched(record, suffixes[len(record.input_images)])
        if decode:
            self._decode(suffixes)

    def _fault(self, kind: str, problem: str, remedy: str = AGAIN) -> None:
        self._faults.add(kind, self._shard, problem, self._key, self._offset, remedy)

    def _read_members(self) -> bool:
        """Read the range as the tar that it is; names, offsets and sizes must be the manifest's. Are the names?"""
        found = []
        try:
            # a range has no end-of-archive blocks: tarfile stops where it ends
            with tarfile.open(fileobj=io.BytesIO(self._blob), mode="r:") as tar:
                for info in tar:
                    file = tar.extractfile(info)
                    suffix = info.name.removeprefix(f"{self._key}.")
                    found.append((suffix, self._offset + info.offset_data, info.size))
                    self._files[suffix] = file.read() if file is not None else b""
        except (tarfile.TarError, ValueError, OverflowError) as error:
            self._fault("sample_unreadable", f"its bytes are no tar: {error}")
            return False
        told = [(m["suffix"], m["offset"], m["size"]) for m in self._row["members"]] if self._row else found
        for number in range(max(len(found), len(told))):
            there, said = (m[number] if number < len(m) else "none" for m in (found, told))
            if there != said:
                problem = f"member {number} is {there} (suffix, offset, size) in the tar, {said} in the manifest"
                self._fault("sample_members", problem)
                break
        return [suffix for suffix, _, _ in found] == [suffix for suffix, _, _ in told]

    def _read_record(self) -> Record | None:
        name = f"{self._key}.json"
        if "json" not in self._files:
            self._fault("sample_json", f"has no member {name}; it has {', '.join(self._files) or 'none'}")
            return None
        try:
            return Record.model_validate_json(self._files["json"])
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            self._fault(
                "sample_json", f"{name}: {'.'.join(map(str, first['loc']))} {first['msg']}".replace(":  ", ": ")
            )
            return None

    def _check_names(self, record: Record) -> list[str]:
        """Suffixes of the images that `KEY.json` names, inputs first: the tar's other members, in this order."""
        named = [*record.input_images, *(n for n in (record.output_image, record.mask) if n is not None)]
        suffixes = [name.removeprefix(f"{self._key}.") for name in named]
        wanted = [rf"input_{i}\.\w+" for i in range(1, len(record.input_images) + 1)]
        wanted += [r"output\.\w+"] * (record.output_image is not None) + [r"mask\.\w+"] * (record.mask is not None)
        for name, suffix, pattern in zip(named, suffixes, wanted, strict=True):
            if not re.fullmatch(pattern, suffix):
                self._fault("sample_json", f"{self._key}.json names an image {name!r}, which is not KEY.{pattern}")
        if list(self._files) != ["json", *suffixes]:
            there = ", ".join(self._files)
            self._fault("sample_json", f"{self._key}.json names {', '.join(suffixes) or 'none'}; the tar has {there}")
        if record.mask is not None and record.output_image is None:
            self._fault("sample_json", f"{self._key}.json has a `mask`, and no `output_image` that it could be of")
        if record.messages and record.images != record.input_images:
            self._fault("sample_json", f"{self._key}.json: `images` of its messages are not its `input_images`")
        if record.rejected_response is not None and not (
            record.messages and record.messages[-1].get("role") == "assistant"
        ):
            problem = "has a `rejected_response`, and no answer at the end of `messages` that could be better"
            self._fault("sample_json", f"{self._key}.json {problem}")
        if record.output_image is None and not record.messages:
            self._fault("sample_json", f"{self._key}.json has neither `output_image` nor `messages`")
        numbers = sorted({int(n) for n in IMAGE_MARK.findall(record.instruction)})
        # understanding samples may have all their text in `messages`
        if numbers != list(range(1, len(record.input_images) + 1)) and (record.instruction or not record.messages):
            self._fault("placeholders", f"has {len(record.input_images)} input images, but placeholders {numbers}")
        return suffixes

    def _compare(self, record: Record, row: dict[str, Any]) -> None:
        pairs = [
            ("task_type", record.task_type, row["task_type"]),
            ("length of the instruction", len(record.instruction), row["instruction_chars"]),
            ("number of inputs", len(record.input_images), len(row["input_sizes"])),
            ("presence of an output", record.output_image is not None, row["output_size"] is not None),
            ("originals", _originals(record.provenance), row["images"]),
            *((n, record.provenance.get(n), row[n]) for n in ("image_id", "row_id", "source", "location")),
        ]
        if row["text_tokens"] is not None:  # earlier builds did not count them
            text = sample_tokens(record.instruction, record.messages, record.objects)
            pairs.append(("tokens of the text", text, row["text_tokens"]))
        if row["rejected_tokens"] is not None:
            whole = rejected_tokens(record.messages, record.rejected_response, record.objects)
            pairs.append(("tokens of the text with the rejected answer", whole, row["rejected_tokens"]))
        for what, found, told in pairs:
            if found != told:
                self._fault("manifest_row", f"{what}: {found!r} in {self._key}.json, {told!r} in the manifest", STRANGE)

    def _check_untouched(self, record: Record, suffix: str) -> None:
        found = hashlib.sha256(self._files.get(suffix, b"")).hexdigest()
        told = record.provenance.get("image_id")
        if found != told:
            self._fault("not_untouched", f"the output should be the source's bytes, {told}, but has SHA-256 {found}")

    def _decode(self, suffixes: list[str]) -> None:
        sizes = [*self._row["input_sizes"], self._row["output_size"], self._row["output_size"]] if self._row else []
        for number, suffix in enumerate(suffixes):
            if suffix not in self._files:
                continue  # said already
            self.images += 1
            size = sizes[number] if number < len(sizes) else None
            problem = _image_fault(self._files[suffix], suffix, (size["width"], size["height"]) if size else None)
            if problem:
                self._fault("image", f"{self._key}.{suffix} {problem}")


def _originals(provenance: dict[str, Any]) -> list[Any]:
    """Ids of all the original images in a sample, as its provenance tells them."""
    others = [i for o in provenance.get("others", []) for i in (o.get("image_id"), *o.get("input_ids", []))]
    return list(dict.fromkeys([provenance.get("image_id"), *provenance.get("input_ids", []), *others]))


def _image_fault(data: bytes, suffix: str, size: tuple[int, int] | None) -> str | None:
    """What is wrong with an image, if anything; `size` is the manifest's, (width, height) in pixels."""
    extension = suffix.rpartition(".")[2]
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.format not in FORMATS.get(extension, (image.format,)):
                return f"is a {image.format} by its content"
            if size is not None and image.size != size:
                return f"is {image.width}x{image.height} pixels, the manifest says {size[0]}x{size[1]}"
            if size is None and image.width * image.height > MAX_PIXELS:
                return f"claims {image.width}x{image.height} pixels, and no manifest row says so"
            image.load()
    except Exception as error:  # noqa: BLE001 - decoders of damaged bytes raise anything from struct.error to SyntaxError
        return f"cannot be decoded: {type(error).__name__}: {error}"
    return None
