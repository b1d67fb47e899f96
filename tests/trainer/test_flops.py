"""The FLOPs that a step needs: against hand formulas, and against PyTorch's counter over real batches on the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.trainer import corpora
from x2i.base.config import parse_config
from x2i.corpus import open as open_corpus
from x2i.model import registry
from x2i.model.base import Request
from x2i.model.lengths import Lengths, causal, lengths_of
from x2i.model.lora_config import LoRAConfig
from x2i.trainer.batch import Batch, ChatBatch, DrawBatch
from x2i.trainer.config import RunConfig
from x2i.trainer.flops import StageFlops, on_meta
from x2i.trainer.learner import Learner
from x2i.trainer.parts import learning
from x2i.trainer.peak import mfu, peak
from x2i.trainer.setup import Setup


def flops_of(
    preset: str, parts: tuple[str, ...] | None = None, *, preference: bool = False, **changes: object
) -> StageFlops:
    config = registry.changed(registry.preset(preset), changes)
    return StageFlops(config, learning(on_meta(config), parts, "test"), preference=preference)


def test_a_language_model_that_trains_as_a_whole_needs_6_n_per_token() -> None:
    """Four layers of the published OmniGen: six FLOPs a weight of theirs, 12 x layers x width an allowed pair."""
    flops = flops_of("omnigen-3.8b", layers=4)
    short, long = (Lengths(100, (), n) for n in (1024, 1025))
    layers = 4 * (9216 * 3072 + 3072 * 3072 + 16384 * 3072 + 3072 * 8192)
    ends = 2 * 16 * 3072  # one patch in, one out
    pairs = 1025 * (101 + 1025) - 1024 * (101 + 1024)  # noisy tokens see all: 100 words, the time, themselves
    grown = flops.sample(long) - flops.sample(short)
    attended = 12 * 4 * 3072 * pairs
    # the patcher has no gradient of its input; rotary angles are a product of two FLOPs each
    assert grown == pytest.approx(6 * layers + 2.5 * ends + attended, rel=1e-4)


def test_causal_attention_is_half_the_square_and_images_see_themselves() -> None:
    config = registry.preset("omnigen-tiny")
    (text,) = lengths_of(config).attention(config, Lengths(64, learned=8))
    assert text.pairs == 64 * 65 / 2
    (image,) = lengths_of(config).attention(config, Lengths(64, (16,), learned=8))
    assert image.pairs == causal(80) + 16 * 15 / 2


@pytest.mark.parametrize("drawn", [True, False])
def test_frozen_weights_below_adapters_cost_the_gradients_of_activations_alone(drawn: bool) -> None:
    """About 4 N: 2 N forward, 2 N for activations' gradients, and the adapters' own six."""
    row = Lengths(64, (16,), 16 * drawn, learned=32 * (not drawn))
    config, rank = registry.preset("omnigen-tiny"), LoRAConfig(rank=2, targets=("qkv_proj",))
    names = [n for n, p in on_meta(config, rank).named_parameters() if p.requires_grad]
    assert names and all("lora_" in n for n in names)
    adapted, whole = StageFlops(config, names, lora=rank), flops_of("omnigen-tiny")
    forward, backward = adapted.both(row)
    own = 4 * 2 * (256 + 768)  # of four layers: adapters of rank 2
    tokens = 80 + (17 if drawn else 0)
    assert forward == pytest.approx(whole.both(row)[0] + 2 * own * tokens, rel=1e-3)
    assert 0.9 < (backward - 4 * own * tokens) / forward < 1.15  # attention's gradients are twice its forward pass


def test_what_lies_below_the_first_trained_part_has_no_backward_pass() -> None:
    row = Lengths(64, (16,), 16)
    head = flops_of("omnigen-tiny", ("head",)).both(row)
    whole = flops_of("omnigen-tiny").both(row)
    assert head[0] == whole[0]
    assert head[1] < 0.02 * whole[1]


def test_a_preference_takes_two_passes_and_the_reference_two_more() -> None:
    row = Lengths(32, (16,), learned=8)
    once, preferred = (flops_of("omnigen-tiny", preference=p) for p in (False, True))
    forward, backward = once.both(row)
    assert preferred.sample(row) == 4 * forward + 2 * backward


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = [*corpora.samples(6), *corpora.chats(6)]
    return corpora.write(tmp_path_factory.mktemp("flops") / "corpus", made)


CASES = [
    ("omnigen-tiny", ["deblur", "text_to_image", "describe"], None),
    ("omnigen-tiny", ["deblur"], ["patchers", "head"]),
    ("ovis-u1-tiny", ["deblur", "text_to_image", "describe"], None),
    ("ovis-u1-tiny", ["deblur"], ["refiner", "decoder"]),
    ("ovis-u1-tiny", ["deblur", "describe"], ["adapter"]),
    ("ovis2-tiny", ["describe"], ["last_block", "head", "table"]),
    ("ovis2-tiny", ["describe"], ["all"]),
    ("mini-gemini-tiny", ["describe"], ["projector", "mining"]),
    ("mini-gemini-tiny", ["describe"], ["high_encoder", "llm"]),
]


@pytest.mark.parametrize(("preset", "tasks", "train"), CASES, ids=lambda v: v if isinstance(v, str) else None)
def test_real_batches_take_what_is_counted(
    preset: str, tasks: list[str], train: list[str] | None, corpus: Path, tmp_path: Path
) -> None:
    """The trainer's own batches and losses on the CPU, whose attention computes the whole square."""
    stages = [
        {"name": t, "resolution": 32, "steps": 1, "batch": 1, "lr": 1e-3, "mixture": {t: 1}, "train": train}
        for t in tasks
    ]
    content = corpora.run_content(corpus, tmp_path / "run", model=preset, stages=stages, ema=None)
    run = parse_config(RunConfig, content, "test")
    setup = Setup(run, [open_corpus(corpus)], None)
    learner = Learner(run, setup.model, setup.device)
    grouped = {torch.ops.aten.convolution_backward: convolution_backward}
    for place in range(len(tasks)):
        learner.start_stage(place)
        (batch,) = setup.batches(place, 0)
        with FlopCounterMode(display=False, custom_mapping=grouped) as counter, sdpa_kernel(SDPBackend.MATH):
            learner.step([batch], run.stages[place], 0, 0)
        assert counter.get_total_flops() == pytest.approx(
            squared(StageFlops(setup.model.config, learner.trained(place)), batch), rel=1e-6
        ), tasks[place]


