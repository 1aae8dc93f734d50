"""The encoder-decoder equals `torch.nn.Transformer`, and transformers' `MarianMTModel`: logits, gradients, greedy and beam search, tokens, files."""

import dataclasses
import functools
import io
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from jaxdl import pretrained
from jaxdl.errors import UserError
from jaxdl.generate import Beam
from jaxdl.losses import cross_entropy
from jaxdl.models import marian
from jaxdl.models.marian import EncoderDecoder, Stack, translate
from jaxdl.nn import ATTENTIONS, sinusoidal, stack_blocks
from jaxdl.weights import UNCHANGED, Table, convert, dense, norm, packed_attention

PAD, END = 39, 0
CONFIG = dict(
    vocab_size=40, d_model=16, encoder_layers=2, decoder_layers=3, encoder_attention_heads=2, decoder_attention_heads=4,
    encoder_ffn_dim=24, decoder_ffn_dim=20, max_position_embeddings=48, activation_function="swish", scale_embedding=True,
    pad_token_id=PAD, eos_token_id=END, decoder_start_token_id=PAD, forced_eos_token_id=None, dropout=0.0,
)  # fmt: skip


def shaken(sizes):
    """Their model with weights that are nowhere zero; `sizes` are deviations by parts of names, 0.3 elsewhere."""
    torch.manual_seed(0)
    model = transformers.MarianMTModel(transformers.MarianConfig(**CONFIG)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_positions" not in name:
                size = next((size for part, size in sizes.items() if part in name), 0.3)
                parameter.copy_(torch.randn_like(parameter) * size + ("norm.weight" in name))
        model.final_logits_bias.copy_(torch.randn(1, 40) * 0.1)
    return model


@pytest.fixture(scope="module")
def theirs():
    return shaken({})


@pytest.fixture(scope="module")
def directory(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("marian")
    theirs.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def eloquent(tmp_path_factory):
    """A model with such large weights that sources make a difference and few tokens are repeated, and its directory. Rounding grows in it, too."""
    model = shaken({"shared": 0.4, "norm.weight": 0.5, "bias": 0.05, "q_proj.weight": 2.0, "k_proj.weight": 2.0})
    with torch.no_grad():
        last = model.model.decoder.layers[-1].final_layer_norm.weight
        last.copy_(torch.randn_like(last) * 1.5)
        model.final_logits_bias[:, END] += 3.0  # With a likely end, so that hypotheses of many lengths compete.
    folder = tmp_path_factory.mktemp("eloquent")
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def sources():
    """Of several lengths, each with its end, padded."""
    rows = np.random.default_rng(0).integers(1, 39, (5, 9))
    for row, length in zip(rows, (9, 4, 7, 1, 6)):
        row[length - 1], row[length:] = END, PAD
    return rows


@pytest.fixture(scope="module")
def targets():
    return np.random.default_rng(1).integers(1, 39, (5, 11))


@pytest.mark.parametrize(
    "how", [{}, dict(scan=True, remat=True), dict(attention=ATTENTIONS["flash"])], ids=["plain", "scan and remat", "flash"]
)
def test_logits_and_gradients_are_those_of_marian(theirs, directory, sources, targets, how):
    module, params = pretrained.load(directory)
    module = module.clone(**how)
    if module.scan:
        params = stack_blocks(params)

    @jax.jit
    def ours(params):
        logits = module.apply({"params": params}, jnp.asarray(sources), jnp.asarray(targets)).logits
        return cross_entropy(logits[:, :-1], jnp.asarray(targets[:, 1:])), logits

    (value, logits), gradients = jax.value_and_grad(ours, has_aux=True)(params)
    theirs.zero_grad()
    given, written = torch.tensor(sources), torch.tensor(targets)
    out = theirs(input_ids=given, attention_mask=(given != PAD).long(), decoder_input_ids=written)
    loss = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), written[:, 1:].flatten())
    loss.backward()
    np.testing.assert_allclose(logits, out.logits.detach(), atol=2e-5, rtol=1e-5)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)

    # The bias of the logits is a buffer there, without a gradient: here it gets the mean of softmax − label.
    named = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters() if parameter.grad is not None}
    error = torch.softmax(out.logits[:, :-1], -1) - torch.nn.functional.one_hot(written[:, 1:], 40)
    named["final_logits_bias"] = error.detach().mean((0, 1), keepdim=False).numpy()[None]
    shapes = jax.eval_shape(pretrained.load(directory)[0].init, jax.random.key(0), sources, targets)["params"]
    wanted = convert(named, marian.published(module), shapes)
    wanted = stack_blocks(wanted) if module.scan else wanted
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4), gradients, wanted)


