"""GPT equals transformers' `GPT2LMHeadModel`: logits, gradients, generation, files; and its filters for sampling."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.numpy import load_file, save_file

from jaxdl import pretrained
from jaxdl.errors import UserError
from jaxdl.generate import Sampling, filter_logits, generate
from jaxdl.losses import cross_entropy
from jaxdl.models import gpt2
from jaxdl.nn import stack_blocks
from jaxdl.weights import convert

CONFIG = dict(vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
DROPOUTS = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**CONFIG, **DROPOUTS)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # Nowhere zero, as biases are at the start.
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.fixture(scope="module")
def directory(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    theirs.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 50, (3, 11))


def test_logits_and_gradients_are_those_of_the_published_model(theirs, directory, tokens):
    module, params = pretrained.load(directory)

    @jax.jit
    def ours(params):
        logits = module.apply({"params": params}, jnp.asarray(tokens)).logits
        return cross_entropy(logits[:, :-1], jnp.asarray(tokens[:, 1:])), logits

    (value, logits), gradients = jax.value_and_grad(ours, has_aux=True)(params)
    theirs.zero_grad()
    given = torch.tensor(tokens)
    out = theirs(given, labels=given)
    out.loss.backward()
    np.testing.assert_allclose(logits, out.logits.detach(), atol=1e-4)
    np.testing.assert_allclose(value, out.loss.item(), rtol=1e-5)
    named = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}
    wanted = convert(named, gpt2.published(module), jax.eval_shape(lambda: gradients))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), gradients, wanted)


@pytest.mark.parametrize("scan", [False, True])
def test_greedy_generation_with_a_cache_is_theirs_also_from_padded_prompts(theirs, directory, tokens, scan):
    module, params = pretrained.load(directory)
    if scan:
        module, params = module.clone(scan=True), stack_blocks(params)
    prompt, valid = tokens[:, :6], np.arange(6) >= np.array([0, 2, 5])[:, None]

    def decode(variables, tokens, cache, valid):
        out, cache = module.apply(variables, tokens, cache, valid=valid, method="decode")
        return out.logits, cache

    ours = generate(
        decode, {"params": params}, jnp.asarray(prompt), module.empty_cache(3, 16), jax.random.key(0), steps=8,
        sampling=Sampling(temperature=0), valid=jnp.asarray(valid),
    )  # fmt: skip
    wanted = theirs.generate(
        torch.tensor(prompt), attention_mask=torch.tensor(valid).long(), max_new_tokens=8, do_sample=False, pad_token_id=0,
        eos_token_id=None,
    )  # fmt: skip
    np.testing.assert_array_equal(ours, wanted[:, 6:])


def test_files_are_read_with_and_without_the_prefix(directory, tokens, tmp_path):
    """The hub's own have none."""
    tensors = load_file(directory / "model.safetensors")
    assert all(name.startswith("transformer.") for name in tensors)
    save_file({name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    one, other = pretrained.load(directory)[1], pretrained.load(tmp_path)[1]
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_variant_has_the_published_number_of_parameters():
    for name, count in (("124M", 124_439_808), ("355M", 354_823_168), ("774M", 774_030_080), ("1558M", 1_557_611_200)):
        module = gpt2.GPT.variant(name)
        shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


def test_settings_of_other_models_are_refused():
    with pytest.raises(UserError, match="activation_function is 'relu'"):
        gpt2.from_config({"activation_function": "relu"})
    with pytest.raises(UserError, match="variant"):
        gpt2.GPT.variant("125M")
    module = gpt2.GPT(vocab_size=5, length=4, width=8, depth=1, num_heads=2)
    with pytest.raises(UserError, match="5 tokens are more than the 4 positions"):
        module.init(jax.random.key(0), jnp.zeros((1, 5), jnp.int32))
    with pytest.raises(UserError, match="4 positions"):
        module.empty_cache(1, 5)


@pytest.mark.parametrize(
    "how", [dict(temperature=0.7), dict(top_k=5), dict(top_p=0.6), dict(temperature=2.0, top_k=20, top_p=0.8)]
)
def test_sampling_excludes_what_theirs_excludes(how):
    logits = np.random.default_rng(1).standard_normal((4, 40)).astype(np.float32)
    warpers = transformers.LogitsProcessorList()
    warpers.append(transformers.TemperatureLogitsWarper(how.get("temperature", 1.0)))
    if "top_k" in how:
        warpers.append(transformers.TopKLogitsWarper(how["top_k"]))
    if "top_p" in how:
        warpers.append(transformers.TopPLogitsWarper(how["top_p"]))
    wanted = warpers(None, torch.tensor(logits)).numpy()
    np.testing.assert_allclose(jax.jit(functools.partial(filter_logits, sampling=Sampling(**how)))(logits), wanted, rtol=1e-6)
