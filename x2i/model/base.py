"""What a model is to the trainer and to the sampler: the contract that every architecture in this room keeps.

An architecture is a package beside this file, found by its name:

    config.py      numbers and presets; light to import: no torch
    model.py       `MODEL`: the network
    processor.py   `PROCESSOR`: words and pictures into the network's inputs

Time runs from 0 (noise) to 1 (data) and the velocity is data - noise, for every architecture: those that count the
other way turn it round inside.

A model is trained on batches, padded to their longest row, or (`packs`) on packs: documents of any size, pictures to be
drawn and conversations together, one after the other in one sequence, through the trunk in one pass. See `Model.packed`.

Tensor names carry their axes: B batch · L tokens (padded) · C latent channels · H, W latent height and width
    G pictures drawn in a pack · K conversations in a pack
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from x2i.base.errors import X2IError
from x2i.model.chat import Chat, Request
from x2i.model.chat import Message as Message  # part of the contract
from x2i.model.vae import VAE

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from x2i.model.layers.learned import Learned


class Inputs(Protocol):
    """One batch of a model's own inputs."""

    def to(self, device: torch.device | str) -> Any:
        """The same batch on another device."""
        ...


class Document(Protocol):
    """A request or a conversation on its way into a pack (`Processor.documents`)."""

    @property
    def length(self) -> int:
        """Tokens that it takes in a pack, all counted: text, condition images (twice, where two parts of the model see
        them), the timestep, noisy tokens.
        """
        ...


class PackInputs(Protocol):
    """A pack as its model takes it (`Processor.pack`). Which pairs of tokens attend is fixed by it."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each document; what is missing to the pack's length is padding."""
        ...

    @property
    def learned(self) -> Learned:
        """What the conversations teach."""
        ...

    @property
    def pairs(self) -> int:
        """Pairs (query, key) that the trunk's mask allows, padding left out: an attention head's work in each layer."""
        ...

    def to(self, device: torch.device | str) -> Any:
        """The same pack on another device."""
        ...


I = TypeVar("I", bound=Inputs)  # noqa: E741 - inputs


@dataclass(frozen=True)
class Branches(Generic[I]):
    """Rows to evaluate in one pass for a guided step: row r adds `weights_R[r]` times its velocity to picture `rows_R[r]`."""

    inputs: I
    rows_R: Tensor
    weights_R: Tensor


