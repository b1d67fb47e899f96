"""What Mini-Gemini is shown: templates, what is learned of them, and the views of an image."""

import numpy as np
import pytest
import torch
from torch import nn

from tests.model.test_mini_gemini import ASKING, TINY, TINY_HD, byte_tokenizer, chat, like, picture
from x2i.base.errors import X2IError
from x2i.model.base import Chat
from x2i.model.mini_gemini.images import views
from x2i.model.mini_gemini.processor import MiniGeminiProcessor
from x2i.model.mini_gemini.template import PLAIN, TEMPLATES


def written(template: str, *turns: str, reply: bool) -> str:
    return TEMPLATES[template].write(chat(*turns).messages, reply).text  # type: ignore[index]


def test_templates_write_what_mgm_writes() -> None:
    """Strings of mgm/conversation.py for the same turns."""
    assert written("gemma", "Hi there.<image>", "Hello.", "And?", reply=True) == (
        "<start_of_turn>user\n<image>\nHi there.<end_of_turn>\n<start_of_turn>model\nHello.<end_of_turn>\n<eos>"
        "<start_of_turn>user\nAnd?<end_of_turn>\n<start_of_turn>model\n"
    )
    assert written("vicuna_v1", "Hi there.<image>", "Hello.", "And?", reply=True) == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: <image>\nHi there. ASSISTANT: Hello.</s>"
        "USER: And? ASSISTANT:"
    )
    assert written("llama_3", "Hi there.<image>", "Hello.", reply=False) == (
        "<|start_header_id|>system<|end_header_id|>\n\nYou are a helpful language and vision assistant. You are able "
        "to understand the visual content that the user provides, and assist the user with a variety of tasks using "
        "natural language.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n<image>\nHi there.<|eot_id|>"
        "<|start_header_id|>system<|end_header_id|>\n\nHello.<|eot_id|>"
    )
    assert PLAIN.write(chat("<image>\nDescribe it.", "A dog.").messages, reply=False).text == "<image>A dog.\n"
    assert written("gemma", "<image> and <image> differ?", reply=True).startswith(
        "<start_of_turn>user\nImage 1:<image>\nImage 2:<image>\nand  differ?<end_of_turn>"
    )


@pytest.mark.parametrize(
    ("template", "learned"),
    [
        ("gemma", ["It is red.<end_of_turn>\n<eos>", "No.<end_of_turn>\n<eos>"]),
        ("vicuna_v1", [" It is red.</s>", " No.</s>"]),  # " It" is one token
        ("llama_3", ["It is red.<|eot_id|>", "No.<|eot_id|>"]),
    ],
)
def test_learned_are_the_answers_and_their_ends(template: str, learned: list[str]) -> None:
    special = ("<pad>", "<s>", *TEMPLATES[template].special)  # type: ignore[index]
    tokenizer = byte_tokenizer("It is red. No.", "USER: ASSISTANT:", special=special)
    processor = MiniGeminiProcessor(like(template=template), tokenizer, None)
    batch = processor.chats([chat(ASKING, "It is red.", "Sure?", "No.", images=(picture(0),))], labels=True)
    assert batch.labels_BL is not None
    kept = batch.labels_BL[0] >= 0
    starts = kept & ~torch.roll(kept, 1)
    runs = starts.cumsum(0)[kept]
    found = [batch.labels_BL[0][kept][runs == n].tolist() for n in (1, 2)]
    assert [tokenizer.decode(ids, skip_special_tokens=False) for ids in found] == learned
    assert torch.equal(batch.labels_BL[0][kept], batch.ids_BL[0][kept])
    assert int(batch.image_BL.sum()) == TINY.image_tokens
    assert batch.ids_BL[0, 0] == tokenizer.token_to_id("<s>")


