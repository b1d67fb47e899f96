"""What tests of several rooms share."""

from __future__ import annotations

import os

import pytest

from tests.corpora import Built, build

# pytest's workers have the width of the terminal that started them, and the console would keep it
os.environ.pop("COLUMNS", None)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A small corpus with its lake, photographs and recipe; not to be changed: `built.copy(tmp_path)` may be."""
    return build(tmp_path_factory.mktemp("small"))
