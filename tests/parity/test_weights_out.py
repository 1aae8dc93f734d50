"""What other programs rely on: `pretrained.save` of every family, read by transformers, and by `pretrained.load` to the last bit."""

import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from jaxdl import pretrained
from jaxdl.data.text import Tokenizer
from jaxdl.errors import UserError
from jaxdl.generate import Sampling
from jaxdl.models import clip, gemma, gpt2, marian, paligemma, siglip, vit
from jaxdl.nn import gelu, stack_blocks

SIZES = dict(width=16, depth=2, num_heads=2, mlp_dim=24)
END = 28
random = np.random.default_rng(0)
tokens = lambda *shape: random.integers(3, END - 1, shape).astype(np.int32)
images = lambda channels=3, side=8: random.standard_normal((2, side, side, channels), np.float32)
pixels = lambda given: torch.tensor(np.moveaxis(given, -1, 1).copy())
long = lambda given: torch.tensor(given).long()


@dataclasses.dataclass(frozen=True)
class Case:
    """A module of ours, what it is called with, transformers' class to read it, and how that is called for the same."""

    module: nn.Module
    inputs: tuple[np.ndarray, ...]
    theirs: str
    call: Callable[..., Any]
    ours: Callable[[Any], Any] = lambda out: out.logits
    scan: bool = True
    fresh: tuple[str, ...] = ()
    """Tensors that transformers makes anew, since we have none like them."""


def two_towers(family, inputs: tuple[np.ndarray, ...], vision: dict | None = None, **text: Any) -> Case:
    sizes = dict(width=12, depth=1, num_heads=3, mlp_dim=20, features=16)
    features = dict(features=16) if family is clip else {}
    towers = (
        family.VisionTower(patch_size=4, **SIZES, **features, **(vision or {})),
        family.TextTower(vocab_size=30, **sizes, **text),
    )
    call = lambda model, image, text: model(input_ids=long(text), pixel_values=pixels(image)).logits_per_image
    return Case((siglip.SigLIP if family is siglip else clip.CLIP)(*towers), inputs, "AutoModel", call)


def ended(texts: np.ndarray) -> np.ndarray:
    """With an end at another place in each, and padding by it."""
    return np.where(np.arange(texts.shape[1]) >= 2 + np.arange(len(texts))[:, None], END, texts).astype(np.int32)


def picture_model(num_classes: int, channels: int = 3, **fields: Any) -> Case:
    module = vit.ViT(patch_size=4, num_classes=num_classes, **{**SIZES, **fields})
    if num_classes:
        kind, call = "AutoModelForImageClassification", lambda model, image: model(pixel_values=pixels(image)).logits
        return Case(module, (images(channels),), kind, call)
    call = lambda model, image: model(pixel_values=pixels(image)).last_hidden_state[:, 0]
    fresh = "pooler.dense.weight", "pooler.dense.bias"
    return Case(module, (images(channels),), "AutoModel", call, lambda out: out.features, fresh=fresh)


def translator(**fields: Any) -> Case:
    stacks = marian.Stack(2, 2, 24), marian.Stack(1, 4, 20)
    module = marian.EncoderDecoder(30, 16, *stacks, length=12, pad=2, **fields)
    source = np.where(np.arange(6) >= np.array([[6], [4]]), 2, tokens(2, 6)).astype(np.int32)
    call = lambda model, source, target: (
        model(input_ids=long(source), attention_mask=long(source != 2), decoder_input_ids=long(target)).logits
    )
    return Case(module, (source, tokens(2, 4)), "AutoModelForSeq2SeqLM", call)


def describer(scan: bool = True, **fields: Any) -> Case:
    tower = siglip.VisionTower(patch_size=4, head=False, **SIZES)
    decoder = gemma.Gemma(vocab_size=30, num_kv_heads=1, head_width=8, **SIZES, **fields)
    row = np.concatenate([np.full((2, 4), 29, np.int32), tokens(2, 5)], 1)

    def call(model, image, row, prefix):
        answer = torch.tensor(np.arange(row.shape[1]) >= prefix[:, None]).long()
        mask = torch.ones_like(long(row))
        return model(
            input_ids=long(row), pixel_values=pixels(image), attention_mask=mask, token_type_ids=answer, labels=long(row)
        ).logits

    inputs = images(), row, np.array([6, 5], np.int32)
    return Case(paligemma.PaliGemma(tower, decoder, 29), inputs, "AutoModelForImageTextToText", call, scan=scan)


