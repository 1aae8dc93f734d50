"""The small convolutional network equals the same layers of torch, in value and in the gradient of every parameter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from versus_torch import normal

from jaxdl.losses import cross_entropy
from jaxdl.models.lenet import LeNet


@pytest.mark.parametrize("side, colors", [(12, 1), (9, 3)])
def test_loss_and_gradients(side, colors):
    images, labels = normal(0, (4, side, side, colors))[0], np.array([0, 3, 2, 3])
    module = LeNet((5, 7), (6,), num_classes=4)
    params = module.init(jax.random.key(0), jnp.asarray(images))["params"]
    ours = jax.value_and_grad(
        lambda params: cross_entropy(module.apply({"params": params}, jnp.asarray(images)), jnp.asarray(labels))
    )
    loss, gradients = jax.jit(ours)(params)

    tensors = jax.tree.map(lambda leaf: torch.tensor(np.asarray(leaf), requires_grad=True), params)
    x = torch.tensor(images).permute(0, 3, 1, 2)
    for name in ("convolutions_0", "convolutions_1"):
        kernel, bias = tensors[name]["kernel"], tensors[name]["bias"]
        x = torch.nn.functional.conv2d(x, kernel.permute(3, 2, 0, 1), bias, padding="same").relu()
        x = torch.nn.functional.max_pool2d(x, 2)
    x = x.permute(0, 2, 3, 1).flatten(1)
    x = (x @ tensors["dense_0"]["kernel"] + tensors["dense_0"]["bias"]).relu()
    logits = x @ tensors["head"]["kernel"] + tensors["head"]["bias"]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(labels))
    expected.backward()
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(tensors), strict=True):
        np.testing.assert_allclose(ours, theirs.grad, rtol=1e-4, atol=1e-5)
