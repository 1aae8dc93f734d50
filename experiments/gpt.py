"""GPT: a Transformer that learns to go on with a text (GPT-2: Radford et al. 2019, Language Models are Unsupervised Multitask Learners).

It reads the characters or the tokens of a text and predicts the next one at each place. What it has learned is seen in the loss on text that it has not read, and in what it writes.
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
from annotated_types import Ge, Gt, Le, Lt
from jaxtyping import Array, Float, Int, Key, PyTree

from jaxdl import figures, launch, pretrained
from jaxdl.data import train_batches
from jaxdl.data.documents import Windows, held_out_documents, open_documents, some_documents, tokens_of, write_tokens
from jaxdl.data.text import Tokenizer
from jaxdl.errors import UserError
from jaxdl.generate import Sampling
from jaxdl.losses import cross_entropy
from jaxdl.models.gpt2 import GPT, VARIANTS, go_on
from jaxdl.nn import ATTENTIONS, attention_weights, stack_blocks, unstack_blocks
from jaxdl.training import ASIDE, OPTIMIZERS, Aux, Batch, Execution, Run, fit, load_run, matrices, start
from jaxdl.training.processes import is_first, whole


@dataclasses.dataclass(frozen=True)
class Config(launch.Config):
    """What this experiment computes."""

    data: str = "builtin:python"
    steps: Annotated[int, Ge(1)] = 1000
    batch_size: Annotated[int, Ge(1)] = 8
    learning_rate: Annotated[float, Gt(0)] = 0.01
    warmup: Annotated[float, Ge(0), Lt(1)] = 0.05
    weight_decay: Annotated[float, Ge(0)] = 0.1
    evaluate_every: Annotated[int, Ge(1)] = 250
    optimizer: Literal[*OPTIMIZERS] = "muon"
    """AdamW, with which GPTs are published, or Muon."""
    b2: Annotated[float, Ge(0), Lt(1)] = 0.99
    """Adam's β₂: how slowly the mean square of a gradient is forgotten."""
    init: str = ""
    """Fine-tune from these weights: the DIR of a finished run, a folder with config.json and *.safetensors, or a name on the Hugging Face hub. The sizes below are then its own, and so is the tokenizer."""
    variant: Literal[("", *VARIANTS)] = ""
    """A published size. Empty: the sizes that follow."""
    length: Annotated[int, Ge(1)] = 128
    """Tokens that are looked back at."""
    width: Annotated[int, Ge(1)] = 128
    """Of the residual stream."""
    depth: Annotated[int, Ge(1)] = 4
    """Blocks."""
    num_heads: Annotated[int, Ge(1)] = 4
    """Attention heads; they divide the width."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of activations that are dropped."""
    attention: Literal[*ATTENTIONS] = "plain"
    """The plain form, or the flash form in tiles."""
    remat: bool = False
    """Compute the activations of a block again in the backward pass: less memory, a third more time."""
    scan_layers: bool = False
    """Compile one block and run it as often as the model is deep: quick to compile for deep models."""
    tokenizer: str = "characters"
    """`characters`, `bytes` (byte pair encoding, trained on the text), or a published tokenizer.json."""
    vocabulary: Annotated[int, Ge(258)] = 1024
    """Largest vocabulary of a byte pair encoding that is trained."""
    eval_characters: Annotated[int, Ge(1)] = 1_000_000
    """How much of the held-out text is measured on, at most."""
    prompt: str = dataclasses.field(default="", metadata=ASIDE)
    """What the finished model goes on from, on the terminal. Empty: the beginning of a held-out text. A finished run answers another prompt at once."""
    tokens: Annotated[int, Ge(1)] = dataclasses.field(default=400, metadata=ASIDE)
    """How many tokens it writes, unless the text comes to its end before."""
    temperature: Annotated[float, Ge(0)] = dataclasses.field(default=0.8, metadata=ASIDE)
    """Below 1 the likely becomes likelier; 0: always the most likely token."""
    top_k: Annotated[int, Ge(0)] = dataclasses.field(default=0, metadata=ASIDE)
    """Choose among so many most likely tokens only. 0: among all."""
    top_p: Annotated[float, Gt(0), Le(1)] = dataclasses.field(default=1.0, metadata=ASIDE)
    """Choose among the fewest most likely tokens that have this probability together."""


