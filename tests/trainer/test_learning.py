"""A model that was trained for half a minute has learnt: from words, and from condition images."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from x2i import corpus
from x2i.trainer import checkpoint
from x2i.trainer.batch import Batcher
from x2i.trainer.config import RunConfig
from x2i.trainer.data import SampleReader
from x2i.trainer.evaluation import held_out
from x2i.trainer.learner import Learner
from x2i.trainer.run import Result
from x2i.trainer.table import SampleTable

Trained = tuple[RunConfig, Result]


def test_held_out_loss_is_far_below_that_of_the_mean_velocity(trained: Trained) -> None:
    _, result = trained
    for task, bound in {"deblur": 0.15, "colorize": 0.25, "text_to_image": 0.5}.items():
        loss = result.held_out[task]
        assert loss["baseline"] > 1.0  # the noise alone has variance 1
        assert loss["loss"] < bound * loss["baseline"], task


def test_condition_images_matter(trained: Trained) -> None:
    config, result = trained
    painter, _ = checkpoint.load_painter(result.checkpoint)
    device = torch.device("cpu")
    batcher = Batcher(painter.processor, painter.vae, device)
    learner = Learner(config, painter.model.requires_grad_(True), device)
    table = SampleTable([corpus.open(config.corpora[0])], config.held_out)
    reader = SampleReader(table)
    for task in ("deblur", "colorize"):
        own = [reader.read(int(i), 8) for i in table.held_out[task]]
        shuffled = [replace(e, inputs=other.inputs) for e, other in zip(own, own[1:] + own[:1], strict=True)]
        right = held_out(learner, batcher, {task: own})[task].loss
        wrong = held_out(learner, batcher, {task: shuffled})[task].loss
        assert wrong > 2 * right, task


def test_a_held_out_picture_is_restored(trained: Trained) -> None:
    config, result = trained
    painter, described = checkpoint.load_painter(result.output)
    table = SampleTable([corpus.open(config.corpora[0])], config.held_out)
    reader = SampleReader(table)
    example = reader.read(int(table.held_out["colorize"][0]), 8)
    side = described.resolution
    drawn = painter.generate(example.instruction, [Image.fromarray(example.inputs[0])], height=side, width=side, steps=20,
                             guidance=1, image_guidance=1)  # fmt: skip
    error = np.abs(np.asarray(drawn, float) - example.output).mean()
    other = reader.read(int(table.held_out["colorize"][1]), 8)
    assert error < 0.5 * np.abs(np.asarray(drawn, float) - other.output).mean()
