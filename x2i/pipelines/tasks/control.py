"""`control`: a map of the picture is the input and the picture the output, or the other way round.

The recipes are those of MultiGen-20M (UniControl, arXiv 2305.11147) and ControlNet (arXiv 2302.05543); see `_maps`. What
is drawn at random comes from the image's id, and lies in the sample. Maps are PNGs as large as the stored picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from x2i.corpus.sample import Picture, Sample
from x2i.pipelines.annotators._palette import paint, palette
from x2i.pipelines.boxes import pixel_box
from x2i.pipelines.ranges import Whole, whole
from x2i.pipelines.tasks import _maps
from x2i.pipelines.tasks._captions import sentence
from x2i.pipelines.tasks._instructions import Instructions
from x2i.pipelines.tasks.base import Selected, Skipped, Task, TaskConfig, caption, holds_placeholder, picture_of

#: The maps, each with what a wording may say besides {image} and {text}.
KINDS: dict[str, tuple[str, ...]] = {
    "canny": ("low", "high"),
    "hed": (),
    "soft_edges": (),
    "sketch": (),
    "depth": (),
    "normals": (),
    "skeleton": (),
    "boxes": ("boxes",),
    "semantic": ("classes",),
}
TaskType = Literal[
    "canny_to_image", "image_to_canny", "hed_to_image", "image_to_hed", "soft_edges_to_image", "image_to_soft_edges",
    "sketch_to_image", "image_to_sketch", "depth_to_image", "image_to_depth", "normals_to_image", "image_to_normals",
    "skeleton_to_image", "image_to_skeleton", "boxes_to_image", "image_to_boxes", "semantic_to_image",
    "image_to_semantic",
]  # fmt: skip
#: By map: the key that names the annotator, the columns that are read, and what a recipe should have.
READS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "hed": ("hed", ("map",), "{kind: edges, model: hed}"),
    "sketch": ("hed", ("map",), "{kind: edges, model: hed}"),
    "soft_edges": ("soft_edges", ("map",), "{kind: edges, model: pidinet}"),
    "depth": ("depth", ("map", "minimum", "maximum", "near_is"), "{kind: depth}"),
    "normals": ("depth", ("map", "minimum", "maximum", "near_is"), "{kind: depth}"),
    "skeleton": ("pose", ("people", "layout"), "{kind: pose}"),
    "boxes": ("boxes", ("boxes", "phrases"), "{kind: grounding}"),
    "semantic": ("semantic", ("map", "palette", "labels"), "{kind: semantic}"),
}
_RETRIES = 5  # of a sketch that is too empty


class ControlConfig(TaskConfig):
    """Which maps and directions, the annotators that they come from, and the recipes' parameters."""

    tasks: tuple[TaskType, ...] = Field(
        ("canny_to_image",), min_length=1, description="the tasks to make, e.g. [canny_to_image, image_to_canny]"
    )
    text: str = Field("rows.text", description="column of the caption, e.g. caption.long")
    empty_text: float = Field(
        0.0, ge=0, le=1, description="share of the samples whose instruction has no caption, e.g. 0.3 as in MultiGen"
    )
    wording: Literal["own", "multigen"] = Field(
        "own", description="whose phrases, e.g. multigen: those that MultiGen published (instructions/multigen.yaml)"
    )
    hed: str = Field("hed", description="annotator (`edges`) whose `map` hed and sketch are made of, e.g. edges")
    soft_edges: str = Field("edges", description="annotator (`edges`) of soft edges, e.g. edges")
    depth: str = Field("depth", description="annotator of depth maps and normals, e.g. depth")
    pose: str = Field("pose", description="annotator whose `people` are drawn as skeletons, e.g. pose")
    boxes: str = Field("grounding", description="annotator whose `boxes` are painted by `phrases`, e.g. grounding")
    semantic: str = Field("semantic", description="annotator whose class `map` is painted, e.g. semantic")
    low: Whole = Field(
        (50, 120), description="range of Canny's lower threshold (L1 gradient of 8-bit luma), e.g. [50, 120]"
    )
    high: Whole = Field((130, 250), description="range of the upper one, e.g. [130, 250]")
    min_edges: float = Field(
        0.002, ge=0, lt=1, description="edge maps with a smaller share (canny) or mean make no sample, e.g. 0.002"
    )
    sketch: Whole = Field((110, 160), description="range of the threshold on HED, of 255, e.g. [110, 160]")
    min_dark: float = Field(0.005, ge=0, lt=1, description="emptier sketches are drawn again, 5 times, e.g. 0.005")
    normal_z: float = Field(
        0.2 * math.pi, gt=0, description="z before normals are made unit, e.g. 0.628 (MultiGen) or 6.28 (ControlNet)"
    )
    background: float = Field(
        0.02, ge=0, lt=1, description="stretched depth below which normals face us, e.g. 0.02 or 0.1 (ControlNet)"
    )
    max_box: float = Field(
        0.95, gt=0, le=1, description="boxes with a larger share of the picture are left out, e.g. 0.95"
    )

    @field_validator("hed", "soft_edges", "depth", "pose", "boxes", "semantic")
    @classmethod
    def _annotator(cls, value: str) -> str:
        return value.partition(".")[0]  # a column of it names it, too

    @model_validator(mode="after")
    def _thresholds(self) -> ControlConfig:
        if self.low[1] > self.high[0]:
            raise ValueError(f"low must end before high begins, but {self.low[1]} is more than {self.high[0]}")
        return self


