"""Fixtures of the trainer's tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.trainer import corpora
from x2i.base.config import parse_config
from x2i.trainer.config import RunConfig
from x2i.trainer.run import Result, train


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Networks this small are slower on two threads than on one, and much slower where cores are shared."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 crops of six photographs, three tasks each."""
    return corpora.write(tmp_path_factory.mktemp("corpus") / "photographs", list(corpora.samples(36)))


@pytest.fixture(scope="session")
def trained(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Result]:
    """A small model trained long enough (about half a minute) to use words and condition images."""
    content = corpora.run_content(
        corpus_folder,
        tmp_path_factory.mktemp("trained") / "run",
        model={
            "preset": "omnigen-tiny",
            "hidden_size": 64,
            "layers": 3,
            "heads": 2,
            "kv_heads": 2,
            "intermediate_size": 128,
        },
        vae={"kind": "pixels", "factor": 1},
        ema=0.99,
        checkpoint_every=100_000,
        preview={"per_task": 1, "steps": 5},
        stages=[
            {
                "name": "only",
                "resolution": 8,
                "steps": 800,
                "batch": 8,
                "lr": 0.004,
                "betas": [0.9, 0.95],
                "warmup": 30,
                "schedule": "cosine",
                "min_crop": 0.3,
                "mixture": {"deblur": 3, "colorize": 2, "text_to_image": 1},
            }
        ],
    )
    config = parse_config(RunConfig, content, "test")
    return config, train(config)
