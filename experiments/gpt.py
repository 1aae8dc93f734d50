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
from annotated_types import Ge, Gt, Le, Lt
from jaxtyping import Array, Float, Int, Int32, Key, PyTree

from jaxdl import figures, launch, pretrained
from jaxdl.data import train_batches
from jaxdl.data.documents import Windows, open_documents
from jaxdl.data.text import Tokenizer
from jaxdl.errors import UserError
from jaxdl.generate import Sampling, generate
from jaxdl.losses import cross_entropy
from jaxdl.models.gpt2 import GPT, VARIANTS
from jaxdl.nn import ATTENTIONS, Cache, attention_weights, stack_blocks
from jaxdl.training import ASIDE, OPTIMIZERS, Aux, Batch, Execution, Run, fit, matrices, start
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
    init: str = ""
    """Fine-tune from these weights: a folder with config.json and *.safetensors, or a name on the Hugging Face hub. The sizes below are then its own, and so is the tokenizer."""
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
    prompt: str = dataclasses.field(default="", metadata=ASIDE)
    """What the finished model goes on from, on the terminal. Empty: the beginning of the held-out text. A finished run answers another prompt at once."""
    tokens: Annotated[int, Ge(1)] = dataclasses.field(default=400, metadata=ASIDE)
    """How many tokens it writes."""
    temperature: Annotated[float, Ge(0)] = dataclasses.field(default=0.8, metadata=ASIDE)
    """Below 1 the likely becomes likelier; 0: always the most likely token."""
    top_k: Annotated[int, Ge(0)] = dataclasses.field(default=0, metadata=ASIDE)
    """Choose among so many most likely tokens only. 0: among all."""
    top_p: Annotated[float, Gt(0), Le(1)] = dataclasses.field(default=1.0, metadata=ASIDE)
    """Choose among the fewest most likely tokens that have this probability together."""


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
        f"gpt2_{name.lower()}": Config(
            preset=f"gpt2_{name.lower()}", variant=name, length=1024, tokenizer="openai-community/gpt2", steps=600_000,
            batch_size=480, accumulate=5, optimizer="adamw", learning_rate=6e-4, warmup=0.0033, precision="bf16",
            attention="flash", evaluate_every=1000,
        )
        for name in VARIANTS
    },
    "finetune": Config(
        preset="finetune", init="openai-community/gpt2", length=1024, steps=200, batch_size=32, accumulate=8, optimizer="adamw",
        learning_rate=3e-5, dropout=0.1, precision="bf16", evaluate_every=50,
    ),
}  # fmt: skip


def main(config: Config, workdir: str | Path, execution: Execution = Execution()) -> dict[str, Any]:
    """Trains (or goes on training) in `workdir`, measures, writes, draws, and returns what is in its `result.json`."""
    with Run.open(workdir, "gpt", config, execution) as run:
        texts = open_documents(config.data, "train", data_dir=config.data_dir)
        held_out = open_documents(config.eval_data or config.data, "test", data_dir=config.data_dir)
        with run.first_process_first():
            tokenizer = load_tokenizer(config, texts, run.directory)
        module, params = build(config, tokenizer)
        source, unread = (Windows(join(tokenizer, part), config.length) for part in (texts, held_out))
        characters = sum(map(len, held_out)) / len(unread.tokens)

        batches = train_batches(source, lambda example, rng: example, batch_size=config.batch_size, seed=config.seed, **run.shard)
        step, state = start(
            config,
            run.layout,
            functools.partial(loss, module),
            lambda schedule: OPTIMIZERS[config.optimizer](schedule, config.weight_decay, b2=0.99, mask=matrices),
            lambda key: module.init(key, jnp.asarray(source[0]["tokens"])[None, :-1]),
            params,
        )

        each = run.layout.inference(functools.partial(losses, module), batch_size=32)
        evaluate = lambda state: measure(each({"params": state.measured}, unread.apart()), characters)
        state = fit(step, state, batches, run, steps=config.steps, evaluate=evaluate, evaluate_every=config.evaluate_every)
        metrics = evaluate(state)
        params = jax.tree.map(whole, state.measured)
        if is_first():
            write(config, module, params, tokenizer, held_out[0], run)
            draw(module, params, tokenizer, held_out[0], run.figures)
        return run.finish(state, metrics)


def load_tokenizer(config: Config, texts: Sequence[str], directory: Path) -> Tokenizer:
    """The published one, the run's own, or a new one, made of the text and kept in the run."""
    if config.init or config.tokenizer not in ("characters", "bytes"):
        return pretrained.load_tokenizer(config.init or config.tokenizer)
    if not (directory / "tokenizer.json").exists():
        made = (
            Tokenizer.of_characters(texts) if config.tokenizer == "characters" else Tokenizer.of_bytes(texts, config.vocabulary)
        )
        made.save(directory)
    return Tokenizer.load(directory)


