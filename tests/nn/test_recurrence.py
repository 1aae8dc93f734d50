"""What holds for recurrent networks without torch: loops in numpy, Flax's cells, hand-cut gradients, masks and modes."""

import functools
import inspect
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis_profiles import few

from jaxdl.errors import UserError
from jaxdl.nn import Recurrent, SequenceModel, gru_cell, lstm_cell, recurrence, rnn_cell

CELLS = ("rnn_tanh", "rnn_relu", "lstm", "gru", "gru_reset_before")
GATES = dict(zip(CELLS, (1, 1, 4, 3, 3), strict=True))


def sigma(x):
    return 1 / (1 + np.exp(-x))


def numpy_step(cell, h, c, x, w, u, b, candidate_bias):
    """The equations, one gate and one unit of time at a time."""
    wx, blocks = [x @ part for part in np.split(w, GATES[cell], -1)], np.split(u, GATES[cell], -1)
    bias = np.split(b, GATES[cell])
    if cell == "rnn_tanh":
        return np.tanh(wx[0] + h @ blocks[0] + bias[0]), c
    if cell == "rnn_relu":
        return np.maximum(wx[0] + h @ blocks[0] + bias[0], 0), c
    if cell == "lstm":
        i, f, g, o = (a + h @ m + d for a, m, d in zip(wx, blocks, bias, strict=True))
        c = sigma(f) * c + sigma(i) * np.tanh(g)
        return sigma(o) * np.tanh(c), c
    r = sigma(wx[0] + h @ blocks[0] + bias[0])
    z = sigma(wx[1] + h @ blocks[1] + bias[1])
    inner = r * (h @ blocks[2] + candidate_bias) if cell == "gru" else (r * h) @ blocks[2]
    return (1 - z) * np.tanh(wx[2] + bias[2] + inner) + z * h, c


def numpy_run(cell, params, x, lengths, reverse=False):
    """Outputs `B T H` and the last `h` and `c`, sequence by sequence."""
    w, u, b = (np.float64(params[key]) for key in ("input_kernel", "recurrent_kernel", "bias"))
    candidate_bias = np.float64(params.get("recurrent_bias", 0))
    out = np.zeros((*x.shape[:2], len(u)))
    ends = []
    for n, length in enumerate(lengths):
        h = c = np.zeros(len(u))
        for t in range(length)[:: -1 if reverse else 1]:
            h, c = numpy_step(cell, h, c, x[n, t], w, u, b, candidate_bias)
            out[n, t] = h
        ends.append((h, c))
    return out, *np.moveaxis(np.asarray(ends), 1, 0)


def random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def noisy(variables, seed=0):
    """All parameters random, biases too: a bias of 0 hides its mistakes."""
    leaves, tree = jax.tree.flatten(variables)
    return jax.tree.unflatten(
        tree, [jnp.asarray(0.5 * random(seed + i, *leaf.shape), leaf.dtype) for i, leaf in enumerate(leaves)]
    )


def build(module, x, seed=0):
    return noisy(jax.eval_shape(module.init, jax.random.key(0), x), seed)


@pytest.mark.parametrize("cell", CELLS)
def test_stacked_and_bidirectional_layers_equal_loops_in_numpy_to_ten_digits(cell):
    with jax.enable_x64(True):
        x, lengths = random(1, 3, 5, 2), np.asarray([5, 0, 3])
        module = Recurrent(4, cell, num_layers=2, bidirectional=True, param_dtype=jnp.float64)
        variables = build(module, jnp.asarray(x))
        y, state = jax.jit(module.apply)(variables, jnp.asarray(x), lengths=jnp.asarray(lengths))
        expected, ends = x, []
        for layer in range(2):
            runs = [
                numpy_run(cell, variables["params"][f"layer_{layer}{'_reverse' * reverse}"], expected, lengths, reverse)
                for reverse in (False, True)
            ]
            expected = np.concatenate([run[0] for run in runs], axis=-1)
            ends += [run[1:] for run in runs]
        np.testing.assert_allclose(y, expected, rtol=1e-11, atol=1e-12)
        h, c = np.moveaxis(np.asarray(ends), 1, 0)
        for leaf, want in zip(jax.tree.leaves(state), (h, c), strict=False):
            np.testing.assert_allclose(leaf, want, rtol=1e-11, atol=1e-12)


