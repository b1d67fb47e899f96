"""`ocr`: text in a picture: where it is, what it says, how much of the picture it covers.

Models: PP-OCRv6 small (text detection by differentiable binarisation, Liao et al. 2020, arXiv 1911.08947;
recognition with CTC; Chinese, English, Japanese and Latin letters) and the PP-OCR direction classifier, as ONNX in the
registry package rapidocr 3.10.0 (https://github.com/RapidAI/RapidOCR; Apache-2.0, as PaddleOCR's models are).
For text-rendering data, and for dropping banners.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
from pydantic import Field

from x2i.base.packages import need, version
from x2i.base.weights import Weights
from x2i.pipelines.annotators._boxes import BOXES, shares
from x2i.pipelines.annotators._languages import identifier, language
from x2i.pipelines.annotators._pictures import margined, pixels, scaled
from x2i.pipelines.annotators._weights import weights_of
from x2i.pipelines.annotators.base import Annotator, AnnotatorConfig, Item

#: The default models: file, SHA-256, bytes.
DETECTION, RECOGNITION, DIRECTION = (
    Weights(f"pypi:rapidocr==3.10.0!/rapidocr/models/{file}", sha256, size, "Apache-2.0")
    for file, sha256, size in (
        ("PP-OCRv6_det_small.onnx", "090f04abcd9d9a7498bc4ebf677e4cb9bdce1fe4197ddb7e529f1ef44e1ff94f", 9_929_594),
        ("PP-OCRv6_rec_small.onnx", "6f327246b50388f3c176ae304bd95767ea6dc0c9ae92153ef8cbe210b3c14884", 21_234_383),
        (
            "ch_ppocr_mobile_v2.0_cls_mobile.onnx",
            "e47acedf663230f8863ff1ab0e64dd2d82b838fceb5957146dab185a89d6215c",
            585_532,
        ),
    )
)

#: Narrower pictures get a black margin: the detector enlarges by the shorter side, a thin strip without end.
_ASPECT = 4


class OCRConfig(AnnotatorConfig):
    """Which models, and what counts as text."""

    detection: str = Field(
        DETECTION.spec,
        description="ONNX file that finds lines: pypi:NAME==VERSION!/path, a local one, or a hub's org/name:file, "
        "e.g. ./det.onnx",
    )
    recognition: str = Field(
        RECOGNITION.spec, description="ONNX file that reads a line; carries its own character list, e.g. ./rec.onnx"
    )
    direction: str = Field(
        DIRECTION.spec, description="ONNX file that says whether a line is upside down, e.g. ./cls.onnx"
    )
    side: int = Field(
        736, ge=96, description="smaller pictures are enlarged to this shorter side for detection, e.g. 736"
    )
    longest: int = Field(2000, ge=96, description="larger pictures are shrunk to this longer side, e.g. 2000")
    least_score: float = Field(0.6, ge=0, le=1, description="confidence from which a line counts, e.g. 0.6")
    tallest_short: float | None = Field(
        0.2,
        gt=0,
        description="a line of one or two characters that is taller than this share of the picture is taken for a "
        "thing, not a letter (a bowl is read as 8 at 0.9), e.g. 0.2; null keeps them",
    )
    least_letters: int = Field(12, gt=0, description="letters from which the language is guessed, e.g. 12")


class OCR(Annotator):
    """Lines in reading order: from the top down, within a row from the left.

    Without text the lists are empty, `text` is "" and `area` 0. Several columns of print are read across.
    """

    name = "ocr"
    Config = OCRConfig
    columns = pa.schema(
        {
            "boxes": BOXES,  # shares
            "polygons": pa.list_(pa.list_(pa.float32(), 8)),  # shares: x, y of four corners, from the line's top left
            "texts": pa.list_(pa.string()),
            "confidence": pa.list_(pa.float32()),
            "text": pa.string(),  # a line of it is a row of the picture
            "area": pa.float32(),  # share of the picture that the polygons cover together
            "language": pa.string(),  # ISO 639-1; null where it cannot be told
        }
    )

    @property
    def shorter_side(self) -> int:
        return int(self.config.side)

    def weights(self) -> list[Weights]:
        specs = (self.config.detection, self.config.recognition, self.config.direction)
        return [weights_of(spec, None, [DETECTION, RECOGNITION, DIRECTION]) for spec in specs]

    def description(self) -> dict[str, Any]:
        return super().description() | {name: version(name) for name in ("rapidocr", "py3langid")}

    def setup(self) -> None:
        rapidocr = need("rapidocr", "rapidocr", self.name)
        self._union = need("shapely", "shapely", self.name).union_all
        self._polygon = need("shapely.geometry", "shapely", self.name).Polygon
        detection, recognition, direction = (str(w.fetch()) for w in self.weights())
        self._engine: Any = rapidocr.RapidOCR(
            params={
                "Global.log_level": "critical",
                "Global.text_score": self.config.least_score,
                "Global.max_side_len": self.config.longest,
                "EngineConfig.onnxruntime.intra_op_num_threads": 1,  # a worker is one core's worth
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
                "Det.limit_side_len": self.config.side,
                "Det.model_path": detection,
                "Rec.model_path": recognition,
                "Cls.model_path": direction,
            }
        )
        self._languages = identifier(self.name)

    def __call__(self, batch: Sequence[Item]) -> pa.Table:
        return pa.Table.from_pylist([self._read(p) for p in pixels(batch)], schema=self.columns)

    def _read(self, picture: np.ndarray) -> dict[str, Any]:
        image, width, height = _bounded(picture, self.config.longest)
        said = self._engine(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
        lines = []
        for corners, text, score in zip(_some(said.boxes), _some(said.txts), _some(said.scores), strict=True):
            polygon_4C = shares(corners, width, height)
            tall = np.ptp(polygon_4C[:, 1])
            short = len(text.strip()) <= 2 and self.config.tallest_short and tall > self.config.tallest_short
            if tall > 0 and np.ptp(polygon_4C[:, 0]) > 0 and not short:
                lines.append((polygon_4C, text.strip(), float(score)))
        rows = reading_order([polygon for polygon, _, _ in lines])
        text = "\n".join(" ".join(lines[i][1] for i in row) for row in rows)
        lines = [lines[i] for row in rows for i in row]
        polygons = [polygon for polygon, _, _ in lines]
        return {
            "boxes": [[*p.min(axis=0), *p.max(axis=0)] for p in polygons],
            "polygons": [p.ravel() for p in polygons],
            "texts": [t for _, t, _ in lines],
            "confidence": [s for _, _, s in lines],
            "text": text,
            "area": self._area(polygons),
            "language": language(text, self._languages, self.config.least_letters),
        }

    def _area(self, polygons: Sequence[np.ndarray]) -> float:
        """The area of the union of polygons [4, 2] in shares: 0 to 1."""
        return float(self._union([self._polygon(p).convex_hull for p in polygons]).area) if polygons else 0.0


def reading_order(polygons: Sequence[np.ndarray]) -> list[list[int]]:
    """Indices of polygons [4, 2] as rows from the top down, each from the left to the right.

    Two lines share a row if the middle of either is less than half the smaller height from the other's.
    """
    rows: list[list[int]] = []
    middles = [float(p[:, 1].mean()) for p in polygons]
    heights = [float(np.ptp(p[:, 1])) for p in polygons]
    for i in sorted(range(len(polygons)), key=lambda i: middles[i]):
        last = rows[-1][-1] if rows else None
        if last is not None and middles[i] - middles[last] < min(heights[i], heights[last]) / 2:
            rows[-1].append(i)
        else:
            rows.append([i])
    return [sorted(row, key=lambda i: float(polygons[i][:, 0].min())) for row in rows]


def _bounded(picture: np.ndarray, longest: int) -> tuple[np.ndarray, int, int]:
    """The picture shrunk to its longest side, with a black margin right or below if it is a thin strip.

    Returns the image, and the width and height of the picture in it.
    """
    image = scaled(picture, min(1.0, longest / max(picture.shape[:2])))
    height, width = image.shape[:2]
    least = -(-max(height, width) // _ASPECT)
    return margined(image, least, least), width, height


def _some(values: Any) -> Any:
    return () if values is None else values
