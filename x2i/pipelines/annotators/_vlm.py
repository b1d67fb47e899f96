"""A vision-language model in this process, by transformers: any that `AutoModelForImageTextToText` knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from x2i.base.errors import X2IError
from x2i.base.packages import need
from x2i.pipelines.annotators._asking import Answer, Question, presentable
from x2i.pipelines.annotators._torch import ModelConfig, Runtime, component, pretrained

if TYPE_CHECKING:
    import torch


class LocalModel:
    """Model and processor from a folder in the published format.

    The weights are held in the precision that they run in (bf16 on a GPU: fp16 overflows in Qwen2-VL).

    Args:
        folder: as `save_pretrained` leaves it: config.json, safetensors, tokenizer, processor, chat template.
        config: where and in which precision it runs.
        min_pixels: smaller pictures are enlarged to this, by models whose input has no fixed size.
        max_pixels: larger pictures are shrunk to this by those; tiling models get as many tiles as fit into it.
        temperature: 0 is greedy.

    Raises:
        X2IError: the folder holds no such model, not all of it, or its processor has no chat template.
    """

    def __init__(
        self, folder: str, config: ModelConfig, min_pixels: int, max_pixels: int, temperature: float = 0.0
    ) -> None:
        library = need("transformers", "transformers", "caption")
        self._runtime = Runtime(config, auto="bf16")
        self._temperature = temperature
        self._processor = component(library.AutoProcessor, folder, "caption")
        if not getattr(self._processor, "chat_template", None):
            raise X2IError(f"annotator caption: {folder}: the processor has no chat template: the model cannot answer")
        kind = library.AutoModelForImageTextToText
        self._model = self._runtime.place(pretrained(kind, folder, "caption", dtype=self._runtime.dtype))
        self._tokenizer = self._processor.tokenizer
        self._tokenizer.padding_side = "left"  # generation goes on at the right
        self._images = _budget(self._processor.image_processor, min_pixels, max_pixels)
        self._model.generation_config = self._greedy()

    def _greedy(self) -> Any:
        """The model's own generation settings (its end tokens, its repetition penalty), without sampling."""
        import copy

        settings = copy.deepcopy(self._model.generation_config)
        settings.update(do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None, max_length=None)
        if settings.eos_token_id is None:
            settings.eos_token_id = self._tokenizer.eos_token_id
        ends = settings.eos_token_id
        self._ends = set(ends if isinstance(ends, list) else [ends])
        pad = self._tokenizer.pad_token_id
        settings.pad_token_id = pad if pad is not None else min(self._ends)
        return settings

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Answer all questions in one batch of generation; they must share `most_tokens`."""
        import torch

        if not questions:
            return []
        inputs = self._inputs(questions).to(self._runtime.device, self._runtime.dtype)
        most = questions[0].most_tokens
        extra = {}
        if self._temperature:
            from transformers import LogitsProcessorList

            seeds = [q.seed for q in questions]
            extra = {"logits_processor": LogitsProcessorList([_gumbel(seeds, self._temperature)])}
        with torch.inference_mode():
            out_BL = self._model.generate(**inputs, max_new_tokens=most, **extra)
        asked = inputs["input_ids"].shape[1]
        used = inputs["attention_mask"].sum(dim=1).tolist()
        return [self._answer(row[asked:].tolist(), tokens, most) for row, tokens in zip(out_BL, used, strict=True)]

    def _inputs(self, questions: Sequence[Question]) -> Any:
        """What the model takes, on the CPU."""
        chats = [
            self._processor.apply_chat_template(_chat(q), tokenize=False, add_generation_prompt=True) for q in questions
        ]
        return self._processor(
            text=chats,
            images=[[np.require(presentable(q.pixels), requirements="W")] for q in questions],
            padding=True,
            return_tensors="pt",
            images_kwargs=self._images,
        )

    def _answer(self, tokens: list[int], asked: int, most: int) -> Answer:
        ended = next((i for i, t in enumerate(tokens) if t in self._ends), None)
        kept = tokens if ended is None else tokens[: ended + 1]
        text = self._tokenizer.decode(kept, skip_special_tokens=True).strip()
        if not text:
            return Answer(None, "failed", "empty", asked, len(kept))
        cut = ended is None and len(kept) >= most
        return Answer(text, "truncated" if cut else "ok", None, asked, len(kept))


def _chat(question: Question) -> list[dict[str, Any]]:
    system = [{"role": "system", "content": [{"type": "text", "text": question.system}]}] if question.system else []
    return [
        *system,
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.prompt}]},
    ]


def _budget(image_processor: Any, min_pixels: int, max_pixels: int) -> dict[str, Any]:
    """How an image processor is told how many pixels it may use: by area, by tiles, or (fixed size) not at all."""
    size = dict(image_processor.size or {})
    longest = size.get("longest_edge")
    if longest and hasattr(image_processor, "merge_size"):  # Qwen's: these "edges" are areas
        return {"size": {"shortest_edge": min(min_pixels, max_pixels), "longest_edge": max_pixels}}
    if hasattr(image_processor, "max_patches") and size.get("height"):
        tiles = max_pixels // (size["height"] * size["width"])
        return {"max_patches": int(np.clip(tiles, 1, image_processor.max_patches))}
    return {}


def _gumbel(seeds: Sequence[int], temperature: float) -> Any:
    """Sampling at a temperature by the Gumbel-max trick: greedy choice over scores with each row's own noise.

    `generate` draws all rows from one stream, so that a caption would depend on what else is in the batch.
    """
    import torch
    from transformers import LogitsProcessor

    class Gumbel(LogitsProcessor):
        def __init__(self) -> None:
            self._generators: list[Any] = []

        def __call__(self, input_ids: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
            if not self._generators:
                self._generators = [torch.Generator(scores_BV.device).manual_seed(s) for s in seeds]
            noise_BV = torch.stack(
                [
                    torch.empty(scores_BV.shape[1], device=scores_BV.device).exponential_(generator=g)
                    for g in self._generators
                ]
            )
            return scores_BV.float() / temperature - noise_BV.log()

    return Gumbel()
