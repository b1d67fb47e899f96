"""`editing`: pairs of pictures and what was changed between them, made here of single photographs.

Wherever the real photograph can be the answer it is: an object that was erased is added, a thing that was recoloured
gets its colour back, a drawing becomes the photograph that it was made of. Samples of a local edit have a mask of what
changed; outside it, input and output have the same pixels, exactly. (Published pairs come by importers and `published`.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, get_args

import numpy as np

from x2i.base.errors import RecipeError
from x2i.corpus.sample import Picture, Sample
from x2i.pipelines.ranges import real
from x2i.pipelines.regions import Region
from x2i.pipelines.tasks import _backgrounds, _maps, _recolour
from x2i.pipelines.tasks._captions import sentence
from x2i.pipelines.tasks._masks import mask_of, place_of, solid
from x2i.pipelines.tasks._neighbours import neighbours
from x2i.pipelines.tasks._nouns import bare, definite, indefinite
from x2i.pipelines.tasks._scene import Edit, EditingConfig, Kind, Scene
from x2i.pipelines.tasks._styles import STYLES
from x2i.pipelines.tasks.base import (
    Group,
    Selected,
    Skipped,
    Task,
    caption,
    holds_placeholder,
    picture_of,
)

if TYPE_CHECKING:
    import duckdb

#: Those that need the picture of another row, the masks of a subject, and the masks of any thing.
GROUPED = ("background_swap", "background_return")
OF_SUBJECTS = (*GROUPED, "background_plain", "background_scene", "background_blur", "background_focus")
#: Names of colours that hue alone can bring about and take away.
_COLOURS = tuple(_recolour.HUES)


class Editing(Task):
    """One sample per row and edit. Pictures with a mask are PNGs where x2i made them, styled ones JPEGs of quality 95."""

    name = "editing"
    Config = EditingConfig
    config: EditingConfig
    words: ClassVar = {
        "style": ("image", "style"),
        "unstyle": ("image", "style"),
        **{f"name.{style}": () for style in STYLES},
        "remove_object": ("image", "object"),
        "add_object": ("image", "object", "place"),
        **{f"place.{place}": () for place in ("left", "right", "top", "bottom", "middle")},
        "recolour": ("image", "object", "before", "colour"),
        "recolour_all": ("image", "before", "colour"),
        "background_plain": ("image", "object", "background"),
        "background_scene": ("image", "text"),
        "background_blur": ("image", "object"),
        "background_focus": ("image", "object"),
        "background_swap": ("image_1", "image_2", "object"),
        "background_return": ("image_1", "image_2", "object"),
        "background.solid": ("colour",),
        "background.across": ("colour", "other"),
        "background.down": ("colour", "other"),
    }

    def __init__(self, config: EditingConfig) -> None:
        super().__init__(config)
        unknown = sorted(set(config.styles) - STYLES.keys())
        if unknown:
            raise RecipeError(f"tasks.editing.styles: no style {unknown[0]!r}; there are {', '.join(STYLES)}")

    def task_types(self) -> list[str]:
        return list(self.config.tasks)

    @property
    def reads(self) -> Mapping[str, str]:
        config, wanted, out = self.config, set(self.config.tasks), dict[str, str]()
        if wanted & {"remove_object", "add_object"}:
            remedy = f"{config.erase}: {{kind: erase, boxes: grounding.boxes, masks: masks.masks}}"
            out |= {f"{config.erase}.{c}": remedy for c in ("image", "mask", "status", "phrase", "area", "by")}
        subjects = bool(wanted & set(OF_SUBJECTS))
        if "recolour" in wanted or (subjects and config.semantic is None):
            remedy = f"{config.masks}: {{kind: masks, boxes: grounding.boxes}}"
            out |= {f"{config.masks}.{c}": remedy for c in ("masks", "box_index")}
            out[config.phrases] = f"{config.phrases.partition('.')[0]}: {{kind: grounding}}"
        if subjects and config.semantic is not None:
            out |= {f"{config.semantic}.{c}": f"{config.semantic}: {{kind: semantic}}" for c in ("map", "labels")}
        if "background_scene" in wanted and not config.text.startswith("rows."):
            out[config.text] = f"{config.text.partition('.')[0]}: {{kind: caption}}"
        return out

    def of_groups(self) -> list[str]:
        return [kind for kind in GROUPED if kind in self.config.tasks]

    def groups(self, connection: duckdb.DuckDBPyConnection, seed: int) -> Iterable[Group]:
        for kind in GROUPED:
            if kind not in self.config.tasks:
                continue
            for anchor, other in neighbours(connection, f"editing/1 {seed} {kind} ", self.config.share):
                yield Group(anchor, kind, (other,))

    def build(self, row: Selected) -> Iterator[Sample | Skipped]:
        scene = Scene(row, self.config)
        for kind in self.config.tasks:
            rng = row.generator(kind)
            if kind in GROUPED:
                made = self._grouped(kind, scene, rng)
            else:
                edit: Callable[[Scene, np.random.Generator], Edit | str] = getattr(self, f"_{kind}")
                made = edit(scene, rng)
            if isinstance(made, Edit) and made.mask is not None and made.mask.mean() < self.config.min_changed:
                made = "nothing_changed"
            if isinstance(made, str):
                yield Skipped(kind, made)
                continue
            instruction = self.instructions.draw(kind, rng, **made.words)
            instruction = instruction[:1].upper() + instruction[1:]  # a wording may begin with an object
            yield row.sample(
                kind,
                instruction,
                made.inputs,
                made.parameters,
                output=made.output,
                mask=None if made.mask is None else mask_of(made.mask),
                others=made.others,
            )

    def _edited(self, scene: Scene, after: np.ndarray, region: np.ndarray) -> tuple[Picture, np.ndarray]:
        """A changed copy of the row's picture, exactly the same outside the mask of what changed; and that mask.

        Args:
            region: bool [height, width], outside which nothing may have changed.
        """
        original = scene.row.pixels
        difference = np.abs(after.astype(np.int16) - original).max(axis=2)
        mask = region & solid(difference > self.config.changed)
        return picture_of(np.where(mask[..., None], after, original)), mask

    # whole pictures

    def _style(self, scene: Scene, rng: np.random.Generator) -> Edit | str:
        from x2i.pipelines.annotators.quality import colourfulness

        pixels = scene.row.pixels
        grey = colourfulness(pixels) < 8  # Hasler's M3, as in restoration
        names = [n for n in self.config.styles if not (grey and STYLES[n].colour)]
        if not names:
            return "already_grey"
        name = names[int(rng.integers(len(names)))]
        parameters = STYLES[name].parameters(rng)
        after = STYLES[name].apply(pixels, **parameters)
        if np.abs(after.astype(np.int16) - pixels).mean() <= self.config.changed:
            return "nothing_changed"
        words = {"style": self.instructions.draw(f"name.{name}", rng)}
        return Edit(words, [scene.row.picture], {"style": name} | parameters, output=picture_of(after, "jpg"))

    def _unstyle(self, scene: Scene, rng: np.random.Generator) -> Edit | str:
        return _back(self._style(scene, rng))

    def _recolour_all(self, scene: Scene, rng: np.random.Generator) -> Edit | str:
        made = _recolour.everywhere(scene.row.pixels, self.config.everywhere, [int(i) for i in rng.permutation(99)])
        if made is None:
            return "no_clear_colour"
        picture, mask = self._edited(scene, made.pixels, made.where)
        words = {"before": made.target, "colour": made.name}
        parameters = {"from": made.target, "to": made.name, "degrees": made.degrees, "share": made.share}
        return Edit(words, [picture], parameters, mask=mask)

    # objects

    def _remove_object(self, scene: Scene, rng: np.random.Generator) -> Edit | str:
        row, name = scene.row, self.config.erase
        status = row.value(f"{name}.status")
        if status != "erased":
            return status or "not_annotated"
        phrase = row.value(f"{name}.phrase")
        if holds_placeholder(phrase) or not bare(phrase):
            return "text_has_placeholders"
        image = np.ascontiguousarray(_maps.stored(row.value(f"{name}.image"))[..., ::-1])
        hole = _maps.sized(_maps.stored(row.value(f"{name}.mask")), scene.size, labels=True) > 0
        picture, mask = self._edited(scene, _maps.sized(image, scene.size), hole)
        area = round(float(row.value(f"{name}.area")), 4)
        parameters = {"object": phrase, "area": area, "by": row.value(f"{name}.by")}
        return Edit({"object": definite(phrase)}, [row.picture], parameters, output=picture, mask=mask)

    def _add_object(self, scene: Scene, rng: np.random.Generator) -> Edit | str:
        made = self._remove_object(scene, rng)
        if isinstance(made, str):
            return made
        if made.mask is None or not made.mask.any():
            return "nothing_changed"
        place = place_of(made.mask)
        words = {
            "object": indefinite(made.parameters["object"]),
            "place": self.instructions.draw(f"place.{place}", rng),
        }
        return _back(replace(made, parameters=made.parameters | {"place": place}), words)

    def _recolour(self, scene: Scene, rng: np.random.Generator) -> Edit | str:
        if scene.things is None:
            return "not_annotated"
        least, most = self.config.object
        fits = [t for t in scene.things if least <= t.share <= most]
        reason = "no_coloured_object" if fits else "no_fitting_object"
        for i in rng.permutation(len(fits)):
            thing = fits[i]
            name, share = _recolour.dominant(scene.row.pixels, thing.mask)
            noun, said = _recolour.coloured_words(bare(thing.phrase))
            if name in _recolour.COLOURLESS or share < self.config.colour or not noun:
                continue
            if said and name not in said:
                reason = "colour_disagrees"  # the caption calls it something else
                continue
            for target in (_COLOURS[j] for j in rng.permutation(len(_COLOURS))):
                made = _recolour.turned(scene.row.pixels, thing.mask, name, target, self.config.colour)
                if target == name or made is None:
                    continue
                if _recolour.dominant(made.pixels, thing.mask)[0] != target:
                    continue
                picture, mask = self._edited(scene, made.pixels, thing.mask)
                words = {"object": definite(noun), "before": target, "colour": name}
                parameters = {"object": thing.phrase, "from": target, "to": name, "degrees": made.degrees}
                return Edit(words, [picture], parameters | {"share": made.share}, mask=mask)
            reason = "no_true_colour"
        return reason

    # backgrounds

    def _background_plain(self, scene: Scene, rng: np.random.Generator) -> Edit | str:
        subject = scene.subject
        if isinstance(subject, str):
            return subject
        drawn = [list(_backgrounds.PLAIN)[int(i)] for i in rng.permutation(len(_backgrounds.PLAIN))[:2]]
        kind = "solid" if rng.random() >= self.config.gradient else ("across", "down")[int(rng.integers(2))]
        drawn = drawn[:1] if kind == "solid" else drawn
        background = _backgrounds.plain(scene.size, [_backgrounds.PLAIN[c] for c in drawn], kind == "across")
        made = self._before(scene, subject, background)
        made.words["background"] = self.instructions.draw(f"background.{kind}", rng, colour=drawn[0], other=drawn[-1])
        made.parameters |= {"background": kind, "colours": drawn}
        return made

    def _background_scene(self, scene: Scene, rng: np.random.Generator) -> Edit | str:
        text = caption(scene.row, self.config.text)
        if text is None or holds_placeholder(text):
            return "no_text" if text is None else "text_has_placeholders"
        return _back(self._background_plain(scene, rng), {"text": sentence(text)})

    def _background_blur(self, scene: Scene, rng: np.random.Generator) -> Edit | str:
        subject = scene.subject
        if isinstance(subject, str):
            return subject
        sigma = round(real(rng, self.config.blur) * min(scene.size), 2)
        made = self._before(scene, subject, _backgrounds.blurred(scene.row.pixels, subject.mask, max(0.5, sigma)))
        made.parameters["sigma"] = sigma
        return made

    def _background_focus(self, scene: Scene, rng: np.random.Generator) -> Edit | str:
        return _back(self._background_blur(scene, rng))

    def _before(self, scene: Scene, subject: Region, background: np.ndarray) -> Edit:
        """The subject before another background: uint8 [height, width, 3] of the picture's size."""
        after = _backgrounds.before(scene.row.pixels, _backgrounds.cover_of(subject.mask), background)
        picture, mask = self._edited(scene, after, np.ones_like(subject.mask))
        words, parameters = {"object": definite(subject.phrase)}, {"subject": subject.phrase}
        return Edit(words, [scene.row.picture], parameters, output=picture, mask=mask)

    def _grouped(self, kind: str, scene: Scene, rng: np.random.Generator) -> Edit | str:
        group = next((g for g in scene.row.groups if g.task_type == kind), None)
        if group is None:
            return "not_drawn"
        if group.problem is not None:
            return f"other_{group.problem}"
        subject = scene.subject
        if isinstance(subject, str):
            return subject
        (other,) = group.others
        made = self._before(scene, subject, _backgrounds.fitted(other.pixels, scene.size))
        if kind == "background_swap":
            return replace(made, inputs=[scene.row.picture, other.picture], others=group.others)
        alone = picture_of(_backgrounds.without(scene.row.pixels, subject.mask), "jpg")
        inputs = [p for p in (made.output, alone) if p is not None]
        return replace(made, inputs=inputs, output=None, others=group.others)


def _back(made: Edit | str, words: dict[str, str] | None = None) -> Edit | str:
    """The way back: what was made is the input, the row's own picture the answer. With other words, if they are given."""
    if isinstance(made, str) or made.output is None:
        return made
    return replace(made, words=words or made.words, inputs=[made.output], output=None)


assert set(get_args(Kind)) <= Editing.words.keys()
