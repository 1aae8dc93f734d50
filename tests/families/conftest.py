"""Each contract is a test of every family that has what it speaks of: `needs` names fields of a `Family`."""

import pytest
from family import Family

from families import FAMILIES


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "family" not in metafunc.fixturenames:
        return
    needs = [name for mark in metafunc.definition.iter_markers("needs") for name in mark.args]

    def has(family: Family, need: str) -> bool:
        part, _, field = need.partition(".")
        value = getattr(family, part)
        return bool(value) and (not field or value.has(field))

    chosen = {name: family for name, family in FAMILIES.items() if all(has(family, need) for need in needs)}
    # One worker has all of a family: what is compiled for one test is there for the next.
    cases = [pytest.param(family, id=name, marks=pytest.mark.xdist_group(name)) for name, family in chosen.items()]
    metafunc.parametrize("family", cases, scope="module")
