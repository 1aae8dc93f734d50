"""Time to compile and memory of a deep Transformer's gradient, with its blocks written out or scanned, and with or without `remat`.

`python -m benchmarks.depth` compiles on the backend at hand and runs nothing.
"""

import time

import jax
import jax.numpy as jnp

from jaxdl.nn import Transformer, TransformerBlock

BATCH, LENGTH, WIDTH, HEADS = 8, 128, 256, 4


def measure(depth: int, scan: bool, remat: bool) -> tuple[float, float]:
    """Seconds to compile, and MiB of temporaries, of the gradient of a mean square with respect to the parameters."""
    model = Transformer(depth, TransformerBlock(HEADS, 4 * WIDTH, is_causal=True), scan=scan, remat=remat)
    x = jnp.zeros((BATCH, LENGTH, WIDTH))
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    gradient = jax.jit(jax.grad(lambda params, x: jnp.mean(model.apply(params, x) ** 2)))
    started = time.perf_counter()
    compiled = gradient.lower(params, x).compile()
    return time.perf_counter() - started, compiled.memory_analysis().temp_size_in_bytes / 2**20


def main() -> None:
    jax.config.update("jax_enable_compilation_cache", False)
    print(
        f"jax {jax.__version__}, {jax.devices()[0].device_kind}; batch {BATCH}, {LENGTH} tokens, width {WIDTH}, {HEADS} heads\n"
    )
    print("| blocks | form | seconds to trace and compile | MiB of temporaries |\n|---|---|---|---|")
    for depth in (12, 48):
        for scan, remat in ((False, False), (False, True), (True, False), (True, True)):
            form = ("scan" if scan else "written out") + (", remat" if remat else "")
            seconds, mebibytes = measure(depth, scan, remat)
            print(f"| {depth} | {form} | {seconds:.1f} | {mebibytes:.0f} |", flush=True)


if __name__ == "__main__":
    main()
