"""Translation: a Transformer reads a sentence and writes it in another language (Vaswani et al. 2017, Attention Is All You Need).

It learns from pairs of sentences alone: the encoder reads the source as a whole, the decoder predicts each token of the translation from those before it and from what it attends to in the source. Then it writes translations of sentences that it has not seen, by beam search, which are compared with human ones.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from annotated_types import Ge, Gt, Lt
from jaxtyping import Array, Float, Int, Key, PyTree

from jaxdl import figures, launch, pretrained
from jaxdl.data import train_batches
from jaxdl.data.parallel import Packed, Pairs, buckets, open_pairs
from jaxdl.data.text import Tokenizer
from jaxdl.errors import UserError
from jaxdl.generate import Beam
from jaxdl.losses import cross_entropy
from jaxdl.metrics import bleu
from jaxdl.models.marian import VARIANTS, EncoderDecoder, Stack, translate
from jaxdl.nn import ATTENTIONS, attention_weights
from jaxdl.training import ASIDE, OPTIMIZERS, Aux, Batch, Execution, Run, fit, matrices, start
from jaxdl.training.parallel import Layout
from jaxdl.training.processes import is_first, whole

MORE_THAN_SOURCE = 50
"""Tokens that a translation may be longer than its source (Vaswani et al. 2017, section 6.1)."""


@dataclasses.dataclass(frozen=True)
class Config(launch.Config):
    """What this experiment computes."""

    data: str = "builtin:cldr"
    steps: Annotated[int, Ge(1)] = 900
    batch_size: Annotated[int, Ge(1)] = 8
    """Rows in each update, over all devices; each row holds as many pairs as fit."""
    learning_rate: Annotated[float, Gt(0)] = 0.02
    """Peak of the schedule."""
    warmup: Annotated[float, Ge(0), Lt(1)] = 0.1
    weight_decay: Annotated[float, Ge(0)] = 0.01
    evaluate_every: Annotated[int, Ge(1)] = 300
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
    init: str = ""
    """Fine-tune from these weights: a folder with config.json and *.safetensors of a Marian model, or a name on the Hugging Face hub. The sizes below are then its own, and so is the tokenizer."""
    variant: Literal[("", *VARIANTS)] = ""
    """The paper's base or big model, with its dropout. Empty: the sizes that follow."""
    length: Annotated[int, Ge(2)] = 64
    """Tokens of a row, on each side. Longer pairs are left out of training and of the validation loss, but are translated."""
    width: Annotated[int, Ge(2)] = 128
    """Of the residual stream."""
    depth: Annotated[int, Ge(1)] = 3
    """Blocks of the encoder, and of the decoder."""
    num_heads: Annotated[int, Ge(1)] = 4
    """Attention heads; they divide the width."""
    norm_first: bool = False
    """Normalise before each part (pre-norm), and not after each sum as the paper does (post-norm)."""
    dropout: Annotated[float, Ge(0), Lt(1)] | None = None
    """Share of activations that are dropped. None: as much as the variant has, and without one nothing."""
    attention: Literal[*ATTENTIONS] = "plain"
    """The plain form, or the flash form in tiles."""
    remat: bool = False
    """Compute the activations of a block again in the backward pass: less memory, a third more time."""
    scan_layers: bool = False
    """Compile one block and run it as often as the model is deep: quick to compile for deep models."""
    vocabulary: Annotated[int, Ge(258)] = 1000
    """Largest vocabulary of the byte pair encoding, trained on both languages together."""
    beam: Annotated[int, Ge(0)] = 4
    """Hypotheses that the search keeps. 0: the likeliest token at each step (greedy)."""
    length_penalty: Annotated[float, Ge(0)] = 0.6
    """Exponent of the length by which hypotheses' log-probabilities are divided (Wu et al. 2016, eq. 14)."""
    ask: tuple[str, ...] = dataclasses.field(default=(), metadata=ASIDE)
    """Sentences that the finished model translates. A finished run answers at once."""

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