def build(config: Config, tokenizer: Tokenizer) -> tuple[GPT, PyTree | None]:
    """The module, and its published parameters if there are any."""
    fields = dict(
        attention=ATTENTIONS[config.attention],
        dropout=config.dropout,
        remat=config.remat,
        dtype=jnp.bfloat16 if config.precision == "bf16" else None,
    )
    if config.init:
        module, params = pretrained.load(config.init, param_dtype=jnp.float32, **fields)
        if config.length > module.length:
            raise UserError(f"--length {config.length}: {config.init} has {module.length} positions")
        if config.scan_layers:
            module, params = module.clone(scan=True), stack_blocks(params)
        return module, params
    fields |= dict(vocabulary=tokenizer.vocabulary, length=config.length, scan=config.scan_layers)
    if config.variant:
        return GPT.variant(config.variant, **fields), None
    return GPT(width=config.width, depth=config.depth, num_heads=config.num_heads, **fields), None


def join(tokenizer: Tokenizer, texts: Sequence[str]) -> Int32[np.ndarray, "T"]:
    """The tokens of all texts one after another, each with its end where there are several."""
    parts = tokenizer.encode(texts)
    return parts[0] if len(parts) == 1 else np.concatenate([np.append(part, np.int32(tokenizer.end)) for part in parts])


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


@functools.cache
def decoder(module: GPT) -> Any:
    """What `generate` wants, the same function for the same module, so that it is compiled once."""

    def decode(variables: PyTree, tokens: Int[Array, "B T"], cache: Cache, valid: Array) -> tuple[Array, Cache]:
        out, cache = module.apply(variables, tokens, cache, valid=valid, method="decode")
        return out.logits, cache

    return decode


def write(config: Config, module: GPT, params: PyTree, tokenizer: Tokenizer, unread: str, run: Run) -> None:
    """Goes on from the prompt, on the terminal as it is made, and in `sample.txt`.

    There are positions for `length` tokens. Who writes more forgets the first half when they are used up.
    """
    text = tokenizer.encode([config.prompt or unread[:200]])[0].tolist()
    if not text:
        raise UserError("--prompt has no token: give some text")
    kept = (module.length + 1) // 2
    given = len(text)
    shown = 0

    def stream(token: Array | np.ndarray) -> None:
        """Tokens may be parts of characters: what is shown is what has become readable."""
        nonlocal shown
        text.append(int(token[0]))
        readable = tokenizer.decode(text[given : given + config.tokens])
        if not readable.endswith("\N{REPLACEMENT CHARACTER}"):
            print(readable[shown:], end="", flush=True)
            shown = len(readable)

    run.say(f"\n--- it is given:\n{tokenizer.decode(text)}\n--- and writes:")
    sampling = Sampling(config.temperature, config.top_k, config.top_p)
    cache = module.empty_cache(1, module.length)
    while len(text) < given + config.tokens:
        last = text[-kept:]
        missing = kept - len(last)
        key = jax.random.fold_in(jax.random.key(config.seed), len(text))
        prompt = jnp.asarray([[tokenizer.pad] * missing + last])
        generate(
            decoder(module), {"params": params}, prompt, cache, key, steps=module.length - kept, sampling=sampling,
            valid=jnp.arange(kept)[None] >= missing, stream=stream,
        )  # fmt: skip
        jax.effects_barrier()
    print(flush=True)
    prompt, written = tokenizer.decode(text[:given]), tokenizer.decode(text[given : given + config.tokens])
    (run.directory / "sample.txt").write_text(f"{prompt}\n--- written:\n{written}\n", encoding="utf-8")


def draw(module: GPT, params: PyTree, tokenizer: Tokenizer, unread: str, directory: Path) -> None:
    """What each head of each block looks at in a line of unread text."""
    tokens = tokenizer.encode([unread])[0][: min(32, module.length)]
    weights = jnp.stack(attention_weights(module, params, jnp.asarray(tokens)[None]))
    shown = [tokenizer.decode([token]).replace("\n", "⏎").replace(" ", "␣") for token in tokens.tolist()]
    title = "what each head (across) of each block (downwards) looks at, from each token on the left"
    figures.attention_maps(np.asarray(weights[:, 0]), shown, directory / "attention.png", title=title)


EXPERIMENT = launch.Experiment(
    name="gpt",
    summary="A Transformer learns to go on with a text, token by token.",
    paper="Radford et al. 2019, Language Models are Unsupervised Multitask Learners (GPT-2)",
    result="2.24 bits a character on modules of Python's standard library that it has not read",
    minutes=2.5,
    presets=PRESETS,
    main=main,
)

if __name__ == "__main__":
    launch.launch(EXPERIMENT)
