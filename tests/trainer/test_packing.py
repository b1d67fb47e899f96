"""Packs: full, within their budget by the model's own lengths, in the mixture's shares, and any step at once."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import skimage.filters
import skimage.measure
import skimage.transform
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from tests.trainer.test_table import rows_of
from tests.trainer.test_table import write as write_rows
from x2i import corpus
from x2i.base.config import parse_config
from x2i.base.errors import RecipeError
from x2i.corpus.manifest import MADE, ManifestWriter
from x2i.corpus.text import text_tokens
from x2i.trainer.capacity import FULL, words
from x2i.trainer.index import TRAIN
from x2i.trainer.lengths import Lengths, Measure, calibrate, texts
from x2i.trainer.measured import Rows
from x2i.trainer.mixture import calibrated, plan_of, table_of
from x2i.trainer.packing import PackPlan
from x2i.trainer.plan import Draw, StagePlan
from x2i.trainer.stage import Pack, Stage
from x2i.trainer.table import SampleTable

Shape = tuple[int, int]


def row(number: int, task: str, text: int, inputs: Sequence[Shape] = (), output: Shape | None = (640, 480)) -> Any:
    image = hashlib.sha256(b"%d" % number).hexdigest()
    sides = [{"width": w, "height": h} for w, h in (*inputs, *([output] if output else []))]
    return {
        **dict.fromkeys(("shard", "sha256", "row_id", "source", "location"), "here"),
        "key": f"{image[:12]}-{number}",
        "task_type": task,
        "offset": 0,
        "size": 9,
        "scores": [],
        "members": [],
        "instruction_chars": 4 * text,
        "text_tokens": text,
        "image_id": image,
        "images": [image],
        "input_sizes": sides[: len(inputs)],
        "output_size": sides[-1] if output else None,
    }


def write(folder: Path, rows: list[dict[str, Any]], row_group: int = 400) -> corpus.Corpus:
    folder.mkdir(parents=True)
    with ManifestWriter(folder / "manifest.parquet", row_group) as manifest:
        manifest.write(pa.Table.from_pylist(rows, MADE))
    (folder / "corpus.json").write_text(json.dumps({"format": 1, "digest": "0", "name": folder.name}))
    return corpus.open(folder)


def drawings(random: np.random.Generator, count: int) -> list[dict[str, Any]]:
    shapes = [(640, 480), (480, 640), (512, 512)]
    return [row(n, "t2i", int(random.integers(10, 121)), output=shapes[n % 3]) for n in range(count)]


def sequences(random: np.random.Generator, count: int) -> list[dict[str, Any]]:
    images = random.integers(1, 6, count)
    return [row(n + 10**6, "few", int(random.integers(20, 80)), [(512, 512)] * int(k)) for n, k in enumerate(images)]


def conversations(random: np.random.Generator, count: int) -> list[dict[str, Any]]:
    words = np.minimum(random.lognormal(5, 0.8, count), 1200).astype(int) + 1
    shown = random.integers(200, 900, (count, 2)).tolist()
    return [
        row(n + 2 * 10**6, "chat", int(w), [tuple(s)], None) for n, (w, s) in enumerate(zip(words, shown, strict=True))
    ]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> corpus.Corpus:
    """10,500 samples of three tasks; their lengths drift from the first to the last, as sources do."""
    random = np.random.default_rng(0)
    rows = drawings(random, 5000) + sequences(random, 1500) + conversations(random, 4000)
    rows[:2000] = sorted(rows[:2000], key=lambda r: int(r["text_tokens"]))
    rows[6500:] = sorted(rows[6500:], key=lambda r: int(r["text_tokens"]))
    return write(tmp_path_factory.mktemp("mixed") / "corpus", rows)


def stage(tokens: int = 4096, packs: int = 4, **changes: Any) -> Stage:
    given = {"name": "one", "resolution": 256, "steps": 9, "lr": 1, "mixture": {"t2i": 2, "few": 1, "chat": 1}}
    given |= {"pack": {"tokens": tokens, "packs": packs}, "condition_dropout": 0.1}
    return Stage.model_validate(given | changes)


def planned(opened: corpus.Corpus, of: Stage, seed: int = 0, lengths: Lengths | None = None) -> PackPlan:
    plan = plan_of(table_of([opened], [of], 0), of, seed, lengths)
    assert isinstance(plan, PackPlan)
    return plan


def loads_of(steps: list[list[Draw]], lengths: np.ndarray, bare: np.ndarray, packs: int) -> np.ndarray:
    """Tokens of each pack of each step."""
    out = np.zeros((len(steps), packs))
    for number, draws in enumerate(steps):
        for draw in draws:
            assert draw.pack is not None
            out[number, draw.pack] += (bare if draw.dropped else lengths)[draw.sample]
    return out


@pytest.mark.parametrize(
    ("mixture", "tokens", "changes"),
    [
        ({"t2i": 1}, 2048, {}),
        ({"t2i": 1}, 32768, {}),
        ({"t2i": 3, "few": 1}, 2048, {"resolution": 128}),
        ({"t2i": 3, "few": 1}, 8192, {"condition_dropout": 0}),
        ({"few": 1}, 4096, {}),
        ({"t2i": 2, "few": 1, "chat": 1}, 4096, {}),
        ({"t2i": 2, "few": 1, "chat": 1}, 32768, {"mixture_unit": "tokens"}),
        ({"chat": 1}, 4096, {"chat_resolution": 160}),
        ({"t2i": 2, "few": 1, "chat": 1}, 8192, {"buckets": [[256, 256], [320, 192], [192, 320]]}),
    ],
)
def test_packs_are_full_and_none_is_over_full(
    mixed: corpus.Corpus, mixture: dict[str, float], tokens: int, changes: dict[str, Any]
) -> None:
    of = stage(tokens, mixture=mixture, **changes)
    plan = planned(mixed, of)
    found = Measure(of)(mixed.manifest)
    steps = [plan.step(n) for n in range(2 * plan.steps)]
    loads = loads_of(steps, found.shown, found.bare, 4)
    assert loads.max() <= plan.limit < tokens
    assert loads.mean() / tokens >= 0.97 and loads.mean() / tokens == pytest.approx(plan.fill, abs=0.004)
    assert np.mean([len(s) for s in steps]) == pytest.approx(plan.batch, rel=0.01)
    for draws in steps:
        assert [d.pack for d in draws] == sorted(d.pack or 0 for d in draws)
        assert all(d.tokens == (found.bare if d.dropped else found.shown)[d.sample] for d in draws)
    indices = [draw.index for draws in steps for draw in draws]
    assert indices == sorted(set(indices))


@pytest.fixture(scope="module")
def spoken() -> tuple[list[int], np.ndarray]:
    """Pieces of scikit-image's documentation: their estimates, and what a BPE that is trained on others makes of them."""
    modules = (skimage.filters, skimage.measure, skimage.transform)
    words = " ".join(getattr(m, name).__doc__ or "" for m in modules for name in m.__all__).split()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    lines = [" ".join(words[n : n + 40]) for n in range(0, len(words) // 2, 40)]
    tokenizer.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=6000, show_progress=False))
    random = np.random.default_rng(0)
    texts = [" ".join(words[b : b + n]) for b, n in random.integers((0, 8), (len(words), 80), (4000, 2)).tolist()]
    return [text_tokens(t) for t in texts], np.array([len(e.ids) for e in tokenizer.encode_batch(texts)], np.int32)


