"""The reference page says what the docstrings say and what a comparison finds, and the comparison can find something."""

import dataclasses
import inspect
import re

import jax
import pytest

torch = pytest.importorskip("torch")


import jaxdl.nn
from benchmarks import reference
from benchmarks.counterparts import ROWS, differences

PAGE = reference.PAGE.read_text(encoding="utf-8")
FOUND = reference.differences_of(PAGE)


def test_the_page_is_what_the_docstrings_say_now():
    assert PAGE == reference.page(FOUND), "run `python -m benchmarks.reference`"


@pytest.mark.parametrize("name", jaxdl.nn.__all__)
def test_every_public_name_is_on_the_page_with_its_docstring_and_a_comparison_or_why_there_is_none(name):
    _, _, section = PAGE.partition(f"\n### {name}\n")
    section = re.split("\n##+ ", section)[0]
    if name not in ("ATTENTIONS", "Attention", "PerAxis", "Places", "Rotary"):  # Values and types: their words stand below them.
        for paragraph in inspect.getdoc(getattr(jaxdl.nn, name)).split("\n\n"):
            assert paragraph in section
    assert ("\n- row " in section) != ("\n- no row: " in section)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"tests/\S+\.py", " ".join(reference.APART.values())))))
def test_what_is_compared_elsewhere_is_compared_there(path):
    names = {name for name, words in reference.APART.items() if path in words}
    source = (reference.ROOT / path).read_text(encoding="utf-8")
    assert all(re.search(rf"\b{name}\b", source, re.IGNORECASE) for name in names)


def test_every_row_has_its_differences_and_speaks_of_blocks_that_there_are():
    assert set(FOUND) == set(ROWS)
    for row in ROWS.values():
        assert row.blocks and set(row.blocks) <= set(jaxdl.nn.__all__)


def test_differences_are_small():
    for values, gradients in FOUND.values():
        assert max(reference.allowed(values), reference.allowed(gradients)) <= 1e-4


@pytest.mark.parametrize(
    ("difference", "shown", "allowed"),
    [(0.0, "0", 1e-6), (1.24e-7, "1.2e-7", 1e-6), (5.06e-7, "5.1e-7", 2.04e-6), (25.0, "2.5e1", 100)],
)
def test_a_difference_is_shown_to_two_digits_and_may_be_four_times_as_large_elsewhere(difference, shown, allowed):
    assert reference.shown(difference) == shown
    assert reference.allowed(shown) == pytest.approx(allowed)


@pytest.mark.parametrize("row", ["layer_norm", "lstm_cell", "yarn_frequencies"])
def test_some_blocks_differ_by_no_more_than_the_page_allows(row):
    within(row)


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_blocks_differ_by_no_more_than_the_page_allows(row):
    within(row)


def within(row):
    for now, found in zip(differences(ROWS[row].sides()), FOUND[row]):
        assert now <= reference.allowed(found)


def test_a_wrong_value_and_a_wrong_gradient_are_found():
    sides = ROWS["rms_norm"].sides()
    values, gradients = differences(dataclasses.replace(sides, ours=lambda x, scale: jaxdl.nn.rms_norm(x, scale, 1e-3)))
    assert values > 1e-4 and gradients > 1e-4
    # The same value, but a part of it is a constant to the gradient.
    half = lambda x, scale: jaxdl.nn.rms_norm(x, scale) / 2
    wrong = lambda x, scale: half(x, scale) + half(jax.lax.stop_gradient(x), scale)
    values, gradients = differences(dataclasses.replace(sides, ours=wrong))
    assert values < 1e-5 and gradients > 1e-2
