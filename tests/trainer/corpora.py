"""Small corpora for the trainer's tests: crops of real photographs, written through the corpus contract."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import skimage.data
from PIL import Image, ImageFilter
from sklearn.datasets import load_sample_image

from x2i.corpus.manifest import MADE, SCHEMA, ManifestWriter, corpus_digest
from x2i.corpus.sample import Picture, Sample, placeholder
from x2i.corpus.shard import ShardWriter
from x2i.corpus.text import rejected_tokens, sample_tokens

PHOTOGRAPHS = {
    "an astronaut": skimage.data.astronaut,
    "a cat": skimage.data.chelsea,
    "a cup of coffee": skimage.data.coffee,
    "a rocket": skimage.data.rocket,
    "a temple": lambda: load_sample_image("china.jpg"),
    "a flower": lambda: load_sample_image("flower.jpg"),
}


@dataclass(frozen=True)
class Made:
    """One sample to write, and the image that it was made from."""

    sample: Sample
    image_id: str


def picture(image: Image.Image) -> Picture:
    out = io.BytesIO()
    image.save(out, "PNG")
    return Picture(out.getvalue(), "png", image.width, image.height)


def crops(count: int, side: int = 64) -> Iterator[tuple[str, Image.Image]]:
    """`count` different crops of the photographs, with what they show."""
    sources = {name: Image.fromarray(load()[..., :3]) for name, load in PHOTOGRAPHS.items()}
    for i in range(count):
        name = list(sources)[i % len(sources)]
        source, turn = sources[name], i // len(sources)
        span = 120 + 37 * turn % 150
        x, y = turn * 53 % (source.width - span), turn * 31 % (source.height - span)
        yield name, source.crop((x, y, x + span, y + span)).resize((side, side), Image.Resampling.LANCZOS)


def samples(count: int) -> Iterator[Made]:
    """From each crop: text-to-image, deblurring, colourisation."""
    for name, image in crops(count):
        out = picture(image)
        image_id = hashlib.sha256(out.data).hexdigest()
        short = image_id[:12]
        blurred, grey = image.filter(ImageFilter.GaussianBlur(2)), image.convert("L").convert("RGB")
        yield Made(Sample(f"{short}-t2i", "text_to_image", f"A photograph of {name}", (), out), image_id)
        text = f"Sharpen {placeholder(1)}"
        yield Made(Sample(f"{short}-blur", "deblur", text, (picture(blurred),), out), image_id)
        text = f"Colourise {placeholder(1)}"
        yield Made(Sample(f"{short}-grey", "colorize", text, (picture(grey),), out), image_id)


def widened(made: list[Made]) -> list[Made]:
    """The same samples with all pictures half as wide again."""

    def wide(given: Picture) -> Picture:
        image = Image.open(io.BytesIO(given.data))
        return picture(image.resize((image.width * 3 // 2, image.height)))

    return [
        replace(
            item,
            sample=replace(
                item.sample,
                input_images=tuple(map(wide, item.sample.input_images)),
                output_image=None if item.sample.output_image is None else wide(item.sample.output_image),
            ),
        )
        for item in made
    ]


def chats(count: int) -> Iterator[Made]:
    """From each crop a question with its answer, and a wrong answer."""
    names = list(PHOTOGRAPHS)
    for name, image in crops(count):
        shown = picture(image)
        image_id = hashlib.sha256(shown.data).hexdigest()
        wrong = names[(names.index(name) + 1) % len(names)]
        messages = (
            {"role": "user", "content": "<image>What is this?"},
            {"role": "assistant", "content": f"This is {name}."},
        )
        key = f"{image_id[:12]}-ask"
        yield Made(
            Sample(key, "describe", "", (shown,), None, messages, rejected_response=f"This is {wrong}."), image_id
        )


def write(folder: Path, made: list[Made], per_shard: int = 20, row_group: int = 16) -> Path:
    """Write shards, manifest.parquet (in small row groups) and corpus.json."""
    (folder / "shards").mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    shards: list[dict[str, Any]] = []
    for start in range(0, len(made), per_shard):
        name = f"shards/{len(shards):05d}.tar"
        with ShardWriter(folder / name) as writer:
            for item in made[start : start + per_shard]:
                entry = writer.write(item.sample.key, item.sample.members())
                rows.append(_row(item, name, entry))
        shards.append({"name": name, "size": writer.size, "samples": writer.samples, "sha256": writer.sha256})
    table = pa.Table.from_pylist(rows, schema=MADE)
    with ManifestWriter(folder / "manifest.parquet", row_group) as manifest:
        manifest.write(table)
    info = {"format": 1, "digest": corpus_digest(shards, table.select(SCHEMA.names).to_batches()), "shards": shards}
    (folder / "corpus.json").write_text(json.dumps(info))
    return folder


def _row(item: Made, shard: str, entry: Any) -> dict[str, Any]:
    out = item.sample.output_image
    return {
        "key": item.sample.key,
        "shard": shard,
        "offset": entry.offset,
        "size": entry.size,
        "sha256": entry.sha256,
        "task_type": item.sample.task_type,
        "instruction_chars": len(item.sample.instruction),
        "text_tokens": sample_tokens(item.sample.instruction, item.sample.messages, {}),
        "rejected_tokens": rejected_tokens(item.sample.messages, item.sample.rejected_response, {}),
        "input_sizes": [{"width": p.width, "height": p.height} for p in item.sample.input_images],
        "output_size": None if out is None else {"width": out.width, "height": out.height},
        "image_id": item.image_id,
        "images": [item.image_id],
        "row_id": item.image_id,
        "source": "photographs",
        "location": item.sample.key,
        "scores": [],
        "members": [{"suffix": m.suffix, "offset": m.offset, "size": m.size} for m in entry.members],
    }


def run_content(corpus: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """A run of two tiny stages that takes a second or two; `changes` replace its top-level keys."""
    tiny = {
        "preset": "omnigen-tiny",
        "hidden_size": 32,
        "layers": 1,
        "heads": 2,
        "kv_heads": 2,
        "intermediate_size": 48,
    }
    stage = {"batch": 4, "lr": 0.003, "condition_dropout": 0.2, "min_crop": 0.5}
    content: dict[str, Any] = {
        "corpora": [str(corpus)],
        "output": str(output),
        "model": tiny,
        "vae": {"kind": "pixels", "factor": 4},
        "tokenizer": {"train": {"vocab_size": 300}},
        "held_out": 0.2,
        "ema": 0.9,
        "device": "cpu",
        "cpu_threads": 1,  # networks this small are slower on two, and much slower where cores are shared
        "checkpoint_every": 3,
        "keep": 1,
        "preview": {"per_task": 1, "steps": 1},
        "stages": [
            {**stage, "name": "low", "resolution": 16, "steps": 5, "mixture": {"text_to_image": 1, "deblur": 2}},
            {**stage, "name": "high", "resolution": 24, "steps": 6, "mixture": {"colorize": 1}, "schedule": "cosine"},
        ],
    }
    return content | changes
