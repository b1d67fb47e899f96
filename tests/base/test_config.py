"""A bad configuration is refused with the file, the key and what would be right."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import Field, ValidationError

from x2i.base.config import Config, load_config, load_yaml, parse_config
from x2i.base.errors import RecipeError


class Inner(Config):
    threshold: float = Field(0.5, ge=0, le=1)
    words: list[str] = Field(["a"])


class Outer(Config):
    name: str
    stages: tuple[Inner, ...] = Field((Inner(),), min_length=1)
    inner: Inner = Field(Inner())
    several: dict[str, Inner] = Field({})


def refusal(text: str, tmp_path: Path) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_config(Outer, path)
    return str(caught.value).replace(str(path), "FILE")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nam: x\nname: y", "FILE: nam: unknown key; did you mean 'name'?"),
        ("name: x\ninner: {treshold: 0.1}", "FILE: inner.treshold: unknown key; did you mean 'threshold'?"),
        ("name: x\nzzzzz: 1", "FILE: zzzzz: unknown key; known keys: inner, name, several, stages"),
        ("name: x\nseveral: {q: {word: []}}", "FILE: several.q.word: unknown key; did you mean 'words'?"),
        ("inner: {}", "FILE: name: required, but not given"),
        ("", "FILE: name: required, but not given"),
        ("- 1", "FILE: expected a mapping of keys to values, found list"),
        ("name: x\ninner: {threshold: 7}", "FILE: inner.threshold: Input should be less than or equal to 1 (given: 7)"),
    ],
)
def test_the_message_names_file_key_and_remedy(text: str, message: str, tmp_path: Path) -> None:
    assert refusal(text, tmp_path) == message


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    lines = refusal("inner: {threshold: x}\nother: 1", tmp_path).splitlines()
    assert len(lines) == 3
    assert all(line.startswith("FILE: ") for line in lines)


def test_a_list_is_not_called_too_short_for_an_entry_that_is_wrong(tmp_path: Path) -> None:
    message = refusal("name: x\nstages: [{threshold: 3}]", tmp_path)
    assert message == "FILE: stages.0.threshold: Input should be less than or equal to 1 (given: 3)"
    assert "stages: Tuple should have at least 1 item" in refusal("name: x\nstages: []", tmp_path)


def test_broken_yaml_is_told_with_line_and_column(tmp_path: Path) -> None:
    assert refusal("name: x\ninner: {a: [1, 2}", tmp_path).startswith("FILE:2:")


def test_a_missing_file_is_told_with_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text("name: x")
    with pytest.raises(RecipeError, match=r"did you mean .*quickstart\.yaml"):
        load_yaml(tmp_path / "quikstart.yaml")
    with pytest.raises(RecipeError, match="does not exist either"):
        load_yaml(tmp_path / "nowhere" / "quickstart.yaml")


def test_what_is_no_text_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read as text"):
        load_yaml(tmp_path / "x.yaml")


def test_a_good_one_is_read_and_cannot_be_changed(tmp_path: Path) -> None:
    config = parse_config(Outer, {"name": "x", "inner": {"threshold": 0.25}}, "here")
    assert config.inner.threshold == 0.25
    with pytest.raises(ValidationError):
        config.name = "y"  # type: ignore[misc]
