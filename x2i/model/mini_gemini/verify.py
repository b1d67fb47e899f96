"""Mini-Gemini against its published code, timm's and OpenCLIP's ConvNeXt, transformers' CLIP and language models.

The published code is dvlab-research/MGM at 769820c: `encode_images` and `unified_resampler` of mgm/model/mgm_arch.py,
with the backbone of multimodal_encoder/openclip_encoder.py over timm's ConvNeXt and transformers' CLIP. It was run on
small networks of the same shape with weights by name, in float32 on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from x2i.base.errors import X2IError
from x2i.model import recorded, verify
from x2i.model.filling import draw, fill
from x2i.model.mini_gemini.batch import IGNORE, ChatBatch
from x2i.model.mini_gemini.config import PRESETS, LanguageModelConfig, LowConfig, MiniGeminiConfig
from x2i.model.mini_gemini.convnext import ConvNeXt
from x2i.model.mini_gemini.model import ClipTower, MiniGemini
from x2i.model.registry import changed

PUBLISHED = ("mgm-2b", "mgm-7b", "mgm-8b", "mgm-13b", "mgm-7b-hd", "mgm-8b-hd", "mgm-13b-hd")
SOURCE = "dvlab-research/MGM@769820c"
#: The public checkpoint of OpenCLIP that the high-resolution encoder begins with.
OPENCLIP = "convnext_large_d_320"
TINY = PRESETS["mini-gemini-tiny"]
#: Numbers of a small Llama.
FEW = {"intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
#: Published: of the language model, by size.
LLMS = {
    "2b": (2_506_172_416, "Gemma 2B"),
    "7b": (6_738_415_616, "Vicuna 7B"),
    "8b": (8_030_261_248, "Llama 3 8B"),
    "13b": (13_015_864_320, "Vicuna 13B"),
}
_LOW, _HIGH = "model.vision_tower.vision_tower.vision_model.", "model.vision_tower_aux.vision_"
_OWN = ("model.mm_projector.", "model.vlm_uni_")


def parameters(model: str) -> list[verify.Parameters]:
    """All, and the parts of which somebody publishes the count."""
    llm, name = LLMS[model.split("-")[1]]
    parts = verify.on_meta(model).parts
    counted = {part: verify.count(model, *prefixes) for part, prefixes in parts.items()}
    return [
        verify.Parameters(model, "all", verify.count(model), None),
        verify.Parameters(model, "language model", counted["llm"], llm, name),
        verify.Parameters(model, "low-resolution encoder", counted["low_encoder"], 303_507_456, "CLIP ViT-L/14 at 336"),
        verify.Parameters(model, "high-resolution encoder", counted["high_encoder"], 196_227_264, "ConvNeXt-L"),
        verify.Parameters(model, "mining and projector", counted["mining"] + counted["projector"], *_own_count(model)),
    ]


def _own_count(model: str) -> tuple[int, str]:
    return int(recorded.content("mini_gemini")["counts"][_size(model)]), SOURCE


def _size(model: str) -> str:
    return "-".join(model.split("-")[:2])  # HD has the same tensors


def names(model: str) -> list[verify.Names]:
    """MGM's own modules by digest; the encoders and the language model by the libraries' classes."""
    network = verify.on_meta(model)
    state = verify.shapes(network.state_dict())
    own = {name: shape for name, shape in state.items() if name.startswith(_OWN)}
    llm = {name: shape for name, shape in state.items() if name.startswith(network.parts["llm"])}
    config: MiniGeminiConfig = network.config
    digested = recorded.content("mini_gemini")["names"][_size(model)]
    library = verify.version("transformers")
    return [
        verify.matched_digest(model, "mining and projector", own, digested, SOURCE),
        _live(model, "language model", llm, lambda: language_model_names(config), f"{library} {config.llm.model_type}"),
        _live(model, "low encoder", verify.below(state, _LOW), clip_names, f"{library} CLIPVisionModel"),
        _live(
            model,
            "high encoder",
            verify.below(state, _HIGH),
            openclip_names,
            f"{verify.version('open_clip_torch')} {OPENCLIP}",
        ),
    ]


def _live(
    model: str,
    part: str,
    ours: Mapping[str, tuple[int, ...]],
    theirs: Callable[[], Mapping[str, tuple[int, ...]]],
    source: str,
) -> verify.Names:
    try:
        return verify.matched(model, part, ours, theirs(), source)
    except ModuleNotFoundError as error:
        return verify.Names(model, part, 0, len(ours), 0, source, verify.absent(error))


def language_model_names(config: MiniGeminiConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of transformers' class of the language model."""
    with torch.device("meta"):
        return verify.shapes(of_transformers(config.llm).state_dict())


