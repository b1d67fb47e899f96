"""`subject_pairs`: pictures of one subject across images, or of several and of each alone (the web images of X2I).

OmniGen (arXiv 2409.11340, section 3): named entities of captions, the frequent ones, of which a judge keeps real, well-known
ones; names that occur together; pictures of each name and of each pair; InternVL is asked of each single photo
whether that person is in the group photo, and a pair stays where the share of yes passes a bound for both names;
captions that tell attire and action. Subjects can also be known by what the sources say, or by features alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from x2i.base.config import Config
from x2i.base.errors import RecipeError, X2IError
from x2i.base.seeds import digest
from x2i.corpus.sample import Sample
from x2i.pipelines.select import names, verify_pairs
from x2i.pipelines.select.chat import SPEED, ChatConfig
from x2i.pipelines.select.judge import Judge, JudgeConfig, Pictures, load_prompts, read_names
from x2i.pipelines.select.verify_pairs import Ask, Verified
from x2i.pipelines.tasks import _pairing
from x2i.pipelines.tasks._described import pattern
from x2i.pipelines.tasks._told import Told
from x2i.pipelines.tasks.base import Found, Group, Selected, Skipped, Task, TaskConfig, caption, holds_placeholder

if TYPE_CHECKING:
    import duckdb

log = logging.getLogger(__name__)

Kind = Literal["same_subject", "subjects_together"]


class VerifyConfig(Config):
    """Who says whether the subject of one picture is in another, and how many must."""

    column: str | None = Field(None, description="a column of embeddings, whose cosine says it, e.g. clip.embedding")
    min_cosine: float = Field(0.6, ge=-1, le=1, description="of `column`: cosines from which it is yes, e.g. 0.75")
    chat: ChatConfig | None = Field(
        None,
        description="a vision-language model behind a server, e.g. {server: http://localhost:8000/v1, model: Qwen/…}",
    )
    prompts: str = Field("prompts/judge.yaml", description="of `chat`: the prompts' file, e.g. ./my_judge.yaml")
    min_yes: float = Field(0.5, ge=0, le=1, description="share of yes that every subject of a pair needs, e.g. 0.6")

    @model_validator(mode="after")
    def _one(self) -> VerifyConfig:
        if (self.column is None) == (self.chat is None):
            raise ValueError("give either `column` (embeddings) or `chat` (a model that sees both pictures)")
        if self.chat is not None and self.chat.backend != "openai":
            raise ValueError("chat: pictures are shown to a server only: backend: openai")
        return self


class SubjectPairsConfig(TaskConfig):
    """How subjects are known, which pictures go together, and what their captions must say."""

    by: Literal["name", "column", "features"] = Field(
        "name",
        description="how a subject is known, e.g. features. name: by the names in captions; column: by what the source "
        "says (`subject`); features: by embeddings",
    )
    tasks: tuple[Kind, ...] | None = Field(
        None, min_length=1, description="the tasks to make, e.g. [same_subject]; null: all that `by` allows"
    )
    text: str = Field("rows.text", description="column of the caption that instructions have, e.g. caption.long")
    # by name
    entities: str = Field("entities", description="by name: the annotator (`entities`) that found the names")
    labels: tuple[str, ...] = Field(
        ("PERSON",), min_length=1, description="by name: kinds of entities that are subjects, e.g. [PERSON, PRODUCT]"
    )
    judge: JudgeConfig | None = Field(
        None,
        description="by name: who keeps the well-known ones, e.g. {names: names.txt}; null: all frequent ones stay",
    )
    min_together: int = Field(
        1, ge=1, description="by name: pictures in which the same names must occur together, e.g. 3"
    )
    max_subjects: int = Field(2, ge=2, le=9, description="by name: names of one caption at most, e.g. 2 as in OmniGen")
    faces: str | None = Field(
        None, description="by name: an annotator (`faces`) that must see one face in single pictures, e.g. faces"
    )
    # by column
    subject: str = Field(
        "folder",
        description="by column: what the source says: folder (the file's), folder.1 (the first of its folders) or a key of "
        "its metadata, e.g. meta.person; each source has subjects of its own",
    )
    # by features
    features: tuple[str, ...] = Field(
        ("classes.embedding",), min_length=1, description="by features: columns of embeddings, e.g. [clip.embedding]"
    )
    neighbours: int = Field(5, ge=1, description="by features: so many best partners a picture can have, e.g. 5")
    min_score: float | None = Field(
        None,
        description="by features: how far two pictures must stand out for each other, in spreads of what each is like "
        "anyway, e.g. 8; null: 2.5 sqrt(2 ln pictures)",
    )
    # all
    min_images: int = Field(2, ge=1, description="pictures that a name or a subject must have, e.g. 5")
    max_images: int | None = Field(None, ge=2, description="pictures that it may have, e.g. 5000")
    near: int | None = Field(
        8,
        ge=0,
        le=32,
        description="pictures whose pHashes differ in so many bits or fewer do not go together, e.g. 8; "
        "null: no look at `phash`",
    )
    must_say: tuple[str, ...] | None = Field(
        None,
        description="what an output's caption must tell, e.g. [clothes, action] (lists of English words), or files of words; "
        "null: both for persons known by name, nothing else",
    )
    min_chars: int = Field(0, ge=0, le=1000, description="characters that an output's caption must have, e.g. 40")
    noun: str | None = Field(
        None, description="what instructions call a subject, e.g. dog; null: person for the label PERSON, else subject"
    )
    verify: VerifyConfig | None = Field(
        None, description="a second look at each pair, e.g. {column: clip.embedding, min_cosine: 0.7}; null: none"
    )
    singles: int = Field(5, ge=1, description="single pictures of a subject that are looked at for an output, e.g. 5")
    most: int = Field(1, ge=1, description="samples of a task that an output picture may have, e.g. 2")
    cache: str | None = Field(
        None, description="folder of a model's verdicts, e.g. lake/judgements; null: in the lake, where it is known"
    )

    @field_validator("subject")
    @classmethod
    def _known(cls, value: str) -> str:
        if not _pairing.is_subject(value):
            raise ValueError("must be folder, folder.N or meta.KEY, e.g. meta.person")
        return value

    @model_validator(mode="after")
    def _fits(self) -> SubjectPairsConfig:
        if self.by != "name" and "subjects_together" in (self.tasks or ()):
            raise ValueError("tasks: subjects_together needs by: name: only names say who is in a picture of several")
        for read in (self.text, *self.features, *([self.verify.column] if self.verify and self.verify.column else [])):
            if "." not in read:
                raise ValueError(f"{read!r} is no column (annotator.column)")
        return self


class SubjectPairs(Task):
    """`same_subject`: another picture of the subject is the input, this one the output. `subjects_together`: this one shows
    several, and the inputs are a picture of each alone.

    A picture is one of a subject alone where its caption has no other name. Verdicts of models are asked for once, and
    kept in the lake.
    """

    name = "subject_pairs"
    Config = SubjectPairsConfig
    config: SubjectPairsConfig
    words: ClassVar = {
        "in_caption": ("text",),
        "place": ("image", "noun"),
        "again": ("noun",),
        "beside": ("text", "subjects"),
        "alone": ("subjects",),
    }

    #: What the engine knows and a connection does not: reads pictures by row id while groups are made.
    pictures: Pictures | None = None

    def __init__(self, config: SubjectPairsConfig) -> None:
        super().__init__(config)
        for key, words in {"in_caption": ["text"], "beside": ["text", "subjects"], "alone": ["subjects"]}.items():
            for said in self.instructions.texts[key]:
                if lacking := [w for w in words if f"{{{w}}}" not in said]:
                    where = config.instructions or "instructions/subject_pairs.yaml"
                    raise RecipeError(f"{where}: {key}: {said!r} lacks {{{', '.join(lacking)}}}")
        self._noun = config.noun or ("person" if config.by == "name" and config.labels == ("PERSON",) else "subject")
        people = config.by == "name" and config.labels == ("PERSON",)
        self._must_say = (("clothes", "action") if people else ()) if config.must_say is None else config.must_say
        self._patterns = [pattern(p) for p in self._must_say]
        self._told = Told(self.instructions, config.text, config.entities if config.by == "name" else None)
        if config.judge is not None:
            self._prompts = load_prompts(config.judge.prompts)
            self._listed = read_names(config.judge.names) if config.judge.names else None
        if config.verify is not None and config.verify.chat is not None:
            load_prompts(config.verify.prompts)

    def task_types(self) -> list[str]:
        return list(self.config.tasks or (["same_subject", "subjects_together"] if self._named else ["same_subject"]))

    @property
    def _named(self) -> bool:
        return self.config.by == "name"

    @property
    def reads(self) -> Mapping[str, str]:
        config, out = self.config, dict[str, str]()
        if self._named:
            out[f"{config.entities}.entities"] = f"{config.entities}: {{kind: entities}}"
            if config.faces is not None:
                out[f"{config.faces}.count"] = f"{config.faces}: {{kind: faces}}"
        embeddings = list(config.features) if config.by == "features" else []
        embeddings += [config.verify.column] if config.verify and config.verify.column else []
        out |= {c: f"{c.partition('.')[0]}: {{kind: {_kind(c)}}}" for c in embeddings}
        if config.near is not None:
            out["phash.hash"] = "phash: {}"
        if not config.text.startswith("rows."):
            out[config.text] = f"{config.text.partition('.')[0]}: {{kind: caption}}"
        return out

    @property
    def fingerprint(self) -> str:
        """As of any family; where and how fast a model is asked does not count."""
        said = self.config.model_dump(mode="json", exclude={"instructions", "cache"})
        for part in (said["judge"], said["verify"]):
            if part and part["chat"]:
                part["chat"] = {k: v for k, v in part["chat"].items() if k not in SPEED}
        return digest("task/2", type(self).name, self.version, said, self.instructions.texts, self._patterns)

    def groups(self, connection: duckdb.DuckDBPyConnection, seed: int) -> Iterable[Group]:
        config = self.config
        noted = self._find(connection)
        near = ("phash.hash", config.near) if config.near is not None else None
        patterns = [*self._patterns, *([f"(?s)^\\s*.{{{config.min_chars},}}"] if config.min_chars else [])]
        ask = self._ask(connection)
        for task_type in self.task_types():
            photos = self._photos(task_type)
            salt = f"subject_pairs/1 {seed} {task_type} "
            found = _pairing.candidates(connection, photos, salt, config.singles, (config.text, patterns), near)
            kept = 0
            for pair in verify_pairs.verified(found, ask, self._min_yes):
                kept += 1
                yield from self._grouped(task_type, pair, noted)
            log.info("%s: %s: %d pictures have partners", self.name, task_type, kept)

    def _find(self, connection: duckdb.DuckDBPyConnection) -> dict[str, dict[str, Any]]:
        """Make the tables of subjects; what is to be noted of each."""
        config = self.config
        if config.by == "column":
            count = _pairing.by_column(connection, config.subject, config.min_images, config.max_images)
            log.info("%s: %d subjects", self.name, count)
            return {}
        if config.by == "features":
            pairs = _pairing.alike(connection, config.features, config.neighbours, config.min_score, config.near)
            _pairing.by_pairs(connection, pairs)
            log.info("%s: %d pairs stand out", self.name, pairs.num_rows)
            scores: dict[str, dict[str, Any]] = {}
            for pair in pairs.to_pylist():
                scores.setdefault(pair["a"], {})[pair["b"]] = scores.setdefault(pair["b"], {})[pair["a"]] = pair[
                    "score"
                ]
            return scores
        names.mentions(connection, config.entities, config.labels)
        frequent = names.names(connection, config.min_images, config.max_images)
        wanted = self._judged(connection, frequent)
        log.info(
            "%s: %d names in %d pictures or more, %d stay", self.name, len(frequent), config.min_images, len(wanted)
        )
        _pairing.by_name(connection, wanted, config.max_subjects, config.min_together, config.faces)
        return {n.key: {"name": n.spelling, "label": n.label} for n in wanted}

    def _judged(self, connection: duckdb.DuckDBPyConnection, found: list[names.Name]) -> list[names.Name]:
        judge = self.config.judge
        if judge is None:
            return found
        if self._listed is not None:
            return [n for n in found if n.key in self._listed]
        assert judge.chat is not None
        asked = Judge(judge.chat, self._prompts, f"tasks.{self.name}.judge", self._cache(connection))
        verdicts = asked.names(found)
        return [n for n in found if verdicts[n.key].yes]

    def _cache(self, connection: duckdb.DuckDBPyConnection) -> Path | None:
        if self.config.cache is not None:
            return Path(self.config.cache)
        ((lake,),) = connection.execute("select getvariable('lake')").fetchall()
        return Path(lake) / "judgements" if lake else None

    @property
    def _min_yes(self) -> float:
        return self.config.verify.min_yes if self.config.verify else 0.0

    def _ask(self, connection: duckdb.DuckDBPyConnection) -> Ask | None:
        verify = self.config.verify
        if verify is None:
            return None
        if verify.column is not None:
            return verify_pairs.by_cosine(connection.cursor(), verify.column, verify.min_cosine)
        assert verify.chat is not None
        if self.pictures is None:
            raise X2IError(
                f"tasks.{self.name}.verify.chat: pictures cannot be read while groups are made: use `column` instead"
            )
        pictures = self.pictures
        who = f"tasks.{self.name}.verify"
        judge = Judge(verify.chat, load_prompts(verify.prompts), who, self._cache(connection))
        beside = connection.cursor()  # the connection itself is busy with the candidates

        def ask(pairs: Any) -> list[bool | None]:
            rows = sorted({row for pair in pairs for row in pair})
            ids = dict(beside.execute("select row_id, image_id from kept where row_id in ?", [rows]).fetchall())
            return judge.seen(pairs, self._noun, pictures, ids)

        return ask

    def _photos(self, task_type: str) -> str:
        """A query for the pictures that could be outputs of a task."""
        if task_type == "subjects_together":
            return f'select row_id, image_id, subject, nth from "{_pairing.TOGETHER}"'
        if self.config.by == "features":
            subjects = f'(select distinct subject as row_id from "{_pairing.SINGLES}")'
            return f"select row_id, image_id, row_id as subject, 1 as nth from kept semi join {subjects} using (row_id)"
        return f'select row_id, image_id, subject, 1 as nth from "{_pairing.SINGLES}"'

    def _grouped(self, task_type: str, pair: Verified, noted: Mapping[str, dict[str, Any]]) -> Iterator[Group]:
        for turn in range(min(self.config.most, max(map(len, pair.singles)))):
            about: dict[str, Any] = {"noun": self._noun, "by": self.config.by}
            if self._named:
                about["subjects"] = [{"key": s, **noted[s]} for s in pair.subjects]
            elif self.config.by == "column":
                about["subjects"] = [{"name": pair.subjects[0].partition(" ")[2]}]
            others = tuple(s[turn % len(s)] for s in pair.singles)
            if self.config.by == "features":
                about["score"] = noted[pair.photo][others[0]]
            if pair.shares is not None:
                about["yes"] = list(pair.shares)
            yield Group(pair.photo, task_type, others, about)

    def build(self, row: Selected) -> Iterator[Sample | Skipped]:
        for task_type in self.task_types():
            mine = [g for g in row.groups if g.task_type == task_type]
            for number, group in enumerate(mine):
                yield self._sample(row, group, str(number) if number else "")
            if not mine:
                yield Skipped(task_type, "no_partner")

    def _sample(self, row: Selected, group: Found, variant: str) -> Sample | Skipped:
        if group.problem is not None:
            return Skipped(group.task_type, f"partner_{group.problem}")
        text = caption(row, self.config.text)
        if holds_placeholder(text):
            return Skipped(group.task_type, "text_has_placeholders")
        rng: np.random.Generator = row.generator(f"{group.task_type} {variant}")
        instruction, in_caption = self._told.instruction(row, text, group, rng)
        parameters = {k: v for k, v in group.about.items() if k != "noun"} | {"in_caption": in_caption}
        return row.sample(
            group.task_type,
            instruction,
            [o.picture for o in group.others],
            parameters,
            others=group.others,
            variant=variant,
        )


def _kind(column: str) -> str:
    """The annotator that a column of embeddings is usually from."""
    name = column.partition(".")[0]
    return "clip" if name.startswith("clip") else "classes"
