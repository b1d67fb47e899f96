"""Prompts of `caption`: templates from a YAML file, of which each picture draws one by its id."""

from __future__ import annotations

import contextlib
import re
from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from x2i.base.config import Config, load_config
from x2i.base.configs import config
from x2i.base.seeds import digest, generator

#: What a caption is of.
Kind = Literal["short", "long"]

#: Characters of the caption that a picture came with that are put into a prompt.
MOST_TEXT = 1000


class Prompts(Config):
    """A prompt file. `{text}` in a wording stands for the caption that the picture came with."""

    system: str = Field("", description="the system message, for both kinds; empty: none")
    short: list[str] = Field(min_length=1, description="wordings that ask for a short caption")
    long: list[str] = Field(min_length=1, description="wordings that ask for a long caption")

    @field_validator("short", "long")
    @classmethod
    def _for_rows_without_a_text(cls, wordings: list[str]) -> list[str]:
        if all("{text}" in w for w in wordings):
            raise ValueError("every wording holds {text}; add one without it, for pictures that came without a caption")
        return wordings

    @cached_property
    def uses_text(self) -> bool:
        """Whether any wording holds the caption that the picture came with."""
        return any("{text}" in w for w in self.short + self.long)

    def draw(self, kind: Kind, image_id: str, text: str | None, seed: int = 0) -> tuple[str, str]:
        """A wording as it stands in the file, and the prompt that it makes."""
        plain = _plain(text or "")
        fit = [w for w in getattr(self, kind) if plain or "{text}" not in w]
        wording = fit[int(generator("caption/1", seed, image_id, kind).integers(len(fit)))]
        return wording, wording.replace("{text}", plain)

    def fingerprint(self, wordings: list[str]) -> str:
        """16 hex digits that say which wordings were put to the model, with which system message."""
        return digest("prompt/1", self.system, wordings)[:16]


def load(path: str) -> Prompts:
    """Read a prompt file: a path, or the name of one that is shipped, e.g. `prompts/caption.yaml`.

    Raises:
        RecipeError: there is no such file, or it is not as it should be.
    """
    if not Path(path).exists():
        with contextlib.suppress(FileNotFoundError):  # `load_config` says it better, with the nearest name
            path = str(config(path))
    return load_config(Prompts, path)


def _plain(text: str) -> str:
    """A caption without tags, so that no web page can write a model's control tokens (<|im_end|>, <image>, …)."""
    return " ".join(re.sub(r"<[^<>]*>|<\||\|>", " ", text[: 4 * MOST_TEXT]).split())[:MOST_TEXT]
