"""A feed-forward network whose gradients are written out: backpropagation as a chain of vector-Jacobian products (Rumelhart, Hinton and Williams 1986; Goodfellow et al. 2016, section 6.5).

A link of the chain is a function that gives two things: its value, and a `pull`. The pull takes the gradient of the loss by the value back to the gradients by the link's inputs, one for each of them, None for an input that is not learned. Pulls are `Partial`s, so that they are pytrees: what a link keeps in memory for the way back is what its pull is made of, and can be seen there.

`by_hand` gives a link to jax, which then pulls instead of differentiating; `network` and `softmax_cross_entropy` joined that way are a training step in which no gradient is jax's own.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from jaxdl.errors import UserError, unknown
from jaxdl.losses import cross_entropy

Pull = Callable[..., tuple]
Link = Callable[..., tuple[Array, Pull]]
Layer = tuple[Float[Array, "_ _"], Float[Array, "_"]]
"""A kernel (I O) and a bias (O)."""


def affine(x: Float[Array, "B I"], kernel: Float[Array, "I O"], bias: Float[Array, "O"]) -> tuple[Float[Array, "B O"], Pull]:
    """`y = x W + b`. A change of `W[i, o]` changes `y[n, o]` by `x[n, i]`, so that its gradient sums `x[n, i] · ȳ[n, o]` over the batch."""
    return x @ kernel + bias, Partial(_pull_affine, x, kernel)


def _pull_affine(x: Array, kernel: Array, dy: Array) -> tuple[Array, Array, Array]:
    return dy @ kernel.T, x.T @ dy, dy.sum(0)


def relu(x: Float[Array, "B D"]) -> tuple[Float[Array, "B D"], Pull]:
    """`max(x, 0)`, element by element: the gradient comes through where it was positive. At 0, where there is no derivative, it is 0, as jax and torch have it."""
    on = x > 0
    return jnp.where(on, x, 0), Partial(_pull_relu, on)


def _pull_relu(on: Array, dy: Array) -> tuple[Array]:
    return (jnp.where(on, dy, 0),)


def drop(x: Float[Array, "B D"], mask: Float[Array, "B D"]) -> tuple[Float[Array, "B D"], Pull]:
    """`x` times a mask of `dropout_masks`: what was dropped gets no gradient."""
    return x * mask, Partial(_pull_drop, mask)


def _pull_drop(mask: Array, dy: Array) -> tuple[Array, None]:
    return dy * mask, None


def softmax_cross_entropy(logits: Float[Array, "B C"], labels: Int[Array, "B"]) -> tuple[Float[Array, ""], Pull]:
    """Mean over the batch of `−log softmax(logits)[label]`, in nats. The gradient is `(softmax(logits) − one_hot(label)) / B`.

    Taken apart, the softmax's gradient divides by probabilities that may be 0; taken together nothing is divided, and the largest logit is subtracted first, so that no exponential overflows. At least in float32.
    """
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    shifted = wide - wide.max(-1, keepdims=True)
    log_probabilities = shifted - jnp.log(jnp.exp(shifted).sum(-1, keepdims=True))
    loss = -jnp.take_along_axis(log_probabilities, labels[:, None], axis=-1).mean()
    return loss, Partial(_pull_softmax_cross_entropy, log_probabilities, labels, jnp.zeros((0,), logits.dtype))


def _pull_softmax_cross_entropy(log_probabilities: Array, labels: Array, like: Array, dloss: Array) -> tuple[Array, None]:
    target = jax.nn.one_hot(labels, log_probabilities.shape[-1], dtype=log_probabilities.dtype)
    return (dloss * (jnp.exp(log_probabilities) - target) / len(labels)).astype(like.dtype), None


def network(
    x: Float[Array, "B I"], layers: Sequence[Layer], masks: Sequence[Float[Array, "B _"]] = ()
) -> tuple[Float[Array, "B C"], Pull]:
    """The links one after the other, ReLU and dropout after each layer but the last; and the way back, from the last to the first.

    `masks` has one for each hidden layer, or none. The chain is itself a link.
    """
    *hidden, last = layers
    chain = []
    for index, (kernel, bias) in enumerate(hidden):
        x, through_affine = affine(x, kernel, bias)
        x, through_relu = relu(x)
        x, through_drop = drop(x, masks[index]) if masks else (x, None)
        chain.append((through_affine, through_relu, through_drop))
    logits, through_last = affine(x, *last)
    return logits, Partial(_pull_network, chain, through_last)


def _pull_network(chain: Sequence[tuple[Pull, Pull, Pull | None]], through_last: Pull, dlogits: Array) -> tuple:
    dx, *gradient = through_last(dlogits)
    gradients = [tuple(gradient)]
    for through_affine, through_relu, through_drop in reversed(chain):
        if through_drop is not None:
            dx, _ = through_drop(dx)
        (dx,) = through_relu(dx)
        dx, *gradient = through_affine(dx)
        gradients.append(tuple(gradient))
    return dx, gradients[::-1], None


def by_hand(link: Link) -> Callable[..., Array]:
    """A link's value as a function that jax differentiates, in reverse, by the link's own pull."""
    function = jax.custom_vjp(lambda *inputs: link(*inputs)[0])
    function.defvjp(link, lambda pull, gradient: pull(gradient))
    return function


NETWORKS: dict[str, Callable[..., Array]] = {"hand": by_hand(network), "jax": lambda *inputs: network(*inputs)[0]}
"""The network's value with its gradient by the chain above, or by jax, which differentiates the same forward pass itself."""

