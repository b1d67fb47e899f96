"""`caption` with a server: a small OpenAI-compatible one in a thread, which fails in all the ways that servers do."""

from __future__ import annotations

import base64
import email.utils
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from tests.pipelines.annotating import batch, photo, run
from x2i.base.errors import X2IError
from x2i.pipelines.annotators import _openai
from x2i.pipelines.annotators.base import Batch
from x2i.pipelines.annotators.caption import Caption, CaptionConfig
from x2i.pipelines.images import decode, read_header

#: (status, body, headers); a body of bytes is sent as it is.
Reply = tuple[int, Any, dict[str, str]]


def completion(text: str | None, finish: str = "stop", **message: Any) -> Reply:
    said = {"role": "assistant", "content": text} | message
    usage = {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107}
    return 200, {"choices": [{"index": 0, "message": said, "finish_reason": finish}], "usage": usage}, {}


def failure(status: int, message: str = "overloaded", **headers: str) -> Reply:
    return status, {"error": {"message": message}}, {k.replace("_", "-"): v for k, v in headers.items()}


class Fake:
    """A server whose replies a test decides."""

    def __init__(self) -> None:
        self.reply: Callable[[dict[str, Any]], Reply] = lambda body: completion("A cat.")
        self.models: Reply = (200, {"data": [{"id": "tiny"}]}, {})
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.now = self.most = 0
        lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                assert self.path == "/v1/models"
                self._send(fake.models)

            def do_POST(self) -> None:
                assert self.path == "/v1/chat/completions"
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    fake.requests.append(body)
                    fake.headers.append(dict(self.headers))
                    fake.now += 1
                    fake.most = max(fake.most, fake.now)
                try:
                    reply = fake.reply(body)
                finally:
                    with lock:
                        fake.now -= 1
                self._send(reply)

            def _send(self, reply: Reply) -> None:
                status, body, headers = reply
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                try:
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:
                    pass  # the client waited no longer

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    def stop(self) -> None:
        if self.thread.is_alive():
            self.server.shutdown()
            self.server.server_close()
            self.thread.join()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(_openai, "FIRST_WAIT", 0.002)
    made = Fake()
    yield made
    made.stop()


def captioner(fake: Fake, **config: Any) -> Caption:
    given = {"backend": "openai", "server": fake.url, "model": "tiny", "timeout": 5, "retries": 3} | config
    return Caption(CaptionConfig(**given))


