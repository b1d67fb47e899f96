"""MultiGen-20M (UniControl): control maps of LAION-Aesthetics images, with prompts.

    images/aesthetics_6_plus_0/....jpg
    conditions/aesthetics_6_25_plus_group_0_canny/control_N.jpg
    json_files/aesthetics_plus_all_group_{task}_all.json    one record a line: source, prompt, control_{task}

A condition's folder may also be called as its archive unpacks, without `aesthetics_6_25_plus_`. The
instruction is the map, UniControl's own words for the task, and the prompt.
"""

from __future__ import annotations

import posixpath
import re
from functools import cached_property
from typing import Any, Literal

from pydantic import Field

from x2i.corpus.sample import placeholder
from x2i.pipelines.sources._files import Root
from x2i.pipelines.sources._published import RecordSource, load
from x2i.pipelines.sources._text import pick
from x2i.pipelines.sources.base import Problem, Row, SourceConfig

#: What UniControl says for each task (`salesforce/UniControl`), by the key of its records.
INSTRUCTIONS = {
    "canny": "canny edge to image",
    "hed": "hed edge to image",
    "hedsketch": "sketch to image",
    "depth": "depth map to image",
    "normal": "normal surface map to image",
    "seg": "segmentation map to image",
    "segbase": "segmentation map to image",
    "bbox": "bounding box to image",
    "openpose": "human pose skeleton to image",
    "outpainting": "image outpainting",
    "inpainting": "image inpainting",
    "blur": "deblur image to clean image",
    "grayscale": "gray image to color image",
}

#: The beginning of conditions' folders that their archives leave out.
PREFIX = "aesthetics_6_25_plus_"


class MultiGen20MConfig(SourceConfig):
    """The dataset's folder."""

    kind: Literal["multigen20m"] = "multigen20m"
    path: str = Field(description="the folder with images, conditions and json_files, e.g. MultiGen-20M")
    tasks: list[str] = Field(
        [], description="tasks to read, as the JSON files name them, e.g. [canny, hedsketch, depth]; default: all"
    )
    unit_rows: int = Field(1000, ge=1, description="records in a unit")


class MultiGen20M(RecordSource):
    """One row per record: map in, image out. Task types are canny_to_image, hedsketch_to_image, depth_to_image …"""

    kind = "multigen20m"
    Config = MultiGen20MConfig
    config: MultiGen20MConfig
    files = "json_files/aesthetics_plus_all_group_{task}_all.json of MultiGen-20M"

    @property
    def listing(self) -> str | list[str]:
        """See `FiledSource.listing`."""
        folder = self.config.path.rstrip("/")
        return [f"{folder}/json_files/aesthetics_plus_all_group_{t}_all.json*" for t in self.config.tasks or ["*"]]

    @cached_property
    def _folder(self) -> Root:
        return Root(self.config.path)

    def fill(self, row: Row, record: dict[str, Any], part: int, file: str) -> Problem | None:
        """See `RecordSource.fill`."""
        row.meta = dict(record)
        task, control = _control(record, file)
        source = record.get("source")
        if not isinstance(control, str) or not control or not isinstance(source, str) or not source:
            return Problem("bad_metadata", "a record needs 'source' and 'control_…', both paths")
        row.meta["task_type"] = f"{task}_to_image"
        if prompt := pick(record, "prompt"):
            row.text = f"{placeholder(1)} {INSTRUCTIONS.get(task, f'{task} to image')}: {prompt}"
            row.meta["instruction"] = row.text
        problem: Problem | None = None
        for path in dict.fromkeys([control, control.replace(PREFIX, "", 1)]):
            row.data, row.inputs = None, []
            problem = load(row, self._folder, [_below("conditions", path)], _below("images", source))
            if row.inputs:
                break
        return problem


def _control(record: dict[str, Any], file: str) -> tuple[str, Any]:
    """The record's task and its map's path. Of several maps, that of the task which the file is named for."""
    keys = sorted(k for k in record if k.startswith("control_"))
    named = re.sub(r".*_group_(\w+)_all\.json.*", r"control_\1", posixpath.basename(file))
    key = named if named in keys or not keys else keys[0]
    return key.removeprefix("control_"), record.get(key)


def _below(folder: str, path: str) -> str:
    return posixpath.join(folder, posixpath.normpath(path).lstrip("/"))
