"""run.json: what a run is, and on which corpora it was trained; checked before it goes on.

`corpora` are those of now; `changes` says up to which step the run had others, which `--reconcile` let it leave.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from x2i.base.errors import RecipeError, X2IError
from x2i.base.files import remove, write_text
from x2i.corpus.corpus import Corpus
from x2i.trainer import changes, checkpoint
from x2i.trainer.checkpoint import Checkpoint
from x2i.trainer.config import RunConfig
from x2i.trainer.course import plot

FILE, LOGS = "run.json", "logs"

#: What `x2i forget` keeps of a run's samples; and of those before a change.
SAMPLES, SAMPLES_UNTIL = "samples.parquet", "samples-until-{:06d}.parquet"

#: Of run.json. 2: samples come in the order of `x2i.trainer.plan` by row groups. 3: the optimiser's state is divided.
#: 4: blocks of neighbours are shuffled, ranks divide a step by where its samples lie, pixels are scaled by another library.
FORMAT = 4


def claim(
    config: RunConfig,
    corpora: Sequence[Corpus],
    found: Sequence[Checkpoint],
    reconcile: bool,
    stage: str | None = None,
) -> list[str]:
    """Write what this run is into its folder, or compare with what is there.

    As long as there is no checkpoint the run is new, and may change at will.

    Args:
        config: the run file.
        corpora: those that it names, as they are now.
        found: the run's checkpoints.
        reconcile: go on with corpora that have changed, and note it.
        stage: the only one to train.

    Returns:
        What has changed in the corpora.

    Raises:
        RecipeError: they differ.
    """
    now = {
        "format": FORMAT,
        "run": config.digest,
        "corpora": _named(corpora),
        "config": config.identity(),
    }
    path = config.output / FILE
    if not found:
        for name in (LOGS, checkpoint.VAE_FOLDER, changes.FILE):
            remove(config.output / name)
        _write(path, now)
        return []
    before = _read(path)
    if before["format"] != FORMAT:
        raise RecipeError(
            f"{config.output}: this run was begun by another x2i (format {before['format']}, this one has {FORMAT}), "
            "which gave it its samples or its noise otherwise: it cannot go on exactly. Give another `output`, with "
            f"`model: {{weights: {config.output}}}` to start from its newest checkpoint; or use --fresh to remove it and "
            "start over."
        )
    altered = changes.leaves(before["config"], now["config"])
    corpora_altered = changes.differences(config.output, before["corpora"], corpora)
    if altered or (corpora_altered and not reconcile):
        listed = "\n".join(f"  {line}" for line in altered + corpora_altered)
        way = "" if altered else ", use --reconcile to go on with the corpora as they are"
        raise RecipeError(
            f"{config.output}: this folder holds another run; since it began these have changed:\n{listed}\n"
            f"Undo the changes to go on with it{way}, give another `output`, or use --fresh to remove it and start over."
        )
    if not corpora_altered:
        return []
    course, step = plot(config, found, stage), found[-1].step
    if not course.places:
        return []
    if course.ahead:
        raise RecipeError(
            f"{config.output}: --reconcile: there is a checkpoint of a later step, {step}, and the record could not say "
            "which steps were trained on which corpora: train what lies before it on the old corpora, or elsewhere"
        )
    if len(corpora) < len(before["corpora"]):
        raise RecipeError(
            f"{config.output}: --reconcile: the run has read {len(before['corpora'])} corpora, and the run file names "
            f"{len(corpora)}: its ledger calls them by their places, so name them all (new ones at the end), and leave "
            "one out of the mixtures if it is not to be read any more"
        )
    past = before.get("changes", [])
    if not past or past[-1]["step"] < step:  # otherwise no step was made with what is left now
        past = [*past, {"step": step, "corpora": before["corpora"]}]
        kept = config.output / SAMPLES
        if kept.is_file():
            kept.replace(config.output / SAMPLES_UNTIL.format(step))
    _write(path, now | {"changes": past})
    return corpora_altered


def corpora_at(record: dict[str, Any], step: int | None) -> list[dict[str, str]]:
    """`path` and `digest` of the corpora that step `step` (from 1) of a run was trained on; None: those of now."""
    for change in record.get("changes", []):
        if step is not None and step <= change["step"]:
            return list(change["corpora"])
    return list(record["corpora"])


def read(output: Path) -> dict[str, Any]:
    """A run's record. Raises X2IError if there is none."""
    try:
        return _read(output / FILE)
    except RecipeError:
        raise X2IError(f"{output}: no run here: {FILE} is missing or damaged") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        _ = record["format"], record["config"], [(c["path"], c["digest"]) for c in record["corpora"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(
            f"{path}: missing or damaged ({error}). Use --fresh to start over, or another `output`."
        ) from None
    return record


def _write(path: Path, record: dict[str, Any]) -> None:
    write_text(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def _named(corpora: Sequence[Corpus]) -> list[dict[str, str]]:
    return [{"path": str(c.path), "digest": c.digest} for c in corpora]
