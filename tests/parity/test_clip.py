"""CLIP equals transformers' `CLIPModel`, layer by layer, in its gradients, and from the files as they are published."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from versus_torch import outputs_of_parts, parts_of_towers

from jaxdl import pretrained
from jaxdl.errors import UserError
from jaxdl.losses import softmax_loss
from jaxdl.models import clip
from jaxdl.weights import convert

LAYER, MODEL, GRADIENT = 1e-5, 1e-4, 1e-4
END = 48
TEXT = dict(vocab_size=50, max_position_embeddings=8, bos_token_id=0, eos_token_id=END)
TOWER = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
SMALL = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=3)
CONFIGS = {
    "equal towers": dict(text_config=TEXT | TOWER, vision_config=TOWER | dict(image_size=32, patch_size=8), projection_dim=32),
    # As OpenAI's own files: the end is where the highest token stands. Towers of two sizes.
    "highest token": dict(
        text_config=TEXT | SMALL | dict(eos_token_id=2, layer_norm_eps=1e-3),
        vision_config=TOWER | dict(image_size=16, patch_size=4),
        projection_dim=20,
    ),
    "exact GELU": dict(
        text_config=TEXT | SMALL | dict(hidden_act="gelu"),
        vision_config=SMALL | dict(image_size=12, patch_size=6, hidden_act="gelu"),
        projection_dim=16,
    ),
}


@dataclasses.dataclass
class Pair:
    """A published model with weights that are nowhere zero, the same read by us, and what both are given."""

    theirs: Any
    directory: Path
    images: np.ndarray
    tokens: np.ndarray

    def __post_init__(self):
        self.module, self.params = pretrained.load(self.directory)
        apply = functools.partial(self.module.apply, capture_intermediates=True, mutable=["intermediates"])
        self.run_ours = jax.jit(lambda params: apply({"params": params}, jnp.asarray(self.images), jnp.asarray(self.tokens)))

    def run_theirs(self, **options):
        pixels = torch.tensor(self.images).movedim(-1, 1)
        return self.theirs(pixel_values=pixels, input_ids=torch.tensor(self.tokens).long(), return_loss=True, **options)


@functools.cache
def make(name: str, directory: Path) -> Pair:
    torch.manual_seed(0)
    config = transformers.CLIPConfig(**CONFIGS[name])
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory / name)
    random, side = np.random.default_rng(0), config.vision_config.image_size
    tokens = random.integers(3, END, (4, 8), np.int32)
    # An end at the last place, one that more of its kind follow, one that other tokens follow; and a row without any.
    tokens[0, 7], tokens[1, 3:], tokens[2, 4] = END, END, END
    return Pair(model, directory / name, random.standard_normal((4, side, side, 3), np.float32), tokens)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("published_clip")


@pytest.fixture(params=CONFIGS)
def pair(request, folder) -> Pair:
    return make(request.param, folder)


def array(tensor) -> np.ndarray:
    return tensor.detach().float().numpy()


def test_every_layer_is_equal(pair):
    theirs = outputs_of_parts(pair.theirs, pair.run_theirs)
    found = jax.tree.leaves_with_path(pair.run_ours(pair.params)[1]["intermediates"])
    ours = {"/".join(key.key for key in path[:-2]): output for path, output in found}

    pairs = {"vision/positions": "vision_model.embeddings", "text/positions": "text_model.embeddings"}
    pairs |= {"vision/norm": "vision_model.pre_layrnorm", "text/encoder/norm": "text_model.final_layer_norm"}
    pairs |= {"vision/head": "visual_projection", "text/head": "text_projection"}
    config = pair.theirs.config
    pairs |= parts_of_towers({tower: getattr(config, f"{tower}_config").num_hidden_layers for tower in ("vision", "text")})
    for our_name, their_name in pairs.items():
        value = ours[our_name].reshape(theirs[their_name].shape)  # A feed-forward computes on rows.
        np.testing.assert_allclose(value, theirs[their_name], atol=LAYER, rtol=LAYER, err_msg=our_name)


def test_embeddings_logits_and_loss_are_equal(pair):
    with torch.no_grad():
        theirs = pair.run_theirs()
    ours, _ = pair.run_ours(pair.params)
    chex.assert_trees_all_close(ours.image_embeddings, array(theirs.image_embeds), atol=LAYER)
    chex.assert_trees_all_close(ours.text_embeddings, array(theirs.text_embeds), atol=LAYER)
    chex.assert_trees_all_close(ours.logits, array(theirs.logits_per_image), atol=MODEL)
    loss = softmax_loss(ours.image_embeddings, ours.text_embeddings, ours.log_temperature)
    chex.assert_trees_all_close(loss, array(theirs.loss), rtol=LAYER)


def test_the_gradient_of_every_parameter_is_equal(pair):
    def loss(params):
        output, _ = pair.run_ours(params)
        return softmax_loss(output.image_embeddings, output.text_embeddings, output.log_temperature)

    pair.theirs.zero_grad()
    pair.run_theirs().loss.backward()
    theirs = {name: parameter.grad.numpy() for name, parameter in pair.theirs.named_parameters()}
    # The table is linear in the tensors, so what maps weights maps gradients too.
    expected = convert(theirs, clip.published(pair.module), jax.eval_shape(lambda: pair.params))
    chex.assert_trees_all_close(jax.jit(jax.grad(loss))(pair.params), expected, atol=GRADIENT, rtol=GRADIENT)


def test_fields_left_out_have_the_defaults_of_transformers():
    assert clip.from_config({"model_type": "clip"}) == clip.from_config(transformers.CLIPConfig().to_dict())
    assert clip.from_config({})[0] == clip.CLIP.variant("B/32")


def test_settings_that_older_files_have_twice_are_read_as_transformers_reads_them():
    given = dict(
        text_config=dict(SMALL, eos_token_id=2), text_config_dict=dict(TOWER), vision_config=dict(SMALL), vision_config_dict=None,
        projection_dim=20,
    )  # fmt: skip
    theirs = transformers.CLIPConfig(**json.loads(json.dumps(given))).to_dict()
    ours, _ = clip.from_config(given)
    assert (ours, ours.text.width, ours.text.end) == (clip.from_config(theirs)[0], 32, clip.VOCABULARY - 1)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"vision_config": {"hidden_act": "gelu_new"}}, "hidden_act in vision_config 'gelu_new'"),
        ({"text_config": {"layer_norm_eps": "1e-5"}}, "layer_norm_eps in text_config is '1e-5'"),
        ({"text_config": {"eos_token_id": [1, 2]}}, "one token ends a text"),
        ({"vision_config": {"image_size": [224, 336]}}, "square"),
        ({"text_config": {"num_attention_heads": 7}}, "hidden_size of 512 in text_config cannot be split into 7 heads"),
    ],
)
def test_settings_that_are_not_clips_are_refused(config, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", **config}))
    with pytest.raises(UserError, match=message):
        pretrained.load(tmp_path)


def test_changes_reach_both_towers(folder):
    module, _ = pretrained.load(make("equal towers", folder).directory, dropout=0.1, dtype=jnp.bfloat16)
    assert module.vision.dropout == module.text.dropout == 0.1 and module.vision.dtype == module.text.dtype == jnp.bfloat16


def test_tokens_are_those_of_the_published_tokenizer(tmp_path):
    """Trained here in the published form: bytes, words that end in `</w>`, a start and an end."""
    pieces = pytest.importorskip("tokenizers")
    model = pieces.Tokenizer(pieces.models.BPE(end_of_word_suffix="</w>"))
    model.normalizer = pieces.normalizers.Lowercase()
    model.pre_tokenizer = pieces.pre_tokenizers.ByteLevel(add_prefix_space=False)
    marks, alphabet = ["<|startoftext|>", "<|endoftext|>"], pieces.pre_tokenizers.ByteLevel.alphabet()
    trainer = pieces.trainers.BpeTrainer(
        vocab_size=700, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(["a photo of a cat and two dogs", "it's a picture of 23 red birds"] * 5, trainer)
    learned = json.loads(model.to_str())["model"]
    vocabulary = dict(learned["vocab"])
    for token in [*(f"{letter}</w>" for letter in sorted(alphabet)), *marks]:
        vocabulary.setdefault(token, len(vocabulary))
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    theirs = transformers.CLIPTokenizer(vocabulary, [tuple(pair) for pair in learned["merges"]], model_max_length=12)
    theirs.save_pretrained(tmp_path)
    transformers.CLIPImageProcessorPil().save_pretrained(tmp_path)
    process, tokenize = pretrained.load_processors(tmp_path)
    texts = ["A photo of a CAT", "", "it's  two dogs, 23 of them!", "größe 🦆", "a photo of " * 20]
    wanted = theirs(texts, padding="max_length", truncation=True, return_tensors="np")["input_ids"]
    np.testing.assert_array_equal(tokenize(texts), wanted)
    assert (wanted[:, 0] == vocabulary[marks[0]]).all() and tokenize.end == vocabulary[marks[1]]
    assert process == clip.image_processor(224)
