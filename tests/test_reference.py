"""The reference page says what the docstrings say and what a comparison finds, and the comparison can find something."""

import dataclasses

import jax
import pytest

torch = pytest.importorskip("torch")


import jaxdl.nn
from benchmarks import reference
from benchmarks.counterparts import ROWS, differences

PAGE = reference.PAGE.read_text(encoding="utf-8")
BOUNDS = reference.bounds_of(PAGE)


def test_the_page_is_what_the_docstrings_say_now():
    assert PAGE == reference.page(BOUNDS), "run `python -m benchmarks.reference`"


@pytest.mark.parametrize("name", jaxdl.nn.__all__)
def test_every_public_name_is_on_the_page_with_what_its_docstring_begins_with(name):
    _, _, section = PAGE.partition(f"\n### {name}\n")
    assert section
    docstring = getattr(getattr(jaxdl.nn, name), "__doc__", "")
    if name not in ("ATTENTIONS", "Attention", "Rotary"):  # Values and types: their words stand below them.
        assert docstring.strip().split("\n")[0] in section.split("\n### ")[0]


def test_every_row_has_its_bounds_and_speaks_of_blocks_that_there_are():
    assert set(BOUNDS) == set(ROWS)
    for row in ROWS.values():
        assert row.blocks and set(row.blocks) <= set(jaxdl.nn.__all__)


def test_bounds_are_small():
    for values, gradients in BOUNDS.values():
        assert max(reference.number(values), reference.number(gradients)) <= 1e-4


@pytest.mark.parametrize(("difference", "bound"), [(0.0, "≤ 1e-6"), (3e-7, "≤ 1e-6"), (5.1e-7, "≤ 1e-5"), (2.0, "≤ 1e1")])
def test_a_bound_is_the_least_power_of_ten_that_is_twice_the_difference_from_1e_6_on(difference, bound):
    assert reference.bound(difference) == bound
    assert reference.number(bound) >= 2 * difference


@pytest.mark.parametrize("row", ["layer_norm", "lstm_cell", "yarn_frequencies"])
def test_some_blocks_differ_by_no_more_than_the_page_says(row):
    within(row)


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_blocks_differ_by_no_more_than_the_page_says(row):
    within(row)


def within(row):
    for found, bound in zip(differences(ROWS[row].sides()), BOUNDS[row]):
        assert found <= reference.number(bound)


def test_a_wrong_value_and_a_wrong_gradient_are_found():
    sides = ROWS["rms_norm"].sides()
    values, gradients = differences(dataclasses.replace(sides, ours=lambda x, scale: jaxdl.nn.rms_norm(x, scale, 1e-3)))
    assert values > 1e-4 and gradients > 1e-4
    # The same value, but a part of it is a constant to the gradient.
    half = lambda x, scale: jaxdl.nn.rms_norm(x, scale) / 2
    wrong = lambda x, scale: half(x, scale) + half(jax.lax.stop_gradient(x), scale)
    values, gradients = differences(dataclasses.replace(sides, ours=wrong))
    assert values < 1e-5 and gradients > 1e-2
