"""Mini-Gemini is MGM: its figures, counts and names; mining looks where it should; it learns, answers and draws.

What is compared with dvlab-research/MGM, and how, x2i/model/mini_gemini/verify.py says.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from x2i.base.errors import RecipeError, X2IError
from x2i.model.base import Chat, Message
from x2i.model.filling import draw as numbers
from x2i.model.mini_gemini import verify
from x2i.model.mini_gemini.batch import ChatBatch
from x2i.model.mini_gemini.config import PRESETS, RECIPES, STAGES, MiniGeminiConfig
from x2i.model.mini_gemini.generation import NEGATIVE, Painter, asked, draw, split_prompt
from x2i.model.mini_gemini.images import views
from x2i.model.mini_gemini.model import MiniGemini, windows
from x2i.model.mini_gemini.processor import MiniGeminiProcessor
from x2i.model.mini_gemini.template import PLAIN, TEMPLATES
from x2i.model.mini_gemini.verify import filled
from x2i.model.registry import changed
from x2i.model.verify import Comparison, compared
from x2i.model.weights import load, load_part, prefixed, save

TINY = PRESETS["mini-gemini-tiny"]
ASKING = "<image>\nWhich colour is it?"


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Small products are slower on many threads, and much slower where others compute too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def like(config: MiniGeminiConfig = TINY, **changes: Any) -> MiniGeminiConfig:
    """The configuration with some numbers changed."""
    made = changed(config, changes)
    assert isinstance(made, MiniGeminiConfig)
    return made


TINY_HD = verify.hd()


def byte_tokenizer(*texts: str, special: tuple[str, ...] = MiniGeminiProcessor.special_tokens) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def picture(seed: int, height: int = 20, width: int = 30) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def chat(*turns: str, images: tuple[np.ndarray, ...] = ()) -> Chat:
    return Chat(tuple(Message(("user", "assistant")[i % 2], t) for i, t in enumerate(turns)), images)


# counts, names, stages


def test_the_published_size_has_the_published_parts() -> None:
    with torch.device("meta"):
        model = MiniGemini(PRESETS["mgm-2b"])
    count = {
        part: sum(p.numel() for n, p in model.named_parameters() if n.startswith(prefixes))
        for part, prefixes in model.parts.items()
    }
    query = 2 * 1024 + 1024 * 1024 + 1024
    aux = 2 * 2880 + 2880 * 1024 + 1024
    assert count == {
        "llm": 2_506_172_416,  # Gemma 2B
        "projector": 1024 * 2048 + 2048 + 2048 * 2048 + 2048,
        "mining": query + 2 * aux,
        "low_encoder": 303_507_456,  # CLIP ViT-L/14 at 336
        "high_encoder": 196_227_264,  # timm's convnext_large without its head
    }
    assert sum(count.values()) == sum(p.numel() for p in model.parameters())
    assert {name: sum(count[part] for part in trained) for name, trained in STAGES.items()} == {
        "alignment": 13_259_008,
        "instruction": 2_519_431_424,
    }


def test_the_stages_are_trained_as_published() -> None:
    numbers = {name: (r.learning_rate, r.batch, r.warmup) for name, r in RECIPES.items()}
    assert numbers == {"alignment": (1e-3, 256, 0.03), "instruction": (2e-5, 128, 0.03)}


@pytest.mark.parametrize(
    ("name", "llm"), [("mgm-7b", 6_738_415_616), ("mgm-8b", 8_030_261_248), ("mgm-13b", 13_015_864_320)]
)
def test_language_models_of_other_sizes_have_their_published_counts(name: str, llm: int) -> None:
    with torch.device("meta"):
        model = MiniGemini(PRESETS[name])
    prefixes = MiniGemini.parts["llm"]
    assert sum(p.numel() for n, p in model.named_parameters() if n.startswith(prefixes)) == llm


def test_names_are_those_of_published_checkpoints() -> None:
    with torch.device("meta"):
        state = MiniGemini(PRESETS["mgm-7b"]).state_dict()
    expected = {
        "lm_head.weight": (32000, 4096),
        "model.embed_tokens.weight": (32000, 4096),
        "model.layers.31.self_attn.q_proj.weight": (4096, 4096),
        "model.norm.weight": (4096,),
        "model.mm_projector.0.weight": (4096, 1024),
        "model.mm_projector.2.bias": (4096,),
        "model.vlm_uni_query_projector.0.weight": (1024,),
        "model.vlm_uni_query_projector.1.weight": (1024, 1024),
        "model.vlm_uni_aux_projector.0.bias": (2880,),
        "model.vlm_uni_aux_projector.1.weight": (1024, 2880),
        "model.vlm_uni_val_projector.1.bias": (1024,),
        "model.vision_tower.vision_tower.vision_model.embeddings.class_embedding": (1024,),
        "model.vision_tower.vision_tower.vision_model.encoder.layers.23.self_attn.k_proj.weight": (1024, 1024),
        "model.vision_tower_aux.vision_stem.0.weight": (192, 3, 4, 4),
        "model.vision_tower_aux.vision_stages.2.blocks.26.conv_dw.weight": (768, 1, 7, 7),
        "model.vision_tower_aux.vision_stages.3.downsample.1.weight": (1536, 768, 2, 2),
    }
    assert {name: tuple(state[name].shape) for name in expected} == expected
    outside = [n for n in state if not n.startswith(tuple(p for ps in MiniGemini.parts.values() for p in ps))]
    assert outside == []


@pytest.mark.parametrize(("name", "tokens"), [("mgm-2b", 576), ("mgm-2b-hd", 5 * 576)])
def test_images_take_up_the_published_tokens(name: str, tokens: int) -> None:
    assert PRESETS[name].image_tokens == tokens


def test_weights_survive_a_file_and_tied_ones_are_written_once(tmp_path: Path) -> None:
    first, second = filled(), MiniGemini(TINY)
    save(first.state_dict(), tmp_path / "model.safetensors")
    load(second, tmp_path)
    ours = second.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in first.state_dict().items())


def test_the_encoders_are_read_from_checkpoints_of_their_own(tmp_path: Path) -> None:
    from safetensors.torch import save_file
    from transformers import CLIPConfig, CLIPModel

    model, low = MiniGemini(TINY), TINY.low
    vision = {
        "hidden_size": low.hidden_size,
        "intermediate_size": low.intermediate_size,
        "num_hidden_layers": low.layers,
        "num_attention_heads": low.heads,
        "image_size": low.image_size,
        "patch_size": low.patch_size,
    }
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    clip.save_pretrained(tmp_path)
    load_part(model, tmp_path, prefixed(model, tmp_path, model.pretrained["low_encoder"]))
    pixels = numbers(0, 2, 3, 32, 32)
    theirs = clip.vision_model(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    assert torch.equal(model.model.vision_tower(pixels), theirs)

    file, high = tmp_path / "openclip.safetensors", model.model.vision_tower_aux.state_dict()
    drawn = {name.replace("vision_", "visual.trunk."): numbers(0, *tensor.shape) for name, tensor in high.items()}
    save_file(drawn | {"logit_scale": torch.zeros(1)}, file)
    load_part(model, file, prefixed(model, file, model.pretrained["high_encoder"]))
    read = model.model.vision_tower_aux.state_dict()
    assert all(torch.equal(read[n], drawn[n.replace("vision_", "visual.trunk.")]) for n in high)


def test_the_language_model_is_read_from_its_own_checkpoint(tmp_path: Path) -> None:
    from transformers import GemmaConfig, GemmaForCausalLM

    model, llm = MiniGemini(TINY), TINY.llm
    theirs = GemmaForCausalLM(GemmaConfig(vocab_size=llm.vocab_size, hidden_size=llm.hidden_size, **llm.numbers)).eval()
    theirs.save_pretrained(tmp_path)
    load_part(model, tmp_path, prefixed(model, tmp_path, model.pretrained["llm"]))
    ids = torch.arange(6)[None]
    valid = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        loss, count = model.next_token(ChatBatch(ids, valid, ~valid, labels_BL=ids))
        expected = theirs(ids, labels=ids).loss
    assert (loss / count).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("model", ["mgm-2b", "mgm-7b"])
def test_all_names_are_those_of_mgm_and_of_the_libraries(model: str) -> None:
    rows = verify.names(model)
    assert [row.part for row in rows] == ["mining and projector", "language model", "low encoder", "high encoder"]
    assert all(row.ok and (row.missing or row.matched) for row in rows)
    with torch.device("meta"):
        assert sum(row.ours for row in rows) == len(MiniGemini(PRESETS[model]).state_dict())  # none is left out


# encoders and mining against other code


@pytest.mark.parametrize("comparison", verify.outputs(), ids=lambda comparison: comparison.what)
def test_outputs_are_those_of_mgm_and_of_the_libraries(comparison: Comparison) -> None:
    row = compared("mini_gemini", comparison)
    if row.missing:
        pytest.skip(f"{row.missing} is not here")
    assert row.ok, row
    assert row.how == ("recorded" if "MGM" in row.public else "live")
    assert row.largest > 1
    assert row.difference is not None and row.difference < 1e-4


# what mining must keep to


def test_published_windows_are_64_keys_for_each_of_576_tokens() -> None:
    assert windows(torch.zeros(1, 3, 192, 192), 24).shape == (1, 576, 64, 3)


def test_windows_lie_row_by_row_over_their_tokens() -> None:
    grid = torch.arange(8 * 12.0).reshape(1, 1, 8, 12)
    found = windows(grid, 4)  # windows of 2 x 3
    assert found[0, 4 * 2 + 1, :, 0].tolist() == grid[0, 0, 4:6, 3:6].flatten().tolist()


def test_constant_features_add_a_constant() -> None:
    model, low = filled(), numbers(3, 1, 16, 32)
    with torch.no_grad():
        added = model.mine(low, numbers(4, 1, 112, 1, 1).expand(1, 112, 16, 16)) - low
    assert added.abs().max() > 0.1
    assert (added - added[:, :1]).abs().max() < 1e-5


def test_the_order_within_a_window_is_of_no_account_the_order_of_windows_is() -> None:
    model, low, high = filled(), numbers(3, 1, 16, 32), numbers(4, 1, 112, 16, 16)
    tiles = high.unflatten(3, (4, 4)).unflatten(2, (4, 4))  # [1, C, row, r, column, c]
    within = tiles.flip(3).flip(5).flatten(4, 5).flatten(2, 3)
    across = tiles.flip(4).flatten(4, 5).flatten(2, 3)
    with torch.no_grad():
        plain = model.mine(low, high)
        assert (model.mine(low, within) - plain).abs().max() < 1e-5
        assert (model.mine(low, across) - plain).abs().max() > 0.1


def test_a_window_of_features_reaches_its_own_token_only() -> None:
    model, low, high = filled(), numbers(3, 1, 16, 32), numbers(4, 1, 112, 16, 16)
    with torch.no_grad():
        plain = model.mine(low, high)
        for token in range(16):
            touched, row, column = high.clone(), token // 4, token % 4
            touched[..., 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += numbers(6, 1, 112, 4, 4)
            moved = (model.mine(low, touched) - plain).abs().amax(dim=(0, 2)) > 1e-6
            assert moved.nonzero().flatten().tolist() == [token]


@pytest.mark.parametrize("config", [TINY, TINY_HD], ids=["plain", "hd"])
def test_pixels_reach_the_token_that_lies_over_them_most(config: MiniGeminiConfig) -> None:
    model, side = filled(config), config.high.image_size
    for block in (m for m in model.modules() if hasattr(m, "gamma")):
        block.gamma.data.zero_()  # no 7 x 7 convolutions, which look further than a window
    grid, tokens = config.grid, config.low.side
    low, high = numbers(1, 1, config.views, 3, 32, 32), numbers(2, 1, 3, side, side)
    cell = side // (grid * tokens)
    with torch.no_grad():
        plain = model.mined(low, high)[:, -((grid * tokens) ** 2) :]  # the crops, without the overview
        for row, column in ((0, 0), (0, 2), (1, 0), (3, 3), (grid * tokens - 1, grid * tokens - 2)):
            touched = high.clone()
            touched[..., row * cell : (row + 1) * cell, column * cell : (column + 1) * cell] *= -3
            moved = (model.mined(low, touched)[:, -((grid * tokens) ** 2) :] - plain).norm(dim=2)[0]
            crop = row // tokens * grid + column // tokens
            assert int(moved.argmax()) == crop * tokens**2 + row % tokens * tokens + column % tokens


def test_an_image_of_several_views_shows_the_whole_first() -> None:
    model, low, high = filled(TINY_HD), numbers(1, 1, 5, 3, 32, 32), numbers(2, 1, 3, 128, 128)
    other = low.clone()
    other[:, 4] += numbers(7, 3, 32, 32)
    with torch.no_grad():
        moved = (model.mined(low, high) - model.mined(other, high)).abs().amax(dim=(0, 2)) > 0
    assert moved.nonzero().flatten().tolist() == list(range(16))


def test_gemma_scales_image_tokens_as_all_its_inputs() -> None:
    model = filled()
    batch = MiniGeminiProcessor(TINY, byte_tokenizer(ASKING), None).chats([chat(ASKING, images=(picture(0),))], False)
    assert batch.low_MVCHW is not None
    assert batch.high_MCHW is not None
    with torch.no_grad():
        tokens = model.encode(batch.low_MVCHW, batch.high_MCHW)[0]
        seen: list[Tensor] = []
        model.model.layers[0].register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        model.answer(batch, 1, ())
    assert torch.allclose(seen[0][batch.image_BL], tokens * 64**0.5, rtol=1e-5)


# conversations


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


# learning and answering

COLOURS = {"red": (200, 30, 30), "green": (30, 180, 40), "blue": (40, 50, 210), "grey": (128, 128, 128)}


def coloured(seed: int) -> tuple[np.ndarray, str]:
    rng = np.random.default_rng(seed)
    name = list(COLOURS)[seed % len(COLOURS)]
    return (np.array(COLOURS[name]) + rng.normal(0, 12, (24, 36, 3))).clip(0, 255).astype(np.uint8), name


@pytest.fixture(scope="module")
def taught() -> tuple[MiniGemini, MiniGeminiProcessor, list[float]]:
    """A tiny model that has learned to name colours, with its held-out losses per token before and after."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer(ASKING, *COLOURS, *COLOURS)
    config = TINY.adapted(vocab_size=tokenizer.get_vocab_size(), latent_channels=4)
    model, processor = MiniGemini(config), MiniGeminiProcessor(config, tokenizer, None)

    def batch(seeds: range) -> ChatBatch:
        made = [coloured(seed) for seed in seeds]
        return processor.chats([chat(ASKING, name, images=(image,)) for image, name in made], labels=True)

    held, losses = batch(range(1000, 1008)), []

    def measured() -> float:
        with torch.no_grad():
            loss, count = model.next_token(held)
        return (loss.sum() / count.sum()).item()

    losses.append(measured())
    prefixes = tuple(p for part in STAGES["instruction"] for p in model.parts[part])
    trained = [p.requires_grad_(name.startswith(prefixes)) for name, p in model.named_parameters()]
    optimiser = torch.optim.AdamW([p for p in trained if p.requires_grad], lr=5e-3)
    for step in range(60):
        loss, count = model.next_token(batch(range(8 * step, 8 * step + 8)))
        optimiser.zero_grad()
        (loss.sum() / count.sum()).backward()
        optimiser.step()
    losses.append(measured())
    return model.eval(), processor, losses


