"""ViT: how it starts, how places are pooled, that order is known by positions alone, and how it adapts to other sizes and classes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdl.errors import UserError
from jaxdl.models.vit import VARIANTS, ViT, adapt, from_config
from jaxdl.nn import ATTENTIONS, AttentionPooling, patchify, stack_blocks, unpatchify

SIZE = dict(patch_size=4, width=16, depth=2, num_heads=2, num_classes=3)


def images(height: int = 12, width: int = 12) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal((2, height, width, 3), np.float32))


def drawn(module: ViT, given: jax.Array) -> dict:
    """Parameters that are nowhere zero."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), given)["params"]
    random = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * random.standard_normal(leaf.shape, np.float32)), shapes)


@pytest.mark.parametrize("pool", ["class", "mean", "map"])
def test_it_starts_with_no_opinion_and_with_features(pool):
    given = images()
    out, params = ViT(**SIZE, pool=pool).init_with_output(jax.random.key(0), given)
    np.testing.assert_array_equal(out.logits, np.zeros((2, 3)))
    assert out.features.shape == (2, 16) and np.abs(out.features).max() > 0.01
    assert ("class_token" in params["params"]) == (pool == "class") and ("pooling" in params["params"]) == (pool == "map")


@pytest.mark.parametrize("pool", ["class", "mean", "map"])
def test_order_is_known_by_positions_alone(pool):
    """Patches in another order, with their positions, are the same picture; without them they are not."""
    given, module = images(), ViT(**SIZE, pool=pool)
    params = drawn(module, given)
    order = np.random.default_rng(2).permutation(9)
    moved = unpatchify(patchify(given, 4)[:, order], 4, 12, 12)
    table = params["positions"]["table"]
    places = table[-9:][order]
    together = params | {"positions": {"table": jnp.concatenate([table[:-9], places])}}
    apply = jax.jit(module.apply)
    wanted = apply({"params": params}, given).logits
    np.testing.assert_allclose(apply({"params": together}, moved).logits, wanted, atol=1e-5)
    assert np.abs(apply({"params": params}, moved).logits - wanted).max() > 1e-3


@pytest.mark.parametrize("pool", ["class", "mean", "map"])
def test_features_are_the_class_token_the_mean_or_what_attention_gathers(pool):
    given, module = images(), ViT(**SIZE, pool=pool)
    params = drawn(module, given)
    out, seen = module.apply({"params": params}, given, capture_intermediates=lambda part, _: part.name == "encoder")
    (x,) = seen["intermediates"]["encoder"]["__call__"]
    assert x.shape == (2, 9 + (pool == "class"), 16)
    if pool == "map":
        wanted = AttentionPooling(2, 64).apply({"params": params["pooling"]}, x)
    else:
        wanted = x[:, 0] if pool == "class" else np.asarray(x).sum(1) / 9
    np.testing.assert_allclose(out.features, wanted, atol=1e-5)
    np.testing.assert_allclose(out.logits, out.features @ params["head"]["kernel"] + params["head"]["bias"], atol=1e-5)


@pytest.mark.parametrize("how", [dict(scan=True), dict(remat=True), dict(attention=ATTENTIONS["flash"])])
def test_other_ways_to_compute_give_the_same_gradients(how):
    given, module = images(), ViT(**SIZE, pool="map")
    params = drawn(module, given)

    def gradient(module: ViT, params: dict) -> dict:
        return jax.jit(jax.grad(lambda params: jnp.sum(module.apply({"params": params}, given, train=True).logits ** 2)))(params)

    wanted = gradient(module, params)
    stacked = stack_blocks if "scan" in how else lambda tree: tree
    found = gradient(module.clone(**how), stacked(params))
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * largest), found, stacked(wanted))


def test_fixed_positions_have_no_parameters_and_know_every_size():
    module = ViT(**SIZE, positions="sincos")
    params = drawn(module, images())
    assert "positions" not in params
    assert module.apply({"params": params}, images(20, 8)).logits.shape == (2, 3)
    assert adapt(module, params, size=(20, 8)) == (module, params)
    turned = module.apply({"params": params}, images()[:, ::-1]).logits
    assert np.abs(turned - module.apply({"params": params}, images()).logits).max() > 1e-3


