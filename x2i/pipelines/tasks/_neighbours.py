"""Which row another one is shown with, where any would do: drawn by content, and the same whoever asks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from x2i.base.sql import literal

if TYPE_CHECKING:
    import duckdb


def neighbours(connection: duckdb.DuckDBPyConnection, salt: str, share: float) -> Iterator[tuple[str, str]]:
    """Rows with another: the next one in the order of a hash, and after the last one the first.

    Args:
        connection: as `Task.groups` gets it.
        salt: what the hash depends on beside the images' ids.
        share: of the rows of `kept`, those that get one.

    Returns:
        Pairs of `row_id`, of different images, in the first one's order.
    """
    told = literal(salt)
    found = connection.execute(
        f"""with shuffled as (
                select row_id, image_id, md5_number_lower({told} || image_id) as place,
                       md5_number_lower({told} || 'share ' || image_id) / 18446744073709551616.0 as drawn
                from kept
            ), paired as (
                select *, coalesce(lead(row_id) over by_place, first(row_id) over by_place) as other,
                       coalesce(lead(image_id) over by_place, first(image_id) over by_place) as other_image
                from shuffled
                window by_place as (order by place, image_id, row_id
                                    rows between unbounded preceding and unbounded following)
            )
            select row_id, other from paired where drawn < {share} and image_id <> other_image order by row_id"""
    )
    while some := found.fetchmany(10_000):
        yield from some
