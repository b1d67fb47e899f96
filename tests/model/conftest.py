"""Fixtures of the models' tests."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Networks this small are slower on two threads than on one, and much slower where cores are shared."""
    torch.set_num_threads(1)
