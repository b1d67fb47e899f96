"""`subject`: what is cut out of a picture is the input, the picture the output (GRIT-Entity of X2I).

OmniGen (arXiv 2409.11340, section 3) took GRIT's noun phrases, boxes by Grounding DINO and masks by SAM, and had
MS-Diffusion repaint the cut-outs, so that copying them does not pay; here `repaint` does that. Up to four subjects a
sample, as in MS-Diffusion.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from x2i.base.errors import RecipeError
from x2i.corpus.sample import Picture, Sample, placeholder
from x2i.pipelines.boxes import area, edges
from x2i.pipelines.images import decode, read_header
from x2i.pipelines.masks import bounded, cut_out
from x2i.pipelines.ranges import Shares
from x2i.pipelines.regions import VAGUE, Region, alike, apart, is_vague
from x2i.pipelines.tasks import _spans
from x2i.pipelines.tasks._captions import sentence
from x2i.pipelines.tasks._nouns import inside
from x2i.pipelines.tasks._regions import regions, told
from x2i.pipelines.tasks.base import Selected, Skipped, Task, TaskConfig, holds_placeholder, picture_of

Kind = Literal["subject_to_image", "subjects_to_image"]
#: Annotators of boxes that a recipe may lack.
_BOXES = ("faces", "grounding", "pose", "regions")


class SubjectConfig(TaskConfig):
    """What is cut out, which of it is fit, and how the instruction speaks of it."""

    tasks: tuple[Kind, ...] = Field(
        ("subject_to_image", "subjects_to_image"),
        min_length=1,
        description="the tasks to make, e.g. [subject_to_image]",
    )
    boxes: str = Field(
        "grounding.boxes",
        description="column of boxes, with `scores` and `phrases` beside it, e.g. rows.meta.noun_chunks (GRIT's own), or "
        "with `name`, and needing no model hub, faces.boxes or pose.people",
    )
    name: str | None = Field(None, description="what all boxes hold where there are no `phrases`, e.g. a person")
    masks: str | None = Field(
        "masks", description="annotator (`masks`) of those boxes' masks; null: rectangles are cut out, not objects"
    )
    text: str = Field("rows.text", description="column of the caption that the phrases are from, e.g. caption.long")
    spans: str | None = Field(
        None,
        description="column of phrases with `start` and `end`, which the boxes' `phrase_index` counts, e.g. "
        "entities.noun_chunks; null: a phrase is looked for in the caption",
    )
    repaint: str | None = Field(
        None, description="column of repainted cut-outs, one a box; others make no sample, e.g. repaint.images"
    )
    min_score: float = Field(0.4, ge=0, le=1, description="boxes that are less sure are not cut out, e.g. 0.65")
    area: Shares = Field((0.02, 0.7), description="share of the picture that a subject's box may have")
    of_largest: float = Field(
        0.4,
        ge=0,
        le=1,
        description="with `name`: least area of a box, as a share of the largest one's; a caption rarely means passers-by",
    )
    max_edges: int = Field(2, ge=0, le=4, description="edges of the picture that a box may touch, e.g. 1")
    min_iou: float = Field(0.8, ge=0, le=1, description="masks of less predicted IoU are not cut out, e.g. 0.9")
    nested: float = Field(
        0.6, ge=0, le=1, description="share of the smaller box that two subjects of a sample may have in common"
    )
    max_subjects: int = Field(4, ge=2, le=9, description="subjects in a sample of several, e.g. 4 as in MS-Diffusion")
    most: int = Field(1, ge=1, description="samples of one subject that a row may have, e.g. 3")
    margin: float = Field(
        0.05, ge=0, le=3, description="room around a cut-out, as a share of its longer side, e.g. 0.6 around faces"
    )
    side: int = Field(512, ge=16, description="pixels of a cut-out's longer side at most, e.g. 512")
    min_side: int = Field(48, ge=1, description="pixels of the longer side that a cut-out must have, e.g. 96")
    flip: float = Field(
        0.0, ge=0, le=1, description="share of the cut-outs that are mirrored, against copying, e.g. 0.5"
    )
    in_caption: float = Field(
        0.7,
        ge=0,
        le=1,
        description="share of the samples where pictures stand in the caption in place of their phrases, if they have any",
    )
    unwanted: tuple[str, ...] = Field(
        VAGUE, description="last words of phrases that are not cut out: pronouns and the like, e.g. [it, photo]"
    )

    @field_validator("masks")
    @classmethod
    def _annotator(cls, value: str | None) -> str | None:
        return value.partition(".")[0] if value else None  # a column of it names it, too

    @model_validator(mode="after")
    def _fits(self) -> SubjectConfig:
        if "." not in self.boxes:
            raise ValueError(f"boxes: {self.boxes!r} is no column (annotator.column), e.g. {self.boxes}.boxes")
        if self.repaint is not None and "." not in self.repaint:
            raise ValueError(f"repaint: {self.repaint!r} is no column (annotator.column), e.g. {self.repaint}.images")
        if self.boxes.startswith("rows.") and self.spans is not None:
            raise ValueError("spans: boxes of the source bring their own")
        return self


@dataclass(frozen=True)
class Cut:
    """A subject and its picture."""

    region: Region
    picture: Picture
    flipped: bool


class Subject(Task):
    """One subject a sample, or several.

    The instruction is the caption with pictures in place of the phrases that their subjects have there, or one that
    names the subjects and then has the caption. A phrase must have one box: of several it is not known which is meant.
    Cut-outs with a mask are PNGs on white; rectangles and repainted ones are JPEGs.
    """

    name = "subject"
    Config = SubjectConfig
    config: SubjectConfig
    words: ClassVar = {
        "in_caption": ("text",),
        "place": ("image", "object"),
        "beside": ("text", "subjects"),
        "listed": ("image", "object"),
    }

    def __init__(self, config: SubjectConfig) -> None:
        super().__init__(config)
        for key, words in {"in_caption": ("text",), "beside": ("text", "subjects")}.items():
            for said in self.instructions.texts[key]:
                lacking = [w for w in words if f"{{{w}}}" not in said]
                if lacking:  # without the subjects' pictures in it, it would be no instruction for them
                    where = config.instructions or "instructions/subject.yaml"
                    raise RecipeError(f"{where}: {key}: {said!r} lacks {{{', '.join(lacking)}}}")

    def task_types(self) -> list[str]:
        return list(self.config.tasks)

    @property
    def reads(self) -> Mapping[str, str]:
        config, out = self.config, dict[str, str]()
        name, _, column = config.boxes.partition(".")
        if name != "rows":
            kind = name if name in _BOXES else "grounding" if config.name is None else "faces"
            columns = [
                column,
                *(["scores"] if column == "boxes" else []),
                *(["phrases"] if config.name is None else []),
            ]
            columns += ["phrase_index"] if config.spans else []
            out |= {f"{name}.{c}": f"{name}: {{kind: {kind}}}" for c in columns}
        if config.masks is not None:
            remedy = f"{config.masks}: {{kind: masks, boxes: {config.boxes}}}"
            out |= {f"{config.masks}.{c}": remedy for c in ("masks", "box_index", "predicted_iou")}
        for read, kind in ((config.text, "caption"), (config.spans, "entities"), (config.repaint, "repaint")):
            if read is not None and not read.startswith("rows."):
                name = read.partition(".")[0]
                out[read] = f"{name}: {{kind: {name if name in _BOXES else kind}}}"
        return out

    def build(self, row: Selected) -> Iterator[Sample | Skipped]:
        found = self._found(row)
        for task_type in self.config.tasks:
            if isinstance(found, str):
                yield Skipped(task_type, found)
            elif task_type == "subject_to_image":
                yield from self._single(row, found)
            else:
                yield self._several(row, found)

    def _single(self, row: Selected, found: list[Region]) -> Iterator[Sample | Skipped]:
        rng = row.generator("subject_to_image")
        made, reason = 0, ""
        for number in rng.permutation(len(found)):
            cut = self._cut(row, found[number], rng)
            if isinstance(cut, str):
                reason = cut
                continue
            yield self._sample("subject_to_image", row, [cut], rng)
            made += 1
            if made == self.config.most:
                break
        if not made:
            yield Skipped("subject_to_image", reason)

    def _several(self, row: Selected, found: list[Region]) -> Sample | Skipped:
        rng = row.generator("subjects_to_image")
        cuts: list[Cut] = []
        for region in apart(found, self.config.nested):
            cut = self._cut(row, region, rng)
            if isinstance(cut, Cut):
                cuts.append(cut)
            if len(cuts) == self.config.max_subjects:
                break
        if len(cuts) < 2:
            return Skipped("subjects_to_image", "one_subject")
        # as the caption names them, so that pictures are numbered as they are read
        cuts.sort(key=lambda c: (c.region.span or (1 << 30, 0), c.region.index))
        return self._sample("subjects_to_image", row, cuts, rng)

    def _found(self, row: Selected) -> list[Region] | str:
        """The subjects that are fit; or the reason that stopped the one that got furthest."""
        config = self.config
        text = self._text(row)
        if text is None:
            return "no_text"
        if holds_placeholder(text):
            return "text_has_placeholders"
        own = row.meta.get("caption") if config.boxes.startswith("rows.") else None
        found = regions(row, config.boxes, config.name, config.masks, own if isinstance(own, str) else text)
        if found is None:
            return "not_annotated"
        if not found:
            return "no_box"
        sure = [r for r in found if r.score >= config.min_score]
        if config.name is not None:
            least = config.of_largest * max((area(r.box) for r in sure), default=0.0)
            sure = [r for r in sure if area(r.box) >= least]
        # a box in another of the same phrase is the same thing found twice
        by_phrase = alike(sure, _phrase)
        alone = {p for p, members in by_phrase.items() if len(apart(members, 0.8)) == 1}
        reasons: list[tuple[int, str]] = []
        out = []
        for region in sure if config.name is not None else _best(by_phrase):
            several = config.name is None and _phrase(region) not in alone
            step, reason = self._unfit(region, several)
            if reason is None:
                out.append(region)
            else:
                reasons.append((step, reason))
        if not out:
            return max(reasons)[1] if reasons else "unsure_box"
        kept = own is None or own == text  # else the spans are of another text
        return [replace(r, span=(r.span if kept else None) or self._span(row, text, r)) for r in out]

    def _unfit(self, region: Region, several: bool) -> tuple[int, str | None]:
        """Why a region makes no subject, with the number of the rule."""
        config = self.config
        vague = config.name is None and is_vague(region.phrase, config.unwanted)
        rules = [
            ("vague_phrase", vague or holds_placeholder(region.phrase)),
            ("several_boxes", several),
            ("too_small", area(region.box) < config.area[0]),
            ("too_large", area(region.box) > config.area[1]),
            ("at_the_edge", edges(region.box) > config.max_edges),
            ("no_mask", config.masks is not None and not region.masked),
            ("poor_mask", config.masks is not None and (region.quality or 0.0) < config.min_iou),
        ]
        return next(((i, reason) for i, (reason, holds) in enumerate(rules) if holds), (len(rules), None))

    def _text(self, row: Selected) -> str | None:
        """The caption as it came, for spans count its characters; GRIT's are those of its own."""
        text = told(row, self.config.text)
        if self.config.boxes.startswith("rows.") and self.config.text == "rows.text":
            text = row.meta.get("caption", text)
        return text if isinstance(text, str) and text.strip() else None

    def _span(self, row: Selected, text: str, region: Region) -> tuple[int, int] | None:
        """Where the caption has a subject's phrase: as the column of spans says, or where it stands alone."""
        if self.config.name is not None:
            return None
        if self.config.spans is not None:
            said = told(row, self.config.spans)
            places = row.value(f"{self.config.boxes.rpartition('.')[0]}.phrase_index")
            if said and places:
                span = said[places[region.number]]
                start, end = int(span["start"]), int(span["end"])
                if text[start:end].strip() == region.phrase:
                    return start, end
        return _spans.only(text, region.phrase)

    def _cut(self, row: Selected, region: Region, rng: np.random.Generator) -> Cut | str:
        config = self.config
        flipped = bool(rng.random() < config.flip)
        if config.repaint is not None:
            images = row.value(config.repaint)
            data = images[region.number] if images is not None and region.number < len(images) else None
            if data is None:
                return "not_repainted"
            pixels = decode(data, read_header(data))
        else:
            mask = region.mask if region.masked else None
            cut = cut_out(row.pixels, region.box, mask, config.margin)
            if cut is None:
                return "empty_mask"
            pixels = cut[0]
            if mask is None and pixels.size > config.area[1] * row.pixels.size:
                return "too_large"  # with its margin the rectangle is nearly the picture
        if max(pixels.shape[:2]) < config.min_side:
            return "too_few_pixels"
        pixels = bounded(pixels, config.side)
        exact = config.masks is not None and config.repaint is None
        drawn = np.ascontiguousarray(pixels[:, ::-1]) if flipped else pixels
        return Cut(region, picture_of(drawn, "png" if exact else "jpg"), flipped)

    def _sample(self, task_type: str, row: Selected, cuts: Sequence[Cut], rng: np.random.Generator) -> Sample:
        text = self._text(row) or ""
        spans = [c.region.span for c in cuts if c.region.span is not None]
        replaces = bool(rng.random() < self.config.in_caption)
        there = replaces and len(spans) == len(cuts) and _spans.disjoint(spans)
        if there:
            shown = [self._placed("place", n, rng, text[start:end]) for n, (start, end) in enumerate(spans, 1)]
            said = sentence(_spans.replaced(text, spans, shown).strip())
            instruction = self.instructions.draw("in_caption", rng, text=said)
        else:
            listed = _listed([self._placed("listed", n, rng, inside(c.region.phrase)) for n, c in enumerate(cuts, 1)])
            instruction = self.instructions.draw("beside", rng, text=sentence(text.strip()), subjects=listed)
        parameters: dict[str, Any] = {
            "subjects": [_noted(c) for c in cuts],
            "in_caption": there,
            "masked": self.config.masks is not None,
            "repainted": self.config.repaint is not None,
        }
        variant = "" if task_type == "subjects_to_image" else f"box {cuts[0].region.number}"
        return row.sample(task_type, instruction, [c.picture for c in cuts], parameters, variant=variant)

    def _placed(self, key: str, number: int, rng: np.random.Generator, phrase: str) -> str:
        return self.instructions.draw(key, rng, object=phrase).replace(placeholder(1), placeholder(number))


def _phrase(region: Region) -> object:
    """What two boxes of one phrase share: its characters, or its words where those are not known."""
    return region.span or region.phrase.casefold()


def _best(by_phrase: Mapping[object, list[Region]]) -> list[Region]:
    """The surest box of each phrase."""
    return [min(members, key=lambda r: (-r.score, r.index)) for members in by_phrase.values()]


def _noted(cut: Cut) -> dict[str, Any]:
    region = cut.region
    box = [round(v, 4) for v in region.box]
    noted = {"object": region.phrase, "box": box, "box_index": region.number, "score": round(region.score, 4)}
    return noted | ({"flipped": True} if cut.flipped else {})


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
