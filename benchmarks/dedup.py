"""Near duplicates among many hashes: time and memory, beside comparing all pairs; and whether all are found.

    python benchmarks/dedup.py [--sizes 10000,100000,1000000] [--bits 6] [--photographs FOLDER]

Three kinds of hashes. "random" is uniform. "real" is as pictures are: each hash takes its four 16-bit words from
four photographs; a quarter of them are near copies, most of few pictures, a twentieth exact copies. Without a
folder, random hashes with as many ones as zeros stand for the photographs'. "skewed" is the same from hashes whose
bits say little, such as no picture has: most of all rows are then near others.

Into both, pairs are planted at each distance from 0 to two beyond the bound. No time is shown before the result
is checked: every planted pair, each survivor, 200 rows against all others; and up to `--all-pairs` hashes the
whole result, against the plain way. Each run has a process of its own. Linux only (peak memory from /proc).
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from x2i.base.files import remove
from x2i.pipelines.annotators.phash import phash
from x2i.pipelines.images import BadImage, decode, read_header
from x2i.pipelines.select.dedup import NearDuplicates, near_duplicates

BENCH = Path(__file__).resolve().parent.parent / "runs" / "bench_dedup"
PLANTED, CHECKED = 100, 200  #: pairs at each distance; rows compared with all others

console = Console(width=None if Console().is_terminal else 140)


def all_pairs(hashes: np.ndarray, bits: int) -> NearDuplicates:
    """The plain way: each hash against all better ones that stay, in blocks."""
    kept = np.empty(len(hashes), np.int64)
    count = 0
    out: list[tuple[int, int, int]] = []
    for start in range(0, len(hashes), 256):
        block = hashes[start : start + 256]
        best = np.full(len(block), -1)
        for low in range(0, count, 1 << 14):
            near = np.bitwise_count(block[:, None] ^ hashes[kept[low : min(low + (1 << 14), count)]]) <= bits
            new = near.any(axis=1) & (best < 0)
            best[new] = kept[low + near[new].argmax(axis=1)]
        own = np.bitwise_count(block[:, None] ^ block)
        first = count
        for i in range(len(block)):
            if best[i] < 0:
                mine = kept[first:count]
                near_mine = np.flatnonzero(own[i][mine - start] <= bits)
                if not len(near_mine):
                    kept[count] = start + i
                    count += 1
                    continue
                best[i] = mine[near_mine[0]]
            out.append((start + i, int(best[i]), int(np.bitwise_count(block[i] ^ hashes[best[i]]))))
    return NearDuplicates(*np.array(out, np.int64).reshape(-1, 3).T)


def photographs(folder: Path) -> np.ndarray:
    """Distinct pHashes of the JPEG and PNG files below a folder."""
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png")):
        data = path.read_bytes()
        try:
            found.append(phash(decode(data, read_header(data), 256)))
        except BadImage:
            continue
    if not found:
        raise SystemExit(f"{folder}: no photograph")
    return np.unique(np.array(found, np.uint64))


def stand_in(rng: np.random.Generator) -> np.ndarray:
    """1,500 hashes with 32 ones, as pHashes have."""
    return pack(rng.permuted(np.tile([False, True], (1500, 32)), axis=1))


def skewed(rng: np.random.Generator) -> np.ndarray:
    """1,500 hashes each of whose bits has its own share of ones, many of them far from a half."""
    return pack(rng.random((1500, 64)) < rng.beta(0.7, 0.7, 64))


def pack(bits: np.ndarray) -> np.ndarray:
    """Hashes from bool [N, 64]."""
    return np.packbits(bits, axis=1).view(">u8").ravel().astype(np.uint64)


def flipped(hashes: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    """With up to so many bits the other way."""
    out = hashes.copy()
    times = rng.integers(0, most + 1, len(out))
    for step in range(most):
        some = np.flatnonzero(times > step)
        out[some] ^= np.uint64(1) << rng.integers(0, 64, len(some), dtype=np.uint64)
    return out


def real(count: int, base: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """See the top of the file."""
    out = np.zeros(count, np.uint64)
    for word in range(4):
        out |= base[rng.integers(0, len(base), count)] & np.uint64(0xFFFF << 16 * word)
    copies, exact = count // 4, count // 20
    parents = (0.7 * count * rng.random(copies) ** 4).astype(np.int64)  # some have very many copies
    out[-copies:] = flipped(out[parents], 12, rng)
    out[-copies - exact : -copies] = out[rng.integers(0, 100, exact)]
    return rng.permutation(out)


def plant(hashes: np.ndarray, bits: int, rng: np.random.Generator) -> np.ndarray:
    """Put random hashes in the place of the first, and near copies of them in that of the last; the distance of each."""
    distances = np.repeat(np.arange(bits + 3), PLANTED)
    hashes[: len(distances)] = rng.integers(0, 2**64, len(distances), dtype=np.uint64)  # nothing else is near these
    for i, distance in enumerate(distances.tolist()):
        chosen = rng.choice(64, distance, replace=False).astype(np.uint64)
        hashes[len(hashes) - len(distances) + i] = hashes[i] ^ np.bitwise_or.reduce(np.uint64(1) << chosen, initial=0)
    return distances


def wrong(hashes: np.ndarray, bits: int, distances: np.ndarray, got: NearDuplicates) -> str:
    """What is wrong with a result; empty where nothing is."""
    fell = np.full(len(hashes), -1)
    fell[got.dropped] = got.survivor
    if (fell[got.survivor] >= 0).any() or (got.survivor >= got.dropped).any():
        return "a row fell to one that is gone, or is worse"
    if (np.bitwise_count(hashes[got.dropped] ^ hashes[got.survivor]) != got.distance).any() or (
        got.distance > bits
    ).any():
        return "a distance"
    first = len(hashes) - len(distances)
    if (fell[first:][distances <= bits] < 0).any():
        return "a planted pair was missed"
    stays = fell < 0
    rng = np.random.default_rng(0)
    for row in rng.integers(0, len(hashes), CHECKED).tolist():
        near = np.flatnonzero(stays[:row] & (np.bitwise_count(hashes[:row] ^ hashes[row]) <= bits))
        if fell[row] != (near[0] if len(near) else -1):
            return f"row {row}"
    return ""


def peak() -> int:
    """The most memory that this process has held so far, bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def measure(name: str, way: Callable[[np.ndarray, int], NearDuplicates], bits: int) -> dict[str, Any]:
    """Run one way over the hashes of a file, in a process of its own; the result goes to a file beside it."""
    hashes = np.load(BENCH / f"{name}.npy")
    way(hashes[:2000].copy(), bits)  # imports, tables
    held, wall, cpu = peak(), time.perf_counter(), time.process_time()
    got = way(hashes, bits)
    cost = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "memory": peak() - held}
    np.save(BENCH / f"{name}.{way.__name__}.npy", np.stack([got.dropped, got.survivor, got.distance]))
    return cost


