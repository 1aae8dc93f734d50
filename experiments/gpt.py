"""GPT: a Transformer that learns to continue a text (GPT-2: Radford et al. 2019, Language Models are Unsupervised Multitask Learners).

It reads the characters or the tokens of a text and predicts the next one at each place. What it has learned is seen in the loss on text that it has not read, and in what it writes.
"""

import dataclasses
import functools
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import optax
from annotated_types import Ge, Lt
from jaxtyping import Array, Float, Key, PyTree

from jaxdl import launch
from jaxdl.errors import UserError
from jaxdl.losses import cross_entropy
from jaxdl.models.gpt2 import GPT, VARIANTS, continue_text
from jaxdl.tasks.language_modelling import LanguageModelling, PromptFields, TextFields, Texts, draw_attention, open_texts
from jaxdl.training import (
    OPTIMIZERS,
    Aux,
    Batch,
    Model,
    Report,
    Run,
    TrainState,
    configured,
    decay_mask,
    load_model,
    published_folder,
    setup_training,
    train,
)


@dataclasses.dataclass(frozen=True)
class Config(launch.Config, launch.Transformer, launch.Init, PromptFields, TextFields):
    """What this experiment computes."""

    optimizer: Literal[*OPTIMIZERS] = "muon"
    """AdamW, with which GPTs are published, or Muon."""
    b2: Annotated[float, Ge(0), Lt(1)] = 0.99
    """Adam's β₂: how slowly the mean square of a gradient is forgotten."""
    variant: Literal[("", *VARIANTS)] = ""
    """A published size. Empty: the sizes that follow."""
    width: Annotated[int, Ge(1)] = 128
    """Of the residual stream."""
    depth: Annotated[int, Ge(1)] = 4
    """Blocks."""
    num_heads: Annotated[int, Ge(1)] = 4
    """Attention heads; they divide the width."""


_SMALL = Config(
    data="builtin:modules", steps=1000, batch_size=8, learning_rate=0.01, warmup=0.05, weight_decay=0.1, evaluate_every=250
)
# What nanoGPT trains GPT-2 with (config/train_gpt2.py): 300 billion tokens, half a million a step. Learning rates by size, and twice the batch for the largest: Brown et al. 2020, table 2.1. The parts that batches are cut into are those of eight devices of 40 GB; on fewer, --accumulate has to grow.
_GPT2 = dataclasses.replace(
    _SMALL, data="", length=1024, tokenizer="openai-community/gpt2", steps=600_000, batch_size=480, optimizer="adamw", b2=0.95,
    warmup=0.0033, precision="bf16", attention="flash", evaluate_every=1000,
)  # fmt: skip
_DEEP = dict(remat=True, scan_layers=True)

PRESETS = {
    "default": _SMALL,
    # nanoGPT's sizes for a CPU and for one GPU (its README and config/train_shakespeare_char.py). There AdamW reaches 1.88 and 1.47.
    "shakespeare": dataclasses.replace(_SMALL, data="tfds:tiny_shakespeare", steps=2000, batch_size=12, length=64),
    "shakespeare_gpu": dataclasses.replace(
        _SMALL, data="tfds:tiny_shakespeare", steps=5000, batch_size=64, length=256, width=384, depth=6, num_heads=6, dropout=0.2,
        optimizer="adamw", learning_rate=1e-3, warmup=0.02, precision="bf16",
    ),
    "gpt2_124m": dataclasses.replace(_GPT2, variant="124M", learning_rate=6e-4, accumulate=5),
    "gpt2_355m": dataclasses.replace(_GPT2, variant="355M", learning_rate=3e-4, accumulate=10),
    "gpt2_774m": dataclasses.replace(_GPT2, variant="774M", learning_rate=2.5e-4, accumulate=20, **_DEEP),
    "gpt2_1558m": dataclasses.replace(
        _GPT2, variant="1558M", learning_rate=2e-4, accumulate=40, batch_size=960, steps=300_000, **_DEEP
    ),
    "finetune": dataclasses.replace(
        _SMALL, init="openai-community/gpt2", length=1024, steps=200, batch_size=32, accumulate=8, optimizer="adamw",
        learning_rate=3e-5, dropout=0.1, precision="bf16", evaluate_every=50,
    ),
}  # fmt: skip


def main(config: Config, run: Run) -> dict[str, Any]:
    """Trains (or goes on training), measures, writes, draws, and returns what is in `result.json`."""
    texts = open_texts(run, published_folder(config.init) if config.init else config.tokenizer)
    module, params = build(config, texts)
    batches = run.batches(texts.train, lambda window, rng: {"tokens": window.tokens})
    tokens = jnp.asarray(texts.train[0].tokens)[None, :-1]
    update = configured(config, functools.partial(objective, module), functools.partial(optimizer, config))
    step, state = setup_training(config, run.layout, update, init=lambda key: module.init(key, tokens), params=params)

    logits = lambda variables, tokens: module.apply(variables, tokens).logits
    modelling = LanguageModelling(run, texts, logits, functools.partial(continue_text, module))

    def show(variables: PyTree, key: Key[Array, ""]) -> Report:
        return {"attention": draw_attention(module, variables, texts)}

    return train(
        run, step, state, batches, evaluate=modelling.evaluate, show=show, conclude=modelling.conclude, answer=modelling.answer,
        model=Model(module, texts.tokenizer),
    )  # fmt: skip


def build(config: Config, texts: Texts) -> tuple[GPT, PyTree | None]:
    """The module, and its parameters if they were trained before."""
    vocab_size, length, fields = texts.tokenizer.vocab_size, config.length, config.layer_fields()
    if config.init:
        module, params = load_model(config.init, GPT, param_dtype=jnp.float32, **fields)
        if vocab_size > module.vocab_size:
            raise UserError(f"--init {config.init}: its tokenizer and its weights do not belong together")
        if length > module.length:
            raise UserError(f"--length {length}: {config.init} has {module.length} positions")
        return module, params
    if config.variant:
        return GPT.variant(config.variant, vocab_size=vocab_size, length=length, **fields), None
    return GPT(vocab_size, length, config.width, config.depth, config.num_heads, **fields), None


def optimizer(config: Config, schedule: optax.Schedule) -> optax.GradientTransformation:
    """That of the config, with which gains and biases do not decay."""
    return OPTIMIZERS[config.optimizer](schedule, config.weight_decay, b2=config.b2, mask=decay_mask)


def objective(module: GPT, params: PyTree, state: TrainState, batch: Batch, key: Key[Array, ""]) -> tuple[Float[Array, ""], Aux]:
    """Mean cross-entropy of the next token, in nats."""
    tokens = batch["tokens"]
    logits = module.apply({"params": params}, tokens[:, :-1], train=True, rngs={"dropout": key}).logits
    return cross_entropy(logits, tokens[:, 1:]), Aux()


EXPERIMENT = launch.Experiment(
    main,
    PRESETS,
    field="language",
    summary="A Transformer learns to continue a text, token by token.",
    paper="Radford et al. 2019, Language Models are Unsupervised Multitask Learners, https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf",
    minutes=2,
    expects={"bits_per_character": (None, 2.35)},
)

if __name__ == "__main__":
    launch.launch(EXPERIMENT)
