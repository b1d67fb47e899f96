"""Few-shot samples: another row's picture is the example, its parameters are told, and no row is its own example."""

from __future__ import annotations

import duckdb
import numpy as np
import pyarrow as pa

from tests.pipelines.tasks.rows import pixels, row
from x2i.corpus.manifest import originals
from x2i.corpus.sample import Sample
from x2i.pipelines.tasks.base import Found, Skipped
from x2i.pipelines.tasks.few_shot import FewShot
from x2i.pipelines.tasks.restoration import Restoration


def family(share: float = 1.0) -> FewShot:
    return FewShot(FewShot.Config(of={"restoration": {"tasks": ["inpaint", "colorize"]}}, share=share))


def test_the_example_and_the_query_are_the_inner_tasks_own_samples() -> None:
    query, example = row("chelsea.png"), row("astronaut.png", text="An astronaut.")
    query.groups = (Found("few_shot_inpaint", (example,), {}),)
    made = {m.task_type: m for m in family().build(query)}
    assert made["few_shot_colorize"] == Skipped("few_shot_colorize", "not_drawn")
    sample = made["few_shot_inpaint"]
    assert isinstance(sample, Sample)
    inner = Restoration(Restoration.Config(tasks=("inpaint",)))
    (of_query,), (of_example,) = inner.build(query), inner.build(example)
    assert isinstance(of_query, Sample)
    assert isinstance(of_example, Sample)
    shown = [of_example.input_images[0], of_example.output_image, of_query.input_images[0], of_query.output_image]
    assert [*sample.input_images, sample.output_image] == shown
    assert np.array_equal(pixels(sample.output_image), pixels(query.picture))
    assert sample.provenance["parameters"]["example"] == of_example.provenance["parameters"]
    assert sample.provenance["others"][0]["location"] == "astronaut.png"
    assert originals(sample.provenance) == [query.image_id, example.image_id]


def test_an_example_that_cannot_be_had_is_a_reason() -> None:
    query = row()
    query.groups = (
        Found("few_shot_inpaint", (), {}, "source_changed"),
        Found("few_shot_colorize", (row("camera.png"),), {}),
    )
    assert list(family().build(query)) == [
        Skipped("few_shot_inpaint", "example_source_changed"),
        Skipped("few_shot_colorize", "example_already_grey"),
    ]


def groups(images: list[str], share: float = 1.0, seed: int = 0) -> dict[str, str]:
    connection = duckdb.connect()
    ids = [f"row{i}" for i in range(len(images))]
    connection.register("kept", pa.table({"row_id": ids, "image_id": images}))
    found = [g for g in family(share).groups(connection, seed) if g.task_type == "few_shot_inpaint"]
    return {g.anchor: g.others[0] for g in found}


def test_every_row_has_another_as_its_example_whatever_their_order() -> None:
    images = [f"{i:064x}" for i in range(50)]
    found = groups(images)
    assert sorted(found) == sorted(f"row{i}" for i in range(50))
    assert all(a != b for a, b in found.items())
    by_image = {images[int(a[3:])]: images[int(b[3:])] for a, b in found.items()}
    backwards = groups(images[::-1])
    assert {images[::-1][int(a[3:])]: images[::-1][int(b[3:])] for a, b in backwards.items()} == by_image
    assert groups(images, seed=1) != found
    assert groups(images[:1]) == {}
    assert groups([images[0]] * 3) == {}


def test_the_share_is_drawn_by_content() -> None:
    images = [f"{i:064x}" for i in range(2000)]
    some = groups(images, share=0.2)
    assert 320 < len(some) < 480
    assert set(some) <= set(groups(images, share=0.5))