def alone(*arguments: Any) -> dict[str, Any]:
    """`measure` in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, arguments)


def compare(kind: str, hashes: np.ndarray, bits: int, plain: bool, rng: np.random.Generator) -> list[str]:
    """Measure and check; a line of the table."""
    distances = plant(hashes, bits, rng)
    np.save(BENCH / f"{kind}.npy", hashes)
    cost = alone(kind, near_duplicates, bits)
    got = NearDuplicates(*np.load(BENCH / f"{kind}.near_duplicates.npy"))
    fault = wrong(hashes, bits, distances, got)
    other = "–"
    if plain:
        its = alone(kind, all_pairs, bits)
        other = f"{its['cpu']:.2f}"
        if not (np.load(BENCH / f"{kind}.all_pairs.npy") == np.stack([got.dropped, got.survivor, got.distance])).all():
            fault = fault or "not what comparing all pairs gives"
    fell = np.zeros(len(hashes), bool)
    fell[got.dropped] = True
    planted = fell[len(hashes) - len(distances) :][distances <= bits]
    return [
        f"{len(hashes):,}",
        kind,
        f"{cost['cpu']:.2f}",
        f"{cost['wall']:.2f}",
        other,
        f"{cost['memory'] / 1e6:,.0f}",
        f"{cost['memory'] / len(hashes):.0f}",
        f"{len(got.dropped):,}",
        f"{planted.sum()} of {len(planted)}",
        fault or ("equal" if plain else "checked"),
    ]


def main(
    sizes: Annotated[str, typer.Option(help="Numbers of hashes, with commas.")] = "10000,100000,1000000",
    bits: Annotated[int, typer.Option(min=0, max=32, help="The bound.")] = 6,
    kinds: Annotated[str, typer.Option(help="Which of random, real, skewed.")] = "random,real,skewed",
    folder: Annotated[Path | None, typer.Option("--photographs", help="A folder of photographs of your own.")] = None,
    most: Annotated[int, typer.Option("--all-pairs", help="Compare all pairs, too, up to so many hashes.")] = 100_000,
    seed: Annotated[int, typer.Option(help="Changes the hashes.")] = 0,
) -> None:
    """Measure; figures for the log."""
    BENCH.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    base = {"real": photographs(folder) if folder else stand_in(rng), "skewed": skewed(rng)}
    table = Table(
        title=f"Near duplicates, {bits} bits; {len(base['real']):,} hashes behind the real ones", title_justify="left"
    )
    columns = (
        "hashes",
        "kind",
        "CPU s",
        "wall s",
        "all pairs, CPU s",
        "MB",
        "bytes/hash",
        "dropped",
        "planted found",
        "",
    )
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i in (1, 9) else "right")
    try:
        for size in (int(s) for s in sizes.split(",")):
            for kind in kinds.split(","):
                hashes = real(size, base[kind], rng) if kind in base else rng.integers(0, 2**64, size, dtype=np.uint64)
                table.add_row(*compare(kind, hashes, bits, size <= most, rng))
    finally:
        remove(BENCH)
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
