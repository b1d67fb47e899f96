"""A corpus's folder is replaced whole: the new one is made beside it, and changes places with it at the end.

.OUT.old    where the old corpus lies between the two renames; a run that was killed there is put right by the next
"""

from __future__ import annotations

import os
from pathlib import Path

from x2i.base.files import remove


def recover(out: Path) -> None:
    """Put back the old corpus if a run was killed between moving it away and moving the new one in."""
    old = _old(out)
    if old.exists() and not out.exists():
        os.replace(old, out)
    remove(old)


def put(new: Path, out: Path) -> None:
    """Put the folder `new` in the place of `out`, if that is there. Raises OSError; then `out` is the old one still."""
    old = _old(out)
    if out.exists():
        os.replace(out, old)
    try:
        os.replace(new, out)
    except OSError:
        if old.exists():
            os.replace(old, out)
        raise
    remove(old)


def _old(out: Path) -> Path:
    return out.with_name(f".{out.name}.old")
