"""A judge of names and of pairs of pictures: a list of names, or a language model whose verdicts are kept in the lake.

    LAKE/judgements/<fingerprint>.parquet       key, yes, reason

A fingerprint is of the model and of the prompt. What stands there is never asked again: neither by a second build, nor by
another recipe on the same lake.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, field_validator, model_validator

from x2i.base.config import Config, load_config
from x2i.base.configs import config as shipped
from x2i.base.errors import RecipeError, X2IError
from x2i.base.files import atomic, in_turn
from x2i.base.seeds import digest
from x2i.corpus.lake import read_table
from x2i.pipelines.annotators._asking import Answer
from x2i.pipelines.annotators._openai import LATER
from x2i.pipelines.images import BadImage, decode, read_header
from x2i.pipelines.select import chat
from x2i.pipelines.select.chat import Ask, ChatConfig
from x2i.pipelines.select.names import Name, normalise

log = logging.getLogger(__name__)

SCHEMA = pa.schema([pa.field("key", pa.string(), nullable=False), ("yes", pa.bool_()), ("reason", pa.string())])

#: Questions whose answers are written together: so many are lost at most when a run is killed.
TOGETHER = 256

#: Bytes of the pictures of some rows, by row id; rows whose picture cannot be had are left out.
Pictures = Callable[[Sequence[str]], Mapping[str, bytes]]


class JudgePrompts(Config):
    """A file of prompts."""

    system: str = Field("", description="the system message; empty: none")
    name: str = Field(description="asks of a name; holds {name}, and may hold {kind}")
    seen: str = Field(description="asks of two pictures; may hold {noun}")

    @field_validator("name")
    @classmethod
    def _has_name(cls, value: str) -> str:
        if "{name}" not in value:
            raise ValueError("lacks {name}: the model would not know which name is meant")
        return value


class JudgeConfig(Config):
    """Which names stay: those of a file, or those that a language model calls real and well known."""

    names: str | None = Field(
        None, description="a file of names that stay, a line each, e.g. names.txt; # is a comment"
    )
    chat: ChatConfig | None = Field(
        None,
        description="the language model that judges, e.g. {server: http://localhost:8000/v1, model: Qwen/Qwen3-32B}",
    )
    prompts: str = Field("prompts/judge.yaml", description="the prompts' file, e.g. ./my_judge.yaml")

    @model_validator(mode="after")
    def _one(self) -> JudgeConfig:
        if (self.names is None) == (self.chat is None):
            raise ValueError("give either `names` (a file) or `chat` (a model)")
        return self


@dataclass(frozen=True)
class Verdict:
    """Yes, no, or None where the answer was neither. `reason` is what the model said, or why it said nothing."""

    yes: bool | None
    reason: str


def load_prompts(path: str) -> JudgePrompts:
    """Read a prompt file: a path, or the name of one that is shipped.

    Raises:
        RecipeError: there is no such file, or it is not as it should be.
    """
    if not Path(path).exists():
        with contextlib.suppress(FileNotFoundError):
            path = str(shipped(path))
    return load_config(JudgePrompts, path)


def read_names(path: str) -> frozenset[str]:
    """The normalised names of a file. Raises RecipeError if it cannot be read, or has none."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as a list of names ({error})") from None
    found = frozenset(n for n in (normalise(line.partition("#")[0]) for line in lines) if n)
    if not found:
        raise RecipeError(f"{path}: holds no name; write one a line")
    return found


def parse(answer: str) -> bool | None:
    """The first word of an answer, after whatever the model thought aloud: yes, no, or neither."""
    said = re.sub(r"(?s)^.*</think>|<think>.*$", "", answer)
    word = re.search(r"[^\W\d_]+", said)
    return {"yes": True, "no": False}.get(word[0].casefold()) if word else None


class Judgements:
    """Verdicts by key, kept in a file of `folder`; None keeps them for as long as this lives."""

    def __init__(self, folder: Path | None, fingerprint: str) -> None:
        self._path = folder / f"{fingerprint[:16]}.parquet" if folder is not None else None
        self._known: dict[str, Verdict] = self._read()

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __getitem__(self, key: str) -> Verdict:
        return self._known[key]

    def add(self, verdicts: Mapping[str, Verdict]) -> None:
        """Keep verdicts, beside those that others have written meanwhile."""
        self._known |= verdicts
        if self._path is None or not verdicts:
            return
        with in_turn(self._path.parent):
            self._known = self._read() | self._known
            rows = [{"key": k, "yes": v.yes, "reason": v.reason} for k, v in sorted(self._known.items())]
            with atomic(self._path) as temporary:
                pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), temporary, compression="zstd")

    def _read(self) -> dict[str, Verdict]:
        if self._path is None or not self._path.is_file():
            return {}
        rows = read_table(self._path).to_pylist()
        return {r["key"]: Verdict(r["yes"], r["reason"] or "") for r in rows}


