"""Published datasets of pairs in small: their very folders, columns and archives, with photographs from scikit-image.

Each writer makes a folder and returns what the good rows must be, by location: (instruction without placeholders or
None where it is drawn, input images, output image). Whatever goes wrong in the real ones goes wrong here, too.
"""

from __future__ import annotations

import functools
import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import skimage.data
from PIL import Image

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


class Pair(NamedTuple):
    """What a good row must hold."""

    text: str | None
    inputs: list[bytes]
    output: bytes


Pairs = dict[str, Pair]


@functools.cache
def picture(number: int, kind: str = "JPEG", side: int = 72) -> bytes:
    """A crop of a photograph as a file's bytes, another one for each number."""
    names = ("astronaut", "chelsea", "coffee", "rocket")
    whole = Image.fromarray(getattr(skimage.data, names[number % 4])())
    x, y = number * 37 % (whole.width - side), number * 61 % (whole.height - side)
    out = io.BytesIO()
    whole.crop((x, y, x + side, y + side)).save(out, kind, quality=90)
    return out.getvalue()


def region(box: tuple[int, int, int, int] = (10, 20, 40, 50), side: int = 72) -> np.ndarray:
    """bool [side, side]: where an edit took place, in fixtures that have masks."""
    inside = np.zeros((side, side), bool)
    inside[box[1] : box[3], box[0] : box[2]] = True
    return inside


def rim() -> np.ndarray:
    """bool [72, 72]: beside `region`, where `holed` is half transparent."""
    beside = np.zeros_like(region())
    beside[20:50, 40] = True
    return beside


def white_mask() -> bytes:
    """`region` as UltraEdit has it: white on black."""
    out = io.BytesIO()
    Image.fromarray(np.where(region(), 255, 0).astype(np.uint8)).convert("RGB").save(out, "PNG")
    return out.getvalue()


def holed(source: bytes, alpha: bool = True) -> bytes:
    """`region` as MagicBrush has it: the source, white and transparent there, half so at the rim."""
    pixels = np.array(Image.open(io.BytesIO(source)).convert("RGBA"))
    pixels[region()] = (255, 255, 255, 0)
    pixels[rim(), 3] = 128
    out = io.BytesIO()
    Image.fromarray(pixels if alpha else pixels[..., :3]).save(out, "PNG")
    return out.getvalue()


def cell(data: bytes | None) -> dict[str, Any] | None:
    """An image as Hugging Face's Parquet files hold it; a null one is null."""
    return None if data is None else {"bytes": data, "path": None}


def table(path: Path, rows: list[dict[str, Any]], images: tuple[str, ...], **types: pa.DataType) -> None:
    """Write a Parquet file in row groups of two."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {
        name: pa.array([r[name] for r in rows], IMAGE if name in images else types.get(name)) for name in rows[0]
    }
    pq.write_table(pa.table(columns), path, row_group_size=2)


def put(path: Path, data: bytes) -> bytes:
    """Write a file and its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return data


