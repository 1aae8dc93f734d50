"""Recurrent networks: the cells (vanilla, LSTM, GRU) as plain functions, one scan under all of them, and modules around it.

| `cell` | gates, in the order of the kernels' blocks of `H` columns | state |
|---|---|---|
| `"rnn_tanh"`, `"rnn_relu"` | one | `h` |
| `"lstm"` | input, forget, candidate, output | `(h, c)` |
| `"gru"`, `"gru_reset_before"` | reset, update, candidate | `h` |

This is the order of torch and cuDNN, so that `input_kernel`, `recurrent_kernel` are `weight_ih.T`, `weight_hh.T`, and `bias` is `bias_ih + bias_hh`. Only in `"gru"` the two biases of the candidate do not add up: `recurrent_bias` is the last third of `bias_hh`.

Gates and states are in float32 or wider, whatever the dtype of the products: a cell state sums over all of time.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxdl.errors import UserError, unknown

Cell = Literal["rnn_tanh", "rnn_relu", "lstm", "gru", "gru_reset_before"]
"""Which equations; see the head of the file."""

State = Float[Array, "*layers B H"] | tuple[Float[Array, "*layers B H"], Float[Array, "*layers B H"]]
"""What goes from step to step: `h`, or `(h, c)` of an LSTM."""

_GATES = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 3, "gru_reset_before": 3}


def _hidden(state: State) -> Array:
    return state[0] if isinstance(state, tuple) else state


def _sigmoid(x: Array) -> Array:
    """σ(x) = (1 + tanh(x/2)) / 2: XLA's CPU has a fast tanh, and a logistic with an exponential and a division."""
    return 0.5 * jnp.tanh(0.5 * x) + 0.5


# A state's update from `projected`, the input's contribution to all gates, and `recurrent`, that of the state before. ---------


def _rnn_update(activation: Callable[[Array], Array], hidden: Array, projected: Array, recurrent: Array) -> Array:
    return activation(projected + recurrent)


def _lstm_update(state: tuple[Array, Array], projected: Array, recurrent: Array) -> tuple[Array, Array]:
    _, memory = state
    # One tanh over all four blocks, of x/2 where the gate is a sigmoid: twice as fast on a CPU as four fused into one loop.
    half = jnp.repeat(jnp.asarray([0.5, 0.5, 1.0, 0.5], projected.dtype), memory.shape[-1])
    enter, forget, candidate, output = jnp.split(jnp.tanh(half * (projected + recurrent)), 4, axis=-1)
    memory = 0.5 * ((forget + 1) * memory + (enter + 1) * candidate)
    return 0.5 * (output + 1) * jnp.tanh(memory), memory


def _gru_update(hidden: Array, projected: tuple[Array, Array, Array], recurrent: Array) -> Array:
    # `split`, whose transpose is a concatenation: that of a slice is a sum of padded arrays, which no CPU vectorises.
    reset, update, candidate = jnp.split(recurrent, 3, axis=-1)
    reset, update = _sigmoid(projected[0] + reset), _sigmoid(projected[1] + update)
    candidate = jnp.tanh(projected[2] + reset * candidate)
    return candidate + update * (hidden - candidate)


_UPDATES = {
    "rnn_tanh": functools.partial(_rnn_update, jnp.tanh),
    "rnn_relu": functools.partial(_rnn_update, jax.nn.relu),
    "lstm": _lstm_update,
    "gru": _gru_update,
}


def _product(x: Array, kernel: Array) -> Array:
    """`x kernel` with factors in the kernel's dtype and the sum in float32 or wider."""
    return jnp.matmul(x.astype(kernel.dtype), kernel, preferred_element_type=jnp.promote_types(kernel.dtype, jnp.float32))


def _blocks(cell: Cell, projected: Array) -> Array | tuple[Array, ...]:
    """`projected` as a step takes it: a GRU's three blocks one by one, since XLA's CPU does not vectorise reading blocks of one step of an array of all steps; the other cells use all their blocks alike."""
    return tuple(jnp.split(projected, 3, axis=-1)) if cell == "gru" else projected


