"""Samples of each task, as a trainer will meet them: inputs, instruction, output, read from the shards."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from x2i.base.errors import X2IError
from x2i.corpus.audit.ask import CHARS, ask, one_of
from x2i.corpus.audit.pictures import data_uri, shrink
from x2i.corpus.sample import PLACEHOLDER, Picture, Sample

if TYPE_CHECKING:
    from x2i.corpus.corpus import Corpus

#: Galleries in one report; published corpora may hold task types by the hundred.
TASKS = 80
#: Input pictures shown of one sample.
INPUTS = 8
#: Samples of a row that are read in search of its own picture.
CANDIDATES = 3


@dataclass(frozen=True)
class Example:
    """One sample, ready to show. Pictures are data URIs, None where one cannot be decoded.

    `instruction` is cut into pieces of text and the numbers of the input images that stand between them.
    """

    key: str
    location: str
    problem: str | None = None
    instruction: list[str | int] = field(default_factory=list)
    inputs: list[str | None] = field(default_factory=list)
    further_inputs: int = 0
    output: str | None = None
    has_output: bool = False
    mask: str | None = None
    messages: list[tuple[str, str]] = field(default_factory=list)
    parameters: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Gallery:
    """One task type: figures over all its samples, and some of them."""

    task_type: str
    samples: int
    instruction_chars: int
    smallest: str
    largest: str
    examples: list[Example]

    @property
    def has_inputs(self) -> bool:
        """Whether any of the samples shown has an input picture."""
        return any(e.inputs for e in self.examples)


def galleries(corpus: Corpus, per_task: int, side: int) -> list[Gallery]:
    """The `TASKS` largest task types with `per_task` samples each, drawn by the hash of their bytes."""
    tasks = ask(
        corpus,
        f"""select task_type, count(*) as samples, approx_quantile(instruction_chars, 0.5) as chars,
                   min_by(output_size, output_size.width::bigint * output_size.height) as smallest,
                   max_by(output_size, output_size.width::bigint * output_size.height) as largest,
                   min_by(key, sha256, {per_task}) as keys, min(len(input_sizes)) as inputs
            from samples group by task_type order by samples desc, task_type limit {TASKS}""",
    )
    keys = [key for task in tasks for key in task["keys"]]
    rows = {r["key"]: r for r in ask(corpus, f"select * from samples where key in {one_of(keys)}")}
    tasks.sort(key=lambda t: (t["inputs"] > 0, t["task_type"]))
    return [
        Gallery(
            task["task_type"],
            task["samples"],
            round(task["chars"] or 0),
            _size(task["smallest"]),
            _size(task["largest"]),
            [_example(corpus, rows[key], side) for key in task["keys"]],
        )
        for task in tasks
    ]


def _size(size: dict[str, int] | None) -> str:
    return f"{size['width']}×{size['height']}" if size else "–"


def _example(corpus: Corpus, row: dict[str, Any], side: int) -> Example:
    sample = read(corpus, row)
    if isinstance(sample, str):
        return Example(row["key"], row["location"], problem=sample)
    output = sample.output_image
    return Example(
        row["key"],
        row["location"],
        instruction=pieces(sample.instruction),
        inputs=[data_uri(shrink(p.data, side, _boxes(sample))) for p in sample.input_images[:INPUTS]],
        further_inputs=max(0, len(sample.input_images) - INPUTS),
        output=data_uri(shrink(output.data, side)) if output else None,
        has_output=output is not None,
        mask=data_uri(shrink(sample.mask.data, side)) if sample.mask else None,
        messages=_told(sample),
        parameters=_parameters(sample),
    )


def read(corpus: Corpus, row: dict[str, Any]) -> Sample | str:
    """The sample of a manifest row, or why it cannot be read: a damaged shard spoils no report."""
    try:
        return corpus.read(row)
    except (OSError, ValueError, KeyError, TypeError, json.JSONDecodeError, X2IError) as error:
        return f"cannot be read from {row['shard']} ({type(error).__name__}: {error}). `x2i verify` says more."


def _boxes(sample: Sample) -> list[list[float]]:
    """The boxes that a conversation speaks of, if they are shares of its picture's sides."""
    boxes = sample.objects.get("bbox")
    if sample.objects.get("bbox_type") != "norm1" or not isinstance(boxes, list):
        return []
    return [
        b for b in boxes if isinstance(b, list) and len(b) == 4 and 0 <= b[0] <= b[2] <= 1 and 0 <= b[1] <= b[3] <= 1
    ]


