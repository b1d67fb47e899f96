"""Ovis2 against its published code, which no library has, and against transformers' Aimv2 and Ovis2.

The published code (AIDC-AI/Ovis at 58b0ad6) was run on a small network of the same shape with weights by name, in
float32 on a CPU. transformers' Ovis2 takes the encoder's features after its last norm, the published code before it:
to compare the rest, that norm is taken out of transformers' class.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from x2i.model import recorded, verify
from x2i.model.filling import draw, fill
from x2i.model.layers.aimv2 import AIMv2, merge_order, patchify
from x2i.model.layers.chat import IGNORE
from x2i.model.layers.config import AIMv2Config, VisualTokenizerConfig
from x2i.model.layers.visual_tokenizer import tokenize
from x2i.model.ovis2 import names as renaming
from x2i.model.ovis2.config import Ovis2Config, Qwen2Numbers
from x2i.model.ovis2.model import Ovis2, Ovis2Batch
from x2i.model.ovis2.partition import TILE, layout
from x2i.model.ovis2.processor import collate, expanded

PUBLISHED = ("ovis2-1b", "ovis2-2b", "ovis2-4b", "ovis2-8b", "ovis2-16b", "ovis2-34b")
SOURCE = "AIDC-AI/Ovis@58b0ad6"
SMALL = Ovis2Config(
    llm=Qwen2Numbers(
        hidden_size=32, layers=2, heads=4, kv_heads=2, intermediate_size=48, vocab_size=300, max_positions=512
    ),
    tokenizer=VisualTokenizerConfig(
        encoder=AIMv2Config(
            hidden_size=32, layers=2, heads=2, intermediate_size=48, patch_size=4, image_size=16, rope=False
        ),
        vocab_size=64,
        indicators=5,
    ),
    max_length=200,
)
#: Published: of the language model (Qwen2.5), of the encoder (apple/aimv2), of encoder and head, of all.
COUNTS: dict[str, tuple[int, int, int | None, int | None]] = {
    "ovis2-1b": (494_032_768, 309_984_256, 578_530_294, 1_131_283_318),
    "ovis2-2b": (1_543_714_304, 309_984_256, 578_530_294, None),
    "ovis2-4b": (3_085_938_688, 682_031_616, None, 4_304_941_558),
    "ovis2-8b": (7_615_616_512, 682_031_616, None, None),
    "ovis2-16b": (14_770_033_664, 682_031_616, None, None),
    "ovis2-34b": (32_763_876_352, 1_236_531_200, None, None),
}
_ALL_SOURCES = {"ovis2-1b": SOURCE, "ovis2-4b": "size in the index of its shards: 9,232,212,972 bytes, bfloat16"}


def parameters(model: str) -> list[verify.Parameters]:
    """All, language model, encoder, encoder with head, table."""
    llm, encoder, tokenizer, total = COUNTS[model]
    counted = partial(verify.count, model)
    rows = [
        ("all", (), total, _ALL_SOURCES.get(model, "")),
        ("language model", ("llm.",), llm, "Qwen2.5"),
        ("visual encoder", ("visual_tokenizer.backbone.",), encoder, "AIMv2"),
        ("visual encoder with its head", ("visual_tokenizer.",), tokenizer, SOURCE),
        ("visual embedding table", ("vte.",), None, ""),
    ]
    return [
        verify.Parameters(model, part, counted(*prefixes), public, "" if public is None else source)
        for part, prefixes, public, source in rows
    ]


def names(model: str) -> list[verify.Names]:
    """The state of the published code in the published configuration, and of transformers' class after the map."""
    state = verify.on_meta(model).state_dict()
    digested = recorded.content("ovis2")["names"][model]
    rows = [verify.matched_digest(model, "all", verify.shapes(state), digested, SOURCE)]
    config = verify.on_meta(model).config
    with torch.device("meta"):
        theirs = verify.shapes(transformers_class(config).state_dict())
    source = f"{verify.version('transformers')} Ovis2ForConditionalGeneration, after the map"
    return [*rows, verify.matched(model, "all", verify.shapes(renaming.to_transformers(state)), theirs, source)]


