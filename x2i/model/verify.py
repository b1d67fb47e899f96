"""Models against what was published of them: parameters, outputs on the same weights, names of checkpoints.

An architecture with a public counterpart has a `verify.py` beside its network, which says what is published and compares:

    PUBLISHED            the presets that have a public counterpart
    parameters(model)    -> rows of `Parameters`: counted on the meta device
    names(model)         -> rows of `Names`: of the state, on the meta device
    outputs()            -> `Comparison`s, to be run: small networks, float32, the CPU

Public code that a library has is run beside ours ("live"). Of other code the figures were recorded from a run on the
same weights, which depend on the parameters' names alone (`filling.py`, `recorded.py`).
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from typing import Any, Literal

import torch
from torch import Tensor

from x2i.base.errors import RecipeError
from x2i.model import recorded, registry
from x2i.model.base import Model

#: Largest difference that counts as equal, as a share of the largest public value: float32 in another order.
TOLERANCE = 5e-5


@dataclass(frozen=True)
class Parameters:
    """How many parameters a part of a model has. `published` is None where nobody says."""

    model: str
    part: str
    counted: int
    published: int | None
    source: str = ""

    @property
    def ok(self) -> bool:
        return self.published in (None, self.counted)


@dataclass(frozen=True)
class Names:
    """How many names of a state are the published ones, with their shapes.

    Attributes:
        matched: names in both with equal shapes; of a digest all or none.
        ours, published: how many there are on either side.
        source: what they were compared with.
        missing: the package that is not here, where the row could not be made.
    """

    model: str
    part: str
    matched: int
    ours: int
    published: int
    source: str
    missing: str | None = None

    @property
    def ok(self) -> bool:
        return self.missing is not None or self.matched == self.ours == self.published


@dataclass(frozen=True)
class Outputs:
    """The largest difference between our outputs and the public implementation's, float32.

    Attributes:
        difference: largest absolute difference; None where the public implementation is not here.
        largest: largest absolute public value.
        note: what was put aside so that the two can be equal.
        missing: the package that is not here.
    """

    architecture: str
    what: str
    public: str
    how: Literal["live", "recorded"]
    difference: float | None
    largest: float
    note: str = ""
    missing: str | None = None

    @property
    def tolerance(self) -> float:
        """Largest difference that passes."""
        return TOLERANCE * self.largest

    @property
    def ok(self) -> bool:
        return self.missing is not None or (self.difference is not None and self.difference <= self.tolerance)


@dataclass(frozen=True)
class Trained:
    """What trains in a stage, and how many parameters that is."""

    model: str
    stage: str
    parts: tuple[str, ...]
    counted: int


@dataclass(frozen=True)
class Comparison:
    """Ours and the public implementation on the same weights and inputs, still to be run.

    Attributes:
        run: our output and the public one (tensors of one shape), or the figures recorded of it.
        public: package and class, or repository and commit.
    """

    what: str
    public: str
    run: Callable[[], tuple[Tensor, Tensor | Mapping[str, Any]]]
    note: str = ""


@dataclass
class Report:
    """All rows, in the order in which they were found."""

    parameters: list[Parameters] = field(default_factory=list)
    names: list[Names] = field(default_factory=list)
    outputs: list[Outputs] = field(default_factory=list)
    trained: list[Trained] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether all that could be compared is equal."""
        return all(row.ok for rows in (self.parameters, self.names, self.outputs) for row in rows)


def published() -> dict[str, str]:
    """The presets that have a public counterpart -> their architecture."""
    known = (name for name in registry.architectures() if importlib.util.find_spec(f"x2i.model.{name}.verify"))
    return {model: name for name in known for model in _module(name).PUBLISHED}


def verify(models: Sequence[str] = (), done: Callable[[], None] = lambda: None) -> Report:
    """Run all comparisons of some presets (default: all that have a public counterpart).

    Args:
        models: names of presets.
        done: called after each of `steps(models)` steps.

    Raises:
        RecipeError: a name that is no preset, or a preset without a public counterpart.
    """
    report = Report()
    for model in wanted(models):
        module = _module(published()[model])
        report.parameters += module.parameters(model)
        report.names += module.names(model)
        report.trained += trained(model)
        done()
    for architecture in dict.fromkeys(published()[model] for model in wanted(models)):
        for comparison in _module(architecture).outputs():
            report.outputs.append(compared(architecture, comparison))
            done()
    return report