def lines(path: Path, records: list[Any]) -> None:
    """Write JSON lines; a string is a line as it stands."""
    put(path, "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records).encode())


def packed(members: dict[str, bytes]) -> bytes:
    """A .tar.gz as `tar czf` makes it: folders and all."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for folder in sorted({str(Path(n).parent) for n in members} - {"."}):
            info = tarfile.TarInfo(f"./{folder}")
            info.type = tarfile.DIRTYPE
            tar.addfile(info)
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return gzip.compress(out.getvalue(), mtime=0)


def split(path: Path, data: bytes, parts: int, mark: str = ".") -> list[Path]:
    """Write a file in parts: `split -b` names them aa, ab, …; `mark` stands before that."""
    size = -(-len(data) // parts)
    files = []
    for i in range(parts):
        files.append(path.with_name(f"{path.name}{mark}a{chr(ord('a') + i)}"))
        put(files[-1], data[i * size : (i + 1) * size])
    return files


def omniedit(folder: Path) -> Pairs:
    """Rows 2 (no wording), 3 (null output), 4 (a source that is no picture) cannot be used."""
    common = {"width": 72, "height": 72, "sc_score_1": 10, "sc_score_2": 9, "pq_score": 8, "o_score": 8.49}
    said = {"sc_reasoning": "The hat is gone.", "pq_reasoning": None}
    rows = [
        {
            "omni_edit_id": f"task_obj_remove_{i}",
            "task": "removal",
            "src_img": cell(picture(i)),
            "edited_img": cell(picture(100 + i)),
            "edited_prompt_list": ["Remove the hat.", "Take the hat away."],
        }
        | common
        | said
        for i in range(6)
    ]
    rows[1]["edited_prompt_list"], rows[1]["task"] = ["", " Add a boat. "], "addition"
    rows[2]["edited_prompt_list"] = []
    rows[3]["edited_img"] = None
    rows[4]["src_img"] = cell(b"<html>gone</html>")
    rows[5]["task"] = None
    name = "data/train-00000-of-00571.parquet"
    table(folder / name, rows, ("src_img", "edited_img"), edited_prompt_list=pa.list_(pa.string()))
    texts = {0: None, 1: "Add a boat.", 5: None}
    return {f"{name}#{i}": Pair(t, [picture(i)], picture(100 + i)) for i, t in texts.items()}


def ultraedit(folder: Path) -> Pairs:
    """A free-form split with null masks and a null instruction in row 1, and a region split, row 1 without a mask."""
    pairs: Pairs = {}
    for split_name, first in (("FreeForm_0-00000-of-00002", 0), ("RegionBase-00000-of-00093", 3)):
        rows = []
        for i in range(first, first + 3):
            rows.append(
                {
                    "clip_sim_source": 0.25, "clip_sim_target": 0.26, "clip_sim_dir": 0.2, "clip_sim_image": 0.9,
                    "dinov2_sim": 0.8, "ssim": float("nan"), "source_caption": "A desk.", "target_caption": None,
                    "idx": i, "edit_prompt": f"add lamp {i}", "edit_object": "lamp" if first else None,
                    "source_image": cell(picture(200 + i)), "edited_image": cell(picture(300 + i)),
                    "mask_image": cell(white_mask()) if first else None,
                }
            )  # fmt: skip
        rows[1]["edit_prompt" if not first else "mask_image"] = None
        images = ("source_image", "edited_image", "mask_image")
        table(
            folder / "data" / f"{split_name}.parquet", rows, images, edit_object=pa.string(), target_caption=pa.string()
        )
        for i in range(first, first + 3):
            if i != 1:
                location = f"data/{split_name}.parquet#{i - first}"
                pairs[location] = Pair(f"add lamp {i}", [picture(200 + i)], picture(300 + i))
    return pairs


def magicbrush(folder: Path) -> Pairs:
    """A session of three turns; row 2 has a null mask, row 3 a mask that is cut."""
    rows = [
        {
            "img_id": "242679", "turn_index": i + 1, "source_img": cell(picture(400 + i, "PNG")),
            "mask_img": cell(holed(picture(400 + i, "PNG"))), "instruction": f"turn {i + 1}",
            "target_img": cell(picture(401 + i, "PNG")),
        }
        for i in range(4)
    ]  # fmt: skip
    rows[2]["mask_img"] = None
    rows[3]["mask_img"] = cell(holed(picture(403, "PNG"))[:400])
    name = "data/train-00000-of-00051-9fd9f23e8b1cb397.parquet"
    table(folder / name, rows, ("source_img", "mask_img", "target_img"), turn_index=pa.int32())
    return {f"{name}#{i}": Pair(f"turn {i + 1}", [picture(400 + i, "PNG")], picture(401 + i, "PNG")) for i in range(3)}


def magicbrush_test(folder: Path) -> Pairs:
    """The test split's folder: two turns of a session, one of another whose output is not there."""
    inside = folder / "images" / "100547"
    turns, pairs = [], {}
    before, data = "100547-input.png", put(inside / "100547-input.png", picture(450, "PNG"))
    for turn in (1, 2):
        after = put(inside / f"100547-output{turn}.png", picture(450 + turn, "PNG"))
        put(inside / f"100547-mask{turn}.png", holed(data))
        record = {"input": before, "mask": f"100547-mask{turn}.png", "output": f"100547-output{turn}.png"}
        turns.append(record | {"instruction": f"do {turn}"})
        pairs[f"edit_turns.json#{turn - 1}"] = Pair(f"do {turn}", [data], after)
        before, data = record["output"], after
    put(folder / "images/7/7-input.png", picture(460, "PNG"))
    turns.append({"input": "7-input.png", "mask": "7-mask1.png", "output": "7-output1.png", "instruction": "x"})
    put(folder / "edit_turns.json", json.dumps(turns).encode())
    described = {"100547": {"100547-input.png": "a cat", "100547-output1.png": "a cat with a hat"}}
    put(folder / "global_descriptions.json", json.dumps(described).encode())
    return pairs


def instruct_pix2pix(folder: Path) -> Pairs:
    """Two prompts with two seeds each, one without an instruction, one folder that never came; one picture missing."""
    listed: list[Any] = []
    pairs: Pairs = {}
    prompts = [("0000000", "make it snow"), ("0000001", "as a cartoon"), ("0000002", None)]
    for number, (name, text) in enumerate(prompts):
        seeds = [str(1006085889 + number * 10 + i) for i in range(2)]
        listed.append([name, seeds])
        put(
            folder / name / "prompt.json",
            json.dumps({"input": "a road", "edit": text, "output": "a snowy road"}).encode(),
        )
        measured = {"clip_sim_0": 0.28, "clip_sim_1": 0.29, "clip_sim_dir": 0.24, "clip_sim_image": 0.87}
        lines(folder / name / "metadata.jsonl", [{"seed": int(s), "p2p_threshold": 0.4, **measured} for s in seeds])
        for i, seed in enumerate(seeds):
            where = 500 + number * 10 + i
            put(folder / name / f"{seed}_0.jpg", picture(where))
            if (number, i) == (1, 1):
                continue
            put(folder / name / f"{seed}_1.jpg", picture(where + 5))
            if text:
                pairs[f"{name}/{seed}"] = Pair(text, [picture(where)], picture(where + 5))
    listed += [["0009999", ["1"]], "not a pair"]
    put(folder / "seeds.json", json.dumps(listed).encode())
    return pairs


def instruct_pix2pix_table(folder: Path) -> Pairs:
    """The same set as Parquet; row 1 has no instruction."""
    rows = [
        {"original_prompt": "a road", "original_image": cell(picture(550 + i)), "edit_prompt": "make it snow" if i != 1 else None,
         "edited_prompt": "a snowy road", "edited_image": cell(picture(560 + i))}
        for i in range(3)
    ]  # fmt: skip
    name = "data/train-00000-of-00262-57cebf95b4a9170c.parquet"
    table(folder / name, rows, ("original_image", "edited_image"))
    return {f"{name}#{i}": Pair("make it snow", [picture(550 + i)], picture(560 + i)) for i in (0, 2)}


def seed_data_edit(folder: Path) -> Pairs:
    """All three parts: split archives, a whole one, rewritten instructions, turns with null pictures."""
    pairs: Pairs = {}
    auto = folder / "auto_editing/openimages"
    sources = {f"source_images/00/{i}.jpg": picture(600 + i) for i in range(4)}
    targets = {f"target_images/00/{i}.jpg": picture(610 + i) for i in range(4)}
    split(auto / "images/source_images.tar.gz", packed(sources), 3, ".part-")
    split(auto / "images/target_images.tar.gz", packed(targets), 2, ".part-")
    records = [
        {"source_image": s, "target_image": t, "instruction": f"auto {i}"}
        for i, (s, t) in enumerate(zip(sources, targets, strict=True))
    ]
    records[2]["instruction"] = ""
    lines(auto / "annotations/split_0001.jsonl", [*records[:3], '{"source_image": "cut'])
    lines(auto / "annotations_GPT4V/split_0001.jsonl", [records[3] | {"instruction_new": "auto 3 anew"}])
    for i in (0, 1):
        location = f"auto_editing/openimages/annotations/split_0001.jsonl#{i + 1}"
        pairs[location] = Pair(f"auto {i}", [picture(600 + i)], picture(610 + i))
    location = "auto_editing/openimages/annotations_GPT4V/split_0001.jsonl#1"
    pairs[location] = Pair(None, [picture(603)], picture(613))

    real = folder / "real_editing"
    put(real / "images/images.tar.gz", packed({"images/a.png": picture(620, "PNG"), "images/b.jpg": picture(621)}))
    record = {"source_image": "images/a.png", "target_image": "images/b.jpg", "instruction": "less red, please"}
    lines(real / "annotations/split_0001.jsonl", [record, record | {"target_image": "images/gone.jpg"}])
    pairs["real_editing/annotations/split_0001.jsonl#1"] = Pair(
        record["instruction"], [picture(620, "PNG")], picture(621)
    )

    multi = folder / "multi_turn_editing"
    names = [f"20240330_315P/Data/208/{i}.jpg" for i in range(6)]
    split(multi / "images/multi_turn.tar.gz", packed({n: picture(630 + i) for i, n in enumerate(names)}), 2, ".part-")
    whole: dict[str, Any] = {"source_image": names[0]}
    whole |= {k: v for i in (1, 2, 3) for k, v in ((f"instruction_{i}", f"step {i}"), (f"edit_image_{i}", names[i]))}
    whole |= {f"{k}_{i}": None for i in (4, 5) for k in ("instruction", "edit_image")}
    broken = whole | {"edit_image_2": None, "instruction_4": "step 4", "edit_image_4": names[4]}
    lines(multi / "annotations/split_0001.jsonl", [whole, broken])
    place = "multi_turn_editing/annotations/split_0001.jsonl"
    for i in (1, 2, 3):
        pairs[f"{place}#1:{i}"] = Pair(f"step {i}", [picture(630 + i - 1)], picture(630 + i))
    pairs[f"{place}#2:1"] = Pair("step 1", [picture(630)], picture(631))
    pairs[f"{place}#2:4"] = Pair("step 4", [picture(633)], picture(634))
    return pairs


def viton_hd(folder: Path) -> Pairs:
    """Three people; the second has a mask, the third lacks the greyed-out picture; a test pair that is unpaired."""
    pairs: Pairs = {}
    for split_name, names in (("train", ["00000_00", "00001_00", "00002_00"]), ("test", ["05006_00", "11001_00"])):
        for i, name in enumerate(names):
            at = 700 + (split_name == "test") * 30 + i
            put(folder / split_name / "image" / f"{name}.jpg", picture(at))
            put(folder / split_name / "cloth" / f"{name}.jpg", picture(at + 10))
            if i != 2:
                put(folder / split_name / "agnostic-v3.2" / f"{name}.jpg", picture(at + 20))
            put(folder / split_name / "image-parse-v3" / f"{name}.png", picture(at, "PNG"))
    put(folder / "train/agnostic-mask/00001_00_mask.png", white_mask())
    put(
        folder / "train_pairs.txt",
        "".join(f"0000{i}_00.jpg 0000{i}_00.jpg\n" for i in range(3)).encode() + b"lonely.jpg\n",
    )
    put(folder / "test_pairs.txt", b"05006_00.jpg 11001_00.jpg\n11001_00.jpg 11001_00.jpg\n")
    for i in (0, 1):
        pairs[f"train_pairs.txt#{i + 1}"] = Pair(None, [picture(720 + i), picture(710 + i)], picture(700 + i))
    pairs["test_pairs.txt#2"] = Pair(None, [picture(751), picture(741)], picture(731))
    return pairs


def stylebooth(folder: Path) -> Pairs:
    """A table whose last column has commas of its own; one style without a name, one picture missing."""
    header = "EnStyle,ZhStyle,ShortStyleName,Target:FILE,Source:FILE,SearchResult:DICT"
    rows = ["Abstract Expressionism", "Adorable 3D Character", "", "Clay"]
    text = [header]
    for i, style in enumerate(rows):
        target, source = f"data/{i}/target_{i}.jpg", f"data/{i}/source_{i}.jpg"
        text.append(f"{style},风格,s{i},{target},{source},{{'clip': 0.3, 'names': ['a', \"b\"]}}")
        put(folder / source, picture(800 + i))
        if i != 3:
            put(folder / target, picture(810 + i))
    put(folder / "train.csv", "\n".join(text).encode() + b"\n")
    return {f"train.csv#{i + 2}": Pair(None, [picture(800 + i)], picture(810 + i)) for i in (0, 1)}


def x2i(folder: Path) -> Pairs:
    """An X2I repository: a set in split archives, one in an archive, one unpacked, and text to image."""
    one, two = "<img><|image_1|></img>", "<img><|image_2|></img>"
    pairs: Pairs = {}
    members = {f"images/{i:03}.jpg": picture(900 + i) for i in range(8)}
    split(folder / "pix2pix/images.tar.gz", packed(members), 4)
    edits = [
        {"task_type": "image_edit", "instruction": f"{one} edit {i}", "input_images": [f"pix2pix/images/{2 * i:03}.jpg"],
         "output_image": f"pix2pix/images/{2 * i + 1:03}.jpg"}
        for i in range(4)
    ]  # fmt: skip
    edits[3]["instruction"] = "no placeholder"
    lines(folder / "pix2pix.jsonl", edits)
    for i in range(3):
        pairs[f"pix2pix.jsonl#{i + 1}"] = Pair(f"edit {i}", [picture(900 + 2 * i)], picture(901 + 2 * i))

    put(
        folder / "hr-viton/hr-viton.tar.gz",
        packed({f"hr-viton/{n}.jpg": picture(910 + i) for i, n in enumerate("abc")}),
    )
    tries: dict[str, Any] = {
        "task_type": "try_on",
        "instruction": f"put {two} on {one}",
        "output_image": "hr-viton/c.jpg",
    }
    tries["input_images"] = ["hr-viton/a.jpg", "hr-viton/b.jpg"]
    lines(folder / "hr-viton.jsonl", [tries, tries | {"output_image": "hr-viton/gone.jpg"}])
    pairs["hr-viton.jsonl#1"] = Pair(None, [picture(910), picture(911)], picture(912))

    put(folder / "laion-coco-aesthetic/00000.tar.gz", packed({"00000/1.jpg": picture(920)}))
    put(folder / "laion-coco-aesthetic/00001.tar.gz", packed({"00001/2.jpg": picture(921)}))
    put(folder / "laion-coco-aesthetic/00002/3.jpg", picture(922))
    told = [
        {"task_type": "text_to_iamge", "instruction": f"a text {i}", "input_images": None,
         "output_image": f"laion-coco-aesthetic/0000{i}/{i + 1}.jpg"}
        for i in range(3)
    ]  # fmt: skip
    lines(folder / "laion-coco-aesthetic.jsonl", told)
    for i in range(3):
        pairs[f"laion-coco-aesthetic.jsonl#{i + 1}"] = Pair(f"a text {i}", [], picture(920 + i))
    return pairs
