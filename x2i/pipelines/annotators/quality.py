"""`quality`: sharpness, exposure, colourfulness and JPEG blockiness, by measures from the literature.

These say how well a picture was taken and kept; they say nothing of its beauty (that is `aesthetic`).
"""

from collections.abc import Sequence

import cv2
import numpy as np
import pyarrow as pa
from pydantic import Field

from x2i.pipelines.annotators.base import Annotator, AnnotatorConfig, Item
from x2i.pipelines.images import fit, luma, resize


def sharpness(grey: np.ndarray) -> float:
    """Variance of the Laplacian (Pech-Pacheco et al. 2000, "Diatom autofocusing in brightfield microscopy").

    Args:
        grey: uint8 [height, width] luma. Below about 100 at 512 pixels, a photograph looks soft.
    """
    return float(cv2.Laplacian(grey, cv2.CV_64F).var())


def colourfulness(pixels: np.ndarray) -> float:
    """M3 of Hasler and Süsstrunk (2003, "Measuring colourfulness in natural images", eq. 3).

    0 is grey, 33 moderately, 59 quite, over 80 highly colourful by the paper's observers.

    Args:
        pixels: uint8 [height, width, 3] RGB.
    """
    red, green, blue = (pixels[..., c].astype(np.float32) for c in range(3))
    rg, yb = red - green, (red + green) / 2 - blue
    return float(np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean()))


def blockiness(grey: np.ndarray) -> float:
    """How much stronger the steps across an 8-pixel grid are than those within it; 0 is none.

    The boundary-to-interior ratio of Wang, Sheikh and Bovik (2002, "No-reference perceptual quality
    assessment of JPEG compressed images"), here against the median over the eight possible phases, so
    that the grid is found in a picture that was cropped or turned after compression.

    Args:
        grey: uint8 [height, width] luma, at the file's own resolution.
    """
    return (_grid(grey) + _grid(grey.T)) / 2


def _grid(grey: np.ndarray) -> float:
    if grey.shape[1] < 24:
        return 0.0
    steps = cv2.absdiff(np.ascontiguousarray(grey[:, 1:]), np.ascontiguousarray(grey[:, :-1])).mean(axis=0)
    phases = np.array([steps[p::8].mean() for p in range(8)])
    return max(0.0, float(phases.max() / (np.median(phases) + 1e-6)) - 1.0) if phases.max() > 0 else 0.0


class QualityConfig(AnnotatorConfig):
    """Parameters of `quality`."""

    shorter_side: int = Field(
        512, gt=15, description="pixels to which a picture is shrunk before sharpness is taken, e.g. 512"
    )
    clip: int = Field(4, ge=0, lt=64, description="luma within this of 0 or 255 counts as clipped, e.g. 4")


class Quality(Annotator):
    """Plain measures, without a model. Luma is BT.601, 0 to 255; shares are 0 to 1."""

    name = "quality"
    version = 2
    Config = QualityConfig
    columns = pa.schema(
        {
            "sharpness": pa.float32(),  # variance of the Laplacian at `shorter_side`
            "brightness": pa.float32(),  # mean luma
            "contrast": pa.float32(),  # standard deviation of luma
            "clipped_dark": pa.float32(),  # share of pixels at black, see `clip`
            "clipped_bright": pa.float32(),  # share of pixels at white, see `clip`
            "colourfulness": pa.float32(),  # 0 grey, above 80 highly colourful
            "blockiness": pa.float32(),  # at the file's own resolution; 0 none
        }
    )

    @property
    def shorter_side(self) -> int:
        return int(self.config.shorter_side)

    def __call__(self, batch: Sequence[Item]) -> pa.Table:
        rows = [self._measure(i, i.pixels) for i in batch if i.pixels is not None]
        return pa.Table.from_pylist(rows, schema=self.columns)

    def _measure(self, item: Item, pixels: np.ndarray) -> dict[str, float]:
        whole = pixels.shape[:2] == (item.header.height, item.header.width)
        full = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY) if whole else luma(item.data, item.header)
        small = resize(pixels, *fit(pixels.shape[1], pixels.shape[0], self.config.shorter_side))
        grey = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)
        histogram = np.bincount(grey.ravel(), minlength=256) / grey.size
        return {
            "sharpness": sharpness(grey),
            "brightness": float(grey.mean()),
            "contrast": float(grey.std()),
            "clipped_dark": float(histogram[: self.config.clip + 1].sum()),
            "clipped_bright": float(histogram[255 - self.config.clip :].sum()),
            "colourfulness": colourfulness(small),
            "blockiness": blockiness(full),
        }
