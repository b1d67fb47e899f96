"""What tests of several rooms share."""

from __future__ import annotations

import pytest

from tests.corpora import Built, build


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A small corpus with its lake, photographs and recipe; not to be changed: `built.copy(tmp_path)` may be."""
    return build(tmp_path_factory.mktemp("small"))
