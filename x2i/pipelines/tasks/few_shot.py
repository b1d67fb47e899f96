"""`few_shot`: one example of an image-to-image task, before and after, then a query of the same task (OmniGen, X2I)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from x2i.base.config import parse_config
from x2i.base.errors import RecipeError
from x2i.corpus.sample import Sample
from x2i.pipelines import registry
from x2i.pipelines import tasks as task_files
from x2i.pipelines.tasks._neighbours import neighbours
from x2i.pipelines.tasks.base import Group, Selected, Skipped, Task, TaskConfig
from x2i.pipelines.tasks.published import Published

if TYPE_CHECKING:
    import duckdb


class FewShotConfig(TaskConfig):
    """Which tasks are shown by an example, and of how many rows."""

    of: dict[str, dict[str, Any] | None] = Field(
        min_length=1,
        description="task families with their parameters, as under `tasks`, e.g. {restoration: {tasks: [deblur]}}",
    )
    share: float = Field(0.2, gt=0, le=1, description="share of the rows that become queries of a task, e.g. 0.2")


class FewShot(Task):
    """`few_shot_TASK` for each task type of the families in `of` whose samples have one input picture.

    The query is a sample of its own row; the example is the same task's sample of another kept row, the next one in an
    order that comes from the images' ids. Parameters of both are in the provenance.
    """

    name = "few_shot"
    words: ClassVar = {"few_shot": ("image_1", "image_2", "image_3")}
    Config = FewShotConfig

    def __init__(self, config: FewShotConfig) -> None:
        super().__init__(config)
        self._families: list[Task] = []
        for name, parameters in config.of.items():
            key = f"of.{name}"
            given = dict(parameters or {})
            family = registry.find(task_files, given.pop("kind", name), Task, key)
            if family is Published:
                raise RecipeError(
                    f"{key}: a published pair has an instruction of its own, which no other pair explains"
                )
            made: Task = family(parse_config(family.Config, given, key))
            if several := made.of_groups():
                raise RecipeError(
                    f"{key}: {', '.join(several)}: looks at several rows itself; name tasks of one picture"
                )
            self._families.append(made)

    @property
    def reads(self) -> Mapping[str, str]:
        return {column: remedy for task in self._families for column, remedy in task.reads.items()}

    def task_types(self) -> list[str]:
        return [f"few_shot_{t}" for task in self._families for t in task.task_types()]

    @property
    def fingerprint(self) -> str:
        from x2i.base.seeds import digest

        return digest(super().fingerprint, [t.fingerprint for t in self._families])

    def groups(self, connection: duckdb.DuckDBPyConnection, seed: int) -> Iterable[Group]:
        for task_type in self.task_types():
            for anchor, example in neighbours(connection, f"few_shot/1 {seed} {task_type} ", self.config.share):
                yield Group(anchor, task_type, (example,))

    def build(self, row: Selected) -> Iterator[Sample | Skipped]:
        asked = {g.task_type for g in row.groups}
        yield from (Skipped(t, "not_drawn") for t in self.task_types() if t not in asked)
        if not asked:
            return
        queries = self._made(row)
        for group in row.groups:
            inner = group.task_type.removeprefix("few_shot_")
            if group.problem is not None:
                yield Skipped(group.task_type, f"example_{group.problem}")
                continue
            query, example = queries.get(inner), self._made(group.others[0], inner).get(inner)
            reason = _unfit(query, "query") or _unfit(example, "example")
            if reason or not isinstance(query, Sample) or not isinstance(example, Sample):
                yield Skipped(group.task_type, reason or "no_sample")
                continue
            assert example.output_image is not None and query.output_image is not None
            yield row.sample(
                group.task_type,
                self.instructions.draw("few_shot", row.generator(group.task_type)),
                [example.input_images[0], example.output_image, query.input_images[0]],
                {"query": query.provenance["parameters"], "example": example.provenance["parameters"]},
                output=None if query.output_image == row.picture else query.output_image,
                mask=query.mask,
                others=group.others,
            )

    def _made(self, row: Selected, only: str | None = None) -> dict[str, Sample | Skipped]:
        alone = replace(row, groups=())
        if "pixels" in row.__dict__:
            alone.__dict__["pixels"] = row.pixels
        out: dict[str, Sample | Skipped] = {}
        for task in self._families:
            if only is None or only in task.task_types():
                for made in task.build(alone):
                    out.setdefault(made.task_type, made)
        return out


def _unfit(made: Sample | Skipped | None, who: str) -> str | None:
    if made is None:
        return f"{who}_has_none"
    if isinstance(made, Skipped):
        return f"{who}_{made.reason}"
    return None if len(made.input_images) == 1 and made.output_image is not None else f"{who}_has_not_one_input"
