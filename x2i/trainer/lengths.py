"""How many tokens samples take, as far as the manifest can tell: for weighing, before any model or tokenizer is built.

Text is counted at four bytes or characters a token, a picture at one token for 16 x 16 pixels of the size that the
stage shows it in. Of a conversation the manifest does not know the text's length; its record's bytes stand for it.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from x2i.trainer.config import Stage

#: What of the manifest is needed.
COLUMNS = ["instruction_chars", "input_sizes", "output_size", "members"]

_TEXT, _SIDE = 4, 16


def tokens(rows: pa.Table, stage: Stage) -> np.ndarray:
    """Estimated tokens of each sample in a stage, float64.

    Pictures of samples that are drawn are squares of the stage's resolution; conversations show theirs whole, with
    the stage's side as the shorter one.
    """
    drawn = rows["output_size"].combine_chunks().is_valid().to_numpy(False)
    sizes = rows["input_sizes"].combine_chunks()
    flat = sizes.flatten()
    width, height = (pc.struct_field(flat, name).to_numpy(False).astype(float) for name in ("width", "height"))
    sample = pc.list_parent_indices(sizes).to_numpy(False)
    longer = np.maximum(width, height) / np.maximum(np.minimum(width, height), 1)
    square, shown = ((stage.side(chat) / _SIDE) ** 2 for chat in (False, True))
    pictures = np.bincount(sample, np.where(drawn[sample], square, shown * longer), len(rows)) + square * drawn
    members = rows["members"].combine_chunks()
    files = members.flatten()
    records = pc.equal(pc.struct_field(files, "suffix"), "json").to_numpy(False)
    sample = pc.list_parent_indices(members).to_numpy(False)[records]
    size = pc.struct_field(files, "size").to_numpy(False)[records]
    record = np.bincount(sample, size, len(rows))
    text = np.where(drawn, rows["instruction_chars"].to_numpy().astype(float), record) / _TEXT
    return np.asarray(pictures + text)
