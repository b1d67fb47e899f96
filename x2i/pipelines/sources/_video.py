"""Frames of a video file at given moments, by OpenCV's FFmpeg: upright, RGB, with square pixels.

A file is decoded from its beginning up to the last frame wanted: seeking would be faster in long files, but
lands beside the frame where frames depend on later ones or come at uneven times. Pixels of frames that are not
wanted are decoded, but not converted.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from typing import IO, Any, NamedTuple

import numpy as np

from x2i.pipelines.images import MAX_PIXELS, resize

#: Where the signature of a container lies, and its bytes. FFmpeg itself would also open playlists, which name other
#: files: what has none of these is not given to it.
_SIGNATURES = (
    *((4, box) for box in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")),  # MP4, QuickTime
    (0, b"\x1a\x45\xdf\xa3"),  # Matroska, WebM
    (8, b"AVI "),
    (0, b"GIF8"),
)

#: Seconds by which a container may be longer than its pictures (sound that outlasts them): the last picture stands.
_STANDS = 0.25


#: How OpenCV is told what it has no parameter for: a frame that was cut off in the middle is none, rather than half grey;
#: and FFmpeg says nothing on stderr (read once, by the first file): faults become problems.
_OPTIONS = {"OPENCV_FFMPEG_CAPTURE_OPTIONS": "fflags;discardcorrupt", "OPENCV_FFMPEG_LOGLEVEL": "-8"}


class BadVideo(Exception):
    """A file that gives no frames. `reason` is a snake_case word, `detail` a sentence."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class Frame(NamedTuple):
    """A decoded frame: its number from 0, the time in seconds at which it is shown, uint8 [height, width, 3] RGB."""

    number: int
    time: float
    pixels: np.ndarray


class Video:
    """A video file. `frames`, `fps` and `seconds` are what its header says, or counted where that says nothing."""

    def __init__(self, file: IO[bytes]) -> None:
        """Read the header of a file that has a name on this machine.

        Raises:
            BadVideo: `empty_file`, `not_a_video`, `corrupt`, `too_many_pixels`, `no_frames`.
        """
        self.path = str(file.name)
        size = os.fstat(file.fileno()).st_size
        start = file.read(16)
        if not start:
            raise BadVideo("empty_file", "the file has no bytes")
        if not any(start[at : at + len(mark)] == mark for at, mark in _SIGNATURES):
            raise BadVideo(
                "not_a_video", f"no MP4, QuickTime, WebM, Matroska, AVI or GIF begins with {start[:8].hex(' ')}"
            )
        with self._open() as (cv2, capture):
            width, height = int(capture.get(cv2.CAP_PROP_FRAME_WIDTH)), int(capture.get(cv2.CAP_PROP_FRAME_HEIGHT))
            if width * height > MAX_PIXELS:
                raise BadVideo("too_many_pixels", f"{width}x{height}, limit {MAX_PIXELS / 1e6:.0f} megapixels")
            frames, self.fps = capture.get(cv2.CAP_PROP_FRAME_COUNT), float(capture.get(cv2.CAP_PROP_FPS))
            if not 0 < self.fps < math.inf:
                self.fps = 25.0
            if not 0 < frames <= size:  # none is told, or more than one in a byte: then it's no use to anyone
                frames = self._count(cv2, capture)
            self.frames = int(frames)
        self.seconds = self.frames / self.fps

    def _count(self, cv2: Any, capture: Any) -> int:
        number, time = 0, 0.0
        while capture.grab():
            number, time = number + 1, capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
        if not number:
            raise BadVideo("no_frames", "not one frame can be decoded")
        if number > 1 and time > 0:
            self.fps = (number - 1) / time
        return number

    def at(self, moments: Sequence[float]) -> Iterator[Frame | None]:
        """The frame of each moment (in seconds, ascending): the first that comes no more than half a frame before it.

        None for moments after the end of what can be decoded, and if the file has gone since.
        """
        number, time, gap, done = -1, -math.inf, 1 / self.fps, 0
        last: Frame | None = None
        with contextlib.suppress(BadVideo), self._open() as (cv2, capture):
            square = _square(cv2, capture)
            for moment in moments:
                while time < moment - 0.5 / self.fps and capture.grab():
                    shown = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
                    if number >= 0:
                        shown = shown if shown > time else time + 1 / self.fps  # a container without times
                        gap = max(gap, shown - time)
                    number, time = number + 1, shown
                if time < moment - 0.5 / self.fps:  # the end
                    break
                if last is None or last.number != number:
                    last = _retrieve(cv2, capture, number, time, square)
                yield last
                done += 1
        if done < len(moments) and number >= 0 and (last is None or last.number != number):
            last = self._numbered(number, time)
        for moment in moments[done:]:
            yield last if moment <= time + max(2 * gap, _STANDS) else None

    def _numbered(self, number: int, time: float) -> Frame | None:
        with contextlib.suppress(BadVideo), self._open() as (cv2, capture):
            if all(capture.grab() for _ in range(number + 1)):
                return _retrieve(cv2, capture, number, time, _square(cv2, capture))
        return None

    @contextlib.contextmanager
    def _open(self) -> Iterator[tuple[Any, Any]]:
        """OpenCV, and the file opened with it. Raises BadVideo."""
        import cv2

        before = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
        try:
            with _environment(_OPTIONS):
                # One thread, as everywhere: processes are the unit of parallelism.
                capture = cv2.VideoCapture(self.path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
        except cv2.error as error:
            raise BadVideo("corrupt", f"cannot be opened: {error.err}") from None
        finally:
            cv2.utils.logging.setLogLevel(before)
        try:
            if not capture.isOpened():
                raise BadVideo(
                    "corrupt", "cannot be opened: cut off, damaged, or of a codec that OpenCV's FFmpeg lacks"
                )
            capture.set(cv2.CAP_PROP_ORIENTATION_AUTO, 1)
            yield cv2, capture
        finally:
            capture.release()


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Environment variables for the time being; those that the user has set stay as they are."""
    mine = {k: v for k, v in values.items() if k not in os.environ}
    os.environ.update(mine)
    try:
        yield
    finally:
        for key in mine:
            os.environ.pop(key, None)


def _square(cv2: Any, capture: Any) -> float:
    """The width of a pixel of the upright picture, in heights of it; 1 where nothing sensible is said."""
    over, under = capture.get(cv2.CAP_PROP_SAR_NUM), capture.get(cv2.CAP_PROP_SAR_DEN)
    ratio = over / under if over > 0 and under > 0 else 1.0
    ratio = 1 / ratio if int(capture.get(cv2.CAP_PROP_ORIENTATION_META)) % 180 else ratio
    return ratio if 0.1 < ratio < 10 else 1.0


def _retrieve(cv2: Any, capture: Any, number: int, time: float, square: float) -> Frame | None:
    found, pixels = capture.retrieve()
    if not found or pixels is None or not pixels.size:
        return None
    pixels = cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB if pixels.ndim == 2 else cv2.COLOR_BGR2RGB)
    if square != 1:
        height, width = pixels.shape[:2]
        size = (round(width * square), height) if square > 1 else (width, round(height / square))
        pixels = resize(pixels, *size)
    return Frame(number, time, pixels)
