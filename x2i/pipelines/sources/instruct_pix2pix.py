"""InstructPix2Pix's data as published: folders of prompts, or Parquet (`timbrooks/instructpix2pix-clip-filtered`).

    seeds.json                   [["0000000", ["1006085889", …]], …]: a folder for each prompt, and its seeds
    0000000/prompt.json          {"input", "edit", "output"}: caption, instruction, caption
    0000000/metadata.jsonl       a line per seed, with its similarities: {"seed", "clip_sim_0", "clip_sim_dir", …}
    0000000/1006085889_0.jpg     before; …_1.jpg is after

    original_prompt, original_image, edit_prompt, edited_prompt, edited_image

The folders are published in zip files, to be unpacked beside `seeds.json`. Every seed is a row.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import Field

from x2i.pipelines.sources._cells import Record
from x2i.pipelines.sources._files import Root
from x2i.pipelines.sources._pairs import EDIT, Draft, TableConfig, edit
from x2i.pipelines.sources._pairs_lists import PairTableOrList
from x2i.pipelines.sources._text import Malformed, parse_list, parse_object
from x2i.pipelines.sources.base import Problem


class InstructPix2PixConfig(TableConfig):
    """The folder that holds `seeds.json`, or the Parquet files."""

    kind: Literal["instruct_pix2pix"] = "instruct_pix2pix"
    path: str | list[str] = Field(
        description="the folder with seeds.json, or the Parquet files (data/train-*.parquet) or their folder"
    )


class InstructPix2Pix(PairTableOrList):
    """Generated edits with captions before and after, and similarities, in `meta`."""

    kind = "instruct_pix2pix"
    Config = InstructPix2PixConfig
    source, output = "original_image", "edited_image"
    list_file = "seeds.json"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._prompts: dict[str, tuple[dict[str, Any] | Problem, dict[str, dict[str, Any]]]] = {}

    def describe(self, record: Record) -> tuple[Any, str]:
        """See `PairTable.describe`."""
        return EDIT, edit(record.get("edit_prompt"))

    def entries(self, name: str, data: bytes) -> list[Any]:
        """See `PairLists.entries`. An entry is a folder and one of its seeds, or what is no such pair as it stands."""
        entries: list[Any] = []
        for item in parse_list(data):
            match item:
                case [str(folder), list(seeds)]:
                    entries += [[folder, str(seed)] for seed in seeds]
                case _:
                    entries.append({"entry": item})
        once = {json.dumps(e): e for e in entries}  # a row's location is its folder and seed
        return list(once.values())

    def draft(self, root: Root, name: str, number: int, entry: Any) -> Draft:
        """See `PairLists.draft`."""
        if isinstance(entry, dict):
            return Draft(f"{name}#{number}", problem=Problem("bad_metadata", "expected [folder, [seed, …]]"))
        folder, seed = entry
        draft = Draft(f"{folder}/{seed}", meta={"prompt": folder, "seed": seed})
        draft.inputs, draft.output = [f"{folder}/{seed}_0.jpg"], f"{folder}/{seed}_1.jpg"
        prompt, measured = self._prompt(root, folder)
        if isinstance(prompt, Problem):
            draft.problem = prompt
            return draft
        draft.meta = prompt | measured.get(seed, {}) | draft.meta
        try:
            draft.text = edit(prompt.get("edit"))
        except Malformed as error:
            draft.problem = error.problem
        return draft

    def _prompt(self, root: Root, folder: str) -> tuple[dict[str, Any] | Problem, dict[str, dict[str, Any]]]:
        """A folder's prompt, and its seeds' measurements. The last one is kept: seeds of one prompt follow each other."""
        if folder not in self._prompts:
            said, lines = root.read_many([f"{folder}/prompt.json", f"{folder}/metadata.jsonl"])
            measured: dict[str, dict[str, Any]] = {}
            for line in lines.splitlines() if isinstance(lines, bytes) else []:
                try:
                    record = parse_object(line)
                except Malformed:
                    continue  # a measurement less
                measured[str(record.get("seed"))] = record
            prompt: dict[str, Any] | Problem
            try:
                prompt = (
                    parse_object(said)
                    if isinstance(said, bytes)
                    else Problem("bad_metadata", f"{folder}: no prompt.json")
                )
            except Malformed as error:
                prompt = Problem(error.problem.reason, f"{folder}/prompt.json: {error.problem.detail}")
            self._prompts = {folder: (prompt, measured)}
        return self._prompts[folder]
