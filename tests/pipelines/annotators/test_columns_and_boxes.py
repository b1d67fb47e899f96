"""What annotators share for columns, boxes, and packages that may be missing."""

from __future__ import annotations

import numpy as np
import pytest

from tests.pipelines.annotating import rows
from x2i.base.errors import X2IError
from x2i.base.packages import need, version
from x2i.pipelines.annotators._boxes import shares
from x2i.pipelines.annotators._columns import column, texts


def test_boxes_are_shares_of_the_picture_cut_off_at_its_edges() -> None:
    boxes = shares([[10, 20, 30, 40], [-5, 0, 200, 41]], 100, 40)
    assert boxes.dtype == np.float32
    assert np.allclose(boxes, np.array([[0.1, 0.5, 0.3, 1], [0, 0, 1, 1]]))
    assert shares(np.zeros((0, 4)), 3, 3).shape == (0, 4)
    assert shares(np.full((2, 5, 2), 8), 16, 32)[1, 4].tolist() == [0.5, 0.25]


def test_columns_are_another_annotator_s_or_the_caption() -> None:
    given = rows(["a dog", None], {"caption.long": ["A brown dog.", None], "image.width": [3, 4]})
    assert texts(given, "rows.text", "entities") == ["a dog", None]
    assert texts(given, "caption.long", "entities") == ["A brown dog.", None]
    assert column(given, "image.width", "entities").to_pylist() == [3, 4]
    assert texts(list(given), "rows.text", "entities") == ["a dog", None]
    with pytest.raises(X2IError, match=r"annotator entities: the batch lacks the column clip\.embedding"):
        column(given, "clip.embedding", "entities")


def test_a_missing_package_is_named_with_a_remedy() -> None:
    assert need("json", "json", "ocr").loads("3") == 3
    with pytest.raises(X2IError, match=r"annotator ocr: needs the package no-such: pip install 'x2i\[annotators\]'"):
        need("no_such_module.part", "no-such", "ocr")
    assert version("no-such-distribution") == "missing" and version("numpy") == np.__version__
