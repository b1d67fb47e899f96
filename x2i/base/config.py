"""Strict configuration: pydantic models read from YAML, whose errors name file, key and remedy."""

import copy
import difflib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from x2i.base.errors import RecipeError

C = TypeVar("C", bound=BaseModel)


class Config(BaseModel):
    """Base of every configuration: frozen; an unknown key is an error, and so is a number that is not finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


def load_yaml(path: str | Path) -> Any:
    """Read one YAML file.

    Raises:
        RecipeError: the file is missing, is not text, or is not YAML (with line and column).
    """
    path = Path(path)
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file{_nearby(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as text ({error})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise RecipeError(f"{path}{where}: not valid YAML: {problem}") from None


def _nearby(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; the folder {path.parent} does not exist either"
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def load_config(model: type[C], path: str | Path) -> C:
    """Read and validate a YAML file into `model`. Raises RecipeError, one line per fault."""
    return parse_config(model, load_yaml(path), str(path))


def change(data: Any, assignments: Sequence[str], where: str) -> Any:
    """`data` with keys set as `a.b.0.c=VALUE` says; VALUE is YAML. Mappings that are not there are made.

    An entry of a list is called by its number or, where it has one, by its `name`; the name goes first.

    Raises:
        RecipeError: an assignment cannot be read, or leads through something that has no keys.
    """
    data = copy.deepcopy(data)
    for assignment in assignments:
        path, mark, value = assignment.partition("=")
        keys = path.strip().split(".")
        if not mark or not all(keys):
            raise RecipeError(f"--set {assignment}: expected KEY=VALUE, e.g. sources.0.path=photos")
        at = data
        for i, key in enumerate(keys):
            last = i == len(keys) - 1
            place: Any = key
            if isinstance(at, list):
                place = _entry(at, key)
                if place is None:
                    names = [str(e["name"]) for e in at if isinstance(e, dict) and "name" in e]
                    near = difflib.get_close_matches(key, names, n=1)
                    hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(names)}" if names else ""
                    raise RecipeError(f"--set {assignment}: {'.'.join(keys[:i])} of {where} has no entry {key!r}{hint}")
            elif not isinstance(at, dict):
                raise RecipeError(f"--set {assignment}: {'.'.join(keys[:i])} of {where} has no keys")
            if last:
                at[place] = _value(assignment, value)
            elif isinstance(at, dict) and at.get(place) is None:
                at[place] = {}
            at = at[place]
    return data


def _entry(entries: list[Any], key: str) -> int | None:
    """The place of the entry of this name, or of this number; None if there is none."""
    for place, entry in enumerate(entries):
        if isinstance(entry, dict) and str(entry.get("name")) == key:
            return place
    return int(key) if key.isdigit() and int(key) < len(entries) else None


def _value(assignment: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or "it cannot be read"
        raise RecipeError(f"--set {assignment}: the value is not YAML ({problem})") from None


def parse_config(model: type[C], data: Any, where: str) -> C:
    """Validate `data` into `model`; `where` (a file, or a key within one) opens each error line.

    Raises:
        RecipeError: with one line per fault, `where: key: what is wrong; what would be right`.
    """
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise RecipeError(f"{where}: expected a mapping of keys to values, found {type(data).__name__}")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        # an entry that is wrong is not counted, so that its list may seem too short
        within = [e["loc"][:-1] for e in faults]
        faults = [e for e in faults if e["type"] != "too_short" or e["loc"] not in _above(within)]
        lines = [_explain(model, e) for e in faults]
        raise RecipeError("\n".join(f"{where}: {line}" for line in lines)) from None


def _above(places: list[tuple[Any, ...]]) -> set[tuple[Any, ...]]:
    """These places and all that they lie in."""
    return {p[:n] for p in places for n in range(1, len(p) + 1)}


def _explain(model: type[BaseModel], error: Any) -> str:
    loc = [str(part) for part in error["loc"]]
    key = ".".join(loc) or "(top level)"
    if error["type"] == "extra_forbidden":
        names = _fields_at(model, error["loc"][:-1])
        near = difflib.get_close_matches(loc[-1], names, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(sorted(names)) or 'none'}"
        return f"{key}: unknown key; {hint}"
    if error["type"] == "missing":
        return f"{key}: required, but not given"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "tuple_type":
        message = "expected a list, as [a, b]"
    given = error.get("input")
    shown = f" (given: {given!r})" if isinstance(given, str | int | float | bool) else ""
    return f"{key}: {message}{shown}"


def _fields_at(model: type[BaseModel], loc: tuple[Any, ...]) -> list[str]:
    """Names of the fields of the model that lies at `loc` below `model` (empty if it cannot be told)."""
    found: list[type[BaseModel]] = [model]
    for part in loc:
        below: list[type[BaseModel]] = []
        for candidate in found:
            field = candidate.model_fields.get(str(part))
            if field is not None:
                below += _models_in(field.annotation)
        found = below or found  # list indices and union tags do not lead to another model
    return [name for candidate in found for name in candidate.model_fields]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is not None:
        return [m for arg in typing.get_args(annotation) for m in _models_in(arg)]
    return []