PRESETS = {
    "default": Config(),
    # For two cores: --data folder:PATH with train.en, train.de, val.en, val.de and the test files of Multi30k (Elliott et al. 2016).
    "multi30k": Config(
        preset="multi30k", test="test_2016_flickr", steps=3600, batch_size=16, vocabulary=4000, norm_first=True,
        dropout=0.1, evaluate_every=600,
    ),
    # The same on an accelerator. From-scratch Transformers that people publish reach 30 to 34 BLEU.
    "gpu": Config(
        preset="gpu", test="test_2016_flickr", steps=6000, batch_size=64, length=128, vocabulary=8000, width=512, depth=4,
        num_heads=8, dropout=0.3, optimizer="adamw", learning_rate=7e-4, warmup=0.1, decay="inverse_sqrt", weight_decay=1e-4,
        precision="bf16", evaluate_every=500, ema_decay=0.999,
    ),
    # Vaswani et al. 2017, section 5: 25,000 tokens of each language in a batch, 37,000 tokens, 4,000 of 100,000 steps of warm-up to (512 · 4000)^−1/2.
    "paper_base": Config(
        preset="paper_base", data="tfds:wmt14_translate/de-en", test="test", variant="base", steps=100_000, batch_size=100,
        length=256, vocabulary=37_000, optimizer="adamw", learning_rate=7e-4, warmup=0.04, decay="inverse_sqrt", weight_decay=0.0,
        precision="bf16", evaluate_every=2000, attention="flash",
    ),
    "finetune": Config(
        preset="finetune", init="Helsinki-NLP/opus-mt-en-de", steps=500, length=128, optimizer="adamw", learning_rate=5e-5,
        dropout=0.1, evaluate_every=100,
    ),
}  # fmt: skip


def main(config: Config, workdir: str | Path, execution: Execution = Execution()) -> dict[str, Any]:
    """Trains (or goes on training) in `workdir`, measures, translates, draws, and returns what is in its `result.json`."""
    with Run.open(workdir, "translation", config, execution) as run:
        open_ = functools.partial(open_pairs, source=config.source, target=config.target, data_dir=config.data_dir)
        pairs = open_(config.data, "train")
        held_out = {"": open_(config.eval_data or config.data, "test")}
        if held_out[""].pairs == pairs.pairs:
            raise UserError(
                f"{config.data} would be learned and measured on: name what is held out with --eval-data folder:PATH/NAME"
            )
        if config.test:
            held_out[f"{config.test}_"] = open_(config.data, "test", part=config.test)
        with run.first_process_first():
            reader, writer = load_tokenizers(config, pairs, run.directory)
        module, params = build(config, reader)
        pack = lambda pairs: Packed(
            list(zip(reader.encode(pairs.sources), writer.encode(pairs.targets))),
            config.length, start=module.start, end=reader.end, pad=module.pad,
        )  # fmt: skip
        source, unread = pack(pairs), pack(held_out[""])
        run.say(
            f"{len(pairs):,} pairs in {len(source):,} rows, of which {source.filled:.0%} is filled; "
            f"{source.dropped} with more than {config.length} tokens are left out, "
            f"and {unread.dropped} of the {len(held_out['']):,} held-out ones, which are translated all the same"
        )

        batches = train_batches(source, lambda example, rng: example, batch_size=config.batch_size, seed=config.seed, **run.shard)
        step, state = start(
            config,
            run.layout,
            functools.partial(loss, module, config.label_smoothing, source.target_tokens),
            lambda schedule: OPTIMIZERS[config.optimizer](schedule, config.weight_decay, b2=0.98, mask=matrices),
            lambda key: module.init(key, *(jnp.asarray(source[0][name])[None] for name in ("source", "target"))),
            params,
        )

        each = run.layout.inference(functools.partial(losses, module), batch_size=32)
        rows = [unread[index] for index in range(len(unread))]
        evaluate = lambda state: measure(each({"params": state.measured}, rows))
        state = fit(step, state, batches, run, steps=config.steps, evaluate=evaluate, evaluate_every=config.evaluate_every)

        translator = Translator(config, module, run.layout, reader, writer)
        for sentence, translation in zip(config.ask, translator(state.measured, config.ask)):
            run.say(f"{sentence}\n  → {translation}")
        if config.ask and run.result:
            return run.result
        metrics = evaluate(state)
        for name, sentences in held_out.items():
            metrics |= compare(translator, state.measured, sentences, name, run)
        params = jax.tree.map(whole, state.measured)
        if is_first():
            draw(module, params, reader, writer, held_out[""], run.figures)
        return run.finish(state, metrics)


