"""`grounding`: where in the picture the phrases of a caption (or fixed ones) are, by Grounding DINO.

Paper: Liu et al. 2023, "Grounding DINO: Marrying DINO with Grounded Pre-Training for Open-Set Object
Detection", https://arxiv.org/abs/2303.05499; code and weights Apache-2.0. Two libraries run it: `transformers`
(default: IDEA-Research/grounding-dino-tiny, Swin-T, about 0.69 GB; …-base, Swin-B, 0.93 GB) and `groundingdino`
(groundingdino-py, with the authors' ShilongLiu/GroundingDINO:groundingdino_swint_ogc.pth or
groundingdino_swinb_cogcoor.pth). Given the same weights they agree; this is tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator

from x2i.base.weights import Weights
from x2i.pipelines.annotators._boxes import BOXES
from x2i.pipelines.annotators._columns import column
from x2i.pipelines.annotators._groundingdino import PACKAGED, Published, Transformers, prepare
from x2i.pipelines.annotators._phrases import Prompt, owners, prompts
from x2i.pipelines.annotators._pictures import alike, pixels
from x2i.pipelines.annotators._torch import SHARE, SPEED, ModelConfig, Runtime, folder
from x2i.pipelines.annotators._weights import weights_of
from x2i.pipelines.annotators.base import Annotator, Item

#: Sizes in bytes are about right, for people.
TINY = Weights("IDEA-Research/grounding-dino-tiny", size=690_000_000, licence="Apache-2.0")
SWIN_T = Weights("ShilongLiu/GroundingDINO:groundingdino_swint_ogc.pth", size=694_000_000, licence="Apache-2.0")
BERT = Weights("google-bert/bert-base-uncased:vocab.txt", size=232_000, licence="Apache-2.0")
KNOWN = (
    TINY,
    SWIN_T,
    BERT,
    Weights("IDEA-Research/grounding-dino-base", size=935_000_000, licence="Apache-2.0"),
    Weights("ShilongLiu/GroundingDINO:groundingdino_swinb_cogcoor.pth", size=938_000_000, licence="Apache-2.0"),
)


class GroundingConfig(ModelConfig):
    """Which phrases, which model, and how sure it must be. Thresholds and sizes are the published ones."""

    defaults = ("backend", {"transformers": TINY.spec, "groundingdino": SWIN_T.spec})

    backend: Literal["transformers", "groundingdino"] = Field(
        "transformers", description="library that runs the model, e.g. groundingdino for the authors' checkpoints"
    )
    weights: str = Field(
        TINY.spec,
        description="for transformers a hub's org/name or a folder, e.g. IDEA-Research/grounding-dino-base; for "
        "groundingdino a .pth, by default ShilongLiu/GroundingDINO:groundingdino_swint_ogc.pth",
    )
    architecture: str = Field(
        "SwinT", description="groundingdino only: e.g. SwinT, SwinB, or a configuration file (.py) in its format"
    )
    bert: str = Field(
        BERT.spec,
        description="groundingdino only: BERT's vocab.txt, or a folder with its configuration and tokenizer, e.g. "
        "./bert-base-uncased",
    )
    phrases: str | list[str] = Field(
        "entities.noun_chunks",
        description="a column of phrases, e.g. entities.noun_chunks or entities.entities, or a list, e.g. [cat, dog]",
    )
    box_threshold: float = Field(0.35, ge=0, lt=1, description="probability that a box must exceed, e.g. 0.35")
    text_threshold: float = Field(
        0.25, ge=0, lt=1, description="probability above which a token speaks for its phrase, e.g. 0.25"
    )
    nms: float | None = Field(
        None, gt=0, le=1, description="of one phrase's boxes that overlap by more than this IoU only the best, e.g. 0.8"
    )
    side: int = Field(800, gt=15, description="pixels of the shorter side that the model sees, e.g. 800")
    longest: int = Field(1333, gt=15, description="pixels that the longer side may have, e.g. 1333")
    max_tokens: int = Field(
        256, gt=3, description="tokens in a prompt; phrases that need more are asked in several, e.g. 256"
    )

    @field_validator("phrases")
    @classmethod
    def _column_or_list(cls, value: str | list[str]) -> str | list[str]:
        if isinstance(value, str) and value.count(".") != 1:
            raise ValueError(f"{value!r} is no column (annotator.column); for fixed phrases write a list: [{value}]")
        return value


class Grounding(Annotator):
    """A list per row, the surest box first; rows without phrases have empty lists.

    `boxes` are [x1, y1, x2, y2] as shares of width and height, `phrases` and `phrase_index` the phrase of
    the given list that each belongs to and its place there, `scores` the probability of its best token.
    Pictures are batched by size, so that a row's values do not depend on its neighbours.
    """

    name = "grounding"
    Config = GroundingConfig
    speed = SPEED
    gpus = SHARE
    columns = pa.schema(
        {
            "boxes": BOXES,
            "phrases": pa.list_(pa.string()),
            "scores": pa.list_(pa.float32()),
            "phrase_index": pa.list_(pa.int32()),
        }
    )

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.config.phrases,) if isinstance(self.config.phrases, str) else ()

    @property
    def shorter_side(self) -> int:
        return int(self.config.side)

    def weights(self) -> list[Weights]:
        out = [weights_of(self.config.weights, self.config.sha256, KNOWN)]
        if self.config.backend == "groundingdino":
            out.append(weights_of(self.config.bert, None, KNOWN))
            if self.config.architecture not in PACKAGED:
                out.append(Weights(self.config.architecture))
        return out

    def setup(self) -> None:
        paths = [folder(w) for w in self.weights()]
        self._runtime = Runtime(self.config)
        if self.config.backend == "groundingdino":
            architecture = paths[2] if len(paths) > 2 else self.config.architecture
            self._backend: Transformers | Published = Published(paths[0], architecture, paths[1])
        else:
            self._backend = Transformers(paths[0])
        self._runtime.place(self._backend.model)

    def __call__(self, batch: Sequence[Item]) -> pa.Table:
        wanted = self._wanted(batch)
        limit = min(self.config.max_tokens, self._backend.limit)
        asked = [
            (row, prompt) for row, said in enumerate(wanted) for prompt in prompts(said, self._backend.tokenizer, limit)
        ]
        shown = pixels(batch)
        images = {r: prepare(shown[r], self.config.side, self.config.longest) for r in sorted({r for r, _ in asked})}
        found: list[list[tuple[float, int, list[float]]]] = [[] for _ in wanted]
        for group in alike(images[row].shape for row, _ in asked):
            for start in range(0, len(group), len(wanted)):  # many prompts a row: still no more than the batch
                part = [asked[i] for i in group[start : start + len(wanted)]]
                for (row, _), boxes in zip(part, self._detect([images[r] for r, _ in part], part), strict=True):
                    found[row] += boxes
        return pa.Table.from_pylist(
            [_row(sorted(f, key=lambda b: -b[0]), said) for f, said in zip(found, wanted, strict=True)],
            schema=self.columns,
        )

    def _wanted(self, batch: Sequence[Item]) -> list[list[str]]:
        """The phrases asked for in each row."""
        if not isinstance(self.config.phrases, str):
            return [self.config.phrases] * len(batch)
        cells = column(batch, self.config.phrases, "grounding").to_pylist()
        return [[_text(v) for v in cell or []] for cell in cells]

    def _detect(
        self, images: list[np.ndarray], asked: list[tuple[int, Prompt]]
    ) -> list[list[tuple[float, int, list[float]]]]:
        """One forward pass: per image and prompt, (score, phrase, corners) of each box."""
        import torch

        images_BCHW = torch.from_numpy(np.stack(images)).to(self._runtime.device)
        with self._runtime.running():
            logits_BQT, boxes_BQ4 = self._backend(images_BCHW, [prompt.ids for _, prompt in asked])
            probabilities_BQT = self._runtime.numpy(logits_BQT.float().sigmoid())
            centres_BQ4 = self._runtime.numpy(boxes_BQ4)
        out = []
        for probabilities, centres, (_, prompt) in zip(probabilities_BQT, centres_BQ4, asked, strict=True):
            kept, phrases, scores = owners(probabilities, prompt, self.config.box_threshold, self.config.text_threshold)
            middle, half = centres[kept, :2], centres[kept, 2:] / 2
            corners = np.concatenate([middle - half, middle + half], axis=1).clip(0, 1)
            there = np.flatnonzero((corners[:, 2:] > corners[:, :2]).all(axis=1))
            chosen = there[self._apart(corners[there], scores[there], phrases[there])]
            out.append([(float(scores[i]), int(phrases[i]), corners[i].tolist()) for i in chosen])
        return out

    def _apart(self, corners: np.ndarray, scores: np.ndarray, phrases: np.ndarray) -> np.ndarray:
        """Which boxes stay after non-maximum suppression within each phrase; all, where it is off."""
        if self.config.nms is None:
            return np.arange(len(scores))
        import torch
        from torchvision.ops import batched_nms

        given = (torch.from_numpy(a) for a in (corners, scores, phrases))
        return batched_nms(*given, self.config.nms).numpy()


def _text(value: Any) -> str:
    """A phrase from a column's value: a string, or a struct that has a `text`."""
    return str((value.get("text") if isinstance(value, dict) else value) or "")


def _row(boxes: list[tuple[float, int, list[float]]], phrases: list[str]) -> dict[str, Any]:
    return {
        "boxes": [corners for _, _, corners in boxes],
        "phrases": [phrases[index] for _, index, _ in boxes],
        "scores": [score for score, _, _ in boxes],
        "phrase_index": [index for _, index, _ in boxes],
    }