@few(2)
@given(
    length=st.integers(1, 6),
    batch=st.integers(1, 3),
    inputs=st.integers(1, 4),
    hidden=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 9),
)
def test_cells_are_one_step_of_the_scan(length, batch, inputs, hidden, seed):
    x = jnp.asarray(random(seed, batch, length, inputs), jnp.float32)
    for cell in CELLS:
        module = Recurrent(hidden, cell)
        variables = build(module, x, seed)
        p = variables["params"]["layer_0"]
        state = jax.tree.map(lambda leaf: leaf[0], module.initial_state(batch))
        for t in range(length):
            if cell == "lstm":
                state = lstm_cell(p["input_kernel"], p["recurrent_kernel"], p["bias"], state, x[:, t])
            elif cell.startswith("rnn"):
                state = rnn_cell(p["input_kernel"], p["recurrent_kernel"], p["bias"], state, x[:, t], cell[4:])
            else:
                second = (p["recurrent_bias"], "after") if cell == "gru" else (None, "before")
                state = gru_cell(p["input_kernel"], p["recurrent_kernel"], p["bias"], state, x[:, t], *second)
        for ours, want in zip(jax.tree.leaves(module.apply(variables, x)[1]), jax.tree.leaves(state), strict=True):
            np.testing.assert_allclose(ours[0], want, rtol=1e-5, atol=1e-6)


def flax_params(cell, p):
    blocks = {key: np.split(p[key], GATES[cell], -1) for key in ("input_kernel", "recurrent_kernel", "bias")}
    if cell == "rnn_tanh":
        return {"i": {"kernel": p["input_kernel"], "bias": p["bias"]}, "h": {"kernel": p["recurrent_kernel"]}}
    letters = "ifgo" if cell == "lstm" else "rzn"
    params = {"i" + letter: {"kernel": blocks["input_kernel"][i]} for i, letter in enumerate(letters)}
    params |= {"h" + letter: {"kernel": blocks["recurrent_kernel"][i]} for i, letter in enumerate(letters)}
    for i, letter in enumerate(letters):
        params[("h" if cell == "lstm" else "i") + letter]["bias"] = blocks["bias"][i]
    if cell == "gru":
        params["hn"]["bias"] = p["recurrent_bias"]
    return params


