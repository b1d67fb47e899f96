"""VITON-HD, in the layout of HR-VITON: people, the garments that they wear, and maps of both.

    train_pairs.txt, test_pairs.txt     a person and a garment on each line: 00000_00.jpg 00000_00.jpg
    train/image/00000_00.jpg            the person, who wears train/cloth/00000_00.jpg
    train/agnostic-v3.2/00000_00.jpg    the same with the garment greyed out
    train/cloth-mask, image-parse-v3, image-parse-agnostic-v3.2, openpose_img, openpose_json, image-densepose

A row is a try-on: from the greyed-out person and the garment to the person. A line that gives a person another garment
(the unpaired test) has no picture of the outcome: it is a row with the problem `no_output_image`, unless `paired`.
The publishers of later work add `agnostic-mask/00000_00_mask.png`, white where the garment was: the mask, if it is there.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from x2i.corpus.sample import placeholder
from x2i.pipelines.sources._files import Root
from x2i.pipelines.sources._pairs import Draft, worded
from x2i.pipelines.sources._pairs_lists import ListConfig, PairLists
from x2i.pipelines.sources._text import decode
from x2i.pipelines.sources.base import Problem

TASK = "virtual_try_on"

WORDINGS = (
    "Dress the person in {person} in the garment in {garment}.",
    "Show the person in {person} wearing the garment in {garment}.",
    "Put the clothing in {garment} on the person in {person}.",
    "{person} shows a person, {garment} a garment. Make a photograph of this person wearing it.",
)

#: The further files of a person and of a garment: folder, and what follows the name's stem.
OF_PERSON = {
    "image-parse-v3": ".png",
    "image-parse-agnostic-v3.2": ".png",
    "openpose_img": "_rendered.png",
    "openpose_json": "_keypoints.json",
    "image-densepose": ".jpg",
}
OF_GARMENT = {"cloth-mask": ".jpg"}


class VitonHDConfig(ListConfig):
    """The folder that holds `train_pairs.txt` and `test_pairs.txt`."""

    kind: Literal["viton_hd"] = "viton_hd"
    split: Literal["train", "test", "all"] = Field("all", description="which lists to read: train, test or all")
    paired: bool = Field(
        False, description="give every person the garment that they wear, whatever the list says: makes the test usable"
    )


class VitonHD(PairLists):
    """Try-ons. `meta` names the further files of person and garment, seen from the dataset's folder."""

    kind = "viton_hd"
    Config = VitonHDConfig
    config: VitonHDConfig

    @property
    def lists(self) -> tuple[str, ...]:  # type: ignore[override]
        """The lists of the splits that are wanted."""
        splits = ("train", "test") if self.config.split == "all" else (self.config.split,)
        return tuple(f"{s}_pairs.txt" for s in splits)

    def entries(self, name: str, data: bytes) -> list[Any]:
        """See `PairLists.entries`. An entry is a line's number and its words."""
        lines = enumerate((decode(data) or "").splitlines(), 1)
        return [[number, *line.split()] for number, line in lines if line.strip()]

    def draft(self, root: Root, name: str, number: int, entry: Any) -> Draft:
        """See `PairLists.draft`."""
        line, *words = entry
        draft = Draft(f"{name}#{line}", TASK)
        if len(words) != 2:
            draft.problem = Problem("bad_metadata", f"expected two file names, found {len(words)}")
            return draft
        split = name.partition("_")[0]
        person, garment = words[0], words[0] if self.config.paired else words[1]
        person_stem, garment_stem = (n.rpartition(".")[0] or n for n in (person, garment))
        of_person = {f: f"{split}/{f}/{person_stem}{e}" for f, e in OF_PERSON.items()}
        of_garment = {f: f"{split}/{f}/{garment_stem}{e}" for f, e in OF_GARMENT.items()}
        draft.meta = {"split": split, "person": person, "garment": garment, "files": of_person | of_garment}
        wording = worded(WORDINGS, self.kind, split, person, garment)
        draft.text = wording.format(person=placeholder(1), garment=placeholder(2))
        draft.inputs = [f"{split}/agnostic-v3.2/{person}", f"{split}/cloth/{garment}"]
        if person == garment:
            draft.output = f"{split}/image/{person}"
            draft.mask = f"{split}/agnostic-mask/{person_stem}_mask.png"
        else:
            draft.problem = Problem("no_output_image", f"unpaired: no picture shows {person} in {garment}")
        return draft
