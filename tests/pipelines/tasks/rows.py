"""Selected rows for tests of task families: a packaged photograph with whatever values a test gives it."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from x2i.corpus.sample import Picture
from x2i.pipelines.images import decode, read_header
from x2i.pipelines.quickstart import photographs
from x2i.pipelines.tasks.base import Selected

PHOTOS = photographs()


def row(name: str = "chelsea.png", **changes: Any) -> Selected:
    """The photograph `name` as a row that was selected; `changes` replace fields of `Selected`."""
    data = PHOTOS[name]
    header = read_header(data)
    values: dict[str, Any] = {
        "row_id": hashlib.sha256(name.encode()).hexdigest()[:32],
        "image_id": hashlib.sha256(data).hexdigest(),
        "source": "photos",
        "location": name,
        "text": "A cat.",
        "meta": {},
        "values": {},
        "picture": Picture(data, name.rpartition(".")[2], header.width, header.height),
    }
    return Selected(**(values | changes))


def pixels(picture: Picture | None) -> np.ndarray:
    """What a reader sees of a picture: uint8 [height, width, 3]."""
    assert picture is not None
    return decode(picture.data, read_header(picture.data))
