"""The feed-forward network learns as torch's does: the same values, gradients, and weights after steps of SGD."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch")

from versus_torch import normal

from jaxdl.models.mlp import LOSSES, MLP, sgd

WIDTHS = (20, 16, 12, 5)


def theirs_with(params: dict) -> "torch.nn.Sequential":
    layers = []
    for index, (inputs, outputs) in enumerate(itertools.pairwise(WIDTHS)):
        linear = torch.nn.Linear(inputs, outputs)
        with torch.no_grad():
            linear.weight.copy_(torch.tensor(np.asarray(params[f"kernel_{index}"]).T))
            linear.bias.copy_(torch.tensor(np.asarray(params[f"bias_{index}"])))
        layers += [linear, torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


@pytest.mark.parametrize("backward", ["hand", "jax"])
def test_five_steps_of_sgd_with_weight_decay(backward):
    images = jnp.asarray(normal(0, (24, 4, 5, 1))[0])
    labels = np.arange(24) % 5
    module, optimizer = MLP(WIDTHS[1:-1], WIDTHS[-1], backward=backward), sgd(optax.constant_schedule(0.3), 0.01)
    params = module.init(jax.random.key(0), images)["params"]
    state = optimizer.init(params)
    theirs = theirs_with(params)
    kernels = [p for p in theirs.parameters() if p.ndim > 1]
    biases = [p for p in theirs.parameters() if p.ndim == 1]
    their_optimizer = torch.optim.SGD([{"params": kernels, "weight_decay": 0.01}, {"params": biases}], lr=0.3)

    @jax.jit
    def step(params, state):
        objective = lambda params: LOSSES[backward](module.apply({"params": params}, images), jnp.asarray(labels))
        loss, gradients = jax.value_and_grad(objective)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss, gradients

    for _ in range(5):
        params, state, loss, gradients = step(params, state)
        their_optimizer.zero_grad()
        expected = torch.nn.functional.cross_entropy(theirs(torch.tensor(np.asarray(images)).flatten(1)), torch.tensor(labels))
        expected.backward()
        np.testing.assert_allclose(loss, expected.item(), rtol=1e-5)
        linears = [layer for layer in theirs if isinstance(layer, torch.nn.Linear)]
        for index, linear in enumerate(linears):
            np.testing.assert_allclose(gradients[f"kernel_{index}"], linear.weight.grad.T, atol=1e-5)
            np.testing.assert_allclose(gradients[f"bias_{index}"], linear.bias.grad, atol=1e-5)
        their_optimizer.step()
        for index, linear in enumerate(linears):
            np.testing.assert_allclose(params[f"kernel_{index}"], linear.weight.detach().T, atol=1e-5)
            np.testing.assert_allclose(params[f"bias_{index}"], linear.bias.detach(), atol=1e-5)
