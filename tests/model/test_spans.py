"""The mask of a pack: what its definition says, token by token; the same for SDPA, FlexAttention and padded batches."""

import random
from itertools import product

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from x2i.model.layers.spans import TILE, Spans, positions, spans
from x2i.model.omnigen.masks import hybrid_mask

FIELDS = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
FIELDS += ("q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices")


def documents(seed: int, most: int) -> list[list[int]]:
    """Some documents: runs of text and of blocks, which may touch."""
    rng = random.Random(seed)
    found = []
    for _ in range(rng.randint(1, 6)):
        runs = [(rng.choice([0, k]), rng.randint(1, most)) for k in range(1, rng.randint(2, 6))]
        found.append([block for block, count in runs for _ in range(count)])
    return found


def by_definition(given: list[list[int]], length: int) -> list[list[bool]]:
    """Same document and (causal or the same block); padding is a document a token."""
    tokens = [(d, block) for d, document in enumerate(given) for block in document]
    tokens += [(len(given) + i, 0) for i in range(length - len(tokens))]
    allowed = [[False] * length for _ in tokens]
    for (i, (mine, block)), (j, (theirs, other)) in product(enumerate(tokens), repeat=2):
        allowed[i][j] = mine == theirs and (j <= i or (block > 0 and block == other))
    return allowed


@pytest.mark.parametrize("seed", range(8))
def test_the_mask_is_its_definition(seed: int) -> None:
    given = documents(seed, 7)
    used = sum(map(len, given))
    length = used + seed % 4
    found = spans(given, length)
    expected = by_definition(given, length)
    assert found.dense()[0, 0].tolist() == expected
    assert found.pairs == sum(map(sum, expected[:used]))
    assert positions([len(d) for d in given], length).tolist() == [i for d in given for i in range(len(d))] + [0] * (
        length - used
    )


@pytest.mark.parametrize(("seed", "most", "more"), [(1, 9, 3), (2, 60, 0), (3, 300, 5), (4, 300, 700), (5, 130, 0)])
def test_flex_attention_is_given_the_same_mask(seed: int, most: int, more: int) -> None:
    """As torch makes it by looking at every pair."""
    given = documents(seed, most)
    length = sum(map(len, given)) + more
    if more == 0:
        length += -length % TILE  # a pack of whole blocks
    found = spans(given, length)

    def seen(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (found.starts_T[q] <= k) & (k < found.ends_T[q])

    expected = create_block_mask(seen, 1, 1, length, length, device="cpu")
    ours = found.block_mask()
    assert ours.shape == expected.shape == (1, 1, length, length)
    for name in FIELDS:
        got, want = getattr(ours, name), getattr(expected, name)
        if name.endswith("indices"):  # of unused places nothing is said
            counts = getattr(expected, name.replace("indices", "num_blocks"))[0, 0].tolist()
            for row, count in enumerate(counts):
                assert got[0, 0, row, :count].tolist() == want[0, 0, row, :count].tolist(), name
        assert got.dtype == want.dtype == torch.int32 and got.shape == want.shape
        assert "indices" in name or torch.equal(got, want), name


def test_the_masks_of_padded_batches_agree() -> None:
    """[text, image, text, time, noisy] as in a batch, padded on the left, and as a document among others."""
    blocks = [0, 0, 1, 1, 1, 0, 2, 2, 0]
    noisy, pad = 4, 3
    valid = torch.tensor([[False] * pad + [True] * len(blocks)])
    padded = hybrid_mask(valid, torch.tensor([[0] * pad + blocks]), noisy)[0, pad:, pad:]
    given = [[0, 5, 5, 0], [*blocks, 0, *[3] * noisy], [0, 0]]
    first, last = 4, 4 + len(blocks) + 1 + noisy
    found = spans(given, last + 5).dense()[0, 0]
    assert torch.equal(found[first:last, first:last], padded)
    assert not found[first:last, :first].any() and not found[first:last, last:].any()
    assert not found[:first, first:last].any() and not found[last:, first:last].any()


def test_nothing_but_padding_and_nothing_at_all() -> None:
    assert spans([], 3).dense()[0, 0].tolist() == torch.eye(3).bool().tolist()
    assert spans([], 3).pairs == 0
    moved = spans([[0, 1, 1]], 4).to("meta")
    assert isinstance(moved, Spans) and moved.starts_T.is_meta and moved.pairs == 1 + 3 + 3
