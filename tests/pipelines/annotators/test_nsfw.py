"""`nsfw`: sane on photographs, Yahoo's own preparation, odd pictures, weights."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.pipelines.annotating import batch, drawn, photo, run
from tests.pipelines.annotators.registry import ready
from x2i.base.errors import X2IError
from x2i.pipelines.annotators.nsfw import NSFW, NSFWConfig
from x2i.pipelines.quickstart import photographs

PHOTOS = {n: d for n, d in photographs().items() if not n.endswith(".txt")}


@pytest.fixture(scope="module")
def nsfw() -> NSFW:
    return ready(NSFW(NSFWConfig()))


def test_photographs_are_safe_and_the_preparation_is_the_published_one(nsfw: NSFW) -> None:
    scores = run(nsfw, batch(list(PHOTOS.values())))["score"].to_pylist()
    assert 0 <= min(scores) <= max(scores) < 0.5
    for (name, data), score in zip(PHOTOS.items(), scores, strict=True):
        assert score == pytest.approx(_reference(nsfw, data), abs=0.06), name


def _reference(annotator: NSFW, data: bytes) -> float:
    """Yahoo's steps with Pillow: bilinear 256x256, through a JPEG, centre 224, BGR, channel means off."""
    image = Image.open(io.BytesIO(data)).convert("RGB").resize((256, 256), Image.Resampling.BILINEAR)
    out = io.BytesIO()
    image.crop((16, 16, 240, 240)).save(out, "JPEG")
    bgr = np.asarray(Image.open(out), np.float32)[..., ::-1] - np.array([104, 117, 123], np.float32)
    return float(annotator._network(bgr[None])[0, 1])


def test_batch_equals_one_by_one_and_odd_pictures(nsfw: NSFW) -> None:
    odd = [np.zeros((1, 1, 3), np.uint8), np.full((5000, 1, 3), 99, np.uint8)]
    files = [photo("astronaut"), photo("coffee"), *map(drawn, odd)]
    together = nsfw(batch(files))["score"].to_numpy()
    assert np.allclose(together, [nsfw(batch([f]))["score"][0].as_py() for f in files], atol=1e-6)
    assert run(nsfw, batch([])).num_rows == 0


def test_weights_are_pinned_and_a_file_that_is_no_network_is_refused(tmp_path: Path) -> None:
    (weights,) = NSFW(NSFWConfig()).weights()
    assert (weights.size, weights.licence) == (23_590_724, "BSD-2-Clause (model), MIT (package)") and weights.sha256
    (tmp_path / "mine.onnx").write_bytes(b"not a network")
    mine = NSFW(NSFWConfig(weights=str(tmp_path / "mine.onnx")))
    assert mine.weights()[0].licence is None and mine.fingerprint != NSFW(NSFWConfig()).fingerprint
    with pytest.raises(X2IError, match=r"annotator nsfw: .*mine\.onnx is no ONNX network"):
        mine.setup()
