"""Language modelling: texts to windows of tokens, the loss on text that is held out, and text that the model writes."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge, Gt, Le
from jaxtyping import Array, Float, Int, Int32, Integer, Key, PyTree

from jaxdl import figures, pretrained
from jaxdl.data import DOCUMENTS, Source
from jaxdl.data.documents import sample_documents
from jaxdl.data.text import Tokenizer
from jaxdl.data.windows import Windows, tokens_of, write_tokens
from jaxdl.errors import UserError
from jaxdl.files import replace_text, written_whole
from jaxdl.generate import Sampling
from jaxdl.losses import cross_entropy
from jaxdl.nn import attention_weights
from jaxdl.tasks.kept import kept_tokenizer, kept_tokens
from jaxdl.training import NOT_IDENTITY, Report, Run, is_first, to_host
from jaxdl.training.workdir import steps

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class TextFields:
    """Fields of a config: how texts become tokens."""

    length: Annotated[int, Ge(1)] = 128
    """Tokens that are looked back at."""
    tokenizer: str = "characters"
    """`characters`, `bytes` (byte pair encoding, trained on the text), or a published tokenizer.json."""
    vocab_size: Annotated[int, Ge(258)] = 1024
    """Largest vocabulary of a byte pair encoding that is trained."""
    eval_characters: Annotated[int, Ge(1)] = 1_000_000
    """How much of the held-out text is measured on, at most."""


@dataclasses.dataclass(frozen=True)
class PromptFields:
    """Fields of a config: what the finished model is to write."""

    prompt: str = dataclasses.field(default="", metadata=NOT_IDENTITY)
    """What the finished model continues, on the terminal. Empty: the beginning of a held-out text. A finished run answers another prompt at once."""
    tokens: Annotated[int, Ge(1)] = dataclasses.field(default=400, metadata=NOT_IDENTITY)
    """How many tokens it writes, unless the text comes to its end before."""
    temperature: Annotated[float, Ge(0)] = dataclasses.field(default=0.8, metadata=NOT_IDENTITY)
    """Below 1 the likely becomes likelier; 0: always the most likely token."""
    top_k: Annotated[int, Ge(0)] = dataclasses.field(default=0, metadata=NOT_IDENTITY)
    """Choose among so many most likely tokens only. 0: among all."""
    top_p: Annotated[float, Gt(0), Le(1)] = dataclasses.field(default=1.0, metadata=NOT_IDENTITY)
    """Choose among the fewest most likely tokens that have this probability together."""


@dataclasses.dataclass(frozen=True)
class Texts:
    """What a language model learns from, and what it is measured on."""

    tokenizer: Tokenizer
    train: Windows
    held_out: Windows
    characters_per_token: float
    """Of the held-out text."""
    excerpt: Int32[np.ndarray, "T"]
    """The beginning of a held-out text, at most half a window long."""


def open_texts(run: Run, tokenizer: str) -> Texts:
    """The documents that the run's config names, as windows of `config.length` tokens.

    `tokenizer` is `characters` or `bytes`, which is made of the training text and kept in the run, or names a published one. The training text's tokens are kept in the run's `tokens.npy`, and are not all in memory. Raises `UserError` for data that is not there or too short, and where there is no such tokenizer.
    """
    config = run.config
    documents, unseen = DOCUMENTS.open(config.data, config.eval_data, data_dir=config.data_dir)
    run.reads(documents, unseen)
    held_out = sample_documents(unseen, config.eval_characters)
    kept = run.directory / "tokens.npy"

    def read(file: Path, chosen: Tokenizer) -> tuple[Windows, Windows]:
        train = _windows(kept_tokens(file, chosen.vocab_size), config.length, f"the text of {documents.info.spec} to train on")
        tokens = np.concatenate(list(tokens_of(held_out, chosen)))
        return train, _windows(tokens, config.length, f"the held-out text of {unseen.info.spec}")

    with run.first_process_first():
        if not kept.exists():  # What is too short is not kept: the next command may come with more.
            with written_whole(run.directory, last=kept.name) as folder:
                known = steps(run.directory) or (run.directory / "tokenizer_config.json").exists()
                made = run.directory if known else folder
                chosen = _tokenizer(tokenizer, documents, config.vocab_size, made)
                write_tokens(folder / kept.name, tokens_of(documents, chosen), chosen.vocab_size)
                read(folder / kept.name, chosen)
        chosen = _tokenizer(tokenizer, documents, config.vocab_size, run.directory)
    train, unread = read(kept, chosen)
    characters = sum(map(len, held_out)) / len(unread.tokens)
    return Texts(chosen, train, unread, characters, _excerpt(held_out, chosen)[: (config.length + 1) // 2])


def _windows(tokens: Integer[np.ndarray, "T"], length: int, text: str) -> Windows:
    """Raises `UserError` for a text that is shorter than a window; `text` says which it is."""
    if len(tokens) <= length:
        shorter = f", or --length {len(tokens) - 1} at most" if len(tokens) > 1 else ""
        raise UserError(
            f"{text}, of {len(tokens)} tokens has no piece of {length + 1} (--length {length}): give more text{shorter}"
        )
    return Windows(tokens, length)


def _tokenizer(name: str, documents: Source[str], vocab_size: int, directory: Path) -> Tokenizer:
    """The published one, or the run's own."""
    match name:
        case "characters":
            return kept_tokenizer(directory, lambda: Tokenizer.of_characters(documents))
        case "bytes":
            return kept_tokenizer(directory, lambda: Tokenizer.of_bytes(documents, vocab_size))
    return pretrained.load_tokenizer(name)


