"""The prompt's format: what tokens stand where, and what is refused."""

import pytest
import torch

from x2i.base.errors import X2IError
from x2i.model.omnigen.prompt import HEAD, PAD, TAIL, PromptEncoder, collate
from x2i.model.placeholders import image_only, with_placeholders
from x2i.trainer.config import TokenizerTraining
from x2i.trainer.tokens import train

TEXTS = ["Sharpen <img><|image_1|></img>, please", "Put <img><|image_2|></img> beside <img><|image_1|></img>."]


@pytest.fixture(scope="module")
def encoder() -> PromptEncoder:
    return PromptEncoder(train([HEAD + t for t in TEXTS], TokenizerTraining(vocab_size=400)))


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
    assert text[0] == BOS and text.count(BOS) == 1
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


def test_the_same_texts_train_the_same_tokenizer() -> None:
    options = TokenizerTraining(vocab_size=400)
    assert train(TEXTS * 9, options).to_str() == train(TEXTS * 9, options).to_str()
    strange = "Überraschung 図 🙂"
    tokenizer = train(TEXTS, options)
    assert tokenizer.decode(tokenizer.encode(strange).ids) == strange