def _advance(cell: Cell, kernel: Array, bias: Array | None, state: State, projected: Array | tuple[Array, ...]) -> State:
    """One step of any cell."""
    if cell == "gru_reset_before":
        width = 2 * state.shape[-1]
        reset, update = jnp.split(_sigmoid(projected[..., :width] + _product(state, kernel[:, :width])), 2, axis=-1)
        candidate = jnp.tanh(projected[..., width:] + _product(reset * state, kernel[:, width:]))
        return candidate + update * (state - candidate)
    recurrent = _product(_hidden(state), kernel)
    return _UPDATES[cell](state, projected, recurrent if bias is None else recurrent + bias)


def rnn_cell(
    input_kernel: Float[Array, "D H"],
    recurrent_kernel: Float[Array, "H H"],
    bias: Float[Array, "H"],
    hidden: Float[Array, "B H"],
    x: Float[Array, "B D"],
    activation: Literal["tanh", "relu"] = "tanh",
) -> Float[Array, "B H"]:
    """`h' = activation(x W + h U + b)` (Elman 1990; with ReLU, Le et al. 2015, who start `U` from the identity)."""
    if activation not in ("tanh", "relu"):
        raise unknown("activation of a recurrent cell", activation, ("tanh", "relu"))
    name: Cell = "rnn_tanh" if activation == "tanh" else "rnn_relu"
    return _advance(name, recurrent_kernel, None, hidden, _product(x, input_kernel) + bias)


def lstm_cell(
    input_kernel: Float[Array, "D G"],
    recurrent_kernel: Float[Array, "H G"],
    bias: Float[Array, "G"],
    state: tuple[Float[Array, "B H"], Float[Array, "B H"]],
    x: Float[Array, "B D"],
) -> tuple[Float[Array, "B H"], Float[Array, "B H"]]:
    """Long short-term memory (Hochreiter and Schmidhuber 1997) with a forget gate (Gers et al. 2000) and no peepholes: `(h, c)` to `(h', c')`.

    With `(i, f, g, o)` the four blocks of `x W + h U + b`: `c' = σ(f) ⊙ c + σ(i) ⊙ tanh(g)`, `h' = σ(o) ⊙ tanh(c')`.
    """
    return _advance("lstm", recurrent_kernel, None, state, _product(x, input_kernel) + bias)


def gru_cell(
    input_kernel: Float[Array, "D G"],
    recurrent_kernel: Float[Array, "H G"],
    bias: Float[Array, "G"],
    hidden: Float[Array, "B H"],
    x: Float[Array, "B D"],
    recurrent_bias: Float[Array, "H"] | None = None,
    reset: Literal["after", "before"] = "after",
) -> Float[Array, "B H"]:
    """Gated recurrent unit: `h' = (1 − z) ⊙ n + z ⊙ h` with `r = σ(x Wᵣ + h Uᵣ + bᵣ)` and `z = σ(x W_z + h U_z + b_z)` (Cho et al. 2014, eq. 5 to 8).

    The candidate `n` is `tanh(x Wₙ + bₙ + r ⊙ (h Uₙ + recurrent_bias))` where the reset comes after the product, as in torch and cuDNN: one product for all gates. In the paper it comes before, `tanh(x Wₙ + bₙ + (r ⊙ h) Uₙ)`, and there is no second bias. Weights of one do not serve the other.

    Chung et al. 2014 exchange `z` and `1 − z`. Raises `UserError` for another `reset`, or for a second bias with `"before"`.
    """
    if reset not in ("after", "before"):
        raise unknown("place of the reset gate", reset, ("after", "before"))
    if reset == "before" and recurrent_bias is not None:
        raise UserError("with `reset='before'` the candidate has one bias: add `recurrent_bias` to the last third of `bias`")
    name: Cell = "gru" if reset == "after" else "gru_reset_before"
    bias_of_product = None if recurrent_bias is None else jnp.pad(recurrent_bias, (2 * len(recurrent_bias), 0))
    return _advance(name, recurrent_kernel, bias_of_product, hidden, _blocks(name, _product(x, input_kernel) + bias))


# The scan over time. -----------------------------------------------------------------------------------------------------------