@cache
def clip_names() -> dict[str, tuple[int, ...]]:
    """Names and shapes of transformers' CLIP image encoder, ViT-L/14 at 336 pixels, without the outer prefix."""
    with torch.device("meta"):
        state = verify.shapes(clip_of_transformers(LowConfig()).state_dict())
    return {name.removeprefix("vision_model."): shape for name, shape in state.items()}


@cache
def openclip_names() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the stem and the stages of OpenCLIP's ConvNeXt. Raises ModuleNotFoundError."""
    import open_clip

    with torch.device("meta"):
        state = open_clip.model.CLIP(**open_clip.factory.get_model_config(OPENCLIP)).visual.state_dict()
    wanted = ("trunk.stem.", "trunk.stages.")
    return verify.shapes({n.removeprefix("trunk."): t for n, t in state.items() if n.startswith(wanted)})


def outputs() -> list[verify.Comparison]:
    """Image tokens, mining and losses of the published code; encoders and language model of the libraries."""
    made: dict[str, Callable[[], Tensor]] = {
        "image tokens": partial(image_tokens, TINY),
        "image tokens, four crops and the whole": partial(image_tokens, hd()),
        "mining": mined,
        "loss of two rows, Llama": partial(losses, {"model_type": "llama", "numbers": FEW}),
        "loss of two rows, Gemma": partial(losses, {}),
    }

    def against_recorded(what: str) -> tuple[Tensor, Any]:
        return made[what](), recorded.content("mini_gemini")["outputs"][what]

    library = verify.version("transformers")
    return [
        *(verify.Comparison(what, SOURCE, partial(against_recorded, what)) for what in made),
        verify.Comparison("high-resolution encoder, four stages", f"{verify.version('timm')} ConvNeXt", convnext),
        verify.Comparison("low-resolution encoder, last layer but one", f"{library} CLIPVisionModel", clip),
        verify.Comparison("language model, logits", f"{library} GemmaForCausalLM", language_model),
    ]


def hd() -> MiniGeminiConfig:
    """The tiny model with crops, as the published HD models have them."""
    config = changed(TINY, {"grid": 2, "overview": True, "high": {"image_size": 128}})
    assert isinstance(config, MiniGeminiConfig)
    return config


def filled(config: MiniGeminiConfig = TINY, std: float = 0.2) -> MiniGemini:
    """A small model, filled by name."""
    model = MiniGemini(config).eval()
    fill(model, std)
    return model


def image_pixels(config: MiniGeminiConfig) -> tuple[Tensor, Tensor]:
    """Two images: low-resolution views and high-resolution ones."""
    low, high = config.low.image_size, config.high.image_size
    return draw(1, 2, config.views, 3, low, low), draw(2, 2, 3, high, high)


def image_tokens(config: MiniGeminiConfig) -> Tensor:
    """Of two images, [2, tokens, width of the language model]."""
    return filled(config).encode(*image_pixels(config))


def mined() -> Tensor:
    """Low-resolution tokens with what they found, [2, 16, 32]."""
    return filled().mine(draw(3, 2, 16, 32), draw(4, 2, 112, 16, 16))


def losses(llm: Mapping[str, Any]) -> Tensor:
    """Next-token losses of two rows of 9 and 14 text tokens and an image, [2].

    MGM's sequence, then the trunk and the head of transformers; for Gemma with all input embeddings scaled, as
    transformers did in MGM's time.
    """
    made = TINY.model_dump()
    model = filled(MiniGeminiConfig.model_validate(made | {"llm": made["llm"] | {"vocab_size": 100} | llm}))
    return model.next_token(two_rows())[0]


