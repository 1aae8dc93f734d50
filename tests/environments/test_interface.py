"""Episodes: what a time limit is, that each is its own, and the worlds of other libraries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdl.environments import ENVIRONMENTS, Discrete, Environment, advance, begin, make
from jaxdl.errors import UserError

LIBRARIES = ["gymnax:CartPole-v1", "gymnasium:CartPole-v1"]


def play(environment: Environment, key: jax.Array, length: int):
    """Random actions."""

    def one(episode, _):
        action = environment.action_space.sample(episode.action_key)
        seen = environment.observe(episode.state)
        after, moment = advance(environment, episode, action)
        return after, (seen, action, moment)

    return jax.lax.scan(one, begin(environment, key), None, length)


def available(name: str) -> Environment:
    library = name.partition(":")[0]
    if ":" in name:
        pytest.importorskip(library)
    return make(name)


@pytest.mark.parametrize("name", [*ENVIRONMENTS, *LIBRARIES])
def test_many_are_as_one_and_a_new_episode_begins_where_one_ends(name):
    environment, keys = available(name), jax.random.split(jax.random.key(0), 3)
    many = jax.jit(lambda keys: jax.vmap(lambda key: play(environment, key, 60))(keys))(keys)
    alone = jax.jit(lambda key: play(environment, key, 60))(keys[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b, rtol=1e-5, atol=1e-5), many[1], alone[1])
    _, (seen, _, moment) = many
    assert seen.shape[2:] == environment.observation_space.shape and np.isfinite(seen).all()
    on = ~np.asarray(moment.ended)[:, :-1]
    np.testing.assert_allclose(np.asarray(moment.next_observation)[:, :-1][on], np.asarray(seen)[:, 1:][on], atol=1e-6)
    lengths = np.asarray(moment.length)
    np.testing.assert_array_equal(lengths[:, 1:], np.where(on, lengths[:, :-1] + 1, 1))
    totals, rewards = np.asarray(moment.total), np.asarray(moment.reward)
    np.testing.assert_allclose(totals[:, 1:], np.where(on, totals[:, :-1], 0) + rewards[:, 1:], atol=1e-4)


def test_a_time_limit_is_no_end_and_its_last_observation_is_of_the_old_episode():
    environment = make("pendulum")
    _, (seen, _, moment) = jax.jit(lambda key: play(environment, key, 201))(jax.random.key(0))
    assert not np.asarray(moment.terminated).any() and np.flatnonzero(moment.ended).tolist() == [199]
    last, first = np.asarray(moment.next_observation)[199], np.asarray(seen)[200]
    assert np.abs(last - first).max() > 1e-3
    assert abs(last[2] - np.asarray(seen)[199, 2]) < 1.3  # Reached by one step, of at most 0.05 × (15 + 6) radians a second.


def test_pictures_are_there():
    for name in ENVIRONMENTS:
        environment = make(name)
        picture = environment.render(jax.tree.map(np.asarray, environment.reset(jax.random.key(0))))
        assert picture.dtype == np.uint8 and picture.ndim == 3 and np.ptp(picture) > 50


def test_gymnax_plays_the_same_cart():
    """From the same states, by the same actions."""
    theirs, ours = available("gymnax:CartPole-v1"), make("cartpole")
    _, (seen, action, moment) = jax.jit(lambda key: play(theirs, key, 100))(jax.random.key(0))
    cart = type(ours.reset(jax.random.key(0)))
    step = lambda seen, action: ours.observe(ours.step(cart(*seen), action, jax.random.key(0))[0])
    np.testing.assert_allclose(jax.jit(jax.vmap(step))(seen, action), moment.next_observation, rtol=1e-5, atol=1e-6)
    assert np.asarray(moment.terminated).any()


def test_a_simulator_on_the_host_goes_on_from_nothing_but_the_state():
    """As after a restart: another process has no simulators, and replays."""
    one = available("gymnasium:Acrobot-v1")
    begun, _ = jax.jit(lambda key: play(one, key, 40))(jax.random.key(3))

    def on(environment, episode):
        step = jax.jit(lambda episode: advance(environment, episode, environment.action_space.sample(episode.action_key)))
        moments = []
        for _ in range(20):
            episode, moment = step(episode)
            moments.append(jax.device_get((moment.next_observation, moment.reward)))
        return moments

    fresh = make("gymnasium:Acrobot-v1")
    for here, there in zip(on(one, begun), on(fresh, begun)):
        np.testing.assert_array_equal(here[0], there[0])
    import gymnasium

    simulator = gymnasium.make("Acrobot-v1")
    seen, _ = simulator.reset(seed=int(begun.state.seed))
    for action in np.asarray(begun.state.actions)[: int(begun.time)]:
        seen, *_ = simulator.step(int(action))
    np.testing.assert_array_equal(seen.astype(np.float32), begun.state.observation)


def test_few_simulators_serve_many_episodes():
    environment = available("gymnasium:MountainCar-v0")
    environment.simulators.most = 2
    many = jax.jit(lambda keys: jax.vmap(lambda key: play(environment, key, 5))(keys))(jax.random.split(jax.random.key(0), 4))
    plenty = jax.jit(lambda keys: jax.vmap(lambda key: play(make("gymnasium:MountainCar-v0"), key, 5))(keys))
    wanted = plenty(jax.random.split(jax.random.key(0), 4))
    np.testing.assert_array_equal(many[1][0], wanted[1][0])
    assert len(environment.simulators.standing) <= 2


def test_discrete_observations_are_one_hot():
    environment = available("gymnasium:FrozenLake-v1")
    assert environment.observation_space.shape == (16,)
    seen = environment.observe(environment.reset(jax.random.key(0)))
    assert seen.sum() == 1 and seen[0] == 1


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cartpol", "did you mean 'cartpole'"),
        ("gymnasiun:CartPole-v1", "did you mean 'gymnasium'"),
        ("gymnasium:CartPole-v9", "did you mean 'CartPole-v1'"),
        ("gymnax:Cartpole-v1", "did you mean 'CartPole-v1'"),
        ("gymnasium:Blackjack-v1", "a space Tuple: what is served are Discrete ones and Box"),
    ],
)
def test_a_name_that_is_none_is_one_line_with_a_suggestion(name, said):
    library = name.partition(":")[0]
    if library in ("gymnax", "gymnasium"):
        pytest.importorskip(library)
    with pytest.raises(UserError, match=said) as error:
        make(name)
    assert "\n" not in str(error.value)


def test_random_actions_are_actions():
    for name in ENVIRONMENTS:
        space = make(name).action_space
        drawn = np.asarray(jax.vmap(space.sample)(jax.random.split(jax.random.key(0), 200)))
        if isinstance(space, Discrete):
            assert set(drawn.tolist()) == set(range(space.count))
        else:
            low, high = space.bounds
            assert (drawn >= low).all() and (drawn <= high).all() and np.ptp(drawn) > 0.8 * (high - low).max()
            assert drawn.dtype == jnp.float32
