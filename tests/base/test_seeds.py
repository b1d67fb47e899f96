"""Digests and random numbers derive from content alone, on every machine and in every process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from x2i.base.seeds import canonical_json, digest, generator


def test_digests_stay_what_they_are() -> None:
    """Pinned: a change here would make every lake and every corpus another one."""
    assert (
        digest("x", 1, {"b": [1.5, None], "a": "é"})
        == "feb67349baff3e378b1531507a6c4375573764764ed5d3defa14e8243bafc9a1"
    )
    assert generator("task/1", 0, "image").integers(0, 1000, 4).tolist() == [68, 339, 997, 143]


def test_the_order_of_keys_is_nothing_and_the_order_of_parts_is_all() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert len({digest(1, 2), digest(2, 1), digest([1, 2]), digest("1", "2"), digest(12)}) == 5


def test_another_process_draws_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    script = "from x2i.base.seeds import generator; print(generator('a', {'k': 1}).random())"
    out = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONHASHSEED": "7"},
    )
    assert float(out.stdout) == generator("a", {"k": 1}).random()


def test_values_without_one_spelling_are_refused() -> None:
    for value in (float("nan"), {1, 2}, object()):
        with pytest.raises((TypeError, ValueError)):
            canonical_json(value)


def test_file_names_that_are_no_utf8_have_a_digest_too() -> None:
    assert len(digest("caf\udce9.jpg")) == 64
