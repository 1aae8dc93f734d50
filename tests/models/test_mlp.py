"""Every hand-written gradient is the true one, link by link and as a chain."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdl.errors import UserError
from jaxdl.losses import cross_entropy
from jaxdl.models import mlp
from jaxdl.models.mlp import MLP, by_hand, dropout_masks, network, sgd, softmax_cross_entropy

quick = settings(max_examples=3, deadline=None, derandomize=True)
small = st.integers(1, 6)
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def normal(seed: int, *shapes: tuple[int, ...]) -> list[jax.Array]:
    random = np.random.default_rng(seed)
    return [jnp.asarray(random.standard_normal(shape)) for shape in shapes]


def assert_close(ours, expected, tolerance: float = 1e-10) -> None:
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype == jnp.float64
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def assert_pulls_the_gradient(link, *inputs) -> None:
    """The link's pull is jax's own derivative of its value, by every input that has one."""
    value, pull = link(*inputs)
    pulled = pull(jnp.cos(1.0 + value))
    learned = [index for index, gradient in enumerate(pulled) if gradient is not None]

    def forward(*chosen):
        given = list(inputs)
        for index, array in zip(learned, chosen):
            given[index] = array
        return link(*given)[0]

    _, jaxs = jax.vjp(forward, *[inputs[index] for index in learned])
    assert_close([pulled[index] for index in learned], list(jaxs(jnp.cos(1.0 + value))))


def layers_of(seed: int, widths: list[int]) -> list[tuple[jax.Array, jax.Array]]:
    return [tuple(normal(seed + i, (a, b), (b,))) for i, (a, b) in enumerate(itertools.pairwise(widths))]


@quick
@given(batch=small, inputs=small, outputs=small, seed=seeds)
def test_each_link_pulls_what_jax_differentiates(batch, inputs, outputs, seed):
    x, kernel, bias, y = normal(seed, (batch, inputs), (inputs, outputs), (outputs,), (batch, outputs))
    labels = jnp.asarray(np.random.default_rng(seed).integers(0, outputs, batch))
    assert_pulls_the_gradient(mlp.affine, x, kernel, bias)
    assert_pulls_the_gradient(mlp.relu, x)
    assert_pulls_the_gradient(mlp.drop, x, (x > 0.5) * 2.0)
    assert_pulls_the_gradient(softmax_cross_entropy, y, labels)


def test_a_relu_at_0_has_no_gradient():
    _, pull = mlp.relu(jnp.array([[-1.0, 0.0, 2.0]]))
    assert pull(jnp.ones((1, 3)))[0].tolist() == [[0, 0, 1]]


@quick
@given(batch=small, hidden=st.lists(small, max_size=3), seed=seeds, dropped=st.booleans())
def test_the_chain_pulls_what_jax_differentiates(batch, hidden, seed, dropped):
    layers = layers_of(seed, [5, *hidden, 3])
    (x,) = normal(seed, (batch, 5))
    masks = dropout_masks(jax.random.key(seed), 0.5, batch, hidden) if dropped and hidden else []
    assert_pulls_the_gradient(network, x, layers, masks)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_of_a_training_step_are_jaxs_to_1e_minus_10(dropout):
    """Of the objective as the experiment has it, in double precision: by hand throughout, and by jax throughout."""
    images, labels = normal(0, (16, 4, 4, 1))[0], jnp.arange(16) % 10
    found = {}
    for backward in ("hand", "jax"):
        module = MLP((12, 8), dropout=dropout, backward=backward, param_dtype=jnp.float64)
        params = module.init(jax.random.key(1), images)["params"]
        objective = lambda params: mlp.LOSSES[backward](
            module.apply({"params": params}, images, train=True, rngs={"dropout": jax.random.key(2)}), labels
        )
        found[backward] = jax.jit(jax.value_and_grad(objective))(params)
    assert_close(found["hand"], found["jax"])
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(found["hand"][1]))


def test_gradients_are_what_small_changes_do():
    layers, labels = layers_of(0, [5, 7, 3]), jnp.array([0, 2, 1, 1])
    (x,) = normal(9, (4, 5))
    objective = lambda layers: by_hand(softmax_cross_entropy)(by_hand(network)(x, layers, []), labels)
    gradients, direction = jax.grad(objective)(layers), layers_of(50, [5, 7, 3])
    moved = lambda size: objective(jax.tree.map(lambda w, d: w + size * d, layers, direction))
    slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: (g * d).sum(), gradients, direction)))
    assert slope == pytest.approx(float(moved(1e-5) - moved(-1e-5)) / 2e-5, rel=1e-7)


def test_the_network_is_linens_dense_layers():
    (x,) = normal(0, (6, 2, 5))
    module = MLP((7, 4), num_classes=3, param_dtype=jnp.float64)
    params = module.init(jax.random.key(0), x)["params"]
    y = x.reshape(6, 10)
    for index, width in enumerate((7, 4, 3)):
        dense = {"kernel": params[f"kernel_{index}"], "bias": params[f"bias_{index}"]}
        y = nn.Dense(width, param_dtype=jnp.float64).apply({"params": dense}, y if index == 0 else nn.relu(y))
    assert_close(module.apply({"params": params}, x), y)


def test_the_loss_is_cross_entropy_and_survives_logits_of_any_size():
    logits, labels = normal(0, (5, 4))[0], jnp.array([0, 1, 2, 3, 1])
    assert_close(softmax_cross_entropy(logits, labels)[0], cross_entropy(logits, labels))
    loss, pull = softmax_cross_entropy(1e6 * logits, labels)
    assert np.isfinite(loss) and np.isfinite(pull(jnp.ones(()))[0]).all()


def test_dropout_keeps_the_mean_and_drops_the_share_asked_for():
    first, second = dropout_masks(jax.random.key(0), 0.25, 400, (50, 100))
    for mask, width in ((first, 50), (second, 100)):
        assert mask.shape == (400, width) and set(np.unique(mask).tolist()) == {0.0, np.float32(1 / 0.75)}
        assert (mask == 0).mean() == pytest.approx(0.25, abs=0.01)
    assert (first != second[:, :50]).any()


def test_dropout_acts_in_training_alone():
    (x,) = normal(0, (3, 8))
    module = MLP((16,), dropout=0.5, param_dtype=jnp.float64)
    params = module.init(jax.random.key(0), x)
    again = [module.apply(params, x, train=True, rngs={"dropout": jax.random.key(seed)}) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(again[0], again[1])
    assert (again[0] != again[2]).any()
    assert_close(module.apply(params, x), MLP((16,), param_dtype=jnp.float64).apply(params, x))


def test_sgd_is_optax_sgd_with_a_penalty_on_kernels():
    params = {"kernel": normal(0, (3, 2))[0], "bias": normal(1, (2,))[0]}
    schedule = optax.linear_schedule(0.5, 0.1, 3)
    ours, theirs = sgd(schedule, 0.3), optax.sgd(schedule)
    state, expected_state, expected = ours.init(params), theirs.init(params), params
    for step in range(3):
        gradients = jax.tree.map(lambda w: jnp.sin(w + step), params)
        updates, state = ours.update(gradients, state, params)
        penalty = lambda p: 0.15 * (p["kernel"] ** 2).sum()
        penalised = jax.tree.map(jnp.add, jax.tree.map(lambda w: jnp.sin(w + step), expected), jax.grad(penalty)(expected))
        changes, expected_state = theirs.update(penalised, expected_state)
        params, expected = optax.apply_updates(params, updates), optax.apply_updates(expected, changes)
    assert_close(params, expected, 1e-6)


def test_activations_start_as_large_in_every_layer():
    """He et al. 2015, eq. 10: ReLU layers of variance 2 / fan_in keep the mean square of what they pass on."""
    (x,) = normal(0, (500, 200))
    module = MLP((300,) * 6, num_classes=300, param_dtype=jnp.float64)
    logits = module.apply(module.init(jax.random.key(0), x), x)
    assert np.square(logits).mean() == pytest.approx(2, rel=0.3)  # The last layer has no ReLU to halve it.


def test_half_precision_computes_in_bf16_and_learns_in_f32():
    x = jnp.ones((4, 6), jnp.float32)
    module = MLP((8,), dropout=0.5, dtype=jnp.bfloat16)
    params = module.init(jax.random.key(0), x)["params"]
    logits = lambda params: module.apply({"params": params}, x, train=True, rngs={"dropout": jax.random.key(0)})
    assert logits(params).dtype == jnp.bfloat16
    gradients = jax.grad(lambda params: mlp.LOSSES["hand"](logits(params), jnp.arange(4)))(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}


def test_dropping_everything_is_refused():
    with pytest.raises(UserError, match="from 0 to below 1"):
        MLP((4,), dropout=1.0).init(jax.random.key(0), jnp.ones((1, 2)))
