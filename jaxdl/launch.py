"""From the command line to a run: the one place that knows tyro, exit statuses and the set-up of jax.

An experiment is a config class, named presets of it, and a `main(config, workdir, execution)`. `launch(EXPERIMENT)` gives it its command line; `main` does the same from Python.
"""

import contextlib
import ctypes
import dataclasses
import errno
import functools
import io
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal, NoReturn, get_type_hints

import docstring_parser
import jax
import optax
import tyro
from annotated_types import Ge, Gt, Lt

from jaxdl.errors import RunError, UserError, unknown
from jaxdl.training import Execution, Interrupted

BAD_INPUT, FAILURE = 2, 1

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
"""Of glibc's malloc.h."""


@dataclasses.dataclass(frozen=True)
class Data:
    """What is learned from."""

    data: str = "builtin:scenes"
    """What to train on: builtin:NAME, tfds:NAME[/CONFIG][:VERSION] or folder:PATH."""
    eval_data: str = ""
    """What to measure on, in the same form. Empty: the held-out part of --data."""
    data_dir: str = ""
    """Where TFDS' prepared data sets lie. Empty: its own default."""


@dataclasses.dataclass(frozen=True)
class Training:
    """How it is learned."""

    steps: Annotated[int, Ge(1)] = 1000
    """Updates of the parameters."""
    batch_size: Annotated[int, Ge(1)] = 128
    """Examples in each update, over all devices."""
    learning_rate: Annotated[float, Gt(0)] = 1e-3
    """Peak of the schedule: linear warm-up, then a cosine to zero."""
    warmup: Annotated[float, Ge(0), Lt(1)] = 0.1
    """Share of the steps in which the learning rate rises."""
    weight_decay: Annotated[float, Ge(0)] = 1e-4
    """Decoupled from the gradient, multiplied by the learning rate."""
    clip: Annotated[float, Gt(0)] = 1.0
    """Longest norm of the gradient; a longer one is scaled down."""
    accumulate: Annotated[int, Ge(1)] = 1
    """Parts that a batch is cut into, one after the other, to save memory."""
    ema_decay: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Keep an average of the parameters, `ema ← decay · ema + (1 − decay) · parameters`, and measure that. 0: none is kept."""
    precision: Literal["f32", "bf16"] = "f32"
    """What activations are computed in. Parameters and reductions are in f32 in any case."""
    seed: Annotated[int, Ge(0)] = 0
    """All chance comes from it: the same seed gives the same bits on the same machine."""
    evaluate_every: Annotated[int, Ge(1)] = 200
    """Steps between two evaluations."""

    def __post_init__(self) -> None:
        if self.batch_size % self.accumulate:
            raise UserError(
                f"a batch of {self.batch_size} cannot be cut into {self.accumulate} equal parts: choose --accumulate so that it divides --batch-size"
            )

    def schedule(self) -> optax.Schedule:
        """The learning rate of each step."""
        return optax.warmup_cosine_decay_schedule(0, self.learning_rate, int(self.warmup * self.steps), self.steps)


@dataclasses.dataclass(frozen=True)
class Config(Training, Data):
    """What is computed. A run's result depends on these fields and on nothing else; experiments add theirs in a subclass.

    Every field has a type that is checked, at construction too, and a docstring, which is its help text.
    """

    preset: str = "default"
    """Named settings, which the other flags change."""

    def __post_init__(self) -> None:
        check(self)
        super().__post_init__()


@dataclasses.dataclass(frozen=True)
class Processes:
    """How the processes of one run find each other; each is started with the same flags."""

    distributed: bool = False
    """Join the other processes of this run. Under SLURM, Open MPI, Kubernetes and on TPU pods jax finds them; elsewhere say where they are."""
    coordinator: str = ""
    """HOST:PORT at which the first process can be reached."""
    num_processes: Annotated[int, Ge(0)] = 0
    """How many processes there are. 0: as jax detects."""
    process_id: Annotated[int, Ge(-1)] = -1
    """Which of them this one is, from 0. -1: as jax detects."""
    patience: Annotated[int, Ge(1)] = 60
    """Seconds to wait for processes that do not answer, at the start and later."""

    def __post_init__(self) -> None:
        check(self)
        stated = (bool(self.coordinator), self.num_processes > 0, self.process_id >= 0)
        if any(stated) and not self.distributed:
            raise UserError("--coordinator, --num-processes and --process-id are for --distributed runs: give that flag too")
        if any(stated) and not all(stated):
            raise UserError(
                "--coordinator, --num-processes and --process-id belong together: give all three, or none where jax detects them"
            )
        if all(stated) and self.process_id >= self.num_processes:
            raise UserError(f"--process-id {self.process_id} of --num-processes {self.num_processes}: they are numbered from 0")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What `python -m experiments` lists, and what `launch` runs. The preset `default` must be among the presets."""

    name: str
    summary: str
    paper: str
    result: str
    minutes: float
    presets: Mapping[str, Config]
    main: Callable[[Any, Path, Execution], dict[str, Any]]

    @property
    def config_class(self) -> type[Config]:
        return type(self.presets["default"])

    def set_up(self, config: Any) -> None:
        """What a CPU computes faster with. Called before jax computes anything."""
        keep_freed_memory()
        take_wide_vectors()


