"""Each world moves as Gymnasium's does, from the same states by the same actions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdl.environments import Discrete, make

gymnasium = pytest.importorskip("gymnasium")

THEIRS = {
    "cartpole": "CartPole-v1",
    "pendulum": "Pendulum-v1",
    "acrobot": "Acrobot-v1",
    "mountain_car": "MountainCar-v0",
    "mountain_car_continuous": "MountainCarContinuous-v0",
}


@pytest.mark.parametrize("name", THEIRS)
def test_step_by_step_it_is_gymnasiums(name):
    """In 64 bits, through whole episodes, from states that random actions lead to and from states anywhere."""
    ours, theirs = make(name), gymnasium.make(THEIRS[name])
    random, discrete = np.random.default_rng(0), isinstance(ours.action_space, Discrete)
    assert theirs.spec.max_episode_steps == ours.time_limit
    with jax.enable_x64(True):
        step, observe = jax.jit(ours.step), jax.jit(ours.observe)
        kind, ends = type(ours.reset(jax.random.key(0))), 0
        for episode in range(40):
            theirs.reset(seed=episode)
            if episode % 2:  # Anywhere: what random actions do not come to.
                spread = np.abs(theirs.unwrapped.state) + random.uniform(0.1, 2, len(theirs.unwrapped.state))
                state = random.uniform(-spread, spread)
                if name.startswith("mountain_car"):
                    state = np.array([random.uniform(-1.2, 0.6), random.uniform(-0.07, 0.07)])
                theirs.unwrapped.state = state
            for _ in range(30 if episode % 2 else 100):
                before = np.asarray(theirs.unwrapped.state, np.float64)
                action = int(random.integers(ours.action_space.count)) if discrete else random.uniform(-2.5, 2.5, 1)
                if name == "mountain_car_continuous":
                    action = np.clip(action, -1, 1)
                seen, reward, terminated, _, _ = theirs.step(action)
                after, own_reward, own_end = step(kind(*map(jnp.asarray, before)), jnp.asarray(action), jax.random.key(0))
                wanted = np.asarray(theirs.unwrapped.state, np.float64)
                # Gymnasium rounds some states to 32 bits, and takes 4/3 and the like in Python.
                np.testing.assert_allclose(np.stack(jax.tree.leaves(after)), wanted, rtol=1e-6, atol=1e-6)
                np.testing.assert_allclose(observe(after), seen, rtol=1e-6, atol=1e-6)
                np.testing.assert_allclose(own_reward, reward, rtol=1e-6, atol=1e-6)
                assert bool(own_end) == terminated
                if terminated:
                    ends += 1
                    break
        assert (ends > 0) == (name != "pendulum")


@pytest.mark.parametrize("name", THEIRS)
def test_spaces_and_beginnings_are_gymnasiums(name):
    ours, theirs = make(name), gymnasium.make(THEIRS[name])
    assert ours.observation_space.shape == theirs.observation_space.shape
    drawn = np.stack(jax.tree.leaves(jax.vmap(ours.reset)(jax.random.split(jax.random.key(0), 2000))))
    wanted = []
    for seed in range(500):
        theirs.reset(seed=seed)
        wanted.append(theirs.unwrapped.state)
    wanted = np.stack(wanted).T
    for own, their in zip(drawn, wanted):  # Uniform between the same bounds.
        room = 0.02 * np.ptp(their) + 1e-6
        assert abs(own.min() - their.min()) < room and abs(own.max() - their.max()) < room