def test_packs_hold_by_the_counts_of_a_real_tokenizer(tmp_path: Path, spoken: tuple[list[int], np.ndarray]) -> None:
    estimates, real = spoken
    rows = [row(n, "t2i", e) for n, e in enumerate(estimates)]
    of = stage(16384, mixture={"t2i": 1}, condition_dropout=0)
    fit = calibrate(list(zip(estimates, real.tolist(), strict=True))[::13])
    assert abs(np.mean(real) / np.mean(estimates) - 1) > 0.03  # what the estimate alone would miss
    opened = write(tmp_path / "corpus", rows)
    asked = calibrated(table_of([opened], [of], 0), lambda sample: int(real[sample]) if sample % 7 else None)
    assert asked.slope == pytest.approx(fit.slope, rel=0.05)
    plan = planned(opened, of, lengths=Lengths(asked, per_document=3, per_output=1))
    loads = loads_of([plan.step(n) for n in range(plan.steps)], real + 260, real + 260, 4)
    assert loads.mean() / 16384 >= 0.98 and np.mean(loads > 16384) <= 0.04


def test_small_packs_are_full_of_texts_that_were_counted(tmp_path: Path, spoken: tuple[list[int], np.ndarray]) -> None:
    """Five to six samples in 2,048 tokens, of conversations and pictures: by estimates some packs would be too long."""
    estimates, real = spoken
    rows = [row(n, "t2i", e) if n % 2 else row(n, "chat", e, [(400, 300)], None) for n, e in enumerate(estimates)]
    opened = write(tmp_path / "corpus", rows)
    of = stage(2048, mixture={"t2i": 1, "chat": 1}, condition_dropout=0)
    for mixture in ({"t2i": 1}, {"t2i": 1, "chat": 3}):
        one = of.model_copy(update={"mixture": mixture})
        plan = planned(opened, one, lengths=Lengths(per_document=3, counted=real))
        lengths = Measure(one, Lengths(per_document=3, counted=real))(opened.manifest).shown
        loads = loads_of([plan.step(n) for n in range(plan.steps)], lengths, lengths, 4)
        assert plan.limit == 2048 and loads.max() <= 2048 and loads.mean() / 2048 >= 0.985
        assert loads.mean() / 2048 == pytest.approx(plan.fill, abs=0.005)


