"""Video clips as sources: clips written here of photographs, panned; which frames are taken, their texts, what is damaged."""

from __future__ import annotations

import functools
import json
import os
import struct
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")

import cv2
import numpy as np
import pytest
import skimage.data
from PIL import Image

from tests.pipelines.source_files import problems, read, serve
from x2i.base.config import parse_config
from x2i.base.errors import RecipeError
from x2i.pipelines.images import decode, read_header
from x2i.pipelines.sources.base import Row
from x2i.pipelines.sources.clips import Clips, ClipsConfig

WIDTH, HEIGHT, RATE = 96, 64, 12.0
CODECS = {"mp4": "mp4v", "mov": "mp4v", "avi": "MJPG", "mkv": "MJPG", "webm": "VP80"}


@functools.cache
def view(number: int, name: str = "astronaut") -> np.ndarray:
    """The n-th frame of a pan: a window on a photograph that moves by 6 pixels, uint8 [64, 96, 3] RGB."""
    photo = getattr(skimage.data, name)()
    return np.ascontiguousarray(photo[100 : 100 + HEIGHT, 6 * number : 6 * number + WIDTH])


@functools.cache
def clip(kind: str = "mp4", frames: int = 24, name: str = "astronaut", rate: float = RATE) -> bytes:
    """A pan over a photograph as a video file."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/clip.{kind}"
        writer = cv2.VideoWriter(path, cv2.CAP_FFMPEG, cv2.VideoWriter_fourcc(*CODECS[kind]), rate, (WIDTH, HEIGHT))
        assert writer.isOpened()
        for number in range(frames):
            writer.write(cv2.cvtColor(view(number, name), cv2.COLOR_RGB2BGR))
        writer.release()
        return Path(path).read_bytes()


def clips(path: Path | str | list[str], **config: Any) -> Clips:
    return Clips(ClipsConfig(path=str(path) if isinstance(path, Path) else path, **config))


def pixels(row: Row) -> np.ndarray:
    assert row.data is not None
    return decode(row.data, read_header(row.data))


def shows(row: Row, expected: np.ndarray) -> bool:
    found = pixels(row)
    return found.shape == expected.shape and float(np.abs(found.astype(int) - expected).mean()) < 6


def put(folder: Path, files: dict[str, bytes | str | Any]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        data = content if isinstance(content, bytes) else (content if isinstance(content, str) else json.dumps(content))
        (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder


@pytest.mark.parametrize("kind", sorted(CODECS))
def test_frames_are_those_of_their_moments_in_every_container(tmp_path: Path, kind: str) -> None:
    put(tmp_path, {f"a/pan.{kind}": clip(kind)})
    rows = read(clips(tmp_path, frames=4))
    assert [r.meta["frame"] for r in rows] == [3, 9, 15, 21]  # the middle of each quarter
    assert [r.location for r in rows] == [f"a/pan.{kind}#t={t}" for t in ("000.250", "000.750", "001.250", "001.750")]
    for row in rows:
        assert row.problem is None and shows(row, view(row.meta["frame"]))
        assert not shows(row, view(row.meta["frame"] + 1))
        assert row.meta["time"] == pytest.approx(row.meta["frame"] / RATE, abs=1e-3)
        assert (row.meta["clip"], row.meta["frames"], row.meta["fps"]) == (f"a/pan.{kind}", 24, 12.0)
    every = read(clips(tmp_path, frames=99))
    assert [r.meta["frame"] for r in every] == list(range(24))
    assert all(shows(r, view(r.meta["frame"])) for r in every)
    assert all(every[r.meta["frame"]].data == r.data for r in rows)  # the same frame is the same image, byte for byte


def test_frames_per_second_and_its_bound(tmp_path: Path) -> None:
    put(tmp_path, {"long.mp4": clip(frames=30), "short.mp4": clip(frames=5)})

    def taken(**config: Any) -> dict[str, list[int]]:
        rows = read(clips(tmp_path, **config))
        return {c: [r.meta["frame"] for r in rows if r.meta["clip"] == c] for c in ("long.mp4", "short.mp4")}

    assert taken(frames=None, frames_per_second=2) == {"long.mp4": [0, 6, 12, 18, 24], "short.mp4": [0]}
    assert taken(frames=None, frames_per_second=0.1) == {"long.mp4": [0], "short.mp4": [0]}
    assert taken(frames=None, frames_per_second=120) == {"long.mp4": [*range(30)], "short.mp4": [*range(5)]}
    assert taken(frames=3, frames_per_second=2) == {"long.mp4": [5, 15, 25], "short.mp4": [0]}
    assert taken(frames=5, frames_per_second=2) == {"long.mp4": [0, 6, 12, 18, 24], "short.mp4": [0]}
    with pytest.raises(RecipeError, match="give frames, frames_per_second, or both"):
        parse_config(ClipsConfig, {"kind": "clips", "path": "x", "frames": None}, "recipe.yaml")


def test_png_loses_nothing_more_and_both_formats_are_the_same_bytes_again(tmp_path: Path) -> None:
    put(tmp_path, {"pan.avi": clip("avi")})
    by_png, by_jpg, small = (read(clips(tmp_path, frames=2, **c)) for c in ({"format": "png"}, {}, {"quality": 30}))
    assert [read_header(r.data or b"").format for r in (by_png[0], by_jpg[0])] == ["PNG", "JPEG"]
    capture = cv2.VideoCapture(str(tmp_path / "pan.avi"), cv2.CAP_FFMPEG)
    frames = [cv2.cvtColor(capture.read()[1], cv2.COLOR_BGR2RGB) for _ in range(24)]
    assert all(np.array_equal(pixels(r), frames[r.meta["frame"]]) for r in by_png)
    assert all(shows(r, frames[r.meta["frame"]]) for r in by_jpg)
    assert len(small[0].data or b"") < len(by_jpg[0].data or b"")


def test_labels_as_something_something_has_them(tmp_path: Path) -> None:
    records = [
        {
            "id": "78687",
            "label": "moving a camera along astronaut",
            "template": "Moving [something] along [something]",
            "placeholders": ["a camera", "astronaut"],
        },
        {
            "id": "42326",
            "label": "panning over coffee",
            "template": "Panning over [something]",
            "placeholders": ["coffee"],
        },
        {
            "id": "42326",
            "label": "panning over coffee",
            "template": "Panning over [something]",
            "placeholders": ["coffee"],
        },
        {"id": "100904", "label": "lost", "template": "Losing [something]", "placeholders": []},
        {"id": 42326, "label": "something else", "template": "", "placeholders": []},
        {"label": "nobody's"},
        "no object",
    ]
    videos = {"78687.webm": clip("webm"), "42326.webm": clip("webm", name="coffee"), "7.webm": clip("webm", frames=6)}
    put(tmp_path, {f"videos/{n}": v for n, v in videos.items()} | {"labels/train.json": records})
    source = clips(tmp_path / "videos", labels=str(tmp_path / "labels/train.json"), frames=2)
    rows = read(source)
    texts = {r.location: r.text for r in rows if r.problem is None}
    assert texts == {
        "42326.webm#t=000.500": "panning over coffee",
        "42326.webm#t=001.500": "panning over coffee",
        "7.webm#t=000.083": None,
        "7.webm#t=000.333": None,
        "78687.webm#t=000.500": "moving a camera along astronaut",
        "78687.webm#t=001.500": "moving a camera along astronaut",
    }
    meta = rows[-1 - len(problems(rows))].meta
    assert meta["template"] == "Moving [something] along [something]" and meta["placeholders"] == [
        "a camera",
        "astronaut",
    ]
    assert problems(rows) == {
        "train.json#4": "missing_clip",
        "train.json#5": "bad_metadata",
        "train.json#6": "bad_metadata",
        "train.json#7": "bad_metadata",
    }
    only = clips(
        tmp_path / "videos",
        labels=str(tmp_path / "labels/train.json"),
        frames=2,
        unlabelled="skip",
        text_key="template",
    )
    rows = read(only)
    assert {r.text for r in rows if not r.problem} == {
        "Moving [something] along [something]",
        "Panning over [something]",
    }
    assert only.ignored() == {"webm without a label": 1}

    before = {u.id for u in source.plan()}
    records[0]["label"] = "another"  # type: ignore[index]
    put(tmp_path, {"labels/train.json": records})
    assert before.isdisjoint(u.id for u in source.plan())


def test_one_label_name_for_two_clips_is_told(tmp_path: Path) -> None:
    put(
        tmp_path,
        {"a/1.mp4": clip(), "b/1.mp4": clip(frames=5), "labels.json": [{"id": "1"}, {"id": "b/1", "label": "x"}]},
    )
    rows = read(clips(tmp_path, labels=str(tmp_path / "labels.json"), frames=1))
    assert {r.location: r.text for r in rows} == {
        "a/1.mp4#t=001.000": None,
        "b/1.mp4#t=000.167": "x",
        "labels.json#1": None,
    }
    assert problems(rows) == {"labels.json#1": "bad_metadata"}
    assert "name its folder" in next(r.problem.detail for r in rows if r.problem)


@pytest.mark.parametrize(
    ("content", "said"), [(None, "cannot be read"), ("{", "not JSON"), ("{}", "expected a JSON list")]
)
def test_a_labels_file_that_is_none_stops_the_plan(tmp_path: Path, content: str | None, said: str) -> None:
    put(tmp_path, {"a.mp4": clip()} | ({"labels.json": content} if content else {}))
    with pytest.raises(RecipeError, match=said):
        list(clips(tmp_path, labels=str(tmp_path / "labels.json")).plan())


@pytest.mark.parametrize("pattern", ["", "/**/*.mp4"])
def test_texts_beside_clips(tmp_path: Path, pattern: str) -> None:
    folder = put(
        tmp_path,
        {
            "a.mp4": clip(),
            "a.txt": "an astronaut, from left to right\n",
            "b [1] %02d.mp4": clip(frames=12),
            "b [1] %02d.mp4.json": {"caption": "a pan", "frames": 7, "camera": "left"},
            "d/c.mp4": clip(frames=5),
            "d/c.json": "[]",
            "d/notes.txt": "",
        },
    )
    source = clips(f"{folder}{pattern}", frames=2)
    rows = read(source)
    assert {(r.meta["clip"], r.text) for r in rows} == {
        ("a.mp4", "an astronaut, from left to right"),
        ("b [1] %02d.mp4", "a pan"),
        ("d/c.mp4", None),
    }
    assert next(r for r in rows if r.text == "a pan").meta == {
        "caption": "a pan",
        "camera": "left",
        "clip": "b [1] %02d.mp4",
        "frame": 3,
        "frames": 12,
        "fps": 12.0,
        "time": 0.25,
    }
    assert problems(rows) == {"d/c.mp4": "bad_metadata"}
    assert source.ignored() == ({} if pattern else {"txt": 1})


def test_turned_clips_stand_upright(tmp_path: Path) -> None:
    data = clip()
    matrix = data.index(b"tkhd") + 44
    assert struct.unpack(">9i", data[matrix : matrix + 36]) == (65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    for turns, (a, b, c, d) in {1: (0, 1, -1, 0), 2: (-1, 0, 0, -1), 3: (0, -1, 1, 0)}.items():
        turned = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
        put(tmp_path, {f"{turns}.mp4": data[:matrix] + turned + data[matrix + 36 :]})
    for row in read(clips(tmp_path, frames=2)):
        assert shows(row, np.rot90(view(row.meta["frame"]), -int(row.meta["clip"][0])))


def test_pixels_that_are_not_square_become_so(tmp_path: Path) -> None:
    """A WebM header that asks for 192x64 on the screen: two elements go (language, default), two come (display size)."""
    data, size = clip("webm"), bytes([0xE0, 0x86, 0xB0, 0x81, WIDTH, 0xBA, 0x81, HEIGHT])
    display = bytes([0x54, 0xB0, 0x81, 2 * WIDTH, 0x54, 0xBA, 0x81, HEIGHT])
    wide = data.replace(b"\x22\xb5\x9c\x83und", b"").replace(b"\x88\x81\x00", b"", 1)
    wide = wide.replace(size, bytes([0xE0, 0x8E]) + size[2:] + display + b"\xec\x80", 1)
    assert len(wide) == len(data)
    put(tmp_path, {"wide.webm": wide})
    for row in read(clips(tmp_path, frames=2)):
        assert shows(row, cv2.resize(view(row.meta["frame"]), (2 * WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC))


def test_frames_at_uneven_times(tmp_path: Path) -> None:
    """A GIF whose second half is half as fast: moments are moments, and each frame tells its own time."""
    images = [Image.fromarray(view(i)) for i in range(20)]
    times = [50] * 10 + [100] * 10
    images[0].save(tmp_path / "pan.gif", save_all=True, append_images=images[1:], duration=times)
    rows = read(clips(tmp_path, frames=20))
    starts = np.cumsum([0, *times[:-1]]) / 1000
    for row in rows:
        asked = float(row.location.partition("#t=")[2])
        assert row.meta["time"] == pytest.approx(starts[row.meta["frame"]], abs=1e-3)
        assert abs(row.meta["time"] - asked) <= 0.1
        found = pixels(row).astype(int)
        assert float(np.abs(found - view(row.meta["frame"])).mean()) < 16  # a GIF has 256 colours


def test_a_recording_without_a_length_is_counted(tmp_path: Path) -> None:
    """As browsers record them: no duration in the header."""
    data = clip("webm")
    at = data.index(b"\x44\x89\x88")
    put(tmp_path, {"live.webm": data[:at] + b"\xec\x89" + data[at + 2 :]})
    rows = read(clips(tmp_path, frames=4))
    assert [r.meta["frame"] for r in rows] == [3, 9, 15, 21]
    assert all(r.problem is None and shows(r, view(r.meta["frame"])) for r in rows)
    assert rows[0].meta["frames"] == 24


def test_what_is_damaged_is_a_row_with_its_problem(tmp_path: Path) -> None:
    whole = {kind: clip(kind) for kind in ("mp4", "webm", "avi")}
    put(
        tmp_path,
        {
            "cut.mp4": whole["mp4"][: len(whole["mp4"]) // 2],
            "cut.webm": whole["webm"][: len(whole["webm"]) // 2],
            "cut.avi": whole["avi"][: len(whole["avi"]) // 2],
            "empty.mp4": b"",
            "page.mp4": b"<!doctype html><title>404</title>" * 20,
            "playlist.mp4": f"#EXTM3U\n#EXTINF:3,\n{tmp_path}/good.mp4\n#EXT-X-ENDLIST\n",
            "noise.webm": whole["webm"][:40] + np.random.default_rng(0).bytes(4000),
            "good.mp4": whole["mp4"],
        },
    )
    os.symlink(tmp_path / "nowhere", tmp_path / "gone.mp4")
    rows = read(clips(tmp_path, frames=6, unit_clips=4))
    found = problems(rows)
    assert {k: v for k, v in found.items() if "#" not in k} == {
        "cut.mp4": "corrupt",
        "empty.mp4": "empty_file",
        "page.mp4": "not_a_video",
        "playlist.mp4": "not_a_video",
        "noise.webm": "corrupt",
        "gone.mp4": "unreadable",
    }
    for name in ("cut.webm", "cut.avi"):  # the frames before the cut are there
        mine = [r for r in rows if r.meta.get("clip") == name]
        assert len(mine) == 6
        lost = [r for r in mine if r.problem]
        assert mine[-len(lost) :] == lost and 2 <= len(lost) <= 4
        assert {r.problem.reason for r in lost if r.problem} == {"truncated"}
        assert all(shows(r, view(r.meta["frame"])) for r in mine if not r.problem)
    good = [r for r in rows if r.location.startswith("good.mp4#")]
    assert len(good) == 6 and not any(r.problem for r in good)


def test_sound_that_outlasts_the_picture_does_not_cut_the_clip(tmp_path: Path) -> None:
    """A container that says a little more than there are frames: the last one stands."""
    data = clip("avi")
    frames = struct.pack("<I", 24)
    header, stream = data.index(b"avih") + 8 + 16, data.index(b"strh") + 8 + 32
    assert data[header : header + 4] == data[stream : stream + 4] == frames
    more = struct.pack("<I", 26)
    longer = data[:header] + more + data[header + 4 : stream] + more + data[stream + 4 :]
    put(tmp_path, {"long.avi": longer})
    rows = read(clips(tmp_path, frames=99))
    assert not problems(rows) and [r.meta["frame"] for r in rows][-3:] in ([21, 22, 23], [23, 23, 23])
    assert all(shows(r, view(r.meta["frame"])) for r in rows)


def test_only_the_clips_wanted_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, {f"{i}.mp4": clip(frames=5 + i) for i in range(6)})
    source = clips(tmp_path, frames=3)
    (unit,) = source.plan()
    expected = list(source.read(unit))
    from x2i.pipelines.sources import _video

    decoded: list[int] = []
    retrieve = _video._retrieve
    monkeypatch.setattr(_video, "_retrieve", lambda *a: decoded.append(a[2]) or retrieve(*a))
    opened: list[str] = []
    start = _video.Video.__init__
    monkeypatch.setattr(_video.Video, "__init__", lambda self, file: opened.append(file.name) or start(self, file))
    assert list(source.read(unit, {7})) == [expected[7]]
    assert len(decoded) == 1 and [Path(p).name for p in opened] == ["0.mp4", "1.mp4", "2.mp4"]


def test_clips_behind_a_web_server(tmp_path: Path) -> None:
    put(
        tmp_path / "here",
        {"a b.mp4": clip(), "a b.txt": "an astronaut", "c.webm": clip("webm", frames=6), "c.txt": "six frames"},
    )
    local = read(clips(tmp_path / "here", frames=2))
    with serve(tmp_path / "here") as url:
        assert [(r.location, r.text, r.data) for r in read(clips(url, frames=2))] == [
            (r.location, r.text, r.data) for r in local
        ]
        one = read(clips(f"{url}/c.webm", frames=2))
    assert [(r.location, r.text) for r in one] == [
        ("c.webm#t=000.083", "six frames"),
        ("c.webm#t=000.333", "six frames"),
    ]


def test_units_keep_their_identity_when_others_come(tmp_path: Path) -> None:
    put(tmp_path, {f"{i:03}.avi": clip("avi", frames=2) for i in range(120)})
    before = {u.id for u in clips(tmp_path, unit_clips=8).plan()}
    put(tmp_path, {"0600.avi": clip("avi", frames=3)})
    after = {u.id for u in clips(tmp_path, unit_clips=8).plan()}
    assert len(before) > 8 and len(before - after) <= 3
    with pytest.raises(RecipeError, match="no video files here"):
        list(clips(put(tmp_path / "none", {"a.txt": "x"})).plan())
