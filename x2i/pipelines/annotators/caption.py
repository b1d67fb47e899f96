"""`caption`: what a picture shows, in a sentence and in a paragraph, by a vision-language model.

Default: Qwen2.5-VL-7B-Instruct (Bai et al. 2025, "Qwen2.5-VL technical report", arXiv 2502.13923; model card
https://huggingface.co/Qwen/Qwen2.5-VL-7B-Instruct; Apache-2.0; 16.6 GB, about 20 GB of GPU memory in bf16).
Any model that transformers' `AutoModelForImageTextToText` loads and that has a chat template will do: Qwen2-VL,
Qwen3-VL, InternVL (the -hf repositories), Ovis2 (thisisiron/Ovis2-*-hf), … Or one behind an OpenAI-compatible
server (`backend: openai`), which is how large ones are run on several GPUs.

Captions are greedy unless a `temperature` is given, and then drawn with a seed from the image's id: neither
depends on what else is in a batch, up to rounding of half-precision arithmetic and to what a server does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field, model_validator

from x2i.base.seeds import generator
from x2i.base.weights import Weights
from x2i.pipelines.annotators import _prompts
from x2i.pipelines.annotators._asking import Answer, Question
from x2i.pipelines.annotators._columns import texts
from x2i.pipelines.annotators._prompts import Kind
from x2i.pipelines.annotators._torch import SPEED, ModelConfig, folder
from x2i.pipelines.annotators._weights import weights_of
from x2i.pipelines.annotators.base import Annotator, Decoding, Item

#: Sizes in bytes are about right, for people; of other models, see their cards.
QWEN = Weights("Qwen/Qwen2.5-VL-7B-Instruct", size=16_600_000_000, licence="Apache-2.0")
INTERNVL = Weights("OpenGVLab/InternVL3-8B-hf", size=15_900_000_000, licence="see its model card")

#: Keys that only one backend has.
_LOCAL = frozenset({"weights", "sha256", "precision", "min_pixels"})
_REMOTE = frozenset({"model", "jpeg_quality", "options"})


class CaptionConfig(ModelConfig):
    """Which model, what it is asked, and how much it may look at and say."""

    backend: Literal["transformers", "openai"] = Field(
        "transformers",
        description="transformers: in this process; e.g. openai: an OpenAI-compatible server (vLLM, SGLang)",
    )
    weights: str = Field(
        QWEN.spec,
        description="of the backend transformers: a hub's org/name[@revision], e.g. Qwen/Qwen3-VL-8B-Instruct, or a "
        "folder",
    )
    precision: Literal["auto", "fp32", "fp16", "bf16"] = Field(
        "auto", description="of weights and arithmetic, e.g. fp32; auto: bf16 on a GPU, fp32 on a CPU"
    )
    prompts: str = Field(
        "prompts/caption.yaml", description="the prompts' file, e.g. ./my_prompts.yaml; its content is what counts"
    )
    captions: list[Kind] = Field(["short", "long"], min_length=1, description="which to make, e.g. [long]")
    short_tokens: int = Field(
        96, gt=0, description="most tokens of a short caption, e.g. 96; a longer one is `truncated`"
    )
    long_tokens: int = Field(512, gt=0, description="most tokens of a long caption, e.g. 512")
    min_pixels: int = Field(
        3136, gt=0, description="smaller pictures are enlarged, by models of no fixed size, e.g. 3136"
    )
    max_pixels: int = Field(
        1280 * 28 * 28,
        gt=783,
        description="larger pictures are shrunk, e.g. 602_112; 784 pixels are about one token of Qwen's",
    )
    temperature: float = Field(
        0.0, ge=0, le=2, description="0: greedy; else, e.g. 0.7, sampled with a seed from the image's id"
    )
    seed: int = Field(
        0, description="another, e.g. 1, draws other wordings (and samples, where `temperature` is not 0)"
    )
    server: str | None = Field(None, description="of the backend openai: its address, e.g. http://node7:8000/v1")
    model: str | None = Field(
        None, description="of the backend openai: the model's name there, e.g. Qwen/Qwen2.5-VL-72B-Instruct"
    )
    api_key_env: str | None = Field(
        None, description="the environment variable that holds the key, e.g. OPENAI_API_KEY; null: no key is sent"
    )
    concurrency: int = Field(
        16, gt=0, description="requests at a time, per worker, e.g. 64; `batch_size` bounds it too"
    )
    retries: int = Field(
        5, ge=0, description="tries after the first one, on overload, timeouts and lost connections, e.g. 5"
    )
    timeout: float = Field(120.0, gt=0, description="seconds to wait for an answer, e.g. 300")
    jpeg_quality: int = Field(90, ge=50, le=100, description="of the pictures that are sent to a server, e.g. 90")
    options: dict[str, Any] = Field(
        {}, description="further keys of a request, e.g. {top_p: 0.9}; {max_tokens: null} takes one out"
    )

    @model_validator(mode="after")
    def _complete(self) -> CaptionConfig:
        if self.backend == "openai" and (not self.server or not self.model):
            raise ValueError("backend: openai needs `server` (e.g. http://localhost:8000/v1) and `model`")
        if self.backend == "openai" and not str(self.server).startswith(("http://", "https://")):
            raise ValueError("server must begin with http:// or https://")
        if self.backend == "transformers" and (self.server or self.model):
            raise ValueError("`server` and `model` are for backend: openai; with transformers, the model is `weights`")
        return self


class Caption(Annotator):
    """`short` and `long` captions; null where the model gave none, with the reason.

    A picture whose request fails is `failed` and costs no other; a server that answers nothing stops the
    run (X2IError).
    """

    name = "caption"
    retry = "status = 'failed'"
    Config = CaptionConfig
    columns = pa.schema(
        {
            "short": pa.string(),
            "long": pa.string(),
            "prompt": pa.string(),  # 16 digits: which wordings were drawn
            "input_tokens": pa.int32(),  # of all requests for the row, the picture's included
            "output_tokens": pa.int32(),
            "status": pa.string(),  # ok, truncated (a caption met its limit of tokens), failed (one is missing)
            "reason": pa.string(),  # of failed: `long: refusal`, `short: timeout: …`
        }
    )
    gpus = 1.0
    speed = SPEED | {"server", "api_key_env", "concurrency", "retries", "timeout", "prompts"}

    def __init__(self, config: CaptionConfig, decoding: Decoding | None = None) -> None:
        super().__init__(config, decoding)
        self._prompts = _prompts.load(config.prompts)
        if config.backend == "openai":
            self.gpus = 0.0  # type: ignore[misc]  # the server has them

    @property
    def reads(self) -> tuple[str, ...]:
        return ("rows.text",) if self._prompts.uses_text else ()

    @property
    def shorter_side(self) -> int:
        return math.isqrt(self.config.max_pixels)

    def weights(self) -> list[Weights]:
        if self.config.backend == "openai":
            return []
        return [weights_of(self.config.weights, self.config.sha256, (QWEN, INTERNVL))]

    def description(self) -> dict[str, Any]:
        out = super().description()
        unused = _LOCAL if self.config.backend == "openai" else _REMOTE
        parameters = {k: v for k, v in out["parameters"].items() if k not in unused}
        return out | {"parameters": parameters, "prompts": self._prompts.model_dump(mode="json")}

    def setup(self) -> None:
        config = self.config
        if config.backend == "transformers":
            from x2i.pipelines.annotators._vlm import LocalModel

            self._model: Any = LocalModel(
                folder(self.weights()[0]), config, config.min_pixels, config.max_pixels, config.temperature
            )
            return
        from x2i.pipelines.annotators._openai import Client, Server

        self._model = Server(Client.of(config, "annotator caption", config.jpeg_quality, config.temperature))
        self._model.check()

    def __call__(self, batch: Sequence[Item]) -> pa.Table:
        said = texts(batch, "rows.text", "caption") if self._prompts.uses_text else [None] * len(batch)
        kinds = list(dict.fromkeys(self.config.captions))
        wordings: list[list[str]] = [[] for _ in batch]
        questions = []
        for kind in kinds:
            for i, (item, text) in enumerate(zip(batch, said, strict=True)):
                wording, prompt = self._prompts.draw(kind, item.image_id, text, self.config.seed)
                wordings[i].append(wording)
                questions.append(self._question(kind, item, prompt))
        answers = self._ask(questions, len(batch))
        rows = []
        for i in range(len(batch)):
            mine = {kind: answers[k * len(batch) + i] for k, kind in enumerate(kinds)}
            rows.append({"prompt": self._prompts.fingerprint(wordings[i]), **_row(mine)})
        return pa.Table.from_pylist(rows, schema=self.columns)

    def _question(self, kind: Kind, item: Item, prompt: str) -> Question:
        assert item.pixels is not None
        most = self.config.short_tokens if kind == "short" else self.config.long_tokens
        seed = int(generator("caption/1", self.config.seed, item.image_id, kind, "sampling").integers(2**31))
        return Question(item.pixels, self._prompts.system, prompt, most, seed)

    def _ask(self, questions: list[Question], size: int) -> list[Answer]:
        """All at once if a server answers, which bounds itself; else a batch per kind."""
        if self.config.backend == "openai":
            return self._model.ask(questions)
        return [a for at in range(0, len(questions), max(1, size)) for a in self._model.ask(questions[at : at + size])]


def _row(answers: dict[Kind, Answer]) -> dict[str, Any]:
    """A row's columns; its status is the worst of its answers'."""
    failed = [f"{kind}: {a.reason}" for kind, a in answers.items() if a.status == "failed"]
    truncated = any(a.status == "truncated" for a in answers.values())
    return {
        **{kind: a.text for kind, a in answers.items()},
        "input_tokens": sum(a.input_tokens for a in answers.values()),
        "output_tokens": sum(a.output_tokens for a in answers.values()),
        "status": "failed" if failed else "truncated" if truncated else "ok",
        "reason": "; ".join(failed) or None,
    }