def test_alignment_learns_the_caption_alone() -> None:
    tokenizer = byte_tokenizer("A dog runs.")
    processor = MiniGeminiProcessor(TINY, tokenizer, None)
    batch = processor.chats([chat("Describe it.<image>", "A dog runs.", images=(picture(0),))], True, plain=True)
    assert batch.labels_BL is not None
    assert batch.ids_BL.shape == (1, 1 + 16 + len(tokenizer.encode("A dog runs.\n").ids))
    assert tokenizer.decode(batch.labels_BL[0, 17:].tolist()) == "A dog runs.\n"
    assert (batch.labels_BL[0, :17] < 0).all()


def test_long_conversations_are_cut_at_their_end_or_refused() -> None:
    tokenizer = byte_tokenizer(ASKING)
    cut = MiniGeminiProcessor(TINY, tokenizer, None, max_text_tokens=30)
    batch = cut.chats([chat(ASKING, "red " * 100, images=(picture(0),))], labels=True)
    assert batch.ids_BL.shape == (1, 30 + 16)
    with pytest.raises(X2IError, match="behind its first 2 text tokens"):
        MiniGeminiProcessor(TINY, tokenizer, None, 2).chats([chat(ASKING, "red", images=(picture(0),))], True)


@pytest.mark.parametrize(
    ("given", "labels", "message"),
    [
        (chat("Which?", images=(picture(0),)), False, "1 images, but 0 <image> marks"),
        (chat(ASKING), False, "0 images, but 1 <image> mark"),
        (chat(ASKING, "red", images=(picture(0),)), False, "end with a user's message"),
        (chat(ASKING, images=(picture(0),)), True, "end with an assistant's message"),
        (chat(), True, "no message"),
        (chat("So?", "<image>", images=(picture(0),)), True, "in an assistant's message"),
        (chat(ASKING, images=(picture(0).astype(np.float32),)), False, "must be uint8"),
    ],
)
def test_conversations_that_cannot_be_are_refused(given: Chat, labels: bool, message: str) -> None:
    processor = MiniGeminiProcessor(TINY, byte_tokenizer(ASKING), None)
    with pytest.raises(X2IError, match=message):
        processor.chats([given], labels)


def test_a_tokenizer_without_the_templates_tokens_is_refused() -> None:
    with pytest.raises(X2IError, match="lacks <start_of_turn>, <end_of_turn>, <eos>.*'gemma'"):
        MiniGeminiProcessor(TINY, byte_tokenizer("a", special=("<s>",)), None)


# images


@pytest.mark.parametrize(("height", "width"), [(50, 90), (91, 40), (64, 64), (300, 200)])
def test_the_high_view_is_clips_processor_s(height: int, width: int) -> None:
    kind = pytest.importorskip("transformers.models.clip.image_processing_pil_clip").CLIPImageProcessorPil
    side = TINY.high.image_size
    theirs = kind(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    image = picture(1, height, width)
    _, cropped = views(image, like(aspect="crop"))
    assert (cropped - theirs(image, return_tensors="pt")["pixel_values"][0]).abs().max() < 1e-5

    low, square = views(image, TINY)
    large = max(height, width)
    canvas = np.empty((large, large, 3), np.uint8)
    canvas[:] = (122, 116, 104)  # CLIP's mean in bytes
    top, left = (large - height) // 2, (large - width) // 2
    canvas[top : top + height, left : left + width] = image
    expected = torch.as_tensor(theirs(canvas, return_tensors="pt")["pixel_values"])
    assert (square - expected[0]).abs().max() < 1e-5
    small = nn.functional.interpolate(expected, size=(32, 32), mode="bilinear", align_corners=False)
    assert (low - small).abs().max() < 1e-5


def test_crops_lie_row_by_row_and_the_whole_comes_last() -> None:
    image = np.zeros((128, 128, 3), np.uint8)
    image[:64, 64:] = 255  # the second of four
    low, high = views(image, TINY_HD)
    assert low.shape == (5, 3, 32, 32)
    assert high.shape == (3, 128, 128)
    bright = low.mean(dim=(1, 2, 3))
    assert int(bright.argmax()) == 1
    assert bright[4] == pytest.approx(bright[:4].mean().item(), abs=0.02)
