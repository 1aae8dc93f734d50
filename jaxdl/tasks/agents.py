"""What agents share: how they act in many environments at once, how good they are said to be, and the films of what they do."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Key, PyTree

from jaxdl import figures
from jaxdl.environments import Box, Discrete, Environment, Episode, Moment, advance, begin, make
from jaxdl.errors import UserError
from jaxdl.metrics import interquartile_interval, interquartile_mean
from jaxdl.tasks.replay import Replay
from jaxdl.training import Mean, Metrics, Report, Run, to_host
from jaxdl.training.logging import read_metrics

RULES = (("^carry/environments/", PartitionSpec(None, "data")), ("^carry/replay/", PartitionSpec(None, None, "data")))
"""How carry lies over devices, whose first axis is that of the seeds: environments are shared out, and so is what was lived through in them."""

Act = Callable[[Float[Array, "E *shape"], Key[Array, "E"]], tuple[Array, PyTree]]
"""From what is seen in each environment, and a key for each, to an action for each, and what else is to be kept."""

_BEGINNINGS = 2**20 + 3
"""The seed of what evaluations begin with: another than people give to a training, and one whose hundred pendulums are as hard as pendulums are on average (the optimum of them is −137.4, that of 4,000 others −137.2)."""


def open_environment(
    run: Run,
    actions: Literal["discrete", "continuous", "both"],
    others: str = "",
    *,
    images: bool = True,
    layouts: Sequence[str] = ("jit", "fsdp", "pmap"),
) -> Environment:
    """The one that the run's config names. Raises `UserError` if it is none, if its spaces are not those that an algorithm serves (`others` do), or if the run's devices cannot share it."""
    config, devices, name = run.config, run.layout.mesh.size, run.experiment
    if config.data or config.eval_data:
        raise UserError(f"--data {config.data or config.eval_data!r}: {name} learns from what it does; choose an --environment")
    environment = make(config.environment)
    space, shape = environment.action_space, environment.observation_space.shape
    kind = "discrete" if isinstance(space, Discrete) else "continuous"
    if actions not in (kind, "both"):
        raise UserError(f"--environment {config.environment} has {space}, and {name} chooses {actions} actions: {others} can")
    if kind == "continuous" and not (space.bounded and len(space.shape) == 1):
        raise UserError(
            f"--environment {config.environment} has {space}: actions are rows of numbers within bounds; choose another"
        )
    if len(shape) not in ((1, 2, 3) if images else (1,)):
        raise UserError(
            f"--environment {config.environment} shows arrays of shape {shape}: {name} reads vectors{' and images' if images else ''}; choose another"
        )
    if run.layout.strategy not in layouts:
        raise UserError(
            f"--parallel {run.layout.strategy}: {name} draws from one memory, of which a program for each device would see a part; choose {' or '.join(layouts)}"
        )
    if config.environments % devices:
        raise UserError(
            f"--environments {config.environments} cannot be shared out to {devices} devices: choose a multiple of {devices}"
        )
    if devices > 1 and config.environment.startswith("gymnasium:"):
        raise UserError(
            f"--environment {config.environment} runs on the host, beside one device; there are {devices}: hide the others"
        )
    return environment


def begin_many(environment: Environment, key: Key[Array, ""], count: int) -> Episode:
    """So many episodes."""
    return jax.vmap(functools.partial(begin, environment))(jax.random.split(key, count))


def random_actions(environment: Environment) -> Act:
    """Acts without looking."""
    return lambda seen, keys: (jax.vmap(environment.action_space.sample)(keys), {})


def bounded(space: Box, action: Float[Array, "*B A"]) -> Float[Array, "*B A"]:
    """From −1 … 1 to the bounds of a space."""
    low, high = space.bounds
    return low + (action + 1) / 2 * (high - low)


def act_once(environment: Environment, act: Act, episodes: Episode) -> tuple[Episode, dict[str, Any]]:
    """One action in each of `E` environments: where they then are, and the row of what happened: `observation`, `action`, the fields of `Moment`, and what `act` wants kept."""
    seen = jax.vmap(environment.observe)(episodes.state)
    action, kept = act(seen, jax.vmap(lambda episode: episode.action_key)(episodes))
    episodes, moment = jax.vmap(functools.partial(advance, environment))(episodes, action)
    return episodes, {"observation": seen, "action": action, **vars(moment), **kept}


def unroll(environment: Environment, act: Act, episodes: Episode, length: int) -> tuple[Episode, dict[str, Any]]:
    """So many actions in each, with rows `T E ...`."""
    return jax.lax.scan(lambda episodes, _: act_once(environment, act, episodes), episodes, None, length)


def remember(environment: Environment, episodes: Episode, moments: int, memory: int) -> dict[str, Any]:
    """The carry of an agent that learns from a `Replay` of so much memory, with random moments to begin with, both shared out to its environments."""
    count = len(episodes.time)
    episodes, rows = unroll(environment, random_actions(environment), episodes, moments // count)
    return {"environments": episodes, "replay": Replay.of(rows, memory // count)}


def finished(rows: Mapping[str, Array], axis_name: str | None = None) -> Metrics:
    """The mean return and length of the episodes that ended within some rows."""
    counted = lambda name: Mean((rows[name] * rows["ended"]).sum().astype(jnp.float32), rows["ended"].sum().astype(jnp.float32))
    found = {"return": counted("total"), "length": counted("length")}
    return found if axis_name is None else jax.lax.psum(found, axis_name)


def whole_episodes(environment: Environment, act: Act, episodes: Episode) -> Float[Array, "E"]:
    """The return of each up to its first end."""

    def on(carried: tuple[Episode, Array, Array]) -> tuple[Episode, Array, Array]:
        episodes, over, totals = carried
        episodes, row = act_once(environment, act, episodes)
        return episodes, over | row["ended"], jnp.where(over, totals, row["total"])

    count = len(episodes.time)
    start = episodes, jnp.zeros(count, bool), jnp.zeros(count)
    return jax.lax.while_loop(lambda carried: ~carried[1].all(), on, start)[2]


class Judge:
    """Says how good the agents of a run are, draws them, and lets them play.

    `greedy(variables, seen)` are the actions of one agent that does not explore. `bounds` are returns that can be had from the same beginnings, for comparison, by a function of these episodes.
    """

    def __init__(
        self,
        run: Run,
        environment: Environment,
        greedy: Callable[[PyTree, Float[Array, "E *shape"]], Array],
        bounds: Mapping[str, Callable[[Episode], Float[np.ndarray, "E"]]] = {},
    ):
        self.run, self.environment, self.bounds, self.config = run, environment, bounds, run.config
        acting = lambda variables: lambda seen, keys: (greedy(variables, seen), {})
        beginnings = lambda: begin_many(environment, jax.random.key(_BEGINNINGS), self.config.episodes)
        self.beginnings = jax.jit(beginnings)
        replicated = run.layout.replicated

        @functools.partial(jax.jit, out_shardings=replicated)
        def returns(variables: PyTree) -> Float[Array, "S"]:
            one = lambda variables: whole_episodes(environment, acting(variables), beginnings()).mean()
            return jax.vmap(one)(variables)

        @functools.partial(jax.jit, out_shardings=replicated)
        def watched(variables: PyTree, agent: Array, key: Key[Array, ""]) -> tuple[PyTree, Moment]:
            chosen = jax.tree.map(lambda x: x[agent], variables)

            def on(episode: Episode, _: None) -> tuple[Episode, tuple[PyTree, Moment]]:
                action, _ = acting(chosen)(environment.observe(episode.state)[None], episode.action_key[None])
                after, moment = advance(environment, episode, action[0])
                return after, (episode.state, moment)

            return jax.lax.scan(on, begin(environment, key), None, environment.time_limit)[1]

        self._returns, self._watched = returns, watched
        self._known: tuple[PyTree, np.ndarray] | None = None

    def returns(self, variables: PyTree) -> Float[np.ndarray, "S"]:
        """The mean return of each agent, over the same beginnings at any time in any run."""
        if self._known is None or self._known[0] is not variables:
            self._known = variables, np.asarray(to_host(self._returns(variables)), np.float64)
        return self._known[1]

    def evaluate(self, variables: PyTree, key: Key[Array, ""]) -> Report:
        """What `summary` says, as `train` asks for it."""
        return self.summary(variables)

    def summary(self, variables: PyTree) -> dict[str, float]:
        """Mean, median, worst, and interquartile mean of the agents' returns, the last with its interval."""
        returns = self.returns(variables)
        low, high = interquartile_interval(returns)
        return {
            "mean_return": returns.mean(),
            "median_return": np.median(returns),
            "worst_return": returns.min(),
            "deviation_of_returns": returns.std(ddof=1) if len(returns) > 1 else 0.0,
            "iqm_return": float(interquartile_mean(returns)),
            "iqm_return_low": low,
            "iqm_return_high": high,
        }

    def play(self, variables: PyTree, key: Key[Array, ""]) -> tuple[float, figures.Animation | None]:
        """An episode of the median agent: its return, and its film of up to 250 pictures, None where the environment has none."""
        returns = self.returns(variables)
        agent = np.argsort(returns, kind="stable")[(len(returns) - 1) // 2]
        states, moments = jax.tree.map(to_host, self._watched(variables, agent, key))
        length = int(np.argmax(moments.ended)) + 1
        total, every = float(moments.total[length - 1]), -(-length // 250)
        shown = (jax.tree.map(lambda x, time=time: np.asarray(x[time]), states) for time in range(0, length, every))
        frames = [frame for frame in map(self.environment.render, shown) if frame is not None]
        speed = max(self.environment.frames_per_second / every, 5)
        return total, figures.Animation(np.stack(frames), speed) if frames else None

    def show(self, variables: PyTree, key: Key[Array, ""]) -> Report:
        """A film of the median agent, of several episodes where they are short."""
        films: list[figures.Animation] = []
        for number in range(10):
            film = self.play(variables, jax.random.fold_in(jax.random.key(_BEGINNINGS), number))[1]
            if film is None:
                return {}
            films.append(film)
            if sum(len(film.frames) for film in films) >= 100:
                break
        return {"film": figures.Animation(np.concatenate([film.frames for film in films]), films[-1].frames_per_second)}

    def conclude(self, variables: PyTree, moments_per_step: float) -> Report:
        """Beside the agents: random actions and the bounds, from the same beginnings; how fast it went, of `moments_per_step` that all agents see in a step; and the curve of how they came to it."""
        random = jax.jit(lambda episodes: whole_episodes(self.environment, random_actions(self.environment), episodes))
        levels = {"random": float(random(self.beginnings()).mean())}
        levels |= {name: float(np.mean(found(self.beginnings()))) for name, found in self.bounds.items()}
        rows = read_metrics(self.run.directory / "metrics.jsonl")
        speeds = [row["steps_per_second"] for row in rows if "steps_per_second" in row]
        return {
            **{f"{name}_return": level for name, level in levels.items()},
            "environment_steps_per_second": float(np.median(speeds)) * moments_per_step if speeds else None,
            "returns": self.curve(rows, self.summary(variables), levels, moments_per_step / self.config.seeds),
        }

    def curve(self, rows: list[dict[str, Any]], last: Report, levels: Mapping[str, float], each: float) -> Any:
        """The interquartile mean with its interval, by how many steps each agent has made."""
        names = "iqm_return_low", "iqm_return", "iqm_return_high"
        found = {row["step"]: tuple(row[f"eval/{name}"] for name in names) for row in rows if f"eval/{names[1]}" in row}
        found[self.config.steps] = tuple(last[name] for name in names)
        title = f"{self.environment.name}: {self.config.seeds} agents, interquartile mean and 95 % interval"
        return figures.interval_curve(
            [step * each for step in found], {"agents": list(found.values())}, levels=levels, title=title
        )

    def answer(self, asked: Sequence[str]) -> Callable[[PyTree], None] | None:
        """Plays an episode for each number that is asked, and leaves its film; None where nothing is. Raises `UserError` for what is no number."""
        for word in asked:
            if not word.isdecimal():
                raise UserError(f"--ask {word!r}: give numbers, each of which is the seed of an episode to be played")

        def play(variables: PyTree) -> None:
            for word in asked:
                total, film = self.play(variables, jax.random.key(int(word)))
                path = figures.save(film, self.run.figures / f"episode_{word}") if film else "no film: it has no pictures"
                self.run.say(f"episode {word}: return {total:.4g}; {path}")

        return play if asked else None
