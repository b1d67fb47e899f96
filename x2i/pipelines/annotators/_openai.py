"""A vision-language model behind an OpenAI-compatible server (vLLM, SGLang and others): chat completions over HTTP.

The standard library's client: a caption takes a server a second, a connection a millisecond. Proxies and
certificates are those of the environment (`http_proxy`, `no_proxy`, `SSL_CERT_FILE`).
"""

from __future__ import annotations

import base64
import difflib
import email.utils
import http.client
import json
import math
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from x2i.base.errors import X2IError
from x2i.base.seeds import digest, generator
from x2i.pipelines.annotators._asking import Answer, Question, presentable
from x2i.pipelines.images import encode, fit, resize

#: Answers that say «later»: overload, a restart, a gateway that lost its server.
LATER = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
#: Seconds to wait before the second try, doubled with each further one, and the most that is ever waited.
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0
#: After so many requests in a row that failed for no reason of their own, it is the server that is at fault.
GIVE_UP = 48


@dataclass(frozen=True)
class Client:
    """How a server is asked. `timeout` is in seconds; `options` are further keys of a request, null takes one out."""

    server: str
    model: str
    key: str | None
    concurrency: int
    retries: int
    timeout: float
    max_pixels: int
    quality: int
    temperature: float
    options: dict[str, Any]

    @classmethod
    def of(cls, config: Any, who: str, quality: int, temperature: float) -> Client:
        """As a configuration says that has a server, a model and the rest by these names; `who` opens the message.

        Raises:
            X2IError: the environment variable that should hold the key is not set.
        """
        key = os.environ.get(config.api_key_env) if config.api_key_env else None
        if config.api_key_env and not key:
            raise X2IError(f"{who}: the environment variable {config.api_key_env} (api_key_env) is not set")
        names = ("server", "model", "concurrency", "retries", "timeout", "max_pixels", "options")
        return cls(key=key, quality=quality, temperature=temperature, **{n: getattr(config, n) for n in names})


class Gone(Exception):
    """The request could not be answered now; `reason` is a snake_case word, `later` seconds that the server asks for."""

    def __init__(self, reason: str, detail: str, later: float | None = None) -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.later = reason, later


