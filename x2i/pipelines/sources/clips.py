"""Video clips, each as some of its frames, with texts in files beside them or in a labels file.

A clip's text is the first that there is of:
1. `cat.mp4.txt` or `cat.txt` beside `cat.mp4`, as a whole;
2. `cat.mp4.json` or `cat.json`, under `text_key`; the whole object goes to `meta`;
3. its record in the `labels` file: a JSON list of objects whose `id` is the clip's path or name, with or without
   its ending, as Something-Something V2 has it: `[{"id": "78687", "label": "holding potato next to …", "template":
   "Holding [something] next to [something]", "placeholders": ["potato", …]}, …]`. The record goes to `meta`.

Every frame is a row with that text. Its `meta` says, besides, of which `clip` it is (the path below the source's
root), and which `frame` (from 0) at what `time` (seconds) of how many `frames` at `fps` the container speaks;
so rows with the same `clip` in the order of `frame` are the clip. (Two with the same `frame` are the same picture: one
that stands for long, or the last, where the header says that there is a little more.) A clip whose header cannot be
read is one row, with its problem; a frame that by the header should be there, and is not (a clip that is cut off), is
a row, too.
"""

from __future__ import annotations

import json
import math
import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Generator, Iterator
from typing import Any, Literal

from pydantic import Field, model_validator

from x2i.base.errors import RecipeError
from x2i.pipelines.images import encode
from x2i.pipelines.sources._cut import cut
from x2i.pipelines.sources._filed import FiledSource
from x2i.pipelines.sources._files import File, Root, extension, why
from x2i.pipelines.sources._paths import Found
from x2i.pipelines.sources._text import Malformed, describe, jsonable, pick
from x2i.pipelines.sources._video import BadVideo, Video
from x2i.pipelines.sources.base import Problem, Row, SourceConfig, Unit

ENDINGS = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".gif")
SIDECARS = ("txt", "json")


class ClipsConfig(SourceConfig):
    """Video files, and which of their frames to take."""

    kind: Literal["clips"] = "clips"
    path: str | list[str] = Field(
        description="the clips: a folder, a pattern (clips/*.webm), a file, an fsspec URL, or a list of these; "
        "e.g. 20bn-something-something-v2"
    )
    frames: int | None = Field(
        8,
        ge=1,
        le=100_000,
        description="frames of a clip, at even distances; with `frames_per_second` the most; e.g. 8",
    )
    frames_per_second: float | None = Field(
        None, gt=0, le=240, description="frames for each second of a clip, from its first frame on, e.g. 0.5"
    )
    labels: str | None = Field(
        None, description="JSON list of {id, label, template, placeholders}, e.g. labels/train.json"
    )
    unlabelled: Literal["keep", "skip"] = Field(
        "keep", description="clips that the labels file does not name; skip leaves them out, e.g. other splits' clips"
    )
    text_key: str | None = Field(
        None,
        description="key of .json sidecars and labels that holds the text, e.g. template; "
        "default: the first of caption, text, prompt, label that has one",
    )
    format: Literal["jpg", "png"] = Field("jpg", description="how frames are kept: jpg, or png without loss")
    quality: int = Field(95, ge=1, le=100, description="of JPEG, e.g. 95")
    unit_clips: int = Field(32, ge=2, le=10_000, description="clips in a unit of work, on average")

    @model_validator(mode="after")
    def _some(self) -> ClipsConfig:
        if self.frames is None and self.frames_per_second is None:
            raise ValueError("give frames, frames_per_second, or both")
        if self.unlabelled == "skip" and self.labels is None:
            raise ValueError("unlabelled: skip needs a labels file")
        return self


