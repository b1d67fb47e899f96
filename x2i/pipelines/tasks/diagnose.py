"""`diagnose`: a damaged picture, the question what is wrong with it, and the answer (DepictQA, Q-Instruct).

Pictures are damaged by `restoration`, with draws of their own: its own sample of the same picture names the damage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal, get_args

import numpy as np
from pydantic import Field

from x2i.base.errors import RecipeError
from x2i.base.seeds import digest
from x2i.corpus.sample import Picture, Sample
from x2i.pipelines.tasks.base import Selected, Skipped, Task, TaskConfig
from x2i.pipelines.tasks.restoration import Restoration, RestorationConfig

# no super_resolution: a small picture is not a bad one, and enlarged it is a blurred one
Kind = Literal[
    "deblur", "motion_deblur", "denoise", "derain", "low_light", "jpeg_artifacts", "colorize", "inpaint",
    "inpaint_freeform", "inpaint_object", "outpaint",
]  # fmt: skip

CLEAN = "clean"

#: Answers that are not wrong enough of each other's pictures to be rejected: both are blurred; the dark is noisy too.
ALIKE = ({"deblur", "motion_deblur"}, {"denoise", "low_light"}, {"inpaint", "inpaint_object"})


class DiagnoseConfig(TaskConfig):
    """What may be wrong with a picture, and whether a worse answer stands beside the right one."""

    tasks: tuple[Kind, ...] = Field(
        ("deblur", "denoise", "colorize", "inpaint"),
        min_length=1,
        description="damages to ask for, by the names of `restoration`'s tasks, e.g. [denoise, low_light]",
    )
    clean: bool = Field(True, description="also ask about the picture as it is, of which nothing is wrong, e.g. false")
    rejected: bool = Field(
        False, description="add `rejected_response`, the answer of another damage, for preference training, e.g. true"
    )
    restoration: RestorationConfig = Field(
        RestorationConfig(),
        description="strengths of the damages, as under `restoration`, e.g. {blur: [0.02, 0.05]}; its `tasks` and "
        "wordings mean nothing here, so that a YAML anchor may name the same block",
    )


class Diagnose(Task):
    """One conversation per row and damage, and one of the row's picture as it is; the answer is the last message.

    All have the task type `diagnose`; the `degradation` in the provenance's parameters says which damage, with what
    `restoration` drew for it, or `clean`. What `restoration` cannot damage is skipped with its reason
    (`colorize_already_grey`). Where lost colours are asked for, a grey photograph is not called faultless.

    Grey pictures have nothing to draw, so that input is the same as `restoration`'s own; whole-numbered kernels and
    qualities may fall the same by chance.

    Raises:
        RecipeError: worse answers are asked for where every answer is the same.
    """

    name = "diagnose"
    words: ClassVar = dict.fromkeys(("question", CLEAN, *get_args(Kind)), ())
    Config = DiagnoseConfig
    config: DiagnoseConfig

    def __init__(self, config: DiagnoseConfig) -> None:
        super().__init__(config)
        damages = {"tasks": tuple(dict.fromkeys(config.tasks)), "wording": "own", "instructions": None}
        self._restoration = Restoration(config.restoration.model_copy(update=damages))
        answers = [*self._restoration.task_types(), *[CLEAN] * config.clean]
        if config.rejected and (alone := [k for k in answers if all(_alike(k, other) for other in answers)]):
            raise RecipeError(
                f"tasks.diagnose.rejected: no other answer is wrong of {alone[0]}; name further `tasks`, or clean: true"
            )

    @property
    def reads(self) -> Mapping[str, str]:
        return self._restoration.reads

    def task_types(self) -> list[str]:
        return [self.name]

    @property
    def fingerprint(self) -> str:
        """See `Task.fingerprint`; the damages count too."""
        return digest(super().fingerprint, self._restoration.fingerprint)

    def build(self, row: Selected) -> Iterator[Sample | Skipped]:
        shown: dict[str, tuple[Picture, dict[str, Any]]] = {}
        for made in self._restoration.build(self._apart(row)):
            if isinstance(made, Skipped):
                yield Skipped(self.name, f"{made.task_type}_{made.reason}")
            else:
                shown[made.task_type] = made.input_images[0], made.provenance["parameters"]
        if self.config.clean:
            if "colorize" in self._restoration.task_types() and "colorize" not in shown:
                yield Skipped(self.name, "clean_already_grey")
            else:
                shown[CLEAN] = row.picture, {}
        for kind, (picture, parameters) in shown.items():
            rng = row.generator(f"{self.name} {kind}")
            question, answer = self.instructions.draw("question", rng), self.instructions.draw(kind, rng)
            rejected = self._worse(kind, list(shown), rng)  # the last draw: question and answer are the same without
            if self.config.rejected and rejected is None:
                yield Skipped(self.name, f"{kind}_no_worse_answer")
                continue
            yield row.conversation(
                self.name,
                [{"role": "user", "content": f"<image>{question}"}, {"role": "assistant", "content": answer}],
                {"degradation": kind, **parameters},
                images=[picture],
                rejected_response=rejected,
                variant=kind,
            )

    def _apart(self, row: Selected) -> Selected:
        """The row as `restoration` is to see it: with another seed."""
        apart = replace(row, seed=int(digest("diagnose/1", row.seed)[:15], 16))
        if "pixels" in row.__dict__:  # decoded already
            apart.__dict__["pixels"] = row.pixels
        return apart

    def _worse(self, kind: str, there: list[str], rng: np.random.Generator) -> str | None:
        """An answer that is wrong of this damage; that of a damage which can be seen on this photograph."""
        if not self.config.rejected:
            return None
        others = [other for other in there if not _alike(kind, other)]
        return self.instructions.draw(others[int(rng.integers(len(others)))], rng) if others else None


def _alike(one: str, other: str) -> bool:
    return one == other or {one, other} in ALIKE
