"""Quotas: limits hold, what stays is drawn by content alone, and it stays as the data grow; task shares likewise."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests.corpora import RECIPE, Built, build
from tests.pipelines.tasks.rows import row as row_of
from x2i.base.config import parse_config
from x2i.base.errors import RecipeError
from x2i.base.sql import ASPECTS, connect
from x2i.corpus.lake import ROWS
from x2i.corpus.trace import trace_row
from x2i.corpus.verify import verify
from x2i.corpus.verify_quotas import quota_queries
from x2i.pipelines import recipe as recipes
from x2i.pipelines.select import quotas
from x2i.pipelines.select.quotas import Quota, drawn, shares


def row(number: int, source: str) -> dict[str, str]:
    image = hashlib.sha256(f"image {number}".encode()).hexdigest()
    return {"row_id": f"{number:08d}", "image_id": image, "source": source}


WEB = [row(i, "web") for i in range(600)]
BOOKS = [row(i, "books") for i in range(600, 800)]
MAPS = [row(i, "maps") for i in range(800, 810)]


def stay(rows: list[dict[str, str]], *asked: dict[str, Any], seed: int = 0) -> set[str]:
    """Row ids that stand after these quotas, one after the other."""
    connection = connect()
    columns = {name: [r[name] for r in rows] for name in ("row_id", "image_id", "source")}
    connection.register("rows", pa.table(columns))
    connection.execute(
        "create table v as select row_id, null::varchar stage, null::varchar reason, null::varchar detail from rows"
    )
    for number, quota in enumerate(asked):
        quotas.apply(connection, f"q{number}", parse_config(Quota, quota, "quota"), seed, "rows", "v")
    bad = connection.sql(
        "select 1 from v where (stage is null) <> (reason is null) or (stage is null) <> (detail is null)"
    )
    assert not bad.fetchall()
    return {r for (r,) in connection.sql("select row_id from v where reason is null").fetchall()}


def sources(ids: set[str], rows: list[dict[str, str]]) -> Counter[str]:
    return Counter(r["source"] for r in rows if r["row_id"] in ids)


ALL = WEB + BOOKS + MAPS


def test_each_group_keeps_at_most_its_number() -> None:
    assert sources(stay(ALL, {"by": "rows.source", "most": 50}), ALL) == {"web": 50, "books": 50, "maps": 10}
    asked = {"by": "rows.source", "most": {"web": 7, "maps": 0}}
    assert sources(stay(ALL, asked), ALL) == {"web": 7, "books": 200}
    assert sources(stay(ALL, asked | {"others": 3}), ALL) == {"web": 7, "books": 3}
    assert len(stay(ALL, {"most": 100})) == 100
    assert len(stay(ALL, {"most": 10_000})) == len(ALL)


def test_shares_are_met_and_no_row_is_taken_twice() -> None:
    assert sources(stay(ALL, {"by": "source", "share": "equal"}), ALL) == {"web": 10, "books": 10, "maps": 10}
    asked = {"by": "source", "share": "equal", "least": 100}  # the few maps hold nobody down, and all stay
    assert sources(stay(ALL, asked), ALL) == {"web": 200, "books": 200, "maps": 10}
    asked = {"by": "source", "share": {"web": 7, "books": 3}}
    assert sources(stay(ALL, asked), ALL) == {"web": 466, "books": 200}
    assert sources(stay(ALL, asked | {"others": 4}), ALL) == {"web": 466, "books": 200, "maps": 4}


@pytest.mark.parametrize("parts", [{"a": 0.7, "b": 0.3}, {"a": 1, "b": 1, "c": 1}, {"a": 0.1, "b": 0.2, "gone": 5}])
def test_shares_use_up_one_group_and_are_off_by_less_than_a_row(parts: dict[str, float]) -> None:
    there = {"a": 331, "b": 97, "c": 12}
    limits = shares(parts, there)
    assert "gone" not in limits
    assert any(limits[v] == there[v] for v in limits)
    scale = min(there[v] / parts[v] for v in limits)
    assert all(0 <= scale * parts[v] - n < 1 and n <= there[v] for v, n in limits.items())


def test_a_quota_keeps_those_with_the_lowest_hashes_in_any_order_of_the_rows() -> None:
    kept = stay(ALL, {"by": "rows.source", "most": 20}, seed=5)
    assert kept == stay(ALL[::-1], {"by": "rows.source", "most": 20}, seed=5)

    def number(row: dict[str, str]) -> int:
        return int.from_bytes(hashlib.md5(f"5\0q0\0{row['image_id']}".encode()).digest()[8:], "little")

    order = sorted(WEB, key=number)
    assert {r["row_id"] for r in order[:20]} == kept & {r["row_id"] for r in WEB}
    assert kept != stay(ALL, {"by": "rows.source", "most": 20}, seed=6)


def test_what_was_kept_mostly_stays_as_the_data_grow() -> None:
    before, after = stay(WEB[:500], {"most": 100}), stay(WEB, {"most": 100})
    assert not (after - before) & {r["row_id"] for r in WEB[:500]}  # only new rows come in
    assert len(after - before) < 40  # one in six of the rows is new: about 17 of 100
    assert stay(WEB, {"most": 50}) < after  # a smaller quota keeps a part of the larger


def test_two_quotas_draw_independently() -> None:
    """With one hash for both, those that the first kept of `web` would crowd out the books in the second."""
    kept = sources(stay(WEB + BOOKS, {"by": "rows.source", "most": 100}, {"most": 100}), ALL)
    assert sum(kept.values()) == 100
    assert 35 <= kept["books"] <= 65


def test_null_is_a_value_of_its_own_and_unknown_values_are_told(caplog: pytest.LogCaptureFixture) -> None:
    asked = {"by": "case when source = 'web' then 'web' end", "most": 5}
    assert sources(stay(ALL, asked), ALL).total() == 10
    with caplog.at_level("WARNING"):
        stay(ALL, {"by": "source", "most": {"wbe": 5}})
    assert "no row has the value wbe; the commonest are web (600), books (200), maps (10)" in caplog.text


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"by": "rows.source"}, "give either `most` or `share`"),
        ({"share": "equal"}, "without `by` there is one group"),
        ({"by": "x", "most": -1}, "cannot be below 0"),
        ({"by": "x", "share": {"a": 0}}, "must be above 0"),
        ({"by": "x", "most": 3, "others": 1}, "these name none"),
    ],
)
def test_quotas_that_make_no_sense_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        parse_config(Quota, wrong, "recipe.yaml")


def test_yaml_numbers_and_truths_are_values_like_others() -> None:
    quota = parse_config(Quota, {"by": "x", "most": yaml.safe_load("{2: 5, true: 6, a: 7}")}, "recipe.yaml")
    assert quota.most == {"2": 5, "true": 6, "a": 7}


def test_aspect_is_the_nearest_bucket() -> None:
    connection = connect()
    for name in ASPECTS:
        width, height = (int(n) for n in name.split("x"))
        assert connection.execute("select aspect(?, ?)", [100 * width, 100 * height]).fetchall() == [(name,)]
    asked = "aspect(640, 480), aspect(1080, 1920), aspect(5000, 1), aspect(1, 5000), aspect(null, 5), aspect(0, 0)"
    assert connection.sql(f"select {asked}").fetchall() == [("4x3", "9x16", "21x9", "9x21", None, None)]


def test_a_share_of_the_images_is_drawn_by_content_and_grows_with_the_share() -> None:
    ids = [r["image_id"] for r in ALL]
    some = {i for i in ids if drawn(i, "deblur", 0, 0.3)}
    assert 0.25 < len(some) / len(ids) < 0.35
    assert some < {i for i in ids if drawn(i, "deblur", 0, 0.4)}
    assert some != {i for i in ids if drawn(i, "inpaint", 0, 0.3)}
    assert not any(drawn(i, "deblur", 0, 0.0) for i in ids)
    assert all(drawn(i, "deblur", 0, 1.0) for i in ids)


def changed(**changes: Any) -> str:
    content = yaml.safe_load(RECIPE)
    for key, value in changes.items():
        content[key] |= value
    return yaml.safe_dump(content)


QUOTAS: dict[str, dict[str, Any]] = {
    "shapes": {"by": "aspect(image.width, image.height)", "most": 2},
    "total": {"most": 3},
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A corpus with quotas, shares of tasks and carried values."""
    select = {"quotas": QUOTAS, "tasks": {"deblur": 0.5, "inpaint": 0}}
    carried = {"carry": ["image.format", "quality.sharpness", "image.width"]}
    return build(tmp_path_factory.mktemp("quotas"), changed(select=select, output=carried))


