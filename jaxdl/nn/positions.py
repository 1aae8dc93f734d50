"""Position encodings: vectors to add (sinusoidal, learned), rotations of queries and keys (rotary), and biases of the logits (ALiBi, relative tables).

A bias has the shape `#B N T S` that an attention takes as `bias=`. Frequencies are computed in float64; they and the tables of them are kept in float32, or in float64 where jax has it on.
"""

import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxdl.errors import UserError
from jaxdl.nn.masks import Places, places


def sinusoidal(length: int, width: int, base: float = 10_000.0, *, interleaved: bool = True) -> Float[Array, "T D"]:
    """`PE[t, 2i] = sin(t / base^(2i/D))` and `PE[t, 2i + 1]` its cosine (Vaswani et al. 2017, section 3.5).

    Without `interleaved` all sines come before all cosines, as in tensor2tensor and HF's Marian: a permutation of features, which matters for published weights only. Raises `UserError` if the width is odd.
    """
    angles = jnp.arange(length, dtype=float)[:, None] * rotary_frequencies(width, base)
    if interleaved:
        return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(length, width)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def sinusoidal_2d(
    height: int, width: int, features: int, base: float = 10_000.0, *, endpoint: bool = False
) -> Float[Array, "T D"]:
    """Sines and cosines of the column, then of the row, a quarter of the features each; places row by row, `T = height · width`.

    The exponents `e` of the frequencies `base^−e` divide 0 … 1 into `features/4` steps: without 1 in MoCo v3 (Chen et al. 2021, section 4) and MAE, and with it (`endpoint`) in big_vision and SimpleViT. The column is first in MAE's code and in big_vision; MoCo v3's own code and HF's MAE have the row first, so exchange the halves to use their frozen weights. Raises `UserError` if the features are no multiple of 4.
    """
    if features % 4:
        raise UserError(f"{features} features cannot be split into sine and cosine of two axes: choose a multiple of 4")
    frequencies = jnp.asarray(base ** -np.linspace(0, 1, features // 4, endpoint=endpoint))
    row, column = (axis.reshape(-1, 1) * frequencies for axis in jnp.mgrid[:height, :width])
    return jnp.concatenate([jnp.sin(column), jnp.cos(column), jnp.sin(row), jnp.cos(row)], axis=-1)


class LearnedPositions(nn.Module):
    """Adds a learned vector to each position. There are `length` of them, or as many as the sequence at initialisation has, which all others must then have too.

    The sum has the wider of both types: a residual stream that begins here is in float32 even if what is added to it is computed in bfloat16. One in bfloat16 costs SigLIP a tenth of its recall@1 (`experiments/siglip.py`, 0.64 and not 0.75).
    """

    length: int | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], positions: Int[Array, "#B T"] | None = None) -> Float[Array, "B T D"]:
        """Positions are 0, 1, 2 … unless given, as in decoding; one beyond the table gives NaN, and one below 0 is that of padding. Raises `UserError` for a sequence longer than `length`."""
        _, count, width = x.shape
        length = self.length or count
        if positions is not None and self.has_variable("params", "table"):
            length = len(self.get_variable("params", "table"))
        table = self.param("table", nn.initializers.normal(width**-0.5), (length, width), self.param_dtype)
        if positions is not None:
            return x + table.at[jnp.maximum(positions, 0)].get(mode="fill", fill_value=jnp.nan)
        if count > length:
            raise UserError(f"{count} tokens are more than the {length} positions that there are: give fewer")
        return x + table[:count]


