"""`python -m experiments`: what there is to run."""

import argparse
import importlib
import pkgutil
import re
import textwrap
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import get_args

import experiments
from jaxdl.errors import unknown
from jaxdl.launch import Experiment
from jaxdl.launch.exits import exit_statuses, own_process
from jaxdl.launch.experiment import Field

WIDTH = 110
"""Columns of what is printed."""


def main(arguments: Sequence[str] | None = None, package: ModuleType = experiments) -> None:
    """Prints a line for each experiment of a package, or all that is known of those that are named, or README's table. Ends with status 2 for a name that is none."""
    if arguments is None:
        own_process()
    parser = argparse.ArgumentParser(
        "python -m experiments", description="What there is to run: python -m experiments.NAME --workdir DIR."
    )
    parser.add_argument("name", nargs="*", help="Say more about these.")
    parser.add_argument("--table", action="store_true", help="Print the table of the README, in Markdown.")
    options = parser.parse_args(arguments)
    names = sorted(info.name for info in pkgutil.iter_modules(package.__path__) if not info.name.startswith("_"))
    with exit_statuses():
        for name in options.name:
            if name not in names:
                raise unknown("experiment", name, names)
        if options.table:
            print(table(load(package, name) for name in options.name or names))
        elif options.name:
            print("\n\n".join(description(load(package, name)) for name in options.name))
        else:
            print(listing(package, names))


def load(package: ModuleType, name: str) -> Experiment:
    """An experiment of a package by the name of its file."""
    return importlib.import_module(f"{package.__name__}.{name}").EXPERIMENT


def by_field(found: Iterable[Experiment]) -> dict[str, list[Experiment]]:
    """Experiments in the order of `Field`, within a field by name."""
    found = sorted(found, key=lambda experiment: experiment.name)
    groups = {field: [each for each in found if each.field == field] for field in get_args(Field)}
    return {field: group for field, group in groups.items() if group}


def listing(package: ModuleType, names: Sequence[str]) -> str:
    """A line for each, by field; what cannot be imported here comes last, with the reason."""
    found, broken = [], {}
    for name in names:
        try:
            found.append(load(package, name))
        except Exception as error:  # One that lacks a package must not hide the others.
            broken[name] = " ".join(f"{type(error).__name__}: {error}".split())
    column = 4 + max(map(len, names), default=0)
    lines = [
        "Run one with `python -m experiments.NAME --workdir DIR`; `--help` explains its flags,",
        "and `python -m experiments NAME ...` says more about it.",
    ]
    for field, group in by_field(found).items():
        lines += ["", field, *(_line(each, column) for each in group)]
    if broken:
        failures = (f"  {name}".ljust(column) + reason for name, reason in broken.items())
        lines += ["", "cannot be imported here", *(_cut(line, WIDTH) for line in failures)]
    return "\n".join(lines)


def _line(experiment: Experiment, column: int) -> str:
    """Name, first clause of the summary, and what the default run reaches, or how long it takes where nothing is promised."""
    first, *more = experiment.promise.split(", ") if experiment.promise else [experiment.duration]
    outcome = f"{first}, …" if more else first
    clause = re.split(r"[:;.](?:\s|$)", experiment.summary)[0]
    room = WIDTH - column - len(outcome) - 2
    return f"  {experiment.name}".ljust(column) + _cut(clause, room).ljust(room) + "  " + outcome


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1].rpartition(" ")[0] + "…"


def description(experiment: Experiment) -> str:
    """The long form."""
    facts = (
        experiment.summary,
        experiment.paper,
        f"by default: {experiment.presets['default'].data}; {experiment.outcome}",
        f"presets: {', '.join(experiment.presets)}",
    )
    wrapped = (textwrap.fill(fact, WIDTH, initial_indent="    ", subsequent_indent="        ") for fact in facts)
    return "\n".join([f"{experiment.name} ({experiment.field})", *wrapped])


def table(found: Iterable[Experiment]) -> str:
    """A row of Markdown for each: name, paper, what it does, what the default run reaches, and its minutes on two cores."""
    rows = [("experiment", "paper", "what it does", "reaches by default", "minutes"), ("---",) * 5]
    for experiment in (each for group in by_field(found).values() for each in group):
        rows.append(
            (
                f"`{experiment.name}`",
                ", ".join(f"[{citation}]({link})" for citation, link in citations(experiment.paper)),
                experiment.summary.removesuffix("."),
                experiment.promise or "–",
                f"{experiment.minutes:g}",
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def citations(paper: str) -> list[tuple[str, str]]:
    """Authors and year, and the link, of each of the papers that a semicolon parts. Raises `ValueError` for one that does not begin with authors and a year, or does not end with a link or `arXiv:NUMBER`."""
    found = []
    for part in paper.split("; "):
        match = re.fullmatch(r"(?P<citation>.*?\b\d{4}\b).*?(?:\barXiv:(?P<number>[\w.\-/]+?)|(?P<link>https?://\S+?))\)?", part)
        if match is None:
            raise ValueError(f"{part!r}: give authors, year, title, and at the end https://… or arXiv:NUMBER")
        found.append((match["citation"], match["link"] or f"https://arxiv.org/abs/{match['number']}"))
    return found


if __name__ == "__main__":
    main()