def outputs() -> list[verify.Comparison]:
    """Visual tokens, embeddings, logits and loss of the published code; encoder, tokenizer, logits of transformers."""
    made: dict[str, Callable[[], Tensor]] = {
        "visual tokens of five tiles": visual_tokens,
        "embeddings of two rows": lambda: _answer_part("embeddings"),
        "logits of two rows": lambda: _answer_part("logits"),
        "loss of two rows": lambda: filled().next_token(two_rows())[0],
    }

    def against_recorded(what: str) -> tuple[Tensor, Any]:
        return made[what](), recorded.content("ovis2")["outputs"][what]

    library = verify.version("transformers")
    without = "its encoder's last norm taken out"
    with_norm = "of normed features: that norm put into ours"
    return [
        *(verify.Comparison(what, SOURCE, partial(against_recorded, what)) for what in made),
        verify.Comparison("encoder with a fixed table, after its last norm", f"{library} Aimv2VisionModel", encoded),
        verify.Comparison("visual tokens", f"{library} Ovis2VisionModel", partial(tokenized, False), without),
        verify.Comparison(
            "visual tokens, norm and all", f"{library} Ovis2VisionModel", partial(tokenized, True), with_norm
        ),
        verify.Comparison("logits", f"{library} Ovis2ForConditionalGeneration", partial(logits, False), without),
    ]


def filled(config: Ovis2Config = SMALL) -> Ovis2:
    """A small model, filled by name."""
    model = Ovis2(config).eval()
    fill(model, 0.3)
    return model


def pixels() -> Tensor:
    """Five tiles."""
    return draw(7, 5, 3, 16, 16)


def two_rows(config: Ovis2Config = SMALL, learn: bool = True) -> Ovis2Batch:
    """A row with two images (one in two tiles), and a shorter one with one image."""
    ids = [
        [185, 108, 82, 104, *layout((1, 2)), 290, 122, 170, *layout((1, 1)), 4, 257, 130, 226, 81, 192],
        [109, 97, *layout((1, 1)), 51, 211, 102, 38, 210],
    ]
    tiles = [list(pixels()[:4]), list(pixels()[4:])]
    rows = [expanded(i, [IGNORE] * (len(i) - 5) + i[-5:], t, learn, config) for i, t in zip(ids, tiles, strict=True)]
    return collate(rows, learn, config)


def visual_tokens() -> Tensor:
    """Weights of the visual words, [20, 64]."""
    weights_MV: Tensor = filled().visual_tokenizer(*patchify(list(pixels()), 4, 2))
    return weights_MV


def _answer_part(which: str) -> Tensor:
    model, batch = filled(), two_rows()
    if which == "embeddings":
        return model.embed(batch)[batch.valid_BL]
    found: Tensor = model.llm.lm_head(model.hidden(batch))[batch.valid_BL]
    return found


def transformers_class(config: Ovis2Config, llm: Any = None) -> Any:
    """transformers' Ovis2ForConditionalGeneration in our numbers; ids from 250 (tile) to 255 are the visual places."""
    from transformers import Ovis2Config as TheirConfig
    from transformers import Ovis2ForConditionalGeneration

    text = llm or Ovis2(config).llm.config
    return Ovis2ForConditionalGeneration(
        TheirConfig(
            vision_config=vision_config(config.tokenizer),
            text_config=text,
            image_token_id=250,
            visual_indicator_token_ids=[251, 252, 253, 254, 255],
            vocab_size=config.llm.vocab_size,
            hidden_size=config.llm.hidden_size,
            tie_word_embeddings=config.llm.tied,
        )
    ).eval()


