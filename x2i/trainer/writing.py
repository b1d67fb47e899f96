"""What a session writes: its checkpoints, with the held-out losses and the preview that belong to them."""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from x2i import __version__
from x2i.model import lora
from x2i.model.config import ModelFile
from x2i.model.sampling import Painter
from x2i.trainer import checkpoint, parallel, parts, preview, tokens
from x2i.trainer.checkpoint import Checkpoint
from x2i.trainer.config import RunConfig
from x2i.trainer.course import Origin
from x2i.trainer.evaluation import HeldOutLoss, held_out
from x2i.trainer.learner import Learner
from x2i.trainer.meter import Logs, Meter
from x2i.trainer.progress import Progress
from x2i.trainer.saver import Copies, Saver, state_of
from x2i.trainer.setup import Setup
from x2i.trainer.world import World


class Writing:
    """Writes a run's checkpoints in the background, through `saver`."""

    def __init__(
        self, run: RunConfig, setup: Setup, learner: Learner, meter: Meter, progress: Progress, world: World
    ) -> None:
        self._run = run
        self._setup = setup
        self._learner = learner
        self._meter = meter
        self._progress = progress
        self._world = world
        self.saver = Saver(world)

    def checkpoint(
        self, place: int, stage_step: int, step: int, begun: Origin, full: bool, logs: Logs | None
    ) -> Checkpoint:
        """Begin to write a checkpoint; all ranks do it together.

        Args:
            place: of the stage; `stage_step`: steps done of it; `step`: of the run.
            begun: what the stage has begun with.
            full: with held-out losses and a preview.
            logs: are told of these.

        Raises:
            X2IError: the one before could not be written, or nothing can be written at all.
        """
        run, stage, learner = self._run, self._run.stages[place], self._learner
        self._meter.start()
        losses: dict[str, HeldOutLoss] = {}
        files: dict[str, Any] = {}
        if full:
            with learner.averaged(), self._world.alike():
                losses = held_out(learner, self._setup.batchers[place], self._setup.held_out(stage), stage)
                self._meter.lap("evaluation")
                with parallel.whole(learner.model), learner.autocast():
                    picture = self._preview(place, step, logs)
                self._meter.lap("preview")
            if picture is not None:
                files[checkpoint.PREVIEW] = picture
        files |= {
            checkpoint.CONFIG: self._described(place).model_dump(mode="json"),
            tokens.FILE: self._setup.tokenizer.to_str(pretty=True).encode(),
            checkpoint.TRAINER: {
                "format": 1,
                "step": step,
                "stage": stage.name,
                "stage_step": stage_step,
                "begun": begun,
                "seed": run.seed,
                "run": run.digest,
                "ranks": self._world.size,
                "weights": self._setup.weights,
                "corpora": [{"path": str(c.path), "digest": c.digest} for c in self._setup.table.corpora],
                "held_out": {task: asdict(loss) for task, loss in losses.items()},
                "damaged": self.damaged(),
                "versions": {"x2i": __version__, "torch": torch.__version__},
            },
        }
        optimizer = None
        if stage_step < stage.steps:
            assert learner.optimizer is not None
            optimizer = state_of(learner.model, learner.optimizer)
        written = Checkpoint(checkpoint.folder(run.output, step), step)
        self.saver.wait()  # before the next copies are made
        weights = self._weights() if run.model.lora is None else {}
        files |= {} if run.model.lora is None else self._adapters()
        self.saver.save(written.path, files, weights, optimizer, lambda: self._written(written, losses))
        if logs is not None:
            logs.held_out(losses, step)
        self._meter.lap("checkpoint")
        return written

    def damaged(self) -> list[dict[str, Any]]:
        """What could not be used, on all ranks."""
        each = self._world.gather({n: vars(d) for n, d in self._setup.reader.damaged.items()})
        return [damage for _, damage in sorted({n: d for part in each for n, d in part.items()}.items())]

    def _described(self, place: int) -> ModelFile:
        run, stage, model = self._run, self._run.stages[place], self._setup.model
        return ModelFile(
            architecture=model.config.architecture,
            model=self._setup.processors[place].config.model_dump(mode="json"),
            vae=self._setup.vae_config if model.draws else None,
            max_text_tokens=run.max_text_tokens,
            resolution=stage.resolution,
            chat_resolution=stage.chat_resolution,
            base=None if run.model.lora is None else self._setup.weights,
        )

    def _written(self, written: Checkpoint, losses: dict[str, HeldOutLoss]) -> None:
        """A checkpoint is there: say so, and remove those that are not kept."""
        shown = "  ".join(f"{t} {v.loss:.3f} ({v.baseline:.3f})" for t, v in losses.items())
        told = f"; held-out loss (of a constant answer): {shown}" if shown else ""
        self._progress.note(f"checkpoint {written.path}{told}")
        ends = {self._run.end(place) for place in range(len(self._run.stages))}
        checkpoint.prune(self._run.output, self._run.keep, ends, until=written.step)

    def _weights(self) -> dict[str, dict[str, Tensor]]:
        """The files of all weights; what they hold is a copy in host memory of what this rank has of them."""
        ema, model, copies = self._learner.ema, self._learner.model, Copies()
        state = parallel.untied(model.state_dict(), self._learner.tied)
        found = {}
        if lora.adapters(model):  # of the stage: they are in the weights already, and beside them as they are
            beside = parts.resumable(model)
            found[checkpoint.ADAPTED] = copies.of(beside)
            whole = parts.plain(model)
            state = {name: tensor for name, tensor in state.items() if name not in beside}
        else:
            whole = {}
        found[checkpoint.MODEL] = plain = copies.of(state) | whole
        if ema is not None:
            found[checkpoint.EMA] = plain | copies.of(ema)
        return found

    def _adapters(self) -> dict[str, Any]:
        """The files of a run that trains adapters alone: they are small, and rank 0 has them whole."""
        config, base, ema = self._run.model.lora, self._setup.weights, self._learner.ema
        assert config is not None
        copied = _gathered(lora.adapter_state(self._learner.model))
        found = {checkpoint.ADAPTER: copied}
        if ema is not None:
            found[checkpoint.EMA_ADAPTER] = copied | _gathered(ema)
        if not self._world.first:
            return {}
        return {name: functools.partial(lora.write_adapter, held, config, base=base) for name, held in found.items()}

    def _preview(self, place: int, step: int, logs: Logs | None) -> bytes | None:
        stage, processor = self._run.stages[place], self._setup.processors[place]
        options, side = self._run.preview, stage.resolution
        chosen = preview.choose(self._setup.reader, stage, options.per_task)
        painter = Painter(self._setup.model, self._setup.vae, processor) if self._setup.model.draws else None
        rows = preview.rows_of(painter, chosen, options, side) if painter else []
        rows += preview.answers_of(self._setup.model, processor, chosen, options, plain=stage.plain_captions)
        if not rows:
            return None
        picture = preview.grid(rows)
        buffer = io.BytesIO()
        picture.save(buffer, "PNG", optimize=True)
        if logs is not None:
            logs.picture("preview", picture, step)
        return buffer.getvalue()


def _gathered(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: parallel.full(tensor.detach()).to("cpu", copy=True) for name, tensor in state.items()}
