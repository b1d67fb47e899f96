"""Where the ready-made recipes, runs and prompts lie: beside the package in a checkout, inside it when installed."""

from pathlib import Path

import x2i


def config(name: str) -> Path:
    """Path of a shipped configuration, e.g. `corpora/quickstart.yaml`. Raises FileNotFoundError."""
    package = Path(x2i.__file__).parent
    for folder in (Path("configs"), package.parent / "configs", package / "configs"):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"the configuration {name} is not part of this installation")