language = lambda model, row: model(input_ids=long(row)).logits
GEMMA_2 = dict(sandwich_norm=True, query_scale=20.0, window=4, attention_soft_cap=5.0, logit_soft_cap=3.0)
CASES = {
    "siglip": two_towers(siglip, (images(), tokens(3, 6))),
    "siglip without a whole patch at the side": two_towers(siglip, (images(side=10), tokens(3, 6))),
    "clip": two_towers(clip, (images(), ended(tokens(3, 6))), end=END),
    "clip of the highest token": two_towers(clip, (images(), tokens(3, 6)), dict(activation=gelu, eps=1e-4), activation=gelu),
    "vit": picture_model(5),
    "vit of grey images": picture_model(2, channels=1, mlp_dim=None, qkv_bias=False, eps=1e-12),
    "vit without a head": picture_model(0),
    "gpt2": Case(gpt2.GPT(30, 8, **SIZES), (tokens(2, 7),), "AutoModelForCausalLM", language),
    "gpt2 of the usual width": Case(gpt2.GPT(30, 8, 16, 1, 2, dropout=0.1), (tokens(2, 7),), "AutoModelForCausalLM", language),
    "marian": translator(start=2, activation="swish", interleaved=False, logits_bias=True),
    "marian as in the paper": translator(start=1),
    "paligemma": describer(rope_base=5000.0),
    "paligemma 2": describer(scan=False, **GEMMA_2),
    "paligemma 2 without windows": describer(**GEMMA_2 | dict(window=None, attention_soft_cap=None)),
}  # fmt: skip


def parameters(case: Case) -> Any:
    """Fresh ones, moved so that none is 0 or 1, in a way that is the same for the same module."""
    params = jax.jit(case.module.init)(jax.random.key(0), *case.inputs)["params"]
    leaves, structure = jax.tree.flatten(params)
    draw = np.random.default_rng(1)
    return jax.tree.unflatten(structure, [leaf + 0.1 * draw.standard_normal(leaf.shape, np.float32) for leaf in leaves])


@pytest.fixture(scope="module", params=CASES)
def saved(request, tmp_path_factory) -> tuple[Case, Any, Path]:
    case = CASES[request.param]
    directory = tmp_path_factory.mktemp("model")
    pretrained.save(case.module, params := parameters(case), directory)
    return case, params, directory


def read_by_transformers(case: Case, directory: Path) -> Any:
    """Without a tensor that is missing, left over or of another shape."""
    model, info = getattr(transformers, case.theirs).from_pretrained(directory, output_loading_info=True)
    assert sorted(info.pop("missing_keys")) == sorted(case.fresh) and not any(info.values()), info
    return model.eval()


def evaluated(module: nn.Module) -> nn.Module:
    """As `from_config` makes it: without what is of no matter to the weights, and with widths that are usual written out."""
    changes = {}
    for field in dataclasses.fields(module):
        value = getattr(module, field.name)
        if isinstance(value, nn.Module) and field.name != "parent":
            changes[field.name] = evaluated(value)
    if getattr(module, "dropout", 0.0):
        changes["dropout"] = 0.0
    if isinstance(module, vit.ViT):
        changes["mlp_dim"] = module.mlp_dim or 4 * module.width
    if isinstance(module, gemma.Gemma) and module.sandwich_norm:
        changes["query_scale"] = float(module.query_scale or module.head_width)
    return module.clone(**changes)


def test_transformers_computes_the_same(saved):
    case, params, directory = saved
    with torch.no_grad():
        theirs = case.call(read_by_transformers(case, directory), *case.inputs).numpy()
    ours = case.ours(jax.jit(case.module.apply)({"params": params}, *case.inputs))
    np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)
    assert np.abs(ours - np.roll(ours, 1)).max() > 1e-2