@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_flax_has_the_same_values_and_gradients(cell):
    theirs = {"rnn_tanh": nn.SimpleCell, "lstm": nn.OptimizedLSTMCell, "gru": nn.GRUCell}[cell](4)
    x, lengths = jnp.asarray(random(1, 3, 6, 2), jnp.float32), jnp.asarray([6, 2, 4])
    module = Recurrent(4, cell)
    params = build(module, x)["params"]
    weight = jnp.asarray(random(2, 3, 6, 4), jnp.float32) * (jnp.arange(6) < lengths[:, None])[..., None]
    one = jax.jit(jax.grad(lambda p, x: (module.apply({"params": p}, x, lengths=lengths)[0] * weight).sum(), (0, 1)))(params, x)

    def other(p, x):
        return (nn.RNN(theirs).apply({"params": {"cell": p}}, x, seq_lengths=lengths) * weight).sum()

    flax = flax_params(cell, params["layer_0"])
    value, want = jax.jit(jax.value_and_grad(other, (0, 1)))(flax, x)
    np.testing.assert_allclose((module.apply({"params": params}, x)[0] * weight).sum(), value, rtol=1e-5)
    got = flax_params(cell, one[0]["layer_0"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want[0])
    np.testing.assert_allclose(one[1], want[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cell", ["rnn_relu", "lstm", "gru"])
def test_the_fast_gradient_is_that_of_the_plain_scan(cell):
    with jax.enable_x64(True):
        x, lengths = jnp.asarray(random(1, 3, 5, 2)), jnp.asarray([5, 0, 3])
        fast = Recurrent(3, cell, num_layers=2, bidirectional=True, truncate=2, param_dtype=jnp.float64)
        variables = build(fast, x)
        start = jax.tree.map(lambda leaf: jnp.asarray(random(3, *leaf.shape)), fast.initial_state(3))

        def loss(module, variables, x, state):
            y, state = module.apply(variables, x, state, lengths=lengths)
            return jnp.sin(y).sum() + sum(jnp.cos(leaf).sum() for leaf in jax.tree.leaves(state))

        one, other = (
            jax.jit(jax.grad(functools.partial(loss, module), (0, 1, 2)))(variables, x, start)
            for module in (fast, fast.clone(forward_mode=True))
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), one, other)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_gradients_of_gradients_and_forward_mode(cell):
    with jax.enable_x64(True):
        x = jnp.asarray(random(1, 2, 4, 2))
        fast = Recurrent(3, cell, truncate=3, param_dtype=jnp.float64)
        variables = build(fast, x)

        def loss(module, x):
            return jnp.sin(module.apply(variables, x)[0]).sum()

        plain = functools.partial(loss, fast.clone(forward_mode=True))
        twice = jax.jit(jax.jacrev(jax.grad(functools.partial(loss, fast))))(x)
        np.testing.assert_allclose(twice, jax.jit(jax.hessian(plain))(x), rtol=1e-9, atol=1e-12)
        _, tangent = jax.jvp(plain, (x,), (jnp.ones_like(x),))
        np.testing.assert_allclose(tangent, jax.grad(functools.partial(loss, fast))(x).sum(), rtol=1e-10)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_truncation_is_chunks_with_a_constant_state_between_them(cell):
    x, weight = (jnp.asarray(random(seed, 2, 7, 3), jnp.float32) for seed in (1, 2))
    module = Recurrent(3, cell, num_layers=1)
    variables = build(module, x)

    def by_hand(variables, x):
        state, total = None, 0.0
        for begin in range(0, 7, 3):
            y, state = module.apply(variables, x[:, begin : begin + 3], jax.lax.stop_gradient(state))
            total += (y * weight[:, begin : begin + 3]).sum()
        return total

    def inside(truncate):
        cut = module.clone(truncate=truncate)
        return jax.jit(jax.value_and_grad(lambda variables, x: (cut.apply(variables, x)[0] * weight).sum(), (0, 1)))

    def same(one, other):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), one, other)

    same(inside(3)(variables, x), jax.jit(jax.value_and_grad(by_hand, (0, 1)))(variables, x))
    same(inside(7)(variables, x), inside(None)(variables, x))
    # It must matter: the kernel's gradient is another one.
    assert not np.allclose(*(jax.tree.leaves(inside(k)(variables, x)[1][0])[-1] for k in (3, None)), rtol=1e-3)


def test_truncation_backwards_counts_from_the_end_of_each_sequence():
    shapes = [(4, 3), (3, 3), (3,), (7, 2, 4), (7, 2, 3)]
    *kernels, x, weight = (jnp.asarray(random(seed, *shape), jnp.float32) for seed, shape in enumerate(shapes))
    start, lengths = jnp.zeros((2, 3)), jnp.asarray([7, 5])

    def backwards(kernels, x):
        y, _ = recurrence("rnn_tanh", *kernels, start, x, lengths=lengths, reverse=True, truncate=3)
        return (y * weight).sum()

    def turned(kernels, x):
        total = 0.0
        for n, length in enumerate([7, 5]):
            y, _ = recurrence("rnn_tanh", *kernels, start[:1], x[:length][::-1, n : n + 1], truncate=3)
            total += (y[::-1] * weight[:length, n : n + 1]).sum()
        return total

    one, other = (jax.jit(jax.grad(loss, (0, 1)))(kernels, x) for loss in (backwards, turned))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, other)