def selection(built: Built) -> list[dict[str, Any]]:
    return list(pq.read_table(built.corpus / "selection.parquet").to_pylist())


def test_a_corpus_has_its_quotas_and_verifies(built: Built) -> None:
    rows = selection(built)
    fell = [r for r in rows if r["stage"] == "quota"]
    assert {r["reason"] for r in fell} == {"shapes", "total"}
    assert sum(r["kept"] for r in rows) == 3
    assert any("of" in r["detail"] and "stay" in r["detail"] for r in fell)
    report = verify(built.corpus)
    assert not report.faults, report.faults
    info = json.loads((built.corpus / "corpus.json").read_text())
    assert [f["reason"] for f in info["funnel"] if f["stage"] == "quota"] == ["shapes", "total"]


def test_verify_finds_a_row_that_stands_against_a_quota(built: Built, tmp_path: Path) -> None:
    rows = pq.read_table(built.corpus / "selection.parquet")
    select = {"quotas": {n: parse_config(Quota, q, "x").model_dump() for n, q in QUOTAS.items()}}
    names = ["image", "phash", "quality"]
    for whole in (True, False):
        for change, wrong in (({}, 0), ({"most": 1}, 1)):
            asked = {"quotas": select["quotas"] | {"total": select["quotas"]["total"] | change}}
            with connect() as connection:
                connection.register("s", rows)
                found = [len(connection.sql(q).fetchall()) for q, _ in quota_queries(asked, 0, names, whole)]
            assert found[0] == 0
            assert bool(found[1]) == bool(wrong)


