"""The words of a Hopper kernel that the interpreter on the CPU does not understand, each in a form for both.

jax's interpreter for Mosaic GPU runs barriers, TMA copies and threads, and watches for races. It has no wgmma whose left factor is in registers, no transposed operand (jax 0.10), no accumulator that starts from a value, and no copies beyond the end of an array. These few operations stand here twice: as what the GPU executes, and as plain arithmetic on what is read from the same shared memory, so that barriers and the reads behind them are checked. (The interpreter's own wgmma is not watched for races.) Everything else is the kernels' own text, the same in both.

Not checked in the interpreter is whether a kernel waits for its wgmma: there they are done at once. The rule here is simple enough to be followed by eye: a product's operands are released, and its result is used, only after `result` or the end of the enclosing `products`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

# Of each lane of the producer and of a consumer. A block of 384 lanes begins with 168 each, of the 65536 of an SM; the producer hands most of its own to the two consumers. Multiples of 8.
REGISTERS = 24, 240
FEWER_REGISTERS = 40, 232
"""For consumers that do with fewer, where 24 would make the producer spill."""
ROWS = 64
"""Of a consumer's tile: the height of a wgmma."""
CONSUMERS = 2
PRODUCER = CONSUMERS
"""Which of the three warpgroups it is."""

Index = int | jax.Array
"""Known while tracing, or computed when the kernel runs."""
Ref = Any
"""A place in memory, or a part of it; Pallas has no public type for what `.at` gives."""


def tile(*shape: int, dtype: jnp.dtype) -> Any:
    """Shared memory for tiles of 16-bit numbers, as both TMA and wgmma want it: 8 × 64 numbers lie together, swizzled over 128 bytes so that rows and columns are read without conflicts of banks. The last axis is a multiple of 64."""
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def zero(index: Index) -> Index:
    """0, which the compiler cannot know; `index` is that of a tile plus that of the block, of which it knows no limit.

    An address that does not change from tile to tile is computed before the loop, and with it those of all the wgmma that read there: at a width of 256, 32 registers for each operand that could hold 32 columns of a sum. With this in it, the address is computed in its place, which costs next to nothing.
    """
    return lax.div(jnp.int32(index), jnp.int32(2**30))


class Ring(NamedTuple):
    """Slots through which tiles pass from the producer to the consumers, one after another, the index-th through slot `index mod stages`."""

    slots: tuple[Ref, ...]
    """What belongs to a tile: arrays whose first axis counts the slots."""
    filled: Ref
    """A barrier for each slot: every copy by TMA arrives."""
    freed: Ref
    """A barrier for each slot: each consumer arrives when it will not look at the tile again."""
    stages: int

    @staticmethod
    def scratch(stages: int, *slots: Any) -> tuple[Any, ...]:
        """The memory of a ring, in the order of its fields."""
        filled = plgpu.Barrier(num_arrivals=len(slots), num_barriers=stages)
        return slots, filled, plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages)

    def slot(self, index: Index) -> Index:
        return lax.rem(jnp.int32(index), jnp.int32(self.stages)) if self.stages > 1 else zero(index + lax.axis_index("line"))

    def fill(self, index: Index, *sources: Ref) -> None:
        """Producer: asks for the parts of the index-th tile, once its slot is free."""
        slot = self.slot(index)

        @pl.when(index >= self.stages)
        def _() -> None:
            plgpu.barrier_wait(self.freed.at[slot])

        for source, target in zip(sources, self.slots):
            plgpu.copy_gmem_to_smem(source, target.at[slot], self.filled.at[slot])

    def drain(self, count: Index) -> None:
        """Producer: waits until the last of `count` tiles are freed. Whoever waits on a barrier has to see all of its phases."""

        def step(index: Index, _: None) -> None:
            plgpu.barrier_wait(self.freed.at[self.slot(index)])

        lax.fori_loop(jnp.maximum(count - self.stages, 0), count, step, None)

    def take(self, index: Index) -> tuple[Ref, ...]:
        """Consumer: the parts of the index-th tile, once they are there."""
        slot = self.slot(index)
        plgpu.barrier_wait(self.filled.at[slot])
        return tuple(part.at[slot] for part in self.slots)

    def free(self, index: Index) -> None:
        """Consumer: is done with the tile."""
        plgpu.barrier_arrive(self.freed.at[self.slot(index)])


