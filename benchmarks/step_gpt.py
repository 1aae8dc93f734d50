"""A training step of GPT beside that of transformers' `GPT2LMHeadModel`."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
import optax
import torch
import transformers

from benchmarks.training_step import training_step
from experiments.gpt import objective
from jaxdl.models.gpt2 import GPT
from jaxdl.nn import ATTENTIONS


@dataclasses.dataclass(frozen=True)
class Gpt:
    """Both do forward, cross-entropy, backward and AdamW; torch with its scaled dot-product attention and its fused AdamW. The defaults are the sizes of the experiment's default run."""

    batch_size: int = 8
    length: int = 128
    width: int = 128
    depth: int = 4
    num_heads: int = 4
    vocab_size: int = 109
    attention: str = "plain"

    def tokens(self) -> np.ndarray:
        return np.random.default_rng(0).integers(0, self.vocab_size, (self.batch_size, self.length + 1)).astype(np.int32)

    def jaxdl(self) -> Callable[[], None]:
        tokens = self.tokens()
        module = GPT(self.vocab_size, self.length, self.width, self.depth, self.num_heads, attention=ATTENTIONS[self.attention])
        optimizer = optax.adamw(1e-3, b2=0.99, weight_decay=0.1)
        return training_step(
            functools.partial(objective, module), optimizer, lambda key: module.init(key, tokens[:1, :-1]), {"tokens": tokens}
        )

    def torch(self) -> Callable[[], None]:
        tokens = torch.tensor(self.tokens(), dtype=torch.long)
        config = transformers.GPT2Config(
            vocab_size=self.vocab_size, n_positions=self.length, n_embd=self.width, n_layer=self.depth, n_head=self.num_heads,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
        )  # fmt: skip
        model = transformers.GPT2LMHeadModel(config).train()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3, betas=(0.9, 0.99), weight_decay=0.1, fused=True)

        def run() -> None:
            optimizer.zero_grad()
            logits = model(input_ids=tokens[:, :-1]).logits
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
            optimizer.step()

        return run