def load_tokenizers(config: Config, pairs: Pairs, directory: Path) -> tuple[Tokenizer, Tokenizer]:
    """Of source and target: the published ones, the run's own, or a new one for both, made of both languages and kept in the run."""
    if config.init:
        return pretrained.load_tokenizers(config.init)
    if not (directory / "tokenizer.json").exists():
        Tokenizer.of_bytes(pairs.sources + pairs.targets, config.vocabulary).save(directory)
    return Tokenizer.load_pair(directory)


def build(config: Config, tokenizer: Tokenizer) -> tuple[EncoderDecoder, PyTree | None]:
    """The module, and its published parameters if there are any."""
    fields: dict[str, Any] = dict(
        attention=ATTENTIONS[config.attention],
        remat=config.remat,
        dtype=jnp.bfloat16 if config.precision == "bf16" else None,
    )
    if config.dropout is not None:
        fields["dropout"] = config.dropout
    if config.init:
        module, params = pretrained.load(config.init, EncoderDecoder, param_dtype=jnp.float32, scan=config.scan_layers, **fields)
        if config.length > module.length:
            raise UserError(f"--length {config.length}: {config.init} has {module.length} positions")
        if tokenizer.pad != module.pad or tokenizer.vocabulary > module.vocabulary:
            raise UserError(f"--init {config.init}: its tokenizer and its weights do not belong together")
        return module, params
    fields |= dict(
        length=max(512, config.length),
        pad=tokenizer.pad,
        start=tokenizer.pad,
        norm_first=config.norm_first,
        scan=config.scan_layers,
    )
    if config.variant:
        return EncoderDecoder.variant(config.variant, tokenizer.vocabulary, **fields), None
    stack = Stack(config.depth, config.num_heads, 4 * config.width)
    return EncoderDecoder(tokenizer.vocabulary, config.width, stack, stack, **fields), None