class Model(nn.Module, ABC, Generic[I]):
    """A network that draws, answers, or both. It knows no optimiser and no data.

    Attributes:
        config: its numbers; the network is a pure function of them and its weights.
        parts: names of the papers for parts of it -> prefixes of their parameters' names. `stages.train` names these.
        pretrained: names of parts that public checkpoints of other models hold -> prefix here -> prefix there.
        draws, answers: what it can do.
        packs: whether it can be trained on packs, by `packed`; it may depend on its numbers.
        flex: the attention of packs: FlexAttention, or SDPA with a dense mask; None: FlexAttention on a GPU.
    """

    config: Any
    parts: Mapping[str, tuple[str, ...]] = {}
    pretrained: ClassVar[Mapping[str, Mapping[str, str]]] = {}
    draws: bool = True
    answers: bool = True
    packs: bool = False
    flex: bool | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Model[I]:
        super()._apply(fn, recurse)
        repair(self)
        return self

    def begin(self, pretrained: Sequence[str]) -> None:
        """Called once on a fresh model, after these of its parts were read from other models' checkpoints."""

    def blocks(self) -> list[nn.Module]:
        """The repeated blocks of the trunk, in order: the units of sharding, checkpointing and compilation.

        Each is run exactly once by every pass of training, whatever it holds: `forward`, `next_token`, `packed`. So
        ranks that train on different samples gather and reduce them in the same order.
        """
        return []

    def forward(self, x_BCHW: Tensor, t_B: Tensor, inputs: I) -> Tensor:
        """`velocity` under the condition of `inputs`, with gradients through both: a training pass over pictures.

        The module itself is to be called, so that hooks on it run (sharding gathers its parameters in one). Of
        `next_token` and `packed` torch.distributed.fsdp.register_fsdp_forward_method does the same.
        """
        target = x_BCHW.shape[-2], x_BCHW.shape[-1]
        return self.velocity(x_BCHW, t_B, self.condition(inputs, target=target))

    def condition(self, inputs: I, *, cache: bool = False, target: tuple[int, int] | None = None) -> Any:
        """Whatever of the computation does not depend on the noisy latents and the timestep.

        Args:
            inputs: a batch of `Processor.requests` or `Branches`.
            cache: keep keys and values, so that many steps share them. Without gradients only.
            target: latent height and width to be drawn, where the condition depends on them.
        """
        raise X2IError(f"{type(self).__name__} draws no pictures")

    def velocity(self, x_BCHW: Tensor, t_B: Tensor, condition: Any) -> Tensor:
        """Velocity data - noise of noisy latents, in their shape.

        Args:
            x_BCHW: noisy latents.
            t_B: timesteps from 0 (noise) to 1 (data).
            condition: of `condition`, for as many rows.
        """
        raise X2IError(f"{type(self).__name__} draws no pictures")

    def next_token(self, inputs: I) -> tuple[Tensor, Tensor]:
        """Next-token loss of a batch of `Processor.chats` with labels.

        Returns:
            Sum of the negative log-likelihoods of each row's learned tokens, float32 [B], and their number, [B].
        """
        raise X2IError(f"{type(self).__name__} writes no text")

    def packed(self, inputs: Any, x: Sequence[Tensor], t_G: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """A training pass over a pack: all its documents in one pass of the trunk, none of which sees another.

        Every submodule runs as often whatever the pack holds: what it lacks (no conversation, no picture, no condition
        image, nothing at all) is made up for by a dummy of weight 0. So ranks with different packs do not wait for each
        other, and all that learns has a gradient, of zeros if need be. For this **the loss must depend on all that is
        returned**: `sums_K.sum()` is to be added even where K is 0.

        Args:
            inputs: of `Processor.pack`.
            x: noisy latents [C, H, W] of each request's picture, in the order of the documents.
            t_G: their timesteps, from 0 (noise) to 1 (data).

        Returns:
            The velocity of each picture [C, H, W], in order; the sum of the negative log-likelihoods of each
            conversation's learned tokens, float32 [K], in order; and their number, [K].

        Raises:
            X2IError: pictures of other sizes, or another number of them, than the pack was made for.
        """
        raise X2IError(f"{type(self).__name__} takes no packs: train it on batches")

    def answer(self, inputs: I, max_tokens: int, stop: Sequence[int]) -> list[list[int]]:
        """Greedy continuation of a batch of `Processor.chats` without labels, as token ids, up to a stop token."""
        raise X2IError(f"{type(self).__name__} writes no text")


def repair(model: nn.Module) -> None:
    """Undo what moving or casting does to the language models of transformers within a model.

    Rotary frequencies are buffers: a cast to bfloat16 would round them, and positions in the thousands would be off by
    whole turns; built on the meta device there would be none. So they are computed anew, in float32. Leaving the meta
    device also unties the output map from the embedding.
    """
    for module in list(model.modules()):
        rotary = getattr(module, "rotary_emb", None)
        if rotary is not None and hasattr(rotary, "inv_freq") and hasattr(rotary, "config"):
            device = rotary.inv_freq.device
            with torch.device(device):
                module.rotary_emb = type(rotary)(config=rotary.config).to(device)
        tied = getattr(getattr(module, "config", None), "tie_word_embeddings", False)
        if tied and hasattr(module, "lm_head") and hasattr(module, "get_input_embeddings"):
            module.lm_head.weight = module.get_input_embeddings().weight


class Processor(ABC, Generic[I]):
    """Words and pictures into a model's inputs: it holds the tokenizer and the autoencoder.

    Attributes:
        special_tokens: single tokens of a tokenizer that is trained, in this order.
        begin: the one of them that it puts in front of every text, if any.
        needed_tokens: those that a given tokenizer must know.
    """

    special_tokens: ClassVar[tuple[str, ...]] = ()
    begin: ClassVar[str | None] = None
    needed_tokens: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Any, tokenizer: Tokenizer, vae: VAE | None, max_text_tokens: int | None = None) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.vae = vae
        self.max_text_tokens = max_text_tokens

    @property
    @abstractmethod
    def token_side(self) -> int:
        """Pixels per side of one token of a picture that is drawn: sizes are multiples of it."""

    def picture_tokens(self, width: int, height: int, chat: bool) -> int:
        """Tokens that a picture takes in a pack: one of this size in pixels that is drawn, or read beside one that is; or
        (`chat`) one that a conversation shows, before the processor scales it.
        """
        return (width // self.token_side) * (height // self.token_side)

    def check_size(self, height: int, width: int) -> None:
        """Raise X2IError if pictures of this size in pixels cannot be drawn."""
        for name, value in (("height", height), ("width", width)):
            if value < 1 or value % self.token_side:
                raise X2IError(f"{name} {value}: must be a multiple of {self.token_side}")

    def shift(self, height: int, width: int) -> float:
        """How the sampler's timesteps are bent for pictures of this size in pixels (`flow.timesteps`); 1: not at all."""
        return 1.0

    @classmethod
    def learned_text(cls, instruction: str) -> str:
        """An instruction with the chat around it: what a tokenizer is trained on."""
        return instruction

    def requests(
        self,
        requests: Sequence[Request],
        dropped: Sequence[bool] | None = None,
        generators: Sequence[torch.Generator] | None = None,
        size: tuple[int, int] | None = None,
    ) -> I:
        """One row per request. Of `dropped` rows the instruction and the images are left out, as guidance needs it.

        Args:
            requests: to be drawn; all images are encoded as they are.
            dropped: which conditions to drop; default: none.
            generators: of the autoencoder's posterior, one per request; without them, its mean.
            size: height and width in pixels of what is to be drawn, for models that are told.
        """
        raise X2IError(f"{type(self).__name__} prepares no requests: its model draws no pictures")

    def branches(
        self,
        requests: Sequence[Request],
        *,
        height: int,
        width: int,
        guidance: float,
        image_guidance: float,
        separate: bool = False,
        negative: str | None = None,
    ) -> list[Branches[I]]:
        """The rows of a guided step, in one batch, or (`separate`) one batch per kind of branch: slower, less memory.

        Args:
            requests: to be drawn, `height` x `width` pixels.
            guidance, image_guidance: weights of the text and of the input images; 1 is no guidance. A branch of
                weight 0 is left out.
            separate: one batch per kind of branch.
            negative: instruction of the unconditional branch; default: the model's own.
        """
        raise X2IError(f"{type(self).__name__} prepares no requests: its model draws no pictures")

    def chats(self, chats: Sequence[Chat], labels: bool, plain: bool = False) -> I:
        """One row per conversation: with `labels` to be learned (the assistant's turns), without to be answered.

        Args:
            chats: pictures may have any size; the processor scales and cuts them as its model needs.
            labels: whether the batch has labels.
            plain: leave the chat's template out: pictures, then the assistant's text, as captions are learned first.
        """
        raise X2IError(f"{type(self).__name__} prepares no conversations: its model writes no text")

    def documents(
        self,
        requests: Sequence[Request],
        dropped: Sequence[bool] | None,
        sizes: Sequence[tuple[int, int]],
        chats: Sequence[Chat],
        plain: bool = False,
        generators: Sequence[torch.Generator] | None = None,
    ) -> list[Any]:
        """What can be packed: a `Document` per request, then one per conversation, to be learned.

        Make them one by one where some may be refused: a call with one request or one chat concerns no other. The
        latents of condition images are encoded here, so `length` is known, and nothing has to be done twice for a pack.

        Args:
            requests: to be drawn, each in its own size.
            dropped: whose instruction and images to leave out; default: none.
            sizes: height and width in pixels of what each request draws.
            chats: conversations with turns of the assistant.
            plain: leave the chat's template out, as in `chats`.
            generators: of the autoencoder's posterior for the requests' images, one per request; without, its mean.

        Raises:
            X2IError: a request or a conversation that the model cannot be shown, or a size that it cannot draw.
        """
        raise X2IError(f"{type(self).__name__} prepares no packs: its model is trained on batches")

    def pack(self, documents: Sequence[Any], length: int) -> Any:
        """One sequence of exactly `length` tokens as `Model.packed` takes it: the documents in order, then padding.

        Positions begin at 0 in each document. Nobody sees padding. All packs of one length have the same shapes in the
        trunk, so that a compiled trunk is compiled once; or few, where other parts of the model have tokens of their own.

        Args:
            documents: of `documents`, of one or of many calls.
            length: tokens of the pack.

        Raises:
            X2IError: the documents have more tokens together.
        """
        raise X2IError(f"{type(self).__name__} prepares no packs: its model is trained on batches")

    def text(self, ids: Sequence[int]) -> str:
        """Token ids of `Model.answer` as text."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    @property
    def stop(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        return ()
