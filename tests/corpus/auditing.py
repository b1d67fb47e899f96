"""A report as a test reads it, and corpora with something changed in them."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import duckdb

from tests.corpora import Built
from x2i.cli.audit import write
from x2i.corpus.audit import Limits


class Page(HTMLParser):
    """The elements of a page, and the text below each section and article."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self._open: list[tuple[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("section", "article", "style"):
            self._open.append((tag, dict(attrs).get("id")))

    def handle_endtag(self, tag: str) -> None:
        if self._open and self._open[-1][0] == tag:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        for tag, name in self._open:
            self.texts[name or tag] = self.texts.get(name or tag, "") + data

    def count(self, tag: str, css: str = "") -> int:
        return sum(t == tag and css in (a.get("class") or "").split() if css else t == tag for t, a in self.tags)


def report(built: Built, **options: Any) -> tuple[Page, str]:
    """The report as `x2i audit` writes it, sources and all."""
    with contextlib.chdir(built.root):
        written = write("corpus", Path("report.html"), Limits(**options), quiet=True)
    assert written.sound
    text = (built.root / "report.html").read_text(encoding="utf-8")
    assert written.bytes == len(text.encode())
    return Page(text), text


def edit_info(built: Built, change: Callable[[dict[str, Any]], None]) -> None:
    path = built.corpus / "corpus.json"
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))


def edit_selection(built: Built, query: str) -> None:
    """Replace the selection by a query over `old`."""
    _edit(built, "selection.parquet", query)


def edit_manifest(built: Built, query: str) -> None:
    """Replace the manifest by a query over `old`."""
    _edit(built, "manifest.parquet", query)


def _edit(built: Built, name: str, query: str) -> None:
    path, new = built.corpus / name, built.root / "new.parquet"
    with duckdb.connect() as connection:
        connection.read_parquet(str(path)).create_view("old")
        connection.execute(f"copy ({query}) to '{new}' (format parquet)")
    shutil.move(new, path)
