"""The docstrings of the standard library, and what they describe."""

import ast
import importlib
import inspect

from jaxdl.data import TEXT_PAIRS, code


def test_docstrings_are_those_that_python_finds():
    train, test = TEXT_PAIRS.open("builtin:docstrings")
    pairs = {pair.title: pair for part in (train, test) for pair in part}
    for module, name in (
        ("json.decoder", "JSONDecoder.decode"),
        ("textwrap", "dedent"),
        ("statistics", "fmean"),
        ("bisect", "insort_right"),
    ):
        function = importlib.import_module(module)
        if module == "bisect":  # The module has C's functions of these names.
            assert "bisect.insort_right" in pairs
            continue
        for part in name.split("."):
            function = getattr(function, part)
        pair = pairs[f"{module}.{name}"]
        assert pair.query == inspect.getdoc(function)
        assert pair.document.splitlines()[-1].strip() == inspect.getsource(function).splitlines()[-1].strip()


def test_bodies_are_python_without_the_docstring():
    train, test = TEXT_PAIRS.open("builtin:docstrings")
    for pair in [*train][::20] + [*test][::10]:
        body = ast.parse("async def f():\n" + "\n".join(f" {line}" for line in pair.document.splitlines()))
        assert body.body[0].body and pair.query.strip() and pair.query not in pair.document


def test_modules_are_on_one_side_and_no_docstring_on_both():
    train, test = TEXT_PAIRS.open("builtin:docstrings")
    assert len(train) > 3000 and len(test) > 200
    top = [{pair.title.split(".")[0] for pair in part} for part in (train, test)]
    assert not top[0] & top[1] and len(top[1]) > 8
    assert not {pair.query for pair in train} & {pair.query for pair in test}
    assert test.info.left_out < len(test)


def test_a_form_feed_ends_no_line(tmp_path):
    """As it does for `str.splitlines`: bodies would be those of other lines."""
    (tmp_path / "old.py").write_text('a = "\u2028"\n\x0c\ndef f():\n    """What it is."""\n    return 1\n')
    assert [pair.document for pair in code._pairs(tmp_path / "old.py", "old")] == ["return 1"]