@pytest.mark.parametrize(
    "asked",
    [
        [{"by": "rows.source", "most": 50}, {"most": 70}],
        [{"by": "rows.source", "most": {"web": 7, "maps": 0}, "others": 12}],
        [{"by": "source", "most": {"web": 7}}],
        [{"by": "source", "share": "equal", "least": 100}, {"by": "image_id < '8'", "share": "equal"}],
        [{"by": "source", "share": {"web": 0.7, "books": 0.1, "gone": 1}, "others": 3}],
    ],
)
def test_verify_asks_every_kind_of_quota_again(asked: list[dict[str, Any]]) -> None:
    made = {f"q{i}": parse_config(Quota, q, "quota") for i, q in enumerate(asked)}
    connection = connect()
    table = [{"unit": "u", "index": 0, "location": r["row_id"], "meta": "{}", "inputs": [], **r} for r in ALL]
    connection.register("rows", pa.Table.from_pylist(table, schema=ROWS))
    blank = "null::varchar stage, null::varchar reason, null::varchar detail"
    connection.execute(f"create table v as select row_id, {blank} from rows")
    for name, quota in made.items():
        quotas.apply(connection, name, quota, 3, "rows", "v")
    connection.execute(
        "create table s as select rows.*, v.reason is null as kept, stage, reason from rows join v using (row_id)"
    )
    said = {"quotas": {name: quota.model_dump() for name, quota in made.items()}}

    def wrong(whole: bool = True) -> int:
        return sum(len(connection.sql(q).fetchall()) for q, _ in quota_queries(said, 3, [], whole))

    assert wrong() == wrong(False) == 0
    fell = connection.sql("select min(row_id) from s where reason = 'q0'").fetchall()[0][0]
    connection.execute("update s set kept = true, stage = null, reason = null where row_id = ?", [fell])
    assert wrong() > 0
    assert wrong(False) > 0 or made["q0"].share is not None  # of shares, it cannot be told once rows were forgotten


