"""Ovis-U1 against its published code, which no library has, and against transformers' Qwen3.

The published code is that of AIDC-AI/Ovis-U1-3B on the model hub (modeling_ovis_u1.py, modeling_yak.py,
modeling_aimv2.py), as kaifanyu/ImageWAM holds it at 55c181c. It was run on small networks of the same shape with
weights by name, in float32 on a CPU, with attention within each image in place of flash_attn; every row by itself,
whereas ours runs rows of unequal length in one batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from x2i.model import flow, recorded, verify
from x2i.model.filling import draw, draw_ids, fill
from x2i.model.layers.aimv2 import AIMv2, patchify
from x2i.model.layers.chat import IGNORE, IMAGE, Formatted
from x2i.model.layers.config import AIMv2Config, VisualTokenizerConfig
from x2i.model.ovis_u1.config import OvisU1Config, Qwen3Numbers
from x2i.model.ovis_u1.decoder import Decoder, image_ids, shift
from x2i.model.ovis_u1.decoder_config import DecoderConfig
from x2i.model.ovis_u1.model import OvisU1
from x2i.model.ovis_u1.prompt import OvisInputs, Pictures

PUBLISHED = ("ovis-u1-3b",)
SOURCE = "AIDC-AI/Ovis-U1-3B, as in kaifanyu/ImageWAM@55c181c"
ENCODER = AIMv2Config(hidden_size=32, layers=2, heads=2, intermediate_size=48, patch_size=4, image_size=32)
DECODER = DecoderConfig(
    vec_in_dim=48,
    context_in_dim=40,
    hidden_size=48,
    heads=2,
    depth=2,
    depth_single=2,
    axes_dim=(8, 8, 8),
    refiner_heads=4,
)
WHOLE = OvisU1Config(
    llm=Qwen3Numbers(
        hidden_size=32,
        layers=3,
        heads=4,
        kv_heads=2,
        head_dim=16,
        intermediate_size=48,
        vocab_size=300,
        max_positions=512,
    ),
    tokenizer=VisualTokenizerConfig(encoder=ENCODER, vocab_size=64),
    decoder=DECODER.model_copy(update={"context_in_dim": 64}),
    min_pixels=256,
    max_pixels=4096,
    max_tokens=200,
)
#: Deviation of the weights of `WHOLE`: so that three guided steps neither die out nor run away.
STD = 0.08
#: Parts of the paper's table -> prefixes, the count of the published code in the published configuration, the table's.
_PARTS = {
    "language model": (("llm.",), 1_720_574_976, "1720 M"),
    "visual encoder with its head": (("visual_tokenizer.",), 578_534_392, "578 M"),
    "adapter (visual embedding table)": (("vte.",), 134_217_728, "135 M"),
    "decoder": (("visual_generator.",), 1_046_172_688 + 81_054_720, "1046 M and 81 M"),
    "refiner, of it": (("visual_generator.backbone.txt_in.",), 81_054_720, "81 M"),
}
_PREFIXES = ("llm.", "visual_tokenizer.", "vte.", "visual_generator.backbone.")


def parameters(model: str) -> list[verify.Parameters]:
    """The parts of the paper's table, and all without the autoencoder."""
    rows = [
        verify.Parameters(model, part, verify.count(model, *prefixes), exact, f"published code; the paper: {table}")
        for part, (prefixes, exact, table) in _PARTS.items()
    ]
    exact = sum(exact for part, (_, exact, _) in _PARTS.items() if not part.startswith("refiner"))
    return [verify.Parameters(model, "all", verify.count(model), exact, "published code, without the VAE"), *rows]


def names(model: str) -> list[verify.Names]:
    """By the parts that the names begin with: the state of the published code in the published configuration."""
    digests = recorded.content("ovis_u1")["names"]
    state = verify.shapes(verify.on_meta(model).state_dict())
    parts = {prefix: verify.below(state, prefix) for prefix in _PREFIXES}
    return [verify.matched_digest(model, prefix, parts[prefix], digests[prefix], SOURCE) for prefix in _PREFIXES]


def outputs() -> list[verify.Comparison]:
    """The encoder, the refiner, the decoder; the whole model answering, drawing and editing."""
    made: dict[str, Callable[[], Tensor]] = {
        "encoder at native resolution, two images": features,
        "refiner, text": partial(decoded, "refiner, text"),
        "refiner, summary": partial(decoded, "refiner, summary"),
        "decoder, velocity": partial(decoded, "decoder, velocity"),
        "decoder, velocity with source latents": partial(decoded, "decoder, velocity with source latents"),
        "whole, logits of a chat with two images": logits,
        "whole, loss of its answer": loss,
        "whole, picture from words, 3 steps, 2 branches": partial(drawn, edit=False),
        "whole, picture from an image, 3 steps, 3 branches": partial(drawn, edit=True),
    }

    def against_recorded(what: str) -> tuple[Tensor, Any]:
        return made[what](), recorded.content("ovis_u1")["outputs"][what]

    rows = [verify.Comparison(what, SOURCE, partial(against_recorded, what)) for what in made]
    public = f"{verify.version('transformers')} Qwen3ForCausalLM"
    return [*rows, verify.Comparison("language model, logits", public, language_model)]


def features() -> Tensor:
    """Of the encoder: images of 24 x 40 and 56 x 16 pixels, packed, [116, 32]."""
    model = AIMv2(ENCODER).eval()
    fill(model, 0.3)
    features_ND: Tensor = model(*patchify([draw(1, 3, 24, 40), draw(2, 3, 56, 16)], 4, 2))
    return features_ND