def interpolate_positions(table: Float[Array, "T D"], grid: tuple[int, int], new_grid: tuple[int, int]) -> Float[Array, "S D"]:
    """A table of learned vectors for the places of a grid (rows, columns), row by row, made into one for another grid: images of another size, or with other patches (Dosovitskiy et al. 2021, section 3.2).

    Rows of the table before those of the grid, such as that of a class token, are kept. Bicubic as torch has it without `align_corners`, and with it DeiT, DINO and HF: images cover the same area, beyond the border its nearest place is repeated, and nothing is smoothed where the grid shrinks. The kernel is that of Keys 1981 (eq. 4) with −3/4 for its −1/2, which `jax.image.resize` has. Raises `UserError` if the table has fewer rows than the grid has places.
    """
    (height, width), count = grid, math.prod(grid)
    if len(table) < count:
        raise UserError(
            f"{len(table)} positions are fewer than the {height}×{width} places of the grid: give the grid they are of"
        )
    first, places = table[: len(table) - count], table[len(table) - count :].reshape(height, width, -1)
    down, across = (jnp.asarray(_bicubic(*sides), table.dtype) for sides in zip(grid, new_grid))
    moved = jnp.einsum("rh,cw,hwd->rcd", down, across, places, precision="highest")
    return jnp.concatenate([first, moved.reshape(-1, table.shape[-1])])


def _bicubic(old: int, new: int) -> np.ndarray:
    """How much each of `old` places adds to each of `new` ones, which are as far apart as cover the same length."""
    places = (np.arange(new) + 0.5) * old / new - 0.5
    weights, a = np.zeros((new, old)), -0.75
    for offset in (-1, 0, 1, 2):
        neighbours = np.floor(places).astype(int) + offset
        distance = np.abs(places - neighbours)
        near = (a + 2) * distance**3 - (a + 3) * distance**2 + 1
        far = a * (distance**3 - 5 * distance**2 + 8 * distance - 4)
        np.add.at(weights, (np.arange(new), np.clip(neighbours, 0, old - 1)), np.where(distance <= 1, near, far))
    return weights


