"""The loop. It knows no model: it moves batches through a step, and keeps what must not be lost."""

import contextlib
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Key, PyTree
from tqdm import tqdm

from jaxdl import signals
from jaxdl.errors import RunError, UserError
from jaxdl.signals import Interrupted
from jaxdl.training.cost import Cost, compile_step
from jaxdl.training.inspection import Inspect, distribute_inspection, inspect_step
from jaxdl.training.logging import read_metrics
from jaxdl.training.parallel import distribute
from jaxdl.training.processes import any_process, is_first, look_for_stop
from jaxdl.training.run import Report, Run
from jaxdl.training.seeds import SeedsStep
from jaxdl.training.state import TrainState, parameter_paths, parameter_table
from jaxdl.training.step import GRADIENT_NORMS, Mean, Metrics, Step, UpdateStep

Evaluate = Callable[[dict[str, PyTree], Key[Array, ""]], Report]
"""`(variables, key) -> report`: what a model with these variables does, batch statistics among them. The key is another at each step."""

_PROFILED_STEPS = range(10, 20)
"""Counted from the first step of this process, so that compilation is not in the trace."""


@runtime_checkable
class Batches(Protocol):
    """An endless iterator of batches of numpy arrays that knows where it is (a grain `DatasetIterator` is one)."""

    def __next__(self) -> PyTree: ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


@runtime_checkable
class Environments(Protocol):
    """A source of batches that depend on what was learned, such as environments on the host in which a policy acts: `next_batch(state)` in the place of `next`."""

    def next_batch(self, state: TrainState) -> PyTree: ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


class NoBatches:
    """For training that makes its own data on the device: every batch is None."""

    def __next__(self) -> None:
        return None

    def get_state(self) -> dict[str, Any]:
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        """There is nothing to go back to."""


