"""`audit`: one self-contained HTML report of a corpus, to be looked at by a person who must trust it.

    ask.py         SQL with bounded answers          thresholds.py  what the recipe's conditions compare
    scores.py      how values are spread             evidence.py    nearest rows, pairs, quarantine, put right
    gallery.py     samples out of the shards         pictures.py    thumbnails
    limits.py      benchmarks, quotas                seen.py        boxes, joints, labels
    overlay.py     … drawn over a picture
    charts.py      histograms, the funnel's bands    page.py        the template and its filters

Nothing here grows with the corpus but the time that DuckDB takes to count: every list is bounded.
The same corpus gives the same report, byte for byte.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from x2i.base.errors import RecipeError, X2IError
from x2i.base.files import write_text

if TYPE_CHECKING:
    from x2i.corpus.audit.page import Report, Step
    from x2i.corpus.corpus import Corpus

log = logging.getLogger(__name__)

#: Rows of the selection (`row_id`, `source`, `unit`, `index`) to small JPEGs by row_id; missing where there is none.
Thumbnails = Callable[[list[dict[str, Any]]], Mapping[str, bytes]]


@dataclass(frozen=True)
class Limits:
    """How much a report shows."""

    per_task: int = 6
    nearest: int = 6
    pairs: int = 24
    per_reason: int = 12
    per_fix: int = 4
    per_annotator: int = 6
    side: int = 320  # longer side of a thumbnail, in pixels


@dataclass(frozen=True)
class Written:
    """Where the report lies, its bytes, the pictures in it, and whether the corpus's figures add up."""

    report: str
    bytes: int
    pictures: int
    unreachable: int
    sound: bool


def default_path(corpus: str | Path) -> Path:
    """`CORPUS-report.html` beside the corpus; of a corpus behind a URL, in the current directory."""
    if "://" in str(corpus):
        return Path(str(corpus).rstrip("/").rpartition("/")[2] + "-report.html")
    folder = Path(corpus).resolve()
    return folder.with_name(f"{folder.name}-report.html")


def audit(
    path: str | Path,
    out: str | Path | None = None,
    thumbnails: Thumbnails | None = None,
    limits: Limits | None = None,
    say: Callable[[str], None] = log.info,
) -> Written:
    """Write the report of a corpus.

    Args:
        path: a corpus (folder or fsspec URL).
        out: the HTML file; default `default_path(path)`.
        thumbnails: pictures of rows that are not in the corpus, from their sources; None shows placeholders.
        say: is told what is being done.

    Raises:
        X2IError: no corpus, or one whose Parquet files cannot be read.
        RecipeError: `out` lies within the corpus, whose files are fixed and verified.
    """
    import duckdb

    from x2i.corpus.audit.page import render
    from x2i.corpus.corpus import Corpus

    corpus = Corpus(path)
    target = Path(out) if out is not None else default_path(path)
    _refuse_inside(corpus, target)
    try:
        report = gather(corpus, thumbnails, limits or Limits(), say)
    except (duckdb.Error, OSError) as error:
        raise X2IError(f"{path}: cannot be audited: {error}\n`x2i verify {path}` says what is damaged.") from error
    say("writing the page")
    # a lone surrogate (a caption from anywhere) has no UTF-8
    page = render(report).encode("utf-8", "replace").decode("utf-8")
    write_text(target, page)
    sound = all(good for good, _ in report.checks)
    return Written(str(target), target.stat().st_size, page.count("data:image/"), report.unreachable, sound)


def _refuse_inside(corpus: Corpus, target: Path) -> None:
    if isinstance(corpus.path, Path) and target.resolve().is_relative_to(corpus.path.resolve()):
        raise RecipeError(f"--out: {target} lies within the corpus, whose files are verified; name a file beside it")
    if target.is_dir():
        raise RecipeError(f"--out: {target} is a folder; name a file, e.g. {target / 'report.html'}")