@cache
def decoder() -> Decoder:
    """A small decoder, filled by name."""
    model = Decoder(DECODER).eval()
    fill(model, 0.2)
    return model


def decoder_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Noisy tokens of 3 x 5 and their positions, source tokens of 4 x 2 and theirs, context, published timesteps."""
    ids, source_ids = image_ids(3, 5).expand(2, -1, -1), image_ids(4, 2, 1).expand(2, -1, -1)
    return draw(3, 2, 15, 16), ids, draw(4, 2, 8, 16), source_ids, draw(5, 2, 7, 40), torch.tensor([0.3, 0.9])


def decoded(what: str) -> Tensor:
    """Of the decoder, by the names in `outputs`."""
    x_BNO, ids_BN3, source_BMO, source_ids_BM3, context_BLE, t_B = decoder_inputs()
    text_BLD, vector_BD = decoder().context(context_BLE)
    source = (source_BMO, source_ids_BM3) if "source" in what else ()
    if what.startswith("refiner"):
        return text_BLD if "text" in what else vector_BD
    velocity_BNO: Tensor = decoder()(x_BNO, ids_BN3, text_BLD, vector_BD, t_B, *source)
    return velocity_BNO


@cache
def whole() -> OvisU1:
    """A small model, filled by name."""
    model = OvisU1(WHOLE).eval()
    fill(model, STD)
    return model


def words(seed: int, *lengths: int) -> list[int]:
    """Token ids with an image after every run but the last."""
    runs = [draw_ids(10 * seed + i, length, WHOLE.llm.vocab_size) for i, length in enumerate(lengths)]
    return [token for i, run in enumerate(runs) for token in ([IMAGE] if i else []) + run]


#: Token ids of a chat, and of the branches of a drawing and of an edit, the full one first.
CHAT = words(1, 5, 3, 9)
DRAWING = (words(2, 12), words(3, 6))
EDITING = (words(4, 3, 8), words(5, 2, 4), words(6, 7))
#: How many of the chat's last tokens are learned; sizes of images; latents of a source; guidances of words and image.
LEARNED, SIZES, LATENTS, GUIDANCES = 6, ((24, 40), (16, 32)), (8, 4), (6.0, 1.5)


def images() -> list[Tensor]:
    """Normalised pixels of two images."""
    return [draw(7 + i, 3, *size) for i, size in enumerate(SIZES)]


def batch(rows: Sequence[list[int]], sources: Sequence[Sequence[Tensor]] = ()) -> OvisInputs:
    """Rows of token ids; of images the first so many are shown. The last `LEARNED` tokens are labels."""
    pictures = Pictures(WHOLE, images())
    made = []
    for ids in rows:
        labels = [IGNORE] * (len(ids) - LEARNED) + ids[-LEARNED:]
        made.append(pictures.row(Formatted(tuple(ids), tuple(labels)), range(ids.count(IMAGE))))
    return pictures.collate(made, labels=True, sources=sources)


def logits() -> Tensor:
    """Of all places of a chat, [L, vocabulary]."""
    hidden_BLD = whole().llm.model(inputs_embeds=whole().embed(batch([CHAT])), use_cache=False).last_hidden_state
    return whole().llm.logits(hidden_BLD)[0]


def loss() -> Tensor:
    """Next-token loss of the chat, summed over its last tokens, [1]; in a batch with a shorter row."""
    return whole().next_token(batch([CHAT, DRAWING[1]]))[0][:1]


def drawn(edit: bool) -> Tensor:
    """Latents [1, 4, 6, 10] after three guided steps."""
    guidance, image_guidance = GUIDANCES
    rows: Sequence[list[int]] = DRAWING
    weights = flow.guidance_weights(guidance, image_guidance, has_images=False)
    sources: list[list[Tensor]] = [[], []]
    if edit:
        source = draw(11, 4, *LATENTS)
        rows, weights = EDITING, flow.guidance_weights(guidance, image_guidance, has_images=True)
        sources = [[source], [source], []]
    used = torch.tensor([weight for weight in weights if weight])
    condition = whole().condition(batch(rows, sources))

    def velocity(x_BCHW: Tensor, t_B: Tensor) -> Tensor:
        each = whole().velocity(x_BCHW.expand(len(rows), -1, -1, -1), t_B.expand(len(rows)), condition)
        return (each * used[:, None, None, None]).sum(dim=0, keepdim=True)

    return flow.euler(velocity, draw(10, 1, 4, 6, 10), 3, shift(3 * 5, WHOLE.decoder))


def language_model() -> tuple[Tensor, Tensor]:
    """Logits of ours and of transformers' Qwen3 of the same numbers and weights."""
    from transformers import Qwen3ForCausalLM

    numbers = copy.deepcopy(whole().llm.model.config)
    numbers._attn_implementation = "sdpa"  # not ours
    theirs = Qwen3ForCausalLM(numbers).eval()
    theirs.model.load_state_dict(whole().llm.model.state_dict())
    theirs.tie_weights()
    ids_BL = torch.tensor([DRAWING[0]])
    ours = whole().llm.logits(whole().llm.model(input_ids=ids_BL, use_cache=False).last_hidden_state)
    return ours, theirs(input_ids=ids_BL, use_cache=False).logits