def test_trace_names_the_quota_that_a_row_fell_for(built: Built) -> None:
    fell = next(r for r in selection(built) if r["reason"] == "total")
    rules = {r["rule"]: r for r in trace_row(built.corpus, fell["row_id"])["rows"][0]["rules"]}
    assert rules["shapes"]["holds"] is True
    shape = rules["shapes"]["values"][QUOTAS["shapes"]["by"]]
    assert shape in ASPECTS
    assert rules["total"]["holds"] is False
    assert rules["total"]["condition"] == "at most 3 rows in all"
    assert rules["samples"]["holds"] is None


def test_tasks_get_their_share_and_the_rest_is_counted(built: Built) -> None:
    tasks = json.loads((built.corpus / "corpus.json").read_text())["tasks"]
    kept = [r["image_id"] for r in selection(built) if r["kept"]]
    wanted = sum(drawn(i, "deblur", 0, 0.5) for i in kept)
    assert tasks["inpaint"] == {"made": 0, "skipped": {"not_drawn": 3}}
    assert tasks["deblur"]["made"] == wanted
    assert tasks["deblur"]["skipped"].get("not_drawn", 0) == 3 - wanted


def test_values_are_carried_to_the_samples(built: Built) -> None:
    from x2i.corpus.corpus import Corpus

    values = {r["row_id"]: r for r in selection(built)}
    for sample in Corpus(built.corpus):
        of_row = values[sample.provenance["row_id"]]
        assert sample.provenance["carried"] == {
            "image.format": of_row["image"]["format"],
            "quality.sharpness": of_row["quality"]["sharpness"],
            "image.width": of_row["image"]["width"],
        }


def test_other_rows_of_a_sample_carry_theirs() -> None:
    one, other = row_of("chelsea.png"), row_of("coffee.png")
    one.carried, other.carried = {"rights.licence": "CC0-1.0"}, {"rights.licence": "CC-BY-4.0"}
    told = one.sample("few_shot", "", others=[other]).provenance
    assert told["carried"] == {"rights.licence": "CC0-1.0"}
    assert [o["carried"] for o in told["others"]] == [{"rights.licence": "CC-BY-4.0"}]
    one.carried = {}
    told = one.sample("few_shot", "", others=[other]).provenance
    assert "carried" not in told and "carried" not in told["others"][0]


def test_a_quota_that_stumbles_over_a_value_names_its_key(tmp_path: Path) -> None:
    asked = changed(select={"quotas": {"years": {"by": "rows.text::integer", "most": 1}}})
    with pytest.raises(RecipeError, match=r"select\.quotas\.years\.by: 'rows\.text::integer'.*try_cast"):
        build(tmp_path, asked)


def test_another_share_is_another_assembly(built: Built, tmp_path: Path) -> None:
    from x2i.pipelines.engine.publish import Staging

    def assembly(root: Path, share: float) -> str:
        with contextlib.chdir(root):
            plan = recipes.load("recipe.yaml", [f"select.tasks.deblur={share}"])
            staging = Staging(Path("corpus"))
            pq.write_table(pq.read_table("corpus/selection.parquet"), staging.verdicts)
            return staging.group(plan).assembly

    copy = built.copy(tmp_path).root
    same = json.loads((copy / "corpus/corpus.json").read_text())["assembly"]
    assert assembly(copy, 0.5) == same != assembly(copy, 0.4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"select": {"quotas": {"a": {"by": "imag.width", "most": 1}}}}, "select.quotas.a.by.*did you mean image"),
        ({"select": {"quotas": {"a": {"by": "random()", "most": 1}}}}, "another answer every time"),
        ({"select": {"tasks": {"debblur": 0.5}}}, "no task 'debblur' is made; there are .*deblur"),
        ({"select": {"tasks": {"deblur": 1.5}}}, "from 0 to 1"),
        ({"output": {"carry": ["quality.sharp"]}}, "no column 'quality.sharp' of texts.*quality.sharpness"),
    ],
)
def test_wrong_recipes_are_refused_with_the_key(built: Built, tmp_path: Path, changes: Any, said: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(changed(**changes))
    with contextlib.chdir(built.root), pytest.raises(RecipeError, match=said):
        recipes.load(path)
