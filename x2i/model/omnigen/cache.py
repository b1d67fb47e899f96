"""Keys and values of OmniGen's condition: computed once, lent to every step.

The condition's tokens never look at the timestep or the noise, so what they hold is exact for all steps. A step's own
keys and values are put behind them and forgotten: the cache does not grow.

With `offload` the layers lie in host memory (pinned, if the model is on a GPU), and each is fetched while the layer
before it computes. transformers' own offloaded cache writes every layer back after every use and keeps what a step
adds; neither is needed here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

Pair = tuple[Tensor, Tensor]


class ConditionCache(Cache):
    """Fixed keys and values of the first `length` tokens.

    Args:
        length: tokens to keep of the first pass; what follows them is dropped.
        offload: keep them in host memory.
    """

    def __init__(self, length: int, offload: bool = False) -> None:
        super().__init__(layers=[])
        self.length = length
        self.offloaded = offload
        self._kept: list[Pair] = []
        self._ahead: dict[int, Pair] = {}
        self._filled = False
        self._stream: torch.cuda.Stream | None = None

    def fill(self) -> None:
        """End of the first pass: from now on the cache only lends."""
        self._filled = True
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Pair:
        """Keep the first pass; afterwards, [B, heads, length + T, head_dim] for a step's T tokens."""
        if not self._filled:
            self._kept.append((self._keep(key_states), self._keep(value_states)))
            return key_states, value_states
        keys, values = self._fetched(layer_idx, key_states.device) if self.offloaded else self._kept[layer_idx]
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that are kept."""
        return self.length if self._filled else 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Length and offset of the keys that a query sees."""
        return self.get_seq_length() + query_length, 0

    def nbytes(self) -> int:
        """Bytes that are kept, wherever they lie."""
        return sum(t.numel() * t.element_size() for pair in self._kept for t in pair)

    def _keep(self, states: Tensor) -> Tensor:
        """A copy of its own: a slice would hold on to the whole projection."""
        mine = states[..., : self.length, :]
        if not self.offloaded:
            return mine.clone(memory_format=torch.contiguous_format)
        if mine.is_cuda and self._stream is None:
            self._stream = torch.cuda.Stream(mine.device)
        host = torch.empty(mine.shape, dtype=mine.dtype, device="cpu", pin_memory=mine.is_cuda)
        return host.copy_(mine, non_blocking=mine.is_cuda)

    def _fetched(self, layer: int, device: torch.device) -> Pair:
        """This layer on the device; the next one (after the last, the first) is on its way when this returns."""
        if self._stream is None:
            keys, values = self._kept[layer]
            return keys.to(device), values.to(device)
        now = torch.cuda.current_stream(device)
        pair = self._ahead.pop(layer, None) or self._fetch(layer, device)
        now.wait_stream(self._stream)
        for tensor in pair:
            tensor.record_stream(now)  # allocated on the other stream: not to be reused before this one is done
        following = (layer + 1) % len(self._kept)
        self._ahead[following] = self._fetch(following, device)
        return pair

    def _fetch(self, layer: int, device: torch.device) -> Pair:
        with torch.cuda.stream(self._stream):
            keys, values = self._kept[layer]
            return keys.to(device, non_blocking=True), values.to(device, non_blocking=True)
