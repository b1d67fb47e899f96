"""What sources share whose input is files with certain endings, named by a path, a pattern, a folder, or a list."""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from typing import Any, ClassVar

from x2i.pipelines.sources._files import Root, default_name
from x2i.pipelines.sources._paths import Found, find, root_of
from x2i.pipelines.sources.base import Source


class FiledSource(Source):
    """A source of files. Its configuration has `path`; `endings` are those of its files, `files` what to call them.

    If they lie in known places of a dataset's folder, `listing` names these.
    """

    endings: ClassVar[tuple[str, ...]]
    files: ClassVar[str]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.name = config.name or default_name(config.path, self.kind)
        self._ignored: Counter[str] = Counter()

    @property
    def listing(self) -> str | list[str]:
        """Where the files are, as `_paths.find` takes it."""
        paths: str | list[str] = self.config.path
        return paths

    @cached_property
    def _root(self) -> Root:
        return root_of(self.listing, self.endings)

    def _find(self) -> Found:
        """The files. Raises RecipeError if there are none; what else lies beside them is `ignored`."""
        found = find(self.listing, self.endings, self.files)
        self._ignored = found.ignored()
        return found

    def ignored(self) -> dict[str, int]:
        """Files beside the source's own, counted by extension (after `plan`)."""
        return dict(sorted(self._ignored.items()))
