"""How many tokens samples take, as far as the manifest can tell.

Of the text the manifest has an estimate that knows no tokenizer (`x2i.corpus.text`); `calibrate` turns it into tokens of
the run's own. Of preferences it has a second estimate, with the rejected answer. Corpora of earlier builds lack the
estimate: then the text is counted at four characters a token, and of a conversation, whose text's length they do not know
at all, the record's bytes stand for it.

Before any model is built, a picture is counted at one token for 16 x 16 pixels of the size that the stage shows it in.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from x2i.trainer.buckets import nearest, sizes_of
from x2i.trainer.stage import Stage

#: What of the manifest is needed; and where the text's estimate is missing.
COLUMNS = ["text_tokens", "input_sizes", "output_size"]
EARLIER = ["instruction_chars", "input_sizes", "output_size", "members"]
#: What a stage with preferences needs besides, where it is there.
REJECTED = "rejected_tokens"

_TEXT, _SIDE = 4, 16

#: Samples whose texts are asked for to find out what the estimates are worth.
ASKED = 400

#: Estimates below this are as uncertain as this many tokens.
_LEAST = 4.0


@dataclass(frozen=True)
class Fit:
    """Tokens of a text as `slope * estimate + intercept`.

    `spread` is the standard deviation of what is left, for an estimate of one token; it grows with the estimate's root.
    """

    slope: float = 1.0
    intercept: float = 0.0
    spread: float = 0.7


def calibrate(pairs: Sequence[tuple[float, float]]) -> Fit:
    """Fit counts of a tokenizer to the manifest's estimates, by least squares weighted with 1 / estimate.

    The slope is at least a tenth, and the intercept at least 0: lengths must not shrink as texts grow.

    Args:
        pairs: of some texts of the corpora, evenly spaced: the estimate, and the tokens that there are. Of less than eight,
            nothing is learned.
    """
    if len(pairs) < 8:
        return Fit()
    estimate, real = np.array(pairs, float).T
    weight = 1 / np.maximum(estimate, _LEAST)
    if np.ptp(estimate) == 0:
        slope, intercept = float(real.mean() / max(estimate[0], 1)), 0.0
    else:
        mean_x, mean_y = np.average(estimate, weights=weight), np.average(real, weights=weight)
        above = (weight * (estimate - mean_x) * (real - mean_y)).sum()
        slope = float(above / (weight * (estimate - mean_x) ** 2).sum())
        intercept = float(mean_y - slope * mean_x)
        if intercept < 0 or slope < 0.1:
            slope, intercept = max(float(real.sum() / max(estimate.sum(), 1)), 0.1), 0.0
    left = real - slope * estimate - intercept
    # long texts are often further off than by the root: packs have the sum of all
    spread = np.sqrt((left**2).sum() / (1 / weight).sum())
    return Fit(*(float(f"{v:.6g}") for v in (slope, intercept, spread)))


def _squares(width: int, height: int, chat: bool) -> int:
    """Tokens of 16 x 16 pixels."""
    return max(round(width * height / _SIDE**2), 1)


@dataclass(frozen=True)
class Lengths:
    """What a model makes of samples, in tokens.

    Attributes:
        text: of the text of a sample to be drawn; `said`: of a conversation's, or of both together of a preference.
        picture: of a picture of this width and height in pixels, as it is shown; and whether in a conversation.
        per_image: besides, for each picture that is shown; `per_output`: for the one that is drawn.
        first_image: besides, for a sample that is drawn from any pictures: below 0 where they stand in place of others.
        per_document: besides, for each sample.
        dropped: text of a sample that is drawn without its instruction and input images.
        text_most, said_most: of `text` and `said`, together with `per_image` of all pictures: longer ones are cut.
        chat_most: of a whole conversation.
        counted: by sample, tokens of its text that were counted (`x2i.trainer.counted`), -1 where they are estimated.
        answers: how often a conversation is shown, each time with another answer: 2 where preferences are learned.
        several: besides `per_image`, for each picture of a conversation that has more than one.
    """

    text: Fit = Fit()
    said: Fit = Fit()
    picture: Callable[[int, int, bool], int] = _squares
    per_image: int = 0
    per_output: int = 0
    per_document: int = 0
    dropped: int = 1
    text_most: int | None = None
    said_most: int | None = None
    chat_most: int | None = None
    first_image: int = 0
    answers: int = 1
    several: float = 0.0
    counted: np.ndarray | None = field(default=None, compare=False)

    @classmethod
    def guess(cls, stage: Stage) -> Lengths:
        """What is taken for it where no model is at hand."""
        return cls(answers=1 if stage.preference is None else 2)


@dataclass(frozen=True)
class Measured:
    """Rows of the manifest, measured for a stage.

    Attributes:
        shown: tokens of each sample, int64; `bare`: without its condition (conversations have none to drop).
        doubt: variance of the text's tokens, float64; 0 where it is longer than what is kept of it, which is certain.
        size: of drawn samples the place of their bucket, int16; -1 without.
    """

    shown: np.ndarray
    bare: np.ndarray
    doubt: np.ndarray
    size: np.ndarray


class Measure:
    """Lengths of a stage's samples, as a model makes them."""

    def __init__(self, stage: Stage, lengths: Lengths | None = None) -> None:
        self.stage, self.lengths = stage, lengths or Lengths.guess(stage)
        self._shown: dict[tuple[int, int], int] = {}

    def __call__(self, rows: pa.Table, first: int = 0) -> Measured:
        """Measure rows, which have `COLUMNS` or `EARLIER`, from the `first` sample of the table on."""
        of = self.lengths
        drawn, parents, widths, heights = _pictures(rows)
        estimate = texts(rows, self.stage.preference is not None)
        slope, intercept, spread = (
            np.where(drawn, getattr(of.text, name), getattr(of.said, name)) for name in ("slope", "intercept", "spread")
        )
        most = np.where(drawn, *(np.inf if m is None else m for m in (of.text_most, of.said_most)))
        times, count = np.where(drawn, 1, of.answers), np.bincount(parents, minlength=len(rows))
        marks = of.per_image + of.several * (~drawn & (count > 1))
        most, fixed = most * times, count * marks * times
        doubt, whole = spread**2 * np.maximum(estimate, _LEAST), slope * estimate + intercept
        if of.counted is not None:
            counted = of.counted[first : first + len(rows)]
            doubt, whole = np.where(counted < 0, doubt, 0.0), np.where(counted < 0, whole, counted)
        whole = whole + fixed
        text = np.minimum(np.rint(whole), np.maximum(most, 0)).astype(np.int64)
        doubt[whole - np.sqrt(doubt) > most] = 0
        size, square = self._drawn(rows, drawn)
        inputs = np.where(drawn[parents], square[parents], 0)
        asked = ~drawn[parents]
        if asked.any():
            inputs[asked] = self._chats(widths[asked], heights[asked])
        pictures = np.bincount(parents, inputs, len(rows)).astype(np.int64) * times
        own = drawn * (square + of.per_output) + of.per_document * times
        shown = own + text + pictures
        shown[drawn & (np.bincount(parents, minlength=len(rows)) > 0)] += of.first_image
        if of.chat_most is not None:
            doubt[~drawn & (shown - np.sqrt(doubt) > of.chat_most * times)] = 0
            shown = np.where(drawn, shown, np.minimum(shown, of.chat_most * times))
        return Measured(shown, np.where(drawn, own + of.dropped, shown), doubt, size)

    def _drawn(self, rows: pa.Table, drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The place of each drawn sample's bucket, and the tokens of one picture of its size."""
        sizes = self.stage.buckets or ((self.stage.resolution, self.stage.resolution),)
        place = nearest(*sizes_of(rows), sizes) if self.stage.buckets else np.zeros(len(rows), np.int64)
        tokens = np.array([self.lengths.picture(*size, False) for size in sizes], np.int64)[place]
        return np.where(drawn & bool(self.stage.buckets), place, -1).astype(np.int16), tokens

    def _chats(self, widths: np.ndarray, heights: np.ndarray) -> np.ndarray:
        """Tokens of pictures that conversations show whole, scaled down as `x2i.model.pixels.shrink` does."""
        shorter = self.stage.side(chat=True)
        scale = np.minimum(shorter / np.maximum(np.minimum(widths, heights), 1), 1)
        sides = [np.where(scale < 1, np.maximum(np.rint(s * scale), shorter), s).astype(int) for s in (widths, heights)]
        pairs, places = np.unique(sides[0] << 32 | sides[1], return_inverse=True)
        shown = [self._one(int(pair) >> 32, int(pair) & 0xFFFFFFFF) for pair in pairs]
        return np.array(shown, np.int64)[places]

    def _one(self, width: int, height: int) -> int:
        if (width, height) not in self._shown:
            self._shown[width, height] = self.lengths.picture(width, height, True)
        return self._shown[width, height]


def tokens(rows: pa.Table, stage: Stage) -> np.ndarray:
    """Estimated tokens of each sample in a stage, float64: what mixtures by tokens are weighed with.

    Pictures of samples that are drawn are squares of the stage's resolution; conversations show theirs whole, with
    the stage's side as the shorter one.
    """
    drawn, parents, width, height = _pictures(rows)
    longer = np.maximum(width, height) / np.maximum(np.minimum(width, height), 1)
    square, shown = ((stage.side(chat) / _SIDE) ** 2 for chat in (False, True))
    pictures = np.bincount(parents, np.where(drawn[parents], square, shown * longer), len(rows)) + square * drawn
    return np.asarray(pictures + texts(rows))


def texts(rows: pa.Table, preferred: bool = False) -> np.ndarray:
    """Estimated tokens of each sample's text, float64. Rows without the manifest's estimate need `EARLIER` columns.

    Args:
        preferred: of conversations, with the chosen answer and with the rejected one, together. Where the manifest does
            not tell of the rejected one, it is taken to be as long.
    """
    if preferred:
        chosen = texts(rows)
        if REJECTED not in rows.column_names:
            return chosen * 2
        rejected = rows[REJECTED].combine_chunks()
        return chosen + np.where(rejected.is_valid().to_numpy(False), rejected.fill_null(0).to_numpy(False), chosen)
    there = "text_tokens" in rows.column_names
    if there and not rows["text_tokens"].null_count:
        return np.asarray(rows["text_tokens"].to_numpy().astype(float))
    members = rows["members"].combine_chunks()
    files = members.flatten()
    records = pc.equal(pc.struct_field(files, "suffix"), "json").to_numpy(False)
    sample = pc.list_parent_indices(members).to_numpy(False)[records]
    record = np.bincount(sample, pc.struct_field(files, "size").to_numpy(False)[records], len(rows))
    drawn = rows["output_size"].combine_chunks().is_valid().to_numpy(False)
    found = np.where(drawn, rows["instruction_chars"].to_numpy().astype(float), record) / _TEXT
    if there:
        told = rows["text_tokens"].combine_chunks()
        found = np.where(told.is_valid().to_numpy(False), told.fill_null(0).to_numpy(False), found)
    return np.asarray(found)


def whole_texts(rows: pa.Table) -> np.ndarray:
    """As `texts`, rounded down to whole numbers."""
    if "text_tokens" in rows.column_names and not rows["text_tokens"].null_count:
        return np.asarray(rows["text_tokens"].to_numpy())
    return texts(rows).astype(np.int64)


def columns_of(there: Container[str], complete: bool = True) -> list[str]:
    """What to read of a manifest with these columns, in which the text's estimate is `complete` or not."""
    if "text_tokens" not in there:
        return EARLIER
    return COLUMNS if complete else ["text_tokens", *EARLIER]


def _pictures(rows: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Which samples are drawn; and of the input images of all the sample, width and height."""
    drawn = rows["output_size"].combine_chunks().is_valid().to_numpy(False)
    sizes = rows["input_sizes"].combine_chunks()
    flat = sizes.flatten()
    width, height = (pc.struct_field(flat, name).to_numpy(False).astype(float) for name in ("width", "height"))
    return drawn, pc.list_parent_indices(sizes).to_numpy(False), width, height


def picture_counts(rows: pa.Table) -> np.ndarray:
    """Pictures of each sample, shown and drawn, int32."""
    inputs = pc.list_value_length(rows["input_sizes"].combine_chunks())
    output = rows["output_size"].combine_chunks().is_valid()
    return np.asarray(inputs.to_numpy(False) + output.to_numpy(False).view(np.uint8))