def steps(models: Sequence[str] = ()) -> int:
    """How many steps `verify` takes."""
    known = wanted(models)
    return len(known) + sum(len(_module(a).outputs()) for a in {published()[model] for model in known})


def wanted(models: Sequence[str]) -> list[str]:
    """The presets that are meant. Raises RecipeError."""
    known = published()
    for model in models:
        registry.preset(model, "verify")
        if model not in known:
            raise RecipeError(f"verify: nothing is published of {model!r} to compare with; known: {', '.join(known)}")
    return list(dict.fromkeys(models)) or list(known)


def compared(architecture: str, comparison: Comparison) -> Outputs:
    """Run one comparison. A package that is not here makes a row that says so."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these products are small: more threads only wait for each other
    how: Literal["live", "recorded"] = "live"
    try:
        with torch.no_grad():
            ours, public = comparison.run()
            if isinstance(public, Tensor):
                difference, largest = recorded.distance(ours, public), public.abs().max().item()
            else:
                how, largest = "recorded", float(public["largest"])
                difference = recorded.distance_from_figures(ours, public)
    except ModuleNotFoundError as error:
        missing = absent(error)
        return Outputs(architecture, comparison.what, comparison.public, how, None, 0.0, comparison.note, missing)
    finally:
        torch.set_num_threads(threads)
    return Outputs(architecture, comparison.what, comparison.public, how, difference, largest, comparison.note)


def absent(error: ModuleNotFoundError) -> str:
    """The package that is not here. Raises the error again if it is a module of ours."""
    package = (error.name or "").split(".")[0]
    if package in ("", "x2i"):
        raise error
    return package


@cache
def on_meta(model: str) -> Model[Any]:
    """A preset's network without memory."""
    with torch.device("meta"):
        return registry.build(registry.preset(model))


def count(model: str, *prefixes: str) -> int:
    """Parameters of a preset whose names begin so; of tied ones each once."""
    return sum(p.numel() for n, p in on_meta(model).named_parameters() if n.startswith(prefixes or ("",)))


def trained(model: str) -> list[Trained]:
    """The stages of a preset's architecture, if it names any."""
    stages: Mapping[str, tuple[str, ...]] = getattr(
        importlib.import_module(f"x2i.model.{published()[model]}.config"), "STAGES", {}
    )
    parts = on_meta(model).parts
    return [
        Trained(model, stage, names, count(model, *(prefix for name in names for prefix in parts[name])))
        for stage, names in stages.items()
    ]


def shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names -> shapes of a state."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def below(named: Mapping[str, tuple[int, ...]], prefix: str) -> dict[str, tuple[int, ...]]:
    """Those with a prefix, without it."""
    return {name.removeprefix(prefix): shape for name, shape in named.items() if name.startswith(prefix)}


def digest(named: Mapping[str, tuple[int, ...]]) -> str:
    """SHA-256 of the sorted lines `name shape`, the shape as in `3x4`."""
    lines = sorted(f"{name} {'x'.join(map(str, shape))}" for name, shape in named.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def matched(
    model: str, part: str, ours: Mapping[str, tuple[int, ...]], theirs: Mapping[str, tuple[int, ...]], source: str
) -> Names:
    """Names and shapes of both sides, one by one."""
    equal = sum(theirs.get(name) == shape for name, shape in ours.items())
    return Names(model, part, equal, len(ours), len(theirs), source)


def matched_digest(
    model: str, part: str, ours: Mapping[str, tuple[int, ...]], theirs: Sequence[Any], source: str
) -> Names:
    """Names and shapes against a recorded number and digest: all match, or nothing is known."""
    number, digested = theirs
    return Names(model, part, len(ours) if digest(ours) == digested else 0, len(ours), number, source)


def version(*packages: str) -> str:
    """`package 1.2.3` of each, or its bare name if it is not here."""
    return ", ".join(_version(package) for package in packages)


def _version(package: str) -> str:
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return package


def largest(rows: Iterable[Outputs]) -> Outputs | None:
    """The row with the largest difference as a share of its largest value."""
    measured = [row for row in rows if row.difference is not None and row.largest]
    return max(measured, key=lambda row: (row.difference or 0.0) / row.largest, default=None)


def _module(architecture: str) -> Any:
    return importlib.import_module(f"x2i.model.{architecture}.verify")
