"""The webdataset source: plain tars, img2dataset's, X2I shards, and tars that are cut, damaged or none."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.pipelines.source_files import NAMES, photo, problems, read, serve
from x2i.base.errors import RecipeError
from x2i.corpus.sample import Picture, Sample, placeholder
from x2i.corpus.shard import ShardWriter
from x2i.pipelines.sources.webdataset import WebDataset, WebDatasetConfig

Members = list[tuple[str, bytes | str]]


def source(path: Path | str | list[str], **options: Any) -> WebDataset:
    path = str(path) if isinstance(path, Path) else path
    return WebDataset(WebDatasetConfig(path=path, **options))


def tar(path: Path, members: Members, mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in members:
            data = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def pairs(start: int = 0, count: int = 4) -> Members:
    numbered = [(f"{i:09d}", NAMES[i % len(NAMES)]) for i in range(start, start + count)]
    return [m for key, n in numbered for m in ((f"{key}.jpg", photo(n)), (f"{key}.txt", f"a picture: {n}"))]


def test_samples_are_grouped_as_the_webdataset_library_groups_them(tmp_path: Path) -> None:
    members: Members = [
        *pairs(),
        ("./dir/a.PNG", photo("page", 32, "PNG")),
        ("./dir/a.json", '{"caption": "a page", "url": "u"}'),
        ("b.depth.png", photo("moon", 32, "PNG")),
        ("b.jpg", photo("moon")),
        ("b.cls", "7"),
        ("c.mp4", b"no image, no text: no row"),
        ("d.txt", "a text whose image is not there"),
        ("._e.jpg", b"hidden"),
    ]
    path = tar(tmp_path / "0.tar", members)
    rows = read(source(path))
    plain = {r.location: (r.data, r.text) for r in rows[:4]}
    assert plain["0.tar#000000001.jpg"] == (photo("chelsea"), "a picture: chelsea")
    assert [(r.location, r.text) for r in rows[4:]] == [
        ("0.tar#dir/a.PNG", "a page"),
        ("0.tar#b.jpg", None),
        ("0.tar#d.txt", None),
    ]
    assert rows[4].meta["url"] == "u" and rows[5].meta == {"other_images": ["b.depth.png"]}
    assert problems(rows) == {"0.tar#d.txt": "missing_image"}
    import webdataset as wds

    theirs = [s for s in wds.WebDataset(str(path), shardshuffle=False, empty_check=False) if {"jpg", "png"} & s.keys()]
    assert [s.get("jpg", s.get("png")) for s in theirs] == [r.data for r in rows if r.data]


def test_keys_that_come_again_and_keys_with_dots_lose_nothing(tmp_path: Path) -> None:
    again: Members = [("a.jpg", photo("moon")), ("a.txt", "1"), ("a.jpg", photo("page")), ("a.txt", "2")]
    dotted: Members = [
        ("v1.5_a.jpg", photo("coins")),
        ("v1.5_a.txt", "coins"),
        ("v1.5_b.jpg", photo("coffee")),
        ("v1.5_b.txt", "c"),
    ]
    rows = read(source(tar(tmp_path / "0.tar", [*again, *dotted])))
    assert [(r.location.removeprefix("0.tar#"), r.text, r.data) for r in rows] == [
        ("a.jpg", "1", photo("moon")),
        ("a.jpg@2", "2", photo("page")),
        ("v1.5_a.jpg", "coins", photo("coins")),
        ("v1.5_b.jpg", "c", photo("coffee")),
    ]


def test_text_faults_cost_their_own_row_only(tmp_path: Path) -> None:
    members: Members = [
        ("a.jpg", photo("moon")), ("a.txt", b"\xff\xfe"),
        ("b.jpg", photo("page")), ("b.json", "[1, 2]"),
        ("c.jpg", b""), ("c.txt", "empty"),
        *pairs(),
    ]  # fmt: skip
    rows = read(source(tar(tmp_path / "0.tar", members)))
    assert problems(rows) == {"0.tar#a.jpg": "bad_text", "0.tar#b.jpg": "bad_metadata", "0.tar#c.jpg": "empty_file"}
    assert len(rows) == 7 and rows[0].data == photo("moon")


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_a_truncated_tar_gives_what_lies_before_the_cut(tmp_path: Path, mode: str) -> None:
    path = tar(tmp_path / "0.tar", pairs(count=8), mode)
    whole = read(source(path))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    rows = read(source(path))
    good = [r for r in rows if not r.problem]
    assert 1 <= len(good) < 8
    assert [(r.location, r.data, r.text) for r in good] == [(r.location, r.data, r.text) for r in whole[: len(good)]]
    assert list(problems(rows).values()) == ["truncated_tar"] and len(rows) == len(good) + 1


def test_every_place_to_cut_or_damage_a_tar_is_noticed(tmp_path: Path) -> None:
    path = tar(tmp_path / "0.tar", pairs(count=3))
    data = path.read_bytes()
    with tarfile.open(path) as archive:
        infos = archive.getmembers()
    last = infos[-1].offset_data + infos[-1].size
    for cut in (infos[2].offset, infos[2].offset + 100, infos[2].offset_data + 50, infos[3].offset, last - 1):
        path.write_bytes(data[:cut])
        rows = read(source(path))
        assert list(problems(rows).values()) == ["truncated_tar"], cut
        assert all(r.data == photo(NAMES[i]) for i, r in enumerate(rows) if not r.problem)
    path.write_bytes(data[: infos[2].offset] + b"\x55" * 512 + data[infos[2].offset + 512 :])
    rows = read(source(path))
    assert problems(rows) == {"0.tar#(end)": "damaged_tar"} and len(rows) == 2


def test_what_is_no_tar_is_one_row(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", pairs())
    (tmp_path / "b.tar").write_text("<html>not found</html>" * 100)
    (tmp_path / "c.tar").write_bytes(b"")
    (tmp_path / "list.txt").write_text("x")
    many = source(tmp_path)
    rows = read(many)
    assert problems(rows) == {"b.tar": "not_a_tar", "c.tar": "not_a_tar"} and len(rows) == 6
    assert many.ignored() == {"txt": 1}


def test_img2dataset_tables_account_for_what_is_not_in_the_tar(tmp_path: Path) -> None:
    path = tar(tmp_path / "00000.tar", pairs(count=3))
    table = [
        {"key": f"{i:09d}", "url": f"http://x/{i}", "status": status, "error_message": message}
        for i, (status, message) in enumerate(
            [("success", None)] * 3 + [("failed_to_download", "404"), ("failed_to_resize", "bad"), ("success", None)]
        )
    ]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "00000.parquet")
    for pattern in (str(tmp_path), str(tmp_path / "{00000..00000}.tar"), str(tmp_path / "*.tar")):
        tars = source(pattern)
        rows = read(tars)
        assert [r.problem and (r.problem.reason, r.problem.detail) for r in rows][3:5] == [
            ("not_downloaded", "404"),
            ("not_downloaded", "bad"),
        ]
        assert problems(rows)["00000.tar#000000005"] == "missing_from_tar"
        assert rows[3].meta["url"] == "http://x/3" and len(rows) == 6
        assert tars.ignored() == {}
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])  # what a killed img2dataset leaves
    reasons = list(problems(read(source(tmp_path))).values())
    assert reasons.count("truncated_tar") == 1 and "missing_from_tar" in reasons
    (tmp_path / "00000.parquet").write_bytes(b"PAR1 no")
    assert "bad_parquet" in problems(read(source(tmp_path))).values()


def test_an_x2i_corpus_can_be_read_back(tmp_path: Path) -> None:
    inputs = (Picture(photo("moon"), "jpg", 64, 64), Picture(photo("page", 64, "PNG"), "png", 64, 64))
    samples = [
        Sample(
            "k1", "edit", f"join {placeholder(1)} and {placeholder(2)}", inputs, Picture(photo("coffee"), "jpg", 64, 64)
        ),
        Sample("k2", "text_to_iamge", "coffee", (), Picture(photo("coffee"), "jpg", 64, 64)),
        Sample("k3", "vqa", f"what is {placeholder(1)}?", inputs[:1], None, ({"role": "user", "content": "?"},)),
    ]
    with ShardWriter(tmp_path / "0.tar") as writer:
        for sample in samples:
            writer.write(sample.key, sample.members())
    rows = read(source(tmp_path / "0.tar"))
    assert [r.data for r in rows] == [photo("coffee"), photo("coffee"), None]
    assert [data for _, data in rows[0].inputs] == [p.data for p in inputs]
    assert rows[0].text == samples[0].instruction
    assert (rows[1].meta["task_type"], rows[1].meta["instruction"]) == ("text_to_iamge", "coffee")
    assert problems(rows) == {"0.tar#k3.json": "no_output_image"}


def test_x2i_samples_that_do_not_fit_are_problems(tmp_path: Path) -> None:
    record = {"task_type": "edit", "instruction": f"change {placeholder(1)}", "input_images": ["a.input_1.jpg"]}
    few = {"task_type": "edit", "instruction": f"{placeholder(1)} {placeholder(2)}"}
    rows = read(
        source(
            tar(
                tmp_path / "0.tar",
                [
                    ("a.json", json.dumps(record)), ("a.output.jpg", photo("moon")),
                    ("b.json", json.dumps(few)), ("b.input_1.jpg", photo("page")), ("b.output.jpg", photo("moon")),
                    ("c.json", '{"caption": "no X2I"}'), ("c.output.jpg", photo("moon")),
                ],
            )
        )
    )  # fmt: skip
    assert problems(rows) == {"0.tar#a.output.jpg": "missing_image", "0.tar#b.output.jpg": "bad_instruction"}
    assert rows[2].text == "no X2I"


def test_paths_are_files_patterns_folders_lists_and_urls(tmp_path: Path) -> None:
    for i in range(3):
        tar(tmp_path / "set" / f"{i:05d}.tar", pairs(i * 4), "w:gz" if i == 2 else "w")
    tar(tmp_path / "other" / "x.tgz", pairs(20), "w:gz")
    everything = [r.location for r in read(source(tmp_path))]
    assert everything[0] == "other/x.tgz#000000020.jpg" and len(everything) == 16
    braces = source(f"{tmp_path}/set/{{00000..00002}}.tar")
    assert [r.location for r in read(braces)][::4] == [f"0000{i}.tar#{i * 4:09d}.jpg" for i in range(3)]
    assert braces.name == "set"
    listed = source([f"{tmp_path}/set/*.tar", f"{tmp_path}/other/x.tgz"])
    assert sorted(r.location for r in read(listed)) == sorted(everything)
    with serve(tmp_path) as url:
        for path in (f"{url}/set/{{00000..00002}}.tar", f"{url}/set/"):
            assert [(r.location, r.data) for r in read(source(path))] == [(r.location, r.data) for r in read(braces)]
    for wrong, message in ((tmp_path / "set/00009.tar", "no such file"), (tmp_path / "set/x*.tar", "no tars here")):
        with pytest.raises(RecipeError, match=message):
            list(source(wrong).plan())


def test_planning_reads_no_bytes_and_sees_changes(tmp_path: Path) -> None:
    path = tar(tmp_path / "0.tar", pairs())
    units = list(source(path).plan())
    assert units[0].spec == {"tar": ["0.tar", path.stat().st_size, path.stat().st_mtime_ns]}
    tar(path, pairs(count=5))
    assert next(source(path).plan()).id != units[0].id