class Server:
    """Asks questions, at most `concurrency` at a time.

    Raises (from `check` and `ask`):
        X2IError: the server cannot be reached, does not take the key, has no such model, or answers nothing
            any more. The run should stop: nothing is wrong with the rows.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._pool = ThreadPoolExecutor(client.concurrency, thread_name_prefix="caption")
        self._lock = threading.Lock()
        self._failed = 0  # requests in a row
        self._stopping = threading.Event()

    def check(self) -> None:
        """Ask for the list of models, patiently: a server may still be loading."""
        for attempt in range(self._client.retries + 1):
            try:
                said = self._send("models", None)
            except Gone as error:
                if attempt == self._client.retries:
                    raise self._unreachable(error) from None
                time.sleep(_pause(attempt, error.later, "models"))
            except urllib.error.HTTPError as error:
                self._refuse(error)
                return  # some gateways do not list models
            else:
                self._has_model(said)
                return

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Answer the questions, in order."""
        self._stopping.clear()
        waiting = [self._pool.submit(self._answer, q) for q in questions]
        try:
            return [w.result() for w in waiting]
        except BaseException:  # the run stops: what has not begun need not, and nobody waits to try again
            self._stopping.set()
            for w in waiting:
                w.cancel()
            raise

    def _answer(self, question: Question) -> Answer:
        body = self._body(question)
        for attempt in range(self._client.retries + 1):
            try:
                answer = _read(self._send("chat/completions", body))
            except Gone as error:
                last = error
                about = digest(question.prompt, question.seed)
                if attempt == self._client.retries or self._stopping.wait(_pause(attempt, error.later, about)):
                    break
            except urllib.error.HTTPError as error:
                said = self._refuse(error)
                return self._count(Answer(None, "failed", f"http_{error.code}: {said}"))
            else:
                return self._count(answer)
        if last.reason in ("unreachable", "http_502", "http_503", "http_504"):
            self._alive(last)
        return self._count(Answer(None, "failed", str(last)))

    def _body(self, question: Question) -> bytes:
        pixels = presentable(question.pixels)
        size = fit(pixels.shape[1], pixels.shape[0], None, self._client.max_pixels)
        jpeg = base64.b64encode(encode(resize(pixels, *size), "jpg", self._client.quality)).decode()
        picture = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{jpeg}"}}
        system = [{"role": "system", "content": question.system}] if question.system else []
        body: dict[str, Any] = {
            "model": self._client.model,
            "messages": [*system, {"role": "user", "content": [picture, {"type": "text", "text": question.prompt}]}],
            "max_tokens": question.most_tokens,
            "temperature": self._client.temperature,
        }
        if self._client.temperature:
            body["seed"] = question.seed
        body |= self._client.options
        return json.dumps({k: v for k, v in body.items() if v is not None}).encode()

    def _send(self, path: str, body: bytes | None) -> Any:
        """One request; the JSON that comes back. Raises Gone, or HTTPError for what another try will not mend."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._client.key:
            headers["Authorization"] = f"Bearer {self._client.key}"
        request = urllib.request.Request(f"{self._client.server.rstrip('/')}/{path}", body, headers)  # noqa: S310 - the recipe's
        try:
            with urllib.request.urlopen(request, timeout=self._client.timeout) as response:  # noqa: S310
                return json.load(response)
        except urllib.error.HTTPError as error:
            if error.code in LATER:
                raise Gone(f"http_{error.code}", _message(error), _later(error.headers.get("Retry-After"))) from None
            raise
        except ValueError:
            raise Gone("not_json", "the answer is not JSON: is this the address of an API, with its /v1?") from None
        except (OSError, http.client.HTTPException) as error:
            cause = error.reason if isinstance(error, urllib.error.URLError) else error
            if isinstance(cause, TimeoutError):
                raise Gone("timeout", f"no answer within {self._client.timeout:g} s") from None
            raise Gone("unreachable", f"{type(cause).__name__}: {cause}") from None

    def _count(self, answer: Answer) -> Answer:
        """Note how it went; raise when nothing goes well any more."""
        own = answer.status != "failed" or answer.reason in ("refusal", "content_filter", "empty")
        with self._lock:
            self._failed = 0 if own else self._failed + 1
            if self._failed >= GIVE_UP:
                raise X2IError(
                    f"{self._where}: the last {self._failed} requests failed, the last with {answer.reason}. "
                    "Look at the server's log; or lower `concurrency`, raise `timeout`. What is done is kept."
                )
        return answer

    @property
    def _where(self) -> str:
        return f"annotator caption: the server {self._client.server}"

    def _alive(self, why: Gone) -> None:
        try:
            self._send("models", None)
        except Gone:
            raise self._unreachable(why) from None
        except urllib.error.HTTPError:
            pass  # it answers

    def _unreachable(self, error: Gone) -> X2IError:
        proxies = ", ".join(sorted(urllib.request.getproxies().keys() - {"no"}))
        hint = f" (A proxy is set for {proxies}: is the server's host in no_proxy?)" if proxies else ""
        return X2IError(
            f"{self._where} cannot be reached after {self._client.retries + 1} tries: {error}. Start it, for instance "
            f"`vllm serve {self._client.model}`, or correct `server:` (with its /v1), and run again: "
            f"what is done is kept.{hint}"
        )

    def _refuse(self, error: urllib.error.HTTPError) -> str:
        """What the server says of a request that it will never take. Raises X2IError if it would take no other either."""
        said = _message(error)
        if error.code in (401, 403):
            given = "was not taken" if self._client.key else "is missing"
            raise X2IError(f"{self._where}: the API key {given} ({said}): see `api_key_env`") from None
        if error.code == 404 and error.url and error.url.endswith("chat/completions"):
            raise X2IError(f"{self._where} has no such address or no model {self._client.model} ({said})") from None
        return said

    def _has_model(self, said: Any) -> None:
        listed = said.get("data") if isinstance(said, dict) else None
        names = [str(m["id"]) for m in listed or [] if isinstance(m, dict) and "id" in m]
        if names and self._client.model not in names:
            near = difflib.get_close_matches(self._client.model, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(names[:8])}"
            raise X2IError(f"{self._where} has no model {self._client.model!r}; {hint}")


def _pause(attempt: int, later: float | None, about: str) -> float:
    """Seconds until the next try: doubled each time, spread by content, not less than the server asks for."""
    ceiling = min(LONGEST_WAIT, FIRST_WAIT * 2**attempt)
    spread = ceiling * (0.5 + 0.5 * float(generator("backoff/1", about, attempt).random()))
    return max(spread, min(later or 0.0, LONGEST_WAIT))


def _read(said: Any) -> Answer:
    """The answer in a chat completion. Raises Gone if it is none."""
    try:
        choice, usage = said["choices"][0], said.get("usage") or {}
        message, finish = choice["message"], choice.get("finish_reason")
        content, refusal = message.get("content"), message.get("refusal")
        asked, given = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError):
        raise Gone("not_a_completion", f"expected choices[0].message, found {json.dumps(said)[:200]}") from None
    text = content.strip() if isinstance(content, str) else ""
    if refusal:
        return Answer(None, "failed", "refusal", asked, given)
    if finish == "content_filter":
        return Answer(None, "failed", "content_filter", asked, given)
    if not text:
        return Answer(None, "failed", "empty", asked, given)
    return Answer(text, "truncated" if finish == "length" else "ok", None, asked, given)


def _message(error: urllib.error.HTTPError) -> str:
    """What an error's body says, in one short line."""
    try:
        text = error.read(4000).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return error.reason
    try:
        said = json.loads(text)
        inner = said.get("error", said.get("message", said)) if isinstance(said, dict) else said
        text = str(inner.get("message", inner) if isinstance(inner, dict) else inner)
    except json.JSONDecodeError:
        pass
    return " ".join(text.split())[:200] or error.reason


def _later(header: str | None) -> float | None:
    """Seconds of a Retry-After header: a number, or a date."""
    if not header:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except (TypeError, ValueError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