def fit(
    step: Step,
    state: TrainState,
    batches: Batches | Environments | None,
    run: Run,
    *,
    steps: int,
    evaluate: Evaluate | None = None,
    evaluate_every: int = 0,
    show: Evaluate | None = None,
    show_every: int = 0,
    inspect: Inspect | None = None,
) -> TrainState:
    """Trains from where the run stopped, or from `state`, to `steps` steps, and leaves a checkpoint there.

    State and batches lie as the run's layout says; each process is given its own rows of every batch. A step that counts by more than one, such as a scan of several, is called as often as it takes. `evaluate` is called every `evaluate_every` steps before the last one, and `show` every `show_every` steps (0: never); numbers of their reports are logged under `eval/`, pictures left in `figures/`. `inspect` sees, if the run asks for it, the first step and every `inspect_every`-th before it is made; the training's bits are the same without. It has to be given for steps that `make_step` has not made.

    A signal to stop (Ctrl-C, SIGTERM, SIGHUP) is answered after the step at hand or the part of an evaluation, or, where there are several processes, at the next row of the log, when they agree on it: everything is saved and `Interrupted` raised. An evaluation that was left out so is made when the run goes on. Raises `RunError` at a metric or gradient that is not finite; no checkpoint is written after one, and `UserError` if the run asks to inspect layers and there is no `inspect`.
    """
    layout, execution = run.layout, run.execution
    every = execution.inspect_every
    if inspect is None and isinstance(step, UpdateStep):
        inspect = inspect_step(step)
    if every and inspect is None:
        raise UserError(
            f"--inspect-every {every}: {run.experiment} does not say how to look inside of its steps; leave the flag out"
        )
    batches = NoBatches() if batches is None else batches
    state = layout.place_state(state)
    restored = run.checkpoints.restore(state, run.say)
    if restored is not None:
        state, position, run.seconds_before = restored
        batches.set_state(position)
    number = first = int(state.step)
    run.start_logging(first)
    if first:
        run.say(f"resuming at step {first:,} of {steps:,}")
    else:
        run.say(f"parameters:\n{parameter_table(state.params)}")

    def look(number: int, *due: bool) -> None:
        """Evaluates and draws what is due after a step; if it is stopped in that, the step is saved."""
        try:
            for each, is_due in zip((evaluate, show), due):
                if each and is_due:
                    numbers = run.report(number, each(state.eval_variables, evaluation_key(state)))
                    if numbers:
                        run.say(f"step {number:,}: " + ", ".join(f"{name} {value:.3f}" for name, value in numbers.items()))
        except Interrupted as interrupted:
            save(number)
            raise _saved(run, number, steps, interrupted.signal_number) from None

    def save(number: int) -> None:
        run.checkpoints.save(state, batches.get_state(), run.seconds)

    stride, saved_at = 1, time.monotonic()
    signals.defer()
    with signals.listening(), _profile(run) as profile, _progress(first, steps) as bar:
        (left_out,) = any_process(is_first() and 0 < first < steps and not _was_evaluated(run, first))
        if left_out:
            look(first, *(bool(every) and first % every == 0 for every in (evaluate_every, show_every)))
        while number < steps:
            compiling = number == first
            profile((number - first) // stride + 1)
            batch = layout.place_batch(batches.next_batch(state) if isinstance(batches, Environments) else next(batches))
            if compiling:
                compiled, cost = compile_step(distribute(step, state, layout), state, batch)
                run.say(str(cost))
                look_for_stop()
                pending = _Pending(run, step, state, layout.rows(batch), cost)
                inspect_layers = distribute_inspection(inspect, state, layout) if every else None
            if inspect_layers and (number == 0 or (number + stride) // every > number // every):
                run.log_layers(number + 1, inspect_layers(state, batch).row())
            state, metrics = compiled(state, batch)
            if compiling:
                stride = max(int(state.step) - number, 1)
            before, number = number, number + stride
            came = lambda every, before=before, number=number: bool(every) and number // every > before // every
            pending.add(number, metrics, bar, stride)
            if compiling:
                jax.block_until_ready(state.step)
                seconds = run.seconds - run.seconds_before
                run.say(f"first step after {seconds:.1f} s, {cost.seconds_to_compile:.1f} s of it to compile")
                run.log(number, {"seconds_to_first_step": seconds})
            saving = number >= steps or came(execution.checkpoint_every)
            due, stopped = (time.monotonic() - saved_at) / 60 > execution.checkpoint_minutes, bool(signals.received())
            if jax.process_count() > 1:
                due, stopped = any_process(due, stopped) if came(execution.log_every) else (False, False)
            if saving or due or stopped:
                pending.flush(bar)
                save(number)
                saved_at = time.monotonic()
            if stopped:
                raise _saved(run, number, steps, signals.received() or signal.SIGTERM)
            dues = came(evaluate_every), came(show_every)
            if any(dues) and number < steps:
                pending.flush(bar)
                look(number, *dues)
    run.checkpoints.wait()
    signals.defer(signals.PATIENCE)  # What is still to come is computed again from what is saved.
    return state


def _saved(run: Run, number: int, steps: int, sent: int) -> Interrupted:
    """What is raised once the checkpoint of a step is on disk."""
    run.checkpoints.wait()
    name = signal.Signals(sent).name
    return Interrupted(f"{name}: saved at step {number:,} of {steps:,}; the same command goes on from there", sent)


def _was_evaluated(run: Run, number: int) -> bool:
    """Whether the log has an evaluation after a step: a run that was stopped just before it does not."""
    rows = read_metrics(run.directory / "metrics.jsonl")
    return any(row["step"] == number and any(name.startswith("eval/") for name in row) for row in rows)


def evaluation_key(state: TrainState) -> Key[Array, ""]:
    """A key for what is random in an evaluation: another at each step, and none that a step has used."""
    key = state.key if state.key.ndim == 0 else state.key[0]
    return jax.random.fold_in(jax.random.fold_in(key, state.step), _EVALUATION)


_EVALUATION = 2**31 - 1


class _Pending:
    """Metrics that are still on the device. They come over in one transfer every few steps, when the device has later steps to do."""

    def __init__(self, run: Run, step: Step, state: TrainState, examples: int, cost: Cost):
        self.run, self.examples, self.cost = run, examples, cost
        self.every = run.execution.log_every
        known = isinstance(step, UpdateStep | SeedsStep)
        self.paths = step.gradient_paths(state) if known else {GRADIENT_NORMS: parameter_paths(state.params)}
        self.rows: list[tuple[int, Metrics]] = []
        self.steps = 0
        self.since = time.perf_counter()

    def add(self, number: int, metrics: Metrics, bar: tqdm, stride: int) -> None:
        bar.update(stride)
        self.rows.append((number, metrics))
        self.stride, self.steps = stride, self.steps + stride
        if self.every <= stride:
            self.flush(bar)
        elif (self.steps - stride) // self.every > (self.steps - 2 * stride) // self.every:
            self.flush(bar, leave=1)  # The window before is full, and the device is busy with this step.

    def flush(self, bar: tqdm, leave: int = 0) -> None:
        """Fetches, checks and logs all rows but the last `leave`; what is logged is their mean. A `Mean` without a count in any of them is not logged."""
        cut = len(self.rows) - leave
        rows, self.rows = self.rows[:cut], self.rows[cut:]
        if not rows:
            return
        fetched = jax.device_get([metrics for _, metrics in rows])
        for (number, _), metrics in zip(rows, fetched):
            self._check(number, metrics)
        means = _means(fetched)
        now = time.perf_counter()
        seconds, self.since = now - self.since, now
        calls_per_second = len(rows) / seconds
        means["steps_per_second"] = self.stride * calls_per_second
        shown = {"loss": f"{means['loss']:.4g}"} if "loss" in means else {}
        if self.examples:
            means["examples_per_second"] = self.examples * calls_per_second
            shown["examples/s"] = f"{means['examples_per_second']:.0f}"
        utilization = self.cost.utilization(calls_per_second)
        if utilization is not None:
            means["model_flop_utilization"] = utilization
        self.run.log(rows[-1][0], means)
        bar.set_postfix(shown, refresh=False)

    def _check(self, number: int, metrics: dict[str, Any]) -> None:
        wrong, parameters = [], []
        for name, value in metrics.items():
            if name.endswith(GRADIENT_NORMS):
                parameters += [path for path, norm in zip(self.paths.get(name, ()), value) if not math.isfinite(norm)]
            elif not np.isfinite(value.total if isinstance(value, Mean) else value):
                wrong.append(name)
        if not wrong and not parameters:
            return
        named = ", ".join(parameters[:5]) + (f" and {len(parameters) - 5} more" if len(parameters) > 5 else "")
        gradients = f"; the gradients of {named} are not finite" if parameters else ""
        stands = self.run.checkpoints.latest()
        kept = "there is no checkpoint before it" if stands is None else f"the checkpoint of step {stands:,} stands"
        raise RunError(
            f"at step {number:,} {', '.join(wrong) or 'a gradient'} is not finite{gradients}; {kept}: "
            "try a lower --learning-rate, a longer --warmup or clipping, in another --workdir or with --overwrite"
        )


def _means(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Of several steps' metrics, each over the steps that have it."""
    means: dict[str, float] = {}
    for name in dict.fromkeys(name for row in rows for name in row if not name.endswith(GRADIENT_NORMS)):
        values = [row[name] for row in rows if name in row]
        if isinstance(values[0], Mean):
            count = float(sum(value.count for value in values))
            means |= {name: float(sum(value.total for value in values)) / count} if count else {}
        else:
            means[name] = float(np.mean(values))
    return means


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
