"""Phrases that name things, as sentences need them: "his red car" as "the red car", or as "a red car".

English, and by rules of thumb: the phrases are those of captions ("a dog", "two men", "Eileen Collins") or of lists
("dog").
"""

from __future__ import annotations

_ARTICLES = frozenset({"a", "an", "the", "this", "that", "these", "those", "some", "any"})
_OWNERS = frozenset({"his", "her", "its", "their", "my", "our", "your"})
_NUMBERS = frozenset({"one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "several", "many"})
#: Plurals without an s, and words with one that are none.
_PLURALS = frozenset({"men", "women", "people", "children", "feet", "teeth", "mice", "geese", "sheep", "police"})
_SINGULARS = ("ss", "us", "is")
#: First words of phrases that only a sentence's beginning makes large.
_FIRST = _ARTICLES | _OWNERS | {"several", "many", "few", "two", "three", "four"}


def inside(phrase: str) -> str:
    """A phrase as it stands within a sentence: "a cat" for "A cat"; names keep their capitals."""
    first = phrase.partition(" ")[0]
    return first.lower() + phrase[len(first) :] if first.lower() in _FIRST else phrase


def bare(phrase: str) -> str:
    """Without what stands before the noun and its adjectives: "the red car" gives "red car"."""
    words = phrase.strip(" .,;").split()
    while len(words) > 1 and words[0].lower() in _ARTICLES | _OWNERS:
        words = words[1:]
    return " ".join(words)


def definite(phrase: str) -> str:
    """With "the": "the red car", "the two men"; proper names stay as they are."""
    noun = bare(phrase)
    return noun if is_name(phrase) else f"the {_lower(noun)}"


def indefinite(phrase: str) -> str:
    """As one speaks of what is not there yet: "a red car", "an apple", "two men", "trees"."""
    noun = _lower(bare(phrase))
    if is_name(phrase):
        return bare(phrase)
    if not noun or noun.split()[0] in _NUMBERS or noun.split()[0].isdigit() or is_plural(noun):
        return noun
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def is_plural(phrase: str) -> bool:
    """Whether the phrase's last word, or the one before its first "of", "in" or "with", looks like more than one."""
    words = phrase.lower().split()
    for i, word in enumerate(words):
        if i and word in ("of", "in", "on", "with", "and", "at"):
            words = words[:i]
            break
    last = words[-1] if words else ""
    return last in _PLURALS or (last.endswith("s") and not last.endswith(_SINGULARS))


def is_name(phrase: str) -> bool:
    """Whether all its words begin with a capital, as in "Eileen Collins" and not in "A man"."""
    words = phrase.split()
    return bool(words) and words[0].lower() not in _ARTICLES | _OWNERS and all(w[0].isupper() for w in words)


def _lower(noun: str) -> str:
    """Without the capital that the first word of a caption has."""
    return noun[:1].lower() + noun[1:] if noun[1:2].islower() or len(noun) == 1 else noun
