"""One training step of SigLIP, here and in torch eager (transformers' `SiglipModel`), side by side on this machine's CPU.

    python -m benchmarks.siglip_step [--batch-size 128] [--resolution 32] [--patch 8] [--width 64] [--depth 2] [--text-depth 1] [--rounds 15]

Both do forward, sigmoid loss, backward and AdamW in float32 on the same batch, with as many threads as there are cores. Each has a process of its own, where the other's threads do not disturb it; they take turns, so that both see the same noise. Each round gives a ratio, above 1 where ours is the faster one.
"""

import argparse
import functools
import importlib.metadata
import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import jax
import numpy as np
import optax
import torch
import transformers

from experiments.siglip import loss
from jaxdl.launch import keep_freed_memory
from jaxdl.models.siglip import SigLIP, TextTower, VisionTower
from jaxdl.training import init_state, make_step

VOCABULARY = 128


def ours(options: argparse.Namespace, images: np.ndarray, tokens: np.ndarray) -> Callable[[], None]:
    """A function that makes one step and waits for it."""
    shared = dict(num_heads=options.num_heads, width=options.width, hidden=4 * options.width)
    module = SigLIP(
        VisionTower(patch=options.patch, depth=options.depth, **shared),
        TextTower(vocabulary=VOCABULARY, features=options.width, depth=options.text_depth, **shared),
    )
    optimizer = optax.adamw(1e-3, b2=0.95, weight_decay=1e-4)
    state = init_state(lambda key: module.init(key, images[:1], tokens[:1]), optimizer, seed=0)
    step = jax.jit(make_step(functools.partial(loss, module), optimizer), donate_argnums=0)
    batch = {"image": images, "tokens": tokens}

    def run() -> None:
        nonlocal state
        state, _ = step(state, batch)
        jax.block_until_ready(state)

    return run


def torchs(options: argparse.Namespace, images: np.ndarray, tokens: np.ndarray) -> Callable[[], None]:
    """The same for the model of transformers, with torch's scaled dot-product attention and its fused AdamW."""
    shared = dict(
        hidden_size=options.width,
        intermediate_size=4 * options.width,
        num_attention_heads=options.num_heads,
    )
    config = transformers.SiglipConfig(
        vision_config=dict(image_size=options.resolution, patch_size=options.patch, num_hidden_layers=options.depth, **shared),
        text_config=dict(
            vocab_size=VOCABULARY,
            max_position_embeddings=options.text_length,
            num_hidden_layers=options.text_depth,
            projection_size=options.width,
            **shared,
        ),
    )
    model = transformers.SiglipModel(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, betas=(0.9, 0.95), weight_decay=1e-4, fused=True)
    pixels, ids = torch.tensor(images.transpose(0, 3, 1, 2)).contiguous(), torch.tensor(tokens, dtype=torch.long)

    def run() -> None:
        optimizer.zero_grad()
        model(pixel_values=pixels, input_ids=ids, return_loss=True).loss.backward()
        optimizer.step()

    return run


def serve(make: Callable[..., Callable[[], None]], options: argparse.Namespace, turns: Connection) -> None:
    """The life of a process: for each number that comes, make so many steps and answer with the seconds that one took."""
    keep_freed_memory()
    random = np.random.default_rng(0)
    images = random.normal(size=(options.batch_size, options.resolution, options.resolution, 3)).astype(np.float32)
    tokens = random.integers(0, VOCABULARY, (options.batch_size, options.text_length)).astype(np.int32)
    run = make(options, images, tokens)
    while steps := turns.recv():
        started = time.perf_counter()
        for _ in range(steps):
            run()
        turns.send((time.perf_counter() - started) / steps)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {
        "batch-size": 128,
        "resolution": 32,
        "patch": 8,
        "width": 64,
        "depth": 2,
        "num-heads": 4,
        "text-depth": 1,
        "text-length": 18,
    }
    for name, default in (sizes | {"rounds": 15, "steps": 5}).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    sides: dict[str, Connection] = {}
    for name, make in {"jaxdl": ours, "torch": torchs}.items():
        sides[name], theirs = context.Pipe()
        context.Process(target=serve, args=(make, options, theirs), daemon=True).start()

    def turn(name: str) -> float:
        sides[name].send(options.steps)
        return sides[name].recv()

    for name in sides:
        turn(name)
    times = {name: [] for name in sides}
    for _ in range(options.rounds):
        for name in sides:
            times[name].append(turn(name))
    for side in sides.values():
        side.send(0)
    versions = f"jax {importlib.metadata.version('jax')}, torch {importlib.metadata.version('torch')}"
    print(f"{versions}, {os.cpu_count()} cores; {options.rounds} rounds of {options.steps} steps")
    for name, measured in times.items():
        low, middle, high = np.quantile(measured, [0, 0.5, 1]) * 1e3
        print(f"{name}: {middle:.1f} ms a step (from {low:.1f} to {high:.1f})")
    ratios = np.array(times["torch"]) / np.array(times["jaxdl"])
    print(f"torch / jaxdl: {np.median(ratios):.2f} (from {ratios.min():.2f} to {ratios.max():.2f})")


if __name__ == "__main__":
    main()
