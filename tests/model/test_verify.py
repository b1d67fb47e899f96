"""What `x2i models verify` runs: everything is equal, and a thing that is not equal is found."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch

from x2i.base.errors import RecipeError
from x2i.model import recorded, registry, verify
from x2i.model.ovis2 import verify as of_ovis2
from x2i.model.ovis_u1 import verify as of_ovis_u1
from x2i.model.verify import Comparison, Names, Parameters, Report


@pytest.fixture(scope="module")
def report() -> Report:
    return verify.verify()


def test_every_model_is_what_was_published(report: Report) -> None:
    rows: list[Any] = [*report.parameters, *report.names, *report.outputs]
    assert [row for row in rows if not row.ok] == []
    assert report.ok
    assert {row.missing for row in rows if getattr(row, "missing", None)} <= {"timm", "open_clip"}


def test_every_architecture_and_every_published_size_is_there(report: Report) -> None:
    assert {row.architecture for row in report.outputs} == set(registry.architectures())
    found = {row.model for row in report.parameters}
    assert found == {row.model for row in report.names} == set(verify.published())
    without = set(registry.presets()) - found  # tiny ones, another trunk, and an HD model that was never published
    assert without == {
        "mini-gemini-tiny",
        "mgm-2b-hd",
        "omnigen-tiny",
        "omnigen-qwen3-1.7b",
        "ovis2-tiny",
        "ovis-u1-tiny",
    }


def test_counts_that_are_published(report: Report) -> None:
    """By hand from the papers and files: OmniGen's 15.50 GB, the parts of Ovis-U1's table, Ovis2-1B."""
    counted = {(row.model, row.part): row.counted for row in report.parameters}
    table = counted["omnigen-3.8b", "table of positions (no parameters)"]
    assert round((counted["omnigen-3.8b", "all"] + table) * 4 / 1e7) == 1550
    millions = {part: round(n / 1e6) for (model, part), n in counted.items() if model == "ovis-u1-3b"}
    assert millions["language model"] == 1721  # 1720 in the table, which cuts
    assert millions["visual encoder with its head"] == 579  # 578
    assert millions["adapter (visual embedding table)"] == 134  # 135
    assert millions["decoder"] == 1046 + 81
    assert counted["ovis2-1b", "all"] == 1_131_283_318


def test_outputs_come_from_where_they_say(report: Report) -> None:
    how = Counter((row.architecture, row.how) for row in report.outputs)
    assert how == {
        ("omnigen", "live"): 6,
        ("omnigen", "recorded"): 3,
        ("ovis_u1", "recorded"): 9,
        ("ovis_u1", "live"): 1,
        ("ovis2", "recorded"): 4,
        ("ovis2", "live"): 4,
        ("mini_gemini", "recorded"): 5,
        ("mini_gemini", "live"): 3,
    }
    for row in report.outputs:
        if row.how == "recorded":
            assert "@" in row.public  # a commit
        assert row.missing or row.largest > 0.1


def test_stages_count_their_parts(report: Report) -> None:
    trained = {(row.model, row.stage): row.counted for row in report.trained}
    assert {stage: n for (model, stage), n in trained.items() if model == "ovis-u1-3b"} == {
        "s0": 1_127_227_408,
        "s1": 134_217_728,
        "s2": 578_534_392 + 134_217_728,
        "s3": 578_534_392 + 134_217_728 + 1_720_574_976,
        "s4": 1_127_227_408,
        "s5": 1_127_227_408,
    }
    assert trained["ovis2-1b", "1a"] == 340_113_398
    assert trained["mgm-2b", "alignment"] == 13_259_008


def test_steps_are_those_that_are_counted() -> None:
    seen: list[None] = []
    verify.verify(["ovis2-1b", "ovis2-4b"], lambda: seen.append(None))
    assert len(seen) == verify.steps(["ovis2-1b", "ovis2-4b"]) == 2 + len(of_ovis2.outputs())


def test_models_without_a_public_counterpart_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"nothing is published of 'ovis2-tiny'.*known: .*ovis2-1b"):
        verify.verify(["ovis2-tiny"])
    with pytest.raises(RecipeError, match="did you mean 'ovis2-1b'"):
        verify.verify(["ovis2-1"])


# what is not equal is found


def test_a_weight_that_differs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    original = of_ovis2.filled

    def bent(*arguments: Any) -> Any:
        model = original(*arguments)
        with torch.no_grad():
            model.vte.weight[7] *= 1.01
        return model

    monkeypatch.setattr(of_ovis2, "filled", bent)
    rows = [verify.compared("ovis2", c) for c in of_ovis2.outputs() if c.public == of_ovis2.SOURCE]
    # the weights of visual words do not come from the table
    assert {row.what: row.ok for row in rows} == {
        "visual tokens of five tiles": True,
        "embeddings of two rows": False,
        "logits of two rows": False,
        "loss of two rows": False,
    }


@pytest.mark.parametrize("change", ["schedule", "guidance", "source"])
def test_another_way_of_drawing_is_found(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    edit = next(c for c in of_ovis_u1.outputs() if "3 branches" in c.what)
    assert verify.compared("ovis_u1", edit).ok
    if change == "schedule":
        monkeypatch.setattr(of_ovis_u1, "shift", lambda *_: 1.0)
    elif change == "guidance":
        monkeypatch.setattr(of_ovis_u1, "GUIDANCES", (6.0, 1.6))
    else:
        monkeypatch.setattr(of_ovis_u1, "LATENTS", (4, 8))
    assert not verify.compared("ovis_u1", edit).ok


def test_numbers_that_are_none_and_other_shapes_are_not_equal() -> None:
    three = torch.tensor([1.0, 2.0, 3.0])
    wrong = torch.tensor([1.0, math.nan, 3.0])
    assert recorded.distance(three, three + 0.5) == 0.5
    assert recorded.distance(wrong, three) == recorded.distance(three[:2], three) == math.inf
    there = recorded.figures(three)
    assert recorded.distance_from_figures(three, there) == 0
    assert recorded.distance_from_figures(wrong, there) == recorded.distance_from_figures(three[:2], there) == math.inf
    row = verify.compared("ovis2", Comparison("broken", "none", lambda: (wrong, three)))
    assert not row.ok and row.difference == math.inf


def test_figures_see_values_between_those_that_are_recorded() -> None:
    numbers = torch.linspace(-1, 1, 1000)
    there = recorded.figures(numbers)
    assert len(there["values"]) == recorded.VALUES
    numbers[1] += 0.5
    assert recorded.distance_from_figures(numbers, there) > 0.0004  # in the mean and the deviation


def test_a_package_that_is_not_here_is_a_row_and_no_failure() -> None:
    def without() -> Any:
        raise ModuleNotFoundError("No module named 'timm'", name="timm.models")

    row = verify.compared("ovis2", Comparison("x", "timm", without))
    assert (row.missing, row.difference, row.ok) == ("timm", None, True)

    def ours() -> Any:
        raise ModuleNotFoundError("No module named 'x2i.gone'", name="x2i.gone")

    with pytest.raises(ModuleNotFoundError, match="gone"):
        verify.compared("ovis2", Comparison("x", "ours", ours))


def test_names_match_with_their_shapes_only() -> None:
    ours = {"a": (1, 2), "b": (3,)}
    assert verify.matched("m", "all", ours, dict(ours), "x").ok
    for theirs in ({"a": (2, 1), "b": (3,)}, {"a": (1, 2)}, ours | {"c": ()}):
        assert not verify.matched("m", "all", ours, theirs, "x").ok
    digested = [2, verify.digest({"b": (3,), "a": (1, 2)})]
    assert verify.matched_digest("m", "all", ours, digested, "x") == Names("m", "all", 2, 2, 2, "x")
    assert not verify.matched_digest("m", "all", {"a": (1, 2), "b": (4,)}, digested, "x").ok


def test_a_count_that_nobody_publishes_is_not_wrong() -> None:
    assert Parameters("m", "all", 5, None).ok
    assert Parameters("m", "all", 5, 5).ok
    assert not Parameters("m", "all", 5, 6).ok
    assert not Report(parameters=[Parameters("m", "all", 5, 6)]).ok
