"""A training step of the encoder-decoder Transformer beside `torch.nn.Transformer`."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
import optax
import torch

from benchmarks.training_step import training_step
from experiments.translation import objective
from jaxdl.models.marian import EncoderDecoder, Stack
from jaxdl.nn import ATTENTIONS


@dataclasses.dataclass(frozen=True)
class Translation:
    """Both do forward (post-norm, one table of embeddings that also gives the logits), cross-entropy with label smoothing, backward and AdamW, on rows without packing. The defaults are the sizes of the experiment's default run."""

    batch_size: int = 8
    length: int = 64
    width: int = 128
    depth: int = 3
    num_heads: int = 4
    vocab_size: int = 1000
    dropout: float = 0.0
    attention: str = "plain"

    def batch(self) -> dict[str, np.ndarray]:
        """Random tokens; where a row is over there is padding, number 0."""
        random = np.random.default_rng(0)
        shape = self.batch_size, self.length
        source, target, labels = (random.integers(1, self.vocab_size, shape).astype(np.int32) for _ in range(3))
        ends = random.integers(self.length * 3 // 4, self.length + 1, (self.batch_size, 1))
        segments = (np.arange(self.length) < ends).astype(np.int32)
        return dict(
            source=source * segments, source_segments=segments, target=target, target_segments=segments, labels=labels * segments
        )

    def jaxdl(self) -> Callable[[], None]:
        batch = self.batch()
        stack = Stack(self.depth, self.num_heads, 4 * self.width)
        module = EncoderDecoder(
            self.vocab_size, self.width, stack, stack, dropout=self.dropout, attention=ATTENTIONS[self.attention]
        )
        return training_step(
            functools.partial(objective, module, 0.1, float((batch["target_segments"] > 0).sum() / self.batch_size)),
            optax.adamw(1e-3, b2=0.98, weight_decay=0.01),
            lambda key: module.init(key, batch["source"][:1], batch["target"][:1]),
            batch,
        )

    def torch(self) -> Callable[[], None]:
        batch = {name: torch.tensor(array, dtype=torch.long) for name, array in self.batch().items()}
        table = torch.nn.Embedding(self.vocab_size, self.width)
        model = torch.nn.Transformer(
            self.width, self.num_heads, self.depth, self.depth, 4 * self.width, self.dropout, batch_first=True
        ).train()
        # It ends both stacks with a normalisation, also after post-norm blocks, which the paper does not.
        model.encoder.norm = model.decoder.norm = None
        angles = torch.arange(self.length)[:, None] / 10_000 ** (torch.arange(0, self.width, 2) / self.width)
        positions = torch.stack([angles.sin(), angles.cos()], -1).flatten(1)
        padding = batch["source_segments"] == 0
        future = torch.nn.Transformer.generate_square_subsequent_mask(self.length, dtype=torch.bool)
        drop = torch.nn.Dropout(self.dropout)
        parameters = [*model.parameters(), *table.parameters()]
        optimizer = torch.optim.AdamW(parameters, 1e-3, betas=(0.9, 0.98), weight_decay=0.01, fused=True)

        def run() -> None:
            optimizer.zero_grad()
            embed = lambda tokens: drop(table(tokens) * self.width**0.5 + positions)
            out = model(
                embed(batch["source"]), embed(batch["target"]), tgt_mask=future, src_key_padding_mask=padding,
                memory_key_padding_mask=padding, tgt_is_causal=True,
            )  # fmt: skip
            logits = (out @ table.weight.T).flatten(0, 1)
            torch.nn.functional.cross_entropy(logits, batch["labels"].flatten(), ignore_index=0, label_smoothing=0.1).backward()
            optimizer.step()

        return run
