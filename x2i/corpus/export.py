"""A corpus in the layouts that others read: files of records, and the pictures that they name.

    DIR/llava.json, sharegpt4v.json      a list of {id, image, conversations}     understanding
    DIR/swift.jsonl                      {messages, images, objects, rejected_response}   understanding, for ms-swift
    DIR/x2i.jsonl                        {task_type, instruction, input_images, output_image}   OmniGen's X2I
    DIR/json_files/aesthetics_plus_all_group_TASK_all.json    {source, prompt, control_TASK}    MultiGen-20M
    DIR/images/ab/abcd….jpg              the pictures, named by their content, each once
    DIR/provenance.parquet               of each record: its sample, source, location, what was carried (licences)
    DIR/README.md                        what this is

Paths in records start at DIR (MultiGen-20M's: at `images` and `conditions`, as published). What a layout cannot say is
left out, and counted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from x2i.base.errors import RecipeError
from x2i.base.files import atomic, write_text
from x2i.base.seeds import canonical_json
from x2i.corpus.corpus import Corpus
from x2i.corpus.sample import Picture, Sample

#: How MultiGen-20M names our tasks; tasks that were imported from it have its names already.
MULTIGEN = {
    "canny_to_image": "canny",
    "hed_to_image": "hed",
    "sketch_to_image": "hedsketch",
    "depth_to_image": "depth",
    "normals_to_image": "normal",
    "semantic_to_image": "seg",
    "boxes_to_image": "bbox",
    "skeleton_to_image": "openpose",
    "outpaint": "outpainting",
    "inpaint": "inpainting",
    "deblur": "blur",
    "colorize": "grayscale",
}
MULTIGEN |= {f"{task}_to_image": task for task in (*MULTIGEN.values(), "segbase")}

_PROVENANCE = pa.schema(
    {
        "file": pa.string(),  # of records
        "record": pa.int64(),  # its place there, from 0
        "key": pa.string(),
        "task_type": pa.string(),
        "image_id": pa.string(),
        "source": pa.string(),
        "location": pa.string(),
        "carried": pa.string(),  # JSON: see `output.carry`
    }
)


@dataclass
class Exported:
    """What was written: records by task, samples left out by "task: reason", pictures, bytes of pictures."""

    format: str
    out: Path
    records: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    pictures: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class _Layout:
    """One format: what its records are, and in which file each lies."""

    record: Callable[[Sample, _Folder], tuple[str, dict[str, Any]] | str]  # (file, record), or why there is none
    listed: bool = False  # a JSON list instead of lines
    hint: str = ""


class _Folder:
    """The folder that is being written: pictures, each once, and files of records."""

    def __init__(self, path: Path, listed: bool, prompts: Callable[[str], str], told: Exported) -> None:
        self.path, self.prompts = path, prompts
        self._listed, self._told = listed, told
        self._files: dict[str, tuple[IO[str], int]] = {}
        self._there: set[str] = set()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> _Folder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._listed:
            for file, count in self._files.values():
                file.write("\n]\n" if count else "[]\n")
        self._stack.close()

    def picture(self, picture: Picture) -> str:
        """Put a picture into `images`, named by its content; gives its path below the folder."""
        name = hashlib.sha256(picture.data).hexdigest()[:32]
        return self.place(f"images/{name[:2]}/{name}.{picture.extension}", picture.data)

    def place(self, name: str, data: bytes) -> str:
        """Write a file, if it is not there; gives `name`."""
        if name not in self._there:
            path = self.path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            self._there.add(name)
            self._told.pictures += 1
            self._told.bytes += len(data)
        return name

    def add(self, name: str, record: dict[str, Any]) -> int:
        """Append a record to a file; gives its place there."""
        if name not in self._files:
            path = self.path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            self._files[name] = self._stack.enter_context(path.open("w", encoding="utf-8")), 0
        file, count = self._files[name]
        text = json.dumps(record, ensure_ascii=False)
        file.write((("[\n" if count == 0 else ",\n") + text) if self._listed else text + "\n")
        self._files[name] = file, count + 1
        return count


def export(corpus: str | Path, format_: str, out: str | Path, tasks: Iterable[str] = ()) -> Exported:
    """Write a corpus in a layout of `FORMATS`. The folder appears whole, or not at all.

    Args:
        corpus: a folder or an fsspec URL.
        out: a new folder, or an empty one.
        tasks: only samples of these task types; all of them if none is named.

    Raises:
        RecipeError: no such format or task, the folder holds something, or no sample fits the format.
        X2IError: there is no corpus.
    """
    if format_ not in FORMATS:
        raise RecipeError(f"--format {format_}: no such format; there are {', '.join(FORMATS)}")
    opened, out, layout = Corpus(corpus), Path(out), FORMATS[format_]
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RecipeError(f"{out}: holds something already; name another folder, or remove it")
    if "://" not in str(corpus) and out.resolve().is_relative_to(Path(corpus).resolve()):
        raise RecipeError(f"{out}: lies in the corpus's folder, which a build replaces whole; name another folder")
    wanted = list(dict.fromkeys(tasks))
    if unknown := [t for t in wanted if t not in opened.tasks]:
        raise RecipeError(f"{corpus}: no task {', '.join(unknown)}; it has {', '.join(opened.tasks)}")
    told = Exported(format_, out)
    with atomic(out) as temporary:
        temporary.mkdir()
        with (
            _Folder(temporary, layout.listed, _prompts(opened, format_), told) as folder,
            pq.ParquetWriter(temporary / "provenance.parquet", _PROVENANCE, compression="zstd") as writer,
        ):
            for rows in _batched(_records(opened, layout, folder, set(wanted or opened.tasks), told)):
                writer.write_table(pa.Table.from_pylist(rows, schema=_PROVENANCE))
        if not told.records:
            why = "; ".join(f"{what} ({n:,})" for what, n in told.left_out.most_common(5)) or "it has no samples"
            raise RecipeError(f"{corpus}: nothing fits the format {format_}: {why}")
        write_text(temporary / "README.md", _readme(opened, layout, told))
        if out.is_dir():
            out.rmdir()  # it is empty
    return told


def _records(
    corpus: Corpus, layout: _Layout, folder: _Folder, tasks: set[str], told: Exported
) -> Iterator[dict[str, Any]]:
    """Write all records; yields where each comes from."""
    for batch in corpus.manifest.to_batches(4096):
        for row in batch.to_pylist():
            if row["task_type"] not in tasks:
                continue
            sample = corpus.read(row)
            made = layout.record(sample, folder)
            if isinstance(made, str):
                told.left_out[f"{sample.task_type}: {made}"] += 1
                continue
            name, record = made
            told.records[sample.task_type] += 1
            yield {
                "file": name,
                "record": folder.add(name, record),
                "key": sample.key,
                "task_type": sample.task_type,
                **{n: row[n] for n in ("image_id", "source", "location")},
                "carried": canonical_json(sample.provenance.get("carried", {})),
            }


def _batched(rows: Iterator[dict[str, Any]], size: int = 10_000) -> Iterator[list[dict[str, Any]]]:
    held: list[dict[str, Any]] = []
    for row in rows:
        held.append(row)
        if len(held) == size:
            yield held
            held = []
    yield held


def _prompts(corpus: Corpus, format_: str) -> Callable[[str], str]:
    """What MultiGen-20M calls the prompt: a row's caption, without the words around it."""
    if format_ != "multigen":
        return lambda row_id: ""
    query = "select row_id, coalesce(meta ->> '$.prompt', text, '') as prompt from selection where kept"
    prompts = {r["row_id"]: r["prompt"] for b in corpus.sql(query).to_arrow_reader(10_000) for r in b.to_pylist()}
    return lambda row_id: prompts.get(row_id, "")