def test_what_transformers_saves_again_is_read_to_the_last_bit(saved, tmp_path):
    case, params, directory = saved
    read_by_transformers(case, directory).save_pretrained(tmp_path)
    chex.assert_trees_all_equal(pretrained.load(tmp_path)[1], params)


def test_load_gives_back_module_and_parameters(saved):
    case, params, directory = saved
    module, again = pretrained.load(directory, type(case.module))
    assert module == evaluated(case.module) == pretrained.load_module(directory)
    chex.assert_trees_all_equal(again, params)


def scanned(module: nn.Module) -> nn.Module:
    towers = {name: getattr(module, name) for name in ("vision", "text") if hasattr(module, name)}
    return module.clone(**({name: tower.clone(scan=True) for name, tower in towers.items()} or dict(scan=True)))


def test_stacked_half_precision_parameters_in_shards(saved, tmp_path):
    """Types are kept, blocks are published one by one."""
    case, params, directory = saved
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    module, given = (scanned(case.module), stack_blocks(half)) if case.scan else (case.module, half)
    pretrained.save(module, given, tmp_path, max_shard_bytes=3000)
    assert len(list(tmp_path.glob("model-0*.safetensors"))) > 3
    model = read_by_transformers(case, tmp_path)
    whole = read_by_transformers(case, directory).state_dict()
    for name, tensor in model.state_dict().items():
        if name in whole and "position_ids" not in name and "embed_positions" not in name and name not in case.fresh:
            assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, whole[name].bfloat16()), name
    again = pretrained.load(tmp_path, scan=case.scan)
    chex.assert_trees_all_equal(again[1], given)
    chex.assert_trees_all_equal_dtypes(again[1], given)


