"""Recurrent networks equal torch's, in value, state and gradient: stacked, in both directions, with packed sequences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from versus_torch import normal, seeds, shapes, small

from jaxdl.nn import Recurrent

CELLS = ("rnn_tanh", "rnn_relu", "lstm", "gru")


def pair(cell, inputs, hidden, num_layers, bidirectional):
    """The same network twice, with torch's initial weights."""
    build = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}.get(cell, torch.nn.RNN)
    options = {"nonlinearity": cell[4:]} if cell.startswith("rnn") else {}
    theirs = build(inputs, hidden, num_layers, batch_first=True, bidirectional=bidirectional, **options)
    return Recurrent(hidden, cell, num_layers, bidirectional), theirs


def params_of(cell, theirs, read):
    """Our parameters from `read(torch's parameter)`: its value, or its gradient."""
    params = {}
    for name in theirs.state_dict():
        if name.startswith("weight_ih_l"):
            suffix = name.removeprefix("weight_ih")
            ih, hh, b_ih, b_hh = (
                np.asarray(read(getattr(theirs, part + suffix))) for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            layer = {"input_kernel": ih.T, "recurrent_kernel": hh.T, "bias": (b_ih, b_hh)}
            if cell == "gru":
                layer["recurrent_bias"] = b_hh[2 * hh.shape[1] :]
            params["layer_" + suffix.removeprefix("_l")] = layer
    return params


def values(cell, theirs):
    params = params_of(cell, theirs, lambda parameter: parameter.detach().numpy())
    for layer in params.values():
        ours, other = layer["bias"]
        third = len(ours) * 2 // 3 if cell == "gru" else len(ours)
        layer["bias"] = np.concatenate([ours[:third] + other[:third], ours[third:]])
    return jax.tree.map(jnp.asarray, params)


def gradients(cell, theirs):
    params = params_of(cell, theirs, lambda parameter: parameter.grad.numpy())
    for layer in params.values():
        layer["bias"] = layer["bias"][0]  # A sum hands its gradient to both terms.
    return params


def compare(cell, inputs, hidden, num_layers, bidirectional, batch, length, lengths, seed):
    torch.manual_seed(seed)
    ours, theirs = pair(cell, inputs, hidden, num_layers, bidirectional)
    states, directions = 1 + (cell == "lstm"), 1 + bidirectional
    x, weight, *rest = normal(
        seed,
        (batch, length, inputs),
        (batch, length, directions * hidden),
        *[(num_layers * directions, batch, hidden)] * 2 * states,
    )
    start, pull = rest[:states], rest[states:]

    def loss(params, x, start):
        state = tuple(start) if cell == "lstm" else start[0]
        y, state = ours.apply({"params": params}, x, state, lengths=None if lengths is None else jnp.asarray(lengths))
        total = (y * weight).sum() + sum((a * b).sum() for a, b in zip(jax.tree.leaves(state), pull, strict=True))
        return total, (y, state)

    step = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
    (_, (y, state)), got = step(values(cell, theirs), jnp.asarray(x), [jnp.asarray(leaf) for leaf in start])

    tensors = [torch.tensor(array, requires_grad=True) for array in (x, *start)]
    given_state = tuple(tensors[1:]) if cell == "lstm" else tensors[1]
    if lengths is None:
        out, end = theirs(tensors[0], given_state)
    else:
        pack, unpack = torch.nn.utils.rnn.pack_padded_sequence, torch.nn.utils.rnn.pad_packed_sequence
        packed = pack(tensors[0], torch.tensor(lengths), batch_first=True, enforce_sorted=False)
        packed, end = theirs(packed, given_state)
        out, _ = unpack(packed, batch_first=True, total_length=length)
    ends = end if cell == "lstm" else (end,)
    total = (out * torch.tensor(weight)).sum() + sum((a * torch.tensor(b)).sum() for a, b in zip(ends, pull, strict=True))
    total.backward()

    def same(ours, theirs):
        theirs = np.asarray(theirs)
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * max(1, np.abs(theirs).max()))

    same(y, out.detach())
    jax.tree.map(lambda a, b: same(a, b.detach()), tuple(jax.tree.leaves(state)), tuple(ends))
    jax.tree.map(same, got[0], gradients(cell, theirs))
    same(got[1], tensors[0].grad)
    jax.tree.map(same, got[2], [tensor.grad for tensor in tensors[1:]])


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("num_layers", "bidirectional"), [(1, False), (2, True)])
@pytest.mark.parametrize("packed", [False, True])
def test_values_states_and_gradients(cell, num_layers, bidirectional, packed):
    compare(cell, 3, 4, num_layers, bidirectional, 3, 6, np.asarray([4, 1, 6]) if packed else None, seed=0)


@shapes
@given(
    cell=st.sampled_from(CELLS),
    inputs=small,
    hidden=small,
    batch=small,
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    bidirectional=st.booleans(),
    seed=seeds.filter(lambda seed: seed > 0),
)
def test_any_shape_with_any_lengths(cell, inputs, hidden, batch, lengths, bidirectional, seed):
    lengths = np.asarray([lengths[i % len(lengths)] for i in range(batch)])
    compare(cell, inputs, hidden, 1, bidirectional, batch, 7, lengths, seed)


@pytest.mark.parametrize("cell", CELLS)
def test_a_hundred_steps_stay_equal(cell):
    compare(cell, 8, 16, 1, False, 2, 100, None, seed=1)
