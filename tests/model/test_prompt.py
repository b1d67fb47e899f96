"""OmniGen's prompts and batches: what tokens stand where, which rows guidance has, and what is refused."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from x2i.base.errors import X2IError
from x2i.model import vae
from x2i.model.base import Request
from x2i.model.config import PixelsConfig
from x2i.model.omnigen.config import PRESETS
from x2i.model.omnigen.processor import OmniGenProcessor
from x2i.model.omnigen.prompt import HEAD, PAD, TAIL, PromptEncoder, collate
from x2i.model.placeholders import image_only, with_placeholders
from x2i.trainer.config import TokenizerTraining
from x2i.trainer.tokens import train

TEXTS = ["Sharpen <img><|image_1|></img>, please", "Put <img><|image_2|></img> beside <img><|image_1|></img>."]
PHOTO, WIDE = np.full((16, 16, 3), 90, np.uint8), np.full((16, 24, 3), 10, np.uint8)  # 4 and 6 tokens


def trained(texts: list[str]) -> Tokenizer:
    return train(texts, TokenizerTraining(vocab_size=400), OmniGenProcessor.special_tokens, "<s>")


class Counting(vae.Pixels):
    """An autoencoder that counts its calls, and whose posterior is not a point."""

    calls = 0

    def encode(self, pixels: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        self.calls += 1
        latents = super().encode(pixels)
        if generators is None:
            return latents
        drawn = [torch.randn(one.shape, generator=g) for one, g in zip(latents, generators, strict=True)]
        return latents + torch.stack(drawn)


@pytest.fixture
def processor(encoder: PromptEncoder) -> OmniGenProcessor:
    return OmniGenProcessor(PRESETS["omnigen-tiny"], encoder.tokenizer, Counting(PixelsConfig(factor=4)))


@pytest.fixture(scope="module")
def encoder() -> PromptEncoder:
    return PromptEncoder(trained([HEAD + t for t in TEXTS]))


def test_placeholders_become_runs_of_patch_tokens_in_the_order_of_the_text(encoder: PromptEncoder) -> None:
    prompt = encoder.encode(TEXTS[1], [4, 6])
    assert prompt.images == (1, 0)  # image 2 stands first
    runs = [b for b, before in zip(prompt.blocks, (0, *prompt.blocks), strict=False) if b and b != before]
    assert runs == [1, 2]
    assert prompt.blocks.count(1) == 6 and prompt.blocks.count(2) == 4
    assert all(i == 0 for i, b in zip(prompt.ids, prompt.blocks, strict=True) if b)


def test_text_around_the_images_is_the_chat_string_with_one_beginning(encoder: PromptEncoder) -> None:
    prompt = encoder.encode(TEXTS[0], [4])
    text = [i for i, b in zip(prompt.ids, prompt.blocks, strict=True) if not b]
    begin = encoder.tokenizer.token_to_id("<s>")
    assert text[0] == begin and text.count(begin) == 1
    spoken = encoder.tokenizer.decode(text[1:], skip_special_tokens=False)
    assert spoken == HEAD + "Sharpen <img></img>, please" + TAIL
    first = prompt.blocks.index(1)
    assert encoder.tokenizer.id_to_token(prompt.ids[first - 1]) == "<img>"
    assert encoder.tokenizer.id_to_token(prompt.ids[first + 4]) == "</img>"


def test_the_same_image_may_stand_twice(encoder: PromptEncoder) -> None:
    prompt = encoder.encode("<|image_1|> and <|image_1|>", [4])
    assert prompt.images == (0, 0) and prompt.blocks.count(1) == prompt.blocks.count(2) == 4


@pytest.mark.parametrize(
    ("instruction", "images"), [("no placeholder", 1), ("<|image_1|>", 0), ("<|image_2|>", 1), ("<|image_1|>", 2)]
)
def test_placeholders_that_do_not_match_the_images_are_refused(
    encoder: PromptEncoder, instruction: str, images: int
) -> None:
    with pytest.raises(X2IError, match=f"{images} input images"):
        encoder.encode(instruction, [4] * images)


def test_a_long_instruction_is_cut_and_the_chat_keeps_its_end(encoder: PromptEncoder) -> None:
    whole = encoder.encode("Sharpen <|image_1|> " + "please " * 50, [4])
    cut = PromptEncoder(encoder.tokenizer, 40).encode("Sharpen <|image_1|> " + "please " * 50, [4])
    assert cut.blocks.count(0) == 40 and cut.blocks.count(1) == 4
    tail = len(encoder.tokenizer.encode(TAIL).ids) - 1
    assert cut.ids[-tail:] == whole.ids[-tail:]
    assert cut.ids[:-tail] == whole.ids[: len(cut.ids) - tail]


def test_a_batch_is_padded_on_the_left(encoder: PromptEncoder) -> None:
    prompts = [encoder.encode("Sharpen", []), encoder.encode(TEXTS[0], [4])]
    image = torch.ones(3, 2, 2)
    batch = collate(prompts, [[], [image]])
    pad = len(prompts[1].ids) - len(prompts[0].ids)
    assert batch.ids_BL[0, :pad].tolist() == [PAD] * pad
    assert batch.valid_BL.sum(dim=1).tolist() == [len(p.ids) for p in prompts]
    assert not batch.valid_BL[0, :pad].any() and batch.valid_BL[1].all()
    assert batch.images == (image,)


def test_prompts_without_placeholders_get_them_in_front() -> None:
    assert with_placeholders("Sharpen", 2) == f"{image_only(2)} Sharpen"
    assert with_placeholders("Sharpen <|image_1|>", 1) == "Sharpen <|image_1|>"
    assert with_placeholders("Draw", 0) == "Draw"


def test_special_tokens_have_the_first_ids(encoder: PromptEncoder) -> None:
    assert [encoder.tokenizer.token_to_id(t) for t in OmniGenProcessor.special_tokens] == list(range(10))
    assert OmniGenProcessor.needed_tokens == OmniGenProcessor.special_tokens[3:]


def test_images_of_one_size_are_encoded_in_one_call(processor: OmniGenProcessor) -> None:
    requests = [Request(TEXTS[1], (PHOTO, WIDE)), Request("Draw"), Request(TEXTS[0], (PHOTO + 1,))]
    batch = processor.requests(requests)
    assert isinstance(processor.vae, Counting) and processor.vae.calls == 2
    assert [tuple(i.shape) for i in batch.images] == [(48, 4, 6), (48, 4, 4), (48, 4, 4)]  # in the order of the text
    assert float(batch.images[2].mean() - batch.images[1].mean()) == pytest.approx(1 / 127.5, rel=1e-3)
    assert (batch.blocks_BL > 0).sum(dim=1).tolist() == [10, 0, 4]

    def drawn(*seeds: int) -> list[Tensor]:
        return list(processor.requests(requests, generators=[torch.Generator().manual_seed(s) for s in seeds]).images)

    first, same, other = drawn(1, 2, 3), drawn(1, 5, 3), drawn(4, 2, 3)
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert [torch.equal(a, b) for a, b in zip(first, other, strict=True)] == [False, False, True]


def test_a_dropped_request_shows_no_words_and_no_images(processor: OmniGenProcessor) -> None:
    batch = processor.requests([Request(TEXTS[0], (PHOTO,)), Request(TEXTS[0], (WIDE,))], [True, False])
    text = processor.tokenizer.decode(batch.ids_BL[0][batch.valid_BL[0]].tolist(), skip_special_tokens=False)
    assert text == f"<s>{HEAD}<cfg>{TAIL}"
    assert [tuple(i.shape) for i in batch.images] == [(48, 4, 6)]


@pytest.mark.parametrize("negative", [None, OmniGenProcessor.NEGATIVE], ids=["<cfg>", "the published sentence"])
def test_guidance_has_three_rows_with_images_and_two_without(processor: OmniGenProcessor, negative: str | None) -> None:
    requests = [Request(TEXTS[0], (PHOTO,)), Request("Draw")]
    branches = partial(processor.branches, requests, height=16, width=16, negative=negative)
    (joint,) = branches(guidance=2.5, image_guidance=1.6)
    assert joint.rows_R.tolist() == [0, 1, 0, 0, 1]
    assert joint.weights_R.tolist() == pytest.approx([2.5, 2.5, -0.9, -0.6, -1.5])
    texts = [
        processor.tokenizer.decode(ids[valid].tolist(), skip_special_tokens=False)
        for ids, valid in zip(joint.inputs.ids_BL, joint.inputs.valid_BL & (joint.inputs.blocks_BL == 0), strict=True)
    ]
    unconditional = f"<s>{HEAD}{negative or '<cfg>'}{TAIL}"
    only = f"<s>{HEAD}<img></img>{TAIL}"
    assert texts == [
        f"<s>{HEAD}Sharpen <img></img>, please{TAIL}",
        f"<s>{HEAD}Draw{TAIL}",
        only,
        unconditional,
        unconditional,
    ]
    assert len(joint.inputs.images) == 2 and joint.inputs.images[0] is joint.inputs.images[1]

    apart = branches(guidance=2.5, image_guidance=1.6, separate=True)
    assert [b.rows_R.tolist() for b in apart] == [[0, 1], [0], [0, 1]]
    assert [len(b.inputs.images) for b in apart] == [1, 1, 0]
    (plain,) = branches(guidance=1.0, image_guidance=1.0)
    assert plain.rows_R.tolist() == [0, 1]


def test_sizes_that_cannot_be_drawn_or_read_are_refused(processor: OmniGenProcessor) -> None:
    assert processor.token_side == 8
    processor.check_size(512, 8)
    for height, width in ((12, 8), (0, 8), (8, 520)):
        with pytest.raises(X2IError, match="must be a multiple of 8, and at most 512 pixels"):
            processor.check_size(height, width)
    with pytest.raises(X2IError, match="height 12"):
        processor.requests([Request(TEXTS[0], (PHOTO[:12],))])
    with pytest.raises(X2IError, match="no autoencoder"):
        OmniGenProcessor(processor.config, processor.tokenizer, None).requests([Request(TEXTS[0], (PHOTO,))])


def test_the_same_texts_train_the_same_tokenizer() -> None:
    assert trained(TEXTS * 9).to_str() == trained(TEXTS * 9).to_str()
    strange = "Überraschung 図 🙂"
    tokenizer = trained(TEXTS)
    assert tokenizer.decode(tokenizer.encode(strange).ids) == strange
