"""Steps of environments a second: PPO on CartPole here and in stable-baselines3, with the same settings, on this machine's CPU.

    python -m benchmarks.agents [--rounds 3] [--steps 32768] [--scaling]

Each side is a process of its own, one after the other, round by round, so that both see the same noise: ours is the experiment's command, of whose log the median row counts (which has neither compilation nor evaluations in it), theirs is `learn` without its first 2,048 steps. Settings are those of CleanRL's `ppo.py`: 4 environments, 128 steps, 4 epochs of 4 minibatches. `--scaling` then says how ours goes with the number of environments, and of agents. `pip install stable-baselines3` first.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import tyro

ENVIRONMENTS, HORIZON, EPOCHS, MINIBATCHES = 4, 128, 4, 4
SOLVED = 475
"""Of `CartPole-v1`, by its registration."""


@dataclasses.dataclass(frozen=True)
class Options:
    """PPO's steps of environments a second, here and in stable-baselines3."""

    rounds: int = 3
    """Turns that each side has."""
    steps: int = 32_768
    """Of stable-baselines3 in a turn; ours makes eight times as many."""
    scaling: bool = False
    """Also measure ours with more environments and more agents."""
    theirs: int = 0
    """Only run stable-baselines3 for so many steps, and print its speed: what a turn of it is."""


def theirs(steps: int) -> float:
    """Steps a second of stable-baselines3."""
    import gymnasium
    from stable_baselines3 import PPO
    from stable_baselines3.common.vec_env import DummyVecEnv

    worlds = DummyVecEnv([lambda: gymnasium.make("CartPole-v1")] * ENVIRONMENTS)
    settings = dict(n_steps=HORIZON, n_epochs=EPOCHS, batch_size=ENVIRONMENTS * HORIZON // MINIBATCHES, learning_rate=2.5e-4)
    model = PPO("MlpPolicy", worlds, **settings, ent_coef=0.01, clip_range_vf=0.2, device="cpu", seed=0)
    model.learn(2048)
    started = time.perf_counter()
    model.learn(steps)
    return steps / (time.perf_counter() - started)


def ours(steps: int, environments: int = ENVIRONMENTS, seeds: int = 1, rate: float = 2.5e-4) -> tuple[float, float | None]:
    """Steps a second of the experiment over all agents, and the seconds after compilation until every agent had solved its task, None if that was not seen."""
    updates = EPOCHS * MINIBATCHES * max(1, steps // (environments * HORIZON))
    with tempfile.TemporaryDirectory() as folder:
        flags = dict(
            workdir=folder, steps=updates, environments=environments, horizon=HORIZON, epochs=EPOCHS, seeds=seeds,
            batch_size=environments * HORIZON // MINIBATCHES, learning_rate=rate, evaluate_every=max(updates // 8, 1),
        )  # fmt: skip
        words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        subprocess.run([sys.executable, "-m", "experiments.ppo", *words], check=True, stdout=subprocess.DEVNULL)
        speed = json.loads((Path(folder) / "result.json").read_text("utf-8"))["metrics"]["environment_steps_per_second"]
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text("utf-8").splitlines()]
    solved = [row["step"] for row in rows if row.get("eval/worst_return", 0) >= SOLVED]
    each = environments * HORIZON * seeds / (EPOCHS * MINIBATCHES)
    return speed, solved[0] * each / speed if solved else None


def main(options: Options) -> None:
    """Measures and prints."""
    if options.theirs:
        print(theirs(options.theirs))
        return
    here, there = [], []
    for _ in range(options.rounds):
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.agents", "--theirs", str(options.steps)]
        there.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]))
        here.append(ours(8 * options.steps)[0])
        print(f"{here[-1]:,.0f} and {there[-1]:,.0f} steps a second", flush=True)
    for name, speeds in (("jaxdl", here), ("stable-baselines3", there)):
        print(f"{name}: {np.median(speeds):,.0f} steps a second (from {min(speeds):,.0f} to {max(speeds):,.0f})")
    ratios = np.array(here) / np.array(there)
    print(f"jaxdl / stable-baselines3: {np.median(ratios):.0f} (from {ratios.min():.0f} to {ratios.max():.0f})")
    _, seconds = ours(8 * options.steps, rate=2.5e-3)
    print(
        "one agent, learning rate of the default run: "
        + (f"solved {seconds:.1f} s after compilation" if seconds else "not solved")
    )
    if options.scaling:
        for environments in (4, 16, 64, 256):
            print(f"1 agent, {environments} environments: {ours(64 * 128 * environments, environments)[0]:,.0f} steps a second")
        for seeds in (1, 4, 16, 64):
            print(f"{seeds} agents, 4 environments each: {ours(options.steps, 4, seeds)[0]:,.0f} steps a second together")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
