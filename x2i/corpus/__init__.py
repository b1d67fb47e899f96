"""The contract that pipelines and trainer share: samples, shards, manifests, the lake's layout, lineage."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from x2i.corpus.corpus import Corpus
    from x2i.corpus.lake import Lake


def open(path: str | Path) -> Corpus:
    """Open a corpus (a folder or an fsspec URL). Raises X2IError if there is none."""
    from x2i.corpus.corpus import Corpus

    return Corpus(path)


def open_lake(path: str | Path) -> Lake:
    """Open a lake: `.sql("select ... from rows join phash using (row_id)")`."""
    from x2i.corpus.lake import open_lake

    return open_lake(path)
