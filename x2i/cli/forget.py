"""`x2i forget`: take images out of a corpus, with everything made of them, so that they do not come back."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from x2i.base.errors import RecipeError, X2IError
from x2i.cli.console import console, print_json, table

if TYPE_CHECKING:
    from x2i.cli.seen import Seen
    from x2i.corpus.forget import Forgotten, Match
    from x2i.corpus.lookup import Near

#: Lines of a table before it is cut off; --json has all.
MANY = 20


def forget(
    corpus: Annotated[Path, typer.Argument(help="The corpus: a folder.", show_default=False)],
    sha256: Annotated[
        list[str] | None,
        typer.Option(metavar="HASH", help="SHA-256 of an image, or its beginning; repeatable, like the others."),
    ] = None,
    url: Annotated[list[str] | None, typer.Option(metavar="URL", help="An address in the rows' metadata.")] = None,
    source: Annotated[list[str] | None, typer.Option(metavar="NAME", help="A source: all of its images.")] = None,
    location: Annotated[
        list[str] | None, typer.Option(metavar="PLACE", help="Of that source only the row at this location.")
    ] = None,
    near: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Images that look like this one (by pHash).")
    ] = None,
    bits: Annotated[int, typer.Option(min=0, max=16, help="Bits of the pHash in which those may differ.")] = 6,
    why: Annotated[str, typer.Option(help="One word for the tombstone, e.g. consent, takedown, licence.")] = "asked",
    runs: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR", help="Where training runs lie; checkpoints that saw an image are named. Default: runs"
        ),
    ] = None,
    lake: Annotated[Path | None, typer.Option(help="The lake, if it is not where the recipe says.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go; change nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Forget images: they go from the corpus with their crops, maps, pairs and few-shot sequences, and stay away.

    Only the shards concerned are written again. Tombstones in the corpus and in its lake keep every later build from
    bringing the images back. Sources and annotations are left alone: delete those files yourself. Stop runs that train
    on the corpus first: they cannot go on with another one.

    Example: x2i forget runs/quickstart/corpus --sha256 596aa1e7cb

    What would go: x2i forget runs/quickstart/corpus --near cat.jpg --bits 8 --dry-run

    A row of a source: x2i forget runs/web/corpus --source laion --location 00003.tar#000031.jpg --why takedown --yes
    """
    if not any((sha256, url, source, location, near)):
        raise RecipeError("x2i forget: say which images: --sha256, --url, --source (with --location) or --near")
    if as_json and not (yes or dry_run):
        raise RecipeError("x2i forget: --json asks nothing: give --yes or --dry-run as well")
    from x2i.corpus import forget as forgets
    from x2i.corpus.tombstones import check_word

    check_word(why)
    forgets.put_right(corpus)
    looks = _looks(corpus, near or [], bits)
    matches = forgets.find(
        corpus, sha256=sha256 or (), urls=url or (), sources=source or (), locations=location or (), near=looks
    )
    ids = [m.image_id for m in matches]
    planned = forgets.would_go(corpus, ids)
    saw = _seen(runs, corpus, ids)
    if not as_json:
        show(matches, planned, saw)
    if not (dry_run or yes or not planned.images):
        goes = f"{_count(len(planned.images), 'image')} and {_count(_samples(planned), 'sample')}"
        typer.confirm(f"Forget {goes}?", abort=True, err=True)
    if not dry_run and planned.images:
        _keep(runs, corpus)
    done = planned if dry_run else forgets.forget(corpus, ids, why, lake)
    if as_json:
        extra = {"matches": [asdict(m) for m in matches], "seen": [asdict(s) for s in saw], "dry_run": dry_run}
        print_json(asdict(done) | {"changed": bool(done.images) and not dry_run} | extra)
    else:
        show_done(done, dry_run)


def _looks(corpus: Path, files: list[Path], bits: int) -> list[Near]:
    """The pHash of pictures, made as the annotator makes it."""
    if not files:
        return []
    from x2i.corpus.corpus import Corpus
    from x2i.corpus.lookup import Near, phash_name

    info = Corpus(corpus).info
    phash_name(info)
    return [Near(str(f), _phash(f, info), bits, hashlib.sha256(f.read_bytes()).hexdigest()) for f in files]


