"""The samples of a run: one row per sample of all corpora, split into training and held-out images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from x2i.base.errors import RecipeError
from x2i.base.seeds import digest
from x2i.corpus.corpus import Corpus


@dataclass(frozen=True)
class SampleRef:
    """Where one sample lies: its corpus, and what the manifest says of it."""

    corpus: Corpus
    key: str
    task: str
    shard: str
    offset: int
    size: int
    sha256: str
    members: tuple[tuple[str, int, int], ...]  # suffix, offset in the shard, size
    source: str
    image_id: str
    place: int  # of the corpus in the run's list


class SampleTable:
    """Samples of all corpora, ordered by task, key and corpus.

    The order comes from the manifests' content, not from how samples are spread over shards. An image,
    with every sample made from it, is either for training or held out: decided by a digest of its id alone,
    so growing a corpus moves no image from one side to the other. Samples of other images that hold a held-out one
    too, as the example of a few-shot sequence, are on neither side: `apart`.

    `chats` are the tasks whose samples have no output image: conversations to be answered.
    """

    def __init__(self, corpora: Sequence[Corpus], held_out: float) -> None:
        self.corpora = list(corpora)
        self.chats: set[str] = set()
        parts = []
        for place, corpus in enumerate(corpora):
            manifest = corpus.manifest
            rows = pa.table(
                {
                    "corpus": pa.array(np.full(len(manifest), place, np.int32)),
                    "row": pa.array(np.arange(len(manifest), dtype=np.int64)),
                    "key": manifest["key"],
                    "task": manifest["task_type"],
                    "image_id": manifest["image_id"],
                    "images": _images(manifest),
                }
            )
            fit = manifest["output_size"].is_valid()
            self.chats |= set(pc.unique(rows.filter(pc.invert(fit))["task"]).to_pylist())
            parts.append(rows)
        table = pa.concat_tables(parts)
        table = table.sort_by([("task", "ascending"), ("key", "ascending"), ("corpus", "ascending")])
        if not len(table):
            names = ", ".join(str(c.path) for c in corpora)
            raise RecipeError(f"corpora: {names}: no sample; nothing to train on")
        self._corpus = table["corpus"].to_numpy()
        self._row = table["row"].to_numpy()
        tasks = table["task"].to_numpy(zero_copy_only=False)
        held = _held_out(table["image_id"], held_out)
        mixed = _holding(table["images"], table["image_id"].filter(pa.array(held))) & ~held
        self.apart = int(mixed.sum())
        self.tasks: list[str] = sorted(set(tasks.tolist()))
        self.train = {t: np.flatnonzero((tasks == t) & ~held & ~mixed) for t in self.tasks}
        self.held_out = {t: np.flatnonzero((tasks == t) & held) for t in self.tasks}

    def __len__(self) -> int:
        return len(self._row)

    def __getitem__(self, index: int) -> SampleRef:
        corpus = self.corpora[self._corpus[index]]
        row = corpus.manifest.slice(int(self._row[index]), 1).to_pylist()[0]
        members = tuple((m["suffix"], m["offset"], m["size"]) for m in row["members"])
        return SampleRef(
            *(corpus, row["key"], row["task_type"], row["shard"], row["offset"], row["size"], row["sha256"], members),
            *(row["source"], row["image_id"], int(self._corpus[index])),
        )


def _held_out(image_ids: pa.ChunkedArray, share: float) -> np.ndarray:
    """True for held-out images: those whose digest falls below `share`, or the lowest one if none does."""
    encoded = pc.dictionary_encode(image_ids.combine_chunks())
    values = encoded.dictionary.to_pylist()
    point = np.array([int(digest("held-out/1", v)[:13], 16) / 16**13 for v in values])
    chosen = point < share
    if share > 0 and not chosen.any() and len(values) > 1:
        chosen[point.argmin()] = True
    return chosen[encoded.indices.to_numpy(zero_copy_only=False)]


def _images(manifest: pa.Table) -> pa.ChunkedArray:
    """All images of each sample; corpora of older builds name the one only that it is a sample of."""
    if "images" in manifest.column_names:
        return manifest["images"]
    return pa.chunked_array(
        [pa.ListArray.from_arrays(np.arange(len(c) + 1, dtype=np.int32), c) for c in manifest["image_id"].chunks],
        pa.list_(pa.string()),
    )


def _holding(images: pa.ChunkedArray, sought: pa.ChunkedArray) -> np.ndarray:
    """True for the samples that hold one of the sought images."""
    images = images.combine_chunks()
    found = pc.is_in(images.flatten(), value_set=sought.combine_chunks())
    out = np.zeros(len(images), bool)
    out[pc.list_parent_indices(images).to_numpy(zero_copy_only=False)[found.to_numpy(zero_copy_only=False)]] = True
    return out