@pytest.mark.parametrize(
    ("beam", "how"),
    [
        (None, dict(num_beams=1)),
        (Beam(4, 1.0, 0.0, "likely"), dict(num_beams=4)),
        (Beam(4, 2.0, 0.0, "surely"), dict(num_beams=4, length_penalty=2.0, early_stopping="never")),
        (Beam(3, 0.0, 0.0, "surely"), dict(num_beams=3, length_penalty=0.0, early_stopping="never")),
    ],
    ids=str,
)
@pytest.mark.parametrize("scan", [False, True])
def test_greedy_and_beam_search_write_what_theirs_write(eloquent, beam, how, scan):
    theirs, directory = eloquent
    module, params = pretrained.load(directory)
    if scan:
        module, params = module.clone(scan=True), stack_blocks(params)
    random = np.random.default_rng(2)
    sources = random.integers(1, 39, (24, 7))
    for row, length in zip(sources, random.integers(1, 8, 24)):
        row[length - 1], row[length:] = END, PAD
    steps = 12
    ours = jax.jit(functools.partial(translate, module, steps=steps, end=END, beam=beam))(
        {"params": params}, jnp.asarray(sources)
    )
    given = torch.tensor(sources)
    wanted = theirs.generate(
        given, attention_mask=(given != PAD).long(), max_new_tokens=steps, do_sample=False, bad_words_ids=[[PAD]], **how
    )[:, 1:].numpy()  # fmt: skip
    wanted = np.pad(wanted, ((0, 0), (0, steps - wanted.shape[1])), constant_values=PAD)
    ended = np.cumsum(wanted == END, axis=1) > 0
    np.testing.assert_array_equal(ours, np.where(ended, END, wanted))
    assert len(np.unique(wanted, axis=0)) > 2 and len(set(ended.sum(1).tolist())) > 1, (
        "the test shows little: they are much alike"
    )


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("norm_first", [False, True])
def test_it_is_torchs_transformer(norm_first):
    """With the paper's positions, ReLU, and the last normalisations of pre-norm stacks; torch has them after post-norm stacks too, and can be made without."""
    torch.manual_seed(0)
    width, vocab_size = 16, 23
    layers = torch.nn.Transformer(width, 4, 2, 2, 32, dropout=0.0, batch_first=True, norm_first=norm_first)
    if not norm_first:
        layers.encoder.norm = layers.decoder.norm = None
    table = torch.nn.Embedding(vocab_size, width)
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    named = {**dict(layers.named_parameters()), "table": table.weight}

    rows = {"tokens/embedding": ("table", UNCHANGED)}
    for name in ("encoder", "decoder"):
        block, layer = rf"{name}/block_(\d+)", rf"{name}.layers.\1"
        parts = ("attention", "feed_forward") if name == "encoder" else ("attention", "cross_attention", "feed_forward")
        rows |= packed_attention(f"{block}/attention", f"{layer}.self_attn")
        if name == "decoder":
            rows |= packed_attention(f"{block}/cross_attention", f"{layer}.multihead_attn")
        rows |= dense(f"{block}/feed_forward/expand", f"{layer}.linear1") | dense(
            f"{block}/feed_forward/contract", f"{layer}.linear2"
        )
        for index, part in enumerate(parts, 1):
            rows |= norm(f"{block}/{part}_norm", f"{layer}.norm{index}")
        rows |= norm(f"{name}/norm", f"{name}.norm")
    table_of_names = Table(rows)

    module = EncoderDecoder(vocab_size, width, Stack(2, 4, 32), Stack(2, 4, 32), norm_first=norm_first)
    random = np.random.default_rng(0)
    source, target = random.integers(1, vocab_size, (3, 7)), random.integers(1, vocab_size, (3, 6))
    source[1, 4:] = source[2, 2:] = 0
    shapes = jax.eval_shape(module.init, jax.random.key(0), source, target)["params"]
    read = lambda tensors: convert({name: tensor.detach().numpy() for name, tensor in tensors.items()}, table_of_names, shapes)

    def ours(params):
        logits = module.apply({"params": params}, jnp.asarray(source), jnp.asarray(target)).logits
        return (logits * jnp.cos(jnp.arange(vocab_size))).sum(), logits

    (_, logits), gradients = jax.jit(jax.value_and_grad(ours, has_aux=True))(read(named))
    positions = torch.tensor(np.asarray(sinusoidal(7, width)))
    embed = lambda tokens: table(torch.tensor(tokens)) * math.sqrt(width) + positions[: tokens.shape[1]]
    padding = torch.tensor(source == 0)
    future = torch.nn.Transformer.generate_square_subsequent_mask(6, dtype=torch.bool)
    out = layers(embed(source), embed(target), tgt_mask=future, src_key_padding_mask=padding, memory_key_padding_mask=padding)
    wanted = out @ table.weight.T
    (wanted * torch.cos(torch.arange(vocab_size))).sum().backward()
    np.testing.assert_allclose(logits, wanted.detach(), atol=1e-5, rtol=1e-5)
    wanted = read({name: parameter.grad for name, parameter in named.items()})
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(wanted))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale, rtol=1e-4), gradients, wanted)


