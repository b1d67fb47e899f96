"""One picture of what a model draws and answers: for each sample its words, its inputs, what came out, the target."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from x2i.base.errors import X2IError
from x2i.corpus.sample import PLACEHOLDER
from x2i.model.base import Chat, Model, Processor, Request
from x2i.model.pixels import centre_crop
from x2i.model.placeholders import MARK, numbers_of, with_placeholders
from x2i.model.sampling import Options, Painter
from x2i.trainer.config import Preview
from x2i.trainer.data import DamagedSample, Example, SampleReader
from x2i.trainer.mixture import held_out_of, training_of
from x2i.trainer.stage import Stage
from x2i.trainer.table import Samples

log = logging.getLogger(__name__)

_TILE, _GAP, _TEXT, _HEAD = 128, 8, 208, 26
_INK, _SOFT, _PAPER, _CARD = (28, 30, 34), (110, 114, 122), (244, 244, 242), (255, 255, 255)


@dataclass(frozen=True)
class Row:
    """One sample of the grid. `label` says where it comes from; images are uint8 [H, W, 3]; words are answers."""

    label: str
    instruction: str
    inputs: tuple[np.ndarray, ...]
    drawn: Image.Image | str
    target: np.ndarray | str | None
    title: str = "drawn"


def rows_of(painter: Painter, examples: Sequence[tuple[str, Example]], preview: Preview, side: int) -> list[Row]:
    """Draw the given (label, example) pairs, and the preview's own prompts.

    Raises:
        X2IError: a prompt's image cannot be opened.
    """
    wanted: list[tuple[str, str, tuple[np.ndarray, ...], np.ndarray | None]] = [
        (label, e.instruction, e.inputs, e.output) for label, e in examples if e.output is not None
    ]
    for prompt in preview.prompts:
        images = tuple(_open(str(path), side) for path in prompt.images)
        wanted.append(("prompt", with_placeholders(prompt.instruction, len(images)), images, None))
    if not wanted:
        return []
    options = Options(side, side, preview.steps, preview.guidance, preview.image_guidance, preview.seed)
    drawn = painter.paint([Request(instruction, inputs) for _, instruction, inputs, _ in wanted], options)
    return [Row(*given[:3], picture, given[3]) for given, picture in zip(wanted, drawn, strict=True)]


def check(preview: Preview) -> None:
    """Refuse prompts that could not be drawn at a checkpoint, when hours of work wait to be written.

    Raises:
        X2IError: an image cannot be opened, or the placeholders are not those of the images.
    """
    for place, prompt in enumerate(preview.prompts):
        for path in prompt.images:
            _open(str(path), 1)
        try:
            numbers_of(with_placeholders(prompt.instruction, len(prompt.images)), len(prompt.images))
        except X2IError as error:
            raise X2IError(f"preview.prompts.{place}: {error}") from None


def answers_of(
    model: Model[Any],
    processor: Processor[Any],
    examples: Sequence[tuple[str, Example]],
    preview: Preview,
    plain: bool = False,
) -> list[Row]:
    """Answer the first question of the given conversations; those that the model cannot be shown are left out."""
    asked = [(label, e, until) for label, e in examples if e.output is None and (until := _asked(e))]
    rows = []
    training = model.training
    model.eval()
    for label, example, until in asked:
        shown = sum(m.text.count(MARK) for m in example.messages[:until])  # later questions may show more
        try:
            chat = Chat(example.messages[:until], example.inputs[:shown])
            inputs = processor.chats([chat], labels=False, plain=plain)
        except X2IError as error:
            log.warning("not in the preview: sample %s: %s", example.key, error)
            continue
        device = next(model.parameters()).device
        with torch.no_grad():
            ids = model.answer(inputs.to(device), preview.answer_tokens, processor.stop)[0]
        question = (
            " ".join(m.text for m in example.messages[:until] if m.role != "system").replace("<image>", "").strip()
        )
        rows.append(
            Row(
                label,
                question,
                example.inputs[:shown],
                processor.text(ids) or "(nothing)",
                example.messages[until].text,
            )
        )
    model.train(training)
    return rows


def _asked(example: Example) -> int:
    """How many messages there are in front of the first answer to a user; 0 if there is none."""
    roles = [m.role for m in example.messages]
    pairs = pairwise(roles)
    return next((i for i, pair in enumerate(pairs, 1) if pair == ("user", "assistant")), 0)


def choose(reader: SampleReader, stage: Stage, per_task: int) -> list[tuple[str, Example]]:
    """For each task `per_task` examples, labelled `task · held out` or `task · seen`: one held out, the others seen.

    Samples without input images are always seen ones: words alone do not say which picture they belong to.
    """
    out: list[tuple[str, Example]] = []
    held_out = held_out_of(reader.table, stage)
    for task, seen in training_of(reader.table, stage).items():
        side, held = stage.side(task in reader.table.chats), held_out[task]
        some = _whole(reader, held, 1, side)
        if some and not some[0].inputs:
            some = []
        chosen = [(f"{task} · held out", e) for e in some[:per_task]]
        chosen += [(f"{task} · seen", e) for e in _whole(reader, seen, per_task - len(chosen), side)]
        out += chosen
    return out


def _whole(reader: SampleReader, samples: Samples, count: int, side: int) -> list[Example]:
    """Up to `count` undamaged samples, evenly spaced."""
    found: list[Example] = []
    step = max(len(samples) // max(count, 1), 1)
    for sample in chain(samples[::step], samples):
        if len(found) >= count:
            break
        try:
            example = reader.read(sample, side)
        except DamagedSample:
            continue
        if all(example.key != f.key for f in found):
            found.append(example)
    return found


def grid(rows: Sequence[Row]) -> Image.Image:
    """All rows as one picture: two cards abreast, each with text, inputs, drawn, target."""
    inputs = max((len(r.inputs) for r in rows), default=0)
    width = _TEXT + (inputs + 2) * (_TILE + _GAP) + _GAP
    height = _HEAD + _TILE + _GAP
    abreast = 2 if len(rows) > 1 else 1
    lines = -(-len(rows) // abreast)
    size = (abreast * (width + _GAP) + _GAP, lines * (height + _GAP) + _GAP)
    sheet = Image.new("RGB", size, _PAPER)
    for place, row in enumerate(rows):
        corner = (_GAP + place % abreast * (width + _GAP), _GAP + place // abreast * (height + _GAP))
        sheet.paste(_card(row, width, height, inputs), corner)
    return sheet


def _card(row: Row, width: int, height: int, inputs: int) -> Image.Image:
    card = Image.new("RGB", (width, height), _CARD)
    draw = ImageDraw.Draw(card)
    small, normal = ImageFont.load_default(12), ImageFont.load_default(13)
    draw.text((_GAP, 6), row.label, fill=_INK, font=normal)
    words = PLACEHOLDER.sub("[image \\1]", row.instruction)
    text = "\n".join(textwrap.wrap(words, 34, max_lines=8, placeholder=" …"))
    draw.multiline_text((_GAP, _HEAD), text, fill=_SOFT, font=small, spacing=3)
    cells: list[tuple[str, Image.Image | str | None]] = [("", None)] * (inputs - len(row.inputs))
    cells += [
        (f"input {i}" if len(row.inputs) > 1 else "input", Image.fromarray(a)) for i, a in enumerate(row.inputs, 1)
    ]
    target = Image.fromarray(row.target) if isinstance(row.target, np.ndarray) else row.target
    cells += [("answered" if isinstance(row.drawn, str) else row.title, row.drawn), ("target", target)]
    for place, (title, cell) in enumerate(cells):
        if cell is None or cell == "":
            continue
        x = _TEXT + place * (_TILE + _GAP)
        draw.text((x, 8), title, fill=_SOFT, font=small)
        if isinstance(cell, str):
            written = "\n".join(textwrap.wrap(cell, 20, max_lines=8, placeholder=" …"))
            draw.multiline_text((x, _HEAD), written, fill=_INK, font=small, spacing=3)
        else:
            fitted = ImageOps.contain(cell.convert("RGB"), (_TILE, _TILE), Image.Resampling.BICUBIC)
            card.paste(fitted, (x + (_TILE - fitted.width) // 2, _HEAD + (_TILE - fitted.height) // 2))
    return card


def _open(path: str, side: int) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return centre_crop(image, side, side)
    except OSError as error:
        raise X2IError(f"preview: {path}: cannot be opened as an image ({error})") from None
