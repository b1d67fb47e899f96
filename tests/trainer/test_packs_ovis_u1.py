"""Ovis-U1 trained on packs: planned to the token, each sample learned as alone, parts by stage, cut and gone on with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.trainer import corpora
from x2i import corpus
from x2i.base.config import parse_config
from x2i.model import flow
from x2i.model.base import Request
from x2i.model.lengths import Lengths
from x2i.trainer import ledger, losses, measuring, replay
from x2i.trainer.batch import PackBatch
from x2i.trainer.config import RunConfig
from x2i.trainer.flops import StageFlops
from x2i.trainer.learner import Learner
from x2i.trainer.lengths import Measure
from x2i.trainer.progress import Silent
from x2i.trainer.run import Result, train
from x2i.trainer.setup import Setup

BUDGET = 2048


def content(folder: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """Editing with its weighted loss by the decoder alone; then all tasks, by all but the decoder."""
    stage = {"lr": 1e-3, "condition_dropout": 0.2, "resolution": 32, "pack": {"tokens": BUDGET, "packs": 1}}
    mixture = {"text_to_image": 1, "deblur": 1, "describe": 1}
    drawn = {"mixture": {"text_to_image": 1, "deblur": 2}, "train": ["refiner", "decoder"]}
    buckets = {"buckets": [[32, 32], [48, 32]], "edit_loss": {"kind": "paper"}}
    stages = [
        {**stage, "name": "draw", "steps": 2, **drawn, **buckets},
        {**stage, "name": "both", "steps": 3, "mixture": mixture, "train": ["encoder", "adapter", "llm"]},
    ]
    found = corpora.run_content(
        folder, output, model="ovis-u1-tiny", stages=stages, vae={"kind": "pixels", "factor": 2}
    )
    return found | {"checkpoint_every": 2, "keep": 9, "preview": {"per_task": 0}, "held_out_samples": 1} | changes


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    drawn = list(corpora.samples(24))
    made = [*drawn[:36], *corpora.widened(drawn[36:]), *corpora.chats(24)]
    return corpora.write(tmp_path_factory.mktemp("ovis") / "corpus", made)


@pytest.fixture(scope="module")
def straight(mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return train(parse_config(RunConfig, content(mixed, tmp_path_factory.mktemp("packed") / "run"), "test"))


@pytest.fixture(scope="module")
def setup(straight: Result) -> Setup:
    return replay.open_run(straight.output)


def batches(setup: Setup, place: int, steps: int) -> list[PackBatch]:
    found = [batch for step in range(steps) for batch in setup.batches(place, step)]
    assert all(isinstance(batch, PackBatch) for batch in found)
    return [batch for batch in found if isinstance(batch, PackBatch)]


def test_the_plan_knows_how_long_documents_are(setup: Setup) -> None:
    """To a token or two where only words are estimated; blank images and sources are counted where they stand."""
    for place, stage in enumerate(setup.run.stages):
        manifest = corpus.open(setup.run.corpora[0]).manifest
        found = Measure(stage, measuring.lengths_of(setup.processors[place], setup.reader, stage))(manifest)
        row = {key: number for number, key in enumerate(manifest["key"].to_pylist())}
        for batch in (made := batches(setup, place, 3)):
            for number, (example, length) in enumerate(zip(batch.examples, batch.inputs.lengths, strict=True)):
                dropped = number < len(batch.dropped) and batch.dropped[number]
                planned = int((found.bare if dropped else found.shown)[row[example.key]])
                assert abs(planned - length) <= 6, example.task
        assert np.mean([b.tokens for b in made]) >= 0.93 * BUDGET
        assert sum(len(b.left_out) for b in made) <= 1


def test_a_sample_is_learned_in_a_pack_as_alone(setup: Setup) -> None:
    """Its edit's weights, dropped conditions, two aspects and conversations with it."""
    learner = Learner(setup.run, setup.model, torch.device("cpu"))
    learner.model.eval()
    weighted = dropped = chats = 0
    sizes = set()
    for place in (0, 1):
        processor = setup.processors[place]
        for batch in batches(setup, place, 2):
            with torch.no_grad():
                drawn, sums, counts = learner.pack_losses(batch)
            for number, example in enumerate(batch.examples):
                with torch.no_grad():
                    if example.output is None:
                        told = number - len(drawn)
                        alone, count = learner.model.next_token(processor.chats([example.chat], labels=True))
                        assert int(count) == int(counts[told])
                        assert float(sums[told]) == pytest.approx(float(alone), rel=1e-5)
                        chats += 1
                        continue
                    size = example.output.shape[0], example.output.shape[1]
                    request, drop = Request(example.instruction, example.inputs), batch.dropped[number]
                    inputs = processor.requests([request], [drop], size=size)
                    noise, data, t = batch.noise[number][None], batch.data[number][None], batch.t[number : number + 1]
                    velocity = learner.model(flow.interpolate(noise, data, t), t, inputs)
                weights = batch.weights[number]
                exact = flow.squared_error(velocity, noise, data)
                if weights is not None:
                    exact = losses.weighted_squared_error(velocity, noise, data, weights[None])
                assert float(drawn[number]) == pytest.approx(float(exact), rel=1e-5)
                weighted, dropped = weighted + (weights is not None), dropped + drop
                sizes.add(size)
    assert weighted and dropped and chats and sizes == {(32, 32), (32, 48)}