@dataclasses.dataclass
class _Held:
    """What stands for an accumulator in the interpreter."""

    value: jax.Array

    def __getitem__(self, _: Any) -> jax.Array:
        return self.value

    def __setitem__(self, _: Any, value: jax.Array) -> None:
        self.value = value


@dataclasses.dataclass(frozen=True)
class Dialect:
    """The operations, for the GPU or for the interpreter."""

    interpret: bool

    def launch(self, body: Callable[..., None], out: Sequence[jax.ShapeDtypeStruct], scratch: Any, grid: dict[str, int]) -> Any:
        """The kernel as a function of arrays. `grid` names the axes of the grid, the fastest last; a block has the consumers and the producer along the axis `warpgroup`."""
        return plgpu.kernel(
            body,
            out_type=list(out),
            scratch_types=scratch,
            grid=tuple(grid.values()),
            grid_names=tuple(grid),
            num_threads=CONSUMERS + 1,
            thread_name="warpgroup",
            # Approximate: exp2 and log are one instruction each, with a relative error of 2^−22.
            compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
            interpret=interpreter() if self.interpret else False,
        )

    def products(
        self, body: Callable[..., None], accumulators: tuple[jax.Array, ...], state: tuple[jax.Array, ...] = ()
    ) -> tuple[jax.Array, ...]:
        """Runs `body(*accumulators, *state)` on references that start from these values, and returns the final values. `body` issues products with `multiply`; all of them have ended when this returns."""
        if self.interpret:
            held = [_Held(value) for value in (*accumulators, *state)]
            body(*held)
            return tuple(each.value for each in held)
        return tuple(pl.run_state(lambda refs: body(*refs))((*map(plgpu.ACC.init, accumulators), *state)))

    def zeros(self, body: Callable[..., Any], *shapes: tuple[int, int]) -> Any:
        """What `body` returns, given accumulators of zeros of these shapes."""
        if self.interpret:
            return body(*(_Held(jnp.zeros(shape, jnp.float32)) for shape in shapes))
        return pl.run_scoped(body, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))

    def specialise(
        self, produce: Callable[[], None], consume: Callable[[jax.Array], None], registers: tuple[int, int] = REGISTERS
    ) -> None:
        """Gives each warpgroup its part, `consume(which)` or `produce()`, and each of their lanes so many registers: the producer's, a consumer's."""
        warpgroup, (of_producer, of_consumer) = lax.axis_index("warpgroup"), registers

        @pl.when(warpgroup == PRODUCER)
        def _() -> None:
            plgpu.set_max_registers(of_producer, action="decrease")
            produce()

        @pl.when(warpgroup != PRODUCER)
        def _() -> None:
            plgpu.set_max_registers(of_consumer, action="increase")
            consume(warpgroup)

    def multiply(self, accumulator: Ref, a: Ref, b: Ref, *, transposed: bool = False) -> None:
        """Issues accumulator += a b (a bᵀ where `transposed`), and does not wait. `a` is in shared memory or in registers, `b` in shared memory."""
        if self.interpret:
            a, b = a[...], b[...]
            dimensions = ((1,), (1 if transposed else 0,)), ((), ())
            accumulator.value += lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)
            # wgmma reads as TMA writes, through the asynchronous proxy; these reads were not, and the interpreter would miss a fence.
            plgpu.commit_smem()
        else:
            plgpu.wgmma(accumulator, a, b.transpose((1, 0)) if transposed else b)

    def result(self, accumulator: Ref, *, later: int) -> jax.Array:
        """Its value, once at most the `later` products that were issued last are still under way; products end in the order in which they are issued."""
        return accumulator.value if self.interpret else plgpu.wgmma_accumulator_load(accumulator, wait_n=later)


def interpreter() -> Any:
    """Parameters of the interpreter, which looks for races and fills memory with NaN before it is written.

    Each of its warpgroups keeps a thread of XLA's waiting. On a machine of few cores they may wait for ever, unless the environment variable NPROC asks XLA for more threads (16 will do) before jax starts.
    """
    try:
        params = plgpu.InterpretGPUParams
    except AttributeError:  # Before jax 0.11 it is private.
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams as params
    return params(detect_races=True)