def test_a_preference_is_counted_by_both_answers(corpus: Path, tmp_path: Path) -> None:
    stage = {"name": "s", "resolution": 32, "steps": 1, "batch": 2, "lr": 1e-3, "mixture": {"describe": 1}}
    stage["preference"] = {"beta": 0.1}
    content = corpora.run_content(corpus, tmp_path / "run", model="ovis2-tiny", stages=[stage], ema=None)
    setup = Setup(parse_config(RunConfig, content, "test"), [open_corpus(corpus)], None)
    (batch,) = setup.batches(0, 0)
    assert isinstance(batch, ChatBatch)
    config = setup.model.config
    flops = StageFlops(config, [n for n, _ in setup.model.named_parameters()], preference=True)
    rows = [row for i in (batch.inputs, batch.rejected) for row in lengths_of(config).rows(config, i, 0)]
    passes = [flops.both(row) for row in rows]
    assert flops.step([batch]) == pytest.approx(sum(2 * forward + backward for forward, backward in passes))
    assert flops.step([replace(batch, own=(True, False))]) < 0.7 * flops.step([batch])


def test_a_pack_takes_what_its_documents_take_apart(corpus: Path, tmp_path: Path) -> None:
    """Pictures and conversations in one sequence; its model's own pass on the CPU computes the whole square."""
    stage = {"name": "s", "resolution": 32, "steps": 1, "batch": 12, "lr": 1e-3}
    stage["mixture"] = {"deblur": 1, "text_to_image": 1, "describe": 1}
    content = corpora.run_content(corpus, tmp_path / "run", model="omnigen-tiny", stages=[stage], ema=None)
    run = parse_config(RunConfig, content, "test")
    setup = Setup(run, [open_corpus(corpus)], None)
    examples = [e for b in setup.batches(0, 0) for e in b.examples]
    drawn, chats = [e for e in examples if e.output is not None], [e.chat for e in examples if e.output is None]
    requests, dropped = [Request(e.instruction, e.inputs) for e in drawn], [i % 3 == 0 for i in range(len(drawn))]
    processor, model = setup.processors[0], setup.model.train()
    documents = processor.documents(requests, dropped, [(32, 32)] * len(drawn), chats)
    length = sum(document.length for document in documents)
    inputs = processor.pack(documents, length)
    flops = StageFlops(model.config, [n for n, _ in model.named_parameters()])
    alone = flops.batch(processor.requests(requests, dropped), 16) + flops.batch(processor.chats(chats, labels=True))
    assert flops.pack(inputs) == pytest.approx(alone, rel=1e-9)

    noisy = [torch.randn(model.config.in_channels, 8, 8) for _ in drawn]
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        velocities, sums, _ = model.packed(inputs, noisy, torch.rand(len(drawn)))
        (torch.stack(velocities).pow(2).sum() + sums.sum()).backward()
    square = float(flops.pair(Lengths(8, (), 16)).sum()) * (length**2 - inputs.pairs)
    assert counter.get_total_flops() == pytest.approx(flops.pack(inputs) + square, rel=1e-3)


def convolution_backward(grad: torch.Size, x: torch.Size, weight: torch.Size, *rest: object, **_: object) -> float:
    """PyTorch's own formula takes no notice of groups."""
    wanted = rest[-1]
    assert isinstance(wanted, list)
    return 2 * grad[0] * grad[2:].numel() * weight.numel() * sum(wanted[:2])


def squared(flops: StageFlops, batch: Batch) -> float:
    """What is counted, with whole squares of attention in place of what masks allow."""
    drawn = batch.data.shape[-1] * batch.data.shape[-2] // 4 if isinstance(batch, DrawBatch) else 0
    config, ways = flops.model.config, lengths_of(flops.model.config)
    (row,) = ways.rows(config, batch.inputs, drawn)
    needed = flops.batch(batch.inputs, drawn)
    assert needed == flops.sample(row) == flops.step([batch])
    for kind, (forward, backward) in zip(ways.attention(config, row), flops.pair(row).T, strict=True):
        calls = max(round(kind.pairs / max(kind.queries * kind.keys, 1)), 1)
        needed += (calls * kind.queries * kind.keys - kind.pairs) * (forward + backward)
    return needed


def test_peaks_are_those_of_the_data_sheets() -> None:
    names = ["NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA H200", "NVIDIA A100-SXM4-80GB", "NVIDIA B200"]
    assert [peak(n) for n in names] == [989e12, 756e12, 989e12, 312e12, 2250e12]
    assert [peak(n) for n in ("NVIDIA L40S", "NVIDIA GeForce RTX 4090", "h100")] == [362e12, 165e12, 989e12]
    assert peak(torch.device("cpu")) is None and peak("an abacus") is None
    assert mfu(989e12, 2.0, 4, peak("h100")) == 1 / 8
    assert mfu(1.0, 1.0, 1, None) is None
