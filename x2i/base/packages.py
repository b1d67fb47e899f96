"""Packages that only some annotators and tasks need are asked for where they are used."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

from x2i.base.errors import X2IError


def need(module: str, package: str, annotator: str) -> Any:
    """Import `module`, which the distribution `package` holds.

    Raises:
        X2IError: it is not installed; names the annotator that wants it, and the remedy.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != module.split(".")[0]:
            raise  # something that the package itself lacks
        raise X2IError(
            f"annotator {annotator}: needs the package {package}: pip install 'x2i[annotators]' (or {package})"
        ) from None


def version(package: str) -> str:
    """The version of an installed package, for fingerprints; "missing" where `need` will say so."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"
