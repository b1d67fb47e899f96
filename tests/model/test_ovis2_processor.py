"""What Ovis2 is shown: conversations, tiles, bare captions, and where they are cut."""

import pytest
import torch

from tests.model.test_ovis2 import byte_tokenizer, processor, solid
from x2i.base.errors import X2IError
from x2i.model.base import Chat, Message
from x2i.model.layers.chat import IGNORE
from x2i.model.layers.config import AIMv2Config, VisualTokenizerConfig
from x2i.model.ovis2.config import Ovis2Config, Tiles
from x2i.model.ovis2.model import Ovis2Batch
from x2i.model.ovis2.partition import TILE

# --- words and pictures in ------------------------------------------------------------------------------------------------


def read(batch: Ovis2Batch, row: int = 0) -> str:
    """A row as text; a tile is written once."""
    out, tile = "", processor().config.tile_tokens
    ids = batch.ids_BL[row][batch.valid_BL[row]].tolist()
    signs = {TILE: "▣", -301: "[", -302: "|", -303: ",", -304: ";", -305: "]"}
    while ids:
        if ids[0] >= 0:
            count = next((i for i, token in enumerate(ids) if token < 0), len(ids))
            out += byte_tokenizer().decode(ids[:count], skip_special_tokens=False)
        else:
            count = tile if ids[0] == TILE else 1
            out += signs[ids[0]]
        ids = ids[count:]
    return out


def learned(batch: Ovis2Batch, row: int = 0) -> str:
    assert batch.labels_BL is not None
    ids = [i for i in batch.labels_BL[row].tolist() if i != IGNORE]
    return str(byte_tokenizer().decode(ids, skip_special_tokens=False))


def test_a_conversation_with_two_images_among_text() -> None:
    chat = Chat(
        (Message("user", "A: <image>\nB: <image>\nSame?"), Message("assistant", "No.")),
        (solid((1, 2, 3), 32, 64), solid((4, 5, 6), 10, 10)),
    )
    batch = processor().chats([chat, Chat((Message("user", "Hi"), Message("assistant", "Hello")))], labels=True)
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    asked = "<|im_start|>user\nA: [▣|▣,▣]\nB: [▣|]\nSame?<|im_end|>\n"
    assert read(batch) == system + asked + "<|im_start|>assistant\nNo.<|im_end|>\n"
    assert learned(batch) == "No.<|im_end|>"
    assert read(batch, 1) == system + "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    assert batch.grids == ((8, 8),) * 4
    assert batch.visual_P.tolist() == list(range(4 * 16))
    assert batch.valid_BL[1, 0] and not batch.valid_BL[1, -1]  # padded on the right

    asks = processor().chats([Chat(chat.messages[:1], chat.images), Chat((Message("user", "Hi"),))], labels=False)
    assert read(asks) == system + asked + "<|im_start|>assistant\n"
    assert asks.labels_BL is None
    assert not asks.valid_BL[1, 0] and asks.valid_BL[1, -1]  # padded on the left


def test_how_many_tiles_an_image_has() -> None:
    image = solid((9, 9, 9), 64, 64)

    def tiles(count: int, max_tiles: int | None = None) -> int:
        chat = Chat((Message("user", "<image>" * count),), (image,) * count)
        return len(processor(tiles=Tiles()).chats([chat], labels=False, max_tiles=max_tiles).grids)

    assert tiles(1) == 1 + 4
    assert tiles(2) == 2 * (1 + 4)
    assert tiles(2, max_tiles=1) == 2  # frames of a video
    large = Chat((Message("user", "<image>"),), (solid((9, 9, 9), 320, 320),))
    assert len(processor(tiles=Tiles()).chats([large], labels=False).grids) == 1 + 9
    several = Chat((Message("user", "<image><image>"),), (large.images[0], image))
    assert len(processor(tiles=Tiles()).chats([several], labels=False).grids) == 1 + 4 + 1 + 4


def test_bare_captions() -> None:
    chat = Chat(
        (Message("user", "<image>\nWhat is it?"), Message("assistant", " A red <image>square. ")), (solid((9, 9, 9)),)
    )
    batch = processor().chats([chat], labels=True, plain=True)
    assert read(batch) == "[▣|]\nDescription:\nA red square."
    assert learned(batch) == "A red square."  # no token ends it, as published
    template = processor(caption_template="<image>'s caption: ")
    assert read(template.chats([chat], labels=False, plain=True)) == "[▣|]'s caption: "


def test_long_conversations_are_cut_as_published() -> None:
    chat = Chat((Message("user", "<image>" * 3), Message("assistant", "x" * 50)), (solid((1, 2, 3)),) * 3)
    whole = processor().chats([chat], labels=True)
    # a tile counts as one token before the cut
    before = 61 + 12 + 3 * 4
    text = processor(max_text_tokens=before).chats([chat], labels=True)
    cut = text.ids_BL.shape[1]
    assert torch.equal(text.ids_BL, whole.ids_BL[:, :cut])
    assert int((text.ids_BL >= 0).sum() + (text.ids_BL < TILE).sum()) + len(text.grids) == before
    # with all visual tokens: the end of what is learned, the beginning of what is answered
    first_tile = int((whole.ids_BL[0] == TILE).nonzero()[0])
    short = processor(max_length=first_tile + 20).chats([chat], labels=True)
    assert torch.equal(short.ids_BL, whole.ids_BL[:, : first_tile + 20])
    assert len(short.grids) == 2 and short.visual_P.tolist() == list(range(17))
    asked = Chat((*chat.messages[:1], Message("assistant", "x"), Message("user", "y")), chat.images)
    full = processor().chats([asked], labels=False)
    most = full.ids_BL.shape[1] - first_tile - 20
    late = processor(max_length=most).chats([asked], labels=False)
    assert torch.equal(late.ids_BL, full.ids_BL[:, -most:])
    assert len(late.grids) == 2 and late.visual_P.tolist() == list(range(1, 32))  # one tile and a token are gone


def test_images_and_marks_must_agree() -> None:
    with pytest.raises(X2IError, match="1 images and 0 <image> marks"):
        processor().chats([Chat((Message("user", "no mark"),), (solid((1, 2, 3)),))], labels=False)


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer": VisualTokenizerConfig(encoder=AIMv2Config(rope=False), indicators=4)},
        {"tokenizer": VisualTokenizerConfig(indicators=5)},
        {"caption_template": "Description:"},
    ],
    ids=["marks", "native resolution", "no place for the image"],
)
def test_numbers_that_are_no_ovis2_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"must (be|have)"):
        Ovis2Config.model_validate(changes)
