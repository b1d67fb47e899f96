"""From decoded samples to what one training step needs: latents, noise, timesteps, and the model's own inputs."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from x2i.base.errors import X2IError
from x2i.base.seeds import generator
from x2i.model.base import Document, PackInputs, Processor, Request
from x2i.model.pixels import to_tensor
from x2i.model.vae import VAE
from x2i.trainer import losses
from x2i.trainer.data import Example
from x2i.trainer.plan import Draw
from x2i.trainer.stage import EditLoss, Stage

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DrawBatch:
    """Pictures to be drawn; row i is `examples[i]`. `weights` of the error [B, 1 or C, H, W], if any.

    Of every kind of batch, `own` says which rows count here: others are another rank's, and only fill this one's; `lengths`
    are the rows' tokens without padding, where they were asked for.
    """

    examples: tuple[Example, ...]
    data: Tensor  # clean latents [B, C, H, W]
    noise: Tensor  # [B, C, H, W]
    t: Tensor  # [B]
    inputs: Any
    weights: Tensor | None = None
    dropped: tuple[bool, ...] = ()
    own: tuple[bool, ...] = ()
    lengths: tuple[int, ...] = ()


@dataclass(frozen=True)
class ChatBatch:
    """Conversations to be answered; row i is `examples[i]`. `rejected`: the same with worse answers."""

    examples: tuple[Example, ...]
    inputs: Any
    rejected: Any | None = None
    own: tuple[bool, ...] = ()
    lengths: tuple[int, ...] = ()

    @property
    def learned(self) -> Tensor:
        """Tokens of each row that are learned, [B]."""
        counts: Tensor = (self.inputs.labels_BL[:, 1:] != _IGNORED).sum(dim=1)
        return counts


@dataclass(frozen=True)
class PackBatch:
    """One pack: pictures to be drawn, then conversations; `examples` are in this order.

    Attributes:
        data, noise: latents [C, H, W] of each picture, which may differ in size; `t` [G] and `dropped` are theirs, too.
        weights: of each picture's error [1 or C, H, W], or None.
        length: tokens of the pack, padding included.
        preferred: whether each conversation is two documents: with the chosen answer, then with the rejected one.
        left_out: samples that were planned for this pack and did not fit.
    """

    examples: tuple[Example, ...]
    data: tuple[Tensor, ...]
    noise: tuple[Tensor, ...]
    t: Tensor
    inputs: PackInputs
    weights: tuple[Tensor | None, ...]
    dropped: tuple[bool, ...]
    length: int
    preferred: bool = False
    left_out: tuple[Example, ...] = ()
    own: tuple[bool, ...] = ()
    lengths: tuple[int, ...] = ()

    @property
    def learned(self) -> Tensor:
        """Tokens of each conversation that are learned; of the chosen answer, where there are two."""
        counts_K = self.inputs.learned.counts_K
        return counts_K[::2] if self.preferred else counts_K

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        return sum(self.inputs.lengths)


Batch = DrawBatch | ChatBatch | PackBatch

#: Label of what is not learned, in all architectures' batches; what cross-entropy passes over.
_IGNORED = -100


class Batcher:
    """Encodes samples for a model. Noise, timestep and dropout of a sample depend on its draw alone."""

    def __init__(self, processor: Processor[Any], vae: VAE, device: torch.device) -> None:
        self._processor = processor
        self._vae = vae
        self._device = device

    def training(
        self,
        examples: Sequence[Example],
        seed: int,
        stage: Stage,
        owned: Container[int] | None = None,
        draws: Mapping[int, Draw] | None = None,
        filler: Example | None = None,
    ) -> list[Batch]:
        """The batches of one rank's share of a step: pictures, then conversations, or packs of both.

        Pictures get logit-normal timesteps (Esser et al. 2403.03206), and some of their conditions are dropped.

        Args:
            examples: of the rank's draws.
            owned: numbers of the draws that count on this rank; default: all.
            draws: by number, those of the examples; packs are made as they say.
            filler: a conversation of another rank's, to compute where the model can be shown none of this one's.
        """
        if stage.pack is not None:
            assert draws is not None
            packs: dict[int | None, list[Example]] = {}
            for example in examples:
                packs.setdefault(draws[example.draw].pack, []).append(example)
            made = [self._pack(some, seed, stage, draws) for some in packs.values()]
            return [replace(pack, own=_own(pack, owned)) for pack in made]
        pictures = [e for e in examples if e.output is not None]
        chats = [e for e in examples if e.output is None]
        out: list[Batch] = []
        for some in _parts(pictures, stage.micro_batch):
            drawn, t = _drawn(some, seed, stage)
            dropped = [g.random() < stage.condition_dropout for g in drawn]
            batch = self.draw(some, drawn, t, dropped, stage.edit_loss)
            out.append(replace(batch, own=_own(batch, owned)))
        rejected = stage.preference is not None
        for chat in self._chats(chats, stage.micro_batch, stage.plain_captions, rejected, filler):
            out.append(replace(chat, own=tuple(o and f for o, f in zip(_own(chat, owned), chat.own, strict=True))))
        return out

    def _pack(self, examples: Sequence[Example], seed: int, stage: Stage, draws: Mapping[int, Draw]) -> PackBatch:
        """One pack. What the model cannot be shown, or does not fit any more, is left out."""
        assert stage.pack is not None
        order = sorted(examples, key=lambda e: (e.output is None, e.draw))
        drawn, times = _drawn(order, seed, stage)
        posterior = [[self._posterior(g)] for g in drawn]
        kept: list[int] = []
        documents: list[Any] = []
        left: list[Example] = []
        room = stage.pack.tokens
        for place, example in enumerate(order):
            try:
                made = self._documents(example, bool(draws[example.draw].dropped), stage, posterior[place])
            except X2IError as error:
                log.warning("left out: sample %s (%s): %s", example.key, example.task, error)
                continue
            length = sum(document.length for document in made)
            if length > room:
                left.append(example)
                continue
            room -= length
            kept.append(place)
            documents += made
        if not kept:
            raise X2IError(
                f"stages.{stage.name}.pack: none of the samples of a pack can be shown; the first: {order[0].key}"
            )
        some = [order[place] for place in kept]
        pictures = [place for place in kept if order[place].output is not None]
        shown = [order[place] for place in pictures]
        dropped = tuple(bool(draws[e.draw].dropped) for e in shown)
        data = self._latents([_output(e) for e in shown], [posterior[place][0] for place in pictures])
        noise = [
            torch.from_numpy(drawn[place].standard_normal(tuple(one.shape), dtype=np.float32)).to(self._device)
            for place, one in zip(pictures, data, strict=True)
        ]
        return PackBatch(
            examples=tuple(some),
            data=tuple(data),
            noise=tuple(noise),
            t=torch.tensor([times[place] for place in pictures], dtype=torch.float32, device=self._device),
            inputs=self._processor.pack(documents, stage.pack.tokens).to(self._device),
            weights=tuple(
                self._packed_weights(e, drop, stage.edit_loss) for e, drop in zip(shown, dropped, strict=True)
            ),
            dropped=dropped,
            length=stage.pack.tokens,
            preferred=stage.preference is not None,
            left_out=tuple(left),
        )

    def _documents(
        self, example: Example, dropped: bool, stage: Stage, posterior: Sequence[torch.Generator]
    ) -> list[Document]:
        """A sample's document, or both of a preference."""
        if example.output is None:
            chats = [example.chat] if stage.preference is None else [example.chat, example.rejected_chat]
            return self._processor.documents([], [], [], chats, stage.plain_captions)
        request = Request(example.instruction, example.inputs)
        size = example.output.shape[0], example.output.shape[1]
        return self._processor.documents([request], [dropped], [size], [], generators=posterior)

    def _latents(self, images: Sequence[np.ndarray], generators: Sequence[torch.Generator]) -> list[Tensor]:
        """Latents [C, H, W] of pictures of several sizes; those of one size are encoded together."""
        sizes: dict[tuple[int, ...], list[int]] = {}
        for place, image in enumerate(images):
            sizes.setdefault(image.shape, []).append(place)
        found: dict[int, Tensor] = {}
        for places in sizes.values():
            pixels = to_tensor([images[p] for p in places]).to(self._device)
            found |= zip(places, self._vae.encode(pixels, [generators[p] for p in places]), strict=True)
        return [found[place] for place in range(len(images))]

    def _packed_weights(self, example: Example, dropped: bool, loss: EditLoss | None) -> Tensor | None:
        found = None if loss is None else self._weights([example], [dropped], loss)
        return None if found is None else found[0]

    def _chats(
        self, chats: Sequence[Example], size: int | None, plain: bool, rejected: bool, filler: Example | None
    ) -> list[ChatBatch]:
        """As many batches as the number of conversations asks for, also if the model cannot be shown all of them."""
        try:
            found = [self._chat(some, plain, rejected) for some in _parts(chats, size)]
            return [replace(b, own=(True,) * len(b.examples)) for b in found]
        except X2IError:
            faults = [self._refused(e, plain, rejected) for e in chats] if filler is not None else []
            if filler is not None and all(faults):
                log.warning("left out: %s", "; ".join(faults))
                some = [filler]
            else:
                some = self._shown(chats, plain, rejected)
        count, shown = len(_parts(chats, size)), len(some)
        rows = [(some[i % shown], i < shown) for i in range(max(count, shown))]
        parts = [rows[len(rows) * i // count : len(rows) * (i + 1) // count] for i in range(count)]
        return [
            replace(self._chat([e for e, _ in part], plain, rejected), own=tuple(own for _, own in part))
            for part in parts
        ]

    def draw(
        self,
        examples: Sequence[Example],
        generators: Sequence[np.random.Generator],
        t: Sequence[float],
        dropped: Sequence[bool] | None = None,
        edit_loss: EditLoss | None = None,
    ) -> DrawBatch:
        """A batch at given timesteps, with noise from one generator per sample."""
        dropped = dropped or [False] * len(examples)
        targets = [e.output for e in examples if e.output is not None]
        posterior = [self._posterior(g) for g in generators]
        data = self._vae.encode(to_tensor(targets).to(self._device), posterior)
        requests = [Request(e.instruction, e.inputs) for e in examples]
        size = targets[0].shape[0], targets[0].shape[1]
        inputs = self._processor.requests(requests, dropped, [self._posterior(g) for g in generators], size)
        noise = np.stack([g.standard_normal(tuple(data.shape[1:]), dtype=np.float32) for g in generators])
        return DrawBatch(
            examples=tuple(examples),
            data=data,
            noise=torch.from_numpy(noise).to(self._device),
            t=torch.tensor(np.array(t), dtype=torch.float32, device=self._device),
            inputs=inputs.to(self._device),
            weights=None if edit_loss is None else self._weights(examples, dropped, edit_loss),
            dropped=tuple(dropped),
        )

    def chat(self, examples: Sequence[Example], plain: bool = False, rejected: bool = False) -> ChatBatch:
        """A batch of conversations, without the chat's template if `plain`; with their worse answers if `rejected`.

        Those that the model cannot be shown (an image too long, turns in an order that its template lacks) are left out.

        Raises:
            X2IError: none of them can be shown.
        """
        try:
            return self._chat(examples, plain, rejected)
        except X2IError:
            return self._chat(self._shown(examples, plain, rejected), plain, rejected)

    def _shown(self, examples: Sequence[Example], plain: bool, rejected: bool) -> list[Example]:
        """Those that the model can be shown. Raises X2IError if there are none, or if they all can but one by one."""
        faults = [self._refused(e, plain, rejected) for e in examples]
        some = [e for e, fault in zip(examples, faults, strict=True) if not fault]
        if not some or not any(faults):
            raise X2IError(faults[0] or "these conversations cannot be shown together")
        for fault in filter(None, faults):
            log.warning("left out: %s", fault)
        return some

    def _chat(self, examples: Sequence[Example], plain: bool, rejected: bool) -> ChatBatch:
        inputs = self._processor.chats([e.chat for e in examples], labels=True, plain=plain).to(self._device)
        worse = None
        if rejected:
            chats = [e.rejected_chat for e in examples]
            worse = self._processor.chats(chats, labels=True, plain=plain).to(self._device)
        return ChatBatch(tuple(examples), inputs, worse)

    def _refused(self, example: Example, plain: bool, rejected: bool) -> str:
        """Why a conversation cannot be shown to the model; empty if it can."""
        try:
            self._chat([example], plain, rejected)
        except X2IError as error:
            return f"sample {example.key} ({example.task}): {error}"
        return ""

    def token_entropy(self, examples: Sequence[Example]) -> float:
        """Entropy in nats of the frequencies of the tokens in the answers: what guessing by them would lose per token."""
        texts = [m.text for e in examples for m in e.messages if m.role == "assistant"]
        tokenizer = self._processor.tokenizer
        counts = np.array(list(Counter(i for t in texts for i in tokenizer.encode(t).ids).values()), float)
        shares = counts / counts.sum() if counts.size else np.ones(1)
        return float(-(shares * np.log(shares)).sum())

    def _weights(self, examples: Sequence[Example], dropped: Sequence[bool], loss: EditLoss) -> Tensor | None:
        """Weights of the velocity's error [B, 1 or C, H, W]: 1 for samples that are no edits, or without their source."""
        edits = [
            place
            for place, (e, drop) in enumerate(zip(examples, dropped, strict=True))
            if not drop and e.inputs and (e.task in loss.tasks if loss.tasks is not None else len(e.inputs) == 1)
        ]
        if not edits:
            return None
        sources = self._vae.encode(to_tensor([examples[i].inputs[0] for i in edits]).to(self._device))
        targets = self._vae.encode(to_tensor([_output(examples[i]) for i in edits]).to(self._device))
        found = losses.edit_weights(targets, sources, loss.kind, kept=loss.kept)
        weights = found.new_ones(len(examples), *found.shape[1:])
        weights[torch.tensor(edits, device=found.device)] = found
        return weights

    def _posterior(self, seed: np.random.Generator) -> torch.Generator:
        return torch.Generator(self._device).manual_seed(int(seed.integers(2**62)))


def _output(example: Example) -> np.ndarray:
    assert example.output is not None
    return example.output


def _drawn(examples: Sequence[Example], seed: int, stage: Stage) -> tuple[list[np.random.Generator], list[float]]:
    """Of each sample the generator of all that is random about it, and its timestep."""
    drawn = [generator("flow/1", seed, stage.name, e.draw, e.key) for e in examples]
    return drawn, [float(1 / (1 + np.exp(-g.normal(stage.t_mean, stage.t_std)))) for g in drawn]


def _parts(examples: Sequence[Example], size: int | None) -> list[Sequence[Example]]:
    """As few parts of at most `size` as there can be, equally long but for one."""
    count = -(-len(examples) // (size or max(len(examples), 1)))
    return [examples[len(examples) * i // count : len(examples) * (i + 1) // count] for i in range(count)]


def _own(batch: Batch, owned: Container[int] | None) -> tuple[bool, ...]:
    return tuple(owned is None or e.draw in owned for e in batch.examples)
