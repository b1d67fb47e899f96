"""`texts`: language, length, boilerplate, keys and MinHash signatures of captions."""

from __future__ import annotations

import numpy as np
import pytest

from tests.pipelines.annotating import rows, run
from x2i.base.errors import X2IError
from x2i.pipelines.annotators._boilerplate import RULES, alphabetic, boilerplate, words
from x2i.pipelines.annotators._texts import KEYS, PERMUTATIONS, key, minhash, normalise, shingles
from x2i.pipelines.annotators.base import Batch
from x2i.pipelines.annotators.texts import Texts, TextsConfig

DOG = "A brown dog runs across a green field to fetch a ball."

GOOD = [
    DOG,
    "The 1969 Ford Mustang Boss 302 in Grabber Orange",
    "Portrait of a woman with a pearl earring, oil on canvas, 1665",
    "Picture of a cat",
    "Image of Saturn taken by Cassini",
    "cat",
    "P. Diddy on stage",
    "Beyoncé performs at the 2013 Super Bowl",
    "一只猫坐在垫子上",
    'The man wears a T-shirt which says "click"',
    "Coffee, toast, and eggs on a table",
    "St. Mary's Church, Whitby",
    "a man taking a photo of his dog #dogs",
    "Boeing 747-400 of Lufthansa at Frankfurt Airport",
    "Sample of the fabric in red, green, blue",
    "Photographs by Ansel Adams",
    "Slide guitar player",
]

BAD = {
    "IMG_1234.jpg": "file_name",
    "DSC01234": "file_name",
    "Screenshot 2020-01-02 at 10.11.12": "file_name",
    "WhatsApp Image 2019-05-06 at 12.30.45": "file_name",
    "my-great-photo.jpeg": "file_name",
    "550e8400-e29b-41d4-a716-446655440000": "file_name",
    "https://example.com/a/b.jpg?width=10": "address",
    "Visit example.com for more": "address",
    "photo": "placeholder",
    "no image available": "placeholder",
    "Featured image": "placeholder",
    "#love #cat #instagood": "hashtags",
    "12345 - 6789": "not_letters",
    '<a href="x">a red car</a>': "markup",
    "Image may contain: 1 person, standing": "machine_made",
    "No photo description available.": "machine_made",
    "Cat on a sofa Stock Photo": "stock_site",
    "Click here to enlarge": "call_to_action",
    "Red shoes, buy now, free shipping": "call_to_action",
    "Sunset over the bay © 2020 Example Corp": "page_furniture",
    "dog dog dog dog dog dog dog": "repeated",
    "shoes | boots | sandals | heels | pumps | flats | sneakers | loafers": "keyword_list",
    "!!!": "empty",
}


@pytest.mark.parametrize("text", GOOD)
def test_a_caption_is_not_boilerplate(text: str) -> None:
    assert boilerplate(text) is None


@pytest.mark.parametrize("text", BAD)
def test_boilerplate_is_named(text: str) -> None:
    assert boilerplate(text) == BAD[text]


def test_every_rule_has_an_example() -> None:
    assert set(BAD.values()) == {name for name, _ in RULES}


def test_words_of_scripts_with_and_without_spaces() -> None:
    assert words("Don't count well-known words twice: 1,000!") == [
        "Don't",
        "count",
        "well-known",
        "words",
        "twice",
        "1",
        "000",
    ]
    assert len(words("一只猫 sits")) == 4
    assert alphabetic("ab 12") == 0.5
    assert alphabetic("") == 0


def test_rows() -> None:
    given = rows([DOG, "Un chien brun court dans un champ vert.", "", "  ", "IMG_0001.JPG", "A BROWN DOG runs!"])
    table = run(Texts(TextsConfig()), given).to_pylist()
    assert [r["language"] for r in table] == ["en", "fr", None, None, "und", "und"]
    assert table[0]["language_score"] > 0.8
    assert (table[0]["chars"], table[0]["words"]) == (len(DOG), 12)
    assert table[0]["alphabetic"] == pytest.approx(42 / 43)
    assert [r["boilerplate_reason"] for r in table] == [None, None, "empty", "empty", "file_name", None]
    assert [r["boilerplate"] for r in table] == [False, False, True, True, True, False]
    assert table[2]["minhash"] is None and table[2]["key"] is None and table[2]["chars"] == 0
    assert table[0]["minhash"] == minhash(shingles(normalise(DOG), 5, words=False)).tolist()
    assert table[5]["key"] == key("a brown dog runs")


