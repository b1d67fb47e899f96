"""`trace` tells where a sample comes from and why it is there, and why a picture is not."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.corpora import Built, build
from x2i import corpus
from x2i.base.errors import RecipeError, X2IError
from x2i.corpus.audit import audit
from x2i.corpus.trace import trace, trace_image, trace_row


@pytest.fixture
def here(built: Built, monkeypatch: pytest.MonkeyPatch) -> Built:
    """The corpus, from the folder that its paths are relative to."""
    monkeypatch.chdir(built.root)
    return built


def key_of(location: str, task: str) -> str:
    rows = corpus.open("corpus").manifest.to_pylist()
    return next(str(r["key"]) for r in rows if (r["location"], r["task_type"]) == (location, task))


def rules(row: dict[str, Any]) -> dict[str, bool | None]:
    return {r["rule"]: r["holds"] for r in row["rules"]}


def test_a_sample_is_followed_from_its_file_to_its_bytes(here: Built) -> None:
    key = key_of("astronaut.png", "inpaint")
    told = trace("corpus", key)
    sample, row = told["sample"], told["row"]
    opened = corpus.open("corpus")
    assert told["digest"] == opened.digest
    assert row["image_id"] == hashlib.sha256(Path("photos/astronaut.png").read_bytes()).hexdigest()
    assert (row["origin"]["file"], row["origin"]["unchanged"]) == ("photos/astronaut.png", True)
    assert row["text"].startswith("Color image of the astronaut")
    assert set(sample["parameters"]) == {"hole"}
    with Path("corpus", sample["shard"]).open("rb") as shard:
        shard.seek(sample["offset"])
        assert hashlib.sha256(shard.read(sample["size"])).hexdigest() == sample["sha256"]
    assert {s["task_type"] for s in row["samples"]} == {"text_to_image", "canny_to_image", "deblur", "inpaint"}


def test_the_command_that_it_gives_takes_the_sample_out(here: Built, tmp_path: Path) -> None:
    key = key_of("coffee.png", "deblur")
    command = trace(here.corpus, key)["sample"]["extract"]
    subprocess.run(command, shell=True, check=True, cwd=tmp_path, capture_output=True)
    sample = corpus.open("corpus")[key]
    assert sample.output_image is not None
    assert json.loads((tmp_path / f"{key}.json").read_text())["instruction"] == sample.instruction
    assert (tmp_path / f"{key}.output.jpg").read_bytes() == sample.output_image.data


def test_rules_come_with_the_values_that_decided_them(here: Built) -> None:
    row = trace("corpus", key_of("chelsea.png", "deblur"))["row"]
    assert set(rules(row).values()) == {True}
    large = next(r for r in row["rules"] if r["rule"] == "large_enough")
    assert large["condition"] == "least(image.width, image.height) >= 64"
    assert large["values"] == {"image.width": 160, "image.height": 106}
    quality = next(a for a in row["annotations"] if a["name"] == "quality")
    assert quality["values"]["sharpness"] > 30
    assert quality["fingerprint"] == corpus.open("corpus").info["annotators"][2]["fingerprint"]
    assert Path(quality["lake_file"]).is_file()


def test_the_annotators_weights_are_told(here: Built) -> None:
    assert [a["weights"] for a in trace_row("corpus", "cup.jpg")["rows"][0]["annotations"]] == [{}, {}, {}]


@pytest.mark.parametrize(
    ("location", "stage", "reason"),
    [
        ("page.jpg", "decode", "not_an_image"),
        ("no_text.png", "text", "missing_text"),
        ("speck.png", "where", "large_enough"),
        ("blurred.jpg", "where", "sharp_enough"),
        ("copy.png", "duplicate", "duplicate_exact"),
        ("coffee_smaller.jpg", "duplicate", "duplicate_near"),
    ],
)
def test_it_says_why_a_picture_is_not_in_the_corpus(here: Built, location: str, stage: str, reason: str) -> None:
    (row,) = trace_row("corpus", location)["rows"]
    assert (row["verdict"]["kept"], row["verdict"]["stage"], row["verdict"]["reason"]) == (False, stage, reason)
    broken = [r["stage"] for r in row["rules"] if r["holds"] is False]
    assert broken[0] == stage
    assert rules(row)["samples"] is None  # it never came so far
    assert row["samples"] == []


def test_duplicates_and_their_survivor_name_each_other(here: Built) -> None:
    (kept,) = trace_row("corpus", "astronaut.png")["rows"]
    (fell,) = trace_row("corpus", "copy.png")["rows"]
    assert [d["location"] for d in kept["duplicates"]] == ["copy.png"]
    assert fell["verdict"]["survivor"]["row_id"] == kept["row_id"]
    assert [r["location"] for r in fell["same_image"]] == ["astronaut.png"]
    found = trace_image("corpus", kept["image_id"][:12].upper())
    assert found["image_id"] == kept["image_id"]
    assert [r["location"] for r in found["rows"]] == ["astronaut.png", "copy.png"]


def test_a_beginning_of_a_key_will_do_if_it_is_the_only_one(here: Built) -> None:
    key = key_of("flower.png", "deblur")
    assert trace("corpus", key[:-3])["sample"]["key"] == key
    with pytest.raises(RecipeError, match="beginning of several keys"):
        trace("corpus", key[:16])
    with pytest.raises(RecipeError, match=r"--row flower\.png"):
        trace("corpus", "flower.png")
    with pytest.raises(RecipeError, match=r"near: flower\.png"):
        trace_row("corpus", "flowers.png")
    with pytest.raises(RecipeError, match="no row holds"):
        trace_image("corpus", "f" * 64)


def test_without_lake_and_sources_the_corpus_tells_all_the_same(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = built.copy(tmp_path)
    monkeypatch.chdir(tmp_path)
    (copy.root / "lake").rename("away")
    (copy.root / "photos").rename("moved")
    row = trace("corpus", key_of("coffee.png", "deblur"))["row"]
    assert row["origin"]["file"] is None
    assert [a["lake_file"] for a in row["annotations"]] == [None, None, None]
    assert rules(row)["sharp_enough"] is True
    assert row["annotations"][2]["values"]["sharpness"] > 30


def test_a_source_file_that_has_changed_since_is_pointed_out(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built.copy(tmp_path)
    monkeypatch.chdir(tmp_path)
    Path("photos/coffee.png").write_bytes(Path("photos/flower.png").read_bytes())
    assert trace_row("corpus", "coffee.png")["rows"][0]["origin"]["unchanged"] is False


def test_a_lost_shard_hides_the_sample_but_not_its_lineage(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = built.copy(tmp_path)
    monkeypatch.chdir(tmp_path)
    key = key_of("coffee.png", "deblur")
    for shard in (copy.corpus / "shards").iterdir():
        shard.unlink()
    told = trace("corpus", key)
    assert "x2i verify" in told["sample"]["problem"]
    assert told["row"]["location"] == "coffee.png"
    (copy.corpus / "selection.parquet").write_bytes(b"no Parquet")
    with pytest.raises(X2IError, match="x2i verify"):
        trace("corpus", key)


def test_conditions_mean_what_they_meant_to_the_selection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bare columns, a table that an annotator's struct hides, and a literal with a dot in it."""
    from tests.corpora import RECIPE

    old = "sharp_enough: quality.sharpness > 30"
    assert old in RECIPE
    new = "odd: \"sharpness > 30 and rows.text not like '%image.width%' and text <> ''\""
    build(tmp_path, RECIPE.replace(old, new))
    monkeypatch.chdir(tmp_path)
    (row,) = trace_row("corpus", "coffee.png")["rows"]
    (odd,) = (r for r in row["rules"] if r["rule"] == "odd")
    assert odd["holds"] is True
    assert set(odd["values"]) == {"sharpness", "rows.text", "text"}
    assert odd["values"]["sharpness"] == row["annotations"][2]["values"]["sharpness"]
    from x2i.corpus.verify import verify

    assert verify("corpus").ok


def test_a_corpus_that_does_not_say_which_images_are_in_its_samples_is_refused_with_the_remedy(
    here: Built, tmp_path: Path
) -> None:
    old = shutil.copytree("corpus", tmp_path / "old")
    manifest = pq.read_table(old / "manifest.parquet")
    pq.write_table(manifest.drop_columns("images"), old / "manifest.parquet")
    for ask in (lambda: trace(old, manifest["key"][0].as_py()), lambda: audit(old)):
        with pytest.raises(X2IError, match="an earlier x2i built it. Run `x2i build`"):
            ask()