def test_samples_of_certain_length_need_no_margin(mixed: corpus.Corpus) -> None:
    """Of a pack's limit each takes what its own estimate may be wrong."""
    of = stage(4096)
    plan = planned(mixed, of)
    made, found = plan._window(0), Measure(of)(mixed.manifest)
    beside = made.taken - made.tokens
    assert not beside[made.dropped].any()
    doubt = found.doubt[made.rows.sample]
    assert np.corrcoef(beside, np.where(made.dropped, 0, doubt))[0, 1] > 0.98
    assert (made.loads <= plan.limit).all()
    told = planned(mixed, of, lengths=Lengths(counted=np.rint(texts(mixed.manifest)).astype(np.int32)))
    assert told.limit == 4096 and told.fill > plan.fill + 0.005


def test_a_budget_that_samples_do_not_fill_is_told_with_a_better_one(mixed: corpus.Corpus) -> None:
    plan = planned(mixed, stage(2048, mixture={"few": 1}))
    better = plan.better()
    assert plan.fill < FULL and better is not None
    budget, fill = better
    assert 2048 < budget <= 4096 and fill >= FULL
    assert planned(mixed, stage(budget, mixture={"few": 1})).fill == pytest.approx(fill, abs=0.015)
    assert words("low", 2048, plan.fill, better).startswith("stage low: packs of 2,048 tokens are planned ")
    full = planned(mixed, stage(4096, mixture={"t2i": 1}))
    assert full.better() is None and not words("low", 4096, full.fill, None)


def test_any_step_can_be_had_alone(mixed: corpus.Corpus) -> None:
    of = stage(packs=3)
    plan = planned(mixed, of)
    steps = {n: plan.step(n) for n in range(3 * plan.steps)}
    for n in np.random.default_rng(0).permutation(len(steps)).tolist()[:3]:
        assert planned(mixed, of).step(n) == steps[n]
    draw = steps[7][4]
    assert plan.draw(draw.index) == draw
    far = planned(mixed, of).step(1_000_000)
    assert far == plan.step(1_000_000) and far[0].index // plan.window == 1_000_000 // plan.steps
    assert planned(mixed, of, seed=1).step(0) != steps[0]
    assert planned(mixed, stage(packs=3, name="two")).step(0) != steps[0]


def test_the_mixture_holds_and_every_sample_comes_once_in_an_epoch(mixed: corpus.Corpus) -> None:
    of = stage(mixture={"t2i": 5, "few": 2, "chat": 1.001})
    plan = planned(mixed, of)
    draws = [d for n in range(8 * plan.steps) for d in plan.step(n)]
    dealt = Counter(d.stratum for d in draws)
    parts = Counter(stratum for stratum, _ in {(d.stratum, d.part) for d in draws})
    left = 8 * plan.window - len(draws)
    assert 0 <= left <= 0.005 * len(draws)  # draws that no exchange makes room for
    for name, weight in of.mixture.items():
        assert abs(dealt[name] - len(draws) * weight / 8.001) <= parts[name] + left
    by_task = SampleTable([mixed], 0).train
    for name in of.mixture:
        mine = [d for d in draws if d.stratum == name]
        counts = Counter(d.sample for d in mine)
        epochs = len(mine) / len(by_task[name])
        assert epochs < 1 or len(set(by_task[name]) - counts.keys()) <= left / epochs
        assert max(counts.values()) <= epochs + 2
        for part in {d.part for d in mine}:
            inside = Counter(d.sample for d in mine if d.part == part).values()
            behind = [max(inside) - times - 1 for times in inside if epochs > 1]  # where they were left out
            assert sum(max(n, 0) for n in behind) <= left and max(behind, default=0) <= 1
    dropped = Counter(d.stratum for d in draws if d.dropped)
    assert dropped["chat"] == 0
    for name in ("t2i", "few"):
        assert dropped[name] / dealt[name] == pytest.approx(0.1, abs=0.01)


