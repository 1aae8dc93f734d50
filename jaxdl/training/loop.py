"""The loop. It knows no model: it moves batches through a step, and keeps what must not be lost."""

import contextlib
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from tqdm import tqdm

from jaxdl.errors import RunError, UserError
from jaxdl.training.cost import Cost, compile_step
from jaxdl.training.inside import Look, distribute_look
from jaxdl.training.inside import look as look_into
from jaxdl.training.parallel import distribute
from jaxdl.training.processes import agree, is_first
from jaxdl.training.run import Run
from jaxdl.training.state import TrainState, parameter_paths, parameter_table
from jaxdl.training.step import GRADIENT_NORMS, GradientStep, Metrics, Step

Evaluate = Callable[[TrainState], dict[str, float]]

_PROFILED_STEPS = range(10, 20)
"""Counted from the first step of this process, so that compilation is not in the trace."""


@runtime_checkable
class Batches(Protocol):
    """An endless iterator of dicts of numpy arrays that knows where it is (a grain `DatasetIterator` is one)."""

    def __next__(self) -> dict[str, np.ndarray]: ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


class Interrupted(KeyboardInterrupt):
    """A signal ended the run after everything was saved."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.signal_number = signal_number


def fit(
    step: Step,
    state: TrainState,
    batches: Batches,
    run: Run,
    *,
    steps: int,
    evaluate: Evaluate | None = None,
    evaluate_every: int | None = None,
    look: Look | None = None,
) -> TrainState:
    """Trains from where the run stopped, or from `state`, to `steps` steps, and leaves a checkpoint there.

    State and batches lie as the run's layout says; each process is given its own rows of every batch. `evaluate` is called every `evaluate_every` steps before the last one; its metrics are logged under `eval/`. `look` sees, if the run asks for it, the first step and every `inspect_every`-th before it is made; the training's bits are the same without. It has to be given for steps that `make_step` has not made. A signal to stop (Ctrl-C, SIGTERM) is answered after the step at hand, or, where there are several processes, at the next row of the log, when they agree on it: everything is saved and `Interrupted` raised. Raises `RunError` at a loss or gradient that is not finite; no checkpoint is written after one, and `UserError` if the run asks for looks and there is no `look`.
    """
    layout, every = run.layout, run.execution.inspect_every
    if look is None and isinstance(step, GradientStep):
        look = look_into(step)
    if every and look is None:
        raise UserError(
            f"--inspect-every {every}: {run.experiment} does not say how to look inside of its steps; leave the flag out"
        )
    state = layout.place_state(state)
    restored = run.checkpoints.restore(state, run.say)
    if restored is not None:
        state, position, run.seconds_before = restored
        batches.set_state(position)
    first = int(state.step)
    run.start_logging(first)
    if first:
        run.say(f"resuming at step {first:,} of {steps:,}")
    else:
        run.say(f"parameters:\n{parameter_table(state.params)}")

    execution = run.execution
    saved_at = time.monotonic()
    with _stop_requests() as stop, _profile(run) as profile, _progress(first, steps) as bar:
        for number in range(first + 1, steps + 1):
            profile(number - first)
            batch = layout.place_batch(next(batches))
            if number == first + 1:
                compiled, cost = compile_step(distribute(step, state, layout), state, batch)
                run.say(str(cost))
                pending = _Pending(run, state, layout.rows(batch), cost)
                look_inside = distribute_look(look, state, layout) if every else None
            if look_inside and (number == 1 or number % every == 0):
                run.log_inside(number, look_inside(state, batch).row())
            state, metrics = compiled(state, batch)
            pending.add(number, metrics, bar)
            if number == first + 1:
                jax.block_until_ready(state.step)
                seconds = run.seconds - run.seconds_before
                run.say(f"first step after {seconds:.1f} s, {cost.seconds_to_compile:.1f} s of it to compile")
                run.log(number, {"seconds_to_first_step": seconds})
            save = number == steps or number % execution.checkpoint_every == 0
            due, stopped = (time.monotonic() - saved_at) / 60 > execution.checkpoint_minutes, bool(stop)
            if jax.process_count() > 1:
                due, stopped = agree(due, stopped) if number % execution.log_every == 0 else (False, False)
            if save or due or stopped:
                pending.flush(bar)
                run.checkpoints.save(state, batches.get_state(), run.seconds)
                saved_at = time.monotonic()
            if stopped and number < steps:
                sent = stop[0] if stop else signal.SIGTERM
                run.checkpoints.wait()
                name = signal.Signals(sent).name
                raise Interrupted(f"{name}: saved at step {number:,} of {steps:,}; the same command goes on from there", sent)
            if evaluate and evaluate_every and number % evaluate_every == 0 and number < steps:
                pending.flush(bar)
                scores = evaluate(state)
                run.log(number, {f"eval/{name}": value for name, value in scores.items()})
                run.say(f"step {number:,}: " + ", ".join(f"{name} {value:.3f}" for name, value in scores.items()))
    return state


class _Pending:
    """Metrics that are still on the device. They come over in one transfer every few steps, when the device has later steps to do."""

    def __init__(self, run: Run, state: TrainState, examples: int, cost: Cost):
        self.run, self.examples, self.cost = run, examples, cost
        self.every = run.execution.log_every
        self.paths = parameter_paths(state.params)
        self.rows: list[tuple[int, Metrics]] = []
        self.since = time.perf_counter()

    def add(self, number: int, metrics: Metrics, bar: tqdm) -> None:
        bar.update()
        self.rows.append((number, metrics))
        if self.every == 1 or number % self.every == 1:  # The window before is full, and the device is busy with this step.
            self.flush(bar, leave=0 if self.every == 1 else 1)

    def flush(self, bar: tqdm, leave: int = 0) -> None:
        """Fetches, checks and logs all rows but the last `leave`; what is logged is their mean."""
        cut = len(self.rows) - leave
        rows, self.rows = self.rows[:cut], self.rows[cut:]
        if not rows:
            return
        fetched = jax.device_get([metrics for _, metrics in rows])
        for (number, _), metrics in zip(rows, fetched):
            self._check(number, metrics)
        means = {name: float(np.mean([row[name] for row in fetched])) for name in fetched[0] if name != GRADIENT_NORMS}
        now = time.perf_counter()
        seconds, self.since = now - self.since, now
        means["steps_per_second"] = len(rows) / seconds
        means["examples_per_second"] = self.examples * means["steps_per_second"]
        utilization = self.cost.utilization(means["steps_per_second"])
        if utilization is not None:
            means["model_flop_utilization"] = utilization
        self.run.log(rows[-1][0], means)
        bar.set_postfix({"loss": f"{means['loss']:.4g}", "examples/s": f"{means['examples_per_second']:.0f}"}, refresh=False)

    def _check(self, number: int, metrics: dict[str, np.ndarray]) -> None:
        norms = metrics.get(GRADIENT_NORMS, np.zeros(0))
        scalars = {name: float(value) for name, value in metrics.items() if name != GRADIENT_NORMS}
        wrong = [name for name, value in scalars.items() if not math.isfinite(value)]
        parameters = [path for path, norm in zip(self.paths, norms) if not math.isfinite(norm)]
        if not wrong and not parameters:
            return
        named = ", ".join(parameters[:5]) + (f" and {len(parameters) - 5} more" if len(parameters) > 5 else "")
        gradients = f"; the gradients of {named} are not finite" if parameters else ""
        stands = self.run.checkpoints.latest()
        kept = "there is no checkpoint before it" if stands is None else f"the checkpoint of step {stands:,} stands"
        raise RunError(
            f"at step {number:,} {', '.join(wrong) or 'a gradient'} is not finite{gradients}; {kept}: "
            "try a lower --learning-rate, a longer --warmup or clipping"
        )


@contextlib.contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """A list that receives the first signal to stop; a second one is answered at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, before[number])
        tqdm.write("stopping after this step; once more to stop at once", file=sys.stderr)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _profile(run: Run) -> Iterator[Callable[[int], None]]:
    """A function to be told the number of each step, which traces some of them if the run asks for it."""
    tracing = False

    def at(number: int) -> None:
        nonlocal tracing
        if run.execution.profile and number == _PROFILED_STEPS.start:
            jax.profiler.start_trace(str(run.directory / "profile"))
            tracing = True
        elif tracing and number == _PROFILED_STEPS.stop:
            end()

    def end() -> None:
        nonlocal tracing
        jax.profiler.stop_trace()
        tracing = False
        run.say(f"a trace is in {run.directory / 'profile'}")

    try:
        yield at
    finally:
        if tracing:
            end()


def _progress(first: int, steps: int) -> tqdm:
    """Step, loss, steps and examples a second, and the time that is left; nothing where nobody watches."""
    return tqdm(
        initial=first, total=steps, unit="step", dynamic_ncols=True, disable=not (is_first() and sys.stderr.isatty()), leave=False
    )
