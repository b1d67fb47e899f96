"""Short questions to a language model while groups are made: behind an OpenAI-compatible server, or in this process."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from pydantic import Field, model_validator

from x2i.base.config import Config
from x2i.base.errors import X2IError
from x2i.base.weights import Weights
from x2i.pipelines.annotators._asking import Answer, presentable
from x2i.pipelines.annotators._openai import Client, Server
from x2i.pipelines.images import decode, encode, fit, read_header, resize

#: Keys that say where and how fast a model is asked, not which it is.
SPEED = frozenset({"server", "api_key_env", "concurrency", "retries", "timeout", "device", "batch", "sha256"})


@dataclass(frozen=True)
class Ask:
    """A question in words, about pictures (files' bytes) or none. It is asked greedily: `seed` spreads retries only."""

    prompt: str
    system: str = ""
    pictures: tuple[bytes, ...] = ()
    most_tokens: int = 64
    seed: int = 0


class Model(Protocol):
    """Whatever answers."""

    def ask(self, questions: Sequence[Any]) -> list[Answer]:
        """Answer the questions (`Ask`), in order."""
        ...


class ChatConfig(Config):
    """Which language model is asked."""

    backend: Literal["openai", "transformers"] = Field(
        "openai", description="openai: an OpenAI-compatible server (vLLM, SGLang); e.g. transformers: in this process"
    )
    server: str | None = Field(None, description="of the backend openai: its address, e.g. http://node7:8000/v1")
    model: str | None = Field(None, description="of the backend openai: the model's name there, e.g. Qwen/Qwen3-32B")
    weights: str | None = Field(
        None, description="of the backend transformers: org/name[@revision] or a folder, e.g. Qwen/Qwen3-4B"
    )
    sha256: str | None = Field(None, description="SHA-256 that those weights must have, e.g. 21dd590f…")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="of the backend transformers, e.g. cpu")
    batch: int = Field(32, gt=0, description="of the backend transformers: questions at a time, e.g. 8")
    api_key_env: str | None = Field(
        None, description="the environment variable that holds the key, e.g. OPENAI_API_KEY; null: no key is sent"
    )
    concurrency: int = Field(16, gt=0, description="requests at a time, e.g. 64")
    retries: int = Field(5, ge=0, description="tries after the first one, on overload and lost connections, e.g. 5")
    timeout: float = Field(120.0, gt=0, description="seconds to wait for an answer, e.g. 300")
    max_tokens: int = Field(64, gt=0, description="most tokens of an answer, e.g. 1024 for a model that thinks first")
    max_pixels: int = Field(
        602_112, gt=783, description="larger pictures are shrunk before they are sent, e.g. 200_000"
    )
    options: dict[str, Any] = Field(
        {}, description="further keys of a request, e.g. {chat_template_kwargs: {enable_thinking: false}}"
    )

    @model_validator(mode="after")
    def _complete(self) -> ChatConfig:
        if self.backend == "openai":
            if not self.server or not self.model:
                raise ValueError("backend: openai needs `server` (e.g. http://localhost:8000/v1) and `model`")
            if not self.server.startswith(("http://", "https://")):
                raise ValueError("server must begin with http:// or https://")
            if self.weights:
                raise ValueError("`weights` is for backend: transformers; behind a server, the model is `model`")
        elif not self.weights or self.server or self.model:
            raise ValueError("backend: transformers needs `weights`, and neither `server` nor `model`")
        return self

    def described(self) -> dict[str, Any]:
        """What decides the answers, for fingerprints."""
        said = self.model_dump(mode="json", exclude=set(SPEED))
        if self.weights:
            said["weights"] = self.sha256 or Weights(self.weights).digest()
        return said


def connect(config: ChatConfig, who: str) -> Model:
    """The model that a configuration names, ready to answer; `who` opens what is said of faults.

    Raises:
        X2IError: the server cannot be reached or has no such model; or the weights are not here.
    """
    if config.backend == "transformers":
        return LocalChat(config, who)
    assert config.server is not None and config.model is not None
    server = Chat(Client.of(config, who, quality=90, temperature=0.0), who)
    server.check()
    return server


class Chat(Server):
    """The client of `caption`, for questions in words about any number of pictures."""

    def __init__(self, client: Client, who: str) -> None:
        super().__init__(client)
        self._who = who

    @property
    def _where(self) -> str:
        return f"{self._who}: the server {self._client.server}"

    def _body(self, question: Any) -> bytes:
        content: list[dict[str, Any]] = [self._picture(p) for p in question.pictures]
        content.append({"type": "text", "text": question.prompt})
        user: Any = content if question.pictures else question.prompt
        system = [{"role": "system", "content": question.system}] if question.system else []
        body: dict[str, Any] = {
            "model": self._client.model,
            "messages": [*system, {"role": "user", "content": user}],
            "max_tokens": question.most_tokens,
            "temperature": 0.0,
        }
        body |= self._client.options
        return json.dumps({k: v for k, v in body.items() if v is not None}).encode()

    def _picture(self, data: bytes) -> dict[str, Any]:
        pixels = presentable(decode(data, read_header(data)))
        size = fit(pixels.shape[1], pixels.shape[0], None, self._client.max_pixels)
        jpeg = base64.b64encode(encode(resize(np.ascontiguousarray(pixels), *size), "jpg", self._client.quality))
        return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{jpeg.decode()}"}}


class LocalChat:
    """A causal language model by transformers, from a folder with a tokenizer and its chat template. It sees no pictures.

    Raises:
        X2IError: the folder holds no such model, or no chat template.
    """

    def __init__(self, config: ChatConfig, who: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from x2i.pipelines.annotators._torch import component, pretrained

        assert config.weights is not None
        folder = str(Weights(config.weights, config.sha256).fetch())
        self._tokenizer: Any = component(AutoTokenizer, folder, who)
        if not self._tokenizer.chat_template:
            raise X2IError(f"{who}: {folder}: the tokenizer has no chat template: the model cannot be asked")
        self._tokenizer.padding_side = "left"
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        there = torch.cuda.is_available()
        if config.device == "cuda" and not there:
            raise X2IError(f"{who}: device: cuda, but there is no GPU here; use device: auto")
        self._device = "cuda" if there and config.device != "cpu" else "cpu"
        dtype = torch.bfloat16 if self._device == "cuda" else torch.float32
        self._model: Any = pretrained(AutoModelForCausalLM, folder, who, dtype=dtype).eval().to(self._device)
        self._batch, self._who = config.batch, who

    def ask(self, questions: Sequence[Ask]) -> list[Answer]:
        """Answer the questions, in order, greedily."""
        if any(q.pictures for q in questions):
            raise X2IError(f"{self._who}: the backend transformers sees no pictures here: use backend: openai")
        return [a for at in range(0, len(questions), self._batch) for a in self._some(questions[at : at + self._batch])]

    def _some(self, questions: Sequence[Ask]) -> list[Answer]:
        import torch

        chats = [
            [*([{"role": "system", "content": q.system}] if q.system else []), {"role": "user", "content": q.prompt}]
            for q in questions
        ]
        texts = [self._tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats]
        inputs = self._tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt").to(self._device)
        with torch.inference_mode():
            out_BL = self._model.generate(
                **inputs,
                max_new_tokens=max(q.most_tokens for q in questions),
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=self._tokenizer.pad_token_id,
            )
        asked = inputs["input_ids"].shape[1]
        said = [self._tokenizer.decode(row[asked:], skip_special_tokens=True).strip() for row in out_BL]
        return [Answer(t, "ok", None, asked) if t else Answer(None, "failed", "empty", asked) for t in said]
