"""From the command line to a run: the one place that knows tyro."""

import contextlib
import dataclasses
import functools
import io
import logging
import os
import re
import shutil
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_type_hints

import jax

from jaxdl.errors import UserError, unknown
from jaxdl.files import local_path
from jaxdl.launch.cluster import Processes, join
from jaxdl.launch.config import Config, check
from jaxdl.launch.devices import check_xla_flags, find_devices
from jaxdl.launch.exits import exit_statuses, own_process
from jaxdl.launch.experiment import Experiment, run
from jaxdl.training import Execution


def launch(experiment: Experiment, arguments: Sequence[str] | None = None) -> NoReturn:
    """Parses the command line, runs the experiment and exits: 0, 2 for bad input, 1 for a failure in mid-run, 130, 143 or 129 after a signal.

    Without arguments they are the process' own, and so is all of it: streams, signals, settings of libraries.
    """
    if arguments is None:
        own_process()
    with exit_statuses():
        preset, config, workdir, execution, processes = parse(experiment, sys.argv[1:] if arguments is None else arguments)
        if arguments is None:
            check_xla_flags()
        _set_up_libraries()
        experiment.set_up(config)
        if processes.distributed:
            join(processes)
        find_devices()
        run(experiment, config, workdir, execution, preset=preset)
    raise SystemExit(0)


def parse(experiment: Experiment, arguments: Sequence[str]) -> tuple[str, Any, Path, Execution, Processes]:
    """The preset's name, the config, the working directory, the manner of execution and the other processes that the flags say. Raises `UserError`."""
    import tyro  # Here, so that who only lists experiments does not wait for it.

    config_class = experiment.config_class
    preset = _preset(experiment, arguments)
    groups: dict[str, list[dataclasses.Field]] = {}
    for owner, fields in _fields_by_owner(config_class).items():
        groups.setdefault(_group_name(experiment, owner), []).extend(fields)

    def group(name: str, fields: list[dataclasses.Field], default: Any, help_from: type) -> tuple[str, Any, Any]:
        hints, texts = get_type_hints(help_from, include_extras=True), _field_help(help_from)
        described = [
            (
                f.name,
                Annotated[hints[f.name], tyro.conf.arg(help=texts[f.name])],
                dataclasses.field(default=getattr(default, f.name)),
            )
            for f in fields
        ]
        made = dataclasses.make_dataclass(name, described, frozen=True)
        return name, made, dataclasses.field(default=made())

    names = ", ".join(experiment.presets)
    arguments_class = dataclasses.make_dataclass(
        "Arguments",
        [
            (
                "workdir",
                Annotated[str, tyro.conf.arg(metavar="DIR", help="Where the run is kept. The same command again resumes it.")],
            ),
            (
                "preset",
                Annotated[
                    str, tyro.conf.arg(metavar="NAME", help=f"Named settings, which the other flags change. One of: {names}.")
                ],
                preset,
            ),
            *(group(name, fields, experiment.presets[preset], config_class) for name, fields in groups.items()),
            group("execution", list(dataclasses.fields(Execution)), Execution(), Execution),
            group("processes", list(dataclasses.fields(Processes)), Processes(), Processes),
        ],
    )
    parsed = _parse_or_raise(
        arguments_class,
        prog=f"python -m experiments.{experiment.name}",
        description=f"{experiment.summary}\n\n{experiment.paper}\n\nBy default: {experiment.outcome}.",
        args=list(arguments),
    )
    values = {f.name: getattr(getattr(parsed, name), f.name) for name, fields in groups.items() for f in fields}
    execution = Execution(**vars(parsed.execution))
    check(execution)
    return preset, config_class(**values), local_path(parsed.workdir), execution, Processes(**vars(parsed.processes))


def _preset(experiment: Experiment, arguments: Sequence[str]) -> str:
    """The preset among the flags. It is looked for first, since it sets the other flags' defaults."""
    given = "default"
    for flag, following in zip(arguments, [*arguments[1:], ""]):
        if flag == "--preset":
            given = following
        elif flag.startswith("--preset="):
            given = flag.partition("=")[2]
    if given not in experiment.presets:
        raise unknown("preset", given, experiment.presets)
    return given


def _fields_by_owner(config_class: type) -> dict[type, list[dataclasses.Field]]:
    """The fields of a config under the class that first declares each: the groups of the help."""
    owners: dict[type, list[dataclasses.Field]] = {}
    for field in dataclasses.fields(config_class):
        owner = next(c for c in reversed(config_class.__mro__) if field.name in getattr(c, "__annotations__", {}))
        owners.setdefault(owner, []).append(field)
    return owners


def _group_name(experiment: Experiment, owner: type) -> str:
    """The experiment's own fields are together, those too that it has from another experiment."""
    return owner.__name__.lower() if owner.__module__ == Config.__module__ else experiment.name


@functools.lru_cache
def _field_help(cls: type) -> dict[str, str]:
    """The docstrings under a dataclass' fields, its bases' included."""
    import docstring_parser

    texts: dict[str, str] = {}
    for base in reversed([c for c in cls.__mro__ if dataclasses.is_dataclass(c)]):
        texts |= {p.arg_name: p.description or "" for p in docstring_parser.parse_from_object(base).params}
    return texts


def _parse_or_raise(arguments_class: type, **options: Any) -> Any:
    """tyro's parser with its boxed report of a mistake brought into one line."""
    import tyro

    report = io.StringIO()
    try:
        with contextlib.redirect_stderr(report), _wide_enough():
            return tyro.cli(arguments_class, config=(tyro.conf.OmitArgPrefixes,), **options)
    except SystemExit as ending:
        if not ending.code:
            raise
    lines = [line.strip(" │") for line in re.sub(r"\x1b\[[0-9;]*m", "", report.getvalue()).splitlines()]
    lines = [line for line in lines if line and not set(line) & set("╭╰") and not set(line) <= set("─-")]
    raise UserError(" ".join(lines))


@contextlib.contextmanager
def _wide_enough() -> Iterator[None]:
    """A terminal of a few columns counts as one of `_LEAST_COLUMNS`: tyro breaks its help into lines without end otherwise."""
    given = os.environ.get("COLUMNS")
    if shutil.get_terminal_size().columns < _LEAST_COLUMNS:
        os.environ["COLUMNS"] = str(_LEAST_COLUMNS)
    try:
        yield
    finally:
        os.environ.pop("COLUMNS", None)
        os.environ |= {} if given is None else {"COLUMNS": given}


_LEAST_COLUMNS = 60


def _set_up_libraries() -> None:
    """Keeps compiled programs between processes, so that a second start is quick, and hushes what is said better here."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jaxdl" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    # Orbax logs the traceback of every failure before it raises it, and abandoned coroutines and writers complain once more.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    report, unraisable = threading.excepthook, sys.unraisablehook
    sys.unraisablehook = lambda args: None if issubclass(args.exc_type, OSError | RuntimeError | Warning) else unraisable(args)
    threading.excepthook = lambda args: None if issubclass(args.exc_type, OSError) else report(args)