def rope(
    x: Float[Array, "*batch T N H"],
    positions: Int[Array, "*#batch T"],
    frequencies: Float[Array, "F"] | None = None,
    *,
    interleaved: bool = False,
    magnitude: float = 1.0,
) -> Float[Array, "*batch T N H"]:
    """Turns the i-th pair of features by `position · frequencies[i]` (Su et al. 2021, eq. 34), so that ⟨rope(q, m), rope(k, n)⟩ depends on `m − n` alone.

    The pairs are `(i, i + F)`, as in GPT-NeoX, Llama and Gemma, or neighbours `(2i, 2i + 1)` with `interleaved`, as in the paper, GPT-J and Meta's own Llama files: the two differ by a permutation of the rows of the query and key projections, and mixing them up is silent. `frequencies` is that of `rotary_frequencies(H)` where left out; with fewer than `H/2`, the features beyond `2F` pass unturned (partial rotary, as GPT-J's 64 of 256). `magnitude` multiplies what is turned, for YaRN.

    Angles and products are in float32 (or wider): in bfloat16 a position beyond 256 is not even a number. Raises `UserError` if the head is odd or narrower than `2F`.
    """
    frequencies = rotary_frequencies(x.shape[-1]) if frequencies is None else frequencies
    turned = 2 * len(frequencies)
    if turned > x.shape[-1]:
        raise UserError(f"{len(frequencies)} frequencies turn {turned} features, more than a head of {x.shape[-1]} has")
    angles = positions[..., None].astype(frequencies.dtype) * frequencies
    cos, sin = magnitude * jnp.cos(angles), magnitude * jnp.sin(angles)
    # As wide as what is turned: of tables half as wide, XLA's CPU works out every entry again for each head.
    cos, sin = (jnp.concatenate(halves, -1)[..., None, :] for halves in ((cos, cos), (-sin, sin)))

    def exchange(x: Array, rows: int) -> Array:
        """Features as a matrix with so many rows, transposed."""
        return jnp.swapaxes(x.reshape(*x.shape[:-1], rows, -1), -1, -2).reshape(x.shape)

    wide = x[..., :turned].astype(jnp.promote_types(x.dtype, jnp.float32))
    wide = exchange(wide, turned // 2) if interleaved else wide
    wide = wide * cos + jnp.roll(wide, turned // 2, axis=-1) * sin
    wide = exchange(wide, 2) if interleaved else wide
    return jnp.concatenate([wide.astype(x.dtype), x[..., turned:]], axis=-1)


def _frequencies(width: int, base: float) -> np.ndarray:
    if width % 2:
        raise UserError(f"{width} features cannot be paired: choose an even number")
    return base ** -(np.arange(0, width, 2) / width)


def rotary_frequencies(width: int, base: float = 10_000.0) -> Float[Array, "F"]:
    """`base^(−2i/width)` for `i = 0 … width/2 − 1`, in radians per position (Su et al. 2021, section 3.2.2).

    Llama 2 has the default base, Llama 3 500,000. Raises `UserError` if the width is odd. A context longer than that of training needs one of
    - linear interpolation (Chen et al. 2023, eq. 4): `rotary_frequencies(width) / factor`, which squeezes all positions into the known range;
    - `ntk_frequencies`, `yarn_frequencies`.
    """
    return jnp.asarray(_frequencies(width, base))


def ntk_frequencies(
    width: int, factor: float, base: float = 10_000.0, *, length: int | None = None, original_length: int | None = None
) -> Float[Array, "F"]:
    """NTK-aware scaling: a base of `base · factor^(width/(width − 2))` divides the lowest frequency by `factor` and keeps the highest (bloc97 2023; Peng et al. 2023, section 3.1).

    With `length` and `original_length` it is the dynamic form: `factor` becomes `factor · length/original_length − (factor − 1)`, 1 up to the original length (ibid., section 3.3; HF's `dynamic`). Keys that were cached with another `length` were turned otherwise. Raises `UserError` if just one of the two is given.
    """
    if (length is None) != (original_length is None):
        raise UserError("dynamic NTK scaling needs both `length` and `original_length`: give both, or neither for a fixed factor")
    if length is not None and original_length is not None:
        factor = factor * max(length, original_length) / original_length - (factor - 1)
    # Two features have one frequency, the highest, which is kept.
    return rotary_frequencies(width, base * factor ** (width / (width - 2)) if width > 2 else base)


def yarn_frequencies(
    width: int,
    factor: float,
    original_length: int,
    base: float = 10_000.0,
    *,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
) -> Float[Array, "F"]:
    """YaRN (Peng et al. 2023, eq. 17 to 20): frequencies that turn more than `beta_fast` times within the original length stay, those below `beta_slow` times are divided by `factor`, and those between by a linear ramp over `i`.

    The limits of the ramp are rounded outwards, as in the authors' code and HF; gpt-oss does not (`truncate=False`). Multiply the vectors by `yarn_magnitude(factor)` too: `rope(..., magnitude=yarn_magnitude(factor))`.
    """
    plain = _frequencies(width, base)

    def index(turns: float) -> float:
        """Where, as a real number, the frequency turns so often within the original length."""
        return width * math.log(original_length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = index(beta_fast), index(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = np.clip((np.arange(len(plain)) - low) / (high - low or 1e-3), 0, 1)  # 1e-3 is the authors'.
    return jnp.asarray(plain * (1 - ramp) + plain / factor * ramp)


def yarn_magnitude(factor: float, coefficient: float = 1.0) -> float:
    """`0.1 · coefficient · ln(factor) + 1`, and 1 where nothing is stretched: `√(1/t)` of Peng et al. 2023, eq. 22.

    It makes the softmax sharper as the context grows. DeepSeek (its `mscale`, `mscale_all_dim`) takes the quotient of two of these with different coefficients.
    """
    return 0.1 * coefficient * math.log(factor) + 1 if factor > 1 else 1.0


def alibi_slopes(num_heads: int) -> Float[Array, "N"]:
    """`2^(−8i/N)` for `i = 1 … N` where N is a power of two (Press et al. 2022, section 3).

    For other N, as in the authors' code: the slopes of the next lower power of two, then every other one of the next higher, from its first. BLOOM and MPT both have these.
    """

    def powers(count: int) -> np.ndarray:
        return 2.0 ** (-8 * np.arange(1, count + 1) / count)

    lower = 2 ** (num_heads.bit_length() - 1)
    return jnp.asarray(np.concatenate([powers(lower), powers(2 * lower)[::2]])[:num_heads])


def _distances(queries: Places, keys: Places) -> Int[Array, "#B T S"]:
    """Position of the key minus that of the query. Of two numbers, the last query stands at the last key."""
    query = places(queries) if np.ndim(queries) or np.ndim(keys) else places(queries) + keys - queries
    return places(keys)[:, None, :] - query[:, :, None]


def alibi_bias(num_heads: int, queries: Places, keys: Places) -> Float[Array, "#B N T S"]:
    """`−slope · |i − j|` (Press et al. 2022, section 3, where a causal mask hides `j > i`).

    Queries and keys are given by their positions, as those of a `Cache` are, or by their numbers: the last query then stands at the last key. BLOOM and MPT write `slope · j` instead: a constant more for each query, which the softmax forgets.
    """
    return -alibi_slopes(num_heads)[:, None, None] * jnp.abs(_distances(queries, keys))[:, None]


def relative_buckets(
    distances: Int[Array, "*shape"], num_buckets: int = 32, max_distance: int = 128, *, bidirectional: bool = True
) -> Int[Array, "*shape"]:
    """The bucket of a distance, key minus query (Raffel et al. 2020, section 2.1): one each for the near ones, logarithmically wider for the far ones, one for all from `max_distance` on.

    `bidirectional` gives the second half of the buckets to keys after the query (encoders); without, all keys after the query share bucket 0 with the query itself (decoders). The limits are found with integers: a logarithm in float32 falls on either side of them, depending on the device.
    """
    offset = jnp.zeros_like(distances)
    if bidirectional:
        num_buckets //= 2
        offset = jnp.where(distances > 0, num_buckets, 0)
        distances = jnp.abs(distances)
    else:
        distances = jnp.maximum(-distances, 0)
    near = num_buckets // 2
    far = num_buckets - near
    # Far bucket k begins at near · (max_distance/near)^(k/far): at the least d with d^far ≥ max_distance^k · near^(far − k).
    bounds = [max_distance**k * near ** (far - k) for k in range(far)]
    buckets = [d if d < near else near - 1 + sum(d**far >= bound for bound in bounds) for d in range(max_distance + 1)]
    return offset + jnp.asarray(buckets, offset.dtype)[jnp.minimum(distances, max_distance)]


class RelativePositionBias(nn.Module):
    """T5's bias: a learned number for each bucket of distance and each head. T5 shares one of these among all layers of a stack.

    It starts as in t5x (a uniform distribution by both fans). With it T5 leaves out the `1/√H` of attention.
    """

    num_heads: int
    num_buckets: int = 32
    max_distance: int = 128
    bidirectional: bool = True
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, queries: Places, keys: Places) -> Float[Array, "#B N T S"]:
        """For queries and keys as `alibi_bias` takes them."""
        init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
        table = self.param("table", init, (self.num_buckets, self.num_heads), self.param_dtype)
        buckets = relative_buckets(
            _distances(queries, keys), self.num_buckets, self.max_distance, bidirectional=self.bidirectional
        )
        return table[buckets].transpose(0, 3, 1, 2)


def window_offsets(height: int, width: int) -> Int[Array, "T T"]:
    """For two places of a window, row by row, the row of the table of `(2·height − 1) · (2·width − 1)` offsets, query minus key (Liu et al. 2021, section 3.2)."""
    rows, columns = np.divmod(np.arange(height * width), width)
    down = rows[:, None] - rows + height - 1
    right = columns[:, None] - columns + width - 1
    return jnp.asarray(down * (2 * width - 1) + right)


class WindowPositionBias(nn.Module):
    """Swin's bias: a learned number for each offset within a window of `height × width` and each head (Liu et al. 2021, eq. 4).

    It starts from a normal distribution of deviation 0.02, cut at two deviations, as in the authors' code.
    """

    num_heads: int
    window: tuple[int, int]
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self) -> Float[Array, "1 N T T"]:
        """`T = height · width`, the places of the window row by row."""
        height, width = self.window
        shape = ((2 * height - 1) * (2 * width - 1), self.num_heads)
        table = self.param("table", nn.initializers.truncated_normal(0.02), shape, self.param_dtype)
        return table[window_offsets(height, width)].transpose(2, 0, 1)[None]
