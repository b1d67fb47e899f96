"""`entities`: a tiny spaCy pipeline, trained here, saved, and loaded by its path."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.pipelines.annotating import rows, run
from x2i.base.errors import X2IError
from x2i.pipelines.annotators.base import Batch
from x2i.pipelines.annotators.entities import Entities, EntitiesConfig, Pipeline

#: Words, parts of speech, heads, dependencies; entities as (start, end, label).
SENTENCES: list[tuple[str, list[str], list[int], list[str], list[tuple[int, int, str]]]] = [
    (
        "Ada stands near the red house in Paris",
        ["PROPN", "VERB", "ADP", "DET", "ADJ", "NOUN", "ADP", "PROPN"],
        [1, 1, 1, 5, 5, 2, 1, 6],
        ["nsubj", "ROOT", "prep", "det", "amod", "pobj", "prep", "pobj"],
        [(0, 3, "PERSON"), (33, 38, "GPE")],
    ),
    (
        "A small dog sleeps on the old mat",
        ["DET", "ADJ", "NOUN", "VERB", "ADP", "DET", "ADJ", "NOUN"],
        [2, 2, 3, 3, 3, 7, 7, 4],
        ["det", "amod", "nsubj", "ROOT", "prep", "det", "amod", "pobj"],
        [],
    ),
    (
        "Leonardo paints a woman",
        ["PROPN", "VERB", "DET", "NOUN"],
        [1, 1, 3, 1],
        ["nsubj", "ROOT", "det", "dobj"],
        [(0, 8, "PERSON")],
    ),
]


def train(folder: Path, components: list[str]) -> Path:
    """A pipeline that knows the sentences by heart."""
    import random

    import numpy as np
    import spacy
    from spacy.training import Example

    random.seed(0)
    np.random.seed(0)
    nlp = spacy.blank("en")
    for component in components:
        nlp.add_pipe(component, config={"min_action_freq": 1} if component == "parser" else {})
    examples = []
    for text, pos, heads, deps, entities in SENTENCES:
        gold: dict[str, Any] = {"pos": pos, "heads": heads, "deps": deps, "entities": entities}
        examples.append(Example.from_dict(nlp.make_doc(text), gold))
    optimizer = nlp.initialize(lambda: examples)
    optimizer.learn_rate = 0.01
    for _ in range(25):
        nlp.update(examples, sgd=optimizer, drop=0.0)
    nlp.meta["name"], nlp.meta["version"] = "tiny", "0.0.1"
    nlp.to_disk(folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("spacy") / "tiny", ["morphologizer", "parser", "ner"])


def annotator(folder: Path | str, **config: Any) -> Entities:
    return Entities(EntitiesConfig(pipeline=str(folder), **config))


def test_entities_and_noun_chunks(pipeline: Path) -> None:
    said = [s[0] for s in SENTENCES]
    table = run(annotator(pipeline), rows([*said, None, ""])).to_pylist()
    assert table[0]["entities"] == [
        {"text": "Ada", "label": "PERSON", "start": 0, "end": 3},
        {"text": "Paris", "label": "GPE", "start": 33, "end": 38},
    ]
    assert [c["text"] for c in table[0]["noun_chunks"]] == ["Ada", "the red house", "Paris"]
    assert [(c["text"], c["root"]) for c in table[1]["noun_chunks"]] == [("A small dog", "dog"), ("the old mat", "mat")]
    assert table[1]["entities"] == []
    assert table[3] == table[4] == {"entities": [], "noun_chunks": []}
    for text, row in zip(said, table, strict=False):
        for span in row["entities"] + row["noun_chunks"]:
            assert text[span["start"] : span["end"]] == span["text"]


def test_it_says_what_spacy_says(pipeline: Path) -> None:
    import spacy

    text = "Leonardo stands near a small red house. Ada 🙂 paints the dog in Paris"
    nlp = spacy.load(pipeline)
    doc = nlp(text)
    (row,) = run(annotator(pipeline), rows([text])).to_pylist()
    assert [(e["text"], e["label"], e["start"], e["end"]) for e in row["entities"]] == [
        (e.text, e.label_, e.start_char, e.end_char) for e in doc.ents
    ]
    assert [(c["text"], c["root"]) for c in row["noun_chunks"]] == [(c.text, c.root.text) for c in doc.noun_chunks]
    assert row["noun_chunks"]


def test_a_batch_is_as_one_by_one(pipeline: Path) -> None:
    given = rows([s[0] for s in SENTENCES])
    ready = annotator(pipeline)
    table = run(ready, given).to_pylist()
    assert table == [ready(Batch([i])).to_pylist()[0] for i in given]
    assert run(ready, Batch([])).num_rows == 0


def test_another_column_and_a_limit(pipeline: Path) -> None:
    ready = annotator(pipeline, text="caption.long", max_chars=22)
    assert ready.reads == ("caption.long",)
    (row,) = run(ready, rows(["no"], {"caption.long": [SENTENCES[0][0]]})).to_pylist()
    assert max(c["end"] for c in row["noun_chunks"]) <= 22


def test_a_pipeline_without_a_parser_has_no_chunks_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = run(annotator(train(tmp_path / "ner", ["ner"])), rows([SENTENCES[0][0]])).to_pylist()
    assert table[0]["noun_chunks"] == [] and table[0]["entities"]
    assert "has no parser or tagger: noun_chunks is empty" in caplog.text
    assert "no `ner`" not in caplog.text


def test_an_installed_package_is_found_by_name_and_not_imported(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "en_tiny_installed"
    shutil.copytree(pipeline, package / "en_tiny-0.0.1")
    (package / "__init__.py").write_text("raise RuntimeError('code of a package ran')")
    (package / "meta.json").write_text(json.dumps({"lang": "en", "name": "tiny", "version": "0.0.1"}))
    monkeypatch.syspath_prepend(str(tmp_path))
    ready = annotator("en_tiny_installed")
    assert ready.weights()[0].local() == package / "en_tiny-0.0.1"
    assert run(ready, rows([SENTENCES[2][0]]))["entities"].to_pylist()[0][0]["text"] == "Leonardo"
    assert "en_tiny_installed" not in sys.modules
    assert annotator(package).weights()[0].local() == package / "en_tiny-0.0.1"


def test_a_pipeline_that_is_not_there_has_a_remedy(tmp_path: Path) -> None:
    missing = annotator("en_core_web_nowhere")
    assert missing.weights()[0].local() is None
    with pytest.raises(X2IError, match="python -m spacy download en_core_web_nowhere"):
        missing.setup()
    with pytest.raises(X2IError, match="not installed, and no such folder"):
        annotator(tmp_path).setup()  # no pipeline in it
    (tmp_path / "config.cfg").write_text("[nlp]\nlang = nonsense\n")
    with pytest.raises(X2IError, match="cannot be loaded"):
        annotator(tmp_path).setup()


def test_the_pipeline_is_in_the_fingerprint(pipeline: Path, tmp_path: Path) -> None:
    copy = tmp_path / "tiny"
    shutil.copytree(pipeline, copy)
    before = annotator(copy).fingerprint
    digest = Pipeline(str(copy)).digest()
    assert digest == Pipeline(str(pipeline)).digest()
    assert annotator(copy, batch_size=3).fingerprint == before
    assert annotator(copy, sha256=digest).weights()[0].fetch() == copy
    (copy / "vocab" / "strings.json").write_text("[]")
    assert annotator(copy).fingerprint != before
    with pytest.raises(X2IError, match="expected"):
        annotator(copy, sha256=digest).weights()[0].fetch()
