"""What a run's corpora held when it began, so that it can say what has changed in them since.

RUN/corpora.json    of each corpus: samples by task and source, shards with the beginnings of their hashes, the recipe

It is small beside the corpora: some tens of bytes a shard. Samples are counted, not named: where as many went as came
of a task and source, only the shards tell.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from x2i.base.files import write_text
from x2i.corpus.corpus import Corpus
from x2i.trainer.index import ManifestReader
from x2i.trainer.table import Samples, SampleTable

FILE = "corpora.json"

_SHOWN = 6  # of each kind, in a message


def remember(output: Path, table: SampleTable) -> None:
    """Write what the run's corpora hold, unless it is written already."""
    known = _read(output)
    if [c["digest"] for c in known] == [c.digest for c in table.corpora]:
        return
    described = []
    for place, corpus in enumerate(table.corpora):
        codes: dict[tuple[str, str], list[int]] = {}
        for code, cell in enumerate(table.cells):
            if cell.corpus == place:
                codes.setdefault((cell.task, cell.source), []).append(code)
        counts = {kind: sum(len(Samples(table, each, side)) for side in range(3)) for kind, each in codes.items()}
        described.append(_described(corpus, counts))
    write_text(output / FILE, json.dumps({"format": 1, "corpora": described}, ensure_ascii=False) + "\n")


def differences(output: Path, before: Sequence[Mapping[str, Any]], corpora: Sequence[Corpus]) -> list[str]:
    """Lines that say what has changed in the corpora of a run; none if nothing has.

    Args:
        output: the run's folder.
        before: `path` and `digest` of each as run.json has them.
        corpora: those of now.
    """
    known = {str(c["digest"]): c for c in _read(output)}
    lines = []
    for place in range(max(len(before), len(corpora))):
        if place >= len(corpora):
            lines.append(f"corpora.{place}: {before[place]['path']} is not in the run file any more")
        elif place >= len(before):
            lines.append(f"corpora.{place}: {corpora[place].path} is new: {_listed(_counted(corpora[place]))}")
        elif str(before[place]["digest"]) != corpora[place].digest:
            lines += _differ(place, before[place], known.get(str(before[place]["digest"])), corpora[place])
    return lines


def leaves(old: Any, new: Any, where: str = "") -> list[str]:
    """The leaves in which two configurations differ: `stages.0.lr: was 0.001, is 0.002`."""
    if isinstance(old, list) and isinstance(new, list):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(k for k in new if k not in old)]
        return [d for k in keys for d in leaves(old.get(k), new.get(k), f"{where}.{k}" if where else str(k))]
    return [] if old == new else [f"{where}: was {json.dumps(old)}, is {json.dumps(new)}"]


def _differ(place: int, before: Mapping[str, Any], old: Mapping[str, Any] | None, corpus: Corpus) -> list[str]:
    moved = "" if str(before["path"]) == str(corpus.path) else f" (before: {before['path']})"
    lines = [
        f"corpora.{place}: {corpus.path}{moved}: its digest was {str(before['digest'])[:12]}, now it is "
        f"{corpus.digest[:12]}"
    ]
    if old is None:
        lines.append("  what it held before cannot be told: the run's folder has no record of it")
        return lines
    new = _described(corpus, _counted(corpus))
    was, now = _counts_of(old), _counts_of(new)
    apart = {kind: now.get(kind, 0) - was.get(kind, 0) for kind in sorted(was.keys() | now.keys())}
    apart = {kind: n for kind, n in apart.items() if n}
    told = f"samples: {sum(was.values()):,} before, {sum(now.values()):,} now"
    lines.append(f"  {told}: {_listed(apart, '+')}" if apart else f"  {told}, as many of each task and source")
    gone, come = old["shards"].keys() - new["shards"].keys(), new["shards"].keys() - old["shards"].keys()
    both = old["shards"].keys() & new["shards"].keys()
    changed = [n for n in both if old["shards"][n] != new["shards"][n]]
    shards = {"changed": changed, "gone": gone, "new": come}
    parts = [f"{len(names):,} {what} ({_some(sorted(names))})" for what, names in shards.items() if names]
    lines.append(f"  shards: {', '.join([*parts, f'{len(both) - len(changed):,} as before'])}")
    if told_of := leaves(old["recipe"], new["recipe"]):
        lines.append(f"  recipe: {_some(told_of, '; ')}")
    if new["forgotten"] != old["forgotten"]:
        lines.append(f"  forgotten images: {old['forgotten']:,} before, {new['forgotten']:,} now")
    return lines


def _described(corpus: Corpus, counts: Mapping[tuple[str, str], int]) -> dict[str, Any]:
    return {
        "path": str(corpus.path),
        "digest": corpus.digest,
        "samples": [[task, source, count] for (task, source), count in sorted(counts.items())],
        "shards": {s["name"]: str(s["sha256"])[:16] for s in corpus.info.get("shards", ())},
        "recipe": corpus.info.get("recipe"),
        "forgotten": len(corpus.info.get("forgotten", ())),
    }


def _counted(corpus: Corpus) -> dict[tuple[str, str], int]:
    """Samples by task and source: a pass over two narrow columns of the manifest."""
    found = ManifestReader(corpus).count(0)
    counts: dict[tuple[str, str], int] = {}
    for cell, sides in zip(found.cell.tolist(), found.counts.sum(1).tolist(), strict=True):
        task, source = found.names[cell][:2]
        counts[task, source] = counts.get((task, source), 0) + int(sides)
    return counts


def _counts_of(described: Mapping[str, Any]) -> dict[tuple[str, str], int]:
    return {(task, source): count for task, source, count in described["samples"]}


def _listed(counts: Mapping[tuple[str, str], int], sign: str = "") -> str:
    return _some([f"{task} of {source} {count:{sign},}" for (task, source), count in sorted(counts.items())])


def _some(names: Iterable[str], comma: str = ", ") -> str:
    listed = list(names)
    more = len(listed) - _SHOWN
    return comma.join([*listed[:_SHOWN], *([f"and {more:,} more"] if more > 0 else [])])


def _read(output: Path) -> list[dict[str, Any]]:
    """What is remembered; nothing where an earlier x2i began the run."""
    try:
        content = json.loads((output / FILE).read_text(encoding="utf-8"))
        return list(content["corpora"])
    except (OSError, ValueError, LookupError, TypeError):
        return []