def test_steps_are_like_each_other_in_tasks(mixed: corpus.Corpus) -> None:
    plan = planned(mixed, stage(16384, 8))
    shares = [np.mean([d.stratum == "t2i" for d in plan.step(n)]) for n in range(plan.steps * 2)]
    assert np.std(shares) < 0.08


def test_a_spare_fits_and_is_of_the_same_stratum(mixed: corpus.Corpus) -> None:
    of = stage()
    plan = planned(mixed, of)
    found = Measure(of)(mixed.manifest)
    for number in range(6):
        draws = plan.step(number)
        loads = loads_of([draws], found.shown, found.bare, 4)[0]
        for draw in draws[::5]:
            assert draw.tokens is not None and draw.pack is not None
            spares = [plan.spare(draw, attempt) for attempt in range(1, 6)]
            for spare in spares:
                assert (spare.index, spare.stratum, spare.pack) == (draw.index, draw.stratum, draw.pack)
                assert spare.tokens == (found.bare if spare.dropped else found.shown)[spare.sample]
                assert loads[draw.pack] - draw.tokens + (spare.tokens or 0) <= plan.limit
            assert len({s.sample for s in (draw, *spares)}) >= 5
            assert (
                plan.spare(draw, 2) == planned(mixed, of).spare(draw, 2) if number == 0 and draw is draws[0] else True
            )


def test_spares_of_few_samples_are_several_others(tmp_path: Path) -> None:
    """Also where there is no other sample of this length."""
    rows = [row(number, "chat", 40 + 37 * number, [(160, 160)], None) for number in range(12)]
    plan = planned(write(tmp_path / "few", rows, row_group=100), stage(mixture={"chat": 1}))
    for draw in plan.step(0)[:12]:
        spares = {plan.spare(draw, attempt).sample for attempt in range(1, 12)}
        assert draw.sample not in spares and len(spares) >= 4


def test_each_sample_has_the_size_of_its_own_bucket_and_conversations_none(mixed: corpus.Corpus) -> None:
    of = stage(buckets=[[256, 256], [320, 192], [192, 320]])
    plan = planned(mixed, of)
    shapes = [r["output_size"] for r in mixed.manifest.to_pylist()]
    draws = plan.step(0) + plan.step(1)
    for draw in draws:
        shape = shapes[draw.sample]
        wide = None if shape is None else np.sign(shape["width"] - shape["height"])
        assert draw.size == {None: None, 0: (256, 256), 1: (320, 192), -1: (192, 320)}[wide]
    assert len({d.size for d in draws}) == 4 and len({d.size for d in draws if d.pack == 0}) > 1


def test_other_row_groups_make_another_order_and_nothing_else(mixed: corpus.Corpus, tmp_path: Path) -> None:
    other = write(tmp_path / "other", mixed.manifest.select(MADE.names).to_pylist(), row_group=977)
    of = stage(mixture={"t2i": 1, "chat": 1})
    plans = [planned(c, of) for c in (mixed, other)]
    steps = [[plan.step(n) for n in range(plan.steps)] for plan in plans]
    assert steps[0] != steps[1]
    assert plans[0].fill == pytest.approx(plans[1].fill, abs=0.004)
    shares = [Counter(d.stratum for s in each for d in s) for each in steps]
    assert shares[0]["chat"] / shares[0].total() == pytest.approx(shares[1]["chat"] / shares[1].total(), abs=0.005)