def vision_config(config: VisualTokenizerConfig) -> Any:
    """The numbers of a visual tokenizer as transformers writes them."""
    from transformers import Ovis2VisionConfig

    return Ovis2VisionConfig(
        hidden_size=config.encoder.hidden_size,
        intermediate_size=config.encoder.intermediate_size,
        num_hidden_layers=config.encoder.layers,
        num_attention_heads=config.encoder.heads,
        image_size=config.encoder.image_size,
        patch_size=config.encoder.patch_size,
        rms_norm_eps=config.encoder.norm_eps,
        vocab_size=config.vocab_size,
        num_visual_indicator_tokens=config.indicators,
        hidden_stride=config.encoder.hidden_stride,
        tokenize_function=config.tokenize,
    )


def of_transformers(model: Ovis2) -> Any:
    """transformers' class with a model's weights."""
    theirs = transformers_class(model.config, model.llm.config)
    theirs.load_state_dict(renaming.to_transformers(model.state_dict()))
    return theirs


def logits(as_it_is: bool) -> tuple[Tensor, Tensor]:
    """Ours and transformers' of two rows, [places, words].

    Args:
        as_it_is: with the encoder's last norm, which the published code (and ours) leaves out.
    """
    model, batch = filled(), two_rows()
    theirs = of_transformers(model)
    if not as_it_is:
        theirs.model.vision_tower.transformer.rms_norm = nn.Identity()
    ids_BL = torch.where(batch.ids_BL == TILE, 250, torch.where(batch.ids_BL < TILE, -50 - batch.ids_BL, batch.ids_BL))
    public = theirs(input_ids=ids_BL, pixel_values=pixels(), attention_mask=batch.valid_BL).logits
    return _answer_part("logits"), public[batch.valid_BL]


def encoded() -> tuple[Tensor, Tensor]:
    """Features of ours and of transformers' Aimv2VisionModel, both after the last norm, [40, 32]."""
    from transformers import Aimv2VisionConfig, Aimv2VisionModel

    config = SMALL.tokenizer.encoder
    ours = AIMv2(config).eval()
    fill(ours, 0.3)
    theirs = Aimv2VisionModel(
        Aimv2VisionConfig(
            hidden_size=config.hidden_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=config.intermediate_size,
            patch_size=config.patch_size,
            image_size=config.image_size,
            rms_norm_eps=config.norm_eps,
            use_head=False,
        )
    ).eval()
    prefix, there = "visual_tokenizer.backbone.", "model.vision_tower.transformer."
    state = renaming.to_transformers({prefix + name: tensor for name, tensor in ours.state_dict().items()})
    patches = ("embeddings.patch_embedding.", "embeddings.patch_embed.")  # Aimv2's name for Ovis2's
    theirs.load_state_dict({n.removeprefix(there).replace(*patches): t for n, t in state.items()})
    side = config.image_size // config.patch_size
    public = theirs(pixels()).last_hidden_state.view(len(pixels()), side, side, -1)
    features_ND = ours(*patchify(list(pixels()), config.patch_size, config.hidden_stride))
    return ours.trunk.post_trunk_norm(features_ND), torch.cat([merge_order(grid, 2) for grid in public])


def tokenized(normed: bool) -> tuple[Tensor, Tensor]:
    """Weights of the words, without the indicators, of ours and of transformers' Ovis2VisionModel.

    Args:
        normed: with the encoder's last norm on both sides, which ours leaves out; else without on both.
    """
    model = filled()
    ours, theirs = model.visual_tokenizer, of_transformers(model).model.vision_tower
    patches_NF, grids = patchify(list(pixels()), 4, 2)
    if normed:
        features_ND = ours.backbone.trunk.post_trunk_norm(ours.backbone(patches_NF, grids))
        found = tokenize(ours.head(features_ND.reshape(len(features_ND) // 4, -1)), "softmax")
    else:
        theirs.transformer.rms_norm = nn.Identity()
        found = ours(patches_NF, grids)[:, : -ours.config.indicators]
    return found, theirs(pixels()).pooler_output.flatten(0, 1)