def launch(experiment: Experiment, arguments: Sequence[str] | None = None) -> NoReturn:
    """Parses the command line, runs the experiment and exits: 0, 2 for bad input, 1 for a failure in mid-run, 130 or 143 after a signal."""
    with _exit_statuses():
        config, workdir, execution, processes = parse(experiment, sys.argv[1:] if arguments is None else arguments)
        _set_up_libraries()
        experiment.set_up(config)
        if processes.distributed:
            _join(processes)
        experiment.main(config, workdir, execution)
    raise SystemExit(0)


def parse(experiment: Experiment, arguments: Sequence[str]) -> tuple[Config, Path, Execution, Processes]:
    """The config, the working directory, the manner of execution and the other processes that the flags say. Raises `UserError`."""
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
                Annotated[Path, tyro.conf.arg(metavar="DIR", help="Where the run is kept. The same command again resumes it.")],
            ),
            (
                "preset",
                Annotated[str, tyro.conf.arg(metavar="NAME", help=f"{_field_help(config_class)['preset']} One of: {names}.")],
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
        description=f"{experiment.summary}\n\n{experiment.paper}\n\nBy default: {experiment.result}, in about {experiment.minutes:g} minutes on two cores.",
        args=list(arguments),
    )
    values = {f.name: getattr(getattr(parsed, name), f.name) for name, fields in groups.items() for f in fields}
    execution = Execution(**vars(parsed.execution))
    check(execution)
    return config_class(preset=preset, **values), parsed.workdir, execution, Processes(**vars(parsed.processes))


def check(settings: Any) -> None:
    """Holds each field of a dataclass against its annotation; raises `UserError` for the first that does not fit."""
    for field in dataclasses.fields(settings):
        _check_value(field.name, getattr(settings, field.name), get_type_hints(type(settings), include_extras=True)[field.name])


def _check_value(name: str, value: Any, hint: Any) -> None:
    import pydantic  # Here, so that help does not wait for it.

    adapter = pydantic.TypeAdapter(hint, config=pydantic.ConfigDict(allow_inf_nan=False))
    try:
        adapter.validate_python(value, strict=True)
    except pydantic.ValidationError as error:
        raise UserError(f"--{name.replace('_', '-')} {value!r}: {error.errors()[0]['msg'].replace('Input', 'it')}") from None


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


def _fields_by_owner(config_class: type[Config]) -> dict[type, list[dataclasses.Field]]:
    """The fields of a config under the class that first declares each: the groups of the help. `preset` has its own place."""
    owners: dict[type, list[dataclasses.Field]] = {}
    for field in dataclasses.fields(config_class):
        if field.name != "preset":
            owner = next(c for c in reversed(config_class.__mro__) if field.name in getattr(c, "__annotations__", {}))
            owners.setdefault(owner, []).append(field)
    return owners


def _group_name(experiment: Experiment, owner: type) -> str:
    """The experiment's own fields are together, those too that it has from another experiment."""
    return owner.__name__.lower() if owner.__module__ == __name__ else experiment.name


@functools.lru_cache
def _field_help(cls: type) -> dict[str, str]:
    """The docstrings under a dataclass' fields, its bases' included."""
    texts: dict[str, str] = {}
    for base in reversed([c for c in cls.__mro__ if dataclasses.is_dataclass(c)]):
        texts |= {p.arg_name: p.description or "" for p in docstring_parser.parse_from_object(base).params}
    return texts


def _parse_or_raise(arguments_class: type, **options: Any) -> Any:
    """tyro's parser with its boxed report of a mistake brought into one line."""
    report = io.StringIO()
    try:
        with contextlib.redirect_stderr(report):
            return tyro.cli(arguments_class, config=(tyro.conf.OmitArgPrefixes,), **options)
    except SystemExit as ending:
        if not ending.code:
            raise
    lines = [line.strip(" │") for line in re.sub(r"\x1b\[[0-9;]*m", "", report.getvalue()).splitlines()]
    lines = [line for line in lines if line and not set(line) & set("╭╰") and set(line) != {"─"}]
    raise UserError(" ".join(lines))


