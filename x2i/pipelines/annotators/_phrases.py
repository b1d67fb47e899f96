"""Phrases as Grounding DINO's prompt: which tokens belong to which phrase, and whose a detected box is.

The published prompt is lower-case phrases, each closed by a full stop: "a cat . a remote control ."; between
full stops tokens see only each other. It is built here from token ids, so that a phrase's span is known
and not guessed from decoded text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Prompt:
    """One text for the model.

    `ids` are the tokens with [CLS] and [SEP]; `spans[i]` is where (from, to) the phrase `phrases[i]` of the
    row's list stands among them.
    """

    ids: list[int]
    spans: list[tuple[int, int]]
    phrases: list[int]


def prompts(phrases: Sequence[str], tokenizer: Any, limit: int) -> list[Prompt]:
    """As many prompts as the phrases need.

    A phrase longer than a prompt is cut; one without tokens is left out; of phrases with the same tokens the
    first stands for all. Full stops and question marks, which would end a phrase, are left out.

    Args:
        phrases: in any case; `tokenizer`: BERT's; `limit`: tokens in a prompt, [CLS] and [SEP] included.
    """
    if not phrases:
        return []
    cls, sep, stop, question = tokenizer.convert_tokens_to_ids(["[CLS]", "[SEP]", ".", "?"])
    dropped = {cls, sep, stop, question, tokenizer.pad_token_id}
    seen: set[tuple[int, ...]] = set()
    out: list[Prompt] = []
    found = tokenizer([p.lower() for p in phrases], add_special_tokens=False)["input_ids"]
    for index, raw in enumerate(found):
        ids = tuple(t for t in raw if t not in dropped)[: limit - 3]
        if not ids or ids in seen:
            continue
        seen.add(ids)
        if not out or len(out[-1].ids) + len(ids) + 1 > limit:
            out.append(Prompt([cls, sep], [], []))
        prompt = out[-1]
        start = len(prompt.ids) - 1
        prompt.ids[start:] = [*ids, stop, sep]
        prompt.spans.append((start, start + len(ids)))
        prompt.phrases.append(index)
    return out


def owners(
    probabilities: np.ndarray, prompt: Prompt, box_threshold: float, text_threshold: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which queries are detections, of which phrase, with what score.

    A query belongs to the phrase whose tokens have the highest mean probability, those not above
    `text_threshold` counting as nothing: "red cat" loses to "cat" where the cat is not red. Its score is that
    of the phrase's best token, and must be above `box_threshold`.

    Args:
        probabilities: float32 [queries, tokens].

    Returns:
        indices of the queries, indices into the row's list of phrases, scores float32.
    """
    spans = [probabilities[:, a:b] for a, b in prompt.spans]
    support_QP = np.stack([np.where(s > text_threshold, s, 0).mean(axis=1) for s in spans], axis=1)
    best_QP = np.stack([s.max(axis=1) for s in spans], axis=1)
    phrase_Q = support_QP.argmax(axis=1)
    queries = np.arange(len(probabilities))
    score_Q = best_QP[queries, phrase_Q]
    kept = queries[(score_Q > box_threshold) & (support_QP[queries, phrase_Q] > 0)]
    return kept, np.asarray(prompt.phrases)[phrase_Q[kept]], score_Q[kept].astype(np.float32)
