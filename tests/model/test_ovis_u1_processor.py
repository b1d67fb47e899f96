"""What Ovis-U1 is shown: prompts, blank images, numbered sources, sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.model.test_ovis_u1 import ASK, DRAW, EDIT, SMALL, TOKENIZER, TOLD, model, picture, processor
from x2i.base.errors import X2IError
from x2i.model.base import Chat, Message, Request
from x2i.model.layers.chat import IGNORE
from x2i.model.ovis_u1.model import OvisU1
from x2i.model.ovis_u1.processor import DESCRIBE, named
from x2i.model.ovis_u1.prompt import TEXT, VISUAL, smart_resize

# ---- what the model is shown


def test_prompts() -> None:
    inputs = processor().branches([DRAW, EDIT], height=32, width=32, guidance=2, image_guidance=1.5)[0].inputs
    first, last = SMALL.start_row, SMALL.start_row + 1
    # the published code counts the four indicators from the fifth row before the end of the table
    assert (first, last) == (SMALL.tokenizer.vocab_size - 5, SMALL.tokenizer.vocab_size - 4)
    texts = []
    for ids, marks, length in zip(inputs.ids_BL.tolist(), inputs.marks_BL.tolist(), inputs.lengths, strict=True):
        runs = [m for m in marks[:length] if m != TEXT]
        assert runs == [first, *[VISUAL] * 16, last]
        assert all(m == TEXT for m in marks[length:])
        texts.append(TOKENIZER.decode([i for i, m in zip(ids[:length], marks, strict=False) if m == TEXT], False))
    user, end = "<|im_start|>user\n\n", "<|im_end|>\n"
    nothing = f"{user}Generate an image.{end}"
    assert texts == [f"{user}{DESCRIBE}a red square{end}", nothing, f"{user}make it blue{end}", nothing, nothing]
    # of the edit: everything, the source alone, nothing; the white image is held once, and so is the source
    assert inputs.shown == (0, 0, 1, 1, 0)
    assert [len(row) for row in inputs.sources] == [0, 0, 1, 1, 0]


def test_negative_words_replace_the_unconditional_ones() -> None:
    (branch,) = processor().branches([EDIT], height=32, width=32, guidance=2, image_guidance=1.5, negative="blurred")
    marks = branch.inputs.marks_BL.tolist()
    texts = [
        TOKENIZER.decode([i for i, m in zip(ids[:length], row, strict=False) if m == TEXT])
        for ids, row, length in zip(branch.inputs.ids_BL.tolist(), marks, branch.inputs.lengths, strict=True)
    ]
    assert texts == [f"user\n\n{words}\n" for words in ("make it blue", "blurred", "blurred")]


def test_white_image_is_as_published() -> None:
    """Of the picture's aspect where its size is known, and white in CLIP's numbers."""
    inputs = processor().branches([DRAW], height=16, width=64, guidance=1, image_guidance=1)[0].inputs
    assert inputs.grids == ((4, 16),)
    assert inputs.patches_NF is not None
    white = (1 - np.array((0.48145466, 0.4578275, 0.40821073))) / np.array((0.26862954, 0.26130258, 0.27577711))
    values = inputs.patches_NF.view(-1, 3, 16)
    assert torch.allclose(values, torch.from_numpy(white).float()[None, :, None].expand_as(values), atol=1e-6)


def test_dropped_rows_show_nothing() -> None:
    kept, gone = processor().requests([EDIT]), processor().requests([EDIT, DRAW], dropped=[True, True])
    assert gone.sources == ((), ()) and len(kept.sources[0]) == 1
    assert gone.grids == ((8, 10), (8, 8))  # of the source's aspect; a square where nothing gives a size
    text = [i for i, m in zip(gone.ids_BL[0].tolist(), gone.marks_BL[0].tolist(), strict=True) if m == TEXT]
    assert "Generate an image." in TOKENIZER.decode(text)


@pytest.mark.parametrize(
    ("instruction", "count", "expected"),
    [
        ("make it blue", 1, "make it blue"),
        ("<img><|image_1|></img> make it blue", 1, "make it blue"),
        ("In <img><|image_1|></img>, remove the dog.", 1, "In, remove the dog."),
        ("<img><|image_1|></img> <img><|image_2|></img> put them together", 2, "put them together"),
        ("<img><|image_1|></img> wears <img><|image_2|></img>", 2, "image 1 wears image 2"),
        ("the hat of <img><|image_2|></img> on <img><|image_1|></img>.", 2, "the hat of image 2 on image 1."),
        ("a boat", 0, "a boat"),
    ],
)
def test_placeholders_become_words(instruction: str, count: int, expected: str) -> None:
    assert named(instruction, count) == expected


def test_several_sources_are_numbered() -> None:
    sources = (picture(1, 32, 32), picture(2, 32, 32))
    inputs = processor().requests([Request("<img><|image_1|></img> wears <img><|image_2|></img>", sources)])
    text = [i for i, m in zip(inputs.ids_BL[0].tolist(), inputs.marks_BL[0].tolist(), strict=True) if m == TEXT]
    assert TOKENIZER.decode(text) == "user\nImage 1: \nImage 2: \nimage 1 wears image 2\n"
    with torch.no_grad():
        condition = model().condition(inputs)
    assert condition.source_ids_BM3 is not None
    assert condition.source_ids_BM3[0, :, 0].tolist() == [1, 1, 1, 1, 2, 2, 2, 2]


def test_placeholders_must_match() -> None:
    with pytest.raises(X2IError, match="1 input images"):
        processor().requests([Request("<img><|image_2|></img> x", (picture(1, 32, 32),))])
    with pytest.raises(X2IError, match="height 24"):
        processor().requests([Request("x", (picture(1, 24, 32),))])
    with pytest.raises(X2IError, match="0 images, but 1 marks"):
        processor().chats([Chat(ASK.messages)], labels=False)


def test_instructions_are_cut() -> None:
    short = processor(max_text_tokens=40).requests([Request("<img><|image_1|></img> " + "long " * 99, EDIT.images)])
    marks = short.marks_BL[0].tolist()
    assert sum(m == TEXT for m in marks) == 40
    assert TOKENIZER.decode(short.ids_BL[0].tolist()[-2:], False) == "<|im_end|>\n"
    narrow = SMALL.model_copy(update={"max_tokens": 200})
    assert processor(narrow).requests([Request("long " * 99)]).lengths == (200,)
    with pytest.raises(X2IError, match="do not fit"):
        processor(narrow).requests([Request("x", tuple(picture(i, 32, 32) for i in range(12)))])


def test_conversations_are_cut() -> None:
    narrow = SMALL.model_copy(update={"max_tokens": 100})
    made = OvisU1(narrow).eval()
    made.load_state_dict(model().state_dict())
    long = Chat((*ASK.messages, Message("assistant", "A cat." * 20)), ASK.images)
    inputs = processor(narrow).chats([long], labels=True)
    total, count = made.next_token(inputs)
    assert inputs.labels_BL is not None
    kept = inputs.labels_BL[:, :100] != IGNORE
    assert inputs.lengths[0] > 100 and count.tolist() == kept.sum(dim=1).tolist() != [0]
    assert made.embed(inputs).shape[1] == 100 and total.isfinite().all()
    many = Chat((Message("user", "<image>" * 4 + "?"),), tuple(picture(i, 64, 64) for i in range(4)))
    assert processor(narrow.model_copy(update={"max_tokens": 150})).chats([many], labels=False).lengths[0] < 150
    with pytest.raises(X2IError, match="show fewer or smaller images"):
        processor(narrow.model_copy(update={"max_tokens": 80})).chats([many], labels=False)


def test_bare_captions() -> None:
    inputs = processor().chats([TOLD], labels=True, plain=True)
    assert inputs.labels_BL is not None
    labels = inputs.labels_BL[0]
    assert TOKENIZER.decode(labels[labels != IGNORE].tolist(), False) == "A cat.<|im_end|>"
    assert inputs.lengths[0] == 2 + 5 * 7 + 7


# (height, width), factor, least, most pixels -> as the published smart_resize has it
SIZES = [
    ((1024, 1024), (28, 3136, 200704), (448, 448)),
    ((1024, 1024), (28, 200704, 2408448), (1036, 1036)),
    ((512, 1024), (28, 3136, 200704), (308, 616)),
    ((768, 1360), (28, 3136, 200704), (336, 588)),
    ((420, 476), (28, 200704, 2408448), (448, 504)),
    ((3000, 4000), (28, 200704, 2408448), (1344, 1792)),
    ((20, 500), (28, 200704, 2408448), (112, 2240)),
    ((500, 20), (28, 200704, 2408448), (2240, 112)),
    ((30, 6200), (28, 200704, 2408448), (56, 6356)),
    ((6200, 30), (28, 200704, 2408448), (6356, 56)),
    ((333, 777), (32, 3136, 1003520), (320, 768)),
    ((1500, 2000), (32, 3136, 1003520), (864, 1152)),
    ((31, 40), (32, 3136, 1003520), (64, 64)),
    ((45, 45), (28, 3136, 1003520), (56, 56)),
]


@pytest.mark.parametrize(("size", "rule", "expected"), SIZES)
def test_smart_resize(size: tuple[int, int], rule: tuple[int, int, int], expected: tuple[int, int]) -> None:
    assert smart_resize(*size, *rule) == expected


def test_thin_pictures_keep_a_row() -> None:
    """The published rule gives a side of 0 here, and fails."""
    assert smart_resize(28, 5600, 28, 56 * 56, 28 * 28 * 100) == (28, 3948)
