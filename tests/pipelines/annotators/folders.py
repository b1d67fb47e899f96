"""Published folders that are not whole, for tests of what loading them says."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file


def changed(folder: Path, target: Path, without: str = "", cut: str = "") -> Path:
    """A copy of a folder that lacks the tensors whose name holds `without`, and halves the one named `cut`."""
    shutil.copytree(folder, target)
    state = load_file(target / "model.safetensors")
    kept = {name: tensor for name, tensor in state.items() if not without or without not in name}
    assert not without or len(kept) < len(state)
    if cut:
        kept[cut] = kept[cut][: len(kept[cut]) // 2].contiguous()
    save_file(kept, target / "model.safetensors", {"format": "pt"})
    return target
