"""What annotators with torch models share: no model is loaded in part, and defaults and addresses are what they say."""

from __future__ import annotations

import io
import logging
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import transformers
from pydantic import Field, ValidationError
from safetensors.torch import save_file

from tests.pipelines.annotators.folders import changed
from x2i.base.errors import X2IError
from x2i.base.weights import Weights
from x2i.pipelines.annotators._torch import (
    ModelConfig,
    Runtime,
    checkpoint,
    component,
    described,
    filled,
    folder,
    pretrained,
)
from x2i.pipelines.annotators._weights import GitHub, weights_of

KIND = transformers.SegformerForSemanticSegmentation
WEIGHT = "decode_head.classifier.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real architecture, tiny and random, saved as published."""
    torch.manual_seed(0)
    config = transformers.SegformerConfig(
        hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=16
    )
    path = tmp_path_factory.mktemp("whole")
    KIND(config).save_pretrained(path)
    transformers.SegformerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(path)
    return path


def test_a_whole_folder_loads_in_silence(whole: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    bars = transformers.utils.logging.is_progress_bar_enabled()
    model = pretrained(KIND, str(whole), "semantic")
    component(transformers.AutoImageProcessor, str(whole), "semantic")
    assert capfd.readouterr() == ("", "")
    assert transformers.utils.logging.is_progress_bar_enabled() == bars
    theirs = KIND.from_pretrained(whole).state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    half = pretrained(transformers.AutoModelForSemanticSegmentation, str(whole), "semantic", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_a_folder_that_lacks_weights_is_refused_by_name(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(X2IError, match=rf"annotator semantic: .* no whole Segformer.*: it lacks {WEIGHT}$"):
        pretrained(KIND, str(changed(whole, tmp_path / "one", WEIGHT)), "semantic")
    with pytest.raises(X2IError, match=r"it lacks segformer\.[^,]+, [^,]+, [^,]+ and \d+ more"):
        pretrained(KIND, str(changed(whole, tmp_path / "many", "segformer.")), "semantic")
    with pytest.raises(X2IError, match=rf"it has other shapes: {WEIGHT} \[1, 16, 1, 1\] for \[2, 16, 1, 1\]$"):
        pretrained(KIND, str(changed(whole, tmp_path / "cut", cut=WEIGHT)), "semantic")


def test_what_a_model_never_uses_may_lack_and_what_it_does_not_know_is_told(
    whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lacking = changed(whole, tmp_path / "lacking", WEIGHT)
    assert pretrained(KIND, str(lacking), "semantic", r"^decode_head\.classifier\.weight$") is not None
    state = KIND.from_pretrained(whole).state_dict()
    save_file(state | {"other.weight": torch.zeros(2)}, lacking / "model.safetensors", {"format": "pt"})
    with caplog.at_level(logging.INFO):
        pretrained(KIND, str(lacking), "semantic")
    assert "also holds, unused: other.weight" in caplog.text


def test_folders_that_hold_no_such_thing(whole: Path, tmp_path: Path) -> None:
    assert described(str(whole), "semantic", ["segformer"]).model_type == "segformer"
    with pytest.raises(X2IError, match="holds a model of type segformer; known are dpt, sam"):
        described(str(whole), "depth", ["dpt", "sam"])
    with pytest.raises(X2IError, match="annotator depth: .* holds no AutoConfig that transformers loads"):
        described(str(tmp_path), "depth", ["dpt"])
    (whole / "model.safetensors").rename(tmp_path / "model.safetensors")
    try:
        with pytest.raises(X2IError, match="holds no SegformerForSemanticSegmentation that transformers loads"):
            pretrained(KIND, str(whole), "semantic")
    finally:
        (tmp_path / "model.safetensors").rename(whole / "model.safetensors")


@pytest.mark.parametrize("wrap", [None, "state_dict", "model", "weights"])
def test_a_state_dict_is_found_where_training_left_it(wrap: str | None, tmp_path: Path) -> None:
    layer = torch.nn.Linear(2, 3)
    state = {f"module.{k}": v for k, v in layer.state_dict().items()}
    torch.save(state if wrap is None else {wrap: state, "epoch": 3}, tmp_path / "a.pth")
    save_file(state, tmp_path / "a.safetensors")
    for name in ("a.pth", "a.safetensors"):
        made = filled(torch.nn.Linear(2, 3), checkpoint(tmp_path / name, "edges"), tmp_path / name, "edges")
        assert torch.equal(made.weight, layer.weight) and torch.equal(made.bias, layer.bias)


def test_a_state_dict_must_be_all_of_the_module(tmp_path: Path) -> None:
    state = torch.nn.Linear(2, 3).state_dict()
    for wrong, message in (
        ({"weight": state["weight"]}, 'edges: x.pth does not hold Linear: .*Missing key.*"bias"'),
        (state | {"more": torch.zeros(1)}, 'Unexpected key.*"more"'),
        (state | {"bias": torch.zeros(4)}, "size mismatch for bias"),
    ):
        with pytest.raises(X2IError, match=f"(?s){message}"):
            filled(torch.nn.Linear(2, 3), wrong, "x.pth", "edges")
    with pytest.raises(X2IError, match="does not hold Linear"):
        filled(torch.nn.Linear(2, 3), state, "x.pth", "edges", lambda s: {"bias": s["absent"]})
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(X2IError, match="annotator edges: .*list.pth holds no state dict"):
        checkpoint(tmp_path / "list.pth", "edges")
    torch.save({"model": io.StringIO}, tmp_path / "code.pth")
    for name in ("code.pth", "absent.pth"):
        with pytest.raises(X2IError, match=f"annotator edges: .*{name} cannot be read as weights"):
            checkpoint(tmp_path / name, "edges")


class Example(ModelConfig):
    """Whose default weights go with its backend."""

    defaults = ("backend", {"a": "org/a", "b": "org/b"})

    backend: Literal["a", "b"] = Field("a", description="e.g. b")
    weights: str = Field("org/a", description="e.g. org/c")


def test_default_weights_go_with_another_key() -> None:
    assert Example().weights == "org/a"
    assert Example(backend="b").weights == "org/b"
    assert Example(backend="b", weights="./mine").weights == "./mine"
    for wrong in ("c", ["a"], None):
        given: dict[str, Any] = {"backend": wrong}
        with pytest.raises(ValidationError, match="backend"):
            Example(**given)


def test_devices_and_precisions() -> None:
    for precision, dtype in (("auto", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        runtime = Runtime(Example(device="cpu", precision=precision), auto="bf16")
        assert (runtime.device.type, runtime.dtype) == ("cpu", dtype)
        layer = runtime.place(torch.nn.Linear(4, 2))
        with runtime.running():
            y = layer(torch.ones(1, 4))
        assert y.dtype is dtype and not y.requires_grad and layer.weight.dtype is torch.float32
        assert runtime.numpy(y).dtype == np.float32
    with Runtime(Example(device="cpu")).running():
        assert not torch.backends.cudnn.allow_tf32  # fp32 says what it is
    if not torch.cuda.is_available():
        with pytest.raises(X2IError, match="sees no GPU"):
            Runtime(Example(device="cuda"))


PUBLISHED = GitHub("github:someone/heads:models/head.pth", size=4, licence="MIT")


def test_weights_that_lie_on_github(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("X2I_CACHE", str(tmp_path))
    asked: list[str] = []

    def answer(url: str, timeout: float) -> io.BytesIO:
        asked.append(url)
        return io.BytesIO(b"data")

    monkeypatch.setattr(urllib.request, "urlopen", answer)
    assert PUBLISHED.local() is None
    assert Path(folder(PUBLISHED)).read_bytes() == b"data"
    assert asked == ["https://raw.githubusercontent.com/someone/heads/HEAD/models/head.pth"]
    assert PUBLISHED.fetch() == PUBLISHED.place() == PUBLISHED.local() and len(asked) == 1
    with pytest.raises(X2IError, match="expected github:OWNER/REPOSITORY:FILE"):
        GitHub("github:someone:head.pth").local()


def test_weights_that_cannot_be_had_say_where_to_put_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("X2I_CACHE", str(tmp_path))

    def refuse(url: str, timeout: float) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(X2IError, match=r"licence MIT.*no network.*get the file models/head.pth .* put it at"):
        PUBLISHED.fetch()
    assert PUBLISHED.local() is None


def test_known_weights_bring_what_is_known() -> None:
    known = (PUBLISHED, Weights("org/a", "1" * 64, 9, "MIT"))
    assert weights_of("org/a", None, known) == known[1]
    assert weights_of("org/a", "2" * 64, known) == Weights("org/a", "2" * 64, 9, "MIT")
    assert weights_of(PUBLISHED.spec, None, known) == PUBLISHED
    assert weights_of("github:x/y:z", "3" * 64, known) == GitHub("github:x/y:z", "3" * 64)
    assert weights_of("./mine", None, known) == Weights("./mine")