@pytest.mark.parametrize("how", [dict(dropout=0.5), dict(stochastic_depth=0.5)])
def test_chance_is_for_training_alone(how):
    given, module = images(), ViT(**SIZE, **how)
    params = {"params": drawn(module, given)}
    plain = ViT(**SIZE).apply(params, given).logits
    np.testing.assert_array_equal(module.apply(params, given).logits, plain)
    once, again, other = (module.apply(params, given, train=True, rngs={"dropout": jax.random.key(seed)}) for seed in (0, 0, 1))
    np.testing.assert_array_equal(once.logits, again.logits)
    assert (once.logits != plain).any() and (once.logits != other.logits).any()


def test_in_bfloat16_what_flows_from_block_to_block_is_in_float32():
    given, module = images(), ViT(**SIZE, dtype=jnp.bfloat16)
    params = drawn(module, given)
    out, seen = module.apply({"params": params}, given, capture_intermediates=lambda part, _: part.name == "block_1")
    (x,) = seen["intermediates"]["encoder"]["block_1"]["__call__"]
    assert x.dtype == jnp.float32 and out.logits.dtype == jnp.bfloat16


def test_what_need_not_change_stays():
    given, module = images(), ViT(**SIZE)
    params = drawn(module, given)
    same, kept = adapt(module, params, size=(12, 12), num_classes=3)
    assert same == module
    jax.tree.map(np.testing.assert_array_equal, kept, params)


def test_another_size_and_other_classes():
    given, module = images(), ViT(**SIZE)
    params = drawn(module, given)
    # The first feature is the row, the second the column: both stay what they are.
    rows, columns = np.divmod(np.arange(9), 3)
    table = np.array(params["positions"]["table"])
    table[1:, 0], table[1:, 1], table[1:, 2] = rows, columns, 7
    params["positions"] = {"table": jnp.asarray(table)}
    other, adapted = adapt(module, params, size=(24, 20), num_classes=5)
    places = np.array(adapted["positions"]["table"])[1:].reshape(6, 5, 16)
    np.testing.assert_array_equal(adapted["positions"]["table"][0], table[0])
    np.testing.assert_allclose(places[..., 2], 7, rtol=1e-6)
    assert (np.diff(places[..., 0], axis=0) > 0).all() and np.abs(np.diff(places[..., 0], axis=1)).max() < 1e-5
    assert (np.diff(places[..., 1], axis=1) > 0).all() and np.abs(np.diff(places[..., 1], axis=0)).max() < 1e-5
    assert other.num_classes == 5 and params["head"]["kernel"].shape == (16, 3)
    np.testing.assert_array_equal(other.apply({"params": adapted}, images(24, 20)).logits, np.zeros((2, 5)))
    jax.tree.map(np.testing.assert_array_equal, adapted["encoder"], params["encoder"])


def test_what_does_not_fit_is_refused():
    given, module = images(), ViT(**SIZE)
    with pytest.raises(UserError, match="13×12 cannot be cut into patches of 4"):
        module.init(jax.random.key(0), images(13, 12))
    params = drawn(module, given)
    for size in ((13, 12), (12, 2)):
        with pytest.raises(UserError, match=f"{size[0]}×{size[1]} cannot be cut into patches of 4"):
            adapt(module, params, size=size)
    with pytest.raises(UserError, match="6 places are not those of a square image"):
        adapt(module, drawn(module, images(8, 12)), size=(12, 12))
    with pytest.raises(UserError, match="ViT variant"):
        ViT.variant("B/17", num_classes=2)
    with pytest.raises(UserError, match="pool 'gap'.*choose one of class, mean, map"):
        ViT(**SIZE, pool="gap").init(jax.random.key(0), given)
    with pytest.raises(UserError, match="positions 'none'"):
        ViT(**SIZE, positions="none").init(jax.random.key(0), given)


def test_published_sizes_have_the_parameters_that_are_published():
    """In millions, with 1000 classes at 224 pixels, as timm counts its `vit_*_patch*_224`."""
    for name, millions in (("Ti/16", 5.7), ("S/16", 22.1), ("B/16", 86.6), ("L/16", 304.3), ("H/14", 632.0)):
        shapes = jax.eval_shape(
            ViT.variant(name, num_classes=1000, scan=True).init, jax.random.key(0), jnp.zeros((1, 224, 224, 3))
        )
        assert round(sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6, 1) == millions
    assert all(row.width == 64 * row.num_heads for name, row in VARIANTS.items() if name != "H/14")


def test_settings_that_are_left_out_are_those_of_transformers():
    module, (given,) = from_config({"model_type": "vit"})
    assert module == ViT.variant("B/16", num_classes=2, mlp_dim=3072, eps=1e-12) and given.shape == (1, 224, 224, 3)
    with pytest.raises(UserError, match="hidden_act is 'relu'"):
        from_config({"hidden_act": "relu"})
