"""Writes tiny datasets in exactly their published layouts, out of packaged photographs, faults included."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import skimage.data
from PIL import Image

from tests.pipelines.source_files import NAMES, photo

#: A JPEG that was cut: its header is fine, its pixels are not there.
CORRUPT = photo("coffee", 200)[:900]

GRIT_CAPTION = "a wire hanger with a paper cover that reads we heart our customers"


def picture(number: int, side: int = 96) -> bytes:
    """A JPEG, another one for each number."""
    image = Image.open(io.BytesIO(photo(NAMES[number % len(NAMES)], 160))).convert("RGB")
    left = 3 * (number // len(NAMES))
    out = io.BytesIO()
    image.crop((left, left, left + side, left + side)).save(out, "JPEG", quality=90)
    return out.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes] | Sequence[tuple[str, bytes]], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in members.items() if isinstance(members, Mapping) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def img2dataset(folder: Path, shard: int, records: list[dict[str, Any]], caption_col: str = "caption") -> None:
    """A shard as img2dataset writes it: `records` have the columns, and `image` (bytes, or an error message)."""
    members: list[tuple[str, bytes]] = []
    rows = []
    for number, record in enumerate(records):
        image = record["image"]
        fetched = isinstance(image, bytes)
        key = f"{shard:05d}{number:04d}"
        size = {"width": 96, "height": 96, "original_width": 400, "original_height": 400} if fetched else {}
        meta = {k: v for k, v in record.items() if k not in ("image", caption_col)} | {
            "caption": record.get(caption_col),
            "key": key,
            "status": "success" if fetched else "failed_to_download",
            "error_message": None if fetched else image,
            **{k: size.get(k) for k in ("width", "height", "original_width", "original_height")},
            "exif": "{}" if fetched else None,
            "sha256": f"{number:064x}" if fetched else None,
        }
        rows.append(meta)
        if fetched:
            caption = meta["caption"]
            members += [
                (f"{key}.jpg", image),
                (f"{key}.json", json.dumps(meta, indent=4).encode()),
                (f"{key}.txt", (caption if caption is not None else "").encode()),
            ]
    write_tar(folder / f"{shard:05d}.tar", members)
    pq.write_table(pa.Table.from_pylist(rows), folder / f"{shard:05d}.parquet")
    (folder / f"{shard:05d}_stats.json").write_text("{}")


def grit(folder: Path) -> Path:
    """Six records: sound, without caption, corrupt image, a span beyond the caption, not fetched, sound."""
    chunk = [2, 13, 0.0, 0.03, 0.96, 0.97, 0.675]

    def record(number: int, **changes: Any) -> dict[str, Any]:
        columns = {
            "caption": GRIT_CAPTION,
            "url": f"https://example.org/{number}.jpg",
            "id": 1795296605919 + number,
            "noun_chunks": [chunk, [19, 32, 0.02, 0.31, 0.96, 0.96, 0.79]],
            "ref_exps": [[0, 66, 0.02, 0.03, 0.96, 0.97, 0.68]],
            "clip_similarity_vitb32": 0.353271484375,
            "clip_similarity_vitl14": 0.2958984375,
            "image": picture(number),
        }
        return columns | changes

    records = [
        record(0),
        record(1, caption=None, noun_chunks=None, ref_exps=None),
        record(2, image=CORRUPT),
        record(3, ref_exps=[[0, 67, 0.1, 0.1, 0.2, 0.2, 0.5]]),
        record(4, image="HTTP Error 404: Not Found"),
    ]
    img2dataset(folder, 0, records)
    img2dataset(folder, 1, [record(5)])
    return folder


def recap_datacomp(folder: Path, caption_col: str = "re_caption") -> Path:
    """Four records: both captions, no recaption, no original, not fetched."""

    def record(number: int, **changes: Any) -> dict[str, Any]:
        columns = {
            "url": f"https://example.org/{number}.jpg",
            "re_caption": f"A photograph, numbered {number}, that a model describes at length.",
            "org_caption": f"IMG_{number}",
            "re_clip_score": 0.21,
            "org_clip_score": None,
            "re_length": 11,
            "org_length": 1,
            "image": picture(10 + number),
        }
        return columns | changes

    records = [record(0), record(1, re_caption=None), record(2, org_caption=None), record(3, image="timed out")]
    img2dataset(folder, 0, records, caption_col)
    return folder


def tile(number: int, side: int = 512) -> np.ndarray:
    """uint8 [side, side, 3]: a part of a photograph."""
    image = Image.fromarray(getattr(skimage.data, NAMES[number % len(NAMES)])()).convert("RGB")
    return np.asarray(image.resize((side, side)))


def composite(left: int, right: int, kind: str = ".png", side: int = 512, border: int = 8) -> bytes:
    """Two tiles on white, with a border around each."""
    canvas = np.full((side + 2 * border, 2 * (side + 2 * border), 3), 255, np.uint8)
    canvas[border : border + side, border : border + side] = tile(left, side)
    start = side + 3 * border
    canvas[border : border + side, start : start + side] = tile(right, side)
    return bytes(cv2.imencode(kind, canvas[..., ::-1])[1])


def subjects200k(folder: Path) -> Path:
    """Seven composites: good, collection_1, low, unrated, corrupt, no description, no composite."""
    good = {"compositeStructure": 5, "objectConsistency": 5, "imageQuality": 5}

    def record(number: int, **changes: Any) -> dict[str, Any]:
        described = {
            "item": "A Moon Lamp",
            "description_0": f"On a desk, seen from near, number {number}.",
            "description_1": f"On a shelf, at dusk, number {number}.",
            "category": None,
            "description_valid": True,
        }
        columns = {
            "image": {"bytes": composite(number, number + 1, ".jpg"), "path": None},
            "collection": "collection_2",
            "quality_assessment": good,
            "description": described,
        }
        return columns | changes

    records = [
        record(0),
        record(2, collection="collection_1"),
        record(0, quality_assessment=good | {"objectConsistency": 3}),
        record(0, quality_assessment=None),
        record(0, image={"bytes": composite(0, 1, ".jpg")[:3000], "path": None}),
        record(4, description=None),
        record(0, image={"bytes": photo("coffee", 200), "path": None}),
    ]
    folder.mkdir(parents=True)
    table = pa.Table.from_pylist(records)
    pq.write_table(table.slice(0, 4), folder / "train-00000-of-00002.parquet", row_group_size=2)
    pq.write_table(table.slice(4), folder / "train-00001-of-00002.parquet", row_group_size=2)
    return folder


def syncd(folder: Path) -> Path:
    """Four groups: three alike, two of which one lacks its file, a copy, one whose lists differ in length."""
    (folder / "rigid" / "masks").mkdir(parents=True)
    for number in range(6):
        (folder / "rigid" / f"obj_{number}.jpg").write_bytes(picture(20 + number))
        (folder / "rigid" / "masks" / f"obj_{number}.jpg").write_bytes(photo("page"))

    def group(numbers: list[int], scores: list[list[float]], **changes: Any) -> dict[str, Any]:
        names = [f"./syncd/rigid/obj_{n}.jpg" for n in numbers]
        columns = {
            "filenames": names,
            "prompts": [f"A toy robot in place {n}." for n in numbers],
            "aesthetics_scores": {f"obj_{n}": 6.0 + n / 10 for n in numbers},
            "dino_scores": scores,
        }
        return columns | changes

    groups = [
        group([0, 1, 2], [[0.0, 0.5, 0.9], [0.0, 0.0, 0.8], [0.0, 0.0, 0.0]]),
        group([3, 9], [[0.0, 0.9], [0.0, 0.0]]),
        group([4, 5], [[0.0, 0.99], [0.0, 0.0]]),
        group([0, 1], [[0.0, 0.9], [0.0, 0.0]], prompts=["Only one."]),
    ]
    (folder / "metadata_with_scores.json").write_text(json.dumps(groups))
    return folder


def journeydb(folder: Path, unpacked: bool = False) -> Path:
    """Two archives: of the second the last picture is corrupt, one is not annotated, one annotated is not there."""
    pictures = {
        "000": {"aa-1": picture(30), "aa-2": picture(31), "aa-3": picture(32)},
        "001": {"bb-1": picture(33), "bb-9": picture(34), "bb-2": CORRUPT},
    }
    for archive, images in pictures.items():
        members = {f"{archive}/{uuid}.jpg": data for uuid, data in images.items()}
        write_tar(folder / "imgs" / f"{archive}.tgz", members, "w:gz")

    def line(archive: str, uuid: str, **changes: Any) -> str:
        record = {
            "img_path": f"./{archive}/{uuid}.jpg",
            "prompt": f"{uuid}, studio light, 8k --ar 1:1",
            "Task1": {"Style": ["studio"], "Content": ["thing"], "Atmosphere": [], "Others": []},
            "Task2": {"Caption": f"A thing called {uuid} in studio light."},
            "Task3": {"Style Relevant Questions and Answers": [], "Content Relevant Questions and Answers": []},
        }
        return json.dumps(record | changes)

    lines = [
        line("001", "bb-1"),
        line("000", "aa-1"),
        line("000", "aa-2", Task2={}),
        line("000", "aa-3", Task2={"Caption": None}, prompt=None),
        line("001", "bb-2"),
        line("001", "bb-3"),
        line("001", "bb-4")[:40],
    ]
    name, data = "train_anno_realease_repath.jsonl", ("\n".join(lines) + "\n").encode()
    write_tar(folder / f"{name}.tgz", {name: data}, "w:gz")
    write_tar(folder / "train_anno.jsonl.tgz", {"train_anno.jsonl": b"{}\n"}, "w:gz")
    if unpacked:
        (folder / name).write_bytes(data)
    return folder


def sharegpt4v(folder: Path) -> Path:
    """Eight dialogues: two captions, one missing image, one about none, no words, turns, marks, questions."""
    for number, name in enumerate(("coco/train2017/000000000009.jpg", "sam/images/sa_1.jpg")):
        (folder / "data" / name).parent.mkdir(parents=True)
        (folder / "data" / name).write_bytes(picture(40 + number))

    def dialogue(image: str | None, *turns: str, **changes: Any) -> dict[str, Any]:
        said = [{"from": ("human", "gpt")[i % 2], "value": t} for i, t in enumerate(turns)]
        record = {"id": f"{len(turns)}-{image}", "image": image, "conversations": said}
        return {k: v for k, v in record.items() if v is not None} | changes

    coco, sam = "coco/train2017/000000000009.jpg", "sam/images/sa_1.jpg"
    ask = "What do you see happening in this image?\n<image>"
    dialogues = [
        dialogue(coco, ask, "A caf\u00e9 table \u2014 with a cup."),
        dialogue(sam, ask, "Two bowls, one \"red\"."),
        dialogue("coco/train2017/000000000010.jpg", ask, "A lost picture."),
        dialogue(None, "How are you?", "Well."),
        dialogue(coco, ask, ""),
        dialogue(coco, ask, "A table.", "And then?"),
        dialogue(coco, "<image> and <image>?", "Two."),
        dialogue(sam, "How many bowls?", "Two.", "Of which colour?", "Red."),
    ]  # fmt: skip
    path = folder / "sharegpt4v_instruct_gpt4-vision_cap100k.json"
    path.write_text(json.dumps(dialogues, indent=2, ensure_ascii=False), encoding="utf-8")
    return folder


def multigen20m(folder: Path) -> Path:
    """Canny: sound, no prompt, map lost, source lost, corrupt source; hedsketch: a map under its archive's folder."""
    source = "./aesthetics_6_plus_0"
    for number in range(4):
        path = folder / "images" / source / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(50 + number) if number < 3 else CORRUPT)
    edges = {"aesthetics_6_25_plus_group_0_canny": 4, "group_1_hedsketch": 1}
    for name, count in edges.items():
        (folder / "conditions" / name).mkdir(parents=True)
        for number in range(count):
            drawn = cv2.Canny(np.asarray(Image.open(io.BytesIO(picture(50 + number))).convert("L")), 100, 200)
            (folder / "conditions" / name / f"control_{number}.jpg").write_bytes(bytes(cv2.imencode(".jpg", drawn)[1]))

    def record(task: str, group: int, number: int, control: int, prompt: str | None = "a thing") -> str:
        path = f"aesthetics_6_25_plus_group_{group}_{task}/control_{control}.jpg"
        return json.dumps({"source": f"{source}/{number}.jpg", "prompt": prompt, f"control_{task}": path})

    canny = [
        record("canny", 0, 0, 0, "a woman in an orange suit"),
        record("canny", 0, 1, 1, ""),
        record("canny", 0, 1, 9),
        record("canny", 0, 9, 2),
        record("canny", 0, 3, 3),
        json.dumps({"source": f"{source}/0.jpg", "prompt": "no map"}),
    ]
    jsons = {"canny": canny, "hedsketch": [record("hedsketch", 1, 2, 0, "a cup")]}
    (folder / "json_files").mkdir()
    for task, lines in jsons.items():
        path = folder / "json_files" / f"aesthetics_plus_all_group_{task}_all.json"
        path.write_text("\n".join(lines) + "\n")
    return folder
