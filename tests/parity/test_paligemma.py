"""PaliGemma equals transformers' `PaliGemmaForConditionalGeneration`, with Gemma 1 and Gemma 2: logits, gradients, greedy answers, files."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.numpy import load_file, save_file

from jaxdl import pretrained
from jaxdl.errors import UserError
from jaxdl.losses import cross_entropy
from jaxdl.models import paligemma
from jaxdl.nn import ATTENTIONS
from jaxdl.weights import convert

IMAGE, PATCHES, VOCABULARY = 60, 4, 64
VISION = dict(
    model_type="siglip_vision_model", hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
    image_size=16, patch_size=8, vision_use_head=False,
)  # fmt: skip
TEXT = dict(
    hidden_size=32, num_hidden_layers=2, intermediate_size=48, num_attention_heads=4, num_key_value_heads=1, head_dim=12,
    vocab_size=VOCABULARY,
)  # fmt: skip
KINDS = {
    "gemma": TEXT | dict(model_type="gemma"),
    # A window shorter than every prefix, and soft caps where they bend.
    "gemma2": TEXT | dict(
        model_type="gemma2", num_hidden_layers=3, num_key_value_heads=2, sliding_window=4, query_pre_attn_scalar=20,
        attn_logit_softcapping=2.0, final_logit_softcapping=3.0,
    ),
}  # fmt: skip


@dataclasses.dataclass
class Pair:
    """A published model with weights that are nowhere zero, the same read by us, and what both are given."""

    theirs: Any
    directory: Path
    config: dict
    images: np.ndarray
    tokens: np.ndarray
    prefix: np.ndarray

    def __post_init__(self):
        self.module, self.params = pretrained.load(self.directory)

    def ours(self, params, module=None):
        inputs = (jnp.asarray(each) for each in (self.images, self.tokens, self.prefix))
        return (module or self.module).apply({"params": params}, *inputs).logits

    def run_theirs(self, **options):
        types = np.arange(self.tokens.shape[1]) >= self.prefix[:, None]
        return self.theirs(
            input_ids=torch.tensor(self.tokens).long(), pixel_values=torch.tensor(self.images).movedim(-1, 1),
            token_type_ids=torch.tensor(types).long(), **options,
        )  # fmt: skip


@functools.cache
def make(kind: str, folder: Path) -> Pair:
    torch.manual_seed(0)
    settings = dict(vision_config=VISION, text_config=KINDS[kind], projection_dim=32, hidden_size=32, image_token_index=IMAGE)
    model = transformers.PaliGemmaForConditionalGeneration(transformers.PaliGemmaConfig(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_((0.02 if "embed_tokens" in name else 0.2) * torch.randn_like(parameter))
    model.save_pretrained(folder / kind)
    random = np.random.default_rng(0)
    tokens = random.integers(3, IMAGE, (3, 14), np.int32)
    tokens[:, :PATCHES] = IMAGE
    images = random.standard_normal((3, 16, 16, 3), np.float32)
    config = json.loads((folder / kind / "config.json").read_text())
    return Pair(model, folder / kind, config, images, tokens, np.array([7, 5, 9], np.int32))


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("paligemma")


@pytest.fixture(params=KINDS)
def pair(request, folder) -> Pair:
    return make(request.param, folder)


def test_logits_loss_and_gradients_are_those_of_the_published_model(pair):
    answer = np.arange(14) >= pair.prefix[:, None]
    labels = np.where(answer, pair.tokens, -100)

    @jax.jit
    def ours(params):
        logits = pair.ours(params)
        return cross_entropy(logits[:, :-1], jnp.asarray(labels[:, 1:]), mask=jnp.asarray(answer[:, 1:])), logits

    (value, logits), gradients = jax.value_and_grad(ours, has_aux=True)(pair.params)
    pair.theirs.zero_grad()
    out = pair.run_theirs(labels=torch.tensor(labels).long())
    out.loss.backward()
    np.testing.assert_allclose(logits, out.logits.detach(), atol=1e-5)
    np.testing.assert_allclose(value, out.loss.item(), rtol=1e-5)
    names = {
        "model.vision_tower": "vision_tower",
        "model.multi_modal": "multi_modal",
        "model.language_model": "language_model.model",
    }
    named = {}
    for name, parameter in pair.theirs.named_parameters():
        (begin,) = (begin for begin in names if name.startswith(begin))
        named[names[begin] + name.removeprefix(begin)] = parameter.grad.numpy()
    wanted = convert(named, paligemma.published(pair.module), jax.eval_shape(lambda: gradients))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4), gradients, wanted)


def test_greedy_answers_with_a_cache_are_theirs_also_from_padded_prompts(pair):
    steps, longest = 8, int(pair.prefix.max())
    prompt, valid = np.zeros((3, longest), np.int32), np.arange(longest) >= (longest - pair.prefix)[:, None]
    for row, (tokens, count) in enumerate(zip(pair.tokens, pair.prefix)):
        prompt[row, longest - count :] = tokens[:count]

    ours = paligemma.answer(
        pair.module, {"params": pair.params}, jnp.asarray(pair.images), jnp.asarray(prompt), jnp.asarray(valid), steps=steps
    )
    wanted = pair.theirs.generate(
        input_ids=torch.tensor(prompt).long(), pixel_values=torch.tensor(pair.images).movedim(-1, 1),
        attention_mask=torch.tensor(valid).long(), token_type_ids=torch.zeros(3, longest).long(),
        max_new_tokens=steps, do_sample=False, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    np.testing.assert_array_equal(ours, wanted[:, longest:])
    assert len(np.unique(ours)) > 3


def test_the_flash_form_changes_nothing(pair):
    module, params = pretrained.load(pair.directory, attention=ATTENTIONS["flash"])
    np.testing.assert_allclose(pair.ours(params, module), pair.ours(params), atol=1e-5)


def test_shards_and_the_names_of_the_hubs_files_hold_the_same_weights(pair, tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "hub").mkdir()
    pair.theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    tensors = load_file(pair.directory / "model.safetensors")
    older = {name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in tensors.items()}
    older["language_model.lm_head.weight"] = tensors["language_model.model.embed_tokens.weight"]
    save_file(older, tmp_path / "hub" / "model.safetensors")
    (tmp_path / "hub" / "config.json").write_text(json.dumps(pair.config))
    for name in ("shards", "hub"):
        jax.tree.map(np.testing.assert_array_equal, pretrained.load(tmp_path / name)[1], pair.params)


@pytest.mark.parametrize("kind", KINDS)
def test_fields_left_out_have_the_defaults_of_transformers(kind):
    theirs = transformers.PaliGemmaConfig(text_config=dict(model_type=kind), projection_dim=3072 if kind == "gemma" else 2304)
    ours, _ = paligemma.from_config(dict(text_config=dict(model_type=kind), projection_dim=theirs.projection_dim))
    assert ours == paligemma.from_config(theirs.to_dict())[0]
    assert paligemma.from_config({})[0] == paligemma.from_config(transformers.PaliGemmaConfig().to_dict())[0]


@pytest.mark.parametrize(
    "config, message",
    [
        ({"text_config": {"model_type": "llama"}}, "a decoder of type 'llama'"),
        ({"text_config": {"hidden_act": "relu"}}, "the activation of the decoder is 'relu'"),
        ({"text_config": {"attention_bias": True}}, "attention_bias of the decoder is True"),
        (
            {
                "text_config": {
                    "model_type": "gemma2",
                    "num_hidden_layers": 2,
                    "layer_types": ["full_attention", "sliding_attention"],
                }
            },
            "layer_types",
        ),
        (
            {"text_config": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}},
            "rotary positions of the decoder are 'linear'",
        ),
        ({"projection_dim": 16}, "patches become vectors of 16 and tokens of 2048"),
        ({"vision_config": {"hidden_act": "gelu"}}, "hidden_act in vision_config is 'gelu'"),
    ],
)
def test_settings_that_are_not_paligemmas_are_refused(config, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "paligemma", **config}))
    with pytest.raises(UserError, match=message):
        pretrained.load(tmp_path)