class Judge:
    """Asks a language model, and remembers.

    Args:
        who: opens what is said of faults, e.g. `tasks.pairs.judge`.
        folder: of the verdicts, as a rule LAKE/judgements.
        model: answers instead of the one that `config` names.
    """

    def __init__(
        self, config: ChatConfig, prompts: JudgePrompts, who: str, folder: Path | None, model: chat.Model | None = None
    ) -> None:
        self._config, self._prompts, self._who, self._folder = config, prompts, who, folder
        self._model = model
        self._model_said = config.described()

    def names(self, names: Iterable[Name]) -> dict[str, Verdict]:
        """A verdict on each name, by its key.

        Raises:
            X2IError: the model cannot be asked, or some questions got no answer. What was answered is kept.
        """
        asked = {n.key: n for n in names}
        kept = Judgements(self._folder, digest("judge/1", self._prompts.system, self._prompts.name, self._model_said))

        def question(key: str) -> Ask:
            words = {"{name}": _plain(asked[key].spelling), "{kind}": asked[key].label}
            return self._question(_filled(self._prompts.name, words))

        return self._judge(list(asked), kept, lambda keys: [(k, question(k)) for k in keys])

    def seen(
        self, pairs: Sequence[tuple[str, str]], noun: str, pictures: Pictures, ids: Mapping[str, str]
    ) -> list[bool | None]:
        """Whether the subject of each pair's first picture is in its second.

        Args:
            pairs: row ids. ids: their pictures' ids, which the verdicts are kept by.
            pictures: reads the pictures of some rows; a pair that lacks one has no answer.

        Raises:
            X2IError: as `names`.
        """
        prompt = _filled(self._prompts.seen, {"{noun}": noun})
        kept = Judgements(self._folder, digest("seen/1", self._prompts.system, prompt, self._model_said))
        of = {f"{ids[a]} {ids[b]}": (a, b) for a, b in pairs}

        def questions(keys: Sequence[str]) -> list[tuple[str, Ask]]:
            there = _whole(pictures(sorted({row for key in keys for row in of[key]})))
            whole = [(key, *of[key]) for key in keys if of[key][0] in there and of[key][1] in there]
            return [(key, self._question(prompt, there[a], there[b])) for key, a, b in whole]

        verdicts = self._judge(list(of), kept, questions)
        none = Verdict(None, "no_picture")
        return [verdicts.get(f"{ids[a]} {ids[b]}", none).yes for a, b in pairs]

    def _question(self, prompt: str, *pictures: bytes) -> Ask:
        return Ask(prompt, self._prompts.system, pictures, self._config.max_tokens)

    def _judge(
        self, keys: Sequence[str], kept: Judgements, questions: Callable[[Sequence[str]], list[tuple[str, Ask]]]
    ) -> dict[str, Verdict]:
        new = sorted(k for k in keys if k not in kept)
        if new and self._folder is None:
            log.warning("%s: verdicts are not kept: name a folder in `cache`", self._who)
        failed: list[str] = []
        for at in range(0, len(new), TOGETHER):
            if self._model is None:
                self._model = chat.connect(self._config, self._who)
            asked = questions(new[at : at + TOGETHER])
            found: dict[str, Verdict] = {}
            for (key, _), answer in zip(asked, self._model.ask([q for _, q in asked]), strict=True):
                if _passing(answer):
                    failed.append(f"{answer.reason}")
                else:
                    found[key] = Verdict(parse(answer.text or ""), answer.text or f"({answer.reason})")
            kept.add(found)
        if new:
            log.info("%s: %d asked, %d known", self._who, len(new), len(keys) - len(new))
        if failed:
            raise X2IError(
                f"{self._who}: {len(failed)} of {len(new)} questions got no answer ({failed[0]}). The others' answers are "
                "kept: run the same command again."
            )
        return {k: kept[k] for k in keys if k in kept}


def _passing(answer: Answer) -> bool:
    """Whether an answer is lacking for a reason that may pass: overload, a lost connection."""
    if answer.status != "failed":
        return False
    word = (answer.reason or "").partition(":")[0]
    code = word.removeprefix("http_")
    lasting = word in ("refusal", "content_filter", "empty") or (code.isdigit() and int(code) not in LATER)
    return not lasting


def _whole(pictures: Mapping[str, bytes]) -> dict[str, bytes]:
    """The pictures that can be decoded."""
    out = {}
    for row, data in pictures.items():
        with contextlib.suppress(BadImage):
            decode(data, read_header(data))
            out[row] = data
    return out


def _filled(prompt: str, words: Mapping[str, str]) -> str:
    for word, value in words.items():
        prompt = prompt.replace(word, value)
    return prompt.strip()


def _plain(name: str) -> str:
    """A name of at most 100 characters without quotation marks or control tokens, so that no caption can give orders."""
    return " ".join(re.sub(r'[<>|"“”{}\[\]]', " ", name).split())[:100]