def test_a_row_without_a_text_has_null_everywhere_and_is_kept_by_a_filter() -> None:
    import duckdb

    texts = run(Texts(TextsConfig()), rows([None, "", DOG]))
    assert set(texts.to_pylist()[0].values()) == {None}
    assert texts["boilerplate"].to_pylist() == [None, True, False]
    kept = duckdb.from_arrow(texts).filter("boilerplate is not true")
    assert kept.project("chars").fetchall() == [(None,), (len(DOG),)]


def test_texts_that_read_the_same_have_one_key() -> None:
    assert key(normalise("Two dogs,  running.")) == key(normalise("two DOGS running"))
    assert key(normalise("ﬁsh Straße")) == key(normalise("fish strasse"))
    assert key(normalise("two dogs")) != key(normalise("two dog"))


def test_another_column_and_chosen_languages() -> None:
    annotator = Texts(TextsConfig(text="caption.long", languages=["de", "fr"]))
    assert annotator.reads == ("caption.long",)
    given = rows(["left alone"], {"caption.long": ["Ein rotes Auto steht vor dem Haus."]})
    assert run(annotator, given)["language"].to_pylist() == ["de"]
    with pytest.raises(X2IError, match=r"annotator texts: the batch lacks the column caption\.long"):
        annotator(rows(["no such column"]))
    with pytest.raises(X2IError, match="does not know xx"):
        Texts(TextsConfig(languages=["xx"])).setup()


def test_no_rows() -> None:
    assert run(Texts(TextsConfig()), Batch([])).num_rows == 0


def test_fingerprint_covers_what_changes_a_value() -> None:
    plain = Texts(TextsConfig())
    assert Texts(TextsConfig(batch_size=7)).fingerprint == plain.fingerprint
    assert Texts(TextsConfig(shingle="words")).fingerprint != plain.fingerprint
    assert "py3langid" in plain.description()


@pytest.mark.parametrize("by_words", [False, True])
def test_signatures_estimate_the_jaccard_similarity(by_words: bool) -> None:
    generator = np.random.default_rng(0)
    vocabulary = ["".join(generator.choice(list("abcdefghij"), 5)) for _ in range(400)]
    errors, squares, within = [], [], 0
    for _ in range(300):
        one = generator.choice(vocabulary, int(generator.integers(5, 60))).tolist()
        other = [w if generator.random() < 0.9 else str(generator.choice(vocabulary)) for w in one]
        a, b = (shingles(" ".join(t), 3 if by_words else 5, by_words) for t in (one, other))
        exact = len(np.intersect1d(a, b)) / len(np.union1d(a, b))
        estimate = float((minhash(a) == minhash(b)).mean())
        variance = exact * (1 - exact) / PERMUTATIONS
        errors.append(estimate - exact)
        squares.append(variance)
        within += abs(estimate - exact) <= 4 * np.sqrt(variance) + 1e-12
    assert within >= 299  # 4 standard errors: one in 16,000 would be outside
    assert abs(np.mean(errors)) < 4 * np.sqrt(np.sum(squares)) / len(errors)  # no bias


def test_shingles_are_those_of_the_text() -> None:
    text = "the cat sat on the mat"
    assert len(np.unique(shingles(text, 5, words=False))) == len({text[i : i + 5] for i in range(len(text) - 4)})
    assert len(shingles(text, 3, words=True)) == 4
    assert len(shingles("ab", 5, words=False)) == 1  # shorter than a shingle
    same = shingles("abcdeXabcde", 5, words=False)
    assert same[0] == same[6]


def test_the_hash_functions_are_pinned() -> None:
    """Signatures in a lake outlive the code: if this changes, `Texts.version` must go up."""
    assert len(set(KEYS.tolist())) == PERMUTATIONS
    assert minhash(shingles("a brown dog", 5, words=False))[:3].tolist() == [361997641, 182166115, 280478680]
    assert key("a brown dog") == 0x3CA3AB5DF4D202B1


def test_long_texts_take_little_memory() -> None:
    whole = shingles("".join(chr(97 + i % 26) + chr(97 + i // 26 % 26) for i in range(20_000)), 5, words=False)
    assert len(whole) > 30_000
    halves = [minhash(whole[:11_111]), minhash(whole[11_111:])]
    assert (minhash(whole) == np.minimum(*halves)).all()
