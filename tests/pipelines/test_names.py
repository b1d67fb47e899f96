"""Names in captions: one spelling each, counted by picture, and those that are part of another."""

from __future__ import annotations

import random

import duckdb
import pyarrow as pa
import pytest

from x2i.pipelines.select.names import MENTIONS, Name, is_part, mentions, names, normalise

ENTITY = pa.struct({"text": pa.string(), "label": pa.string(), "start": pa.int32(), "end": pa.int32()})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("Ada Lovelace", "ada lovelace"),
        ("Dr. Ada  Lovelace’s", "ada lovelace"),
        ("ADA LOVELACE'S", "ada lovelace"),
        ("“Ada Lovelace”,", "ada lovelace"),
        ("the Beatles", "beatles"),
        ("James'", "james"),
        ("J.R.R. Tolkien", "j r r tolkien"),
        ("J. R. R. Tolkien", "j r r tolkien"),
        ("Queen Victoria", "queen victoria"),
        ("Mayor", "mayor"),
        ("Anne-Marie", "anne-marie"),
        ("Ａｄａ", "ada"),
        ("Åsa", "åsa"),
        ("王", "王"),
        ("'s", ""),
        ("1984", ""),
        ("...", ""),
    ],
)
def test_one_spelling_for_each_name(given: str, expected: str) -> None:
    assert normalise(given) == expected
    assert normalise(expected) == expected


def test_a_part_of_a_name() -> None:
    assert is_part("lovelace", "ada lovelace")
    assert is_part("ada", "ada lovelace")
    assert not is_part("love", "ada lovelace")
    assert not is_part("ada lovelace", "ada lovelace")


def told(captions: list[tuple[str, list[tuple[str, str]]]], seed: int = 0) -> duckdb.DuckDBPyConnection:
    """`kept` with these captions' names, (image id, [(name, label), …]), in any order."""
    rows = [
        {
            "row_id": f"row{i}",
            "image_id": image,
            "entities": {
                "entities": [
                    {"text": t, "label": label, "start": 20 * n, "end": 20 * n + len(t)}
                    for n, (t, label) in enumerate(said)
                ]
            },
        }
        for i, (image, said) in enumerate(captions)
    ]
    random.Random(seed).shuffle(rows)
    schema = {"row_id": pa.string(), "image_id": pa.string(), "entities": pa.struct({"entities": pa.list_(ENTITY)})}
    connection = duckdb.connect()
    connection.register("kept", pa.Table.from_pylist(rows, schema=pa.schema(schema)))
    return connection


CAPTIONS = [
    ("a", [("Ada Lovelace", "PERSON"), ("Lovelace", "PERSON"), ("London", "GPE")]),
    ("b", [("Mrs Ada Lovelace's", "PERSON"), ("Alan Turing", "PERSON")]),
    ("c", [("ADA LOVELACE", "ORG"), ("Turing", "PERSON")]),
    ("d", [("ada lovelace", "PERSON")]),
    ("d", [("Ada Lovelace", "PERSON")]),  # the same picture again
    ("e", []),
]


def test_names_are_counted_by_picture_in_their_usual_spelling() -> None:
    for seed in range(3):
        connection = told(CAPTIONS, seed)
        mentions(connection, "entities", ["PERSON", "ORG"])
        assert names(connection, 1) == [
            Name("ada lovelace", "Ada Lovelace", "PERSON", 4),
            Name("alan turing", "Alan Turing", "PERSON", 1),
            Name("turing", "Turing", "PERSON", 1),
        ]
        assert [n.key for n in names(connection, 2)] == ["ada lovelace"]
        assert [n.key for n in names(connection, 1, 3)] == ["alan turing", "turing"]


def test_which_row_mentions_whom_in_which_order() -> None:
    connection = told(CAPTIONS)
    mentions(connection, "entities", ["PERSON", "GPE"])
    found = connection.execute(f'select row_id, nth, name from "{MENTIONS}" order by all').fetchall()
    assert found == [
        ("row0", 1, "ada lovelace"),
        ("row0", 2, "london"),
        ("row1", 1, "ada lovelace"),
        ("row1", 2, "alan turing"),
        ("row2", 1, "turing"),
        ("row3", 1, "ada lovelace"),
        ("row4", 1, "ada lovelace"),
    ]
