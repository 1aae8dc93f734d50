"""`python -m experiments`, by a package of experiments that are made for it."""

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest

from experiments.__main__ import WIDTH, citations, main
from jaxdl.launch.experiment import Field

TOY = '''
import dataclasses
from jaxdl import launch
@dataclasses.dataclass(frozen=True)
class Config(launch.Config):
    """A toy."""
PRESETS = {{"default": Config(data="builtin:toys"), "large": Config(data="builtin:toys")}}
def main(config, run):
    return {{}}
EXPERIMENT = launch.Experiment(
    main, PRESETS, field={field!r}, summary={summary!r}, paper={paper!r}, minutes={minutes}, expects={expects},
)
'''
FACTS = dict(field="vision", summary="Looks at toys: all of them.", paper="Nobody et al. 2026, Toys, arXiv:2601.00001", minutes=1)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Five experiments: one that promises, one that does not, one that promises much with many words, one by several people, one that needs what is not installed."""
    folder = tmp_path / "toybox"
    folder.mkdir()
    words = "Sorts toys by their colours and by their shapes and by everything else that a toy can possibly have; then it stops."
    many = {f"the_{name}_of_all_toys_together_at_once": (0.5, None) for name in ("first", "second")}
    several = "Nobody and Someone 1999, Toys, https://doi.org/10.1000/1(2)90-E; Other 2020, More, arXiv:2002.00002"
    for name, facts in {
        "__init__": None, "_inside": None,
        "dolls": dict(expects={"accuracy": (0.97, None)}), "cars": dict(expects={}, minutes=12),
        "sorter": dict(expects=many, summary=words), "agent": dict(expects={}, field="agents", paper=several),
    }.items():  # fmt: skip
        (folder / f"{name}.py").write_text("" if facts is None else TOY.format(**FACTS | facts))
    (folder / "needy.py").write_text("import no_such_toy\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.startswith("toybox")]:
        monkeypatch.delitem(sys.modules, name)
    return importlib.import_module("toybox")


def test_each_has_a_line_under_its_field(package, capsys):
    main([], package)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= WIDTH
    groups, group = {}, None
    for line in lines[2:]:
        if line and not line.startswith(" "):
            group = groups.setdefault(line, [])
        elif line:
            group.append(line.split(maxsplit=1))
    assert {field: [name for name, _ in group] for field, group in groups.items()} == {
        "vision": ["cars", "dolls", "sorter"], "agents": ["agent"], "cannot be imported here": ["needy"],
    }  # fmt: skip
    assert list(groups)[:2] == [field for field in get_args(Field) if field in groups]
    cars, dolls, sorter = (text for _, text in groups["vision"])
    assert cars.startswith("Looks at toys  ") and cars.endswith("  about 12 minutes")
    assert dolls.startswith("Looks at toys  ") and dolls.endswith("  accuracy ≥ 0.97")
    assert sorter.startswith("Sorts toys by their") and "…  " in sorter
    assert sorter.endswith(" the_first_of_all_toys_together_at_once ≥ 0.5, …")
    assert "no_such_toy" in groups["cannot be imported here"][0][1]


def test_those_that_are_named_say_all(package, capsys):
    main(["dolls", "agent"], package)
    dolls, agent = capsys.readouterr().out.strip().split("\n\n")
    assert [" ".join(line.split()) for line in dolls.splitlines()] == [
        "dolls (vision)",
        "Looks at toys: all of them.",
        "Nobody et al. 2026, Toys, arXiv:2601.00001",
        "by default: builtin:toys; accuracy ≥ 0.97, about a minute on two cores",
        "presets: default, large",
    ]
    assert agent.startswith("agent (agents)") and max(map(len, agent.splitlines())) <= WIDTH


def test_a_name_that_is_none_ends_with_a_line_that_suggests_one(package, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["dolls", "car"], package)
    (said,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert said.startswith(
        "error: there is no experiment 'car': did you mean 'cars'? choose one of agent, cars, dolls, needy, sorter"
    )


def test_the_table_links_every_paper(package, capsys):
    main(["--table", "dolls", "agent"], package)
    assert capsys.readouterr().out.splitlines() == [
        "| experiment | paper | what it does | reaches by default | minutes |",
        "| --- | --- | --- | --- | --- |",
        "| `dolls` | [Nobody et al. 2026](https://arxiv.org/abs/2601.00001) | Looks at toys: all of them | accuracy ≥ 0.97 | 1 |",
        "| `agent` | [Nobody and Someone 1999](https://doi.org/10.1000/1(2)90-E), [Other 2020](https://arxiv.org/abs/2002.00002) "
        "| Looks at toys: all of them | – | 1 |",
    ]


@pytest.mark.parametrize(
    "paper", ["Nobody et al. 2026, Toys", "Toys, arXiv:2601.00001", "Nobody 2026, arXiv:2601.00001; Other 2020, More"]
)
def test_a_paper_without_year_or_link_is_no_row(paper):
    with pytest.raises(ValueError, match="give authors, year, title, and at the end"):
        citations(paper)


def test_a_paper_may_have_its_link_in_parentheses():
    assert citations("Vaswani et al. 2017, Attention Is All You Need (arXiv:1706.03762)") == [
        ("Vaswani et al. 2017", "https://arxiv.org/abs/1706.03762")
    ]


def test_listing_draws_nothing_and_learns_nothing():
    """What takes long to import is imported where it is used."""
    slow = (
        "matplotlib",
        "torch",
        "sklearn",
        "scipy.stats",
        "sacrebleu",
        "tensorboardX",
        "tensorflow",
        "transformers",
    )
    code = f"import sys; from experiments.__main__ import main; main([]); print([name for name in {slow} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done