def test_samples_that_no_pack_holds_are_left_out_and_counted(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    rows = drawings(random, 900) + [
        row(10**7 + n, "chat", 30 if n % 4 else 5000, [(256, 256)], None) for n in range(400)
    ]
    opened = write(tmp_path / "long", rows)
    plan = planned(opened, stage(2048, mixture={"t2i": 1, "chat": 1}, resolution=256))
    assert plan.too_long == {"chat": 100}
    drawn = {d.sample for n in range(5 * plan.steps) for d in plan.step(n)}
    long = {n for n, r in enumerate(rows) if r["text_tokens"] == 5000}
    assert not drawn & long and drawn == set(range(1300)) - long
    with pytest.raises(RecipeError, match=r"stages\.one\.pack: no sample of t2i fits into \d+ tokens"):
        planned(opened, stage(250, mixture={"t2i": 1}, condition_dropout=0))
    with pytest.raises(RecipeError, match="no training samples of sea; they have chat, t2i"):
        planned(opened, stage(mixture={"sea": 1}))


def test_samples_as_long_as_a_pack_have_one_each(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    long = [
        row(10**7 + n, "chat", 1600 + 2 * n % 450, [], None) for n in range(400)
    ]  # around what packs are planned to
    opened = write(tmp_path / "long", drawings(random, 2000) + long)
    of = stage(2048, mixture={"t2i": 9, "chat": 1})
    plan = planned(opened, of)
    found = Measure(of)(opened.manifest)
    loads = loads_of([plan.step(n) for n in range(plan.steps)], found.shown, found.bare, 4)
    assert loads.min() > 0 and loads.max() <= plan.limit and loads.mean() / 2048 > 0.93
    assert any(found.shown[d.sample] > 0.99 * plan.limit for n in range(plan.steps) for d in plan.step(n))


def test_corpora_without_the_estimate_are_packed_by_characters_and_bytes(tmp_path: Path) -> None:
    opened = write_rows(tmp_path / "earlier", rows_of(range(600)))
    of = stage(1024, 2, mixture={"deblur": 3, "describe": 1}, resolution=64)
    assert opened.manifest["text_tokens"].null_count == len(opened)
    plan = planned(opened, of)
    found = Measure(of)(opened.manifest)
    loads = loads_of([plan.step(n) for n in range(plan.steps)], found.shown, found.bare, 2)
    assert loads.max() <= 1024 and loads.mean() / 1024 >= 0.95


def test_stages_with_packs_and_without_share_a_table(mixed: corpus.Corpus) -> None:
    packed, plain = stage(), stage(pack=None, batch=8)
    table = table_of([mixed], [packed, plain], 0.1)
    alone = table_of([mixed], [plain], 0.1)
    assert len(table.cells) > len(alone.cells)
    one, other = plan_of(table, plain, 0), plan_of(alone, plain, 0)
    assert isinstance(one, StagePlan) and all(one.step(n) == other.step(n) for n in range(20))
    assert {k: list(v) for k, v in table.train.items()} == {k: list(v) for k, v in alone.train.items()}
    held = {s for part in table.held_out.values() for s in part}
    plan = plan_of(table, packed, 0)
    assert held and not held & {d.sample for n in range(100) for d in plan.step(n)}


def test_a_stage_has_a_batch_or_packs(tmp_path: Path) -> None:
    given = {"name": "one", "resolution": 16, "steps": 1, "lr": 1, "mixture": {"a": 1}}
    for changes in ({}, {"batch": 4, "pack": {"tokens": 100}}):
        with pytest.raises(RecipeError, match="give either batch"):
            parse_config(Stage, given | changes, "test")
    assert parse_config(Stage, {**given, "pack": {"tokens": 100, "packs": 2}}, "test").batch is None


@dataclass
class Many:
    """500 row groups of 100 samples in four classes, which are not everywhere; `read` has those that were read."""

    counts: np.ndarray
    read: list[int] = field(default_factory=list)
    tasks: Sequence[str] = ("t",)
    boxes: Sequence[Shape] = ()

    @property
    def sizes(self) -> np.ndarray:
        return np.full(self.counts.shape[1], 100)

    def rows(self, entry: int) -> Rows:
        self.read.append(entry)
        kind = np.repeat(np.arange(4), self.counts[:, entry])
        length = 200 + 60 * kind + np.arange(100) % 50
        zero = np.zeros(100, np.int64)
        return Rows(entry * 100 + np.arange(100), kind, zero, zero - 1, length, length, zero > 0, length * 0.05)


def test_the_parts_of_a_stratum_go_through_the_row_groups_together() -> None:
    random = np.random.default_rng(0)
    counts = random.multinomial(100, [0.4, 0.3, 0.2, 0.1], 500).T
    counts[:, ::5] = np.array([0, 0, 0, 100])[:, None]  # long ones have row groups of their own
    samples = Many(counts)
    plan = PackPlan({"s": samples}, {"s": 1}, Pack(tokens=4096, packs=2), 0, "one", window=512, open_samples=1000)
    samples.read.clear()
    windows = []
    drawn = []
    for window in range(20):
        draws = [d for n in range(plan.steps) for d in plan.step(window * plan.steps + n)]
        windows.append({d.sample // 100 for d in draws})
        drawn += [d.sample for d in draws]
    assert len(drawn) == len(set(drawn))
    # 512 samples lie in 5 row groups at least, and are shuffled among those of a run, 10
    assert np.mean([len(groups) for groups in windows]) < 40
    assert len(samples.read) < 1.2 * len(set(samples.read))  # what was read is still there for the next


def test_the_side_is_that_of_training(mixed: corpus.Corpus) -> None:
    table = table_of([mixed], [stage()], 0.3)
    plan = plan_of(table, stage(), 0)
    trained = {s for part in table.samples(TRAIN).values() for s in part}
    assert {d.sample for n in range(50) for d in plan.step(n)} <= trained
