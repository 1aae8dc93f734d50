"""Translation: a Transformer reads a sentence and writes it in another language (Vaswani et al. 2017, Attention Is All You Need).

It learns from pairs of sentences alone: the encoder reads the source as a whole, the decoder predicts each token of the translation from those before it and from what it attends to in the source. Then it writes translations of sentences that it has not seen, by beam search, which are compared with human ones.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from annotated_types import Ge, Lt
from jaxtyping import Array, Float, Int, Key, PyTree

from jaxdl import figures, launch, pretrained
from jaxdl.data import PARALLEL_TEXT, Translation
from jaxdl.data.packing import Packed, buckets
from jaxdl.data.text import Tokenizer
from jaxdl.errors import UserError
from jaxdl.files import replace_text
from jaxdl.generate import Beam
from jaxdl.losses import cross_entropy
from jaxdl.metrics import bleu
from jaxdl.models.marian import VARIANTS, EncoderDecoder, Stack, translate
from jaxdl.nn import attention_weights
from jaxdl.tasks.kept import kept_tokenizer
from jaxdl.training import (
    OPTIMIZERS,
    Aux,
    Batch,
    Layout,
    Model,
    Report,
    Run,
    TrainState,
    configured,
    decay_mask,
    is_first,
    load_model,
    published_folder,
    setup_training,
    to_host,
    train,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MORE_THAN_SOURCE = 50
"""Tokens that a translation may be longer than its source (Vaswani et al. 2017, section 6.1)."""
PRINTED = 5
"""Translations on the terminal."""


@dataclasses.dataclass(frozen=True)
class Config(launch.Config, launch.Transformer, launch.Init, launch.Ask):
    """What this experiment computes."""

    decay: Literal["cosine", "inverse_sqrt"] = "cosine"
    """How the learning rate falls after its warm-up: along a cosine to zero, or with the inverse square root of the step (Vaswani et al. 2017, eq. 3)."""
    optimizer: Literal[*OPTIMIZERS] = "muon"
    """AdamW, or Muon, which learns faster in short runs."""
    label_smoothing: Annotated[float, Ge(0), Lt(1)] = 0.1
    """Share of the target distribution that is spread over all tokens."""
    source: str = "en"
    """The language to translate from: a CLDR code, or the ending of a folder's files."""
    target: str = "de"
    """The language to translate to."""
    test: str = ""
    """A further part of --data, on which the finished model is measured too: a pair of files in the folder, by their name without a language (test_2016_flickr), or a split of the TFDS set (test)."""
    variant: Literal[("", *VARIANTS)] = ""
    """The paper's base or big model, of which --dropout is 0.1 or 0.3. Empty: the sizes that follow."""
    length: Annotated[int, Ge(2)] = 64
    """Tokens of a row, on each side; a row of a batch holds as many pairs as fit. Longer pairs are left out of training and of the validation loss, but are translated."""
    width: Annotated[int, Ge(2)] = 128
    """Of the residual stream."""
    depth: Annotated[int, Ge(1)] = 3
    """Blocks of the encoder, and of the decoder."""
    num_heads: Annotated[int, Ge(1)] = 4
    """Attention heads; they divide the width."""
    norm_first: bool = False
    """Normalise before each part (pre-norm), and not after each sum as the paper does (post-norm)."""
    vocab_size: Annotated[int, Ge(258)] = 1000
    """Largest vocabulary of the byte pair encoding, trained on both languages together."""
    beam: Annotated[int, Ge(0)] = 4
    """Hypotheses that the search keeps. 0: the likeliest token at each step (greedy)."""
    length_penalty: Annotated[float, Ge(0)] = 0.6
    """Exponent of the length by which hypotheses' log-probabilities are divided (Wu et al. 2016, eq. 14)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(sentence.strip() for sentence in self.ask):
            raise UserError("--ask wants sentences: there is nothing to translate in an empty one")

    def schedule(self) -> optax.Schedule:
        """The learning rate of each step."""
        if self.decay == "cosine":
            return super().schedule()
        rise = max(1, int(self.warmup * self.steps))
        return lambda step: self.learning_rate * jnp.minimum((step + 1) / rise, (rise / (step + 1)) ** 0.5)


_SMALL = Config(data="builtin:cldr", steps=900, batch_size=8, learning_rate=0.02, weight_decay=0.01, evaluate_every=300)
_PAPER = dict(optimizer="adamw", decay="inverse_sqrt", precision="bf16", learning_rate=7e-4)

PRESETS = {
    "default": _SMALL,
    # For two cores: --data folder:PATH with train.en, train.de, val.en, val.de and the test files of Multi30k (Elliott et al. 2016).
    "multi30k": dataclasses.replace(
        _SMALL, test="test_2016_flickr", steps=3600, batch_size=16, vocab_size=4000, norm_first=True, dropout=0.1,
        evaluate_every=600,
    ),
    # The same on an accelerator. From-scratch Transformers that people publish reach 30 to 34 BLEU.
    "gpu": dataclasses.replace(
        _SMALL, test="test_2016_flickr", steps=6000, batch_size=64, length=128, vocab_size=8000, width=512, depth=4, num_heads=8,
        dropout=0.3, weight_decay=1e-4, evaluate_every=500, ema_decay=0.999, **_PAPER,
    ),
    # Vaswani et al. 2017, section 5: 25,000 tokens of each language in a batch, 37,000 tokens, 4,000 of 100,000 steps of warm-up to (512 · 4000)^−1/2.
    "paper_base": dataclasses.replace(
        _SMALL, data="tfds:wmt14_translate/de-en", test="test", variant="base", dropout=0.1, steps=100_000, batch_size=100,
        length=256, vocab_size=37_000, warmup=0.04, weight_decay=0.0, evaluate_every=2000, attention="flash", **_PAPER,
    ),
    "finetune": dataclasses.replace(
        _SMALL, init="Helsinki-NLP/opus-mt-en-de", steps=500, length=128, optimizer="adamw", learning_rate=5e-5, dropout=0.1,
        evaluate_every=100,
    ),
}  # fmt: skip


def main(config: Config, run: Run) -> dict[str, Any]:
    """Trains (or goes on training), measures, translates, draws, and returns what is in `result.json`."""
    languages = dict(data_dir=config.data_dir, source=config.source, target=config.target)
    opened = PARALLEL_TEXT.open(config.data, config.eval_data, **languages)
    run.reads(*opened)
    pairs, held_out = map(list, opened)
    compared = {"": held_out}
    if config.test:
        compared[f"{config.test}_"] = list(PARALLEL_TEXT.open_part(config.data, config.test, **languages))
    with run.first_process_first():
        reader, writer = load_tokenizers(config, pairs, run)
    module, params = build(config, reader)
    source, unread = (pack(each, config.length, module, reader, writer) for each in (pairs, held_out))
    run.say(
        f"{len(pairs):,} pairs in {len(source):,} rows, of which {source.filled:.0%} is filled; "
        f"{source.info.left_out} with more than {config.length} tokens are left out, "
        f"and {unread.info.left_out} of the {len(held_out):,} held-out ones, which are translated all the same"
    )

    batches = run.batches(source, lambda row, rng: row)
    update = configured(
        config,
        functools.partial(objective, module, config.label_smoothing, source.target_tokens),
        lambda schedule: OPTIMIZERS[config.optimizer](schedule, config.weight_decay, b2=0.98, mask=decay_mask),
    )
    first = [jnp.asarray(source[0][name])[None] for name in ("source", "target")]
    step, state = setup_training(config, run.layout, update, init=lambda key: module.init(key, *first), params=params)

    rows = [unread[index] for index in range(len(unread))]
    each = run.layout.inference(functools.partial(losses, module), batch_size=32)
    translator = Translator(config, module, run.layout, reader, writer)

    def evaluate(variables: PyTree, key: Key[Array, ""]) -> Report:
        return measure(each(variables, rows))

    def show(variables: PyTree, key: Key[Array, ""]) -> Report:
        return {"cross_attention": draw(module, variables, reader, writer, held_out)}

    def conclude(variables: PyTree, key: Key[Array, ""]) -> Report:
        reports = [compare(translator, variables, pairs, name, run) for name, pairs in compared.items()]
        return {name: value for report in reports for name, value in report.items()}

    def answer(variables: PyTree) -> None:
        for sentence, translation in zip(config.ask, translator(variables, config.ask)):
            run.say(f"{sentence}\n  → {translation}")

    return train(
        run, step, state, batches, evaluate=evaluate, show=show, conclude=conclude, answer=answer if config.ask else None,
        model=Model(module, (reader, writer)),
    )  # fmt: skip


def load_tokenizers(config: Config, pairs: Sequence[Translation], run: Run) -> tuple[Tokenizer, Tokenizer]:
    """Of source and target: the published ones, or one for both, made of both languages and kept in the run."""
    if config.init:
        return pretrained.load_tokenizers(published_folder(config.init))
    texts = [pair.source for pair in pairs] + [pair.target for pair in pairs]
    tokenizer = kept_tokenizer(run.directory, lambda: Tokenizer.of_bytes(texts, config.vocab_size))
    return tokenizer, tokenizer


def build(config: Config, tokenizer: Tokenizer) -> tuple[EncoderDecoder, PyTree | None]:
    """The module, and its parameters if they were trained before."""
    fields = config.layer_fields()
    if config.init:
        module, params = load_model(config.init, EncoderDecoder, param_dtype=jnp.float32, **fields)
        if config.length > module.length:
            raise UserError(f"--length {config.length}: {config.init} has {module.length} positions")
        if tokenizer.pad != module.pad or tokenizer.vocab_size > module.vocab_size:
            raise UserError(f"--init {config.init}: its tokenizer and its weights do not belong together")
        return module, params
    fields |= dict(length=max(512, config.length), pad=tokenizer.pad, start=tokenizer.pad, norm_first=config.norm_first)
    if config.variant:
        return EncoderDecoder.variant(config.variant, tokenizer.vocab_size, **fields), None
    stack = Stack(config.depth, config.num_heads, 4 * config.width)
    return EncoderDecoder(tokenizer.vocab_size, config.width, stack, stack, **fields), None


def pack(pairs: Sequence[Translation], length: int, module: EncoderDecoder, reader: Tokenizer, writer: Tokenizer) -> Packed:
    """Rows of tokens with as many pairs as fit."""
    sources, targets = reader.encode([pair.source for pair in pairs]), writer.encode([pair.target for pair in pairs])
    return Packed(list(zip(sources, targets)), length, start=module.start, end=reader.end, pad=module.pad)


def objective(
    module: EncoderDecoder,
    smoothing: float,
    target_tokens: float,
    params: PyTree,
    state: TrainState,
    batch: Batch,
    key: Key[Array, ""],
) -> tuple[Float[Array, ""], Aux]:
    """Cross-entropy of the next target token with label smoothing, without padding: the sum over a batch, divided by the number of tokens that so many rows have on average, `target_tokens` each. So all tokens of the data weigh the same, whichever rows they share a batch or a device with."""
    out = module.apply({"params": params}, **_inputs(batch), train=True, rngs={"dropout": key})
    return _sums(out.logits, batch, smoothing).mean() / target_tokens, Aux()


def losses(module: EncoderDecoder, variables: PyTree, batch: Batch) -> Float[Array, "B 2"]:
    """For each row the sum of the tokens' cross-entropy, without smoothing, and how many there are."""
    sums = _sums(module.apply(variables, **_inputs(batch)).logits, batch)
    return jnp.stack([sums, (batch["target_segments"] > 0).sum(1).astype(jnp.float32)], axis=1)


