"""Who sees whom in PaliGemma, where its patches stand, and that decoding with a cache is the whole sequence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdl.errors import UserError
from jaxdl.models.gemma import VARIANTS, Gemma
from jaxdl.models.paligemma import PaliGemma
from jaxdl.models.siglip import VisionTower
from jaxdl.nn import ATTENTIONS, stack_blocks

IMAGE, PATCHES, LENGTH = 19, 4, 12
PREFIX = np.array([7, 9], np.int32)
GEMMA_2 = dict(window=3, attention_soft_cap=5.0, logit_soft_cap=4.0, sandwich_norm=True, query_scale=10.0)


def model(second: bool = True, **changes) -> PaliGemma:
    text = dict(vocab_size=19, width=16, depth=3, num_heads=4, num_kv_heads=2, head_width=6, mlp_dim=20)
    tower = VisionTower(patch_size=4, width=12, depth=1, num_heads=2, mlp_dim=16, head=False, **changes)
    return PaliGemma(tower, Gemma(**text, **(GEMMA_2 if second else {}), **changes), IMAGE)


@pytest.fixture(scope="module")
def inputs() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    tokens = random.integers(0, 19, (2, LENGTH))
    tokens[:, :PATCHES] = IMAGE
    return random.standard_normal((2, 8, 8, 3), np.float32), tokens.astype(np.int32)


@pytest.fixture(scope="module", params=[False, True], ids=["gemma", "gemma2"])
def pair(request, inputs) -> tuple:
    """The module, parameters far from their small beginnings, and logits of images and tokens."""
    module = model(request.param)
    params = module.init(jax.random.key(0), *map(jnp.asarray, inputs), jnp.asarray(PREFIX))["params"]
    keys = iter(jax.random.split(jax.random.key(1), 200))
    params = jax.tree.map(lambda leaf: leaf + 0.2 * jax.random.normal(next(keys), leaf.shape), params)
    run = jax.jit(lambda images, tokens: module.apply({"params": params}, images, tokens, jnp.asarray(PREFIX)).logits)
    return module, params, run


def changed(run, images, tokens, place) -> np.ndarray:
    """Where the logits `B T` are others once the token at `place` is another, or the image (None)."""
    other_images, other = np.array(images), np.array(tokens)
    if place is None:
        other_images += 1
    else:
        other[:, place] = (other[:, place] + 1) % 19
    base, new = run(jnp.asarray(images), jnp.asarray(tokens)), run(jnp.asarray(other_images), jnp.asarray(other))
    return np.abs(np.asarray(new - base)).max(-1) > 1e-7


def test_image_and_question_are_read_both_ways_and_the_answer_causally(pair, inputs):
    _, _, run = pair
    assert changed(run, *inputs, None).all()
    for place in range(PATCHES, LENGTH):
        seen = changed(run, *inputs, place)
        for row, prefix in enumerate(PREFIX):
            expected = np.arange(LENGTH) >= (0 if place < prefix else place)
            np.testing.assert_array_equal(seen[row], expected, err_msg=f"token {place}")


def test_decoding_with_a_cache_gives_the_logits_of_the_whole_sequence(pair, inputs):
    """Of prompts that are padded on the left; the answer's tokens one by one, then the rest together."""
    module, params, run = pair
    images, tokens = map(jnp.asarray, inputs)
    whole = np.asarray(run(images, tokens))
    longest = int(PREFIX.max())
    prompt, valid = np.zeros((2, longest), np.int32), np.arange(longest) >= (longest - PREFIX)[:, None]
    for row, prefix in enumerate(PREFIX):
        prompt[row, longest - prefix :] = inputs[1][row, :prefix]
    cache = module.empty_cache(2, 16)
    decode = jax.jit(lambda tokens, cache, **how: module.apply({"params": params}, tokens, cache, method="decode", **how))
    out, cache = decode(jnp.asarray(prompt), cache, images=images, valid=jnp.asarray(valid))
    np.testing.assert_allclose(out.logits[:, -1], whole[[0, 1], PREFIX - 1], atol=1e-5)
    for step, count in ((0, 1), (1, 1), (2, 1)):
        places = PREFIX[:, None] + np.arange(step, step + count)
        out, cache = decode(jnp.asarray(np.take_along_axis(inputs[1], places, 1)), cache)
        np.testing.assert_allclose(out.logits, np.take_along_axis(whole, places[..., None], 1), atol=1e-5)


