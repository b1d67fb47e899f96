"""A worse answer (`rejected_response`) stays with its conversation wherever samples are read, shown and written again."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests import corpora
from tests.corpora import Built, build
from tests.pipelines.source_files import problems, read
from tests.pipelines.tasks import inline
from tests.pipelines.tasks.rows import row
from x2i.corpus.audit.gallery import galleries
from x2i.corpus.corpus import Corpus
from x2i.corpus.export import export
from x2i.corpus.faults import Faults
from x2i.corpus.forget import forget
from x2i.corpus.sample import Picture, Sample
from x2i.corpus.shard import ShardWriter
from x2i.corpus.text import sample_tokens
from x2i.corpus.trace import trace
from x2i.corpus.verify import verify
from x2i.corpus.verify_sample import SampleCheck
from x2i.pipelines.sources.x2i_jsonl import X2IJsonl, X2IJsonlConfig
from x2i.pipelines.tasks.base import Skipped
from x2i.pipelines.tasks.published import Published

RECIPE = corpora.RECIPE.replace(
    "  control:\n  restoration: {tasks: [deblur, inpaint]}\n",
    "  understanding:\n  diagnose: {tasks: [deblur, inpaint], rejected: true}\n",
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(tmp_path_factory.mktemp("rejected"), RECIPE)


def pairs(corpus: Path) -> Counter[Any]:
    """What is said of which picture, and what is rejected."""
    talks = [s for s in Corpus(corpus) if s.messages]
    return Counter((str(s.messages), s.rejected_response, s.input_images[0].data) for s in talks)


def test_it_is_read_verified_traced_and_shown(built: Built) -> None:
    made = [s for s in Corpus(built.corpus) if s.task_type == "diagnose"]
    assert made and all(s.rejected_response and s.rejected_response != s.messages[-1]["content"] for s in made)
    assert not any(s.rejected_response for s in Corpus(built.corpus) if s.task_type != "diagnose")
    estimated = {row["key"]: row["rejected_tokens"] for row in Corpus(built.corpus).manifest.to_pylist()}
    question = {s.key: [s.messages[0], {"content": s.rejected_response}] for s in made}
    assert estimated == {key: sample_tokens("", question[key], {}) if key in question else None for key in estimated}
    assert not verify(built.corpus).faults
    told = trace(built.corpus, made[0].key)["sample"]
    assert told["rejected_response"] == made[0].rejected_response
    shown = {g.task_type: g.examples for g in galleries(Corpus(built.corpus), 3, 64)}
    assert [role for role, _ in shown["diagnose"][0].messages] == ["user", "assistant", "rejected"]
    assert [role for role, _ in shown["describe"][0].messages] == ["user", "assistant"]


def test_it_comes_back_from_an_export(built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = export(built.corpus, "ms-swift", tmp_path / "swift").out
    records = [json.loads(line) for line in (out / "swift.jsonl").read_text().splitlines()]
    assert {"rejected_response" in r for r in records} == {True, False}
    (tmp_path / "recipe.yaml").write_text(
        "{name: again, lake: lake, out: corpus, tasks: {published: }, select: {require_text: false}, "
        "sources: [{kind: x2i_jsonl, name: back, path: swift/swift.jsonl}]}"
    )
    monkeypatch.chdir(tmp_path)
    inline.build(Path("recipe.yaml"))
    assert not verify(tmp_path / "corpus").faults
    assert pairs(tmp_path / "corpus") == pairs(built.corpus)


def test_forgetting_others_leaves_it(built: Built, tmp_path: Path) -> None:
    mine = built.copy(tmp_path / "mine")
    gone = next(iter(Corpus(mine.corpus))).provenance["image_id"]
    left = Counter(
        {
            (str(s.messages), s.rejected_response, s.input_images[0].data): 1
            for s in Corpus(mine.corpus)
            if s.messages and s.provenance["image_id"] != gone
        }
    )
    forget(mine.corpus, [gone], lake=mine.root / "lake")
    assert pairs(mine.corpus) == left


def png() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "PNG")
    return out.getvalue()


TALK = [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": "A cup."}]


def test_conversations_of_x2i_jsonl(built: Built, tmp_path: Path) -> None:
    photos = sorted(built.root.glob("photos/c*.png"))[:2]
    names = [str(p) for p in photos]
    compare = [{"role": "user", "content": "<image><image>Which?"}, {"role": "assistant", "content": "<bbox>"}]
    objects = {"ref": [], "bbox": [[0.1, 0.1, 0.2, 0.2]], "bbox_type": "norm1"}
    records = [
        {"messages": TALK, "images": names[:1], "rejected_response": "A cat."},
        {"task_type": "compare", "instruction": "", "messages": compare, "input_images": names, "objects": objects},
        {"messages": TALK},
        {"messages": TALK, "images": [{"path": names[0]}]},
        {"messages": TALK, "images": ["gone.png"]},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    rows = read(X2IJsonl(X2IJsonlConfig(path=str(tmp_path / "a.jsonl"), name="a", images="/")))
    assert list(problems(rows).values()) == ["no_image", "bad_metadata", "missing_image"]
    assert rows[0].meta == {"messages": TALK, "rejected_response": "A cat."}
    assert (rows[0].data, rows[0].inputs) == (photos[0].read_bytes(), [])
    assert (rows[1].data, [d for _, d in rows[1].inputs]) == (photos[1].read_bytes(), [photos[0].read_bytes()])
    assert rows[1].meta == {"task_type": "compare", "instruction": "", "messages": compare, "objects": objects}


@pytest.mark.parametrize(
    ("meta", "reason"),
    [
        ({"messages": TALK, "rejected_response": "A cat."}, None),
        ({"messages": TALK}, None),
        ({"messages": TALK, "objects": {"ref": ["a cup"], "bbox": []}}, None),
        ({"messages": TALK[:1], "rejected_response": "A cat."}, "bad_messages"),  # worse than which answer?
        ({"messages": TALK, "rejected_response": ["A cat."]}, "bad_messages"),
        ({"messages": TALK, "objects": ["a cat"]}, "bad_messages"),
    ],
)
def test_published_conversations_keep_it_or_say_why_not(meta: dict[str, Any], reason: str | None) -> None:
    (made,) = Published(Published.Config()).build(row(meta=meta))
    if reason is not None:
        assert made == Skipped("published", reason)
    else:
        assert isinstance(made, Sample)
        assert made.rejected_response == meta.get("rejected_response")
        assert made.objects == meta.get("objects", {})


def test_a_worse_answer_than_none_is_a_fault(tmp_path: Path) -> None:
    picture = Picture(png(), "png", 8, 8)
    about = {"image_id": "0", "row_id": "0", "source": "s", "location": "l"}
    for said, faults in ((tuple(TALK), 0), (tuple(TALK[:1]), 1)):
        sample = Sample("k", "vqa", "", (picture,), None, said, about, rejected_response="A cat.")
        with ShardWriter(tmp_path / "0.tar") as writer:
            writer.write("k", sample.members())
        found = Faults(9)
        SampleCheck(found, "0.tar", "k", 0, (tmp_path / "0.tar").read_bytes(), None).run(decode=True)
        assert len(found.found) == faults


def test_pairs_of_one_talk_are_not_each_others_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(png())
    talks = [{"messages": TALK, "images": ["a.png"], "rejected_response": f"A {w}."} for w in ("cat", "dog", "cat")]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(t) + "\n" for t in talks))
    (tmp_path / "recipe.yaml").write_text(
        "{name: pairs, lake: lake, out: corpus, tasks: {published: }, select: {require_text: false}, "
        "sources: [{kind: x2i_jsonl, name: a, path: a.jsonl}]}"
    )
    monkeypatch.chdir(tmp_path)
    inline.build(Path("recipe.yaml"))
    assert sorted(str(s.rejected_response) for s in Corpus("corpus")) == ["A cat.", "A dog."]
