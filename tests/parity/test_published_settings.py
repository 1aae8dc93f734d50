"""Settings of every family are read as the class of transformers reads them that wrote them, or refused with their name."""

import copy
import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from published_models import FAMILIES, GEMMA_2, KINDS, PALIGEMMA, call, publish

from jaxdl import pretrained
from jaxdl.errors import UserError
from jaxdl.models import clip, gemma, gpt2, marian, paligemma, siglip, vit
from jaxdl.settings import _UNUSED as UNUSED

MODULES = {"clip": clip, "gpt2": gpt2, "marian": marian, "paligemma": paligemma, "siglip": siglip, "vit": vit}
CLASSES = {
    "GPT2Config": gpt2._SETTINGS,
    "ViTConfig": vit._SETTINGS,
    "MarianConfig": marian._SETTINGS,
    "CLIPConfig": clip._SETTINGS,
    "CLIPVisionConfig": clip._VISION,
    "CLIPTextConfig": clip._TEXT,
    "SiglipConfig": siglip._SETTINGS,
    "SiglipVisionConfig": siglip.VISION,
    "SiglipTextConfig": siglip._TEXT,
    "PaliGemmaConfig": paligemma._SETTINGS,
    "GemmaConfig": gemma.SETTINGS["gemma"],
    "Gemma2Config": gemma.SETTINGS["gemma2"],
}
OURS = {"interleaved_positions", "logits_bias"}
"""Which `to_config` writes and transformers does not know."""


@pytest.mark.parametrize("name", CLASSES)
def test_defaults_and_other_names_are_those_of_transformers(name):
    theirs, ours = getattr(transformers, name), CLASSES[name]
    assert dict(ours.aliases) == theirs.attribute_map
    known = {field.name: field.default for field in dataclasses.fields(theirs)}
    # The classes work these out from other settings.
    worked_out = {
        "decoder_vocab_size",
        "projection_size",
        "layer_types",
        "rope_parameters",
        "n_inner",
        "architectures",
        "id2label",
    }
    for field, setting in ours.fields.items():
        if field in known and field not in worked_out:
            assert setting.default == known[field], field
    unheard = {field for field in known if field not in ours.fields and field not in ours.unused and not UNUSED.fullmatch(field)}
    assert not unheard


def changed(settings: Any, where: str, **fields: Any) -> dict:
    """A copy of settings in which those of a part, or of the whole, are others."""
    settings = copy.deepcopy(settings)
    (settings[where] if where else settings).update(fields)
    return settings


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    publish(request.param, folder)
    return request.param, folder


def sections(config: dict) -> list[str]:
    return ["", *(name for name in ("vision_config", "text_config") if isinstance(config.get(name), dict))]