# What nanoGPT trains GPT-2 with (config/train_gpt2.py): 300 billion tokens, half a million a step. Learning rates by size, and twice the batch for the largest: Brown et al. 2020, table 2.1. The parts that batches are cut into are those of eight devices of 40 GB; on fewer, --accumulate has to grow.
_GPT2 = Config(
    data="", length=1024, tokenizer="openai-community/gpt2", steps=600_000, batch_size=480, optimizer="adamw", b2=0.95,
    warmup=0.0033, precision="bf16", attention="flash", evaluate_every=1000,
)  # fmt: skip
_DEEP = dict(remat=True, scan_layers=True)

PRESETS = {
    "default": Config(),
    # nanoGPT's sizes for a CPU and for one GPU (its README and config/train_shakespeare_char.py). There AdamW reaches 1.88 and 1.47.
    "shakespeare": Config(
        preset="shakespeare", data="tfds:tiny_shakespeare", steps=2000, batch_size=12, length=64, evaluate_every=250,
    ),
    "shakespeare_gpu": Config(
        preset="shakespeare_gpu", data="tfds:tiny_shakespeare", steps=5000, batch_size=64, length=256, width=384, depth=6,
        num_heads=6, dropout=0.2, evaluate_every=250, optimizer="adamw", learning_rate=1e-3, warmup=0.02, precision="bf16",
    ),
    **{
        f"gpt2_{name.lower()}": dataclasses.replace(
            _GPT2, preset=f"gpt2_{name.lower()}", variant=name, learning_rate=learning_rate, accumulate=accumulate, **more
        )
        for name, learning_rate, accumulate, more in (
            ("124M", 6e-4, 5, {}),
            ("355M", 3e-4, 10, {}),
            ("774M", 2.5e-4, 20, _DEEP),
            ("1558M", 2e-4, 40, _DEEP | dict(batch_size=960, steps=300_000)),
        )
    },
    "finetune": Config(
        preset="finetune", init="openai-community/gpt2", length=1024, steps=200, batch_size=32, accumulate=8, optimizer="adamw",
        learning_rate=3e-5, dropout=0.1, precision="bf16", evaluate_every=50,
    ),
}  # fmt: skip


