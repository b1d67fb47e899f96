"""OmniGen's text head: what of a conversation is learned, the loss by its formula, greedy answers."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoModelForCausalLM

from tests.model.test_omnigen import SMALL, TRUNKS, randomised, with_images
from x2i.base.errors import X2IError
from x2i.model import vae, weights
from x2i.model.base import Chat, Message
from x2i.model.config import PixelsConfig
from x2i.model.omnigen.config import PRESETS, OmniGenConfig
from x2i.model.omnigen.model import OmniGen
from x2i.model.omnigen.processor import OmniGenProcessor
from x2i.model.omnigen.prompt import IGNORED, PromptBatch, collate
from x2i.model.omnigen.trunk import numbers
from x2i.trainer.config import TokenizerTraining
from x2i.trainer.tokens import train

SPEAKING = SMALL.model_copy(update={"text_head": True})
PHOTO = np.full((8, 12, 3), 90, np.uint8)  # 6 tokens


@pytest.fixture(scope="module")
def processor() -> OmniGenProcessor:
    texts = ["What is this? A red house.", "And that? A blue boat."]
    tokenizer = train(texts, TokenizerTraining(vocab_size=400), OmniGenProcessor.special_tokens, "<s>")
    pixels = vae.build(PixelsConfig(factor=2))
    config = SPEAKING.adapted(vocab_size=tokenizer.get_vocab_size(), latent_channels=pixels.channels)
    return OmniGenProcessor(config, tokenizer, pixels)


def chat(*texts: str, images: int = 0) -> Chat:
    """Turns of user and assistant by turns."""
    messages = tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts))
    return Chat(messages, (PHOTO,) * images)


def spoken(tokenizer: Tokenizer, ids: torch.Tensor) -> str:
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=False))


def test_a_conversation_is_written_as_phi_3_does_and_the_answers_are_learned(processor: OmniGenProcessor) -> None:
    told = chat("<image> What is this?", "A red house.", "And that? <image>", "A blue boat.", images=2)
    batch = processor.chats([told], labels=True)
    assert batch.labels_BL is not None
    text = batch.ids_BL[batch.blocks_BL == 0]
    assert spoken(processor.tokenizer, text) == (
        "<s><|user|>\n<img></img> What is this?<|end|>\n<|assistant|>\nA red house.<|end|>\n"
        "<|user|>\nAnd that? <img></img><|end|>\n<|assistant|>\nA blue boat.<|end|>\n"
    )
    learned = batch.labels_BL[batch.labels_BL != IGNORED]
    assert spoken(processor.tokenizer, learned) == "A red house.<|end|>A blue boat.<|end|>"
    assert [int((batch.blocks_BL == k).sum()) for k in (1, 2)] == [6, 6] and len(batch.images) == 2

    asked = processor.chats([chat("What is this?")], labels=False)
    assert asked.labels_BL is None
    assert spoken(processor.tokenizer, asked.ids_BL[0]) == "<s><|user|>\nWhat is this?<|end|>\n<|assistant|>\n"
    assert processor.stop == tuple(processor.tokenizer.token_to_id(t) for t in ("<|end|>", "</s>"))


def test_captions_are_learned_without_the_chat(processor: OmniGenProcessor) -> None:
    batch = processor.chats([chat("Describe: <image>", "A red house.", images=1)], labels=True, plain=True)
    assert batch.labels_BL is not None
    assert spoken(processor.tokenizer, batch.ids_BL[batch.blocks_BL == 0]) == "<s><img></img>A red house.<|end|>"
    assert spoken(processor.tokenizer, batch.labels_BL[batch.labels_BL != IGNORED]) == "A red house.<|end|>"


def test_a_conversation_that_is_too_long_is_cut_at_its_end(processor: OmniGenProcessor) -> None:
    told = chat("<image> What is this?", "A red house.", "And that? <image>", "A blue boat.", images=2)
    whole = processor.chats([told], labels=True)
    short = OmniGenProcessor(processor.config, processor.tokenizer, processor.vae, 30)
    cut = short.chats([told], labels=True)
    assert int((cut.blocks_BL == 0).sum()) == 30
    length = cut.ids_BL.shape[1]
    assert torch.equal(cut.ids_BL, whole.ids_BL[:, :length]) and cut.labels_BL is not None
    assert whole.labels_BL is not None and torch.equal(cut.labels_BL, whole.labels_BL[:, :length])
    assert len(cut.images) == int(cut.blocks_BL.max())


@pytest.mark.parametrize(
    ("told", "labels", "message"),
    [
        (chat("<image> What?", "A house."), True, "0 images, but 1 marks"),
        (chat("What?", "A house.", images=1), True, "1 images, but 0 marks"),
        (chat("What?"), True, "no turn of the assistant"),
        (chat("What?", "A house."), False, "must end with a turn of the user"),
    ],
)
def test_conversations_that_make_no_sense_are_refused(
    processor: OmniGenProcessor, told: Chat, labels: bool, message: str
) -> None:
    with pytest.raises(X2IError, match=message):
        processor.chats([told], labels)


@pytest.mark.parametrize("trunk", TRUNKS)
@torch.no_grad()
def test_the_loss_is_that_of_the_learned_tokens_whoever_shares_the_batch(trunk: str) -> None:
    model = randomised(TRUNKS[trunk].model_copy(update={"text_head": True}))
    prompt = with_images(1, 5, 4, after=6)
    ids = torch.tensor([prompt.ids])
    labels = ids.clone()
    labels[:, :11] = IGNORED  # five of the last six words are learned
    image = torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(3))
    alone = collate([prompt], [[image]])
    alone = PromptBatch(ids, alone.valid_BL, alone.blocks_BL, alone.images, labels)
    sums, counts = model.next_token(alone)
    assert counts.tolist() == [ids.shape[1] - 11]
    # a plain causal pass, but for the picture, which is seen whole
    allowed = torch.ones(15, 15).tril().bool()
    allowed[5:9, 5:9] = True
    mask = torch.zeros(15, 15).masked_fill(~allowed, torch.finfo(torch.float32).min)
    hidden = model.llm(inputs_embeds=model.embed_prompt(alone), attention_mask=mask[None, None]).last_hidden_state
    expected = F.cross_entropy(model.lm_head(hidden[0, 10:-1]), ids[0, 11:], reduction="sum")
    torch.testing.assert_close(sums[0], expected, rtol=1e-5, atol=1e-5)

    padded = PromptBatch(
        torch.cat([F.pad(ids, (3, 0), value=2), F.pad(ids, (3, 0), value=2)]),
        torch.cat([F.pad(alone.valid_BL, (3, 0)), torch.ones(1, 18, dtype=torch.bool)]),
        torch.cat([F.pad(alone.blocks_BL, (3, 0)), torch.zeros(1, 18, dtype=torch.long)]),
        alone.images,
        torch.cat([F.pad(labels, (3, 0), value=IGNORED), torch.full((1, 18), IGNORED)]),
    )
    sums, counts = model.next_token(padded)
    torch.testing.assert_close(sums, torch.stack([expected, torch.tensor(0.0)]), rtol=1e-5, atol=1e-5)
    assert counts.tolist() == [4, 0]


@pytest.mark.parametrize("trunk", TRUNKS)
@torch.no_grad()
def test_a_trunk_may_start_from_a_language_model_and_says_what_that_one_says(trunk: str, tmp_path: Path) -> None:
    config = TRUNKS[trunk].model_copy(update={"text_head": True})
    torch.manual_seed(1)
    theirs = AutoModelForCausalLM.from_config(numbers(config)).eval()
    theirs.save_pretrained(tmp_path)
    ours = OmniGen(config).eval()
    for part in ("trunk", "text_head"):
        weights.load_part(ours, tmp_path, weights.prefixed(ours, tmp_path, ours.pretrained[part]))
    ids = torch.randint(3, 100, (1, 20))
    batch = PromptBatch(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids), labels_BL=ids)
    sums, counts = ours.next_token(batch)
    torch.testing.assert_close(sums / counts, theirs(input_ids=ids, labels=ids).loss[None], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [9, 122])  # the second passes the long-rope's switch at 128 while it speaks
@torch.no_grad()
def test_answers_are_the_greedy_ones_of_a_pass_without_cache(length: int) -> None:
    model = randomised(SPEAKING)
    image = torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(4))
    prompts = [with_images(1, length - 7, 4, after=3), with_images(2, 2, 4, after=1)]
    batch = collate(prompts, [[image], [image + 1]])
    found = model.answer(batch, 12, stop=())
    for row, prompt in enumerate(prompts):
        ids, blocks = list(prompt.ids), list(prompt.blocks)
        for said in found[row] if length == 9 or row == 0 else []:
            assert said == int(following(model, ids, blocks, image + row).argmax())
            ids.append(said)
            blocks.append(0)
    stop = found[0][2]
    stopped = model.answer(batch, 12, stop=(stop,))
    assert stopped[0] == found[0][: found[0].index(stop)]


def following(model: OmniGen, ids: list[int], blocks: list[int], image: torch.Tensor) -> torch.Tensor:
    """Scores of the token behind a whole sequence, with nothing kept from before."""
    runs = torch.tensor(blocks)
    batch = PromptBatch(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool), runs[None], (image,))
    allowed = torch.ones(len(ids), len(ids)).tril().bool() | ((runs[:, None] == runs) & (runs > 0))
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    hidden = model.llm(inputs_embeds=model.embed_prompt(batch), attention_mask=mask[None, None]).last_hidden_state
    scores: torch.Tensor = model.lm_head(hidden[0, -1])
    return scores


def test_a_tiny_model_learns_to_say_what_it_sees(processor: OmniGenProcessor) -> None:
    torch.manual_seed(0)
    model = OmniGen(processor.config.model_copy(update={"tie_text_head": True}))
    dark, light = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)
    question = Message("user", "<image> What is this?")
    told = [
        Chat((question, Message("assistant", answer)), (photo,))
        for answer, photo in (("A red house.", dark), ("A boat.", light))
    ]
    batch = processor.chats(told, labels=True)
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(60):
        sums, counts = model.next_token(batch)
        optimiser.zero_grad()
        (sums.sum() / counts.sum()).backward()
        optimiser.step()
    asked = processor.chats([Chat((question,), c.images) for c in told], labels=False)
    assert [processor.text(ids) for ids in model.answer(asked, 20, processor.stop)] == ["A red house.", "A boat."]


def test_a_head_is_there_only_where_it_is_wanted() -> None:
    plain, own, tied = OmniGen(SMALL), OmniGen(SPEAKING), OmniGen(SPEAKING.model_copy(update={"tie_text_head": True}))
    assert (plain.answers, own.answers, tied.answers) == (False, True, True)
    assert own.state_dict().keys() - plain.state_dict().keys() == {"lm_head.weight"}
    assert isinstance(own.lm_head, nn.Linear) and own.lm_head.bias is None
    assert tied.state_dict().keys() == plain.state_dict().keys()
    batch = collate([with_images(1, 3)], [[]])
    with pytest.raises(X2IError, match="no text head"):
        plain.next_token(batch)
    with pytest.raises(X2IError, match="no text head"):
        plain.answer(batch, 3, ())
    with pytest.raises(X2IError, match="needs labels"):
        own.next_token(batch)
    for name, _ in own.named_parameters():  # every parameter is of one part
        assert sum(name.startswith(prefixes) for prefixes in OmniGen.parts.values()) == 1
    with pytest.raises(ValueError, match="without text_head"):
        OmniGenConfig(tie_text_head=True)
    assert PRESETS["omnigen-tiny"].text_head and not PRESETS["omnigen-3.8b"].text_head