@pytest.mark.parametrize("length", [12, 11])
@pytest.mark.parametrize("cell", CELLS)
def test_a_long_sequence_is_projected_in_parts_or_at_once(monkeypatch, cell, length):
    """Without a gradient 12 steps are three parts, and 11 cannot be divided; with one they are always one."""
    module = Recurrent(4, cell, bidirectional=True)
    monkeypatch.setattr(sys.modules[recurrence.__module__], "_PART", 4 * 2 * GATES[cell] * module.hidden)
    x, lengths = jnp.asarray(random(1, 2, length, 3), jnp.float32), jnp.asarray([length, 7])
    params = build(module, x)["params"]

    def run(x):
        outputs, _ = module.apply({"params": params}, x, lengths=lengths)
        return outputs.sum(), outputs

    alone, ((_, with_gradient), _) = jax.jit(run)(x)[1], jax.jit(jax.value_and_grad(run, has_aux=True))(x)
    directions = params["layer_0"], params["layer_0_reverse"]
    expected = [numpy_run(cell, part, np.float64(x), lengths, reverse)[0] for reverse, part in enumerate(directions)]
    np.testing.assert_allclose(alone, np.concatenate(expected, -1), atol=1e-5)
    np.testing.assert_allclose(with_gradient, alone, atol=1e-6)


def test_a_state_continues_where_it_came_from():
    x = jnp.asarray(random(1, 2, 7, 3), jnp.float32)
    module = Recurrent(4, "lstm", num_layers=2)
    variables = build(module, x)
    whole, end = module.apply(variables, x)
    first, state = module.apply(variables, x[:, :4])
    second, state = module.apply(variables, x[:, 4:], state)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), whole, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state, end)


@pytest.mark.parametrize("cell", CELLS)
def test_padding_is_as_good_as_absent_even_if_it_is_no_number(cell):
    x, lengths = random(1, 3, 5, 2).astype(np.float32), jnp.asarray([5, 0, 2])
    dirty = jnp.asarray(np.where(np.arange(5)[None, :, None] < np.asarray(lengths)[:, None, None], x, np.nan))
    module = Recurrent(4, cell, bidirectional=True)
    variables = build(module, dirty)
    start = jax.tree.map(lambda leaf: jnp.asarray(random(3, *leaf.shape), jnp.float32), module.initial_state(3))

    @jax.jit
    def run(variables, x):
        y, state = module.apply(variables, x, start, lengths=lengths)
        return jnp.sin(y).sum(), (y, state)

    (_, (y, state)), gradient = jax.value_and_grad(run, (0, 1), has_aux=True)(variables, dirty)
    assert not np.any(y[1]) and not np.any(y[2, 2:])
    for ours, begin in zip(jax.tree.leaves(state), jax.tree.leaves(start), strict=True):
        np.testing.assert_array_equal(ours[:, 1], begin[:, 1])
    short, end = module.apply(variables, dirty[2:, :2], jax.tree.map(lambda leaf: leaf[:, 2:], start))
    np.testing.assert_allclose(y[2:, :2], short, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[:, 2:], b, atol=1e-6), state, end)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient)) and not np.any(gradient[1][1])


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_vmap_and_remat_change_nothing(cell):
    x = jnp.asarray(random(1, 2, 3, 4, 2), jnp.float32)
    module = Recurrent(3, cell)
    variables = build(module, x[0])

    def loss(variables, x):
        return jnp.sin(module.apply(variables, x)[0]).sum()

    each = [jax.grad(loss)(variables, part) for part in x]
    jax.tree.map(
        lambda mapped, *ones: np.testing.assert_allclose(mapped, np.stack(ones), atol=1e-5),
        jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(variables, x),
        *each,
    )
    again = jax.jit(jax.grad(jax.checkpoint(loss)))(variables, x[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), again, each[0])