def test_it_learns_to_name_colours(taught: tuple[MiniGemini, MiniGeminiProcessor, list[float]]) -> None:
    model, processor, (before, after) = taught
    assert before > 3
    assert after < 0.1
    made = [coloured(seed) for seed in range(2000, 2008)]
    asking = processor.chats([chat(ASKING, images=(image,)) for image, _ in made], labels=False)
    answers = model.answer(asking, 12, processor.stop)
    assert [processor.text(ids) for ids in answers] == [name for _, name in made]


def test_rows_of_unequal_length_are_what_they_are_alone(
    taught: tuple[MiniGemini, MiniGeminiProcessor, list[float]],
) -> None:
    model, processor, _ = taught
    image, other = coloured(3)[0], coloured(5)[0]
    learned = [
        chat(ASKING, "grey", images=(image,)),
        chat("Say something short, with no image at all.", "red"),
        chat(f"{ASKING} <image>", "green", "And this?", "blue, not green", images=(other, image)),
    ]
    with torch.no_grad():
        together, counts = model.next_token(processor.chats(learned, labels=True))
        alone = [model.next_token(processor.chats([one], labels=True)) for one in learned]
    assert torch.allclose(together, torch.cat([loss for loss, _ in alone]), rtol=1e-4, atol=1e-4)
    assert counts.tolist() == [int(count) for _, count in alone]
    asked_for = [chat(ASKING, images=(image,)), chat("Short?"), chat(f"{ASKING} <image>", images=(other, image))]
    answers = model.answer(processor.chats(asked_for, labels=False), 6, processor.stop)
    assert answers == [model.answer(processor.chats([c], labels=False), 6, processor.stop)[0] for c in asked_for]