def test_stages_move_what_they_train_and_nothing_else(mixed: Path, straight: Result, tmp_path: Path) -> None:
    run = parse_config(RunConfig, content(mixed, tmp_path / "run"), "test")
    first = Setup(run, [corpus.open(mixed)], None).model.state_dict()
    then, last = (load_file(straight.output / f"step-{n:06d}/model.safetensors") for n in (2, 5))

    def moved(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> set[str]:
        return {".".join(name.split(".")[:1]) for name in a if not torch.equal(a[name], b[name])}

    assert moved(first, then) == {"visual_generator"}
    assert moved(then, last) == {"visual_tokenizer", "vte", "llm"}


def test_a_run_that_was_cut_goes_on_exactly(mixed: Path, straight: Result, tmp_path: Path) -> None:
    class Cut(Silent):
        def step(self, stage: str, done: int, loss: float, by_task: dict[str, float]) -> None:
            if done == 5:
                raise MemoryError

    run = parse_config(RunConfig, content(mixed, tmp_path / "run"), "test")
    with pytest.raises(MemoryError):
        train(run, progress=Cut())
    resumed = train(run)
    assert resumed.finished and resumed.steps_now == 1
    one, two = (load_file(r.checkpoint / "model.safetensors") for r in (straight, resumed))
    assert all(torch.equal(one[name], two[name]) for name in one)
    query = "select step, draw, key, length, t, loss from ledger order by step, draw"
    told, again = (ledger.opened([r.output]).execute(query).fetchall() for r in (straight, resumed))
    assert told == again and {step for step, *_ in told} == set(range(1, 6))


def test_a_pack_takes_what_its_documents_take_apart(setup: Setup) -> None:
    """Counted beside what PyTorch counts of the pass itself, whose dense mask computes the square of the trunk."""
    processor, model = setup.processors[1], setup.model.train()
    batch = next(b for b in batches(setup, 1, 3) if len({e.task for e in b.examples}) == 3)
    examples = {e.key: e for e in batch.examples}.values()  # of a sample that comes twice a batch encodes an image once
    requests = [Request(e.instruction, e.inputs) for e in examples if e.output is not None]
    chats, dropped = [e.chat for e in examples if e.output is None], [i % 3 == 0 for i in range(len(requests))]
    documents = processor.documents(requests, dropped, [(32, 32)] * len(requests), chats)
    inputs = processor.pack(documents, sum(d.length for d in documents))
    model.requires_grad_(True)
    flops = StageFlops(model.config, [n for n, _ in model.named_parameters()])
    alone = flops.batch(processor.requests(requests, dropped, size=(32, 32)), 64)
    alone += flops.batch(processor.chats(chats, labels=True))
    assert flops.pack(inputs) == flops.step([replace(batch, inputs=inputs)]) == pytest.approx(alone, rel=1e-9)
    assert flops.pack(processor.pack(documents[::-1], 1 << 15)) == pytest.approx(alone, rel=1e-9)

    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        velocities, sums, _ = model.packed(
            inputs, [torch.randn(12, 16, 16) for _ in requests], torch.rand(len(requests))
        )
        (torch.stack(velocities).pow(2).sum() + sums.sum()).backward()
    model.zero_grad()
    told = Lengths(8, learned=4)
    pair = float(flops.pair(told)[:, 1].sum())
    token = flops.sample(Lengths(9, learned=4)) - flops.sample(told) - 9 * pair
    length, used = len(inputs.ids_T), sum(row.sequence for row in inputs.rows)
    padding = pair * (length**2 - inputs.pairs) + token * (length - used)
    assert counter.get_total_flops() == pytest.approx(flops.pack(inputs) + padding, rel=1e-6)