def _talk(name: str) -> Callable[[Sample, _Folder], tuple[str, dict[str, Any]] | str]:
    """LLaVA's record: boxes are written out as numbers, since it has no place for them."""

    def record(sample: Sample, folder: _Folder) -> tuple[str, dict[str, Any]] | str:
        if not sample.messages:
            return "has no messages"
        speakers = {"user": "human", "assistant": "gpt", "system": "system"}
        refs, boxes = iter(sample.objects.get("ref", ())), iter(sample.objects.get("bbox", ()))
        turns: list[dict[str, str]] = []
        for message in sample.messages:
            role, said = message["role"], message["content"]
            if role not in speakers or not isinstance(said, str):
                return "has messages of another kind"
            if not turns and said.startswith("<image>") and said.count("<image>") == 1:
                said = "<image>\n" + said.removeprefix("<image>").lstrip("\n")
            turns.append({"from": speakers[role], "value": _filled(said, refs, boxes)})
        images = [folder.picture(p) for p in sample.input_images]
        return name, {"id": sample.key, "image": images[0] if len(images) == 1 else images, "conversations": turns}

    return record


def _filled(text: str, refs: Iterator[str], boxes: Iterator[list[float]]) -> str:
    """A message with what its `<ref-object>` and `<bbox>` stand for, in their order."""
    out, rest = "", text
    while True:
        at = min((i for i in (rest.find("<ref-object>"), rest.find("<bbox>")) if i >= 0), default=-1)
        if at < 0:
            return out + rest
        ref = rest.startswith("<ref-object>", at)
        mark = "<ref-object>" if ref else "<bbox>"
        value = next(refs, None) if ref else next(boxes, None)
        said = mark if value is None else value if isinstance(value, str) else f"[{', '.join(f'{v:g}' for v in value)}]"
        out, rest = out + rest[:at] + said, rest[at + len(mark) :]


