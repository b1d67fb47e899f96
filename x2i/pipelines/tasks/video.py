"""`video`: pairs of frames with what happens between them, and a clip's key frames with what happens in it.

Its rows are frames of the source `clips`, whose `meta` says `clip`, `frame` and `time`; the text is the clip's label, as
in Something-Something. Frames of a clip are much alike, and have the same text: a recipe's `select.dedup.perceptual` and
`select.dedup.text` leave one of them, and so nothing to pair.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations, groupby
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator

from x2i.base.seeds import generator
from x2i.base.sql import identifier
from x2i.corpus.sample import Sample
from x2i.pipelines.ranges import Range
from x2i.pipelines.select.mdp3 import mdp3
from x2i.pipelines.tasks._captions import sentence
from x2i.pipelines.tasks.base import Group, Selected, Skipped, Task, TaskConfig, caption, holds_placeholder

if TYPE_CHECKING:
    import duckdb

log = logging.getLogger(__name__)
Kind = Literal["motion", "keyframes"]


class VideoConfig(TaskConfig):
    """Which frames make a pair, and how key frames are chosen."""

    tasks: tuple[Kind, ...] = Field(
        ("motion",), min_length=1, description="the tasks to make, e.g. [motion, keyframes]"
    )
    text: str = Field("rows.text", description="column of what happens in the clip, e.g. rows.text")
    pairs: int = Field(1, ge=1, description="pairs of a clip, e.g. 2")
    choose: Literal["drawn", "ends"] = Field(
        "drawn", description="pairs drawn among those that fit, or e.g. ends: those that are furthest apart in time"
    )
    seconds: Range = Field((0.3, 6.0), description="time between the two frames of a pair, e.g. [0.5, 4]")
    hash: str = Field("phash.hash", description="column of the perceptual hash by which frames differ, e.g. phash.hash")
    bits: tuple[int, int] = Field(
        (6, 32),
        description="bits of 64 that must differ in a pair: the least that moves, and the most: a cut; e.g. [6, 32]",
    )
    frames: int = Field(8, ge=2, le=64, description="key frames of a clip, e.g. 8")
    candidates: int = Field(
        128, ge=2, le=1024, description="frames of a clip among which they are chosen, at even distances, e.g. 128"
    )
    segment: int = Field(32, ge=1, description="frames in one of MDP3's segments, e.g. 32")
    lam: float = Field(0.2, gt=0, description="MDP3's λ: the smaller, the more relevance counts, e.g. 0.2")
    embedding: str = Field(
        "clip.embedding", description="column of the frames' embeddings, e.g. classes.embedding; see `relevance`"
    )
    relevance: str | None = Field(
        "clip.similarity",
        description="column of the cosine of that embedding and the text's, e.g. clip.similarity; null: there is no "
        "text of one space with the frames, and their mean takes its place",
    )

    @field_validator("bits")
    @classmethod
    def _ordered(cls, value: tuple[int, int]) -> tuple[int, int]:
        if not 0 <= value[0] <= value[1] <= 64:
            raise ValueError("expected [least, most] between 0 and 64")
        return value


class Frame:
    """One kept row of a clip: when it was, and what is known of it."""

    def __init__(self, row_id: str, image_id: str, number: int, time: float, known: Any) -> None:
        self.row_id, self.image_id, self.number, self.time, self.known = row_id, image_id, number, time, known


class Video(Task):
    """Samples belong to clips: `motion` to the later frame of a pair, `keyframes` to the first key frame."""

    name = "video"
    Config = VideoConfig
    config: VideoConfig
    words: ClassVar = {"motion": ("image", "text"), "keyframes": ()}

    def task_types(self) -> list[str]:
        return list(self.config.tasks)

    @property
    def reads(self) -> Mapping[str, str]:
        config, out = self.config, dict[str, str]()
        if not config.text.startswith("rows."):
            out[config.text] = f"{config.text.partition('.')[0]}: {{kind: caption}}"
        if "motion" in config.tasks:
            out[config.hash] = f"{config.hash.partition('.')[0]}: {{kind: phash}}"
        if "keyframes" in config.tasks:
            name = config.embedding.partition(".")[0]
            without = "classes, and `embedding: classes.embedding, relevance: null` where there is no model hub"
            out[config.embedding] = f"{name}: {{kind: clip}}` or `{without}"
            if config.relevance is not None:
                out[config.relevance] = f"{config.relevance.partition('.')[0]}: {{kind: clip}}` or `relevance: null"
        return out

    def groups(self, connection: duckdb.DuckDBPyConnection, seed: int) -> Iterable[Group]:
        if "motion" in self.config.tasks:
            name, _, column = self.config.hash.partition(".")
            known = f"kept.{identifier(name)}.{identifier(column)}"
            for clip, frames in _clips(connection, known, ""):
                yield from self._pairs(clip, frames, seed)
        if "keyframes" in self.config.tasks:
            name, _, column = self.config.embedding.partition(".")
            known = f"{{'vector': e.{identifier(column)}, 'cosine': null}}"
            join = f"join lake.{identifier(name)} e on e.row_id = kept.row_id"
            if self.config.relevance is not None:
                other, _, cosine = self.config.relevance.partition(".")
                known = f"{{'vector': e.{identifier(column)}, 'cosine': r.{identifier(cosine)}}}"
                join += f" join lake.{identifier(other)} r on r.row_id = kept.row_id"
            for clip, frames in _clips(connection, known, join):
                yield from self._key_frames(clip, frames)

    def _pairs(self, clip: str, frames: list[Frame], seed: int) -> Iterator[Group]:
        least, most = self.config.seconds
        fits: list[tuple[Frame, Frame, int]] = []
        for earlier, later in combinations(frames, 2):
            if earlier.known is None or later.known is None or earlier.image_id == later.image_id:
                continue
            bits = (int(earlier.known) ^ int(later.known)).bit_count()
            inside = self.config.bits[0] <= bits <= self.config.bits[1]
            if inside and least <= _gap(earlier, later) <= most:
                fits.append((earlier, later, bits))
        if self.config.choose == "ends":
            fits.sort(key=lambda f: (-_gap(f[0], f[1]), f[0].number))
        else:
            rng = generator("video/1", seed, sorted(f.image_id for f in frames))
            fits = [fits[i] for i in rng.permutation(len(fits))]
        for earlier, later, bits in fits[: self.config.pairs]:
            about = {"clip": clip, "frames": [earlier.number, later.number], "bits": bits}
            yield Group(later.row_id, "motion", (earlier.row_id,), about | {"seconds": _gap(earlier, later)})

    def _key_frames(self, clip: str, frames: list[Frame]) -> Iterator[Group]:
        usable = [f for f in frames if f.known["vector"] is not None and np.any(f.known["vector"])]
        if self.config.relevance is not None and any(f.known["cosine"] is None for f in usable):
            return  # without a text there is no answer either
        if len(usable) < 2:
            return
        number = min(len(usable), self.config.candidates)
        usable = [usable[(2 * i + 1) * len(usable) // (2 * number)] for i in range(number)]
        vectors = np.array([f.known["vector"] for f in usable], np.float64)
        cosines = None if self.config.relevance is None else np.array([f.known["cosine"] for f in usable], np.float64)
        chosen = [
            usable[i] for i in mdp3(*lifted(vectors, cosines), self.config.frames, self.config.segment, self.config.lam)
        ]
        about = {"clip": clip, "frames": [f.number for f in chosen], "of": len(usable)}
        yield Group(chosen[0].row_id, "keyframes", tuple(f.row_id for f in chosen[1:]), about)

    def build(self, row: Selected) -> Iterator[Sample | Skipped]:
        asked = {g.task_type for g in row.groups}
        why = "not_chosen" if "clip" in row.meta else "not_a_frame"
        yield from (Skipped(t, why) for t in self.task_types() if t not in asked)
        for group in row.groups:
            kind, text = group.task_type, caption(row, self.config.text)
            if group.problem is not None or text is None or holds_placeholder(text):
                problem = f"other_{group.problem}" if group.problem is not None else "text_has_placeholders"
                yield Skipped(kind, "no_text" if group.problem is None and text is None else problem)
                continue
            rng = row.generator(kind)
            variant = "-".join(map(str, group.about["frames"]))
            if kind == "motion":
                (earlier,) = group.others
                instruction = self.instructions.draw("motion", rng, text=sentence(_capital(text)))
                inputs = [earlier.picture]
                yield row.sample(kind, instruction, inputs, group.about, others=group.others, variant=variant)
                continue
            images = [row.picture, *(o.picture for o in group.others)]
            question = "<image>" * len(images) + self.instructions.draw("keyframes", rng)
            messages = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": sentence(_capital(text))},
            ]
            chosen = {"chosen_by": "mdp3", "embedding": self.config.embedding, "relevance": self.config.relevance}
            yield row.conversation(
                kind, messages, group.about | chosen, images=images, others=group.others, variant=variant
            )


def lifted(vectors: np.ndarray, cosines: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Frames and a query for MDP3, of which only distances matter: to each other, and from each frame to the text.

    The text's own embedding is not stored, its cosine with each frame is. A vector q of length 1 that has these cosines
    lies in the space of the frames but for what is at right angles to all of them, for which one more dimension is
    enough. Where the cosines are not known, q is the frames' mean.

    Args:
        vectors: [n, d], of any length but 0. cosines: [n].

    Returns:
        [n, d + 1] of length 1, and [d + 1] of length 1.
    """
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    frames = np.concatenate([units, np.zeros((len(units), 1))], axis=1)
    if cosines is None:
        mean = frames.mean(axis=0)
        length = np.linalg.norm(mean)
        return frames, mean / length if length > 0 else frames[0]
    # frames that are nearly equal would blow up what half precision has rounded: small singular values are left out
    within = np.linalg.pinv(units, rcond=1e-2) @ cosines
    within = within / max(1.0, float(np.linalg.norm(within)))
    beside = max(0.0, 1.0 - float(within @ within)) ** 0.5
    return frames, np.append(within, beside)


def _clips(connection: duckdb.DuckDBPyConnection, known: str, join: str) -> Iterator[tuple[str, list[Frame]]]:
    """Each clip with its kept frames in their order, without those that show the same picture as the one before."""
    frame = "(kept.meta ->> '$.frame')::integer"
    found = connection.execute(
        f"""select kept.source, kept.meta ->> '$.clip' as clip, {frame} as frame, kept.row_id, kept.image_id,
                   (kept.meta ->> '$.time')::double, {known}
            from kept {join} where clip is not null and frame is not null
            order by kept.source, clip, frame, kept.row_id"""
    )
    for (_, clip), rows in groupby(_fetched(found), key=lambda r: (r[0], r[1])):
        distinct: dict[int, Frame] = {}
        for _, _, number, row_id, image_id, time, value in rows:
            distinct.setdefault(number, Frame(row_id, image_id, number, time or 0.0, value))
        yield clip, list(distinct.values())


def _fetched(found: Any) -> Iterator[tuple[Any, ...]]:
    while some := found.fetchmany(4096):
        yield from some


def _gap(earlier: Frame, later: Frame) -> float:
    """Seconds between two frames."""
    return round(later.time - earlier.time, 3)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