@pytest.mark.parametrize("cell", CELLS)
def test_bfloat16_keeps_its_state_in_float32(cell):
    x = jnp.asarray(random(1, 2, 20, 3), jnp.float32)
    wide, narrow = Recurrent(8, cell), Recurrent(8, cell, dtype=jnp.bfloat16)
    variables = wide.init(jax.random.key(0), x)
    (y, state), pull = jax.vjp(jax.jit(narrow.apply), variables, x.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16 and all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state))
    expected, want = jax.vjp(jax.jit(wide.apply), variables, x)
    np.testing.assert_allclose(np.float32(y), expected[0], rtol=0.03, atol=0.03)
    ours = pull((jnp.ones_like(y), jax.tree.map(jnp.zeros_like, state)))[0]
    theirs = want((jnp.ones_like(expected[0]), jax.tree.map(jnp.zeros_like, expected[1])))[0]
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, atol=0.05 * float(np.abs(b).max()))


def test_each_gate_starts_orthogonal_and_the_forget_gate_open():
    module = Recurrent(6, "lstm")
    p = module.init(jax.random.key(0), jnp.ones((1, 2, 3)))["params"]["layer_0"]
    for gate in np.split(p["recurrent_kernel"], 4, -1):
        np.testing.assert_allclose(gate @ gate.T, np.eye(6), atol=1e-5)
    np.testing.assert_array_equal(np.split(p["bias"], 4), [[0] * 6, [1] * 6, [0] * 6, [0] * 6])
    gates = np.split(p["recurrent_kernel"], 4, -1)
    assert not np.allclose(gates[0], gates[1])


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_the_initialisation_of_torch_has_its_range_and_its_sum_of_two_biases(cell):
    module = Recurrent(256, cell, initialization="torch", forget_bias=0.0)
    p = jax.jit(module.init)(jax.random.key(0), jnp.ones((1, 2, 64)))["params"]["layer_0"]
    bound, deviation = 1 / 16, 1 / 16 / np.sqrt(3)
    for name in ("input_kernel", "recurrent_kernel"):
        assert np.abs(p[name]).max() <= bound
        np.testing.assert_allclose(np.std(p[name]), deviation, rtol=0.05)
    summed = p["bias"][:512]
    np.testing.assert_allclose(np.std(summed), np.sqrt(2) * deviation, rtol=0.1)
    assert bound < np.abs(summed).max() <= 2 * bound
    if cell == "gru":
        assert np.abs(p["bias"][512:]).max() <= bound and 0 < np.abs(p["recurrent_bias"]).max() <= bound


def test_dropout_falls_between_layers_and_only_in_training():
    x = jnp.asarray(random(1, 2, 6, 3), jnp.float32)
    one, two = (Recurrent(8, "gru", num_layers=num_layers, dropout=0.5) for num_layers in (1, 2))
    for module, changes in ((one, False), (two, True)):
        variables = build(module, x)
        still = module.apply(variables, x)[0]
        first, second = (module.apply(variables, x, train=True, rngs={"dropout": jax.random.key(k)})[0] for k in (0, 1))
        assert np.allclose(still, first) != changes and np.allclose(first, second) != changes
        assert np.all(first != 0)  # Never on the output itself.


def test_modes_are_four_uses_of_the_same_parameters():
    x = jnp.asarray(random(1, 2, 5, 3), jnp.float32)
    model = SequenceModel(Recurrent(4, "lstm"), features=3)
    variables = build(model, x)
    outputs, end = model.apply(variables, x)
    assert outputs.shape == (2, 5, 3)
    last, _ = model.clone(mode="n:1").apply(variables, x)
    np.testing.assert_allclose(last, outputs[:, -1], atol=1e-6)
    lengths = jnp.asarray([2, 5])
    ends, _ = model.clone(mode="n:1").apply(variables, x, lengths=lengths)
    np.testing.assert_allclose(ends, outputs[jnp.arange(2), lengths - 1], atol=1e-6)
    state = None
    for t in range(5):
        y, state = model.clone(mode="1:1").apply(variables, x[:, t], state)
        np.testing.assert_allclose(y, outputs[:, t], atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state, end)


