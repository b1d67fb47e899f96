"""What `verify` finds: faults, each with its place and the remedy, in a list that cannot grow without bound."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

#: What helps against most faults: a shard is never mended in place.
AGAIN = (
    "Copy this file again from where it is whole; or remove the corpus's folder and run `x2i build` on its recipe "
    "(the annotations stay in the lake)."
)


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong.

    Attributes:
        kind: a snake_case word, for machines.
        file: relative to the corpus.
        problem: a sentence for a person.
        key: the sample, where it concerns one.
        offset: bytes from the start of `file`, where the place is known.
    """

    kind: str
    file: str
    problem: str
    key: str | None = None
    offset: int | None = None
    remedy: str = AGAIN

    def __str__(self) -> str:
        place = f"{self.file} at byte {self.offset:,}" if self.offset is not None else self.file
        sample = f" ({self.key})" if self.key else ""
        return f"{place}{sample}: {self.problem}"


@dataclass
class Faults:
    """Faults in the order in which they were found; beyond `limit` they are only counted."""

    limit: int
    found: list[Fault] = field(default_factory=list)
    more: int = 0

    def add(
        self,
        kind: str,
        file: str,
        problem: str,
        key: str | None = None,
        offset: int | None = None,
        remedy: str = AGAIN,
    ) -> None:
        """Note one fault."""
        if len(self.found) < self.limit:
            self.found.append(Fault(kind, file, problem, key, offset, remedy))
        else:
            self.more += 1

    def extend(self, other: Faults) -> None:
        """Note those of another list."""
        room = max(0, self.limit - len(self.found))
        self.found += other.found[:room]
        self.more += len(other.found[room:]) + other.more

    def __len__(self) -> int:
        return len(self.found) + self.more

    def __iter__(self) -> Iterator[Fault]:
        return iter(self.found)
