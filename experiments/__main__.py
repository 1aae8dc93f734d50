"""`python -m experiments`: what there is to run."""

import importlib
import pkgutil
import textwrap

import experiments


def main() -> None:
    """Prints each experiment with its facts."""
    names = sorted(info.name for info in pkgutil.iter_modules(experiments.__path__) if not info.name.startswith("_"))
    print("Run one with `python -m experiments.NAME --workdir DIR`; `--help` explains its flags.\n")
    for name in names:
        experiment = importlib.import_module(f"experiments.{name}").EXPERIMENT
        facts = (
            experiment.summary,
            experiment.paper,
            f"by default: {experiment.presets['default'].data}; {experiment.result}; about {experiment.minutes:g} minutes on two cores",
            f"presets: {', '.join(experiment.presets)}",
        )
        print(experiment.name)
        for fact in facts:
            print(textwrap.fill(fact, 110, initial_indent="    ", subsequent_indent="        "))


if __name__ == "__main__":
    main()