def _where(mask: Array | None, state: State, other: State) -> State:
    return state if mask is None else jax.tree.map(lambda a, b: jnp.where(mask, a, b), state, other)


def _cut(mask: Array | None, state: State) -> State:
    """The same values, constants to the gradient where the mask is true."""
    return state if mask is None else _where(mask, jax.lax.stop_gradient(state), state)


Masks = tuple[Bool[Array, "*time B 1"] | None, Bool[Array, "*time #B 1"] | None]
"""Where a sequence is not over yet, and where the gradient is cut."""


class _Weights(NamedTuple):
    """The parameters of a cell, the second bias as wide as the product that it is added to."""

    input_kernel: Array
    kernel: Array
    bias: Array
    recurrent_bias: Array | None


def _project(input_kernel: Array, bias: Array, x: Array) -> Array:
    """`x W + b` of all these steps at once, and flat: XLA's CPU contracts one axis half as fast again as two, as the gradient of the kernel would."""
    projected = _product(x.reshape(-1, x.shape[-1]), input_kernel) + bias
    return projected.reshape(*x.shape[:-1], -1)


def _plain_scan(
    cell: Cell, reverse: bool, unroll: int, weights: _Weights, x: Array, state: State, masks: Masks
) -> tuple[State, Array]:
    """The last state, and the hidden state after every step."""
    input_kernel, kernel, bias, recurrent_bias = weights

    def step(state: State, inputs: tuple) -> tuple[State, Array]:
        projected, (keep, cut) = inputs
        state = _where(keep, _advance(cell, kernel, recurrent_bias, _cut(cut, state), projected), state)
        return state, _hidden(state)

    projected = _blocks(cell, _project(input_kernel, bias, x))
    return jax.lax.scan(step, state, (projected, masks), reverse=reverse, unroll=unroll)


