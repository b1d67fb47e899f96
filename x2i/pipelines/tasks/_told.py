"""Instructions that speak of subjects by pictures of theirs, in place of their names."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from x2i.corpus.sample import placeholder
from x2i.pipelines.select.names import TITLES, is_part, normalise
from x2i.pipelines.tasks._captions import sentence
from x2i.pipelines.tasks._instructions import Instructions
from x2i.pipelines.tasks._spans import Span, disjoint, replaced
from x2i.pipelines.tasks.base import Found, Selected

_BEFORE = re.compile(rf"(?<!\w)(?:(?:the|{'|'.join(sorted(TITLES))})\.?\s+)+$", re.IGNORECASE)
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth")


class Told:
    """Writes the instructions of `subject_pairs`.

    Args:
        text: the captions' column. entities: the annotator whose spans are looked for in them; None: there are no names.
    """

    def __init__(self, instructions: Instructions, text: str, entities: str | None) -> None:
        self._instructions, self._text, self._entities = instructions, text, entities

    def instruction(self, row: Selected, text: str | None, group: Found, rng: np.random.Generator) -> tuple[str, bool]:
        """The instruction, and whether the pictures stand in the caption in place of the names."""
        many = len(group.others) > 1
        noun = str(group.about.get("noun", "subject"))
        nouns = [f"{ORDINALS[i]} {noun}" if many else noun for i in range(len(group.others))]
        places = [self._place(number, n, rng) for number, n in enumerate(nouns, 1)]
        if text is None:
            return self._instructions.draw("alone", rng, subjects=_listed(places)), False
        spans = self._spans(row, [s["key"] for s in group.about.get("subjects", ()) if "key" in s])
        if spans is None:
            said = self._instructions.draw("beside", rng, text=sentence(text), subjects=_listed(places))
            return said, False
        shown: list[str] = []
        seen: set[int] = set()
        for _, number in spans:
            again = self._instructions.draw("again", rng, noun=nouns[number])
            shown.append(again if number in seen else places[number])
            seen.add(number)
        whole = str(row.value(self._text))
        said = replaced(whole, [s for s, _ in spans], shown).strip()
        return self._instructions.draw("in_caption", rng, text=sentence(said[:1].upper() + said[1:])), True

    def _place(self, number: int, noun: str, rng: np.random.Generator) -> str:
        said = self._instructions.draw("place", rng, noun=noun)
        return said.replace(placeholder(1), placeholder(number))

    def _spans(self, row: Selected, keys: list[str]) -> list[tuple[Span, int]] | None:
        """Where the caption has which subject, in order; None where it lacks one, or is not the text that was read."""
        if self._entities is None or not keys:
            return None
        text = row.value(self._text)
        found: list[tuple[Span, int]] = []
        for entity in row.value(f"{self._entities}.entities") or ():
            start, end = int(entity["start"]), int(entity["end"])
            key = normalise(entity["text"])
            same = [i for i, k in enumerate(keys) if key == k] or [
                i for i, k in enumerate(keys) if key and is_part(key, k)
            ]
            if len(same) != 1:
                continue
            if not isinstance(text, str) or text[start:end] != entity["text"]:
                return None
            found.append((_bare(text, start, end), same[0]))
        found.sort()
        first = list(dict.fromkeys(number for _, number in found))
        if first != list(range(len(keys))) or not disjoint([s for s, _ in found]):
            return None
        return found


def _bare(text: str, start: int, end: int) -> Span:
    """A name's span with the titles and the article before it, which a noun phrase would not follow, without a possessive."""
    before = _BEFORE.search(text[:start])
    tail = text[start:end]
    return (before.start() if before else start), (end - 2 if tail[-2:] in ("'s", "’s") else end)


def _listed(said: list[Any]) -> str:
    return said[0] if len(said) == 1 else f"{', '.join(said[:-1])} and {said[-1]}"
