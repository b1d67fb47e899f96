"""Helpers for tests of sources: small real photographs, a web server, and what every source must keep to."""

from __future__ import annotations

import contextlib
import functools
import http.server
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import skimage.data
from PIL import Image

from x2i.pipelines.sources.base import Row, Source, Unit

NAMES = ("astronaut", "chelsea", "coffee", "rocket", "camera", "coins", "moon", "page")


@functools.cache
def photo(name: str, side: int = 64, kind: str = "JPEG") -> bytes:
    """A photograph that scikit-image carries, made small, as the bytes of a file."""
    image = Image.fromarray(getattr(skimage.data, name)())
    image.thumbnail((side, side))
    out = io.BytesIO()
    image.save(out, kind, quality=90)
    return out.getvalue()


def read(source: Source) -> list[Row]:
    """All rows, after checks of what every source promises: see the comments."""
    units = list(source.plan())
    assert [u.id for u in source.plan()] == [u.id for u in units]  # a plan can be made again
    again = type(source)(source.config)  # as a worker does, which has seen no plan
    rows: list[Row] = []
    for unit in units:
        unit = Unit(unit.source, unit.spec, unit.rows)
        found = list(again.read(unit))
        assert [r.index for r in found] == list(range(len(found)))
        assert unit.rows in (None, len(found))
        for only in ({0}, set(range(1, len(found), 2)), set()):  # a part is as it is in the whole
            assert list(again.read(unit, only)) == [r for r in found if r.index in only]
        assert all((r.data is not None) or r.problem for r in found)
        rows += found
    assert len({r.location for r in rows}) == len(rows)
    assert not any(r.location.startswith("/") for r in rows)
    return rows


def problems(rows: list[Row]) -> dict[str, str]:
    """The reasons, by location."""
    return {r.location: r.problem.reason for r in rows if r.problem}


class _Quiet(http.server.SimpleHTTPRequestHandler):
    stumbles: set[str] | None = None  # paths that were asked for, if the first request of each is to fail

    def send_head(self) -> io.BytesIO | BinaryIO | None:
        if self.stumbles is not None and self.path not in self.stumbles:
            self.stumbles.add(self.path)
            self.send_error(503)
            return None
        return super().send_head()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        pass


@contextlib.contextmanager
def serve(folder: Path, stumbling: bool = False) -> Iterator[str]:
    """A folder behind http://127.0.0.1 (a server that lists folders and gives no ranges).

    With `stumbling` the first request for each path is answered with 503.
    """
    kind = type("Handler", (_Quiet,), {"stumbles": set() if stumbling else None})
    handler = functools.partial(kind, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
