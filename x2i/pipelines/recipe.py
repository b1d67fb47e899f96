"""The recipe: one YAML file that says what goes into a corpus. Strict, and checked before anything starts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from x2i.base.config import Config, change, load_yaml, parse_config
from x2i.base.errors import RecipeError
from x2i.base.seeds import digest
from x2i.corpus.lake import ROWS, Column, mentioned
from x2i.pipelines import annotators as annotator_files
from x2i.pipelines import registry
from x2i.pipelines import sources as source_files
from x2i.pipelines import tasks as task_files
from x2i.pipelines.annotators.base import Annotator, Decoding
from x2i.pipelines.select.decontaminate import Decontaminate
from x2i.pipelines.select.quotas import Quota
from x2i.pipelines.select.semantic import Semantic
from x2i.pipelines.sources.base import Source
from x2i.pipelines.tasks.base import Task

#: Names in a selection that are not an annotator's.
TAKEN = ("rows", *ROWS.names, "kept", "stage", "reason", "detail", "survivor", "distance", "scores")


class Perceptual(Config):
    """Near-duplicate removal on the pHash; needs the annotator `phash`."""

    bits: int = Field(
        6,
        ge=0,
        le=32,
        description="pictures whose hashes differ in this many bits or fewer are the same, e.g. 6; time grows steeply "
        "with it (ten million pictures: half a minute to two at 6)",
    )
    annotator: str = Field("phash", description="the recipe's name of the `phash` annotator")


class Textual(Config):
    """Near-duplicate removal on captions; needs the annotator `texts`."""

    similarity: float = Field(
        0.8, gt=0.5, le=1, description="captions whose MinHash signatures agree in this share or more are the same"
    )
    annotator: str = Field(
        "texts", description="the recipe's name of the `texts` annotator whose `minhash` is compared"
    )


class Dedup(Config):
    """Which rows are the same picture, and which of them stays."""

    exact: bool = Field(
        True,
        description="drop rows whose bytes are those of another row; of rows that are samples already (with input "
        "pictures, or messages), those that also say the same",
    )
    perceptual: Perceptual | None = Field(None, description="drop near duplicates as well, e.g. {bits: 6}")
    semantic: Semantic | None = Field(
        None, description="drop look-alikes by an embedding, e.g. {column: classes.embedding, similarity: 0.95}"
    )
    text: Textual | None = Field(
        None, description="drop rows whose captions are near duplicates, too, e.g. {similarity: 0.8}"
    )
    best: list[str] = Field(
        ["image.width * image.height"],
        description="SQL expressions, most important first: the row with the highest stays; ties go to the lowest id",
    )


class Select(Config):
    """Which rows stay. Changing anything here runs no annotator."""

    require_text: bool = Field(True, description="quarantine rows that have no text")
    where: dict[str, str] = Field(
        {},
        description="name: SQL condition over `annotator.column`, e.g. safe: nsfw.score < 0.5; the name of the first "
        "that does not hold is a row's reason. A single string is taken as one condition named `where`",
    )
    decontaminate: Decontaminate | None = Field(
        None, description="drop what is near to a benchmark's images, e.g. {benchmarks: {coco: val2017}}"
    )
    dedup: Dedup = Field(Dedup(), description="duplicates")
    quotas: dict[str, Quota] = Field(
        {},
        description="name: how many rows of each group stay, drawn by content, in this order after all other rules, e.g. "
        "per_source: {by: rows.source, most: 1000}, shapes: {by: 'aspect(image.width, image.height)', share: equal}, "
        "total: {most: 100000}; the name is the reason of the rows that fall",
    )
    tasks: dict[str, float] = Field(
        {},
        description="task type: the share of the images that it is made of, drawn by content, e.g. {deblur: 0.3}; all "
        "for those not named",
    )

    @field_validator("tasks")
    @classmethod
    def _shares(cls, value: dict[str, float]) -> dict[str, float]:
        for task_type, share in value.items():
            if not 0 <= share <= 1:
                raise ValueError(f"the share of {task_type} must be from 0 to 1, not {share}")
        return value

    @field_validator("where", mode="before")
    @classmethod
    def _one_condition(cls, value: Any) -> Any:
        return {"where": value} if isinstance(value, str) else value or {}


class Output(Config):
    """How samples are stored."""

    shorter_side: int | None = Field(
        None, gt=15, description="shrink pictures to this shorter side, e.g. 512; null keeps every size. Never enlarged"
    )
    max_pixels: int | None = Field(None, gt=255, description="shrink pictures to at most this many pixels")
    jpeg_quality: int = Field(95, ge=50, le=100, description="of pictures that must be encoded again")
    jpeg_subsampling: str = Field("420", pattern="^(420|422|444)$", description="chroma subsampling of those")
    shard_samples: int = Field(1000, gt=0, description="a shard is closed at this many samples ...")
    shard_bytes: int = Field(512 * 2**20, gt=0, description="... or before it would grow beyond this many bytes")
    scores: list[str] | None = Field(
        None, description="annotator columns carried to the manifest, e.g. [nsfw.score]; null: every real-valued one"
    )
    carry: list[str] = Field(
        [],
        description="annotator columns carried to each sample's provenance, of its row and of the others in it, e.g. "
        "[rights.licence, rights.creator]; texts, numbers, yes or no",
    )


class Recipe(Config):
    """One corpus. Paths are relative to the current directory."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="the corpus's name")
    description: str = Field("", description="a sentence for the dataset card")
    license: str = Field("other", description="for the dataset card: an SPDX id, or `other`")
    sources: list[dict[str, Any]] = Field(min_length=1, description="what to read: `kind` and that kind's keys")
    lake: str = Field(description="folder of the annotations; recipes may share one")
    out: str = Field(description="folder of the corpus")
    seed: int = Field(0, description="changes every random parameter of the tasks")
    decode: Decoding = Field(Decoding(), description="limits of decoding")
    annotators: dict[str, dict[str, Any] | None] = Field(
        {},
        description="annotators by name, with their parameters; under a name of your own with `kind`, e.g. "
        "clip_b32: {kind: clip, model: ViT-B-32}",
    )
    select: Select = Field(Select(), description="which rows stay")
    tasks: dict[str, dict[str, Any] | None] = Field(
        min_length=1,
        description="task families by name, with parameters; under a name of your own with `kind`, e.g. "
        "pairs: {kind: few_shot}",
    )
    output: Output = Field(Output(), description="how samples are stored")

    def digest(self) -> str:
        """Digest of everything that the recipe says."""
        return digest("recipe/1", self.model_dump(mode="json"))


