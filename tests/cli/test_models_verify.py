"""`x2i models verify`: the tables, JSON, exit codes."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from x2i.base.errors import RecipeError
from x2i.cli.main import app
from x2i.model import verify
from x2i.model.omnigen import verify as of_omnigen
from x2i.model.verify import Parameters


def x2i(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["models", "verify", *arguments], env={"COLUMNS": "200"})


def test_it_prints_the_figures_of_one_model() -> None:
    done = x2i("ovis-u1-3b")
    assert done.exit_code == 0, done.output
    for shown in ("3,560,554,504", "6 of 6", "812 of 812", "Qwen3ForCausalLM", "kaifanyu/ImageWAM@55c181c", "recorded"):
        assert shown in done.output
    assert "omnigen" not in done.output
    assert "578,534,392" not in done.output  # a part, with --all only


def test_all_shows_parts_names_and_stages() -> None:
    done = x2i("ovis-u1-3b", "--all")
    assert done.exit_code == 0, done.output
    for shown in ("578,534,392", "81,054,720", "visual_generator.backbone.", "encoder, adapter, llm", "2,433,327,096"):
        assert shown in done.output


def test_json_has_every_row() -> None:
    done = x2i("omnigen-3.8b", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    (model,) = found["models"]
    assert (model["parameters"], model["published"], model["names"]) == (3_762_072_592,) * 2 + (
        [[211, 211], [275, 275]],
    )
    assert [row["how"] for row in found["outputs"]] == ["live"] * 6 + ["recorded"] * 3
    assert all(row["difference"] <= row["tolerance"] for row in found["outputs"])
    assert found["ok"] is True


def test_a_count_that_differs_ends_with_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: str) -> list[Parameters]:
        return [Parameters(model, "all", verify.count(model), 3_762_072_593, "a file")]

    monkeypatch.setattr(of_omnigen, "parameters", wrong)
    done = x2i("omnigen-3.8b")
    assert done.exit_code == 1
    assert "3,762,072,593" in done.output  # the part that is wrong is shown without --all


def test_packages_that_are_not_here_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from x2i.model.mini_gemini import verify as of_mini_gemini

    of_mini_gemini.openclip_names.cache_clear()
    gone: dict[str, Any] = {name: None for name in sys.modules if name.split(".")[0] in ("timm", "open_clip")}
    for name in (*gone, "timm", "open_clip"):
        monkeypatch.setitem(sys.modules, name, None)
    done = x2i("mgm-2b")
    assert done.exit_code == 0, done.output
    assert "timm is not here" in done.output
    assert "open_clip is not here" in done.output
    assert "572 of 572" in done.output  # names of all but the high-resolution encoder


def test_unknown_models_are_refused() -> None:
    done = x2i("omnigen-4b")
    assert isinstance(done.exception, RecipeError)
    assert "omnigen-3.8b" in str(done.exception)