def sentencepieces(texts, vocab_size) -> bytes:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=written, vocab_size=vocab_size, hard_vocab_limit=False, minloglevel=2,
        unk_id=1, bos_id=-1, eos_id=0, pad_id=-1,
    )  # fmt: skip
    return written.getvalue()


@pytest.fixture(scope="module")
def tokenized(tmp_path_factory):
    """The files of a tokenizer as opus-mt's directories have them."""
    folder = tmp_path_factory.mktemp("tokenizer")
    english = ["a small cat sees a big dog", "the dogs are small and see the cat", "a big cat is a cat"] * 20
    german = ["eine kleine Katze sieht einen großen Hund", "die Hunde sind klein und sehen die Katze"] * 20
    models = {"source": sentencepieces(english, 40), "target": sentencepieces(german, 44)}
    pieces = []
    for name, content in models.items():
        (folder / f"{name}.spm").write_bytes(content)
        model = sentencepiece.SentencePieceProcessor(model_proto=content)
        pieces += [model.id_to_piece(index) for index in range(model.get_piece_size())]
    vocabulary = ["</s>", "<unk>", *sorted(set(pieces) - {"</s>", "<unk>"}), ">>deu<<", "<pad>"]
    (folder / "vocab.json").write_text(json.dumps({piece: index for index, piece in enumerate(vocabulary)}))
    config = dict(source_lang="eng", target_lang="deu", model_max_length=512, tokenizer_class="MarianTokenizer")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.filterwarnings("ignore")  # It recommends sacremoses.
def test_tokens_are_those_of_marians_tokenizer(tokenized, tmp_path):
    theirs = transformers.MarianTokenizer.from_pretrained(tokenized)
    reader, writer = pretrained.load_tokenizers(tokenized)
    sentences = ["a small dog", ">>deu<< the cat is big", "wholly unknown: Ω!", ""]
    assert [[*row.tolist(), reader.end] for row in reader.encode(sentences)] == theirs(sentences).input_ids
    translations = ["eine große Katze", "die Hunde sehen", "Ω"]
    rows = [[*row.tolist(), writer.end] for row in writer.encode(translations)]
    assert rows == theirs(text_target=translations).input_ids
    assert (reader.pad, reader.end, reader.length) == (theirs.pad_token_id, theirs.eos_token_id, 512)
    assert reader.vocab_size == writer.vocab_size == len(theirs.encoder)
    for row in rows[:2]:
        assert writer.decode(row) == theirs.decode(row, skip_special_tokens=True, use_source_tokenizer=False)
    reader.save(tmp_path), writer.save(tmp_path)
    again = pretrained.load_tokenizers(tmp_path)
    assert [each.encode(sentences)[1].tolist() for each in again] == [
        each.encode(sentences)[1].tolist() for each in (reader, writer)
    ]


def test_a_published_model_is_fine_tuned(tokenized, tmp_path):
    from experiments import translation
    from jaxdl import launch

    vocabulary = json.loads((tokenized / "vocab.json").read_text())
    pad = vocabulary["<pad>"]
    changed = dict(vocab_size=len(vocabulary), pad_token_id=pad, decoder_start_token_id=pad)
    folder = tmp_path / "published"
    transformers.MarianMTModel(transformers.MarianConfig(**CONFIG | changed)).save_pretrained(folder)
    for file in tokenized.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    data = tmp_path / "data"
    data.mkdir()
    for split, times in (("train", 3), ("val", 2)):
        (data / f"{split}.en").write_text("a small cat\nthe dogs are big\n" * times)
        (data / f"{split}.de").write_text("eine kleine Katze\ndie Hunde sind groß\n" * times)
    config = translation.Config(
        data=f"folder:{data}", init=str(folder), steps=2, batch_size=2, length=24, optimizer="adamw",
        learning_rate=1e-3, beam=2,
    )  # fmt: skip
    result = launch.run(translation.EXPERIMENT, config, tmp_path / "run")
    assert np.isfinite(result["metrics"]["validation_loss"]) and result["metrics"].keys() >= {"bleu", "exact_match"}
    before = pretrained.load(folder)[0]
    assert before.vocab_size == len(vocabulary) and dataclasses.asdict(before)["interleaved"] is False
    with pytest.raises(UserError, match="48 positions"):
        launch.run(translation.EXPERIMENT, dataclasses.replace(config, length=60), tmp_path / "long")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (dict(normalize_before=True), "normalize_before is True"),
        (dict(share_encoder_decoder_embeddings=False), "share_encoder_decoder_embeddings is False"),
        (dict(decoder_vocab_size=7), "only a shared vocabulary"),
        (dict(activation_function="tanh"), "activation_function"),
        (dict(encoder_attention_heads=3), "cannot be split into 3 heads"),
    ],
)
def test_settings_of_other_models_are_refused(setting, message):
    with pytest.raises(UserError, match=message):
        marian.from_config(CONFIG | setting)