def _excerpt(documents: Sequence[str], tokenizer: Tokenizer) -> Int32[np.ndarray, "T"]:
    """The beginning of the first document that is a few lines long, or of the longest one."""
    document = next((document for document in documents if len(document) >= 200), max(documents, key=len))
    return tokenizer.encode([document[:200]])[0]


class LanguageModelling:
    """How well held-out text is predicted, and what the model writes: what `train` takes as `evaluate`, `conclude` and `answer`."""

    def __init__(
        self,
        run: Run,
        texts: Texts,
        apply: Callable[[PyTree, Int[Array, "B T"]], Float[Array, "B T V"]],
        continue_text: Callable[..., list[int]],
    ):
        """`apply(variables, tokens)` gives the logits of each next token; `continue_text(variables, tokens, key, *, tokens, sampling, end, stream)` the tokens that continue a text, as `models.gpt2.continue_text` does for its module. Raises `UserError` if the config's `prompt` has no token."""
        self.run, self.texts, self.continue_text = run, texts, continue_text
        prompt = run.config.prompt
        self.prompt = texts.tokenizer.encode([prompt])[0] if prompt else texts.excerpt
        if not len(self.prompt):
            raise UserError(f"the prompt {prompt!r} has no token: give some text")

        def losses(variables: PyTree, tokens: Int[Array, "B L"]) -> Float[Array, "B"]:
            return jax.vmap(cross_entropy)(apply(variables, tokens[:, :-1]), tokens[:, 1:])

        self._losses = run.layout.inference(losses, batch_size=32)

    def evaluate(self, variables: PyTree, key: Key[Array, ""]) -> Report:
        """The loss on held-out text in nats a token, and in bits a character, which does not depend on the tokenizer."""
        loss = float(self._losses(variables, self.texts.held_out.non_overlapping()).mean())
        return {"validation_loss": loss, "bits_per_character": loss / math.log(2) / self.texts.characters_per_token}

    @property
    def answer(self) -> Callable[[PyTree], None] | None:
        """`write`, if the config has a prompt."""
        return self.write if self.run.config.prompt else None

    def conclude(self, variables: PyTree, key: Key[Array, ""]) -> Report:
        """Continues the excerpt, unless a prompt was answered."""
        if self.answer is None:
            self.write(variables)
        return {}

    def write(self, variables: PyTree) -> None:
        """Continues the prompt, or else the excerpt, on the terminal as it is made, and in the run's `sample.txt`."""
        run, tokenizer, config = self.run, self.texts.tokenizer, self.run.config
        variables = jax.tree.map(to_host, variables)
        if not is_first():
            return
        given = tokenizer.decode(self.prompt)
        run.say(f"\n--- it is given:\n{given}\n--- and writes:")
        suppressed_tokens = () if tokenizer.pad == tokenizer.end else (tokenizer.pad,)
        sampling = Sampling(config.temperature, config.top_k, config.top_p, suppressed_tokens)
        options = dict(tokens=config.tokens, sampling=sampling, end=tokenizer.end, stream=_printer(tokenizer))
        written = self.continue_text(variables, self.prompt.tolist(), jax.random.key(config.seed), **options)
        print("\n--- the end" if tokenizer.end in written else "", flush=True)
        sample = f"{given}\n--- written:\n{tokenizer.decode(written)}\n"
        replace_text(run.directory / "sample.txt", sample)


def _printer(tokenizer: Tokenizer) -> Callable[[int], None]:
    """A function of one token after another. Some are parts of characters: what is printed is what has become readable."""
    tokens: list[int] = []
    shown = 0

    def show(token: int) -> None:
        nonlocal shown
        tokens.append(token)
        readable = tokenizer.decode(tokens)
        if not readable.endswith("\N{REPLACEMENT CHARACTER}"):
            print(readable[shown:], end="", flush=True)
            shown = len(readable)

    return show


def draw_attention(module: nn.Module, variables: PyTree, texts: Texts, most: int = 32) -> "Figure":
    """What each head of each block of a Transformer looks at in the excerpt's first tokens."""
    tokens = texts.excerpt[:most]
    params = jax.tree.map(to_host, variables["params"])
    weights = jnp.stack(attention_weights(module, params, jnp.asarray(tokens)[None]))
    shown = [texts.tokenizer.decode([token]).replace("\n", "⏎").replace(" ", "␣") for token in tokens.tolist()]
    title = "what each head (across) of each block (downwards) looks at, from each token on the left"
    return figures.attention_maps(np.asarray(weights[:, 0]), shown, title=title)