def _told(sample: Sample) -> list[tuple[str, str]]:
    """Who says what, with the objects and the boxes that are spoken of in their places."""
    spoken = {
        mark: iter(values if isinstance(values := sample.objects.get(key), list) else [])
        for mark, key in (("<ref-object>", "ref"), ("<bbox>", "bbox"))
    }

    def filled(text: str) -> str:
        return re.sub("<ref-object>|<bbox>", lambda m: str(next(spoken[m[0]], m[0])), text)

    told = [(str(m.get("role", "")), filled(_content(m.get("content")))) for m in sample.messages[:INPUTS]]
    rejected = sample.rejected_response
    return told if rejected is None else [*told, ("rejected", _content(rejected))]


def _content(content: Any) -> str:
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, default=str)
    return cut(text)


def _parameters(sample: Sample) -> dict[str, Any]:
    given = sample.provenance.get("parameters") if isinstance(sample.provenance, dict) else None
    if not isinstance(given, dict):
        return {}
    return {str(k): cut(str(v), 80) for k, v in list(given.items())[:12]}


def pieces(instruction: str) -> list[str | int]:
    """An instruction as text, image number, text …"""
    text = cut(instruction)
    out: list[str | int] = []
    position = 0
    for match in PLACEHOLDER.finditer(text):
        out += [text[position : match.start()], int(match[1])]
        position = match.end()
    return [piece for piece in [*out, text[position:]] if piece != ""]


def cut(text: str, chars: int = CHARS) -> str:
    """At most `chars` characters, with a sign where there were more."""
    return text if len(text) <= chars else text[:chars].rstrip() + " …"


def kept_pictures(corpus: Corpus, row_ids: Iterable[str], side: int) -> dict[str, bytes]:
    """Small pictures of rows that are in the corpus, from its own shards.

    A row whose picture is surely in none of the samples looked at (`own_picture`) is not among them.
    """
    rows = ask(
        corpus,
        f"""select * from samples where row_id in {one_of(row_ids)}
            qualify row_number() over (partition by row_id order by
                case when output_size is not null and len(input_sizes) = 0 then 0
                     when output_size is null and len(images) = 1 then 1 else 2 end,
                len(input_sizes), key) <= {CANDIDATES}
            order by row_id, output_size is null, len(input_sizes), key""",
    )
    found: dict[str, bytes] = {}
    for row in rows:
        sample = None if row["row_id"] in found else read(corpus, row)
        picture = own_picture(sample) if isinstance(sample, Sample) else None
        small = shrink(picture.data, side) if picture else None
        if small is not None:
            found[row["row_id"]] = small
    return found


def own_picture(sample: Sample) -> Picture | None:
    """The picture in a sample that is its row's own, for sure; None where it may be a map, an edit or another row's.

    It is so told: what has the row's own bytes; the output of a sample without inputs; the output of a published
    sample, or the last picture of a published conversation; the one picture of a conversation over one original, unless
    it was damaged for it (`diagnose`).
    """
    about = sample.provenance if isinstance(sample.provenance, dict) else {}
    output, inputs = sample.output_image, sample.input_images
    parameters = about.get("parameters")
    published = isinstance(parameters, dict) and parameters.get("published") is True
    if output is not None and (published or not inputs):
        return output
    damaged = isinstance(parameters, dict) and parameters.get("degradation", "clean") != "clean"
    alone = len(inputs) == 1 and not about.get("others") and not about.get("input_ids") and not damaged
    if output is None and inputs and (published or alone):
        return inputs[-1]
    pictures = ([] if output is None else [output]) + list(inputs)
    return next((p for p in pictures if hashlib.sha256(p.data).hexdigest() == about.get("image_id")), None)
