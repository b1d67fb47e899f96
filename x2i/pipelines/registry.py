"""Finds sources, annotators and tasks: one file each, its name is the name that a recipe uses."""

import difflib
import importlib
import inspect
import pkgutil
from types import ModuleType
from typing import Any

from x2i.base.errors import RecipeError


def names(package: ModuleType) -> list[str]:
    """The modules of a package that hold something to use: all but `base` and those that begin with `_`."""
    found = (m.name for m in pkgutil.iter_modules(package.__path__))
    return sorted(n for n in found if n != "base" and not n.startswith("_"))


def find(package: ModuleType, name: str, base: type[Any], where: str) -> type[Any]:
    """The one concrete subclass of `base` that the module `name` of `package` defines.

    Raises:
        RecipeError: there is no such module; `where` opens the message, the nearest names close it.
    """
    known = names(package)
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are: {', '.join(known)}"
        raise RecipeError(f"{where}: no {base.__name__.lower()} named {name!r}; {hint}")
    module = importlib.import_module(f"{package.__name__}.{name}")
    classes = [
        c
        for _, c in inspect.getmembers(module, inspect.isclass)
        if issubclass(c, base) and c.__module__ == module.__name__ and not inspect.isabstract(c)
    ]
    if len(classes) != 1:
        raise TypeError(f"{module.__name__} must define exactly one {base.__name__}, it defines {len(classes)}")
    return classes[0]
