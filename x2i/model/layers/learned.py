"""What the conversations of a pack teach: which tokens, from where, and the loss.

Tensor names carry their axes: T tokens of a pack · J learned tokens · K conversations · D width · V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from x2i.model.layers.chat import IGNORE


@dataclass(frozen=True)
class Learned:
    """The learned tokens of a pack.

    Attributes:
        places_J: whose output foretells a learned token: the place just before it.
        labels_J: the learned tokens.
        chats_J: whose token it is, from 0 to K - 1.
        counts_K: learned tokens of each conversation.
    """

    places_J: Tensor
    labels_J: Tensor
    chats_J: Tensor
    counts_K: Tensor

    @classmethod
    def of(cls, chats: Iterable[tuple[int, Sequence[int]]]) -> Learned:
        """Of each conversation its first place in the pack, and its labels: `IGNORE` on what is not learned.

        A first token is never learned: nothing of its conversation foretells it.
        """
        places, labels, owners, counts = list[int](), list[int](), list[int](), list[int]()
        for number, (first, given) in enumerate(chats):
            wanted = [i for i, label in enumerate(given) if i and label != IGNORE]
            places += [first + i - 1 for i in wanted]
            labels += [given[i] for i in wanted]
            owners += [number] * len(wanted)
            counts.append(len(wanted))
        return cls(*(torch.tensor(values, dtype=torch.int64) for values in (places, labels, owners, counts)))

    def to(self, device: torch.device | str) -> Learned:
        """The same on another device."""
        return Learned(*(getattr(self, field.name).to(device) for field in fields(self)))

    def sums(self, hidden_TD: Tensor, logits: Callable[[Tensor], Tensor]) -> Tensor:
        """Sum of the negative log-likelihoods of each conversation's learned tokens, float32 [K].

        Args:
            hidden_TD: the trunk's output.
            logits: the text head, [J, D] -> [J, V]. It is called once, on the learned places alone as V is large; with
                nothing to be learned on the first place, with weight 0.
        """
        some = len(self.places_J) > 0
        logits_JV = logits(hidden_TD.index_select(0, self.places_J) if some else hidden_TD[:1]).float()
        sums_K = torch.zeros(len(self.counts_K), device=hidden_TD.device)
        if not some:
            return sums_K + 0 * logits_JV.sum()
        return sums_K.index_add(0, self.chats_J, F.cross_entropy(logits_JV, self.labels_J, reduction="none"))