def _sums(logits: Float[Array, "B T V"], batch: Batch, smoothing: float = 0.0) -> Float[Array, "B"]:
    """Of the tokens' cross-entropy in each row."""
    written = batch["target_segments"] > 0
    mean = lambda logits, labels, mask: cross_entropy(logits, labels, smoothing=smoothing, mask=mask)
    return jax.vmap(mean)(logits, batch["labels"], written) * written.sum(1)


def _inputs(batch: Batch) -> Batch:
    """What the model sees of a batch."""
    return {name: values for name, values in batch.items() if name != "labels"}


def measure(each: Float[np.ndarray, "N 2"]) -> dict[str, float]:
    """Nats a token on unread pairs, and among how many equally likely tokens that would be a choice."""
    total, count = each.astype(np.float64).sum(0)
    return {"validation_loss": float(total / count), "perplexity": math.exp(total / count)}


class Translator:
    """Sentences to sentences: in batches of a few lengths, so that a few programs are compiled."""

    def __init__(self, config: Config, module: EncoderDecoder, layout: Layout, reader: Tokenizer, writer: Tokenizer):
        self.module, self.reader, self.writer = module, reader, writer
        beam = Beam(config.beam, config.length_penalty) if config.beam else None

        def search(variables: PyTree, rows: Int[Array, "B S"]) -> Int[Array, "B T"]:
            steps = min(rows.shape[1] + MORE_THAN_SOURCE, module.length)
            return translate(module, variables, rows, steps=steps, end=writer.end, beam=beam)

        self._search = layout.inference(search, batch_size=64)

    def __call__(self, variables: PyTree, sentences: Sequence[str]) -> list[str]:
        """The translation of each. Sentences longer than the model's positions are cut."""
        translations = [""] * len(sentences)
        lengths = [len(tokens) + 1 for tokens in self.reader.encode(sentences)]
        for length, indices in buckets(lengths).items():
            rows = self.reader([sentences[index] for index in indices], min(length, self.module.length))
            for index, tokens in zip(indices, self._search(variables, rows)):
                translations[index] = self.writer.decode(tokens)
        return translations