class Clips(FiledSource):
    """Frames of video files, in the order of the files' paths, and of time."""

    kind = "clips"
    Config = ClipsConfig
    config: ClipsConfig
    endings = ENDINGS
    files = "video files"

    def plan(self) -> Iterator[Unit]:
        """See `Source.plan`.

        A unit's `clips` are the entries that `read` needs, one per clip: its `location`; `clip`, `txt` and `json`
        as [path, size, version]; its `record` of the labels; or the `problem` of one that is not there.
        """
        found = self._find()
        sidecars = self._sidecars(found)
        records, faults = self._labels(found.files)
        if self.config.unlabelled == "skip":
            skipped = [f for f in found.files if f.path not in records]
            self._ignored.update(f"{extension(f.path)} without a label" for f in skipped)
        entries = list(faults)
        for file in found.files:
            if self.config.unlabelled == "keep" or file.path in records:
                entry: dict[str, Any] = {"location": file.path, "clip": list(file)} | sidecars.get(file.path, {})
                entries.append(entry | ({"record": records[file.path]} if file.path in records else {}))
        entries.sort(key=lambda e: e["location"])
        for run in cut([e["location"] for e in entries], self.config.unit_clips):
            mine = [entries[i] for i in run]
            yield Unit(self.name, {"clips": mine}, size=sum(e["clip"][1] or 0 for e in mine if "clip" in e))

    def _sidecars(self, found: Found) -> dict[str, dict[str, list[Any]]]:
        """The texts beside each clip, by kind; those used are no longer among the ignored files."""
        given = [self.config.path] if isinstance(self.config.path, str) else self.config.path
        candidates = {
            clip.path: {
                kind: [f"{stem}.{kind}" for stem in (clip.path, posixpath.splitext(clip.path)[0])] for kind in SIDECARS
            }
            for clip in found.files
        }
        beside = {f.path: f for f in found.others}
        if any(re.search(r"[*?\[{]", path) or not Root(path).is_folder("") for path in given):
            # Files that were named, or match a pattern: what lies beside them was not listed.
            names = [n for kinds in candidates.values() for stems in kinds.values() for n in stems if n not in beside]
            beside |= {f.path: f for f in found.root.stat_many(names) if f is not None}
        out: dict[str, dict[str, list[Any]]] = defaultdict(dict)
        used: set[str] = set()
        for clip, kinds in candidates.items():
            for kind, stems in kinds.items():
                if name := next((n for n in stems if n in beside), None):
                    out[clip][kind] = list(beside[name])
                    used.add(name)
        self._ignored = Counter(extension(f.path) or "(none)" for f in found.others if f.path not in used)
        return out

    def _labels(self, clips: list[File]) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
        """The record of each clip that has one, and an entry with its problem for each record that has no clip."""
        if self.config.labels is None:
            return {}, []
        names: dict[str, list[str]] = defaultdict(list)
        for clip in clips:
            stem = posixpath.splitext(clip.path)[0]
            for name in {clip.path, stem, posixpath.basename(clip.path), posixpath.basename(stem)}:
                names[name].append(clip.path)
        records: dict[str, dict[str, Any]] = {}
        faults: list[dict[str, Any]] = []
        label_file = posixpath.basename(self.config.labels)
        for number, record in enumerate(_listed(self.config.labels), 1):
            problem = None
            called = str(record["id"]) if isinstance(record, dict) and record.get("id") not in (None, "") else None
            of = names.get(called, []) if called else []
            if called is None or not isinstance(record, dict):
                problem = ["bad_metadata", "not an object with an 'id'"]
            elif not of:
                problem = ["missing_clip", f"no clip is called {called}"]
            elif len(of) > 1 and called not in of:
                problem = [
                    "bad_metadata",
                    f"several clips are called {called}: {of[0]}, {of[1]} …; name its folder, too",
                ]
            else:
                path = called if called in of else of[0]
                if record != records.setdefault(path, record):
                    problem = ["bad_metadata", f"another record, before this one, says something else of {called}"]
            if problem:
                faults.append({"location": f"{label_file}#{number}", "problem": problem})
        return records, faults

    def read(self, unit: Unit, only: Collection[int] | None = None) -> Iterator[Row]:
        """See `Source.read`. Of clips of which nothing is wanted, only the headers are read."""
        entries = unit.spec["clips"]
        texts = self._root.read_many(e[kind][0] for e in entries for kind in SIDECARS if kind in e)
        index, end = 0, None if only is None else max(only, default=-1)
        for entry in entries:
            if end is not None and index > end:
                return
            sidecars = {kind: next(texts) for kind in SIDECARS if kind in entry}
            index += yield from self._clip(index, entry, sidecars, only)

    def _clip(
        self, first: int, entry: dict[str, Any], sidecars: dict[str, bytes | OSError], only: Collection[int] | None
    ) -> Generator[Row, None, int]:
        """Yield the rows of a clip, the first of which has the index `first`; return how many there are."""
        meta = dict(entry.get("record", {})) | ({"clip": entry["location"]} if "clip" in entry else {})
        try:
            if "problem" in entry:
                raise BadVideo(*entry["problem"])
            text = self._text(meta, entry, sidecars)
            with self._root.open(entry["clip"][0]) as file:
                video = Video(file)
                moments = self._moments(video)
                wanted = [i for i in range(len(moments)) if only is None or first + i in only]
                yield from self._frames(first, entry["location"], text, meta, video, moments, wanted)
                return len(moments)
        except BadVideo as error:
            problem = Problem(error.reason, error.detail)
        except Malformed as error:
            problem = error.problem
        except OSError as error:
            problem = Problem("unreadable", why(error))
        if only is None or first in only:
            yield Row(first, entry["location"], None, meta=meta, problem=problem)
        return 1

    def _text(self, meta: dict[str, Any], entry: dict[str, Any], sidecars: dict[str, bytes | OSError]) -> str | None:
        """A clip's text; what a JSON file says goes to `meta`. Raises BadVideo, Malformed."""
        texts: dict[str, bytes] = {}
        for kind, data in sidecars.items():
            if isinstance(data, OSError):
                raise BadVideo("unreadable", f"{entry[kind][0]}: {why(data)}")
            texts[kind] = data
        text = describe(meta, self.config.text_key, texts.get("txt"), texts.get("json"))
        return text or (None if self.config.text_key else pick(meta, "label"))

    def _moments(self, video: Video) -> list[float]:
        """When to take frames: times of frames at the header's rate, in seconds, to the millisecond.

        They depend on the header alone, so that the rows of a unit can be counted without decoding.
        """
        number, rate, there = self.config.frames, self.config.frames_per_second, video.frames
        at_rate = max(1, math.ceil(video.seconds * rate - 1e-6)) if rate is not None else there
        if rate is not None and (number is None or at_rate <= number):
            chosen = [math.floor(i * video.fps / rate + 1e-6) for i in range(at_rate)]
        else:  # the middle of each of so many equal parts
            number = min(number or there, there)
            chosen = [(2 * i + 1) * there // (2 * number) for i in range(number)]
        return sorted({round(frame / video.fps, 3) for frame in chosen})

    def _frames(
        self,
        first: int,
        location: str,
        text: str | None,
        meta: dict[str, Any],
        video: Video,
        moments: list[float],
        wanted: list[int],
    ) -> Iterator[Row]:
        said = meta | {"clip": location, "frames": video.frames, "fps": round(video.fps, 6)}
        for i, frame in zip(wanted, video.at([moments[i] for i in wanted]) if wanted else (), strict=True):
            row = Row(first + i, f"{location}#t={moments[i]:07.3f}", None, text, dict(said))
            if frame is None:
                row.meta["time"] = moments[i]
                detail = f"{video.seconds:.3f} s by its header, but nothing can be decoded at {moments[i]:.3f} s"
                row.problem = Problem("truncated", detail)
            else:
                row.meta |= {"frame": frame.number, "time": round(frame.time, 6)}
                row.data = encode(frame.pixels, self.config.format, self.config.quality)
            yield row


def _listed(path: str) -> list[Any]:
    """The labels file's records. Raises RecipeError."""
    try:
        records = json.loads(Root(path).read("").decode("utf-8-sig"))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {why(error)}; `labels` names a JSON file") from None
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: not JSON: {error}") from None
    if not isinstance(records, list):
        raise RecipeError(f'{path}: expected a JSON list of {{"id": …, "label": …}}, found {type(records).__name__}')
    out: list[Any] = jsonable(records)
    return out