def two_rows() -> ChatBatch:
    """Padded on the left; the image after the second and after the fifth word, the words from the third on learned."""
    rng, images, length = np.random.Generator(np.random.PCG64(8)), TINY.image_tokens, 30
    ids_BL, labels_BL = torch.zeros(2, length, dtype=torch.long), torch.full((2, length), IGNORE)
    valid_BL, image_BL = torch.zeros(2, length, dtype=torch.bool), torch.zeros(2, length, dtype=torch.bool)
    for row, (count, place) in enumerate(((9, 2), (14, 5))):
        words, start = torch.from_numpy(rng.integers(3, 100, count)), length - count - images
        behind = start + place + images
        ids_BL[row, start : start + place], ids_BL[row, behind:] = words[:place], words[place:]
        image_BL[row, start + place : behind], valid_BL[row, start:] = True, True
        labels_BL[row, behind + 2 :] = words[place + 2 :]
    return ChatBatch(ids_BL, valid_BL, image_BL, labels_BL, *image_pixels(TINY))


def convnext() -> tuple[Tensor, Tensor]:
    """Features of all stages on the grid of the first, ours and timm's. Raises ModuleNotFoundError."""
    from timm.models.convnext import ConvNeXt as TimmConvNeXt

    high = TINY.high
    ours = ConvNeXt(high.widths, high.depths).eval()
    fill(ours, 0.2)
    theirs: Any = TimmConvNeXt(depths=high.depths, dims=high.widths, num_classes=0).eval()
    state = {name.removeprefix("vision_"): tensor for name, tensor in ours.state_dict().items()}
    lacks = theirs.load_state_dict(state, strict=False)
    if lacks.unexpected_keys or not all(name.startswith("head.") for name in lacks.missing_keys):
        raise X2IError(f"timm's ConvNeXt has other names: {lacks}")
    pixels_BCHW = draw(5, 2, 3, 64, 96)
    x_BCHW, found = theirs.stem(pixels_BCHW), []
    for stage in theirs.stages:
        x_BCHW = stage(x_BCHW)
        found.append(F.interpolate(x_BCHW, size=(16, 24), mode="bilinear", align_corners=False))
    return ours(pixels_BCHW), torch.cat(found, dim=1)


def clip_of_transformers(low: LowConfig) -> Any:
    """transformers' CLIP image encoder in our numbers."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=low.hidden_size,
            intermediate_size=low.intermediate_size,
            projection_dim=low.projection_dim,
            num_hidden_layers=low.layers,
            num_attention_heads=low.heads,
            image_size=low.image_size,
            patch_size=low.patch_size,
        )
    ).eval()


def clip() -> tuple[Tensor, Tensor]:
    """Patch tokens of ours and of the hidden states that transformers' CLIP returns."""
    ours = ClipTower(TINY.low).eval()
    fill(ours, 0.2)
    theirs = clip_of_transformers(TINY.low)
    inner = getattr(theirs, "vision_model", theirs)
    inner.load_state_dict(ours.vision_tower["vision_model"].state_dict())
    pixels_BCHW = draw(1, 2, 3, TINY.low.image_size, TINY.low.image_size)
    states = theirs(pixels_BCHW, output_hidden_states=True).hidden_states
    return ours(pixels_BCHW), states[TINY.low.select_layer][:, 1:]


def of_transformers(llm: LanguageModelConfig) -> Any:
    """transformers' causal language model in our numbers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    numbers = {"vocab_size": llm.vocab_size, "hidden_size": llm.hidden_size} | llm.numbers
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(llm.model_type, **numbers)).eval()


def language_model() -> tuple[Tensor, Tensor]:
    """Logits of ours and of transformers' Gemma, without images."""
    ours, theirs = filled(), of_transformers(TINY.llm)
    state = {n: t for n, t in ours.state_dict().items() if n.startswith(tuple(ours.parts["llm"]))}
    theirs.load_state_dict(state)
    ids_BL = torch.arange(7, 19)[None]
    hidden_BLD = ours.model(inputs_embeds=ours.model.embed_tokens(ids_BL), use_cache=False).last_hidden_state
    return ours.lm_head(hidden_BLD), theirs(ids_BL, use_cache=False).logits
