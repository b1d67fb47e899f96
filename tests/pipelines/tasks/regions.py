"""Boxes and masks drawn by hand on packaged photographs, as `grounding` and `masks` would give them."""

from __future__ import annotations

from typing import Any

from tests.pipelines.drawn import code, ellipse
from tests.pipelines.tasks.rows import row
from x2i.pipelines.tasks.base import Selected

#: Phrases with the boxes of ellipses that cover what they name, and how sure that is.
PLACES = {
    "chelsea.png": [
        ("green eyes", (0.305, 0.28, 0.465, 0.49), 0.8),
        ("green eyes", (0.655, 0.37, 0.765, 0.55), 0.7),
        ("a cat", (0.07, 0.0, 0.85, 0.95), 0.9),
        ("it", (0.07, 0.0, 0.85, 0.95), 0.6),
    ],
    "astronaut.png": [
        ("a space shuttle", (0.685, 0.0, 0.9, 0.57), 0.8),
        ("a smiling woman", (0.3, 0.03, 0.6, 0.37), 0.7),
        ("her helmet", (0.54, 0.665, 0.985, 1.0), 0.6),
    ],
    "coffee.png": [("a cup of espresso", (0.29, 0.04, 0.69, 0.53), 0.75), ("a spoon", (0.54, 0.57, 0.67, 0.82), 0.5)],
}
TEXTS = {
    "chelsea.png": "A cat with green eyes; it looks past the camera.",
    "astronaut.png": "A smiling woman stands before a space shuttle with her helmet beside her.",
    "coffee.png": "A cup of espresso, and a spoon, on a wooden table.",
}


def values(name: str, scale: float = 1.0) -> dict[str, dict[str, Any]]:
    """What the annotators found on a photograph; the masks are `scale` times as large as it."""
    picture = row(name).picture
    size = round(picture.width * scale), round(picture.height * scale)
    places = PLACES[name]
    phrases = list(dict.fromkeys(p for p, _, _ in places))
    return {
        "grounding": {
            "boxes": [list(box) for _, box, _ in places],
            "phrases": [p for p, _, _ in places],
            "scores": [s for _, _, s in places],
            "phrase_index": [phrases.index(p) for p, _, _ in places],
        },
        "masks": {
            "masks": [code(ellipse(size, box)) for _, box, _ in places],
            "box_index": list(range(len(places))),
            "predicted_iou": [0.95] * len(places),
        },
    }


def seen(name: str, scale: float = 1.0, **changes: Any) -> Selected:
    """The photograph as a row with these annotations and a caption that has its phrases."""
    return row(name, **({"text": TEXTS[name], "values": values(name, scale)} | changes))
