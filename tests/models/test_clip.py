"""What changes how CLIP is computed changes nothing in what is computed, and a text is read where it ends."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdl.errors import UserError
from jaxdl.losses import softmax_loss
from jaxdl.models.clip import CLIP, VARIANTS, TextTower, VisionTower
from jaxdl.nn import ATTENTIONS, stack_blocks, unstack_blocks

END = 3


def model(end: int | None = END, **changes) -> CLIP:
    size = dict(width=16, depth=3, num_heads=2, mlp_dim=32, features=12, **changes)
    return CLIP(VisionTower(patch_size=4, **size), TextTower(vocab_size=20, end=end, **size))


@pytest.fixture(scope="module")
def inputs() -> tuple[jax.Array, jax.Array]:
    random = np.random.default_rng(0)
    images = jnp.asarray(random.uniform(-1, 1, (3, 8, 8, 3)), jnp.float32)
    tokens = random.integers(4, 20, (3, 6))
    tokens[[0, 1, 2], [2, 5, 4]] = END
    return images, jnp.asarray(tokens, jnp.int32)


@pytest.fixture(scope="module")
def params(inputs):
    return model().init(jax.random.key(0), *inputs)["params"]


@pytest.mark.parametrize(
    "changes",
    [{"scan": True}, {"remat": True}, {"scan": True, "remat": True}, {"attention": ATTENTIONS["flash"]}],
    ids=["scan", "remat", "both", "flash"],
)
def test_loss_and_gradient_are_those_of_the_plain_model(changes, inputs, params):
    stacked = "scan" in changes

    def loss(module, params):
        out = module.apply({"params": params}, *inputs, train=True)
        return softmax_loss(out.image_embeddings, out.text_embeddings, out.log_temperature)

    expected, wanted = jax.jit(jax.value_and_grad(lambda p: loss(model(), p)))(params)
    other = model(**changes)
    value, gradient = jax.jit(jax.value_and_grad(lambda p: loss(other, p)))(stack_blocks(params) if stacked else params)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for mine, theirs in zip(*map(jax.tree.leaves, (unstack_blocks(gradient) if stacked else gradient, wanted)), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-6 * max(1.0, float(jnp.abs(theirs).max())))
    if stacked:
        initial = other.init(jax.random.key(0), *inputs)["params"]
        chex.assert_trees_all_equal_shapes(initial, stack_blocks(params))


def embed_texts(module: CLIP, params, tokens) -> np.ndarray:
    return np.asarray(jax.jit(lambda tokens: module.apply({"params": params}, tokens, method="embed_texts"))(jnp.asarray(tokens)))


def test_what_follows_the_first_end_is_not_seen_and_what_precedes_it_is(inputs, params):
    tokens = np.array(inputs[1])
    base = embed_texts(model(), params, tokens)
    after, before = tokens.copy(), tokens.copy()
    after[0, 3:] = [7, END, 9]
    before[0, 0] = 4 + (tokens[0, 0] - 3) % 16
    np.testing.assert_array_equal(embed_texts(model(), params, after), base)
    changed = embed_texts(model(), params, before)
    assert np.abs(changed[0] - base[0]).max() > 1e-3
    np.testing.assert_array_equal(changed[1:], base[1:])


def test_without_an_end_the_highest_token_is_where_a_text_ends(inputs, params):
    tokens = np.array(inputs[1])
    highest = tokens.copy()
    highest[highest == END] = 19
    highest[(tokens != END) & (highest == 19)] = 18
    wanted = embed_texts(model(end=19), params, highest)
    np.testing.assert_array_equal(embed_texts(model(end=None), params, highest), wanted)


def test_embeddings_have_unit_length_and_one_tower_alone_gives_them(inputs, params):
    out = jax.jit(lambda params: model().apply({"params": params}, *inputs))(params)
    for vectors in (out.image_embeddings, out.text_embeddings):
        assert vectors.shape == (3, 12)
        np.testing.assert_allclose(jnp.linalg.norm(vectors, axis=-1), 1, rtol=1e-6)
    np.testing.assert_allclose(jnp.exp(out.log_temperature), 1 / 0.07, rtol=1e-6)
    np.testing.assert_allclose(out.logits, out.image_embeddings @ out.text_embeddings.T / 0.07, rtol=1e-5, atol=1e-5)
    images = jax.jit(lambda params: model().apply({"params": params}, inputs[0], method="embed_images"))(params)
    np.testing.assert_allclose(images, out.image_embeddings, atol=1e-6)


def test_variants_have_the_published_numbers_of_parameters():
    """As OpenAI's four checkpoints have them."""
    counts = {"B/32": 151_277_313, "B/16": 149_620_737, "L/14": 427_616_513, "L/14@336": 427_944_193}
    assert counts.keys() == VARIANTS.keys()
    for name, count in counts.items():
        side = VARIANTS[name].resolution
        images, tokens = jnp.zeros((1, side, side, 3)), jnp.zeros((1, 77), jnp.int32)
        shapes = jax.eval_shape(CLIP.variant(name).init, jax.random.key(0), images, tokens)
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count, name


def test_what_does_not_exist_or_fit_is_refused():
    with pytest.raises(UserError, match="did you mean 'B/32'"):
        CLIP.variant("B32")
    with pytest.raises(UserError, match="cannot be cut into patches of 4"):
        model().init(jax.random.key(0), jnp.zeros((1, 6, 8, 3)), jnp.zeros((1, 4), jnp.int32))