def compare(translator: Translator, variables: PyTree, pairs: Sequence[Translation], name: str, run: Run) -> Report:
    """BLEU and the share of translations that are letter by letter right, of each category of sentence where the data has several; all translations are written to a file."""
    translations = translator(variables, [pair.source for pair in pairs])
    score, signature = bleu(translations, [pair.target for pair in pairs])
    right = np.array([ours == pair.target for ours, pair in zip(translations, pairs)])
    report = {f"{name}bleu": score, f"{name}exact_match": float(right.mean())}
    for category in sorted({pair.category for pair in pairs} - {""}):
        own = right[[pair.category == category for pair in pairs]]
        report[f"{name}exact_match_{category}"] = float(own.mean())
    lines = [f"source     {p.source}\nhuman      {p.target}\ntranslated {ours}\n" for p, ours in zip(pairs, translations)]
    if is_first():
        text = "\n".join([f"BLEU {score:.2f} ({signature})\n", *lines])
        replace_text(run.directory / f"{name}translations.txt", text)
    chosen = np.linspace(0, len(lines) - 1, min(PRINTED, len(lines))).round().astype(int)
    run.say("\n" + "\n".join(lines[index] for index in chosen) + f"\n{name}bleu {score:.2f} ({signature})")
    return report


def cross_attention(
    module: EncoderDecoder, params: PyTree, source: Int[Array, "B S"], target: Int[Array, "B T"]
) -> Float[np.ndarray, "L B N T S"]:
    """How much each block of the decoder looks at each source token, from each target token, head by head."""
    # After those of the encoder, each block of the decoder attends to what is written, and then to the source.
    return np.stack(attention_weights(module, params, source, target)[module.encoder_stack.depth + 1 :: 2])


