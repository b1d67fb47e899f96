"""`x2i ledger`: what a run has consumed, and what each sample lost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from x2i.cli.console import console, print_json, table

if TYPE_CHECKING:
    import duckdb
    from rich.table import Table

_BY = ("task", "source", "stage", "corpus")


def ledger(
    run: Annotated[Path, typer.Argument(help="A run's output folder.", show_default=False)],
    by: Annotated[str, typer.Option(help="Group by task, source, stage or corpus.")] = "task",
    image: Annotated[
        str | None, typer.Option(help="Which steps saw this image: its SHA-256, or the beginning of it.")
    ] = None,
    key: Annotated[str | None, typer.Option(help="Which steps saw the sample of this key.")] = None,
    spikes: Annotated[
        int, typer.Option(min=0, help="Show so many steps whose loss stands out, with the samples that caused it.")
    ] = 0,
    sql: Annotated[
        str | None, typer.Option(help="A query over the view `ledger`, as select count(*) from ledger.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Show what a training run consumed: samples, repeats and losses; which steps saw an image; where the loss spiked.

    Steps count from 1 over all stages. A key that it names leads to its source with `x2i trace`.

    Example: x2i ledger runs/quickstart/train --spikes 3
    """
    from x2i.base.errors import RecipeError
    from x2i.trainer.ledger import opened

    if by not in _BY:
        raise RecipeError(f"--by {by}: give one of {', '.join(_BY)}")
    if sum(bool(given) for given in (image, key, spikes, sql)) > 1:
        raise RecipeError("give one of --image, --key, --spikes and --sql")
    with opened([run]) as connection:
        if sql:
            title, rows = "The query's answer", _asked(connection, sql)
        elif image or key:
            title, rows = "Steps that saw it", _seen(connection, image, key)
        elif spikes:
            title, rows = "Steps whose loss stands out", _spikes(connection, spikes)
        else:
            title, rows = f"What the run consumed, by {by}", _totals(connection, by)
    if as_json:
        print_json(rows)
        return
    if not rows:
        console.print("nothing")
        return
    console.print(_table(title, rows))


#: Of the totals: what stands above their columns.
_HEADS = {"different": "keys", "repeated": "each", "replaced": "spares"}


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    told = [{name: _text(value) for name, value in row.items()} for row in rows]
    for row in told:
        if "loss_at_the_end" in row:  # fewer columns: a terminal is narrow
            end = row.pop("loss_at_the_end")
            row["loss"] = row.pop("mean_loss") + (f" → {end}" if end else "")
            row["steps"] = f"{row.pop('first_step')}–{row.pop('last_step')}"
            del row["images"], row["tokens_learned"]
    shown = table(title, *(_HEADS.get(name, name.replace("_", " ")) for name in told[0]))
    for column in shown.columns:
        column.no_wrap = column.header in (shown.columns[0].header, "loss")
    for row in told:
        shown.add_row(*row.values())
    return shown


def _totals(connection: duckdb.DuckDBPyConnection, by: str) -> list[dict[str, Any]]:
    return _rows(
        connection,
        f"""
        select {by}, count(*) as samples, count(distinct key) as different, count(distinct image_id) as images,
               count(*) / count(distinct key) as repeated, min(step) as first_step, max(step) as last_step,
               avg(loss) as mean_loss,
               avg(loss) filter (where step > (select max(step) from ledger) * 0.9) as loss_at_the_end,
               sum(length) as tokens, sum(tokens) as tokens_learned, count(replaced) as replaced
        from ledger group by {by} order by {by}
        """,
    )


def _seen(connection: duckdb.DuckDBPyConnection, image: str | None, key: str | None) -> list[dict[str, Any]]:
    where = "starts_with(image_id, ?)" if image else "key = ?"
    query = f"select step, stage, task, key, loss, t from ledger where {where} order by step, key"
    return _rows(connection, query, [image or key])


def _spikes(connection: duckdb.DuckDBPyConnection, count: int) -> list[dict[str, Any]]:
    """Steps by how far their loss lies above the median of the 50 around, in median absolute deviations.

    A sample's part is its loss over the mean of its task: harder tasks alone make no spike.
    """
    return _rows(
        connection,
        """
        with relative as (select *, loss / nullif(avg(loss) over (partition by stage, task), 0) as part from ledger),
        steps as (select step, any_value(stage) as stage, avg(part) as mean, max_by(key, part) as worst_sample,
                         max_by(task, part) as task, max(part) as its_part, max_by(loss, part) as its_loss
                  from relative group by step),
        around as (select *, median(mean) over w as usual from steps
                   window w as (partition by stage order by step rows between 25 preceding and 25 following)),
        spread as (select *, median(abs(mean - usual)) over (partition by stage) as deviation from around)
        select step, stage, (mean - usual) / nullif(deviation, 0) as deviations_above, worst_sample, task, its_loss,
               its_part as times_its_task
        from spread order by deviations_above desc nulls last, step limit ?
        """,
        [count],
    )


def _asked(connection: duckdb.DuckDBPyConnection, sql: str) -> list[dict[str, Any]]:
    import duckdb

    from x2i.base.errors import RecipeError

    try:
        return _rows(connection, sql)
    except duckdb.Error as error:
        raise RecipeError(f"--sql: {error}") from None


def _rows(connection: duckdb.DuckDBPyConnection, query: str, values: list[Any] | None = None) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = connection.sql(query, params=values).to_arrow_table().to_pylist()
    return found


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