class Map:
    """A control map: uint8 [height, width(, 3)], its parameters, and words for the instruction."""

    def __init__(self, pixels: np.ndarray, parameters: dict[str, Any] | None = None, **words: str) -> None:
        self.picture: Picture = picture_of(pixels)
        self.parameters = parameters or {}
        self.words = words


class Control(Task):
    """`MAP_to_image` with the caption in the instruction, and `image_to_MAP`; both have the same map."""

    name = "control"
    Config = ControlConfig
    config: ControlConfig
    words: ClassVar = {
        key: words
        for kind, said in KINDS.items()
        for key, words in (
            (f"{kind}_to_image", ("image", "text", *said)),
            (f"{kind}_to_image.bare", ("image", *said)),
            (f"image_to_{kind}", ("image", *said)),
        )
    }

    def __init__(self, config: ControlConfig) -> None:
        super().__init__(config)
        if config.wording != "own" and config.instructions is None:
            self.instructions = Instructions(self.words, None, config.wording)

    def task_types(self) -> list[str]:
        return list(self.config.tasks)

    @property
    def reads(self) -> Mapping[str, str]:
        out: dict[str, str] = {}
        for task_type in self.config.tasks:
            if _kind(task_type) in READS:
                key, columns, remedy = READS[_kind(task_type)]
                name = getattr(self.config, key)
                out |= {f"{name}.{column}": f"{name}: {remedy}" for column in columns}
        name = self.config.text.partition(".")[0]
        if name != "rows" and any(t.endswith("_to_image") for t in self.config.tasks):
            out[self.config.text] = f"{name}: {{kind: caption}}"
        return out

    def build(self, row: Selected) -> Iterator[Sample | Skipped]:
        made: dict[str, Map | str] = {}
        text = caption(row, self.config.text)
        for task_type in self.config.tasks:
            kind = _kind(task_type)
            forward = task_type.endswith("_to_image")
            if forward and holds_placeholder(text):
                yield Skipped(task_type, "text_has_placeholders")
                continue
            if kind not in made:
                made[kind] = self._map(kind, row)
            map_ = made[kind]
            if isinstance(map_, str):
                yield Skipped(task_type, map_)
                continue
            rng = row.generator(f"{task_type}/words")
            if not forward:
                instruction = self.instructions.draw(task_type, rng, **map_.words)
                yield row.sample(task_type, instruction, [row.picture], map_.parameters, output=map_.picture)
                continue
            bare = text is None or rng.random() < self.config.empty_text
            key = f"{task_type}.bare" if bare else task_type
            # our wordings may go on after the caption, the published ones never do
            said = sentence(text or "") if self.config.wording == "own" else text or ""
            instruction = self.instructions.draw(key, rng, text=said, **map_.words)
            yield row.sample(task_type, instruction, [map_.picture], map_.parameters)

    def _map(self, kind: str, row: Selected) -> Map | str:
        """A map of the picture, or why there is none. Both directions draw the same parameters."""
        draw: Callable[[Selected, np.random.Generator], Map | str] = getattr(self, f"_{kind}")
        for column in READS[kind][1] if kind in READS else ():
            if row.value(f"{getattr(self.config, READS[kind][0])}.{column}") is None:
                return "not_annotated"
        return draw(row, row.generator(f"{kind}_to_image"))

    def _value(self, kind: str, column: str, row: Selected) -> Any:
        return row.value(f"{getattr(self.config, READS[kind][0])}.{column}")

    def _canny(self, row: Selected, rng: np.random.Generator) -> Map | str:
        low, high = whole(rng, self.config.low), whole(rng, self.config.high)
        edges = _maps.canny(row.pixels, low, high)
        if (edges > 0).mean() < self.config.min_edges:
            return "too_few_edges"
        return Map(edges, {"low": low, "high": high}, low=str(low), high=str(high))

    def _hed(self, row: Selected, rng: np.random.Generator, kind: str = "hed") -> Map | str:
        edges = _maps.sized(_maps.stored(self._value(kind, "map", row)), row.size)
        return Map(edges) if edges.mean() >= 255 * self.config.min_edges else "too_few_edges"

    def _soft_edges(self, row: Selected, rng: np.random.Generator) -> Map | str:
        return self._hed(row, rng, "soft_edges")

    def _sketch(self, row: Selected, rng: np.random.Generator) -> Map | str:
        edges = _maps.sized(_maps.stored(self._value("sketch", "map", row)), row.size)
        for _ in range(1 + _RETRIES):
            threshold = whole(rng, self.config.sketch)
            if (edges >= threshold).mean() > self.config.min_dark:
                return Map(_maps.sketch(edges, threshold), {"threshold": threshold})
        return "too_few_edges"

    def _inverse_depth(self, row: Selected) -> np.ndarray | None:
        """As the annotator found it, float32 at the map's size; None where all is equally far."""
        values = {c: self._value("depth", c, row) for c in READS["depth"][1]}
        if values["minimum"] >= values["maximum"]:
            return None
        return _maps.inverse_depth(_maps.stored(values["map"]), values["minimum"], values["maximum"], values["near_is"])

    def _depth(self, row: Selected, rng: np.random.Generator) -> Map | str:
        inverse = self._inverse_depth(row)
        return "flat_depth" if inverse is None else Map(_maps.depth(_maps.sized(inverse, row.size)))

    def _normals(self, row: Selected, rng: np.random.Generator) -> Map | str:
        inverse = self._inverse_depth(row)
        if inverse is None:
            return "flat_depth"
        z, background = self.config.normal_z, self.config.background
        return Map(_maps.normals(inverse, z, background, row.size), {"z": z, "background": background})

    def _skeleton(self, row: Selected, rng: np.random.Generator) -> Map | str:
        layout = self._value("skeleton", "layout", row)
        people = [_maps.joints(person, layout) for person in self._value("skeleton", "people", row)]
        return Map(_maps.skeletons(people, row.size), {"people": len(people)}) if people else "no_people"

    def _boxes(self, row: Selected, rng: np.random.Generator) -> Map | str:
        phrases, boxes = (self._value("boxes", c, row) for c in ("phrases", "boxes"))
        fits = [i for i, b in enumerate(boxes) if (b[2] - b[0]) * (b[3] - b[1]) <= self.config.max_box]
        phrases, boxes = [phrases[i] for i in fits], [boxes[i] for i in fits]
        if not boxes:
            return "no_boxes"
        if any(holds_placeholder(p) for p in phrases):
            return "text_has_placeholders"
        by_phrase = _maps.phrase_colours(phrases)
        drawn = _maps.painted_boxes(boxes, [by_phrase[p] for p in phrases], row.size)
        places = [list(pixel_box(b, row.size)) for b in boxes]
        colours = {p: _maps.hex_colour(by_phrase[p]) for p in dict.fromkeys(phrases)}
        parameters = {"boxes": places, "phrases": phrases, "colours": colours}
        return Map(drawn, parameters, boxes=_listed(colours))

    def _semantic(self, row: Selected, rng: np.random.Generator) -> Map | str:
        labels = _maps.sized(_maps.stored(self._value("semantic", "map", row)), row.size, labels=True)
        if labels.min() == labels.max():
            return "one_class"
        name = self._value("semantic", "palette", row)
        table = palette(name, int(labels.max()) + 1)
        there = [c for c in self._value("semantic", "labels", row) if c["id"] < len(table)]
        colours = {c["name"]: _maps.hex_colour(table[c["id"]].tolist()) for c in there}
        return Map(paint(labels, name), {"palette": name, "colours": colours}, classes=_listed(colours))


def _kind(task_type: str) -> str:
    return task_type.removesuffix("_to_image").removeprefix("image_to_")


def _listed(colours: Mapping[str, str]) -> str:
    return ", ".join(f"{what} ({colour})" for what, colour in colours.items())