def test_patches_come_in_order_wherever_their_places_are_and_are_not_multiplied(pair, inputs):
    module, params, _ = pair
    images, tokens = map(jnp.asarray, inputs)
    embed = jax.jit(lambda tokens: module.apply({"params": params}, images, tokens, False, method="_embed"))
    patches = module.apply({"params": params}, images, method=lambda self, images: self.projection(self.vision(images)))
    first = embed(tokens)
    np.testing.assert_allclose(first[:, :PATCHES], patches, atol=1e-6)
    table = params["text"]["tokens"]["embedding"]
    np.testing.assert_allclose(first[:, PATCHES:], 4 * table[tokens[:, PATCHES:]], rtol=1e-6)  # √16
    moved = embed(jnp.roll(tokens, 3, axis=1))
    np.testing.assert_allclose(moved, jnp.roll(first, 3, axis=1), atol=1e-6)


def test_a_row_with_another_number_of_places_is_nan_and_no_other_row(pair, inputs):
    _, _, run = pair
    tokens = np.array(inputs[1])
    tokens[0, PATCHES] = IMAGE
    logits = run(jnp.asarray(inputs[0]), jnp.asarray(tokens))
    assert jnp.isnan(logits[0]).all() and jnp.isfinite(logits[1]).all()


def test_soft_caps_bound_the_logits(inputs):
    module = model()
    params = module.init(jax.random.key(0), *map(jnp.asarray, inputs), jnp.asarray(PREFIX))["params"]
    params["text"]["tokens"]["embedding"] *= 1e3
    logits = module.apply({"params": params}, *map(jnp.asarray, inputs), jnp.asarray(PREFIX)).logits
    assert 3.9 < jnp.abs(logits).max() <= 4.0


@pytest.mark.parametrize("changes", [{"remat": True}, {"attention": ATTENTIONS["flash"]}], ids=["remat", "flash"])
def test_logits_and_gradients_are_those_of_the_plain_model(changes, pair, inputs):
    module, params, _ = pair
    other = model(module.text.sandwich_norm, **changes)

    def loss(module, params):
        return (module.apply({"params": params}, *map(jnp.asarray, inputs), jnp.asarray(PREFIX), train=True).logits ** 2).mean()

    expected, wanted = jax.jit(jax.value_and_grad(lambda params: loss(module, params)))(params)
    value, gradient = jax.jit(jax.value_and_grad(lambda params: loss(other, params)))(params)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for mine, theirs in zip(*map(jax.tree.leaves, (gradient, wanted)), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-5 * max(1.0, float(jnp.abs(theirs).max())))


def test_alike_blocks_can_be_compiled_as_one_and_others_cannot(inputs):
    arguments = (*map(jnp.asarray, inputs), jnp.asarray(PREFIX))
    plain, scanned = model(False), model(False, scan=True)
    params = plain.init(jax.random.key(0), *arguments)["params"]
    ours = scanned.apply({"params": stack_blocks(params)}, *arguments).logits
    np.testing.assert_allclose(ours, plain.apply({"params": params}, *arguments).logits, atol=1e-5)
    with pytest.raises(UserError, match="not alike"):
        model(True, scan=True).init(jax.random.key(0), *arguments)


def test_variants_have_the_published_numbers_of_parameters():
    """As the reports round them: Gemma Team 2024, table 2; Riviere et al. 2024, table 2: of embeddings, and of the rest."""
    counts = {
        "2b": (524_550_144, 1_981_884_416),
        "7b": (786_825_216, 7_751_248_896),
        "2-2b": (590_118_912, 2_024_517_888),
        "2-9b": (917_962_752, 8_324_201_984),
        "2-27b": (1_180_237_824, 26_047_480_320),
    }
    assert counts.keys() == VARIANTS.keys()
    for name, (embedding, rest) in counts.items():
        module = Gemma.variant(name)

        def both(module, tokens):
            return module.logits(module(module.embed(tokens)))

        shapes = jax.eval_shape(lambda key: module.init(key, jnp.zeros((1, 2), jnp.int32), method=both), jax.random.key(0))
        sizes = {path[0].key: 0 for path, _ in jax.tree.leaves_with_path(shapes["params"])}
        for path, leaf in jax.tree.leaves_with_path(shapes["params"]):
            sizes[path[0].key] += leaf.size
        assert abs(sizes["tokens"] - embedding) < 0.01 * embedding, (name, sizes)
        assert sizes["decoder"] == rest, (name, sizes)


def test_a_published_size_is_put_together_from_both_families():
    module = PaliGemma.variant("2-3b", dtype=jnp.bfloat16)
    assert (module.vision.width, module.vision.head, module.text.vocab_size) == (1152, False, 257_216)
    with pytest.raises(UserError, match="did you mean '2-3b'"):
        PaliGemma.variant("2-3B")