@dataclass
class Plan:
    """A recipe with its parts made: ready to run, and picklable through its recipe."""

    recipe: Recipe
    where: str
    text: str
    sources: list[Source]
    annotators: list[Annotator]  # each after those that it reads, or that its `where` names
    tasks: list[Task]

    def column(self, annotator: Annotator) -> Column:
        """Where an annotator's values lie in the lake. Raises X2IError if its weights cannot be had (their hash)."""
        return Column(annotator.name, annotator.fingerprint, self.where_of(annotator), self.reads_text(annotator))

    def columns(self) -> list[Column]:
        """Those of all annotators, in their order."""
        return [self.column(a) for a in self.annotators]

    def heavy_reads(self) -> dict[str, tuple[Annotator, list[str]]]:
        """The columns that tasks read and selections do not carry, by annotator."""
        read = {r for task in self.tasks for r in task.reads}
        heavy = {a.name: (a, sorted(c for c in a.heavy if f"{a.name}.{c}" in read)) for a in self.annotators}
        return {name: (annotator, columns) for name, (annotator, columns) in heavy.items() if columns}

    def where_of(self, annotator: Annotator) -> str | None:
        """The SQL that lets rows in: its own `where`, and that of all that it reads."""
        said = [annotator.config.where] + [self.where_of(a) for a in annotator.upstream]
        conditions = list(dict.fromkeys(w for w in said if w))
        return " and ".join(f"({c}\n)" for c in conditions) if len(conditions) > 1 else (conditions or [None])[0]

    def reads_text(self, annotator: Annotator) -> bool:
        """Whether its values depend on what the source says of a row, itself or through what it reads."""
        rows = any(r.partition(".")[0] == "rows" for r in annotator.reads)
        return rows or any(self.reads_text(a) for a in annotator.upstream)