def gather(corpus: Corpus, thumbnails: Thumbnails | None, limits: Limits, say: Callable[[str], None]) -> Report:
    """Everything that the page shows."""
    from x2i.corpus.audit import evidence
    from x2i.corpus.audit.gallery import galleries, kept_pictures
    from x2i.corpus.audit.limits import benchmarks, quotas
    from x2i.corpus.audit.page import Report
    from x2i.corpus.audit.scores import scores
    from x2i.corpus.audit.seen import seen
    from x2i.corpus.audit.thresholds import conditions
    from x2i.corpus.manifest import refuse_older
    from x2i.corpus.tombstones import FORGOTTEN

    refuse_older(corpus.sql("from samples limit 0").columns, corpus.path)
    say("counting the rows again")
    found = conditions(corpus)
    checks, steps, sources = _funnel(corpus, {c.name: c.text for c in found})
    say("what lies nearest to the thresholds")
    judged = evidence.judged(corpus, found, limits.nearest)
    say("how the scores are spread")
    drawn, not_drawn = scores(corpus, found)
    say("what the annotators saw")
    looked = seen(corpus, limits.per_annotator)
    say("duplicates, quarantine, what was put right")
    twins = evidence.duplicates(corpus, limits.pairs)
    clear_of = benchmarks(corpus, limits.pairs, limits.side, thumbnails is not None)
    mended = evidence.put_right(corpus, limits.per_fix)
    bad = evidence.quarantine(corpus, limits.per_reason)
    rows = evidence.shown(
        [
            *([*n.kept, *n.fell] for j in judged for n in j.nearest),
            *(j.sample for j in judged),
            *([p.dropped, p.survivor] for p in twins.pairs),
            *([m.row for m in b.matches] for b in clear_of),
            mended.rows,
            bad.rows,
            *([look.row for look in s.looks] for s in looked),
        ]
    )
    say(f"pictures of {len(rows):,} rows")
    pictures = kept_pictures(corpus, [r["row_id"] for r in rows if r["kept"]], limits.side)
    # a picture that was forgotten is not fetched from its source again
    others = [r for r in rows if r["row_id"] not in pictures and r["reason"] != FORGOTTEN]
    pictures |= _from_sources(thumbnails, others)
    # of what could not be read or decoded, no picture is expected
    unreachable = sum(
        r["row_id"] not in pictures and r["stage"] not in ("source", "decode", "assembly") for r in others
    )
    say("a gallery for each task")
    shelves = galleries(corpus, limits.per_task, limits.side)
    return Report(
        corpus.info,
        checks,
        steps,
        sources,
        shelves,
        judged,
        drawn,
        not_drawn,
        looked,
        twins,
        clear_of,
        quotas(corpus),
        mended,
        bad,
        pictures,
        unreachable,
    )


def _from_sources(thumbnails: Thumbnails | None, rows: list[dict[str, Any]]) -> dict[str, bytes]:
    if thumbnails is None or not rows:
        return {}
    try:
        return dict(thumbnails(rows))
    except (OSError, X2IError) as error:  # a source that is gone costs its pictures, not the report
        log.warning("no pictures of rows that are not in the corpus: %s", error)
        return {}


def _funnel(corpus: Corpus, texts: dict[str, str]) -> tuple[list[tuple[bool, str]], list[Step], list[dict[str, Any]]]:
    """(checks of corpus.json against the tables, steps of the funnel, rows of each source)."""
    from x2i.corpus.audit.ask import ask
    from x2i.corpus.audit.evidence import QUARANTINE, recount
    from x2i.corpus.audit.page import Step
    from x2i.corpus.rules import quota_said
    from x2i.corpus.tombstones import FORGOTTEN, OWN, PARTNER

    counts = corpus.info["counts"]
    fell = recount(corpus)
    sources = ask(
        corpus,
        "select source, count(*) as rows, count(*) filter (kept) as kept from selection group by source order by rows desc, source",
    )
    rows_in, kept = sum(s["rows"] for s in sources), sum(s["kept"] for s in sources)
    (samples,) = ask(corpus, "select count(*) as n from samples")
    lost = sum(f["rows"] for f in fell)
    checks = [
        (rows_in == kept + lost, f"{rows_in:,} rows in = {kept:,} rows out + {lost:,} that fell"),
        (
            (rows_in, kept) == (counts["rows_in"], counts["rows_out"]) and fell == corpus.info["funnel"],
            "the verdicts in selection.parquet are those that corpus.json counts",
        ),
        (
            samples["n"] == counts["samples"],
            f"manifest.parquet holds {samples['n']:,} of {counts['samples']:,} samples",
        ),
    ]
    steps, left = [], rows_in
    for f in fell:
        stage, reason = str(f["stage"]), str(f["reason"])
        note, target = "", "quarantine"
        if stage == "where":
            note, target = texts.get(reason, ""), f"where-{reason}"
        elif stage == "duplicate":
            target = "duplicates"
        elif stage == "contaminated":
            note, target = "too near to an image of that benchmark", "benchmarks"
        elif stage == "quota":
            note, target = quota_said(corpus.info["recipe"]["select"]["quotas"][reason]), "quotas"
        elif stage == "forgotten":
            note, target = OWN if reason == FORGOTTEN else PARTNER, "funnel"
        elif stage not in QUARANTINE:
            target = "funnel"
        steps.append(Step(stage, reason, note, left, f["rows"], target))
        left -= f["rows"]
    return checks, steps, sources