def other(value: Any) -> list[Any]:
    """Other values of the same type."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1]
    if isinstance(value, float):
        return [value + 0.25]
    return [5, "tanh"] if value is None or isinstance(value, str) else []


def test_what_is_passed_over_changes_nothing_in_transformers(kind):
    """Of every field of the classes that we do not read: its other value gives transformers the same logits."""
    name, folder = kind
    theirs, _, inputs, _ = KINDS[name]
    model = getattr(transformers, theirs)
    config = json.loads((folder / "config.json").read_text())
    published = model.from_pretrained(folder).eval()
    state, wanted = published.state_dict(), call(name, published, inputs)
    family, tried = MODULES[name.split()[0]], 0
    module = family.from_config(config)
    harmless = "transformers_version", "architectures", "model_type", "dtype", "output_", "return_dict", "id2label", "label2id"
    for where in sections(config):
        for field, value in (config[where] if where else config).items():
            if field.startswith(harmless) or field.endswith("_token_id"):
                continue
            for each in other(value):
                edited = changed(config, where, **{field: each})
                try:
                    if family.from_config(edited) != module:
                        continue
                except UserError as error:
                    assert field in str(error), error
                    continue
                try:
                    again = model(model.config_class.from_dict(copy.deepcopy(edited))).eval()
                    again.load_state_dict(state, strict=False)
                except Exception:  # What transformers does not build has no logits.
                    continue
                np.testing.assert_allclose(call(name, again, inputs), wanted, atol=1e-6, err_msg=f"{where} {field}={each}")
                tried += 1
    assert tried > 2


MATTERS = {
    "gpt2": {"": dict(
        scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True, add_cross_attention=True, scale_attn_weights=False,
        activation_function="gelu", tie_word_embeddings=False, n_head=3, layer_norm_epsilon=None, n_embd="16", vocab_size=0,
        n_layer=10**9, n_positions=True, n_heads=4, rotary_dim=8, pruned_heads={"0": [1]}, quantization_config={"bits": 4},
        per_layer_config={"0": {"n_inner": 3}}, n_inner=-1, num_attention_heads=4,
    )},
    "vit": {"": dict(
        hidden_act="relu", qkv_bias=None, qkv_biases=False, layer_norm_eps=float("nan"), image_size=[8, 12], patch_size=[2, 4],
        num_channels=0, id2label=["a"], num_labels=-1, num_attention_heads=3, architectures="ViTModel", use_absolute_embeddings=True,
        quantization_config={"bits": 4}, per_layer_config={"0": {"qkv_bias": False}},
    )},
    "marian": {"": dict(
        normalize_before=True, normalize_embedding=True, add_final_layer_norm=True, static_position_embeddings=False,
        add_bias_logits=True, activation_function="tanh", scale_embedding=1.5, scale_embeddings=False, decoder_vocab_size=20,
        share_encoder_decoder_embeddings=False, tie_word_embeddings=False, encoder_ffn_dim=0, pad_token_id=None, d_model=16.0,
        num_hidden_layers=3, relative_attention_num_buckets=32, pruned_heads={"0": [1]}, quantization_config={"bits": 4},
    )},
    "clip": {
        "": dict(projection_dim=None, text_config=3, vision_config=[], text_config_dict="x", quantization_config={"bits": 4}),
        "vision_config": dict(hidden_act="gelu_new", image_size="8", patch_size=0, layer_norm_epsilon=1e-6, use_registers=4),
        "text_config": dict(eos_token_id=None, hidden_act=3, vocab_size=-1, num_attention_heads=5, max_position_embeddings=None),
    },
    "siglip": {
        "": dict(text_config=3, vision_config=[], quantization_config={"bits": 4}),
        "vision_config": dict(hidden_act="gelu", vision_use_head=False, image_size=[8, 12], num_patches=256, layer_norm_eps=-1),
        "text_config": dict(projection_size=8, projection_size_=3, hidden_act="quick_gelu", is_causal=True, num_attention_heads=5),
    },
    "paligemma": {
        "": dict(
            tie_word_embeddings=False, projection_dim=8, image_token_id=3, image_token_index=-1, text_config=3, vision_config="x",
            quantization_config={"bits": 4},
        ),
        "vision_config": dict(model_type="clip_vision_model", hidden_act="gelu", layer_norm_eps="x"),
        "text_config": dict(
            model_type="llama", hidden_act="relu", hidden_activation="silu", attention_bias=True, rope_theta=0, head_dim=7,
            rope_scaling={"type": "linear", "factor": 2.0}, rope_parameters={"full_attention": {"rope_theta": 3.0}},
            partial_rotary_factor=0.5, final_logit_softcapping=3.0, use_bidirectional_attention=False, sliding_window=4,
            num_key_value_heads=3, tie_word_embeddings=False, layer_types=["sliding_attention"] * 2, rms_norm_eps=None,
        ),
    },
    "paligemma 2": {
        "text_config": dict(
            attn_logit_softcapping=0.0, final_logit_softcapping=-1, sliding_window=0, query_pre_attn_scalar=0, hidden_activation="gelu",
            layer_types=["full_attention"], rope_scaling={"rope_type": "yarn"}, use_bidirectional_attention=False,
            rope_parameters={"rope_type": "default", "rope_theta": 10.0, "partial_rotary_factor": 0.5}, head_dim=None,
        ),
    },
}  # fmt: skip
"""What asks for something that is not computed here, or means nothing."""


@pytest.mark.parametrize(
    ("name", "where", "field"),
    [(name, where, field) for name in MATTERS for where in MATTERS[name] for field in MATTERS[name][where]],
)
def test_what_is_not_computed_here_is_refused_by_its_name(name, where, field, tmp_path):
    config = {"model_type": name.split()[0], **KINDS[name][1]}
    edited = changed(config, where, **{field: MATTERS[name][where][field]})
    (tmp_path / "config.json").write_text(json.dumps(edited))
    with pytest.raises(UserError, match=rf"(?=.*config\.json).*{field}") as error:
        pretrained.load_module(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500 + len(str(tmp_path))


HARMLESS = dict(
    torch_dtype="float16", dtype="bfloat16", use_cache=False, transformers_version="4.2", output_attentions=True, return_dict=False,
    gradient_checkpointing=True, task_specific_params={"translation": {"max_length": 3}}, max_length=20, num_beams=4, top_k=50,
    bad_words_ids=[[3]], forced_eos_token_id=0, initializer_range=0.1, initializer_factor=2.0, attention_dropout=0.1, dropout=0.3,
    hidden_dropout_prob=0.2, attn_pdrop=0.1, classifier_dropout=0.1, layerdrop=0.1, _name_or_path="a/b", _flash_attn_2_enabled=True,
    torchscript=True, pruned_heads={}, is_decoder=True, chunk_size_feed_forward=2, problem_type="single_label_classification",
    finetuning_task="x", tokenizer_class="X", sep_token_id=3, quantization_config=None, adapters={}, license="mit", use_alibi=False,
    auto_map={"AutoModel": "a.B"}, cross_attention_hidden_size=None, label_smoothing=0.1,
)  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_what_changes_nothing_is_passed_over(name):
    kind, settings, *_ = KINDS[name]
    config = json.loads(json.dumps(getattr(transformers, kind).config_class(**copy.deepcopy(settings)).to_dict(), default=str))
    family = MODULES[name.split()[0]]
    wanted = family.from_config(config)
    for where in sections(config):
        for field, value in HARMLESS.items():
            assert family.from_config(changed(config, where, **{field: value})) == wanted, field


OTHER_NAMES = {
    "gpt2": dict(hidden_size=16, num_attention_heads=2, num_hidden_layers=2, max_position_embeddings=8),
    "marian": dict(hidden_size=16, num_attention_heads=2, num_hidden_layers=2),
    "paligemma": dict(image_token_id=29),
}


@pytest.mark.parametrize(("name", "alias"), [(name, alias) for name in OTHER_NAMES for alias in OTHER_NAMES[name]])
def test_a_setting_is_read_under_every_name(name, alias, tmp_path):
    kind, *_ = FAMILIES[name]
    publish(name, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    wanted = pretrained.load_module(tmp_path)
    field = getattr(transformers, kind).config_class.attribute_map[alias]
    del config[field]
    (tmp_path / "config.json").write_text(json.dumps(config | {alias: OTHER_NAMES[name][alias]}))
    assert pretrained.load_module(tmp_path) == wanted
    (tmp_path / "config.json").write_text(json.dumps(config | {alias: OTHER_NAMES[name][alias], field: 7}))
    with pytest.raises(UserError, match=f"{alias}.*{field}|{field}.*{alias}"):
        pretrained.load_module(tmp_path)


def test_the_base_of_rotary_positions_is_read_from_every_place():
    base = lambda **fields: gemma.fields_of_config(fields)["rope_base"]
    theirs = lambda **fields: transformers.GemmaConfig(**fields).rope_parameters["rope_theta"]
    for fields in (
        dict(rope_theta=5000.0),
        dict(rope_theta=5000, rope_scaling=None),
        dict(rope_parameters={"rope_theta": 7.0}),
        dict(rope_parameters={"rope_type": "default"}, rope_theta=9.0),
        dict(rope_scaling={"type": "default", "rope_theta": 3.0}, rope_parameters={"rope_theta": 4.0}),
        {},
    ):
        assert base(**copy.deepcopy(fields)) == theirs(**copy.deepcopy(fields)), fields


def test_a_part_that_is_empty_has_the_defaults_of_its_own_class():
    """One that is left out has those of the whole, which are others."""
    for text in (None, {}, {"model_type": "gemma2"}):
        for vision in (None, {}, {"model_type": "siglip_vision_model"}):
            given = dict(text_config=text, vision_config=vision)
            width = paligemma.from_config({"text_config": text, "projection_dim": 2048})[0].text.width if text is None else 0
            width = width or (2304 if text else 3072)
            theirs = transformers.PaliGemmaConfig(**copy.deepcopy(given), projection_dim=width)
            assert paligemma.from_config(given | dict(projection_dim=width)) == paligemma.from_config(
                json.loads(json.dumps(theirs.to_dict(), default=str))
            )


@pytest.mark.parametrize(
    ("settings", "classes"),
    [
        (dict(num_labels=5), 5),
        (dict(id2label=None), 2),
        ({}, 2),
        (dict(id2label=None, num_labels=3), 3),
        (dict(id2label={"0": "a", "1": "b", "2": "c"}), 3),
        (dict(id2label={"0": "a", "1": "b", "2": "c"}, num_labels=4), 4),
        (dict(id2label={"0": "a", "1": "b", "2": "c"}, num_labels=3), 3),
        (dict(num_labels=0), 0),
        (dict(id2label={}), 0),
    ],
)
def test_the_number_of_classes_is_that_of_transformers(settings, classes):
    assert transformers.ViTConfig(**settings).num_labels == classes == vit.from_config(settings)[0].num_classes


OLD = dict(
    add_cross_attention=False, bad_words_ids=None, chunk_size_feed_forward=0, cross_attention_hidden_size=None, do_sample=False,
    decoder_start_token_id=None, diversity_penalty=0.0, early_stopping=False, encoder_no_repeat_ngram_size=0, finetuning_task=None,
    forced_bos_token_id=None, forced_eos_token_id=None, id2label={"0": "LABEL_0", "1": "LABEL_1"}, is_decoder=False,
    is_encoder_decoder=False, label2id={"LABEL_0": 0, "LABEL_1": 1}, length_penalty=1.0, max_length=20, min_length=0,
    no_repeat_ngram_size=0, num_beam_groups=1, num_beams=1, num_return_sequences=1, output_attentions=False, prefix=None,
    output_hidden_states=False, output_scores=False, problem_type=None, pruned_heads={}, remove_invalid_values=False,
    repetition_penalty=1.0, return_dict=True, return_dict_in_generate=False, sep_token_id=None, task_specific_params=None,
    temperature=1.0, tie_encoder_decoder=False, tie_word_embeddings=True, tokenizer_class=None, top_k=50, top_p=1.0,
    torch_dtype=None, torchscript=False, transformers_version="4.16.0.dev0", use_bfloat16=False, exponential_decay_length_penalty=None,
    typical_p=1.0, suppress_tokens=None, begin_suppress_tokens=None, tf_legacy_loss=False, initializer_factor=1.0,
)  # fmt: skip
"""What transformers 4 wrote into each part."""
HUB = {
    "openai clip": (
        dict(
            _name_or_path="openai/clip-vit-base-patch32", architectures=["CLIPModel"], initializer_factor=1.0, model_type="clip",
            logit_scale_init_value=2.6592, projection_dim=512, text_config_dict=None, vision_config_dict=None, torch_dtype="float32",
            text_config=OLD | dict(
                attention_dropout=0.0, bos_token_id=0, dropout=0.0, eos_token_id=2, hidden_act="quick_gelu", hidden_size=512,
                intermediate_size=2048, layer_norm_eps=1e-5, max_position_embeddings=77, model_type="clip_text_model",
                num_attention_heads=8, num_hidden_layers=12, pad_token_id=1, projection_dim=512, vocab_size=49408,
            ),
            vision_config=OLD | dict(
                attention_dropout=0.0, bos_token_id=None, dropout=0.0, eos_token_id=None, hidden_act="quick_gelu", hidden_size=768,
                image_size=224, intermediate_size=3072, model_type="clip_vision_model", num_attention_heads=12,
                num_hidden_layers=12, patch_size=32, projection_dim=512,
            ),
        ),
        lambda module: module == clip.CLIP.variant("B/32").clone(text=clip.CLIP.variant("B/32").text.clone(end=None)),
    ),
    "gpt2": (
        dict(
            activation_function="gelu_new", architectures=["GPT2LMHeadModel"], attn_pdrop=0.1, bos_token_id=50256, embd_pdrop=0.1,
            eos_token_id=50256, initializer_range=0.02, layer_norm_epsilon=1e-5, model_type="gpt2", n_ctx=1024, n_embd=768, n_head=12,
            n_layer=12, n_positions=1024, resid_pdrop=0.1, summary_activation=None, summary_first_dropout=0.1, summary_type="cls_index",
            summary_proj_to_labels=True, summary_use_proj=True, vocab_size=50257, n_special=0, predict_special_tokens=True,
            task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}},
        ),
        lambda module: module == gpt2.GPT.variant("124M"),
    ),
    "opus-mt": (
        dict(
            _name_or_path="/tmp/Helsinki-NLP/opus-mt-en-de", activation_dropout=0.0, activation_function="swish",
            add_bias_logits=False, add_final_layer_norm=False, architectures=["MarianMTModel"], attention_dropout=0.0,
            bad_words_ids=[[58100]], bos_token_id=0, classif_dropout=0.0, classifier_dropout=0.0, d_model=512,
            decoder_attention_heads=8, decoder_ffn_dim=2048, decoder_layerdrop=0.0, decoder_layers=6, decoder_start_token_id=58100,
            decoder_vocab_size=58101, dropout=0.1, encoder_attention_heads=8, encoder_ffn_dim=2048, encoder_layerdrop=0.0,
            encoder_layers=6, eos_token_id=0, forced_eos_token_id=0, id2label={"0": "LABEL_0"}, init_std=0.02,
            is_encoder_decoder=True, label2id={"LABEL_0": 0}, max_length=512, max_position_embeddings=512, model_type="marian",
            normalize_before=False, normalize_embedding=False, num_beams=6, num_hidden_layers=6, pad_token_id=58100,
            scale_embedding=True, share_encoder_decoder_embeddings=True, static_position_embeddings=True,
            transformers_version="4.22.0.dev0", use_cache=True, vocab_size=58101, extra_pos_embeddings=2,
            force_bos_token_to_be_generated=False, num_labels=3,
        ),
        lambda module: (module.width, module.activation, module.scale_embedding) == (512, "swish", True),
    ),
    "paligemma 3b": (
        dict(
            _vocab_size=257152, architectures=["PaliGemmaForConditionalGeneration"], bos_token_id=2, eos_token_id=1, hidden_size=2048,
            ignore_index=-100, image_token_index=257152, model_type="paligemma", pad_token_id=0, projection_dim=2048,
            text_config=dict(
                hidden_size=2048, intermediate_size=16384, model_type="gemma", num_attention_heads=8, num_hidden_layers=18,
                num_image_tokens=256, num_key_value_heads=1, torch_dtype="float32", vocab_size=257216,
            ),
            torch_dtype="float32", transformers_version="4.42.0.dev0",
            vision_config=dict(
                hidden_size=1152, intermediate_size=4304, model_type="siglip_vision_model", num_attention_heads=16,
                num_hidden_layers=27, num_image_tokens=256, patch_size=14, projection_dim=2048, projector_hidden_act="gelu_fast",
                vision_use_head=False,
            ),
        ),
        lambda module: module == paligemma.PaliGemma.variant("3b"),
    ),
    "paligemma 2 3b": (
        dict(
            _vocab_size=257152, architectures=["PaliGemmaForConditionalGeneration"], bos_token_id=2, eos_token_id=1, hidden_size=2304,
            image_token_index=257152, model_type="paligemma", pad_token_id=0, projection_dim=2304, num_hidden_layers=26,
            text_config=dict(
                architectures=["Gemma2ForCausalLM"], attn_logit_softcapping=50.0, cache_implementation="hybrid", eos_token_id=[1, 107],
                bos_token_id=2, final_logit_softcapping=30.0, hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh",
                hidden_size=2304, intermediate_size=9216, model_type="gemma2", num_hidden_layers=26, num_image_tokens=256,
                num_key_value_heads=4, query_pre_attn_scalar=256, sliding_window=4096, torch_dtype="bfloat16", vocab_size=257216,
            ),
            vision_config=dict(
                hidden_size=1152, intermediate_size=4304, model_type="siglip_vision_model", num_attention_heads=16,
                num_hidden_layers=27, num_image_tokens=256, num_positions=256, patch_size=14, projection_dim=2304,
                torch_dtype="bfloat16", vision_use_head=False,
            ),
        ),
        lambda module: module == paligemma.PaliGemma.variant("2-3b").clone(text=paligemma.PaliGemma.variant("2-3b").text.clone(query_scale=256.0)),
    ),
    "siglip": (
        dict(
            architectures=["SiglipModel"], initializer_factor=1.0, model_type="siglip", torch_dtype="float32",
            text_config=dict(model_type="siglip_text_model", torch_dtype="float32", bos_token_id=49406, eos_token_id=49407),
            vision_config=dict(model_type="siglip_vision_model", torch_dtype="float32"), transformers_version="4.37.0.dev0",
        ),
        lambda module: module == siglip.SigLIP.variant("B/16"),
    ),
    "vit": (
        dict(
            _name_or_path="google/vit-base-patch16-224", architectures=["ViTForImageClassification"], attention_probs_dropout_prob=0.0,
            hidden_act="gelu", hidden_dropout_prob=0.0, hidden_size=768, id2label={str(k): "x" for k in range(1000)}, image_size=224,
            initializer_range=0.02, intermediate_size=3072, layer_norm_eps=1e-12, model_type="vit", num_attention_heads=12,
            num_channels=3, num_hidden_layers=12, patch_size=16, qkv_bias=True, transformers_version="4.13.0.dev0", encoder_stride=16,
            pooler_act="tanh", pooler_output_size=768,
        ),
        lambda module: module == vit.ViT.variant("B/16", num_classes=1000, eps=1e-12, mlp_dim=3072),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HUB)
def test_files_as_the_hub_has_them_are_read(name, tmp_path):
    config, right = HUB[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert right(pretrained.load_module(tmp_path))


@pytest.mark.parametrize("name", FAMILIES)
def test_square_sides_may_be_given_twice_and_activations_under_other_names(name, tmp_path):
    publish(name, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    wanted = pretrained.load_module(tmp_path)
    part = config.get("vision_config", config)
    for field in ("image_size", "patch_size"):
        if field in part:
            part[field] = [part[field]] * 2
    same = {"gelu_new": "gelu_pytorch_tanh", "gelu_pytorch_tanh": "gelu_new", "swish": "silu", "gelu": "gelu_python"}
    for each in (part, config.get("text_config", {})):
        for field in ("activation_function", "hidden_act"):
            if each.get(field) in same and name != "marian":
                each[field] = same[each[field]]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert pretrained.load_module(tmp_path) == wanted


def test_gemma_2_without_windows_or_caps_equals_transformers(tmp_path):
    config = transformers.PaliGemmaConfig(**copy.deepcopy(PALIGEMMA | dict(text_config=GEMMA_2 | dict(
        layer_types=["full_attention"] * 2, sliding_window=None, attn_logit_softcapping=None, final_logit_softcapping=None,
    ))))  # fmt: skip
    torch.manual_seed(0)
    model = transformers.PaliGemmaForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    module, params = pretrained.load(tmp_path)
    inputs = KINDS["paligemma 2"][2]
    ours = jax.jit(module.apply)({"params": params}, *map(jnp.asarray, inputs)).logits
    np.testing.assert_allclose(ours, call("paligemma 2", model, inputs), atol=1e-5)