def _phash(file: Path, info: dict[str, Any]) -> int:
    from x2i.pipelines.annotators.base import Batch, Decoding, Item
    from x2i.pipelines.annotators.phash import PHash
    from x2i.pipelines.images import BadImage, decode, read_header

    decoding = Decoding.model_validate(info["recipe"]["decode"])
    try:
        data = file.read_bytes()
        header = read_header(data, decoding.max_pixels)
        item = Item("", None, data, header, decode(data, header, decoding.shorter_side))
    except (OSError, BadImage) as error:
        raise RecipeError(f"--near {file}: cannot be read: {error}") from None
    return int(PHash(PHash.Config(), decoding)(Batch([item]))["hash"][0].as_py())


def _seen(folders: list[Path] | None, corpus: Path, ids: list[str]) -> list[Seen]:
    for folder in folders or ():
        if not folder.is_dir():
            raise RecipeError(f"--runs {folder}: no such folder")
    looked = [f for f in folders or [Path("runs")] if f.is_dir()]
    if not looked:
        return []
    from x2i.cli.seen import seen

    try:
        return seen(looked, corpus, ids)
    except X2IError as error:  # a damaged checkpoint is no reason to keep an image
        console.print(f"which checkpoints saw the images cannot be told: {error}", markup=False, soft_wrap=True)
        return []


def _keep(folders: list[Path] | None, corpus: Path) -> None:
    """Before the corpus changes, keep what the next question after its images needs."""
    looked = [f for f in folders or [Path("runs")] if f.is_dir()]
    if looked:
        from x2i.cli.seen import keep

        keep(looked, corpus)


def show(matches: list[Match], planned: Forgotten, saw: list[Seen]) -> None:
    """Print which images are meant, what goes with them, and which checkpoints saw them."""
    found = table("The images", "image", "asked for by", "rows", "where", "bits apart")
    for match in matches[:MANY]:
        where = "forgotten before" if match.forgotten else "\n".join(match.locations)
        apart = "" if match.distance is None else str(match.distance)
        found.add_row(match.image_id[:16], Text(match.by), f"{match.rows:,}", Text(where), apart)
    if len(matches) > MANY:
        found.add_row("…", f"and {len(matches) - MANY:,} more", "", "", "")
    console.print(found)
    if planned.images:
        console.print(_goes(planned))
    show_seen(saw)


def _goes(planned: Forgotten) -> Any:
    goes = table("What goes with them", "what", "figure")
    goes.add_row("rows of these images", f"{planned.rows:,}")
    goes.add_row("other rows that keep no sample", f"{planned.lost:,}")
    for task, count in planned.samples.items():
        goes.add_row(Text(f"samples: {task}"), f"{count:,}")
    goes.add_row("samples", f"{_samples(planned):,}", style="bold")
    shards = f"{planned.rewritten:,} written again, {planned.dropped:,} dropped, {planned.untouched:,} untouched"
    goes.add_row("shards", shards)
    return goes


def show_seen(saw: list[Seen]) -> None:
    """Print the checkpoints that saw an image."""
    if not saw:
        return
    out = table("Checkpoints that saw them (their previews and logs may show them)", "checkpoint", "steps", "draws")
    for one in saw[:MANY]:
        if one.unknown:
            steps, draws = f"cannot be told: {one.unknown}", ""
        elif one.through:
            steps, draws = f"began with {one.through}, which did", ""
        else:
            steps, draws = f"{one.first:,} to {one.last:,}", f"{one.draws:,}"
        out.add_row(Text(one.checkpoint), Text(steps), draws)
    if len(saw) > MANY:
        out.add_row("…", f"and {len(saw) - MANY:,} more", "")
    console.print(out)


def show_done(done: Forgotten, dry_run: bool) -> None:
    """Print what was done."""
    for note in done.notes:
        console.print(f"· {note}", markup=False, highlight=False, soft_wrap=True)
    if dry_run:
        console.print("[bold]a dry run[/]: nothing was changed")
        return
    if not done.images:
        console.print(f"nothing to do: forgotten before; the digest is {done.digest}", highlight=False, soft_wrap=True)
        return
    out = table("Forgotten", "what", "figure")
    changed = done.before != done.digest
    out.add_row("images", f"{len(done.images):,}" + (f", {done.already:,} before" if done.already else ""))
    out.add_row("samples gone", f"{_samples(done) if changed else 0:,}")
    out.add_row("tombstones", f"{done.corpus}/corpus.json" + (f" and {done.lake}/forgotten.jsonl" if done.lake else ""))
    out.add_row("digest", f"{done.digest}" if changed else f"{done.digest} (as before)")
    out.add_row("seconds", f"{done.seconds:.1f}")
    console.print(out)
    if changed:
        console.print(f"`x2i verify {done.corpus}` looks at every byte of what is left", markup=False, soft_wrap=True)


def _samples(result: Forgotten) -> int:
    return sum(result.samples.values())


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")
