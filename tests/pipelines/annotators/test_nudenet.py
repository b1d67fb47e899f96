"""`nudenet`: the figures of the package itself on photographs, selection, odd pictures."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from tests.pipelines.annotating import batch, drawn, item, photo, run
from tests.pipelines.annotators.registry import fetched, ready
from x2i.pipelines.annotators.nudenet import LABELS, SIZE, NudeNet, NudeNetConfig, _prepare


@pytest.fixture(scope="module")
def nudenet() -> NudeNet:
    return ready(NudeNet(NudeNetConfig()))


def test_the_figures_of_the_package(nudenet: NudeNet) -> None:
    """nudenet 3.4.2's own `NudeDetector().detect`, on the packaged files: one face at 0.72031; nothing."""
    face, cat, cup = run(nudenet, batch([photo("astronaut"), photo("chelsea"), photo("coffee")])).to_pylist()
    assert face["labels"] == ["FACE_FEMALE"]
    assert face["scores"] == pytest.approx([0.7203078], abs=2e-5)
    x1, y1, x2, y2 = np.array(face["boxes"][0]) * 512
    assert [int(x1), int(y1), int(x2 - x1), int(y2 - y1)] == [173, 82, 102, 98]
    assert face["exposed"] == 0  # a face is not one of `nude`
    for nothing in (cat, cup):
        assert nothing["boxes"] == [] and nothing["exposed"] == 0


def test_exposed_is_the_highest_of_the_classes_asked_for() -> None:
    faces = fetched(NudeNet(NudeNetConfig(nude=["FACE_FEMALE"])))
    row = run(faces, batch([photo("astronaut")])).to_pylist()[0]
    assert row["exposed"] == row["scores"][0] > 0.7
    assert faces.fingerprint != NudeNet(NudeNetConfig()).fingerprint
    with pytest.raises(ValidationError, match="no such class: KNEE"):
        NudeNetConfig(nude=["KNEE"])


def found(*boxes: tuple[float, float, float, float, str, float]) -> np.ndarray:
    """The network's output for boxes: centre x, y, width, height in input pixels, label, score."""
    out = np.zeros((len(boxes), 4 + len(LABELS)), np.float32)
    for row, (x, y, w, h, label, score) in zip(out, boxes, strict=True):
        row[:4] = x, y, w, h
        row[4 + LABELS.index(label)] = score
    return out


def test_selection() -> None:
    annotator = NudeNet(NudeNetConfig())
    row = annotator._select(
        found(
            (160, 80, 40, 40, "BUTTOCKS_EXPOSED", 0.5),
            (162, 80, 40, 40, "BUTTOCKS_COVERED", 0.6),  # the same place, surer
            (40, 40, 20, 20, "ANUS_EXPOSED", 0.24),  # not sure
            (300, 150, 80, 40, "FEMALE_BREAST_EXPOSED", 0.3),  # beyond the right edge
        ),
        height=320,
        width=640,
    )
    assert row["labels"] == ["BUTTOCKS_COVERED", "FEMALE_BREAST_EXPOSED"]
    assert row["exposed"] == pytest.approx(0.3)
    # a picture twice as wide as high lies in the upper half of the square
    assert np.allclose(row["boxes"], [[142 / 320, 60 / 160, 182 / 320, 100 / 160], [260 / 320, 130 / 160, 1, 1]])


def test_preparation_keeps_the_shape_and_the_package_s_channel_order() -> None:
    image = np.zeros((100, 200, 3), np.uint8)
    image[..., 0] = 255
    blob = _prepare(image)
    assert blob.shape == (3, SIZE, SIZE)
    assert (blob[2, :158] == 1).all() and not blob[2, 162:].any() and not blob[:2].any()


def test_batch_equals_one_by_one_and_odd_pictures(nudenet: NudeNet) -> None:
    pixels = item(photo("astronaut")).pixels
    assert pixels is not None
    files = [photo("astronaut"), photo("coffee"), drawn(pixels[:, ::-1].copy())]
    table = nudenet(batch(files)).to_pylist()
    for row, file in zip(table, files, strict=True):
        alone = nudenet(batch([file])).to_pylist()[0]
        assert row["labels"] == alone["labels"]
        assert np.allclose(row["scores"], alone["scores"], atol=1e-5)
    mirrored, plain = np.array(table[2]["boxes"][0]), np.array(table[0]["boxes"][0])
    assert np.allclose(mirrored, [1 - plain[2], plain[1], 1 - plain[0], plain[3]], atol=0.03)
    odd = [np.zeros((1, 1, 3), np.uint8), np.full((5000, 1, 3), 99, np.uint8), np.zeros((20, 9000, 3), np.uint8)]
    assert nudenet(batch([drawn(p) for p in odd]))["boxes"].to_pylist() == [[], [], []]
    assert nudenet(batch([])).num_rows == 0