def test_answers_with_a_cache_are_those_without(taught: tuple[MiniGemini, MiniGeminiProcessor, list[float]]) -> None:
    model, processor, _ = taught
    batch = processor.chats([chat(ASKING, images=(coloured(2)[0],)), chat("Why?")], labels=False)
    embeds, valid, expected = model.embed(batch), batch.valid_BL, [[], []]  # type: ignore[var-annotated]
    with torch.no_grad():
        for _ in range(5):
            positions = (valid.long().cumsum(1) - 1).clamp_min(0)
            hidden = model.model(inputs_embeds=embeds, attention_mask=valid.long(), position_ids=positions)
            chosen = model.lm_head(hidden.last_hidden_state[:, -1]).argmax(-1)
            for row, token in zip(expected, chosen.tolist(), strict=True):
                row.append(token)
            embeds = torch.cat([embeds, model.model.embed_tokens(chosen[:, None])], dim=1)
            valid = torch.cat([valid, valid.new_ones(2, 1)], dim=1)
    assert model.answer(batch, 5, ()) == expected


def test_it_needs_labels_to_learn_and_draws_nothing() -> None:
    model = MiniGemini(TINY)
    batch = MiniGeminiProcessor(TINY, byte_tokenizer("a"), None).chats([chat("a")], labels=False)
    with pytest.raises(X2IError, match="no labels"):
        model.next_token(batch)
    with pytest.raises(X2IError, match="draws no pictures"):
        model.condition(batch)


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_other_language_models_serve(model_type: str) -> None:
    few = {"intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    llm = {"model_type": model_type, "hidden_size": 32}
    config = MiniGeminiConfig.model_validate(
        TINY.model_dump() | {"llm": TINY.llm.model_dump() | llm | {"numbers": few}}
    )
    model = MiniGemini(config)
    batch = MiniGeminiProcessor(config, byte_tokenizer("a"), None).chats(
        [chat(ASKING, "a", images=(picture(0),))], True
    )
    loss, _ = model.next_token(batch)
    loss.sum().backward()
    assert model.model.vlm_uni_query_projector[1].weight.grad.abs().sum() > 0


def test_configurations_that_do_not_fit_are_refused() -> None:
    with pytest.raises(RecipeError, match="multiple of 32 and of"):
        like(high={"image_size": 80})
    with pytest.raises(RecipeError, match="overview"):
        like(overview=True)
    with pytest.raises(X2IError, match="gpt2"):
        MiniGemini(like(llm={"model_type": "gpt2", "numbers": {}}))


# drawing


def test_prompts_are_found_in_answers() -> None:
    assert split_prompt("Here: <h> a red boat </h> as you wished") == "a red boat"
    assert split_prompt("<h>one</h> or <h>two\nlines</h>") == "two\nlines"
    assert split_prompt("<h>never closed") is None
    assert split_prompt("none") is None
    assert split_prompt("<h>  </h>") is None
    assert split_prompt("<h> left open <h>a boat</h>") == "a boat"
    assert asked("Draw a boat") == "Draw a boat <GEN>"
    assert asked(asked("Draw a boat")) == "Draw a boat <GEN>"


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SDXL's pipeline, tiny and random."""
    import diffusers
    import transformers

    folder = tmp_path_factory.mktemp("sdxl")
    torch.manual_seed(0)
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    pieces = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({p: i for i, p in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
    text = transformers.CLIPTextConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=len(pieces),
        max_position_embeddings=77, bos_token_id=len(pieces) - 2, eos_token_id=len(pieces) - 1, projection_dim=16,
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, norm_num_groups=8, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32), cross_attention_dim=32, use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 16,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16, 16, 16), norm_num_groups=8, latent_channels=4, sample_size=64, force_upcast=False,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    diffusers.StableDiffusionXLPipeline(
        vae=vae, text_encoder=transformers.CLIPTextModel(text), tokenizer=tokenizer, unet=unet,
        text_encoder_2=transformers.CLIPTextModelWithProjection(text), tokenizer_2=tokenizer,
        scheduler=diffusers.EulerDiscreteScheduler(), add_watermarker=False,
    ).save_pretrained(folder / "sdxl")  # fmt: skip
    return folder / "sdxl"


def test_sdxl_draws_the_prompt_of_an_answer(sdxl: Path) -> None:
    import diffusers

    painter = Painter(str(sdxl))
    few: dict[str, Any] = {"steps": 2, "height": 64, "width": 48, "seed": 7}
    found = painter("Sure: <h>a red boat</h>", **few)
    assert found.shape == (64, 48, 3)
    assert found.dtype == np.uint8
    assert np.array_equal(found, draw("<h>a red boat</h>", str(sdxl), **few))
    assert not np.array_equal(found, painter("<h>a blue dog</h>", **few))
    assert not np.array_equal(found, painter("<h>a red boat</h>", negative="", **few))

    plain = diffusers.StableDiffusionXLPipeline.from_pretrained(sdxl)
    plain.set_progress_bar_config(disable=True)
    theirs = plain(
        "a red boat", negative_prompt=NEGATIVE, num_inference_steps=2, height=64, width=48,
        generator=torch.Generator().manual_seed(7),
    ).images[0]  # fmt: skip
    assert np.abs(found.astype(int) - np.asarray(theirs)).max() <= 1


def test_sdxl_must_be_whole(sdxl: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "sdxl"
    shutil.copytree(sdxl, broken)
    file = broken / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    del state["conv_in.weight"]
    save_file(state, file, {"format": "pt"})
    with pytest.raises(X2IError, match="unet lacks conv_in.weight"):
        Painter(str(broken))


def test_what_cannot_be_drawn_is_refused(sdxl: Path, tmp_path: Path) -> None:
    with pytest.raises(X2IError, match="no prompt between <h> and </h>"):
        draw("I cannot.", "no/such-model")
    with pytest.raises(X2IError, match="multiple of 8"):
        Painter(str(sdxl))("<h>a</h>", height=60)
    with pytest.raises(X2IError, match="cannot be read"):
        Painter(str(tmp_path))
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(X2IError, match="holds a StableDiffusionPipeline"):
        Painter(str(tmp_path))
    with pytest.raises(X2IError, match="no such file or folder"):
        Painter("./nowhere")