def _swift(sample: Sample, folder: _Folder) -> tuple[str, dict[str, Any]] | str:
    if not sample.messages:
        return "has no messages"
    record: dict[str, Any] = {"messages": list(sample.messages)}
    record["images"] = [folder.picture(p) for p in sample.input_images]
    if sample.rejected_response is not None:
        record["rejected_response"] = sample.rejected_response
    return "swift.jsonl", record | ({"objects": sample.objects} if sample.objects else {})


def _omnigen(sample: Sample, folder: _Folder) -> tuple[str, dict[str, Any]] | str:
    if sample.output_image is None:
        return "has no output image"
    inputs = [folder.picture(p) for p in sample.input_images]
    record = {"task_type": sample.task_type, "instruction": sample.instruction, "input_images": inputs}
    return "x2i.jsonl", record | {"output_image": folder.picture(sample.output_image)}


def _multigen(sample: Sample, folder: _Folder) -> tuple[str, dict[str, Any]] | str:
    task = MULTIGEN.get(sample.task_type)
    if task is None or sample.output_image is None or len(sample.input_images) != 1:
        return "is none of MultiGen-20M's tasks"
    (control,) = sample.input_images
    name = f"aesthetics_6_25_plus_group_0_{task}/control_{sample.key}.{control.extension}"
    folder.place(f"conditions/{name}", control.data)
    source = folder.picture(sample.output_image).removeprefix("images/")
    record = {"source": source, "prompt": folder.prompts(sample.provenance["row_id"]), f"control_{task}": name}
    return f"json_files/aesthetics_plus_all_group_{task}_all.json", record


def _readme(corpus: Corpus, layout: _Layout, told: Exported) -> str:
    counts = "\n".join(f"- {task}: {n:,}" for task, n in sorted(told.records.items()))
    left = "".join(f"- {what}: {n:,}\n" for what, n in sorted(told.left_out.items()))
    return (
        f"# {corpus.info['name']}\n\n{corpus.info['description']}\n\n".replace("\n\n\n\n", "\n\n")
        + f"Exported by x2i in the layout `{told.format}` from the corpus with the digest `{corpus.digest}`.\n"
        f"Licence: {corpus.info['license']}; where each record comes from stands in `provenance.parquet`.\n\n"
        f"{layout.hint}\n\n## Records\n\n{counts}\n" + (f"\n## Left out\n\n{left}" if left else "")
    )


FORMATS: dict[str, _Layout] = {
    "llava": _Layout(_talk("llava.json"), True, "For LLaVA: `--data_path llava.json --image_folder .`"),
    "sharegpt4v": _Layout(
        _talk("sharegpt4v.json"), True, "x2i reads it with `kind: sharegpt4v`, `path: sharegpt4v.json`."
    ),
    "ms-swift": _Layout(
        _swift, False, "For ms-swift: `--dataset swift.jsonl`, with ROOT_IMAGE_DIR set to this folder."
    ),
    "omnigen": _Layout(_omnigen, False, "x2i reads it with `kind: x2i_jsonl`, `path: x2i.jsonl`."),
    "multigen": _Layout(_multigen, False, "x2i reads it with `kind: multigen20m`, `path:` this folder."),
}