def main(config: Config, workdir: str | Path, execution: Execution = Execution()) -> dict[str, Any]:
    """Trains (or goes on training) in `workdir`, measures, writes, draws, and returns what is in its `result.json`."""
    if not config.data:
        raise UserError("there is no --data: name the text to learn from, tfds:NAME or folder:PATH")
    with Run.open(workdir, "gpt", config, execution) as run:
        texts = open_documents(config.data, "train", data_dir=config.data_dir)
        held_out = held_out_documents(config.data, config.eval_data, data_dir=config.data_dir)
        held_out = some_documents(held_out, config.eval_characters)
        tokens = run.directory / "tokens.npy"
        with run.first_process_first():
            module, params, tokenizer = begin(config, texts, run.directory)
            if not tokens.exists():
                write_tokens(tokens, tokens_of(texts, tokenizer), tokenizer.vocabulary)
        source = Windows(np.load(tokens, mmap_mode="r"), config.length)
        unread = Windows(np.concatenate(list(tokens_of(held_out, tokenizer))), config.length)
        characters = sum(map(len, held_out)) / len(unread.tokens)
        excerpt = beginning(held_out, tokenizer, (module.length + 1) // 2)
        prompt = tokenizer.encode([config.prompt])[0] if config.prompt else excerpt
        if not len(prompt):
            raise UserError(f"--prompt {config.prompt!r} has no token: give some text")

        batches = train_batches(source, lambda example, rng: example, batch_size=config.batch_size, seed=config.seed, **run.shard)
        step, state = start(
            config,
            run.layout,
            functools.partial(loss, module),
            functools.partial(optimizer, config),
            lambda key: module.init(key, jnp.asarray(source[0]["tokens"])[None, :-1]),
            params,
        )

        each = run.layout.inference(functools.partial(losses, module), batch_size=32)
        evaluate = lambda state: measure(each({"params": state.measured}, unread.apart()), characters)
        state = fit(step, state, batches, run, steps=config.steps, evaluate=evaluate, evaluate_every=config.evaluate_every)
        params = jax.tree.map(whole, state.measured)
        if is_first():
            write(config, module, params, tokenizer, prompt.tolist(), run)
        if config.prompt and run.result:
            return run.result
        if is_first():
            draw(module, params, tokenizer, excerpt[:32], run.figures)
        return run.finish(state, evaluate(state))


def begin(config: Config, texts: Sequence[str], directory: Path) -> tuple[GPT, PyTree | None, Tokenizer]:
    """The module, its parameters if they have learned before, and the tokenizer: those that `--init` names, or new ones."""
    if not config.init:
        tokenizer = load_tokenizer(config, texts, directory)
        return build(config, tokenizer.vocabulary), None, tokenizer
    module, params, tokenizer = learned(config.init)
    if tokenizer.vocabulary > module.vocabulary:
        raise UserError(f"--init {config.init}: its tokenizer and its weights do not belong together")
    if config.length > module.length:
        raise UserError(f"--length {config.length}: {config.init} has {module.length} positions")
    return module.clone(**layer_fields(config)), stack_blocks(params) if config.scan_layers else params, tokenizer


def load_tokenizer(config: Config, texts: Sequence[str], directory: Path) -> Tokenizer:
    """The published one, the run's own, or a new one, made of the text and kept in the run."""
    if config.tokenizer not in ("characters", "bytes"):
        return pretrained.load_tokenizer(config.tokenizer)
    if not (directory / "tokenizer.json").exists():
        made = (
            Tokenizer.of_characters(texts) if config.tokenizer == "characters" else Tokenizer.of_bytes(texts, config.vocabulary)
        )
        made.save(directory)
    return Tokenizer.load(directory)


def layer_fields(config: Config) -> dict[str, Any]:
    """How the model computes."""
    dtype = jnp.bfloat16 if config.precision == "bf16" else None
    how = dict(dropout=config.dropout, remat=config.remat, scan=config.scan_layers, dtype=dtype)
    return how | dict(attention=ATTENTIONS[config.attention])


def build(config: Config, vocabulary: int) -> GPT:
    """A new module for so many tokens, of a published size or of the config's."""
    fields = layer_fields(config) | dict(vocabulary=vocabulary, length=config.length)
    if config.variant:
        return GPT.variant(config.variant, **fields)
    return GPT(width=config.width, depth=config.depth, num_heads=config.num_heads, **fields)


def learned(name: str) -> tuple[GPT, PyTree, Tokenizer]:
    """What a run of this experiment has learned, or published weights."""
    if not (Path(name).expanduser() / "checkpoints").is_dir():
        return *pretrained.load(name, GPT, param_dtype=jnp.float32), pretrained.load_tokenizer(name)
    told, variables = load_run(name)
    if told["experiment"] != "gpt":
        raise UserError(f"--init {name} is a run of experiments.{told['experiment']}: give one of experiments.gpt")
    trained = Config(**told["config"])
    if trained.init:
        module, _, tokenizer = learned(trained.init)
    else:
        tokenizer = load_tokenizer(trained, (), Path(name).expanduser())
        module = build(trained, tokenizer.vocabulary)
    return module, unstack_blocks(variables["params"]), tokenizer


def optimizer(config: Config, schedule: optax.Schedule) -> optax.GradientTransformation:
    """That of the config, with which gains and biases do not decay."""
    return OPTIMIZERS[config.optimizer](schedule, config.weight_decay, b2=config.b2, mask=matrices)


def loss(
    module: GPT, params: PyTree, variables: dict[str, PyTree], batch: Batch, key: Key[Array, ""]
) -> tuple[Float[Array, ""], Aux]:
    """Mean cross-entropy of the next token, in nats."""
    tokens = batch["tokens"]
    out = module.apply({"params": params}, tokens[:, :-1], train=True, rngs={"dropout": key})
    return cross_entropy(out.logits, tokens[:, 1:]), Aux()


def losses(module: GPT, variables: PyTree, tokens: Int[Array, "B L"]) -> Float[Array, "B"]:
    """The mean over the tokens of each row."""
    logits = module.apply(variables, tokens[:, :-1]).logits
    return jax.vmap(cross_entropy)(logits, tokens[:, 1:])


def measure(each: Float[np.ndarray, "I"], characters: float) -> dict[str, float]:
    """The loss on unread text in nats a token, and in bits a character, which does not depend on the tokenizer."""
    value = float(each.mean())
    return {"validation_loss": value, "bits_per_character": value / math.log(2) / characters}


def beginning(texts: Sequence[str], tokenizer: Tokenizer, most: int) -> Int[np.ndarray, "T"]:
    """At most so many tokens from the beginning of the first text that is a few lines long, or of the longest one."""
    text = next((text for text in texts if len(text) >= 200), max(texts, key=len))
    return tokenizer.encode([text[:200]])[0][:most]


def write(config: Config, module: GPT, params: PyTree, tokenizer: Tokenizer, prompt: list[int], run: Run) -> None:
    """Goes on from the prompt, on the terminal as it is made, and in `sample.txt`."""
    text: list[int] = []
    shown = 0

    def stream(token: int) -> None:
        """Tokens may be parts of characters: what is shown is what has become readable."""
        nonlocal shown
        text.append(token)
        readable = tokenizer.decode(text)
        if not readable.endswith("\N{REPLACEMENT CHARACTER}"):
            print(readable[shown:], end="", flush=True)
            shown = len(readable)

    given = tokenizer.decode(prompt)
    run.say(f"\n--- it is given:\n{given}\n--- and writes:")
    barred = () if tokenizer.pad == tokenizer.end else (tokenizer.pad,)
    sampling = Sampling(config.temperature, config.top_k, config.top_p, barred)
    how = dict(tokens=config.tokens, sampling=sampling, end=tokenizer.end, stream=stream)
    written = go_on(module, {"params": params}, prompt, jax.random.key(config.seed), **how)
    print("\n--- the end" if tokenizer.end in written else "", flush=True)
    (run.directory / "sample.txt").write_text(f"{given}\n--- written:\n{tokenizer.decode(written)}\n", encoding="utf-8")


def draw(module: GPT, params: PyTree, tokenizer: Tokenizer, tokens: Int[np.ndarray, "T"], directory: Path) -> None:
    """What each head of each block looks at in a line of unread text."""
    weights = jnp.stack(attention_weights(module, params, jnp.asarray(tokens)[None]))
    shown = [tokenizer.decode([token]).replace("\n", "⏎").replace(" ", "␣") for token in tokens.tolist()]
    title = "what each head (across) of each block (downwards) looks at, from each token on the left"
    figures.attention_maps(np.asarray(weights[:, 0]), shown, directory / "attention.png", title=title)


EXPERIMENT = launch.Experiment(
    name="gpt",
    summary="A Transformer learns to go on with a text, token by token.",
    paper="Radford et al. 2019, Language Models are Unsupervised Multitask Learners (GPT-2)",
    result="2.24 bits a character on modules of Python's standard library that it has not read",
    minutes=2,
    presets=PRESETS,
    main=main,
)

if __name__ == "__main__":
    launch.launch(EXPERIMENT)
