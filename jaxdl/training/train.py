"""From the first step to the result."""

from collections.abc import Callable
from typing import Any

from jaxtyping import PyTree

from jaxdl.errors import UserError
from jaxdl.training.inspection import Inspect
from jaxdl.training.loop import Batches, Environments, Evaluate, evaluation_key, fit
from jaxdl.training.processes import look_for_stop
from jaxdl.training.run import Report, Run
from jaxdl.training.saved import Model
from jaxdl.training.state import TrainState
from jaxdl.training.step import Step


def train(
    run: Run,
    step: Step,
    state: TrainState,
    batches: Batches | Environments | None,
    *,
    evaluate: Evaluate | None = None,
    show: Evaluate | None = None,
    conclude: Evaluate | None = None,
    answer: Callable[[dict[str, PyTree]], None] | None = None,
    inspect: Inspect | None = None,
    model: Model | None = None,
) -> dict[str, Any]:
    """Trains as the run's config says, or goes on, and returns what is then in `result.json`.

    `evaluate` is called in the course of training and at its end, and so is `show`, which draws; `conclude` at its end alone, for what is worth its time once: baselines, a test set, pictures of the finished model. `answer` is given where somebody asks the finished model something; a run that had ended before answers, and its result stays as it was. `model` is what other runs can begin with and `--export` writes. Raises `UserError` if the run is to be exported and there is no `model`, or none that can be.
    """
    config, export = run.config, bool(run.execution.export)
    if model is not None:
        model.keep(run, state.params)
    elif export:
        raise UserError(f"--export: {run.experiment} has no published layout to write its model in; leave the flag out")
    state = fit(
        step, state, batches, run,
        steps=config.steps, evaluate=evaluate, evaluate_every=config.evaluate_every, show=show, show_every=config.show_every, inspect=inspect,
    )  # fmt: skip
    variables, key = state.eval_variables, evaluation_key(state)  # Once: parts may keep what they found for these variables.
    if answer is not None:
        answer(variables)
    if model is not None and export:
        model.export(run, variables["params"])
    if run.result and (answer is not None or export):
        return run.result
    report: Report = {}
    for part in (evaluate, show, conclude):
        if part is not None:
            look_for_stop()
            report |= part(variables, key)
    return run.finish(state, report)
