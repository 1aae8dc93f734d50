"""Of every family: two steps of training are the same two steps wherever and however they are computed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family import Family, changed
from tiny_siglip import assert_same_parameters

from jaxdl.nn import stack_blocks
from jaxdl.training import Layout, TrainState, data_mesh, distribute, init_state, make_step

pytestmark = pytest.mark.needs("learner")


def one_device() -> Layout:
    return Layout("jit", data_mesh(jax.devices()[:1]))


@functools.cache
def variables_at_first(family: Family) -> dict:
    learner = family.learner
    inputs = [jnp.asarray(array[:1]) for array in learner.inputs(learner.batches(1)[0])]
    return jax.device_get(jax.jit(lambda key: learner.init(learner.module, key, inputs))(jax.random.key(0)))


def two_steps(family: Family, layout: Layout, accumulate: int = 1, **fields) -> tuple[TrainState, list[float]]:
    """The state after them, and the losses, with other fields of the module. The second step goes on from a state that a layout has left."""
    updates = family.learner.updates(changed(family.learner.module, **fields), layout)
    variables = variables_at_first(family)
    if fields.get("scan"):
        variables = stack_blocks(variables)
    state = layout.place_state(init_state(lambda key: variables, updates, seed=0))
    step = distribute(make_step(*updates, accumulate=accumulate, axis_name=layout.axis_name), state, layout)
    losses = []
    for batch in family.learner.batches(2):
        state, metrics = step(state, layout.place_batch(batch))
        losses += [float(value) for name, value in metrics.items() if name.endswith("loss")]
    return state, losses


@functools.cache
def on_one_device(family: Family) -> tuple[TrainState, list[float]]:
    return two_steps(family, one_device())


@pytest.mark.eight_devices
@pytest.mark.parametrize(("strategy", "accumulate"), [("jit", 1), ("fsdp", 2), ("pmap", 1)])
def test_eight_devices_train_as_one(family, strategy, accumulate):
    """And parts of a batch, one after the other, as the whole, unless its examples see each other."""
    accumulate = 1 if family.learner.compares else accumulate
    state, losses = two_steps(family, Layout(strategy), accumulate)
    expected, wanted = on_one_device(family)
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)
    assert_same_parameters(state.params, expected.params)
    cut = [leaf for leaf in jax.tree.leaves(state.params) if not leaf.sharding.is_fully_replicated]
    assert bool(cut) == (strategy == "fsdp")


@pytest.mark.needs("learner.scan")
def test_blocks_in_a_scan_train_as_blocks_one_by_one(family):
    state, losses = two_steps(family, one_device(), scan=True)
    expected, wanted = on_one_device(family)
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)
    assert_same_parameters(state.params, stack_blocks(expected.params))


@pytest.mark.needs("learner.remat")
def test_activations_that_are_computed_again_are_the_same(family):
    state, losses = two_steps(family, one_device(), remat=True)
    expected, wanted = on_one_device(family)
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)
    assert_same_parameters(state.params, expected.params)


@pytest.mark.needs("learner.dtype")
def test_in_bfloat16_it_moves_the_same_way(family):
    """Parameters stay in float32, most products are in bfloat16, and all parameters together move where they do in float32."""
    state, losses = two_steps(family, one_device(), dtype=jnp.bfloat16)
    expected, wanted = on_one_device(family)
    np.testing.assert_allclose(losses, wanted, rtol=0.03)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {leaf.dtype for leaf in jax.tree.leaves(expected.params)}
    begun = variables_at_first(family)["params"]
    flat = lambda params: np.concatenate([np.ravel(a - b) for a, b in zip(*map(jax.tree.leaves, (params, begun)))])
    moved, direction = flat(jax.device_get(state.params)), flat(jax.device_get(expected.params))
    assert moved @ direction > 0.98 * np.linalg.norm(moved) * np.linalg.norm(direction)

    module = changed(family.learner.module, dtype=jnp.bfloat16)
    inputs = family.learner.inputs(family.learner.batches(1)[0])
    products = _products(jax.make_jaxpr(module.apply)(variables_at_first(family), *inputs).jaxpr)
    assert sum(dtype == jnp.bfloat16 for dtype in products) > len(products) / 2


def _products(jaxpr) -> list[np.dtype]:
    """The types of what is multiplied in the matrix products and convolutions of a program."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            found.append(equation.invars[0].aval.dtype)
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr") or hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            found += _products(inner) if hasattr(inner, "eqns") else []
    return found
