"""`faces`: the one face of the astronaut, nobody in the cat; invariants of the search; odd pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.pipelines.annotating import batch, drawn, item, photo, run
from tests.pipelines.annotators.registry import ready
from x2i.base.errors import X2IError
from x2i.pipelines.annotators._mtcnn import _cut, _distinct, _moved, _square
from x2i.pipelines.annotators.faces import FILES, Faces, FacesConfig
from x2i.pipelines.networks.mtcnn import Output, Proposals, Refinement


@pytest.fixture(scope="module")
def faces() -> Faces:
    return ready(Faces(FacesConfig()))


def pixels(name: str) -> np.ndarray:
    out = item(photo(name)).pixels
    assert out is not None
    return out


def iou(a: np.ndarray, b: np.ndarray) -> float:
    shared = (np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])).clip(0).prod()
    return float(shared / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - shared))


def test_one_face_where_facenet_pytorch_finds_it(faces: Faces) -> None:
    """Its own `MTCNN.detect` says: box .3497 .1162 .5236 .3438, and the landmarks below."""
    row = run(faces, batch([photo("astronaut")])).to_pylist()[0]
    assert row["count"] == len(row["boxes"]) == 1 and row["scores"][0] > 0.99
    box = np.array(row["boxes"][0])
    assert iou(box, np.array([0.3497, 0.1162, 0.5236, 0.3438])) > 0.85
    points = np.array(row["landmarks"][0]).reshape(5, 2)
    theirs = [[0.3988, 0.1963], [0.4831, 0.2025], [0.4402, 0.2517], [0.3962, 0.2738], [0.4801, 0.2778]]
    assert np.abs(points - theirs).max() < 0.005
    assert row["largest"] == pytest.approx((box[2:] - box[:2]).prod())


def test_no_face_in_coffee_or_cat(faces: Faces) -> None:
    for row in run(faces, batch([photo("coffee"), photo("chelsea")])).to_pylist():
        assert row == {"boxes": [], "scores": [], "landmarks": [], "count": 0, "largest": 0.0}


def test_mirrored_and_doubled(faces: Faces) -> None:
    image = pixels("astronaut")
    plain, mirrored, double = faces(
        batch([photo("astronaut"), drawn(image[:, ::-1].copy()), drawn(np.hstack([image, image]))])
    ).to_pylist()
    x1, y1, x2, y2 = plain["boxes"][0]
    assert mirrored["count"] == 1 and iou(np.array(mirrored["boxes"][0]), np.array([1 - x2, y1, 1 - x1, y2])) > 0.8
    assert double["count"] == 2
    for box in double["boxes"]:
        at = np.array(box) * [2, 1, 2, 1] % 1
        assert iou(at, np.array(plain["boxes"][0])) > 0.8
    assert double["largest"] == pytest.approx(plain["largest"] / 2, rel=0.2)


def test_batch_equals_one_by_one(faces: Faces) -> None:
    files = [photo("astronaut"), photo("coffee"), drawn(pixels("astronaut")[:, ::-1].copy()), photo("chelsea")]
    for row, file in zip(faces(batch(files)).to_pylist(), files, strict=True):
        alone = faces(batch([file])).to_pylist()[0]
        assert row["count"] == alone["count"]
        assert np.allclose(row["boxes"], alone["boxes"], atol=1e-4)
        assert np.allclose(row["landmarks"], alone["landmarks"], atol=1e-4)


def test_a_face_at_the_edge_stays_inside(faces: Faces) -> None:
    row = faces(batch([drawn(pixels("astronaut")[50:, 195:].copy())])).to_pylist()[0]  # cut through the cheek
    assert row["count"] == 1 and row["boxes"][0][0] < 0.02
    values = np.array(row["boxes"] + [p for points in row["landmarks"] for p in np.reshape(points, (5, 2))], object)
    assert all(0 <= v <= 1 for value in values for v in value)


def test_odd_pictures(faces: Faces) -> None:
    odd = [np.zeros((1, 1, 3), np.uint8), np.full((5000, 1, 3), 70, np.uint8), np.zeros((30, 9000, 3), np.uint8)]
    assert faces(batch([drawn(p) for p in odd]))["count"].to_pylist() == [0, 0, 0]
    assert faces(batch([])).num_rows == 0


def test_the_steps_of_the_search() -> None:
    boxes = np.array([[0, 0, 10, 10], [1, 0, 11, 10], [0, 0, 10, 10], [2, 2, 5, 5]], np.float32)
    scores = np.array([0.8, 0.9, 0.7, 0.95], np.float32)
    owners = np.array([0, 0, 1, 0])
    assert _distinct(owners, boxes, scores, 0.5).tolist() == [3, 1, 2]  # 0 is 1 again; 2 is of another picture
    assert _distinct(owners, boxes, scores, 0.5, smaller=True).tolist() == [3, 2]  # 3 lies in 0 and in 1
    assert _square(np.array([[0, 0, 4, 10]], np.float32)).tolist() == [[-3, 0, 7, 10]]
    assert _moved(np.array([[0, 0, 10, 20]], np.float32), np.array([[0.1, 0, 0, -0.5]])).tolist() == [[1, 0, 10, 10]]
    image = np.full((20, 20, 3), 200, np.uint8)
    cut = _cut(image, np.array([-10, 5, 10, 25]), 20)  # half to the left, a quarter below
    assert (cut[:15, 10:] == 200).all() and not cut[:, :10].any() and not cut[15:].any()
    assert not _cut(image, np.array([50, 50, 60, 60]), 24).any() and _cut(image, np.array([3, 3, 3, 3]), 24).all()


def test_weights_from_a_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    networks: tuple[torch.nn.Module, ...] = (Proposals(), Refinement(), Output())
    for file, network in zip(FILES, networks, strict=True):
        torch.save(network.state_dict(), tmp_path / file)
    annotator = Faces(FacesConfig(weights=str(tmp_path), least_score=0.0))
    table = run(annotator, batch([photo("coffee")]))
    assert table["count"].to_pylist()[0] == len(table["boxes"].to_pylist()[0])
    assert annotator.fingerprint != Faces(FacesConfig()).fingerprint
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "rnet.pt")
    with pytest.raises(X2IError, match="does not hold Refinement"):
        Faces(FacesConfig(weights=str(tmp_path))).setup()
