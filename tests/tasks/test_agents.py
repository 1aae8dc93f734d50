"""Memories, judgements and bounds of agents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdl.environments import Episode, make
from jaxdl.environments.classic import Swing
from jaxdl.tasks.agents import begin_many, bounded, random_actions, unroll, whole_episodes
from jaxdl.tasks.pendulum import best_returns
from jaxdl.tasks.replay import Replay

ENVIRONMENTS, LENGTH, DISCOUNT = 3, 8, 0.9


def moments(count: int) -> dict:
    """Of which everything says when and where it was; episodes of environment e end every e + 2 moments, by their time limit but in the first."""
    time, place = jnp.meshgrid(jnp.arange(count), jnp.arange(ENVIRONMENTS), indexing="ij")
    ended = time % (place + 2) == place + 1
    label = (100 * place + time).astype(jnp.float32)
    return {
        "observation": label[..., None],
        "action": time,
        "reward": label,
        "terminated": ended & (place == 0),
        "ended": ended,
        "next_observation": label[..., None] + 0.5,
    }


def filled(count: int) -> Replay:
    """By `of` for some, and one by one for the rest."""
    rows, first = moments(count), min(4, count)
    replay = Replay.of(jax.tree.map(lambda x: x[:first], rows), LENGTH)
    for time in range(first, count):
        replay = replay.add(jax.tree.map(lambda x, time=time: x[time], rows))
    return replay


@pytest.mark.parametrize("weighted", [None, 1.0])
@pytest.mark.parametrize(("count", "steps"), [(4, 1), (6, 3), (21, 1), (21, 3)])
def test_what_is_drawn_was_lived_through_and_what_follows_it_too(count, steps, weighted):
    batch = jax.device_get(filled(count).sample(jax.random.key(0), 500, discount=DISCOUNT, steps=steps, weighted=weighted))
    times, places = batch["action"], batch["environment"]
    np.testing.assert_array_equal(batch["observation"][:, 0], 100 * places + times)
    known = range(max(0, count - LENGTH), count - steps + 1)
    assert set(zip(times.tolist(), places.tolist())) == {(time, place) for time in known for place in range(ENVIRONMENTS)}
    rows = jax.device_get(moments(count + steps))
    for row, (time, place) in enumerate(zip(times, places)):
        reward, factor = 0.0, 1.0
        for now in range(time, time + steps):
            reward += factor * rows["reward"][now, place]
            factor *= DISCOUNT
            if rows["ended"][now, place]:
                break
        np.testing.assert_allclose(batch["reward"][row], reward, rtol=1e-5)
        np.testing.assert_allclose(batch["discount"][row], 0 if rows["terminated"][now, place] else factor, rtol=1e-5)
        assert batch["next_observation"][row, 0] == 100 * place + now + 0.5
    np.testing.assert_allclose(batch["weight"], 1, rtol=1e-5)


def test_priorities_are_probabilities_and_weights_make_up_for_them():
    replay = filled(LENGTH)
    batch = {"place": jnp.arange(LENGTH).repeat(ENVIRONMENTS), "environment": jnp.tile(jnp.arange(ENVIRONMENTS), LENGTH)}
    wanted = np.random.default_rng(0).uniform(0.2, 1, LENGTH * ENVIRONMENTS).astype(np.float32)
    replay = replay.prioritize(batch, jnp.asarray(wanted))
    drawn = jax.device_get(replay.sample(jax.random.key(0), 20_000, discount=DISCOUNT, weighted=1.0))
    counts = np.bincount(drawn["place"] * ENVIRONMENTS + drawn["environment"], minlength=wanted.size)
    np.testing.assert_allclose(counts / 20_000, wanted / wanted.sum(), atol=2e-4)
    total = np.bincount(drawn["place"] * ENVIRONMENTS + drawn["environment"], drawn["weight"], minlength=wanted.size)
    np.testing.assert_allclose(total / total.sum(), 1 / wanted.size, rtol=0.05)
    assert drawn["weight"].max() == 1
    newest = replay.add(jax.tree.map(lambda x: x[0], moments(1))).priorities
    np.testing.assert_allclose(np.asarray(newest)[LENGTH % LENGTH], wanted.max())


def test_a_return_is_that_of_the_first_episode_alone():
    environment = make("catch")
    episodes = begin_many(environment, jax.random.key(0), 20)
    found = jax.jit(lambda episodes: whole_episodes(environment, random_actions(environment), episodes))(episodes)
    _, rows = jax.jit(lambda episodes: unroll(environment, random_actions(environment), episodes, 9))(episodes)
    np.testing.assert_array_equal(found, np.asarray(rows["reward"]).sum(0))
    assert set(np.asarray(found).tolist()) == {-1.0, 1.0}


def test_actions_between_minus_1_and_1_reach_the_bounds():
    space = make("pendulum").action_space
    np.testing.assert_allclose(bounded(space, jnp.array([[-1.0], [0.0], [1.0]])), [[-2], [0], [2]])


@pytest.mark.optimized
def test_the_optimum_of_the_pendulum():
    """Standing still costs nothing; hanging costs what a published optimum of many starts does on average, and no policy that is tried does better."""
    still = Swing(jnp.array([0.0, jnp.pi, 0.2]), jnp.array([0.0, 0.0, 0.0]))
    zeros = jnp.zeros(3)
    episodes = Episode(still, jax.random.split(jax.random.key(0), 3), zeros.astype(jnp.int32), zeros)
    best = best_returns(episodes)
    assert abs(best[0]) < 1e-3 and -420 < best[1] < -200 and -5 < best[2] < 0
    environment = make("pendulum")

    def upright(seen, keys):
        """Swings up by energy, and holds by a spring (Åström and Furuta 2000)."""
        cosine, sine, turning = seen.T
        energy = turning**2 / 6 + 5 * (cosine - 1)
        swing = -2 * jnp.sign(turning * energy + 1e-6)
        hold = -(12 * jnp.arctan2(sine, cosine) + 3 * turning)
        return jnp.where(cosine > 0.9, hold, swing).clip(-2, 2)[:, None], {}

    by_hand = np.asarray(jax.jit(lambda episodes: whole_episodes(environment, upright, episodes))(episodes))
    assert (by_hand <= best + 0.5).all() and by_hand[1] > -1000
