"""Instructions from files that people edit: several wordings for a task, one of which a sample's seed draws."""

from __future__ import annotations

import difflib
import re
import string
from collections.abc import Mapping

import numpy as np

from x2i.base.config import load_yaml
from x2i.base.configs import config
from x2i.base.errors import RecipeError
from x2i.corpus.sample import PLACEHOLDER, placeholder


class Instructions:
    """The wordings of one family: `texts[key]` are those of a key.

    Args:
        words: the keys that there must be, each with the words in braces that its texts may have; those that
            stand for images (`image`, `image_1` …) must be in every text.
        path: a file of one's own, or the name of one that x2i brings; keys that it lacks keep the wordings that x2i brings for this family: in its file, or
            `texts` where there is none.

    Raises:
        RecipeError: the file has a key too many, or a text has another word in braces, lacks an image, or has
            a placeholder that is written out.
    """

    def __init__(
        self,
        words: Mapping[str, tuple[str, ...]],
        path: str | None,
        family: str,
        texts: Mapping[str, list[str]] | None = None,
    ) -> None:
        self.texts: dict[str, list[str]] = {}
        if not words:
            if path is not None:
                raise RecipeError(f"tasks.{family}.instructions: this family has no instructions of its own")
            return
        shipped = f"tasks.{family}.texts" if texts else str(config(f"instructions/{family}.yaml"))
        self._take(texts or load_yaml(shipped), words, shipped)
        if path is not None:
            path = _shipped(path, family) if re.fullmatch(r"\w+", path) else path
            self._take(load_yaml(path), words, path, f"; {shipped} has x2i's own wordings of each" if not texts else "")
        if lacking := sorted(words.keys() - self.texts.keys()):
            raise RecipeError(f"{shipped}: lacks {', '.join(lacking)}")

    def _take(self, given: object, words: Mapping[str, tuple[str, ...]], where: str, hint: str = "") -> None:
        keys = f"Its keys may be {', '.join(words)}{hint}"
        if not isinstance(given, dict):
            raise RecipeError(f"{where}: expected a mapping of keys to texts. {keys}")
        for key, said in given.items():
            if key not in words:
                near = difflib.get_close_matches(str(key), words, n=1)
                right = f"; did you mean {near[0]}?" if near else f". {keys}"
                raise RecipeError(f"{where}: has {key!r}, which means nothing here{right}")
            self.texts[key] = [said] if isinstance(said, str) else said
            _check(where, key, self.texts[key], words[key])

    def draw(self, key: str, rng: np.random.Generator, **words: str) -> str:
        """One of a key's texts, its words filled in; images are numbered by themselves."""
        texts = self.texts[key]
        text = texts[int(rng.integers(len(texts)))]
        images = {name: placeholder(_number(name)) for name in _fields(text) if _is_image(name)}
        return text.format(**images, **words)


def _shipped(name: str, family: str) -> str:
    try:
        return str(config(f"instructions/{name}.yaml"))
    except FileNotFoundError:
        raise RecipeError(
            f"tasks.{family}.instructions: x2i brings no wordings named {name!r}; a file of one's own ends in .yaml"
        ) from None


def _check(where: str, key: str, texts: object, words: tuple[str, ...]) -> None:
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
        raise RecipeError(f"{where}: {key}: expected a list of texts, at least one")
    needed = {w for w in words if _is_image(w)}
    for text in texts:
        try:
            found = _fields(text)
        except ValueError as error:
            raise RecipeError(f"{where}: {key}: {text!r}: {error}; double a brace that is meant") from None
        if found - set(words):
            odd = ", ".join(sorted(found - set(words)))
            raise RecipeError(f"{where}: {key}: {text!r} has {{{odd}}}; there are {', '.join(words) or 'none'}")
        if PLACEHOLDER.search(text):
            wanted = ", ".join(f"{{{w}}}" for w in words if _is_image(w)) or "no word in braces"
            raise RecipeError(f"{where}: {key}: {text!r} has a placeholder written out; an image stands as {wanted}")
        if needed - found:
            raise RecipeError(f"{where}: {key}: {text!r} lacks {{{', '.join(sorted(needed - found))}}}")


def _fields(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}


def _is_image(word: str) -> bool:
    return re.fullmatch(r"image(_\d+)?", word) is not None


def _number(word: str) -> int:
    return int(word.rpartition("_")[2]) if "_" in word else 1
