"""The report holds what it must, loads nothing, escapes everything, stays bounded, and survives what is missing."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import duckdb
import pytest
from typer.testing import CliRunner

from tests.corpora import Built
from tests.corpus.auditing import Page, edit_info, edit_selection, report
from x2i import corpus
from x2i.base.errors import RecipeError, X2IError
from x2i.cli.main import app
from x2i.corpus.audit import audit, default_path
from x2i.corpus.audit.evidence import judged
from x2i.corpus.audit.scores import histogram, scores
from x2i.corpus.audit.thresholds import conditions


@pytest.fixture(scope="module")
def page(built: Built, tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, str]:
    return report(built.copy(tmp_path_factory.mktemp("audit")))


def test_the_report_loads_nothing_and_runs_nothing(page: tuple[Page, str]) -> None:
    for tag, attributes in page[0].tags:
        assert tag not in ("script", "iframe", "object", "embed", "base")
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "srcset", "poster", "data", "action"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), (tag, attributes[name])
    assert "url(" not in page[0].texts["style"]
    assert "@import" not in page[0].texts["style"]
    policy = next(a["content"] for t, a in page[0].tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in (policy or "")
    assert len(page[1]) < 2_000_000


def test_every_picture_says_what_it_is(page: tuple[Page, str]) -> None:
    pictures = [a for t, a in page[0].tags if t == "img"]
    assert len(pictures) > 40
    assert all(a.get("alt") for a in pictures)
    assert all(a.get("aria-label") for t, a in page[0].tags if t == "svg" and a.get("role") == "img")


def test_the_funnel_shows_every_reason_and_the_equation(page: tuple[Page, str], built: Built) -> None:
    info = corpus.open(built.corpus).info
    assert len(info["funnel"]) >= 5
    for step in info["funnel"]:
        assert step["reason"] in page[0].texts["funnel"]
    assert "12 rows in = 6 rows out + 6 that fell" in page[1]
    assert page[0].count("span", "band") == len(info["funnel"]) + 2


def test_each_task_has_a_gallery_with_inputs_instruction_and_output(page: tuple[Page, str], built: Built) -> None:
    opened = corpus.open(built.corpus)
    keys = set(opened.manifest["key"].to_pylist())
    for task in opened.tasks:
        shown = page[0].texts[f"task-{task}"]
        mine = [k for k in keys if k in shown]
        assert len(mine) == min(6, len(opened.task(task)))
        for key in mine:
            words = re.sub(r"<img><\|image_\d+\|></img>", "", opened[key].instruction).split()
            assert words[0] in shown
            assert words[-1] in shown
        assert ("input 1" in shown) == (task != "text_to_image")
        assert "output" in shown
    alts = {a.get("alt") for t, a in page[0].tags if t == "img"}
    deblur = next(k for k in keys if "deblur" in k and k in page[1])
    assert {f"input 1 of sample {deblur}", f"output of sample {deblur}"} <= alts


def test_duplicates_stand_in_pairs_of_pictures(page: tuple[Page, str], built: Built) -> None:
    shown = page[0].texts["duplicates"]
    fell = corpus.open(built.corpus).sql(
        """select d.location, s.location, d.reason, d.distance from selection d join selection s
           on d.survivor = s.row_id where d.stage = 'duplicate'"""
    )
    pairs = fell.fetchall()
    assert {p[2] for p in pairs} == {"duplicate_exact", "duplicate_near"}
    alts = {a.get("alt") for t, a in page[0].tags if t == "img"}
    for dropped, survivor, reason, distance in pairs:
        assert {f"the duplicate, {dropped}", f"the survivor, {survivor}"} <= alts
        assert reason in shown
        assert f"(distance {distance})" in shown


def test_the_quarantine_says_why_and_where(page: tuple[Page, str]) -> None:
    shown = page[0].texts["quarantine"]
    for words in ("not_an_image", "an HTML page", "page.jpg", "missing_text", "no_text.png"):
        assert words in shown
    assert any(a.get("alt") == "no_text.png" for t, a in page[0].tags if t == "img")  # from its source again


def test_what_was_put_right_is_shown_with_what_it_was(built: Built, tmp_path: Path) -> None:
    mine = built.copy(tmp_path)
    edit_selection(
        mine,
        """select * replace (case when location = 'cup.jpg'
           then struct_update(image, orientation := 6, mode := 'CMYK', icc := '<b>Coated</b>') else image end as image)
           from old""",
    )
    shown = report(mine)[0].texts["put-right"]
    for words in ("EXIF orientation 6", "turned by 90° clockwise", "CMYK", "<b>Coated</b>", "cup.jpg", "stayed"):
        assert words in shown


def test_texts_of_the_web_cannot_reach_the_page_as_html(built: Built, tmp_path: Path) -> None:
    mine = built.copy(tmp_path)
    evil = '<script>x</script>&">'
    for shard in (mine.corpus / "shards").iterdir():  # the same length, so that every offset stays
        data = shard.read_bytes()
        shard.write_bytes(data.replace(b"The picture named cup.", json.dumps(evil)[1:-1].ljust(22).encode()))
    edit_selection(
        mine, f"select * replace ('{evil}' as text, '{evil}'||location as location, '{evil}' as detail) from old"
    )
    edit_info(mine, lambda info: info.update(name=evil, description=evil))
    with contextlib.chdir(mine.root):
        audit("corpus", "report.html")
    text = (mine.root / "report.html").read_text()
    assert "<script" not in text
    assert evil in Page(text).texts["task-text_to_image"]
    assert evil in Page(text).texts["quarantine"]


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("quality.sharpness > 30", [("quality.sharpness", ">", 30)]),
        ("30 < sharpness", [("quality.sharpness", ">", 30)]),
        (
            "image.width between 64 and 2*100 and rows.text is not null",
            [("image.width", ">=", 64), ("image.width", "<=", 200)],
        ),
        ("not (image.width < 64 or -sharpness >= -1e2)", [("image.width", ">=", 64), (None, "<", -100)]),
        ("least(width, height) >= 64", [(None, ">=", 64)]),
        ("image.width > 64 or quality.sharpness > 30", []),
        ("image.format = 'JPEG' and image.width > image.height", []),
        ("lower(text) like '%photo%' -- a remark", []),
    ],
)
def test_thresholds_are_found_in_conditions(
    built: Built, tmp_path: Path, condition: str, expected: list[tuple[str | None, str, float]]
) -> None:
    mine = built.copy(tmp_path)
    edit_info(mine, lambda info: info["recipe"]["select"].update(where={"mine": condition}))
    (found,) = conditions(corpus.open(mine.corpus))
    assert found.sql is not None
    assert [(t.column, t.sign, t.value) for t in found.thresholds] == expected


def test_the_nearest_rows_are_the_nearest(built: Built) -> None:
    opened = corpus.open(built.corpus)
    found = {j.condition.name: j for j in judged(opened, conditions(opened), 2)}["sharp_enough"]
    rows = opened.sql("select location, quality.sharpness, kept, reason from selection").fetchall()
    kept = sorted((abs(s - 30), n) for n, s, k, _ in rows if k)[:2]
    fell = sorted((abs(s - 30), n) for n, s, _, r in rows if r == "sharp_enough")[:2]
    (near,) = found.nearest
    assert [r["location"] for r in near.kept] == [n for _, n in kept]
    assert [r["location"] for r in near.fell] == [n for _, n in fell] != []
    assert all(r["value"] > 30 for r in near.kept)
    assert all(r["value"] <= 30 for r in near.fell)


def test_histograms_count_every_row_that_has_a_value(built: Built) -> None:
    opened = corpus.open(built.corpus)
    drawn, left_out = scores(opened, conditions(opened))
    assert left_out == ["image.sha256 (string)", "phash.hash (uint64)"]
    for score in drawn:
        annotator, column = score.name.split(".")
        ((kept, fell),) = opened.sql(
            f"select count(*) filter (kept), count(*) filter (not kept) from selection where {annotator}.{column} is not null"
        ).fetchall()
        if score.histogram:
            assert (sum(score.histogram.kept), sum(score.histogram.fell)) == (kept, fell)
            assert score.histogram.low <= score.histogram.minimum <= score.histogram.maximum <= score.histogram.high
        else:
            assert (sum(v.kept for v in score.values), sum(v.fell for v in score.values)) == (kept, fell)
    (sharpness,) = (s for s in drawn if s.name == "quality.sharpness")
    assert [t.value for t in sharpness.thresholds] == [30]


def test_a_far_outlier_does_not_hide_the_rest(built: Built, tmp_path: Path) -> None:
    mine = built.copy(tmp_path)
    edit_selection(
        mine, "select old.* replace (case when i = 7 then 1e9 else i % 10 end as distance) from old, range(400) t(i)"
    )
    found = histogram(corpus.open(mine.corpus), "distance")
    assert found is not None
    assert found.high <= 10 and found.high_open
    assert sum(found.kept) + sum(found.fell) == 12 * 400
    constant = histogram(corpus.open(mine.corpus), "5")
    assert constant is not None and constant.low < 5 < constant.high
    assert histogram(corpus.open(mine.corpus), "'nan'::double") is None


def test_a_large_corpus_makes_no_larger_a_report(built: Built, tmp_path: Path) -> None:
    mine = built.copy(tmp_path)
    small = len(report(mine, per_task=2, nearest=2, pairs=4, per_reason=1)[1])
    times = 500

    def multiply(info: dict[str, Any]) -> None:
        for name in ("rows_in", "rows_out"):
            info["counts"][name] *= times
        for step in info["funnel"]:
            step["rows"] *= times

    edit_info(mine, multiply)
    edit_selection(
        mine,
        f"""select old.* replace (case when i = 0 then row_id else md5(row_id || i) end as row_id)
            from old, range({times}) t(i)""",
    )
    page, text = report(mine, per_task=2, nearest=2, pairs=4, per_reason=1)
    assert "6,000 rows in = 3,000 rows out + 3,000 that fell" in text
    assert "4 of 1,000 are shown" in page.texts["duplicates"]
    assert "2 of 1,000 are shown" in page.texts["quarantine"]
    assert len(text) < 1.5 * small


def test_the_same_corpus_gives_the_same_report(page: tuple[Page, str], built: Built, tmp_path: Path) -> None:
    assert report(built.copy(tmp_path))[1] == page[1]


def test_sources_that_are_gone_leave_placeholders(built: Built, tmp_path: Path) -> None:
    mine = built.copy(tmp_path)
    shutil.rmtree(mine.root / "photos")
    shown, text = report(mine)
    assert "its source is out of reach" in shown.texts["duplicates"]
    assert "could not be read again" in text
    assert any((a.get("alt") or "").startswith("the survivor") for t, a in shown.tags if t == "img")  # from the shards


def test_a_damaged_shard_costs_its_pictures_only(built: Built, tmp_path: Path) -> None:
    mine = built.copy(tmp_path)
    (mine.corpus / "shards" / "00000.tar").write_bytes(b"\0" * 4096)
    (mine.corpus / "shards" / "00001.tar").unlink()
    shown, _ = report(mine)
    assert "cannot be read from shards/00000.tar" in "".join(shown.texts.values())
    assert "cannot be read from shards/00001.tar" in "".join(shown.texts.values())


def test_figures_that_do_not_add_up_are_said_so(built: Built, tmp_path: Path) -> None:
    mine = built.copy(tmp_path)
    edit_selection(mine, "select * from old where location <> 'page.jpg'")
    written = audit(mine.corpus)
    assert not written.sound
    assert "this does not hold" in Path(written.report).read_text()


def test_what_cannot_be_audited_is_refused(built: Built, tmp_path: Path) -> None:
    mine = built.copy(tmp_path)
    with pytest.raises(RecipeError, match="within the corpus"):
        audit(mine.corpus, mine.corpus / "report.html")
    with pytest.raises(RecipeError, match="is a folder"):
        audit(mine.corpus, mine.root)
    with pytest.raises(X2IError, match="not a corpus"):
        audit(mine.root)
    (mine.corpus / "selection.parquet").write_bytes(b"PAR1")
    with pytest.raises(X2IError, match="x2i verify"):
        audit(mine.corpus)
    assert not default_path(mine.corpus).exists()


def test_an_empty_corpus_has_a_report(built: Built, tmp_path: Path) -> None:
    mine = built.copy(tmp_path)

    def empty(info: dict[str, Any]) -> None:
        info["counts"].update(rows_in=0, rows_out=0, samples=0, shards=0, bytes=0)
        info.update(funnel=[], tasks={}, shards=[])
        info["recipe"]["select"]["where"] = {}

    edit_info(mine, empty)
    edit_selection(mine, "select * from old limit 0")
    with duckdb.connect() as connection:
        manifest = str(mine.corpus / "manifest.parquet")
        connection.execute(f"create table m as select * from '{manifest}' limit 0")
        connection.execute(f"copy m to '{manifest}' (format parquet)")
    written = audit(mine.corpus)
    assert written.sound
    assert "0 rows in = 0 rows out + 0 that fell" in Path(written.report).read_text()


def test_the_command_prints_where_the_report_lies(built: Built, tmp_path: Path) -> None:
    mine = built.copy(tmp_path)
    with contextlib.chdir(mine.root):
        done = CliRunner().invoke(app, ["audit", "corpus", "--json", "--per-task", "1"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert Path(result["report"]) == mine.root.resolve() / "corpus-report.html"
    assert result["bytes"] == Path(result["report"]).stat().st_size
    assert result["sound"] and not result["unreachable"]