def draw(
    module: EncoderDecoder, variables: PyTree, reader: Tokenizer, writer: Tokenizer, pairs: Sequence[Translation]
) -> "Figure":
    """Where the decoder looks in a held-out source while it writes the human translation: the sentence of middling length, about 12 words."""
    pair = min(pairs, key=lambda pair: abs(len(pair.source.split()) - 12))
    (read,), (written,) = reader.encode([pair.source]), writer.encode([pair.target])
    read, written = np.append(read, reader.end)[: module.length], np.append(module.start, written)[: module.length]
    params = jax.tree.map(to_host, variables["params"])
    weights = cross_attention(module, params, jnp.asarray(read)[None], jnp.asarray(written)[None])[:, 0].mean(1)
    show = lambda tokenizer, tokens: [tokenizer.decode([token]).replace(" ", "␣") or "end" for token in tokens.tolist()]
    return figures.cross_attention(weights, show(writer, np.append(written[1:], writer.end)), show(reader, read))


EXPERIMENT = launch.Experiment(
    main,
    PRESETS,
    field="language",
    summary="A Transformer learns to translate from pairs of sentences.",
    paper="Vaswani et al. 2017, Attention Is All You Need, arXiv:1706.03762",
    minutes=1.5,
    expects={"bleu": (90.0, None), "exact_match_phrase": (0.9, None)},
)

if __name__ == "__main__":
    launch.launch(EXPERIMENT)