def loss(
    module: EncoderDecoder,
    smoothing: float,
    target_tokens: float,
    params: PyTree,
    variables: dict[str, PyTree],
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

        def search(params: PyTree, rows: Int[Array, "B S"]) -> Int[Array, "B T"]:
            steps = min(rows.shape[1] + MORE_THAN_SOURCE, module.length)
            return translate(module, {"params": params}, rows, steps=steps, end=writer.end, beam=beam)

        self._search = layout.inference(search, batch_size=64)

    def __call__(self, params: PyTree, sentences: Sequence[str]) -> list[str]:
        """The translation of each. Sentences longer than the model's positions are cut."""
        translations = [""] * len(sentences)
        lengths = [len(tokens) + 1 for tokens in self.reader.encode(sentences)]
        for length, indices in buckets(lengths).items():
            rows = self.reader([sentences[index] for index in indices], min(length, self.module.length))
            for index, tokens in zip(indices, self._search(params, rows)):
                translations[index] = self.writer.decode(tokens)
        return translations


SHOWN = 5
"""Translations on the terminal."""


def compare(translator: Translator, params: PyTree, pairs: Pairs, name: str, run: Run) -> dict[str, float]:
    """BLEU and the share of translations that are letter by letter right, of each kind of sentence where the data has several; all translations are written to a file."""
    translations = translator(params, pairs.sources)
    score, signature = bleu(translations, pairs.targets)
    right = np.array([ours == theirs for ours, theirs in zip(translations, pairs.targets)])
    metrics = {f"{name}bleu": score, f"{name}exact_match": float(right.mean())}
    for kind in sorted(set(pairs.kinds) - {""}):
        metrics[f"{name}exact_match_{kind}"] = float(right[[other == kind for other in pairs.kinds]].mean())
    lines = [f"source     {s}\nhuman      {t}\ntranslated {o}\n" for (s, t), o in zip(pairs.pairs, translations)]
    if is_first():
        report = "\n".join([f"BLEU {score:.2f} ({signature})\n", *lines])
        (run.directory / f"{name}translations.txt").write_text(report, encoding="utf-8")
    chosen = np.linspace(0, len(lines) - 1, min(SHOWN, len(lines))).round().astype(int)
    run.say("\n" + "\n".join(lines[index] for index in chosen) + f"\n{name}bleu {score:.2f} ({signature})")
    return metrics


def cross_attention(
    module: EncoderDecoder, params: PyTree, source: Int[Array, "B S"], target: Int[Array, "B T"]
) -> Float[np.ndarray, "L B N T S"]:
    """How much each block of the decoder looks at each source token, from each target token, head by head."""
    # After those of the encoder, each block of the decoder attends to what is written, and then to the source.
    return np.stack(attention_weights(module, params, source, target)[module.encoder_stack.depth + 1 :: 2])


def draw(module: EncoderDecoder, params: PyTree, reader: Tokenizer, writer: Tokenizer, pairs: Pairs, directory: Path) -> None:
    """Where the decoder looks in a held-out source while it writes the human translation: the sentence of middling length, about 12 words."""
    source, target = min(pairs.pairs, key=lambda pair: abs(len(pair[0].split()) - 12))
    (reading,), (written,) = reader.encode([source]), writer.encode([target])
    reading, written = np.append(reading, reader.end)[: module.length], np.append(module.start, written)[: module.length]
    weights = cross_attention(module, params, jnp.asarray(reading)[None], jnp.asarray(written)[None])[:, 0].mean(1)
    show = lambda tokenizer, tokens: [tokenizer.decode([token]).replace(" ", "␣") or "end" for token in tokens.tolist()]
    columns = show(reader, reading)
    rows = show(writer, np.append(written[1:], writer.end))
    figure, axes = figures.subplots(1, len(weights), 1.0 + 0.22 * len(columns), 2.2 + 0.22 * len(rows))
    for block, (axis, map_) in enumerate(zip(axes, weights), 1):
        axis.imshow(map_, cmap="magma", vmin=0, vmax=1, interpolation="nearest")
        axis.set_xticks(range(len(columns)), columns, fontsize=8, rotation=90)
        axis.set_yticks(range(len(rows)), rows, fontsize=8)
        axis.set_title(f"decoder block {block}", fontsize=10)
        axis.set_xlabel("source token that is looked at", fontsize=9)
    axes[0].set_ylabel("token that is written next", fontsize=9)
    figure.suptitle("where the decoder looks, mean over heads (bright: much)", fontsize=11)
    figures.save(figure, directory / "cross_attention.png")


EXPERIMENT = launch.Experiment(
    name="translation",
    summary="A Transformer learns to translate from pairs of sentences.",
    paper="Vaswani et al. 2017, Attention Is All You Need (arXiv:1706.03762)",
    result="BLEU 97 on held-out dates, quantities, prices and lists, English to German; 0.96 of these phrases letter by letter right, and 0.22 of the names it has not seen",
    minutes=1.5,
    presets=PRESETS,
    main=main,
)

if __name__ == "__main__":
    launch.launch(EXPERIMENT)