def photos(count: int = 3) -> Batch:
    return batch([photo(n) for n in ("astronaut", "chelsea", "coffee")] * (count // 3))


def test_captions_and_what_is_sent(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPTION_KEY", "s3cret")
    fake.reply = lambda body: completion(f"  {body['max_tokens']} words.\n")
    annotator = captioner(
        fake, api_key_env="CAPTION_KEY", max_pixels=40_000, short_tokens=11, long_tokens=22, options={"top_p": 0.5}
    )
    table = run(annotator, photos()).to_pylist()
    assert [r["short"] for r in table] == ["11 words."] * 3
    assert [r["long"] for r in table] == ["22 words."] * 3
    assert {(r["status"], r["reason"], r["input_tokens"], r["output_tokens"]) for r in table} == {("ok", None, 200, 14)}
    assert len(fake.requests) == 6
    assert all(h["Authorization"] == "Bearer s3cret" for h in fake.headers)
    for body in fake.requests:
        assert (body["model"], body["temperature"], body["top_p"]) == ("tiny", 0, 0.5)
        assert "seed" not in body
        system, user = body["messages"]
        assert system["content"] == annotator._prompts.system
        picture, text = user["content"]
        assert text["text"] in annotator._prompts.short + annotator._prompts.long
        kind, _, data = picture["image_url"]["url"].partition(",")
        jpeg = base64.b64decode(data)
        assert kind == "data:image/jpeg;base64" and jpeg[:2] == b"\xff\xd8"
        header = read_header(jpeg)
        assert 0.9 * 40_000 < header.width * header.height < 1.02 * 40_000
    # the picture is the picture
    first = fake.requests[0]["messages"][1]["content"][0]["image_url"]["url"].partition(",")[2]
    seen = decode(base64.b64decode(first), read_header(base64.b64decode(first)))
    assert min(np.abs(seen.mean(axis=(0, 1)) - i.pixels.mean(axis=(0, 1))).max() for i in photos()) < 1.5


def test_a_request_that_fails_is_made_again(fake: Fake) -> None:
    lock, seen = threading.Lock(), dict[str, int]()
    replies = [failure(429), failure(500, "broken"), (200, b"<html>", {}), completion(None)]

    def flaky(body: dict[str, Any]) -> Reply:
        about = json.dumps(body["messages"])
        with lock:
            seen[about] = seen.get(about, 0) + 1
            return replies[seen[about] - 1] if seen[about] < 4 else completion("A cat.")

    fake.reply = flaky
    table = run(captioner(fake), photos()).to_pylist()
    assert {r["status"] for r in table} == {"ok"}
    assert set(seen.values()) == {4}
    assert len(fake.requests) == 24


def test_retry_after_is_honoured(fake: Fake) -> None:
    times: list[float] = []

    def busy(body: dict[str, Any]) -> Reply:
        times.append(time.monotonic())
        return failure(429, Retry_After="0.3") if len(times) == 1 else completion("A cat.")

    fake.reply = busy
    run(captioner(fake, captions=["short"]), Batch(photos()[:1]))
    assert 0.3 <= times[1] - times[0] < 2
    at = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert 28 < (_openai._later(at) or 0) <= 30
    assert [_openai._later(h) for h in ("7", "0.5", "-3", "soon", "nan", None)] == [7, 0.5, 0, None, None, None]


def test_waits_grow_and_derive_from_content(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_openai, "FIRST_WAIT", 1.0)
    waits = [_openai._pause(attempt, None, "a picture") for attempt in range(9)]
    assert waits == [_openai._pause(attempt, None, "a picture") for attempt in range(9)]
    assert all(2**a / 2 <= w <= 2**a for a, w in enumerate(waits[:6]))
    assert max(waits) <= 60
    assert len({_openai._pause(0, None, f"picture {i}") for i in range(50)}) == 50
    assert _openai._pause(0, 20.0, "a picture") == 20
    assert _openai._pause(0, 1e9, "a picture") == 60


@pytest.mark.parametrize(("concurrency", "expected"), [(1, 1), (4, 4)])
def test_no_more_requests_at_a_time_than_allowed(fake: Fake, concurrency: int, expected: int) -> None:
    def slow(body: dict[str, Any]) -> Reply:
        time.sleep(0.03)
        return completion("A cat.")

    fake.reply = slow
    run(captioner(fake, concurrency=concurrency), photos(6))
    assert len(fake.requests) == 12
    assert fake.most == expected


def test_answers_stay_with_their_pictures(fake: Fake) -> None:
    """Later requests are answered first; order must hold all the same."""

    def echo(body: dict[str, Any]) -> Reply:
        time.sleep(0.05 if len(fake.requests) < 4 else 0)
        url = body["messages"][1]["content"][0]["image_url"]["url"].partition(",")[2]
        header = read_header(base64.b64decode(url))
        return completion(f"{header.width}x{header.height} {body['max_tokens']}")

    fake.reply = echo
    given = photos()
    table = run(captioner(fake, short_tokens=1, long_tokens=2, max_pixels=10**6), given)
    sizes = [f"{i.header.width}x{i.header.height}" for i in given]
    assert table["short"].to_pylist() == [f"{s} 1" for s in sizes]
    assert table["long"].to_pylist() == [f"{s} 2" for s in sizes]


def test_refusals_and_cut_answers_are_of_their_rows(fake: Fake) -> None:
    replies = {
        1: completion(None, refusal="I can't help with that."),
        2: completion("", finish="content_filter"),
        3: completion("A cat that", finish="length"),
        4: completion("  "),
        5: failure(400, "the picture is too small"),
        6: failure(503),
    }
    order = iter(replies)
    fake.reply = lambda body: replies[current]
    annotator = captioner(fake, captions=["long"], retries=1)
    annotator.setup()
    rows = []
    for current in order:  # noqa: B007 - the server reads it
        rows += annotator(Batch(photos()[:1])).to_pylist()
    assert [(r["status"], r["reason"]) for r in rows] == [
        ("failed", "long: refusal"),
        ("failed", "long: content_filter"),
        ("truncated", None),
        ("failed", "long: empty"),
        ("failed", "long: http_400: the picture is too small"),
        ("failed", "long: http_503: overloaded"),
    ]
    assert [r["long"] for r in rows] == [None, None, "A cat that", None, None, None]
    assert len(fake.requests) == 7  # of these only the last is worth a second try


def test_one_caption_may_fail_and_the_other_not(fake: Fake) -> None:
    fake.reply = lambda body: completion("A cat.") if body["max_tokens"] == 96 else failure(400, "too long")
    (row,) = run(captioner(fake), Batch(photos()[:1])).to_pylist()
    assert (row["short"], row["long"], row["status"]) == ("A cat.", None, "failed")
    assert row["reason"] == "long: http_400: too long"


def test_a_slow_answer_times_out(fake: Fake) -> None:
    def slow(body: dict[str, Any]) -> Reply:
        time.sleep(0.5)
        return completion("late")

    fake.reply = slow
    (row,) = run(captioner(fake, timeout=0.1, retries=1, captions=["short"]), Batch(photos()[:1])).to_pylist()
    assert (row["status"], row["reason"]) == ("failed", "short: timeout: no answer within 0.1 s")
    assert len(fake.requests) == 2


def test_a_server_that_is_not_there_stops_the_run(fake: Fake) -> None:
    annotator = captioner(fake)
    fake.stop()
    with pytest.raises(
        X2IError, match=r"cannot be reached after 4 tries: unreachable: ConnectionRefusedError.*vllm serve tiny"
    ):
        annotator.setup()


def test_a_server_that_dies_stops_the_run_and_marks_no_row(fake: Fake) -> None:
    annotator = captioner(fake)
    annotator.setup()
    fake.stop()
    with pytest.raises(X2IError, match="cannot be reached after 4 tries.*what is done is kept"):
        annotator(photos())


def test_a_server_that_answers_nothing_any_more_stops_the_run(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_openai, "GIVE_UP", 10)
    count = iter(range(1000))
    fake.reply = lambda body: failure(500, "CUDA error") if next(count) > 8 else completion("A cat.")
    annotator = captioner(fake, retries=0, captions=["short"])
    annotator.setup()
    assert annotator(photos(9))["status"].to_pylist() == ["ok"] * 9
    assert annotator(photos(9))["status"].to_pylist() == ["failed"] * 9
    with pytest.raises(X2IError, match=r"the last \d+ requests failed, the last with http_500: CUDA error"):
        annotator(photos())


def test_a_key_that_is_not_taken_stops_the_run(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(X2IError, match="CAPTION_KEY .api_key_env. is not set"):
        captioner(fake, api_key_env="CAPTION_KEY").setup()
    monkeypatch.setenv("CAPTION_KEY", "wrong")
    fake.models = failure(401, "invalid key")
    with pytest.raises(X2IError, match="the API key was not taken .invalid key."):
        captioner(fake, api_key_env="CAPTION_KEY").setup()
    fake.models, fake.reply = failure(404), lambda body: failure(403, "no credit")
    with pytest.raises(X2IError, match="the API key is missing .no credit."):
        run(captioner(fake), photos())


def test_a_model_that_is_not_there_stops_the_run(fake: Fake) -> None:
    with pytest.raises(X2IError, match="has no model 'tinny'; did you mean tiny?"):
        captioner(fake, model="tinny").setup()
    fake.models, fake.reply = failure(404), lambda body: failure(404, "no such model")
    with pytest.raises(X2IError, match="no such address or no model tiny"):
        run(captioner(fake), photos())


def test_a_server_that_is_still_loading_is_waited_for(fake: Fake) -> None:
    fake.models = failure(503, "loading")
    timer = threading.Timer(0.1, lambda: setattr(fake, "models", (200, {"data": [{"id": "tiny"}]}, {})))
    timer.start()
    captioner(fake, retries=9).setup()
    timer.join()


def test_sampling_sends_a_seed_of_the_picture(fake: Fake) -> None:
    annotator = captioner(fake, temperature=0.7)
    run(annotator, photos())
    first = sorted(b["seed"] for b in fake.requests)
    assert len(set(first)) == 6
    annotator(photos())
    assert sorted(b["seed"] for b in fake.requests[6:]) == first


def test_where_the_server_stands_is_not_in_the_fingerprint(fake: Fake) -> None:
    plain = captioner(fake)
    assert plain.weights() == []
    assert plain.gpus == 0
    same = captioner(fake, server="https://elsewhere/v1", concurrency=1, timeout=1, retries=0, api_key_env="KEY")
    assert same.fingerprint == plain.fingerprint
    assert captioner(fake, weights="another/one").fingerprint == plain.fingerprint
    assert captioner(fake, model="other").fingerprint != plain.fingerprint
    assert captioner(fake, options={"top_p": 0.5}).fingerprint != plain.fingerprint


def test_no_rows(fake: Fake) -> None:
    assert run(captioner(fake), Batch([])).num_rows == 0
