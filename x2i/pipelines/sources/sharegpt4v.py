"""ShareGPT4V (`Lin-Chen/ShareGPT4V`) and whatever has LLaVA's layout: a JSON list of dialogues about images.

    [{"id": ..., "image": "coco/train2017/000000000009.jpg",
      "conversations": [{"from": "human", "value": "<image> ..."}, {"from": "gpt", "value": "..."}]}, ...]

A row is an understanding sample: `meta.messages` holds the dialogue as ms-swift reads it, with an `<image>`
for each picture. The images of ShareGPT4V are not published with it; they lie in folders named coco, sam,
llava, web-celebrity … as its authors describe.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal

from pydantic import Field

from x2i.pipelines.sources._files import Root
from x2i.pipelines.sources._published import RecordSource, load
from x2i.pipelines.sources._text import Malformed
from x2i.pipelines.sources.base import Problem, Row, SourceConfig

IMAGE = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class ShareGPT4VConfig(SourceConfig):
    """Dialogues in JSON lists (or JSONL), and where their images are."""

    kind: Literal["sharegpt4v"] = "sharegpt4v"
    path: str | list[str] = Field(
        description="the dialogues, e.g. sharegpt4v_instruct_gpt4-vision_cap100k.json: a path, pattern, folder, or list"
    )
    images: str | None = Field(
        None, description="where the records' image paths start, e.g. ShareGPT4V/data; default: the folder of `path`"
    )
    roots: dict[str, str] = Field(
        {},
        description="folders for image paths that begin so, e.g. {coco: /data/coco, sam: s3://bucket/sam}: "
        "coco/train2017/1.jpg is then /data/coco/train2017/1.jpg",
    )
    captions: bool = Field(
        True,
        description="the first answer is a caption, and the row's text; false for sets of questions (mix665k): their "
        "rows have no text, so set select.require_text: false",
    )
    unit_rows: int = Field(1000, ge=1, description="dialogues in a unit")


class ShareGPT4V(RecordSource):
    """One row per dialogue; of several pictures the last is the row's own, those before it are its inputs."""

    kind = "sharegpt4v"
    Config = ShareGPT4VConfig
    config: ShareGPT4VConfig

    @cached_property
    def _roots(self) -> list[tuple[str, Root]]:
        """What image paths may begin with, the longest first, and the root of the rest."""
        named = [(prefix.strip("/") + "/", Root(url)) for prefix, url in self.config.roots.items()]
        named.append(("", Root(self.config.images) if self.config.images else self._root))
        return sorted(named, key=lambda n: -len(n[0]))

    def fill(self, row: Row, record: dict[str, Any], part: int, file: str) -> Problem | None:
        """See `RecordSource.fill`."""
        row.meta = {k: v for k, v in record.items() if k != "conversations"}
        images = record.get("image")
        names = images if isinstance(images, list) else [] if images in (None, "") else [images]
        if not all(isinstance(n, str) and n for n in names):
            return Problem("bad_metadata", "'image' is neither a path nor a list of paths")
        row.meta["messages"] = _messages(record.get("conversations"), len(names))
        if self.config.captions:
            row.text = next(m["content"] for m in row.meta["messages"] if m["role"] == "assistant")
        if not names:
            return Problem("no_image", "a dialogue about no image")
        problem: Problem | None = None
        pictures: list[tuple[str, bytes]] = []
        for name in names:
            one = Row(row.index, name, None)
            problem = problem or self._load(one, name.removeprefix("./"))
            if one.data is not None:
                pictures.append((name, one.data))
        if problem is None:
            row.data, row.inputs = pictures[-1][1], pictures[:-1]
        return problem

    def _load(self, row: Row, path: str) -> Problem | None:
        prefix, root = next((p, r) for p, r in self._roots if path.startswith(p))
        return load(row, root, (), path.removeprefix(prefix))


def _messages(turns: Any, images: int) -> list[dict[str, str]]:
    """The dialogue as messages. Raises Malformed: it is none, or its `<image>`s do not fit the number of images."""
    if not isinstance(turns, list) or not all(isinstance(t, dict) for t in turns):
        raise Malformed("bad_metadata", "'conversations' is not a list of turns")
    messages: list[dict[str, str]] = []
    for number, turn in enumerate(turns, 1):
        role, value = ROLES.get(str(turn.get("from"))), turn.get("value")
        if role is None or not isinstance(value, str) or not value.replace(IMAGE, "").strip():
            raise Malformed("bad_metadata", f"turn {number} of the dialogue has no known speaker, or no words")
        messages.append({"role": role, "content": value.strip()})
    spoken = [m["role"] for m in messages if m["role"] != "system"]
    if len(spoken) < 2 or len(spoken) % 2 or spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise Malformed("bad_metadata", "the dialogue's turns are not question and answer, question and answer …")
    marks = sum(m["content"].count(IMAGE) for m in messages)
    if marks == 0 and images:  # LLaVA puts it first, too, where a dialogue leaves it out
        first = next(m for m in messages if m["role"] == "user")
        first["content"] = IMAGE * images + "\n" + first["content"]
    elif marks != images:
        raise Malformed("bad_metadata", f"{images} images, but {marks} {IMAGE} in the dialogue")
    return messages
