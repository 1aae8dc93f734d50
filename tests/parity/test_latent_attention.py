"""Latent attention equals HF's DeepseekV2 and DeepseekV3, in value and gradient, with and without YaRN."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from hypothesis_profiles import few
from versus_torch import assert_near, normal, seeds

from jaxdl.nn import LatentAttention, rope, rotary_frequencies, yarn_frequencies, yarn_magnitude

YARN = dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=0.7, beta_fast=4.0)
WIDTH = 24
NAMES = {
    "query": "q_proj",
    "query_down": "q_a_proj",
    "query_norm": "q_a_layernorm",
    "query_up": "q_b_proj",
    "kv_down": "kv_a_proj_with_mqa",
    "kv_norm": "kv_a_layernorm",
    "kv_up": "kv_b_proj",
    "out": "o_proj",
}


def reference(version, heads, key, turned, value, rank, query_rank, stretched, interleaved):
    """HF's attention with random parameters, and its table of angles."""
    module = __import__(f"transformers.models.deepseek_v{version}.modeling_deepseek_v{version}", fromlist=["_"])
    config = getattr(transformers, f"DeepseekV{version}Config")(
        hidden_size=WIDTH,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        q_lora_rank=query_rank,
        kv_lora_rank=rank,
        qk_nope_head_dim=key,
        qk_rope_head_dim=turned,
        v_head_dim=value,
        max_position_embeddings=128,
        rope_parameters={**(YARN if stretched else dict(rope_type="default")), "rope_theta": 10_000.0},
        attn_implementation="eager",
        **({} if interleaved is None else dict(rope_interleave=interleaved)),
    )
    attention = getattr(module, f"DeepseekV{version}Attention")(config, layer_idx=0).eval()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4 + (parameter.ndim == 1))
    return attention, getattr(module, f"DeepseekV{version}RotaryEmbedding")(config)


def ours(heads, key, turned, value, rank, query_rank, stretched, interleaved):
    frequencies, magnitude, sharper = rotary_frequencies(turned), 1.0, 1.0
    if stretched:
        sharper = yarn_magnitude(YARN["factor"], YARN["mscale_all_dim"])
        frequencies = yarn_frequencies(turned, YARN["factor"], 16, beta_fast=YARN["beta_fast"])
        magnitude = yarn_magnitude(YARN["factor"], YARN["mscale"]) / sharper
    rotary = functools.partial(rope, frequencies=frequencies, interleaved=interleaved is not False, magnitude=magnitude)
    scale = (key + turned) ** -0.5 * sharper**2 if stretched else None
    return LatentAttention(heads, key, turned, value, rank, query_rank, rotary=rotary, scale=scale)


@pytest.mark.parametrize("stretched", [False, True])
@pytest.mark.parametrize(("version", "interleaved"), [(2, None), (3, True), (3, False)])
@few(2)
@given(
    heads=st.integers(1, 4),
    key=st.sampled_from([2, 4, 10]),  # Theirs of version 2 takes even ones only, and even ranks.
    turned=st.sampled_from([2, 4, 8]),
    value=st.integers(1, 6),
    rank=st.sampled_from([2, 6, 12]),
    query_rank=st.none() | st.integers(2, 14),
    batch=st.integers(1, 3),
    length=st.integers(1, 21),
    seed=seeds,
)
def test_values_and_gradients_are_those_of_deepseek(version, interleaved, stretched, batch, length, seed, **sizes):
    torch.manual_seed(seed)
    theirs, angles = reference(version, **sizes, stretched=stretched, interleaved=interleaved)
    parameters = dict(theirs.named_parameters())
    hf = {name: f"{NAMES[name]}.weight" for name in NAMES if f"{NAMES[name]}.weight" in parameters}
    assert len(hf) == len(parameters)
    params = {name: jnp.asarray(parameters[other].detach().numpy().T) for name, other in hf.items()}
    module = ours(**sizes, stretched=stretched, interleaved=interleaved)
    x, cotangent = map(jnp.asarray, normal(seed, (batch, length, WIDTH), (batch, length, WIDTH)))

    tensor = torch.tensor(np.array(x), requires_grad=True)
    table = angles(tensor, torch.arange(length)[None])
    hidden = torch.full((length, length), -torch.inf).triu(1).expand(batch, 1, length, length)
    expected = theirs(hidden_states=tensor, position_embeddings=table, attention_mask=hidden)[0]
    wanted = torch.autograd.grad(
        expected, [tensor, *(parameters[other] for other in hf.values())], torch.tensor(np.array(cotangent))
    )

    run = jax.jit(lambda x, params: module.apply({"params": params}, x, is_causal=True))
    out, pull = jax.vjp(run, x, params)
    assert_near(out, expected.detach().numpy(), 1e-5)
    gradient, by_name = pull(cotangent)
    for name, got, want in zip(["x", *hf], [gradient, *(by_name[name] for name in hf)], wanted):
        assert_near(got, want.numpy().T if name != "x" else want.numpy(), 1e-5)

    cache = module.empty_cache(batch, length, WIDTH)
    for absorbed in (False, True):
        decoded, _ = module.apply({"params": params}, x, cache, absorbed=absorbed, method="decode")
        assert_near(decoded, expected.detach().numpy(), 1e-5)
