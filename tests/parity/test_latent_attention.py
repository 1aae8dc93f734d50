"""Latent attention equals HF's DeepseekV2 and DeepseekV3, in value and gradient, with and without YaRN."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from versus_torch import normal

from jaxdl.nn import LatentAttention, rope, rotary_frequencies, yarn_frequencies, yarn_magnitude

YARN = dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=0.7, beta_fast=4.0)
HEADS, KEY, TURNED, VALUE, RANK = 3, 10, 8, 6, 12
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


def reference(version, query_rank, stretched, interleaved):
    """HF's attention with random parameters, and its table of angles."""
    module = __import__(f"transformers.models.deepseek_v{version}.modeling_deepseek_v{version}", fromlist=["_"])
    config = getattr(transformers, f"DeepseekV{version}Config")(
        hidden_size=24,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        q_lora_rank=query_rank,
        kv_lora_rank=RANK,
        qk_nope_head_dim=KEY,
        qk_rope_head_dim=TURNED,
        v_head_dim=VALUE,
        max_position_embeddings=128,
        rope_parameters={**(YARN if stretched else dict(rope_type="default")), "rope_theta": 10_000.0},
        attn_implementation="eager",
        **({} if interleaved is None else dict(rope_interleave=interleaved)),
    )
    attention = getattr(module, f"DeepseekV{version}Attention")(config, layer_idx=0).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4 + (parameter.ndim == 1))
    return attention, getattr(module, f"DeepseekV{version}RotaryEmbedding")(config)


def ours(query_rank, stretched, interleaved):
    frequencies, magnitude, sharper = rotary_frequencies(TURNED), 1.0, 1.0
    if stretched:
        sharper = yarn_magnitude(YARN["factor"], YARN["mscale_all_dim"])
        frequencies = yarn_frequencies(TURNED, YARN["factor"], 16, beta_fast=YARN["beta_fast"])
        magnitude = yarn_magnitude(YARN["factor"], YARN["mscale"]) / sharper
    rotary = functools.partial(rope, frequencies=frequencies, interleaved=interleaved is not False, magnitude=magnitude)
    scale = (KEY + TURNED) ** -0.5 * sharper**2 if stretched else None
    return LatentAttention(HEADS, KEY, TURNED, VALUE, RANK, query_rank, rotary=rotary, scale=scale)


@pytest.mark.parametrize("stretched", [False, True])
@pytest.mark.parametrize("query_rank", [None, 14])
@pytest.mark.parametrize(("version", "interleaved"), [(2, None), (3, True), (3, False)])
def test_values_and_gradients_are_those_of_deepseek(version, interleaved, query_rank, stretched):
    theirs, angles = reference(version, query_rank, stretched, interleaved)
    parameters = dict(theirs.named_parameters())
    hf = {name: f"{NAMES[name]}.weight" for name in NAMES if f"{NAMES[name]}.weight" in parameters}
    assert len(hf) == len(parameters)
    params = {name: jnp.asarray(parameters[other].detach().numpy().T) for name, other in hf.items()}
    module = ours(query_rank, stretched, interleaved)
    x, cotangent = map(jnp.asarray, normal(0, (2, 21, 24), (2, 21, 24)))

    tensor = torch.tensor(np.array(x), requires_grad=True)
    table = angles(tensor, torch.arange(21)[None])
    hidden = torch.full((21, 21), -torch.inf).triu(1).expand(2, 1, 21, 21)
    expected = theirs(hidden_states=tensor, position_embeddings=table, attention_mask=hidden)[0]
    wanted = torch.autograd.grad(
        expected, [tensor, *(parameters[other] for other in hf.values())], torch.tensor(np.array(cotangent))
    )

    run = jax.jit(lambda x, params: module.apply({"params": params}, x, is_causal=True))
    out, pull = jax.vjp(run, x, params)
    np.testing.assert_allclose(out, expected.detach(), rtol=1e-5, atol=1e-5)
    gradient, by_name = pull(cotangent)
    for name, got, want in zip(["x", *hf], [gradient, *(by_name[name] for name in hf)], wanted):
        np.testing.assert_allclose(got, want.numpy().T if name != "x" else want, rtol=1e-4, atol=1e-4, err_msg=name)

    cache = module.empty_cache(2, 21, 24)
    for absorbed in (False, True):
        decoded, _ = module.apply({"params": params}, x, cache, absorbed=absorbed, method="decode")
        np.testing.assert_allclose(decoded, expected.detach(), rtol=1e-5, atol=1e-5)
