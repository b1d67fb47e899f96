"""Architectures by name, and their presets. Light to import: networks are loaded where they are built."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
from functools import cache
from typing import TYPE_CHECKING, Any

from x2i.base.config import parse_config
from x2i.base.errors import RecipeError
from x2i.model.config import ModelConfig

if TYPE_CHECKING:
    from x2i.model.base import Model, Processor


@cache
def architectures() -> tuple[str, ...]:
    """Names of all architectures: the packages beside this file that have `config` and `model`."""
    package = importlib.import_module("x2i.model")
    names = (m.name for m in pkgutil.iter_modules(package.__path__) if m.ispkg)
    both = ("config", "model")
    return tuple(sorted(n for n in names if all(importlib.util.find_spec(f"x2i.model.{n}.{m}") for m in both)))


@cache
def presets() -> dict[str, ModelConfig]:
    """All presets of all architectures by name."""
    modules = (importlib.import_module(f"x2i.model.{name}.config") for name in architectures())
    return {name: config for module in modules for name, config in module.PRESETS.items()}


def preset(name: str, where: str = "model") -> ModelConfig:
    """One preset. Raises RecipeError with the nearest right name."""
    known = presets()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise RecipeError(f"{where}: no preset {name!r}{hint} Known: {', '.join(known)}")
    return known[name]


def changed(config: ModelConfig, changes: dict[str, Any], where: str = "model") -> ModelConfig:
    """A configuration with some numbers replaced; nested ones by mappings. Raises RecipeError for what is unknown."""
    return parse_config(type(config), _merged(config.model_dump(), changes), where)


def read_as(config: ModelConfig, inputs: dict[str, Any], where: str) -> ModelConfig:
    """A configuration with some of the numbers replaced that say how it reads. Raises RecipeError for any other."""
    if other := [name for name in inputs if name in type(config).model_fields and name not in config.reading]:
        those = ", ".join(config.reading) or "none"
        raise RecipeError(
            f"{where}.{other[0]}: it says what the network is, which no stage changes (model: {{{other[0]}: …}} does, "
            f"for all of them); numbers of {config.architecture} that say how it reads: {those}"
        )
    return changed(config, inputs, where)


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    both = {k: _merged(old[k], v) for k, v in new.items() if isinstance(v, dict) and isinstance(old.get(k), dict)}
    return old | new | both


def config_of(architecture: str, numbers: dict[str, Any], where: str) -> ModelConfig:
    """The configuration that a checkpoint's config.json holds. Raises RecipeError."""
    if architecture not in architectures():
        raise RecipeError(f"{where}: no architecture {architecture!r}; known: {', '.join(architectures())}")
    module = importlib.import_module(f"x2i.model.{architecture}.config")
    return parse_config(type(next(iter(module.PRESETS.values()))), numbers, where)


def module(architecture: str, name: str) -> Any:
    """A module of an architecture's package that only some have (`layouts`, `generation`); None if it has none."""
    path = f"x2i.model.{architecture}.{name}"
    return importlib.import_module(path) if importlib.util.find_spec(path) else None


def model_class(architecture: str) -> type[Model[Any]]:
    """The network's class."""
    found: type[Model[Any]] = importlib.import_module(f"x2i.model.{architecture}.model").MODEL
    return found


def processor_class(architecture: str) -> type[Processor[Any]]:
    """The processor's class."""
    found: type[Processor[Any]] = importlib.import_module(f"x2i.model.{architecture}.processor").PROCESSOR
    return found


def build(config: ModelConfig) -> Model[Any]:
    """A network with fresh weights."""
    return model_class(config.architecture)(config)
