"""Rows that fell for a benchmark or a quota can be seen in the report, with what they fell for."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from tests.corpora import RECIPE, Built, build, write_photos
from tests.corpus.auditing import Page, edit_info, edit_selection, report
from x2i import corpus
from x2i.corpus.audit import audit
from x2i.corpus.audit.evidence import duplicates
from x2i.corpus.audit.limits import benchmarks, quotas

LIMITED = RECIPE.replace(
    "  dedup:",
    "  decontaminate: {benchmarks: {test set: bench, other: other}}\n  quotas:\n    formats: {by: image.format, most: 3}\n"
    "    few: {most: 2}\n  dedup:",
)


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """`coffee` is in a benchmark at half its size, turned, with a note to turn it back; another benchmark has nothing."""
    root = tmp_path_factory.mktemp("limited")
    write_photos(root / "again")  # the corpus's own are not there yet
    (root / "bench/deep").mkdir(parents=True)
    (root / "other").mkdir()
    coffee = Image.open(root / "again/coffee.png").convert("RGB")
    note = Image.Exif()
    note[0x112] = 6
    coffee.resize((coffee.width // 2, coffee.height // 2)).rotate(90, expand=True).save(
        root / "bench/deep/a b.jpg", exif=note
    )
    Image.effect_noise((64, 64), 90).save(root / "other/noise.png")
    return build(root, LIMITED.replace("bench,", f"{root}/bench,").replace("other: other", f"other: {root}/other"))


def test_the_matches_of_a_benchmark_are_shown_beside_its_pictures(limited: Built) -> None:
    page, _ = report(limited)
    shown = page.texts["benchmarks"]
    assert "deep/a b.jpg" in shown
    assert "of 64 bits from test set/deep/a b.jpg" in shown
    assert "coffee.png" in shown
    assert "No row was near to one of its images." in shown
    pictures = [a["alt"] for t, a in page.tags if t == "img"]
    assert "test set, deep/a b.jpg" in pictures
    assert "near to the benchmark, coffee.png" in pictures
    (match, *_) = benchmarks(corpus.open(limited.corpus), 4, 64, True)[0].matches
    assert match.picture is not None
    small = Image.open(io.BytesIO(match.picture))
    assert small.width > small.height  # upright, as the row is
    links = {a["href"] for t, a in page.tags if t == "a"}
    assert {"#benchmarks", "#quotas"} <= links
    assert "too near to an image of that benchmark" in page.texts["funnel"]


def test_a_benchmark_that_is_gone_leaves_a_placeholder(limited: Built, tmp_path: Path) -> None:
    mine = limited.copy(tmp_path)
    edit_info(
        mine,
        lambda info: info["recipe"]["select"]["decontaminate"].update(benchmarks={"test set": str(tmp_path / "x")}),
    )
    page, _ = report(mine)
    assert "the benchmark is out of reach" in page.texts["benchmarks"]
    assert "deep/a b.jpg" in page.texts["benchmarks"]


def test_no_file_outside_a_benchmark_is_shown(limited: Built, tmp_path: Path) -> None:
    mine = limited.copy(tmp_path)
    assert (mine.root / "photos/coffee.png").is_file()
    folder = str(mine.root / "bench")
    edit_info(mine, lambda info: info["recipe"]["select"]["decontaminate"].update(benchmarks={"test set": folder}))
    edit_selection(
        mine,
        """select * replace (case when stage = 'contaminated' then '0 of 64 bits from test set/../photos/coffee.png'
           else detail end as detail) from old""",
    )
    (bench,) = benchmarks(corpus.open(mine.corpus), 4, 64, True)
    assert bench.matches
    assert all(m.picture is None and m.file == "../photos/coffee.png" for m in bench.matches)


def test_a_quota_shows_its_groups_and_what_it_let_through(limited: Built) -> None:
    opened = corpus.open(limited.corpus)
    formats, few = quotas(opened)
    fell = {f["reason"]: f["rows"] for f in opened.info["funnel"] if f["stage"] == "quota"}
    assert fell == {"formats": formats.fell, "few": few.fell}
    assert (
        {v.label: v.kept for v in formats.values}["PNG"] == 3 < sum(v.total for v in formats.values if v.label == "PNG")
    )
    assert [(v.kept, v.fell) for v in few.values] == [(2, few.fell)]
    assert few.values[0].total == sum(v.kept for v in formats.values)
    page, _ = report(limited)
    for words in ("formats", "at most 3 rows of each image.format", "PNG", "at most 2 rows in all"):
        assert words in page.texts["quotas"]


def test_a_forgotten_row_says_why_in_the_funnel(limited: Built, tmp_path: Path) -> None:
    mine = limited.copy(tmp_path)
    edit_selection(
        mine,
        """select * replace (case when stage = 'contaminated' then 'forgotten' else reason end as reason,
           case when stage = 'contaminated' then 'forgotten' else stage end as stage) from old""",
    )
    info = json.loads((mine.corpus / "corpus.json").read_text())
    for step in info["funnel"]:
        if step["stage"] == "contaminated":
            step.update(stage="forgotten", reason="forgotten")
    (mine.corpus / "corpus.json").write_text(json.dumps(info))
    shown = report(mine)[0].texts["funnel"]
    assert "its image was forgotten" in shown
    assert "contaminated" not in shown


def test_look_alikes_that_are_least_alike_come_first(built: Built, tmp_path: Path) -> None:
    mine = built.copy(tmp_path)
    edit_selection(
        mine,
        """select * replace ('duplicate_semantic' as reason, 'duplicate' as stage, null::integer as distance, false as kept,
           'cosine 0.9' || length(location) || ' of classes.embedding' as detail) from old""",
    )
    found = duplicates(corpus.open(mine.corpus), 4).pairs
    cosines = [float(p.dropped["detail"].split()[1]) for p in found]
    assert len(cosines) == 4
    assert cosines == sorted(cosines) and cosines[0] < cosines[-1]


def test_a_pair_whose_survivor_was_forgotten_says_so(built: Built, tmp_path: Path) -> None:
    mine = built.copy(tmp_path)
    survivors = "(select survivor from old where stage = 'duplicate')"
    edit_selection(
        mine,
        f"""select * replace (kept and row_id not in {survivors} as kept,
            case when row_id in {survivors} then 'forgotten' else stage end as stage,
            case when row_id in {survivors} then 'forgotten' else reason end as reason) from old""",
    )
    audit(mine.corpus, mine.root / "report.html")
    assert "its image was forgotten" in Page((mine.root / "report.html").read_text()).texts["duplicates"]
