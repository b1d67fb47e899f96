"""A small real corpus for tests, built in this process without Ray: the pipeline's own pieces, one after the other."""

from __future__ import annotations

import contextlib
import io
import shutil
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

RECIPE = """\
name: small
description: A few photographs.
license: CC0-1.0
lake: lake
out: corpus
sources:
  - kind: folder
    name: photos
    path: photos
    unit_files: 5
annotators:
  image:
  phash:
  quality:
select:
  where:
    large_enough: least(image.width, image.height) >= 64
    sharp_enough: quality.sharpness > 30
  dedup:
    exact: true
    perceptual: {bits: 6}
tasks:
  text_to_image:
  control:
  restoration: {tasks: [deblur, inpaint]}
output:
  shorter_side: 96
  shard_samples: 8
"""


@dataclass(frozen=True)
class Built:
    """A folder with `corpus`, `lake`, `photos` and `recipe.yaml`; its paths are relative to the folder itself."""

    root: Path

    @property
    def corpus(self) -> Path:
        """The corpus's folder."""
        return self.root / "corpus"

    def copy(self, target: Path) -> Built:
        """A copy to damage."""
        shutil.copytree(self.root, target, dirs_exist_ok=True)
        return Built(target)


def write_photos(folder: Path) -> None:
    """Five photographs at small sizes, a copy, a smaller copy, a speck, a blur, a page of HTML, one without text."""
    from x2i.pipelines.quickstart import photographs

    plain = photographs()
    folder.mkdir(parents=True)
    for name in ("astronaut.png", "chelsea.png", "coffee.png", "camera.png", "flower.jpg"):
        stem = name.partition(".")[0]
        photo = Image.open(io.BytesIO(plain[name]))
        photo.thumbnail((160, 160))
        photo.save(folder / f"{stem}.png")
        (folder / f"{stem}.txt").write_bytes(plain[f"{stem}.txt"])
    coffee = Image.open(folder / "coffee.png").convert("RGB")
    small = coffee.crop((20, 10, 110, 100))  # neither side is above `shorter_side`: its bytes pass through
    small.save(folder / "cup.jpg", quality=90)
    coffee.resize((120, 80)).save(folder / "coffee_smaller.jpg", quality=80)
    coffee.resize((12, 8)).resize((120, 80)).save(folder / "blurred.jpg")
    coffee.crop((0, 0, 40, 40)).save(folder / "speck.png")
    coffee.rotate(90, expand=True).save(folder / "no_text.png")
    shutil.copyfile(folder / "astronaut.png", folder / "copy.png")
    (folder / "page.jpg").write_text("<!DOCTYPE html><html><body>Not found</body></html>")
    for stem in ("cup", "coffee_smaller", "blurred", "speck", "copy", "page"):
        (folder / f"{stem}.txt").write_text(f"The picture named {stem}.")


def build(root: Path, recipe: str = RECIPE) -> Built:
    """Write the photographs and the recipe, and take the steps of `x2i.pipelines.engine.build` in this process."""
    from tests.pipelines.tasks import inline

    write_photos(root / "photos")
    (root / "recipe.yaml").write_text(recipe)
    with contextlib.chdir(root):
        inline.build(Path("recipe.yaml"))
    return Built(root)