_PART = 2**19
"""Numbers that inputs are projected to at once where there is no gradient. Of 2**18 to 2**21 the fastest on two cores of an EPYC for 32 sequences and 256 features, whatever the cell: fewer make slow products, and more have left the cache when their steps come."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _fast_scan(
    cell: Cell, reverse: bool, unroll: int, weights: _Weights, x: Array, state: State, masks: Masks
) -> tuple[State, Array]:
    """`_plain_scan`, whose transpose by JAX adds `h_{t−1}ᵀ δ_t` to the kernel's gradient in every step: here the `δ_t` are kept, and one product sums over all of time."""
    length, batch = x.shape[:2]
    least = -(-_PART // max(batch * len(weights.bias), 1))
    steps = next((n for n in range(least, length) if length % n == 0), length or 1)

    def some_steps(state: State, inputs: tuple[Array, Masks]) -> tuple[State, Array]:
        return _plain_scan(cell, reverse, unroll, weights, inputs[0], state, inputs[1])

    parts = jax.tree.map(lambda leaf: leaf.reshape(length // steps, steps, *leaf.shape[1:]), (x, masks))
    last, hidden = jax.lax.scan(some_steps, state, parts, reverse=reverse)
    return last, hidden.reshape(length, *hidden.shape[2:])


def _pullback(
    cell: Cell, masks: Masks, before: State, projected: Array | tuple[Array, ...], recurrent: Array
) -> tuple[State, Callable]:
    """One step's update as a function of its three arrays, and the transpose of its derivative."""
    keep, cut = masks

    def update(before: State, projected: Array | tuple[Array, ...], recurrent: Array) -> State:
        return _where(keep, _UPDATES[cell](_cut(cut, before), projected, recurrent), before)

    return jax.vjp(update, before, projected, recurrent)


def _fast_forward(
    cell: Cell, reverse: bool, unroll: int, weights: _Weights, x: Array, state: State, masks: Masks
) -> tuple[tuple[State, Array], tuple]:
    input_kernel, kernel, bias, recurrent_bias = weights
    projected, unproject = jax.vjp(_project, input_kernel, bias, x)
    projected = _blocks(cell, projected)

    def step(before: State, inputs: tuple) -> tuple[State, tuple]:
        projected, masks = inputs
        recurrent = _product(_hidden(_cut(masks[1], before)), kernel)
        recurrent = recurrent if recurrent_bias is None else recurrent + recurrent_bias
        state, pull = _pullback(cell, masks, before, projected, recurrent)
        # An LSTM's activations are computed again on the way back: on a CPU that is cheaper than to write and read its residuals.
        return state, (_hidden(state), before if cell == "lstm" else _hidden(before), recurrent if cell == "lstm" else pull)

    last, (hidden, before, kept) = jax.lax.scan(step, state, (projected, masks), reverse=reverse, unroll=unroll)
    return (last, hidden), (kernel, recurrent_bias, unproject, projected if cell == "lstm" else None, masks, before, kept)


def _fast_backward(cell: Cell, reverse: bool, unroll: int, residuals: tuple, cotangents: tuple) -> tuple:
    kernel, recurrent_bias, unproject, projected, masks, before, kept = residuals
    d_last, d_hidden = cotangents
    transposed = kernel.T

    def add(d_state: State, d_hidden: Array) -> State:
        return (d_state[0] + d_hidden, d_state[1]) if isinstance(d_state, tuple) else d_state + d_hidden

    def step(d_state: State, inputs: tuple) -> tuple[State, tuple]:
        projected, kept, before, d_hidden, masks = inputs
        pull = _pullback(cell, masks, before, projected, kept)[1] if cell == "lstm" else kept
        d_before, d_projected, d_recurrent = pull(add(d_state, d_hidden))
        passed = _product(d_recurrent, transposed)
        passed = passed if masks[1] is None else jnp.where(masks[1], 0, passed)
        # But for a GRU the two meet as a sum, and their cotangents are one array.
        return add(d_before, passed), (jnp.concatenate(d_projected, -1), d_recurrent) if cell == "gru" else (d_recurrent,)

    inputs = (projected, kept, before, d_hidden, masks)
    d_state, (d_projected, *rest) = jax.lax.scan(step, d_last, inputs, reverse=not reverse, unroll=unroll)
    (d_recurrent,) = rest or [d_projected]
    # Flat, as in `_project`.
    hidden = _hidden(_cut(masks[1], before)).reshape(-1, len(kernel)).astype(kernel.dtype)
    flat = d_recurrent.reshape(-1, d_recurrent.shape[-1])
    d_kernel = _product(hidden.T, flat.astype(kernel.dtype)).astype(kernel.dtype)
    d_recurrent_bias = None if recurrent_bias is None else flat.sum(0).astype(recurrent_bias.dtype)
    d_input_kernel, d_bias, d_x = unproject(d_projected)
    return _Weights(d_input_kernel, d_kernel, d_bias, d_recurrent_bias), d_x, d_state, None


_fast_scan.defvjp(_fast_forward, _fast_backward)


def recurrence(
    cell: Cell,
    input_kernel: Float[Array, "D G"],
    recurrent_kernel: Float[Array, "H G"],
    bias: Float[Array, "G"],
    state: State,
    x: Float[Array, "T B D"],
    recurrent_bias: Float[Array, "H"] | None = None,
    *,
    lengths: Int[Array, "B"] | None = None,
    reverse: bool = False,
    truncate: int | None = None,
    forward_mode: bool = False,
    unroll: int = 1,
) -> tuple[Float[Array, "T B H"], State]:
    """Runs a cell over time: its parameters, a state, and the inputs of all steps in; the hidden states and the last state out.

    Time comes first. Inputs meet their kernel many steps at a time: all of them where there is a gradient, and otherwise, if the length can be divided so, in parts of some 2 MiB, which are still in the cache when their steps come. `lengths` ends each sequence where it ends: the state stands still from there on, outputs are 0, and nothing in the padding matters that is a number. With `reverse` each sequence starts from its own last step, and the state after its first is the last state. A sequence of length 0 returns the state it was given.

    `truncate=k` cuts the gradient every `k` steps, counted from where each sequence starts: the values stay, but the states after steps k, 2k, … are constants to what follows (truncated backpropagation; Williams and Peng 1990, with `k' = k`). The gradient reaches `state` from the first `k` steps.

    The gradient with respect to the kernel is one matrix product over all of time, which needs a rule of its own, and such a rule has no forward mode: take `forward_mode` for `jax.jvp`, `jax.jacfwd` and `jax.hessian`, at the speed of a plain scan. Gradients of gradients work with both. `"gru_reset_before"` has two products a step and is always plain. Raises `UserError` for an unknown cell, or `truncate` below 1.
    """
    if cell not in _GATES:
        raise unknown("recurrent cell", cell, _GATES)
    if truncate is not None and truncate < 1:
        raise UserError(f"the gradient cannot be cut every {truncate} steps: give `truncate` a number from 1, or None")
    time = jnp.arange(len(x))[:, None, None]
    end = len(x) if lengths is None else lengths[:, None]
    keep = None if lengths is None else time < end
    since = end - 1 - time if reverse else time
    cut = None if truncate is None else (since > 0) & (since % truncate == 0)
    if recurrent_bias is not None:
        recurrent_bias = jnp.pad(recurrent_bias, (recurrent_kernel.shape[-1] - len(recurrent_bias), 0))
    weights = _Weights(input_kernel, recurrent_kernel, bias, recurrent_bias)
    scan = _plain_scan if forward_mode or cell == "gru_reset_before" else _fast_scan
    state = jax.tree.map(lambda leaf: leaf.astype(jnp.result_type(jnp.float32, input_kernel, bias)), state)
    last, hidden = scan(cell, reverse, unroll, weights, x, state, (keep, cut))
    return hidden if keep is None else jnp.where(keep, hidden, 0), last


# Modules. ----------------------------------------------------------------------------------------------------------------------

Initialization = Literal["orthogonal", "torch"]
"""How the parameters of `Recurrent` start."""


class _Direction(nn.Module):
    """One layer in one direction, time first."""

    cell: Cell
    hidden: int
    initialization: Initialization
    forget_bias: float
    reverse: bool
    truncate: int | None
    forward_mode: bool
    unroll: int
    dtype: DTypeLike | None
    param_dtype: DTypeLike

    def _kernel(self, orthogonal: Callable) -> Callable:
        """Gate by gate: an orthogonal `H × 4H` kernel would be orthogonal for none of its gates."""
        gates, bound = _GATES[self.cell], self.hidden**-0.5

        def init(key: PRNGKeyArray, inputs: int) -> Array:
            if self.initialization == "torch":
                return jax.random.uniform(key, (inputs, gates * self.hidden), self.param_dtype, -bound, bound)
            keys = jax.random.split(key, gates)
            return jnp.concatenate([orthogonal(key, (inputs, self.hidden), self.param_dtype) for key in keys], axis=-1)

        return init

    def _bias(self, key: PRNGKeyArray, width: int, terms: int = 2) -> Array:
        """Torch draws `bias_ih` and `bias_hh` alike, and their sum is what we keep."""
        if self.initialization == "orthogonal":
            return jnp.zeros(width, self.param_dtype)
        bound = self.hidden**-0.5
        return jax.random.uniform(key, (terms, width), self.param_dtype, -bound, bound).sum(0)

    def _input_bias(self, key: PRNGKeyArray) -> Array:
        bias = self._bias(key, _GATES[self.cell] * self.hidden)
        if self.cell == "lstm":
            return bias.at[self.hidden : 2 * self.hidden].add(self.forget_bias)
        if self.cell == "gru":
            return bias.at[2 * self.hidden :].set(self._bias(key, self.hidden, terms=1))
        return bias

    @nn.compact
    def __call__(
        self, x: Float[Array, "T B D"], state: State, lengths: Int[Array, "B"] | None
    ) -> tuple[Float[Array, "T B H"], State]:
        input_kernel = self.param("input_kernel", self._kernel(nn.initializers.lecun_normal()), x.shape[-1])
        recurrent_kernel = self.param("recurrent_kernel", self._kernel(nn.initializers.orthogonal()), self.hidden)
        bias = self.param("bias", self._input_bias)
        recurrent_bias = self.param("recurrent_bias", self._bias, self.hidden, 1) if self.cell == "gru" else None
        dtype = self.dtype or x.dtype
        return recurrence(
            self.cell,
            input_kernel.astype(dtype),
            recurrent_kernel.astype(dtype),
            bias,
            state,
            x,
            recurrent_bias,
            lengths=lengths,
            reverse=self.reverse,
            truncate=self.truncate,
            forward_mode=self.forward_mode,
            unroll=self.unroll,
        )


class Recurrent(nn.Module):
    """Stacked layers of a `cell`, in one direction or both: sequences and a state in, the last layer's outputs and the new state out.

    The state is that of torch: `num_layers · directions` first, each layer's forward direction before its backward one; zeros where none is given. Both directions' outputs are side by side. `dropout` falls on what one layer hands to the next, so with one layer on nothing.

    `initialization` is `"orthogonal"` (each gate's recurrent matrix is orthogonal, Saxe et al. 2014; LeCun normal for the inputs; biases of 0; as in Flax) or `"torch"` (everything uniform within ±1/√hidden). `forget_bias` is added to the initial bias of an LSTM's forget gate: 1 lets it remember from the start (Gers et al. 2000; Jozefowicz et al. 2015, section 5, recommend 1 always), torch has 0.

    To train on a stream in chunks (truncated backpropagation), hand `jax.lax.stop_gradient(state)` of one chunk to the next. `truncate`, `forward_mode` and `unroll` are those of `recurrence`: the first does the same inside one long sequence.

    Raises `UserError` for an unknown cell or initialisation, fewer than one layer, or a state of another shape.
    """

    hidden: int
    cell: Cell = "lstm"
    num_layers: int = 1
    bidirectional: bool = False
    dropout: float = 0.0
    initialization: Initialization = "orthogonal"
    forget_bias: float = 1.0
    truncate: int | None = None
    forward_mode: bool = False
    unroll: int = 1
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    def initial_state(self, batch_size: int) -> State:
        """Zeros, in float32 or wider."""
        shape = (self.num_layers * (1 + self.bidirectional), batch_size, self.hidden)
        zeros = jnp.zeros(shape, jnp.promote_types(self.dtype or self.param_dtype, jnp.float32))
        return (zeros, zeros) if self.cell == "lstm" else zeros

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: State | None = None,
        *,
        lengths: Int[Array, "B"] | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "B T O"], State]:
        """`lengths` counts the steps of each sequence that are not padding; the outputs after them are 0, and the state is that of the last of them."""
        if self.cell not in _GATES:
            raise unknown("recurrent cell", self.cell, _GATES)
        if self.initialization not in get_args(Initialization):
            raise unknown("initialisation of a recurrent network", self.initialization, get_args(Initialization))
        if self.num_layers < 1:
            raise UserError(f"a recurrent network of {self.num_layers} layers has no output: give `num_layers` a number from 1")
        zeros = self.initial_state(len(x))
        if state is not None and jax.tree.map(jnp.shape, state) != jax.tree.map(jnp.shape, zeros):
            given, wanted = (jax.tree.map(jnp.shape, tree) for tree in (state, zeros))
            raise UserError(
                f"the state has the shape {given}, and this network's is {wanted}: layers · directions, batch, hidden"
            )
        state = zeros if state is None else state

        dtype = self.dtype or x.dtype
        if lengths is not None:  # What is not a number in the padding would survive a product with 0.
            x = jnp.where((jnp.arange(x.shape[1]) < lengths[:, None])[..., None], x, 0)
        x = x.swapaxes(0, 1)
        last: list[State] = []
        for layer in range(self.num_layers):
            outputs = []
            for reverse in (False, True)[: 1 + self.bidirectional]:
                direction = _Direction(
                    self.cell,
                    self.hidden,
                    self.initialization,
                    self.forget_bias,
                    reverse,
                    self.truncate,
                    self.forward_mode,
                    self.unroll,
                    dtype,
                    self.param_dtype,
                    name=f"layer_{layer}" + "_reverse" * reverse,
                )
                start = jax.tree.map(lambda leaf, index=len(last): leaf[index], state)
                output, end = direction(x, start, lengths)
                outputs.append(output.astype(dtype))
                last.append(end)
            x = jnp.concatenate(outputs, axis=-1)
            if layer + 1 < self.num_layers:
                x = nn.Dropout(self.dropout)(x, deterministic=not train)
        return x.swapaxes(0, 1), jax.tree.map(lambda *leaves: jnp.stack(leaves), *last)


Mode = Literal["1:1", "1:n", "n:1", "n:n"]
"""How many steps a `SequenceModel` reads, and how many it answers."""


def _as_is(output: Array, key: PRNGKeyArray | None) -> Array:
    return output


class SequenceModel(nn.Module):
    """A `Recurrent` with a linear map of its output, used in one of four ways (Karpathy 2015) with the same parameters: train as `"n:n"`, generate by `model.clone(mode="1:n")`.

    | `mode` | `x` | result |
    |---|---|---|
    | `"1:1"` | `B D` | `B F`, after one step |
    | `"1:n"` | `B D` | `B steps F`: what was generated, each step reading the one before |
    | `"n:1"` | `B T D` | `B F`, from the last layer's last state, of both directions where there are two |
    | `"n:n"` | `B T D` | `B T F` |

    In `"1:n"` the function `emit` turns the linear map's output into what is generated and read next: as it is by default, or for instance a one-hot vector drawn with the key that it also gets (None where `apply` was given no `rngs={"emit": key}`). The state comes out as the second result, and can go in.

    Raises `UserError` for an unknown mode, for `"1:n"` without `steps` or with two directions (one of them would have to read the future), and for `steps` or `lengths` where they mean nothing.
    """

    core: Recurrent
    features: int
    mode: Mode = "n:n"
    emit: Callable[[Array, PRNGKeyArray | None], Array] = _as_is

    def setup(self) -> None:
        self.head = nn.Dense(self.features, dtype=self.core.dtype, param_dtype=self.core.param_dtype)

    def __call__(
        self,
        x: Float[Array, "B D"] | Float[Array, "B T D"],
        state: State | None = None,
        *,
        steps: int | None = None,
        lengths: Int[Array, "B"] | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "B F"] | Float[Array, "B T F"], State]:
        if self.mode not in get_args(Mode):
            raise unknown("mode of a sequence model", self.mode, get_args(Mode))
        if x.ndim != (2 if self.mode.startswith("1") else 3):
            raise UserError(
                f"mode {self.mode!r} reads `{'B D' if self.mode.startswith('1') else 'B T D'}`, and was given {x.shape}"
            )
        if (steps is not None) != (self.mode == "1:n"):
            raise UserError(f"`steps` belongs to the mode '1:n' and only to it: given {steps} in mode {self.mode!r}")
        if lengths is not None and self.mode.startswith("1"):
            raise UserError(f"mode {self.mode!r} reads one step: `lengths` means nothing")
        if steps is not None:
            return self._generate(x, state, steps, train)

        outputs, state = self.core(x if x.ndim == 3 else x[:, None], state, lengths=lengths, train=train)
        if self.mode == "n:1":
            ends = _hidden(state)[-1 - self.core.bidirectional :]
            outputs = jnp.concatenate(list(ends), axis=-1).astype(outputs.dtype)
        elif self.mode == "1:1":
            outputs = outputs[:, 0]
        return self.head(outputs), state

    def _generate(
        self, x: Float[Array, "B D"], state: State | None, steps: int, train: bool
    ) -> tuple[Float[Array, "B T F"], State]:
        if self.core.bidirectional:
            raise UserError("a network of both directions cannot generate: the backward one would have to read the future")

        def step(model: SequenceModel, carried: tuple[State, Array], _: None) -> tuple[tuple[State, Array], Array]:
            state, x = carried
            output, state = model.core(x[:, None], state, train=train)
            emitted = model.emit(model.head(output[:, 0]), model.make_rng("emit") if model.has_rng("emit") else None)
            if emitted.shape != x.shape:
                raise UserError(f"`emit` gives {emitted.shape}, and the next step reads {x.shape}: they must be the same")
            return (state, emitted.astype(x.dtype)), emitted

        scan = nn.scan(
            step,
            variable_broadcast="params",
            split_rngs={"params": False, "dropout": True, "emit": True},
            out_axes=1,
            length=steps,
        )
        (state, _), outputs = scan(self, (self.core.initial_state(len(x)) if state is None else state, x), None)
        return outputs, state