def test_generation_reads_what_it_wrote():
    x = jnp.asarray(random(1, 2, 3), jnp.float32)
    model = SequenceModel(Recurrent(4, "gru", num_layers=2), features=3, mode="1:n")
    variables = jax.jit(functools.partial(model.init, steps=2))(jax.random.key(0), x)
    generated, end = jax.jit(functools.partial(model.apply, steps=5))(variables, x)
    read = jnp.concatenate([x[:, None], generated[:, :-1]], axis=1)
    wanted, state = model.clone(mode="n:n").apply(variables, read)
    np.testing.assert_allclose(generated, wanted, atol=1e-5)
    np.testing.assert_allclose(end, state, atol=1e-5)


def test_generation_can_draw():
    def draw(logits, key):
        return jax.nn.one_hot(jax.random.categorical(key, logits), logits.shape[-1])

    x = jnp.zeros((64, 5))
    model = SequenceModel(Recurrent(4), features=5, mode="1:n", emit=draw)
    rngs = {"params": jax.random.key(0), "emit": jax.random.key(1)}
    (drawn, _), _ = model.init_with_output(rngs, x, steps=6)
    assert drawn.shape == (64, 6, 5) and np.all(drawn.sum(-1) == 1)
    assert len(np.unique(np.argmax(drawn, -1), axis=1).T) > 1  # A key for each step.


def test_bidirectional_classification_reads_both_ends():
    x = jnp.asarray(random(1, 2, 5, 3), jnp.float32)
    model = SequenceModel(Recurrent(4, "gru", bidirectional=True), features=2, mode="n:1")
    variables = build(model, x)
    logits, _ = model.apply(variables, x)
    outputs, _ = Recurrent(4, "gru", bidirectional=True).apply({"params": variables["params"]["core"]}, x)
    both = jnp.concatenate([outputs[:, -1, :4], outputs[:, 0, 4:]], axis=-1)
    head = variables["params"]["head"]
    np.testing.assert_allclose(logits, both @ head["kernel"] + head["bias"], atol=1e-6)


def test_what_cannot_be_meant_is_refused():
    x, key = jnp.ones((2, 3, 4)), jax.random.key(0)
    with pytest.raises(UserError, match="did you mean 'lstm'"):  # Past the check of types that these tests install.
        kernels = jnp.ones((4, 8)), jnp.ones((2, 8)), jnp.ones(8)
        inspect.unwrap(recurrence)("lsmt", *kernels, (jnp.ones((1, 2)), jnp.ones((1, 2))), jnp.ones((3, 1, 4)))
    with pytest.raises(UserError, match="cut every 0 steps"):
        Recurrent(2, truncate=0).init(key, x)
    with pytest.raises(UserError, match="0 layers"):
        Recurrent(2, num_layers=0).init(key, x)
    with pytest.raises(UserError, match=r"\(2, 2, 2\).*\(1, 2, 2\)"):
        Recurrent(2, "gru").init(key, x, jnp.zeros((2, 2, 2)))
    with pytest.raises(UserError, match="one bias"):
        gru_cell(jnp.ones((4, 6)), jnp.ones((2, 6)), jnp.ones(6), jnp.ones((2, 2)), x[:, 0], jnp.ones(2), "before")
    with pytest.raises(UserError, match="future"):
        SequenceModel(Recurrent(2, bidirectional=True), 4, "1:n").init(key, x[:, 0], steps=2)
    with pytest.raises(UserError, match="`steps`"):
        SequenceModel(Recurrent(2), 4, "1:n").init(key, x[:, 0])
    with pytest.raises(UserError, match="`steps`"):
        SequenceModel(Recurrent(2), 4).init(key, x, steps=2)
    with pytest.raises(UserError, match="must be the same"):
        SequenceModel(Recurrent(2), 3, "1:n").init(key, x[:, 0], steps=2)
    with pytest.raises(UserError, match="B T D"):
        SequenceModel(Recurrent(2), 3).init(key, x[:, 0])
