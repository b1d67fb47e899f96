"""Helpers for tests that build corpora: a folder of real pictures, a recipe, and the command as a user runs it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from x2i.pipelines.quickstart import photographs

X2I = [sys.executable, "-m", "x2i"]


def crops(folder: Path, count: int) -> Path:
    """`count` different crops of the packaged colour photographs as JPEGs with texts."""
    plain = photographs()
    names = sorted(n for n in plain if n.endswith((".jpg", ".png")))
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        image = Image.open(io.BytesIO(plain[names[i % len(names)]])).convert("RGB")
        turn = i // len(names)
        x, y = turn * 13 % (image.width - 120), turn * 29 % (image.height - 120)
        out = io.BytesIO()
        image.crop((x, y, x + 120, y + 120)).save(out, "JPEG", quality=90)
        (folder / f"{i:04d}.jpg").write_bytes(out.getvalue())
        (folder / f"{i:04d}.txt").write_text(f"Part {turn} of {names[i % len(names)]}.")
    return folder


def recipe(root: Path, relative: bool = False, **changes: Any) -> Path:
    """A small recipe over `root/photos` (no weights needed); `changes` replace its top-level keys.

    With `relative` paths, a copy of the folder is as good as the folder, for commands that run in it.
    """
    folder = Path() if relative else root
    content: dict[str, Any] = {
        "name": "test",
        "lake": str(folder / "lake"),
        "out": str(folder / "corpus"),
        "sources": [{"kind": "folder", "name": "photos", "path": str(folder / "photos"), "unit_files": 6}],
        "annotators": {"phash": {}, "quality": {}},
        "select": {"where": {"large": "image.width >= 64"}, "dedup": {"perceptual": {"bits": 2}}},
        "tasks": {"text_to_image": {}, "control": {}, "restoration": {"tasks": ["deblur", "inpaint"]}},
        "output": {"shard_samples": 40},
    }
    content |= changes
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    """Start `x2i …` as a process of its own, in the folder of its first path."""
    folder = next((a.parent for a in arguments if isinstance(a, Path)), None)
    return subprocess.Popen(
        [*X2I, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        start_new_session=True,
    )


def x2i(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run `x2i …` to its end."""
    process = start(*arguments)
    out, err = process.communicate(timeout=180)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def build(recipe_path: Path, *options: str) -> dict[str, Any]:
    """`x2i build --json`, which must succeed: its result."""
    done = x2i("build", recipe_path, "--json", *options)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
