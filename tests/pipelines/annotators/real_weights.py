"""Published weights that no registry carries, for tests on a machine that has them: $X2I_TEST_WEIGHTS is their folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def published(*names: str) -> Path:
    """The first file of these names in the folder; skips the test, with the reason, where there is none."""
    folder = os.environ.get("X2I_TEST_WEIGHTS")
    if not folder:
        pytest.skip(f"X2I_TEST_WEIGHTS names no folder that might have {names[0]}")
    for name in names:
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    pytest.skip(f"{folder} (X2I_TEST_WEIGHTS) has no {' or '.join(names)}")
