"""Mini-Gemini is MGM: its figures, counts and names; mining looks where it should; it learns, answers and draws.

What is compared with dvlab-research/MGM, and how, x2i/model/mini_gemini/verify.py says.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from x2i.base.errors import RecipeError, X2IError
from x2i.model.base import Chat, Message
from x2i.model.filling import draw as numbers
from x2i.model.mini_gemini import verify
from x2i.model.mini_gemini.batch import ChatBatch
from x2i.model.mini_gemini.config import PRESETS, RECIPES, STAGES, MiniGeminiConfig
from x2i.model.mini_gemini.model import MiniGemini, windows
from x2i.model.mini_gemini.processor import MiniGeminiProcessor
from x2i.model.mini_gemini.verify import filled
from x2i.model.registry import changed
from x2i.model.verify import Comparison, compared
from x2i.model.weights import load, load_part, prefixed, save

TINY = PRESETS["mini-gemini-tiny"]
ASKING = "<image>\nWhich colour is it?"


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