def load(path: str | Path, changes: Sequence[str] = (), **overrides: Any) -> Plan:
    """Read a recipe and make its parts.

    Args:
        changes: keys to set, as `sources.0.path=photos`.
        overrides: replace top-level keys that are not None.

    Raises:
        RecipeError: one line per fault: file, key, what is wrong, what would be right.
    """
    data = load_yaml(path)
    recipe = parse_config(Recipe, change(data, changes, str(path)) if changes else data, str(path))
    given = {k: v for k, v in overrides.items() if v is not None}
    if given:
        recipe = recipe.model_copy(update=given)
    # the text as it stands, comments and all, unless it no longer says what is built
    text = "" if changes else Path(path).read_text(encoding="utf-8")
    plan = make(recipe, str(path), text)
    _apart(plan)
    from x2i.pipelines.select.query import check

    check(plan)
    return plan


def _apart(plan: Plan) -> None:
    """Raise RecipeError if what a build reads or keeps lies in the corpus's folder, which it replaces whole."""
    out = Path(plan.recipe.out).resolve()
    inside = {"lake": [plan.recipe.lake]}
    for number, source in enumerate(plan.sources):
        path = getattr(source.config, "path", None)
        inside[f"sources.{number}.path"] = path if isinstance(path, list) else [path] if isinstance(path, str) else []
    for key, paths in inside.items():
        for path in paths:
            # `path` may be a pattern: what stands before it says where it is
            if "://" not in path and Path(re.split(r"[*?\[{]", path)[0]).expanduser().resolve().is_relative_to(out):
                raise RecipeError(
                    f"{plan.where}: {key}: {path} lies in the corpus's folder ({plan.recipe.out}), which every build "
                    "replaces: give `out` a folder of its own"
                )


def make(recipe: Recipe, where: str = "recipe", text: str = "") -> Plan:
    """Make a recipe's sources, annotators and tasks, and check that they fit; its SQL is left to `load`.

    Workers make their plan with this: DuckDB and what it imports would cost each 60 MB and a second.

    Raises:
        RecipeError: one line per fault.
    """
    sources = [_source(spec, f"{where}: sources.{i}") for i, spec in enumerate(recipe.sources)]
    names = [s.name for s in sources]
    for name in names:
        if names.count(name) > 1:
            raise RecipeError(f"{where}: sources: two are named {name!r}; give each its own `name`")
    # `image` is what every row is judged by, so it is always there
    wanted = {"image": recipe.annotators.get("image")} | recipe.annotators
    for name in wanted:
        same = [n for n in wanted if n.lower() == name.lower() and n != name]
        if same:
            raise RecipeError(
                f"{where}: annotators: {name!r} and {same[0]!r} are one name in SQL: give one another name"
            )
    annotators = order([_annotator(n, p, recipe, f"{where}: annotators.{n}") for n, p in wanted.items()], where)
    tasks = []
    for name, parameters in recipe.tasks.items():
        key = f"{where}: tasks.{name}"
        given = dict(parameters or {})
        family = registry.find(task_files, given.pop("kind", name), Task, key)
        config = parse_config(family.Config, given, key)
        try:
            task = family(config)
        except RecipeError as error:
            raise RecipeError(f"{key}: {error}") from None
        task.name = name
        for read, remedy in task.reads.items():
            _check_read(read, annotators, key, remedy)
        tasks.append(task)
    made = [t for task in tasks for t in task.task_types()]
    for task_type in made:
        if made.count(task_type) > 1:
            both = " and ".join(
                f"tasks.{t.name}" for t in tasks for made_here in t.task_types() if made_here == task_type
            )
            raise RecipeError(
                f"{where}: tasks: {task_type!r} is made by {both}; name in the `tasks` of each what it alone is to make"
            )
    if not any(type(task).name == "published" for task in tasks):  # whose task types the rows bring with them
        for task_type in recipe.select.tasks.keys() - set(made):
            there = ", ".join(sorted(made))
            raise RecipeError(f"{where}: select.tasks: no task {task_type!r} is made; there are {there}")
    return Plan(recipe, where, text, sources, annotators, tasks)


