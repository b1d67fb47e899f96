"""`classes`: published weights by either set of names, the right answer on real photographs, odd pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from tests.pipelines.annotating import batch, drawn, photo, run
from tests.pipelines.annotators.registry import ready
from x2i.base.errors import X2IError
from x2i.pipelines.annotators.classes import MEAN, STD, Classes, ClassesConfig, _prepare, _renamed

CATS = {"tabby", "Egyptian cat", "tiger cat"}


@pytest.fixture(scope="module")
def real() -> Classes:
    return ready(Classes(ClassesConfig()))


def test_names_the_cat_and_the_cup(real: Classes) -> None:
    cat, cup = run(real, batch([photo("chelsea"), photo("coffee")])).to_pylist()
    assert {cat["top"], *cat["labels"][:3]} == CATS
    assert sum(cat["scores"][:3]) > 0.8
    assert cup["top"] == "espresso" and cup["top_score"] > 0.8
    assert set(cat["indices"][:3]) == {281, 282, 285}  # tabby, tiger cat, Egyptian cat
    assert len(cat["labels"]) == 10 and cat["scores"] == sorted(cat["scores"], reverse=True)


def test_equal_to_the_network_called_directly(real: Classes) -> None:
    got = real(batch([photo("astronaut")])).to_pylist()[0]
    network = timm.create_model("tf_efficientnet_lite0").eval()
    state = torch.load(real.weights()[0].fetch(), weights_only=True)
    network.load_state_dict(dict(zip(network.state_dict(), state.values(), strict=True)))  # by order, not by name
    image = batch([photo("astronaut")])[0].pixels
    assert image is not None
    with torch.inference_mode():
        x_BCHW = (torch.from_numpy(_prepare(image)).permute(2, 0, 1)[None].float() - MEAN) / STD
        scores = network(x_BCHW).softmax(-1)[0]
    assert np.allclose(got["scores"], scores.topk(10).values, atol=1e-6)
    assert got["indices"] == scores.topk(10).indices.tolist()
    feature = network.global_pool(network.forward_features(x_BCHW))[0]
    feature = (feature / feature.norm()).detach().numpy()
    assert np.allclose(np.array(got["embedding"], np.float32), feature, atol=1e-3)


def test_batch_equals_one_by_one_and_features_are_alike_for_alike_pictures(real: Classes) -> None:
    files = [photo("chelsea"), photo("coffee"), photo("astronaut")]
    cat = batch(files[:1])[0].pixels
    assert cat is not None
    together = real(batch([*files, drawn(cat[:, ::-1].copy())]))
    alone = [real(batch([f])) for f in files]
    for i, one in enumerate(alone):
        assert together["labels"][i] == one["labels"][0]
        assert np.allclose(together["scores"][i].as_py(), one["scores"][0].as_py(), atol=1e-5)
    embeddings = np.array(together["embedding"].to_pylist(), np.float32)
    assert np.allclose(np.linalg.norm(embeddings, axis=1), 1, atol=2e-3)
    alike = embeddings @ embeddings.T
    assert alike[0, 3] > 0.9 > 0.5 > alike[0, 1]  # the cat and its mirror image; the cat and the cup


def test_both_sets_of_published_names(tmp_path: Path) -> None:
    network = timm.create_model("tf_efficientnet_lite0")
    state = network.state_dict()
    save_file(state, tmp_path / "timm.safetensors")
    published = Classes(ClassesConfig(weights=str(tmp_path / "timm.safetensors"), top=3))
    table = run(published, batch([photo("coffee")]))
    assert len(table["labels"][0].as_py()) == 3
    assert not _renamed(state).keys() ^ state.keys()
    save_file({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(X2IError, match="annotator classes: .* does not hold EfficientNet"):
        Classes(ClassesConfig(weights=str(tmp_path / "other.safetensors"))).setup()


def test_odd_pictures_and_no_pictures(real: Classes) -> None:
    odd = [np.zeros((1, 1, 3), np.uint8), np.full((5000, 1, 3), 9, np.uint8), np.zeros((3, 700, 3), np.uint8)]
    table = run(real, batch([drawn(p) for p in odd]))
    assert np.isfinite(table["top_score"].to_numpy()).all()
    assert real(batch([])).num_rows == 0


def test_what_is_kept_changes_the_fingerprint_where_it_runs_does_not() -> None:
    plain = Classes(ClassesConfig()).fingerprint
    assert plain == Classes(ClassesConfig(device="cpu", batch_size=3)).fingerprint
    assert plain != Classes(ClassesConfig(top=5)).fingerprint