LOSSES: dict[str, Callable[..., Array]] = {"hand": by_hand(softmax_cross_entropy), "jax": cross_entropy}


def dropout_masks(key: Key[Array, ""], rate: float, rows: int, widths: Sequence[int]) -> list[Float[Array, "B _"]]:
    """For each hidden layer 0 with probability `rate` and `1 / (1 − rate)` elsewhere, so that the mean of what a layer gives stays what it was and evaluation needs no mask (Srivastava et al. 2014, section 10)."""
    keys = jax.random.split(key, len(widths))
    keep = [jax.random.bernoulli(k, 1 - rate, (rows, width)) for k, width in zip(keys, widths)]
    return [kept.astype(jnp.float32) / (1 - rate) for kept in keep]


class MLP(nn.Module):
    """Layers of `hidden` widths with ReLU and dropout, and a last one that gives `num_classes` logits. Inputs of any shape are flattened.

    `backward` says whose gradients are used, the chain's or jax's; values are the same. Kernels start from a normal distribution of variance `2 / fan_in`, cut at two deviations, which ReLUs leave as large as it came (He et al. 2015, eq. 10); biases from 0. The chain is differentiated once and in reverse: for `jax.jvp` or second derivatives choose `"jax"`.
    """

    hidden: Sequence[int] = (256, 128)
    num_classes: int = 10
    dropout: float = 0.0
    backward: Literal["hand", "jax"] = "hand"
    kernel_init: nn.initializers.Initializer = nn.initializers.he_normal()
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B *shape"], *, train: bool = False) -> Float[Array, "B C"]:
        """Logits. In training, `rngs={"dropout": key}` unless `dropout` is 0. Raises `UserError` for a rate outside of [0, 1)."""
        if not 0 <= self.dropout < 1:
            raise UserError(f"a dropout of {self.dropout} is no share to drop: choose from 0 to below 1")
        if self.backward not in NETWORKS:
            raise unknown("backward pass", self.backward, NETWORKS)
        x = x.reshape(len(x), -1)
        layers, inputs = [], x.shape[1]
        for index, outputs in enumerate((*self.hidden, self.num_classes)):
            kernel = self.param(f"kernel_{index}", self.kernel_init, (inputs, outputs), self.param_dtype)
            bias = self.param(f"bias_{index}", nn.initializers.zeros, (outputs,), self.param_dtype)
            layers, inputs = [*layers, (kernel, bias)], outputs
        masks = []
        if train and self.dropout and not self.is_initializing():
            masks = dropout_masks(self.make_rng("dropout"), self.dropout, len(x), self.hidden)
        x, layers, masks = _as_dtype((x, layers, masks), self.dtype)
        return NETWORKS[self.backward](x, layers, masks)


def _as_dtype(arrays: Any, dtype: DTypeLike | None) -> Any:
    """All of them in `dtype`, or in the one that fits all."""
    leaves, structure = jax.tree.flatten(arrays)
    return jax.tree.unflatten(structure, nn.dtypes.promote_dtype(*leaves, dtype=dtype))


def sgd(schedule: optax.Schedule, weight_decay: float = 0.0) -> optax.GradientTransformation:
    """Plain stochastic gradient descent, `W ← W − η (∂loss/∂W + λ W)` with the learning rate `η = schedule(step)`.

    `λ W` is the gradient of the penalty `λ/2 ‖W‖²` (L2); biases, which have one axis, have none. For this rule, unlike for Adam, a penalty in the loss and a decay of the weights are the same (Loshchilov and Hutter 2019, section 2).
    """

    def start(params: optax.Params) -> Int[Array, ""]:
        return jnp.zeros((), jnp.int32)

    def update(gradients: optax.Updates, step: Int[Array, ""], params: optax.Params) -> tuple[optax.Updates, Int[Array, ""]]:
        rate = schedule(step)
        penalised = jax.tree.map(lambda g, w: g + weight_decay * w if w.ndim > 1 else g, gradients, params)
        return jax.tree.map(lambda g: -rate * g, penalised), step + 1

    return optax.GradientTransformation(start, update)