def test_one_tensor_too_few_or_too_many_is_named(saved, tmp_path):
    _, _, directory = saved
    tensors = load_file(directory / "model.safetensors")
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    name = sorted(tensors)[len(tensors) // 2]
    for wrong, said in (
        ({each: tensors[each] for each in tensors if each != name}, f"{name} is missing"),
        (tensors | {f"{name}.more": tensors[name]}, f"{name}.more is left over"),
        (tensors | {name: tensors[name][:-1]}, f"{name} of shape"),
    ):
        save_file(wrong, tmp_path / "model.safetensors")
        with pytest.raises(UserError) as error:
            pretrained.load(tmp_path)
        assert said in str(error.value) and str(error.value).count(name) == 1


def test_transformers_writes_the_same_text_and_ends_it_where_we_do(tmp_path):
    """Its ends and pads are those of the tokenizer that was saved with the model."""
    tokenizer = Tokenizer.of_bytes(["a red ring", "a blue square"], 280)
    module = gpt2.GPT(tokenizer.vocab_size, 40, **SIZES)
    params = jax.tree.map(lambda leaf: 5 * leaf, jax.jit(module.init)(jax.random.key(1), tokens(1, 4))["params"])
    prompt = tokenizer.encode(["a red"])[0]
    greedy = Sampling(temperature=0)
    written = gpt2.continue_text(module, {"params": params}, prompt.tolist(), jax.random.key(0), tokens=12, sampling=greedy)
    # The token that comes seventh is made the one that ends a text.
    swapped = np.arange(tokenizer.vocab_size)
    swapped[[tokenizer.end, written[6]]] = written[6], tokenizer.end
    params["tokens"]["embedding"] = params["tokens"]["embedding"][swapped]
    renamed = [int(swapped[token]) for token in prompt]
    ours = gpt2.continue_text(
        module, {"params": params}, renamed, jax.random.key(0), tokens=12, sampling=greedy, end=tokenizer.end
    )
    pretrained.save(module, params, tmp_path, tokenizer=tokenizer)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    theirs = model.generate(torch.tensor([renamed]), max_new_tokens=12, do_sample=False)[0, len(renamed) :].tolist()
    assert ours == theirs and ours[-1] == tokenizer.end and len(ours) <= 7
    read = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert read("a red")["input_ids"] == prompt.tolist() and read.eos_token_id == tokenizer.end


def test_transformers_translates_as_we_do(tmp_path):
    tokenizer = Tokenizer.of_bytes(["a red ring", "ein roter ring"], 270)
    sizes = marian.Stack(1, 2, 24), marian.Stack(1, 2, 24)
    module = marian.EncoderDecoder(tokenizer.vocab_size, 16, *sizes, length=24, pad=tokenizer.pad, start=tokenizer.end)
    params = jax.tree.map(lambda leaf: 2 * leaf, jax.jit(module.init)(jax.random.key(0), tokens(1, 4), tokens(1, 4))["params"])
    source = tokenizer(["a red ring", "ring"], 12)
    ours = marian.translate(module, {"params": params}, jnp.asarray(source), steps=10, end=tokenizer.end, beam=None)
    pretrained.save(module, params, tmp_path, tokenizer=tokenizer)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    options = dict(max_new_tokens=10, do_sample=False, num_beams=1, bad_words_ids=[[tokenizer.pad]])
    theirs = model.generate(long(source), attention_mask=long(source != tokenizer.pad), **options)[:, 1:].numpy()
    for row, expected in zip(np.asarray(ours), theirs):
        count = min(len(expected), list(row).index(tokenizer.end) + 1 if tokenizer.end in row else len(row))
        assert row[:count].tolist() == expected[:count].tolist()
    assert pretrained.load_tokenizers(tmp_path)[0].end == tokenizer.end


small = st.integers(1, 3)
mlp_dims = st.none() | st.integers(1, 99)
eps = st.sampled_from([1e-12, 1e-6, 1e-5, 1e-3])
ATTENTION = {"num_heads": st.just(2), "width": small.map(lambda n: 8 * n)}
TOWERS = {"depth": st.integers(0, 3), "mlp_dim": st.integers(1, 99), "eps": eps, **ATTENTION}
built = lambda kind, **fields: st.builds(kind, **fields)
siglip_towers = lambda **fields: built(siglip.VisionTower, patch_size=small, **TOWERS | fields)
gemma_fields = dict(
    TOWERS, depth=st.integers(1, 3), vocab_size=small, num_kv_heads=st.sampled_from([1, 2]), head_width=small.map(lambda n: 2 * n), rope_base=st.floats(10, 1e6)
)  # fmt: skip
caps = st.none() | st.floats(1, 99)
gemmas = built(gemma.Gemma, **gemma_fields) | built(
    gemma.Gemma, **gemma_fields, sandwich_norm=st.just(True), query_scale=st.none() | st.integers(1, 99).map(float),
    window=st.none() | st.integers(1, 99), attention_soft_cap=caps, logit_soft_cap=caps,
)  # fmt: skip
stacks = built(marian.Stack, depth=st.integers(0, 2), num_heads=st.sampled_from([1, 2, 4]), mlp_dim=st.integers(1, 99))
quick_or_not = st.sampled_from([clip.quick_gelu, gelu])


@st.composite
def clips(draw):
    features, shared = draw(small), dict(activation=quick_or_not)
    text = clip.TextTower, dict(vocab_size=small, end=st.none() | st.integers(3, 60_000))
    vision = clip.VisionTower, dict(patch_size=small)
    towers = (draw(built(kind, features=st.just(features), **TOWERS, **shared, **own)) for kind, own in (vision, text))
    return clip.CLIP(*towers)


@st.composite
def siglips(draw):
    vision = draw(siglip_towers())
    return siglip.SigLIP(vision, draw(built(siglip.TextTower, vocab_size=small, features=st.just(vision.width), **TOWERS)))


@st.composite
def paligemmas(draw):
    return paligemma.PaliGemma(draw(siglip_towers(head=st.just(False))), draw(gemmas), draw(st.integers(0, 300_000)))


MODULES = {
    siglip: siglips(),
    clip: clips(),
    vit: built(vit.ViT, patch_size=small, num_classes=st.integers(0, 4), qkv_bias=st.booleans(), **TOWERS | dict(mlp_dim=mlp_dims)),
    gpt2: built(gpt2.GPT, vocab_size=small, length=small, **TOWERS | dict(mlp_dim=mlp_dims)),
    marian: built(
        marian.EncoderDecoder, vocab_size=small, width=small.map(lambda n: 4 * n), encoder_stack=stacks, decoder_stack=stacks,
        length=small, pad=small, start=small, activation=st.sampled_from(["relu", "swish", "gelu", "gelu_new"]),
        scale_embedding=st.booleans(), interleaved=st.booleans(), logits_bias=st.booleans(),
    ),
    paligemma: paligemmas(),
}  # fmt: skip


@pytest.mark.parametrize("family", MODULES, ids=lambda family: family.__name__.rpartition(".")[2])
def test_a_module_comes_back_from_its_config(family):
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(MODULES[family], small, st.sampled_from([1, 3]), small)
    def equal(module, side, channels, length):
        shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
        tower = getattr(module, "vision", module)
        kernel = {"kernel": shape(getattr(tower, "patch_size", 1) ** 2 * channels, 8)}
        table = {"positions": {"table": shape(side**2 + (family in (clip, vit)), 8)}}
        patches = {"patches": {**kernel, "projection": kernel}}
        shapes = {"vision": patches | table, "text": {"positions": {"table": shape(length, 8)}}, **patches, **table}
        config = json.loads(json.dumps(family.to_config(module, shapes)))
        again, inputs = family.from_config(config)
        assert again == evaluated(module)
        if family is not marian and family is not gpt2:
            pixels = side * tower.patch_size
            assert inputs[0].shape == (1, pixels, pixels, channels)
        if family in (clip, siglip):
            assert inputs[1].shape == (1, length)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kind = getattr(transformers, config["architectures"][0]).config_class
            theirs = json.loads(
                json.dumps({"architectures": config["architectures"], **kind.from_dict(config).to_dict()}, default=str)
            )
        assert family.from_config(theirs)[0] == again

    equal()


TOWER = siglip.VisionTower(patch_size=4, **SIZES)
TEXT = siglip.TextTower(vocab_size=30, features=16, **SIZES)
CLIP = CASES["clip"].module
REFUSED = {
    "head of the vision tower is False": siglip.SigLIP(TOWER.clone(head=False), TEXT),
    "head of the vision tower is True": paligemma.PaliGemma(TOWER, CASES["paligemma"].module.text, 29),
    "pool is 'mean'": vit.ViT(4, num_classes=5, pool="mean", **SIZES),
    "positions is 'sincos'": vit.ViT(4, num_classes=5, positions="sincos", **SIZES),
    "norm_first is True": marian.EncoderDecoder(30, norm_first=True),
    "eps is 1e-06": marian.EncoderDecoder(30, eps=1e-6),
    "features are 16 and 8": CLIP.clone(text=CLIP.text.clone(features=8)),
    "end of the text tower is token 2": CLIP.clone(text=CLIP.text.clone(end=2)),
    "no activation of a published CLIP 'relu'": CLIP.clone(vision=CLIP.vision.clone(activation=jax.nn.relu)),
    "query_scale of the decoder is 20.5": describer(**GEMMA_2 | dict(query_scale=20.5)).module,
    "window of the decoder is 4 without sandwich_norm": describer(window=4).module,
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_the_published_format_cannot_say_is_named(said, tmp_path):
    module = REFUSED[said]
    two = module.text if hasattr(module, "text") else None
    inputs = (images(), tokens(2, 9)) if two else (images(),)
    if isinstance(module, paligemma.PaliGemma):
        inputs = (images(), np.full((2, 4), 29, np.int32), np.array([4, 4], np.int32))
        module_for_shapes = module.clone(vision=module.vision.clone(head=False))
    elif isinstance(module, marian.EncoderDecoder):
        inputs, module_for_shapes = (tokens(1, 2), tokens(1, 2)), module
    else:
        module_for_shapes = module
        if isinstance(module, siglip.SigLIP):
            module_for_shapes = module.clone(vision=module.vision.clone(head=True))
    shapes = jax.eval_shape(module_for_shapes.init, jax.random.key(0), *inputs)["params"]
    with pytest.raises(UserError, match=said):
        pretrained.save_config(module, shapes, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_positions_of_an_oblong_image_are_refused(tmp_path):
    case = CASES["vit"]
    shapes = jax.eval_shape(case.module.init, jax.random.key(0), np.zeros((1, 8, 12, 3), np.float32))["params"]
    with pytest.raises(UserError, match="6 positions are not those of a square image"):
        pretrained.save_config(case.module, shapes, tmp_path)
