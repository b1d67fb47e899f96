"""A corpus whose samples share images: restoration, control, few-shot pairs of rows, a ready sample with an input."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.corpora import RECIPE, write_photos
from x2i.pipelines import recipe as recipes
from x2i.pipelines.engine import build as engine
from x2i.pipelines.engine.build import Result
from x2i.pipelines.engine.inline import Inline

SHARED = RECIPE.replace(
    "annotators:",
    "  - {kind: x2i_jsonl, name: ready, path: ready/edits.jsonl}\nannotators:",
).replace(
    "  restoration: {tasks: [deblur, inpaint]}\n",
    "  restoration: {tasks: [deblur, inpaint]}\n  published:\n"
    "  few_shot: {of: {restoration: {tasks: [deblur, inpaint]}}, share: 1}\n",
)

#: Nothing but pairs: a row whose partner goes keeps no sample.
PAIRS = SHARED[: SHARED.index("tasks:")] + (
    "tasks:\n  few_shot: {of: {restoration: {tasks: [deblur]}}, share: 0.6}\noutput: {shorter_side: 96, shard_samples: 3}\n"
)

URL = "https://photos.example/flower?id=7"


@contextlib.contextmanager
def inline() -> Iterator[None]:
    """Builds run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "Engine", lambda plan, *_: Inline(plan))
        yield


def make(root: Path, recipe: str = SHARED) -> Path:
    """Photographs, two ready samples, the recipe, and the corpus `root/corpus`."""
    write_photos(root / "photos")
    (root / "photos/flower.json").write_text(json.dumps({"seen": {"image_url": URL}}))
    (root / "ready").mkdir()
    records = []
    for name, other in (("chelsea", "coffee"), ("camera", "astronaut")):
        Image.open(root / f"photos/{name}.png").convert("RGB").rotate(180).save(root / f"ready/{name}.jpg")
        (root / f"ready/{other}.png").write_bytes((root / f"photos/{other}.png").read_bytes())
        records.append(
            {
                "task_type": "image_edit",
                "instruction": "Put <img><|image_1|></img> aside, and show something else.",
                "input_images": [f"{other}.png"],
                "output_image": f"{name}.jpg",
            }
        )
    (root / "ready/edits.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (root / "recipe.yaml").write_text(recipe)
    build(root)
    return root


def build(root: Path, change: tuple[str, str] | None = None, out: str | None = None) -> Result:
    """Build the recipe again, with a piece of its text replaced."""
    text = (root / "recipe.yaml").read_text()
    if change is not None:
        assert change[0] in text
        text = text.replace(*change)
    (root / "changed.yaml").write_text(text)
    with contextlib.chdir(root), inline():
        return engine.build(recipes.load("changed.yaml", out=out))