def _annotator(name: str, parameters: dict[str, Any] | None, recipe: Recipe, key: str) -> Annotator:
    given = dict(parameters or {})
    kind = registry.find(annotator_files, given.pop("kind", name), Annotator, key)
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or name.lower() in TAKEN:
        raise RecipeError(
            f"{key}: {name!r} cannot be a name in SQL: letters, digits and _ only, and none of {', '.join(TAKEN)}"
        )
    annotator: Annotator = kind(parse_config(kind.Config, given, key), recipe.decode)
    annotator.name = name
    size = recipe.decode.shorter_side
    if annotator.needs == "pixels" and size is not None and annotator.shorter_side > size:
        raise RecipeError(
            f"{key}: looks at pictures of {annotator.shorter_side} pixels on the shorter side, but decode.shorter_side "
            f"is {size}: set that to {annotator.shorter_side} or more, or to null (every annotator that looks at pixels "
            "then has another fingerprint, and runs again)"
        )
    return annotator


def order(annotators: list[Annotator], where: str) -> list[Annotator]:
    """Each annotator after those that it reads and those that its `where` names; else as given.

    Raises:
        RecipeError: one reads something that is not there, or two wait for each other.
    """
    names = [a.name for a in annotators]
    before: dict[str, set[str]] = {}
    for annotator in annotators:
        key = f"{where}: annotators.{annotator.name}"
        for read in annotator.reads:
            _check_read(read, annotators, key)
        needed = {r.partition(".")[0] for r in annotator.reads} - {"rows"}
        before[annotator.name] = needed | set(mentioned(annotator.config.where or "", names))
    done: list[Annotator] = []
    waiting = list(annotators)
    while waiting:
        placed = {a.name for a in done}
        ready = next((a for a in waiting if before[a.name] <= placed), None)
        if ready is None:
            raise RecipeError(f"{where}: annotators: {_circle({a.name: before[a.name] - placed for a in waiting})}")
        waiting.remove(ready)
        ready.upstream = [a for a in done if a.name in {r.partition(".")[0] for r in ready.reads}]
        done.append(ready)
    return done


def _circle(before: dict[str, set[str]]) -> str:
    """Which annotators wait for each other; not those that only wait for these."""
    while len(needed := {n: b for n, b in before.items() if any(n in others for others in before.values())}) < len(
        before
    ):
        before = needed
    if len(before) == 1:
        return f"{next(iter(before))} waits for itself: it reads its own column, or its `where` does"
    return "these wait for each other: " + ", ".join(f"{n} ({', '.join(sorted(b))})" for n, b in before.items())


def _check_read(read: str, annotators: list[Annotator], key: str, remedy: str = "") -> None:
    name, _, column = read.partition(".")
    there = {a.name: a.columns.names for a in annotators} | {"rows": ["text", "meta"]}
    if name not in there:
        example = f", e.g. `{remedy}`" if remedy else ""
        raise RecipeError(f"{key}: reads {read}: there is no annotator {name!r}; add it under `annotators`{example}")
    if column not in there[name]:
        raise RecipeError(f"{key}: reads {read}: {name} has no such column; it has {', '.join(there[name])}")


def _source(spec: dict[str, Any], where: str) -> Source:
    kind = spec.get("kind")
    if not isinstance(kind, str):
        known = ", ".join(registry.names(source_files))
        raise RecipeError(f"{where}.kind: required, but not given; one of {known}")
    cls = registry.find(source_files, kind, Source, f"{where}.kind")
    source = cls(parse_config(cls.Config, spec, where))
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", source.name):
        raise RecipeError(f"{where}.name: {source.name!r} must begin with a letter or digit and hold only A-Za-z0-9._-")
    return source