def _set_up_libraries() -> None:
    """Keeps compiled programs between processes, so that a second start is quick, and hushes what is said better here."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jaxdl" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    # Orbax logs the traceback of every failure before it raises it, and abandoned coroutines and writers complain once more.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda unraisable: None
    report = threading.excepthook
    threading.excepthook = lambda args: None if issubclass(args.exc_type, OSError) else report(args)


def _join(processes: Processes) -> None:
    """Makes this one of several processes. Raises `UserError` if jax does not find out where the others are; ends with a line if they do not come in time."""
    where = (
        f"at {processes.coordinator}, as process {processes.process_id} of {processes.num_processes}"
        if processes.coordinator
        else "where jax detected them"
    )
    # jax ends the process with a stack trace of C++ when time is up, so it is given more of it than the others have.
    timer = threading.Timer(
        processes.patience,
        _end_at_once,
        [
            f"error: waited {processes.patience} s for the other processes {where}, and not all came: start each with the same flags but for --process-id, "
            "and see that this machine reaches that address (--patience waits longer)",
            BAD_INPUT,
        ],
    )
    stated = dict(
        coordinator_address=processes.coordinator, num_processes=processes.num_processes, process_id=processes.process_id
    )
    timer.start()
    # An error in the thread that calls would end the process by SIGABRT when another one is gone.
    jax.config.update("jax_cpu_enable_async_dispatch", True)
    try:
        jax.distributed.initialize(
            **stated if processes.coordinator else {},
            initialization_timeout=processes.patience + 60,
            heartbeat_timeout_seconds=processes.patience,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"jax does not find the other processes here ({error}): give --coordinator, --num-processes and --process-id"
        ) from None
    finally:
        timer.cancel()


def keep_freed_memory() -> None:
    """Tells glibc's malloc to keep what is freed; does nothing where there is another C library. To be called before jax computes anything.

    On a CPU, XLA takes its buffers from malloc in every step. By default large ones go back to the system at once, and come again page by page, each page cleared: on two cores the default GPT made 8 steps a second that way, and makes 12 so. Programs then run in the thread that calls them, which is jax's synchronous dispatch, as the heaps that malloc gives to other threads have no room for large buffers.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 2**26)):
            mallopt(parameter, value)
        jax.config.update("jax_cpu_enable_async_dispatch", False)


def take_wide_vectors() -> None:
    """Tells XLA to compute with vectors of 512 bits where the CPU has them. To be called before jax computes anything; whatever `XLA_FLAGS` says about it already stands.

    By default it takes 256, as early processors with AVX-512 slow down their clock for more. On an AMD EPYC an activation takes half the time with 512.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_cpu_prefer_vector_width" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_prefer_vector_width=512".strip()


@contextlib.contextmanager
def _exit_statuses() -> Iterator[None]:
    """One clear line on stderr and a status for every way to end."""

    def terminate(number: int, frame: FrameType | None) -> NoReturn:
        raise Interrupted(
            f"{signal.Signals(number).name}: stopped; what was saved stands, and the same command goes on from there", number
        )

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except UserError as error:
        _end(f"error: {error}", BAD_INPUT)
    except RunError as error:
        _end(f"error: {error}", FAILURE)
    except Interrupted as interrupted:
        _end(str(interrupted), 128 + interrupted.signal_number)
    except KeyboardInterrupt:
        _end("interrupted; what was saved stands, and the same command goes on from there", 128 + signal.SIGINT)
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        _end(
            f"error: another process of this run ended or cannot be reached ({str(error).splitlines()[0][:200]}); "
            "the last whole checkpoint stands: look at the other processes' messages, then start all of them again with the same command",
            FAILURE,
        )
    except Exception as error:
        if not _disk_is_full(error):
            raise
        _end(
            "error: no space is left on the disk; the last whole checkpoint stands: free some space, then give the same command",
            FAILURE,
        )


def _end(line: str, status: int) -> NoReturn:
    """Ends the process. One of several does not wait for the others: they may wait for it, and learn at once that it is gone."""
    if jax.distributed.is_initialized():
        _end_at_once(line, status)
    print(" ".join(line.split()), file=sys.stderr)
    raise SystemExit(status)


def _end_at_once(line: str, status: int) -> NoReturn:
    print(" ".join(line.split()), file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(status)


def _disk_is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, is ENOSPC; TensorStore says so in words only."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
