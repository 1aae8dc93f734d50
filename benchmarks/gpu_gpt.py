"""GPT-2 in bf16 on a GPU, beside torch.compile with scaled dot-product attention: tokens a second, and the share of the chip's peak.

    python -m benchmarks.gpu_gpt [--variant 124M] [--attention flash] [--batch-size 32] [--out gpt.json]

Both sides make the same step on the same batch: forward in bf16 from parameters in f32, cross-entropy, backward, fused AdamW. They take turns in processes of their own, as in `benchmarks.steps`. The share counts the model's FLOPs, as Chowdhery et al. 2022, appendix B: those of the products of matrices of a forward and a backward pass, with the whole square of the attention, whatever a program computes.
"""

import dataclasses
import functools
import importlib.metadata
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import optax
import torch
import transformers
import tyro

from benchmarks.steps import measure
from benchmarks.training_step import training_step
from experiments.gpt import objective
from jaxdl.models.gpt2 import GPT, VARIANTS
from jaxdl.nn import ATTENTIONS
from jaxdl.training import TrainState
from jaxdl.training.cost import matmul_flops, peak_flops

CHOICES = {**ATTENTIONS, "cudnn": functools.partial(jax.nn.dot_product_attention, implementation="cudnn")}


@dataclasses.dataclass(frozen=True)
class GpuGpt:
    """A model of `benchmarks.steps`, and what its step costs."""

    variant: Literal[tuple(VARIANTS)] = "124M"
    """A published size."""
    attention: Literal[tuple(CHOICES)] = "flash"
    """Ours: in tiles by the kernel of this project, by cuDNN, or plain."""
    batch_size: int = 32
    length: int = 1024
    vocab_size: int = 50_304
    """That of GPT-2, 50,257, filled up to a multiple of 128, as nanoGPT does."""
    depth: int = 0
    """Blocks, to try it out. 0: those of the size."""

    def module(self, attention: str) -> GPT:
        depth = dict(depth=self.depth) if self.depth else {}
        how = dict(attention=CHOICES[attention], dtype=jax.numpy.bfloat16)
        return GPT.variant(self.variant, vocab_size=self.vocab_size, length=self.length, **how, **depth)

    def tokens(self) -> np.ndarray:
        return np.random.default_rng(0).integers(0, self.vocab_size, (self.batch_size, self.length + 1)).astype(np.int32)

    def jaxdl(self) -> Callable[[], None]:
        tokens, module = self.tokens(), self.module(self.attention)
        optimizer = optax.adamw(6e-4, b2=0.95, weight_decay=0.1)
        return training_step(
            functools.partial(objective, module), optimizer, lambda key: module.init(key, tokens[:1, :-1]), {"tokens": tokens}
        )

    def torch(self) -> Callable[[], None]:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        tokens = torch.tensor(self.tokens(), dtype=torch.long, device=device)
        sizes = self.module("plain")
        config = transformers.GPT2Config(
            vocab_size=sizes.vocab_size, n_positions=sizes.length, n_embd=sizes.width, n_layer=sizes.depth,
            n_head=sizes.num_heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, attn_implementation="sdpa",
            bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        model = transformers.GPT2LMHeadModel(config).to(device).train()
        optimizer = torch.optim.AdamW(model.parameters(), 6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        torch.set_float32_matmul_precision("high")

        @torch.compile
        def torch_objective(tokens: torch.Tensor) -> torch.Tensor:
            logits = model(input_ids=tokens[:, :-1]).logits
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

        def run() -> None:
            optimizer.zero_grad()
            with torch.autocast(device, torch.bfloat16):
                value = torch_objective(tokens)
            value.backward()
            optimizer.step()
            if device == "cuda":
                torch.cuda.synchronize()

        return run

    def flops(self) -> float:
        """Of a step of the model with plain attention, nothing of which is computed."""
        module = self.module("plain")
        tokens = jax.ShapeDtypeStruct((self.batch_size, self.length + 1), jax.numpy.int32)
        params = jax.eval_shape(lambda key: module.init(key, jax.numpy.zeros((1, self.length), int)), jax.random.key(0))["params"]
        key = jax.random.key(0)
        state = TrainState(step=0, params=None, opt_state={}, variables={}, key=key)  # GPT's objective asks nothing of it.
        value = lambda params, tokens: objective(module, params, state, {"tokens": tokens}, key)[0]
        return matmul_flops(jax.make_jaxpr(jax.grad(value))(params, tokens))


def report(model: GpuGpt, times: dict[str, list[float]], device_kind: str) -> dict[str, Any]:
    """What is written: medians of the rounds, tokens a second, and shares of the peak (None where it is not known)."""
    flops, peak = model.flops(), peak_flops(device_kind)
    sides = {}
    for library, measured in times.items():
        seconds = float(np.median(measured))
        sides[library] = {
            "milliseconds": seconds * 1e3,
            "milliseconds_range": [min(measured) * 1e3, max(measured) * 1e3],
            "tokens_per_second": model.batch_size * model.length / seconds,
            "share_of_bf16_peak": None if peak is None else flops / seconds / peak,
        }
    ratios = np.array(times["torch"]) / np.array(times["jaxdl"])
    return {
        "model": dataclasses.asdict(model),
        "device": device_kind,
        "bf16_peak": peak,
        "flops_of_a_step": flops,
        **sides,
        "torch / jaxdl": float(np.median(ratios)),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "torch", "transformers")},
    }


def main(model: GpuGpt, rounds: int = 10, seconds: float = 2.0, out: Path | None = None) -> None:
    """GPT-2 in bf16, here and in torch, compiled.

    Args:
        rounds: Turns that each side has.
        seconds: How long a turn is.
        out: A file for the report, in JSON, which is printed in any case.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # Both sides have to fit.
    found = report(model, measure(model, rounds, seconds, os.cpu_count() or 1), jax.devices()[0].device_kind)
    text = json.dumps(found, indent=2) + "\n"
    print(text, end="")
    if out is not None:
        out.write_text(text)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__, config=(tyro.conf.OmitArgPrefixes,))
