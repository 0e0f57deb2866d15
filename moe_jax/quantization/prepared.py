"""Four-bit weights in the order in which a kernel's registers take them: made once, where weights are loaded.

A matrix is cut into blocks of 64 rows x 64 columns, each of which lies in memory as a whole, codes and scales. A thread of a
warpgroup loads 16 bytes of codes, four words of eight, and has all that it hands to wgmma: of each of its two rows (`g` and
`g + 8` of the 16 of its warp) the columns ``2t``, ``2t + 1``, ``2t + 8``, ``2t + 9`` of each 16. A pair of neighbouring columns
lies in the lower and the upper half of a word, so both are decoded by the same instructions: a rotation and a mask for each
entry of `Layout.places`, which are such that for bfloat16 eight instructions decode four pairs.

Why not the natural order, two neighbouring columns a byte: a thread's columns are then in four words of a row, and each pair
has to be spread over the halves of a word before it is decoded. The order costs nothing but to be made: codes and scales take
the bytes that they took (a scale of 128 columns those of two of 64), and rows are filled up to a multiple of 64.

What a scale becomes:

- NVFP4: a byte of five bits of exponent and three of fraction, in which every float8_e4m3fn is normal: at its place in a
  16-bit float it is the scale times a power of two. A sign goes to the codes, and the codes of a scale of 0 become 0.
- MXFP4: the exponent of a 16-bit float, relative to the largest of the matrix, whose power of two is then a factor of the
  matrix. What is smaller than 2**-125 of it (float16: 2**-23) becomes 0.
- int4: rounded to 16 bits. A zero point is subtracted before, exactly.

Four scales of a byte are a word, rotated so that a mask leaves the first and the third at their places in two floats, and a
mask after a rotation by a byte the others.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32, UInt32

from moe_jax.quantization.array import QuantizedArray
from moe_jax.quantization.prepared_layout import CODE_LINES, FP8, LANES, SIDE, Layout
from moe_jax.quantization.rounding import scale_to_float32

_FACTOR = 2.0**8  # of NVFP4: a product of code and scale that fits every 16-bit float is this much smaller


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PreparedArray(QuantizedArray):
    """A `QuantizedArray` of four-bit codes in a kernel's order; made by `prepare`. Experts can be indexed, rows cannot be split.

    Attributes:
        values: int32 ``[..., halves * ceil(N / halves / 64), ceil(K / 64), lines, 32]``.
        scales: float32 ``[..., halves]``, a factor of all that stands in a matrix.
        matrix: (N, K) (static).
        row_dtype: that of the rows they are to be multiplied with (static).
    """

    matrix: tuple[int, int] = field(kw_only=True, metadata={"static": True})
    row_dtype: str = field(kw_only=True, metadata={"static": True})

    @property
    def layout(self) -> Layout:
        """Of its blocks."""
        return Layout(self.spec, self.row_dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix that it stands for."""
        return (*self.values.shape[:-4], *self.matrix)

    @property
    def ndim(self) -> int:
        """Number of axes of that."""
        return len(self.shape)

    def validate(self, name: str = "PreparedArray") -> PreparedArray:
        """Itself: `prepare` has checked what it was made of."""
        return self

    @property
    def blocks(self) -> NoReturn:
        """None that could be split."""
        raise ValueError("weights that are prepared for a kernel cannot be split or refined; do that before prepare()")

    def codes(self) -> NoReturn:
        """None: they are in another order."""
        raise ValueError("codes that are prepared for a kernel are in its order; use dequantize()")

    def dequantize(self, dtype: DTypeLike = "float32") -> Float[Array, "*B N K"]:
        """What it stands for, multiplied in float32 and rounded once, to `dtype`."""
        return _dequantize(self, jnp.dtype(dtype).name)


@functools.partial(jax.jit, static_argnames="dtype")
def prepare(weights: QuantizedArray, dtype: DTypeLike = "bfloat16") -> PreparedArray:
    """Four-bit weights in the order in which the kernels decode them, for rows of `dtype`.

    While it runs, what is prepared at one time takes about ten times its memory: `prepare_experts` does one expert at a time.

    Args:
        weights: ``[E, N, K]``, NVFP4, MXFP4 or int4 in groups; what is prepared already for that dtype is returned as it is.
        dtype: bfloat16 or float16; NVFP4 and MXFP4 also float8_e4m3fn, to which they are then rounded: see
            `moe_jax.quantization.fp8_blocks`.

    Raises:
        ValueError: a format that has no such order.

    Example:
        >>> from moe_jax.quantization import quant_format, quantize
        >>> natural = quantize(jnp.ones((2, 64, 128)), quant_format("nvfp4").weights)
        >>> prepared = prepare(natural)
        >>> prepared.values.shape, bool((prepared.dequantize() == natural.dequantize()).all())
        ((2, 1, 2, 18, 32), True)
    """
    name = jnp.dtype(dtype).name
    if name == FP8:
        from moe_jax.quantization.prepared_fp8 import prepare_fp8

        return prepare_fp8(weights)
    if isinstance(weights, PreparedArray):
        if weights.row_dtype != name:
            raise ValueError(
                f"weights are prepared for rows of {weights.row_dtype}, not {name}; prepare the original ones"
            )
        return weights
    layout, (rows, columns) = Layout(weights.spec, name), weights.shape[-2:]
    batch, halves = weights.shape[:-2], weights.halves
    codes = weights.codes().astype(jnp.uint32)
    scales = weights.scales
    factor = jnp.ones((*batch, halves), jnp.float32)
    if layout.is_float:
        # A matrix is a gate or an up half.
        split = scales.reshape(*batch, halves, rows // halves, -1)
        bits, signs, zero, factor = (_nvfp4_scales if weights.spec.has_global_scale else _mxfp4_scales)(split, layout)
        bits, signs, zero = (x.reshape(scales.shape) for x in (bits, signs, zero))
        of_code = functools.partial(jnp.repeat, repeats=weights.spec.block[1], axis=-1, total_repeat_length=None)
        codes = codes ^ (of_code(signs)[..., :columns].astype(jnp.uint32) << 3)
        codes = jnp.where(of_code(zero)[..., :columns], 0, codes)
        if weights.global_scale is not None:
            factor = factor * weights.global_scale.reshape(*batch, halves)
    else:
        bits = _bits(scale_to_float32(scales).astype(name))
    parts = [_code_words(_padded(codes, halves), layout), _scale_words(bits, halves, columns, layout)]
    if weights.zero_points is not None:
        magic = -(2.0 ** (layout.fraction_bits)) - weights.zero_points.astype(jnp.float32)
        parts.append(_scale_words(_bits(magic.astype(name)), halves, columns, layout))
    words = jnp.concatenate(parts, axis=-1)
    values = words.reshape(*words.shape[:-1], *layout.shape).view(jnp.int32)
    return PreparedArray(values, factor, spec=weights.spec, halves=halves, matrix=(rows, columns), row_dtype=name)


def _bits(x: Array) -> UInt32[Array, "..."]:
    return x.view(jnp.uint16).astype(jnp.uint32)


def _padded(x: Array, halves: int) -> Array:
    """With whole blocks of rows in each half, and of columns, filled up with zeros."""
    *batch, rows, columns = x.shape
    x = x.reshape(*batch, halves, rows // halves, columns)
    fill = [(0, 0)] * (x.ndim - 2) + [(0, -(rows // halves) % SIDE), (0, -columns % SIDE)]
    x = jnp.pad(x, fill)
    return x.reshape(*batch, halves * x.shape[-2], x.shape[-1])


def _nvfp4_scales(scales: Array, layout: Layout) -> tuple[Array, Array, Array, Array]:
    """Bytes of scales float8_e4m3fn ``[..., halves, rows, groups]``, which are negative, which zero, and the factor."""
    byte = scales.view(jnp.uint8).astype(jnp.uint32)
    exponent, fraction = (byte >> 3) & 15, byte & 7
    top = (fraction > 1).astype(jnp.uint32) + (fraction > 3)  # the position of its highest bit
    small = ((top + 12) << 3) | ((fraction << (3 - top)) & 7)
    bits = jnp.where(exponent == 0, small, ((exponent + 14) << 3) | fraction)
    bits = jnp.where((byte & 127) == 127, 255, bits)  # NaN
    return bits, byte >> 7, (byte & 127) == 0, jnp.full(scales.shape[:-2], _FACTOR, jnp.float32)


def _mxfp4_scales(scales: Array, layout: Layout) -> tuple[Array, Array, Array, Array]:
    """The same of scales float8_e8m0fnu: exponents below the largest of a matrix."""
    byte = scales.view(jnp.uint8).astype(jnp.int32)
    largest = jnp.max(jnp.where(byte == 255, 1, byte), axis=(-2, -1), keepdims=True).clip(1)
    top, least, nan = _exponents(layout)
    exponent = byte - largest + top
    bits = jnp.where(byte == 255, nan, exponent.clip(least))
    factor = jax.lax.bitcast_convert_type(largest[..., 0, 0].astype(jnp.uint32) << 23, jnp.float32)
    return bits.astype(jnp.uint32), jnp.zeros_like(bits), (exponent < least) & (byte != 255), factor


def _exponents(layout: Layout) -> tuple[int, int, int]:
    """Exponents of a float: of the largest scale, which takes back the power of two in a code; of the least; of NaN."""
    return (253, 128, 255) if layout.dtype == "bfloat16" else (29, 6, 31)


def _code_words(codes: UInt32[Array, "*B N K"], layout: Layout) -> UInt32[Array, "*B n k 512"]:
    """Rows and columns to blocks, warps and threads."""
    *batch, rows, columns = codes.shape
    # Rows: warp, row of its two, g. Columns: 32 each, 16 each, 8 each, thread t, the two of a pair.
    x = codes.reshape(*batch, rows // SIDE, 4, 2, 8, columns // SIDE, 2, 2, 2, 4, 2)
    x = _moved(x, len(batch), (0, 4, 1, 3, 8, 2, 5, 6, 7, 9))
    x = layout.pattern(x).reshape(*x.shape[:-3], 4, 2)
    pairs = x[..., 0] | (x[..., 1] << 16)
    words = jnp.zeros(pairs.shape[:-1], jnp.uint32)
    for pair, terms in enumerate(layout.places):
        for term in terms:
            words = words | rotated(pairs[..., pair] & _both(term.mask), -term.left)
    return words.reshape(*batch, rows // SIDE, columns // SIDE, -1)


def _scale_words(bits: UInt32[Array, "*B N groups"], halves: int, columns: int, layout: Layout) -> Array:
    """Scales of each block, as the threads of a row have them."""
    per, size = SIDE // layout.scale_columns, layout.spec.block[1]
    blocks = -(-columns // SIDE)
    at = np.minimum(np.arange(blocks * per) * layout.scale_columns // size, bits.shape[-1] - 1)
    x = _padded(bits[..., at], halves)[..., : blocks * per]
    *batch, rows, _ = x.shape
    x = x.reshape(*batch, rows // SIDE, 4, 2, 8, blocks, per)
    x = _moved(x, len(batch), (0, 4, 1, 3, 2, 5))
    in_word = 32 // layout.scale_bits
    x = x.reshape(*x.shape[:-2], layout.scale_words, in_word)
    words = sum(x[..., i] << (i * layout.scale_bits) for i in range(in_word))
    words = rotated(words, layout.scale_left)
    return words.reshape(*batch, rows // SIDE, blocks, -1)


def _moved(x: Array, batch: int, order: tuple[int, ...]) -> Array:
    return x.transpose(*range(batch), *(batch + axis for axis in order))


def _both(mask: int) -> np.uint32:
    return np.uint32(mask * 0x10001)


def rotated(word: UInt32[Array, "*S"], left: int) -> UInt32[Array, "*S"]:
    """Words rotated to the left."""
    left %= 32
    return word if left == 0 else (word << left) | (word >> (32 - left))


def decoded(blocks: Int32[Array, "*B lines 32"], layout: Layout) -> Float[Array, "*B 64 64"]:
    """What blocks stand for, without the factor of their matrix: products of two 16-bit floats, in float32."""
    batch = blocks.shape[:-2]
    words = blocks.reshape(*batch, -1)
    words = jax.lax.bitcast_convert_type(words, jnp.uint32)
    codes, scales = words[..., : CODE_LINES * LANES], words[..., CODE_LINES * LANES :]
    pairs = jnp.stack([sum(rotated(codes, t.left) & _both(t.mask) for t in terms) for terms in layout.places], -1)
    x = jnp.stack([pairs & 0xFFFF, pairs >> 16], -1)
    if layout.is_float:
        x = _small_value((x >> (layout.fraction_bits - 1)) & 7) * (1.0 - 2.0 * (x >> 15).astype(jnp.float32))
    else:
        x = x.astype(jnp.float32)
    x = x.reshape(*batch, 4, 8, 4, 2, 2, 2, 2, 2)  # warp, g, t, row, 32, 16, 8 columns, pair
    x = _moved(x, len(batch), (0, 3, 1, 4, 5, 6, 2, 7)).reshape(*batch, SIDE, SIDE)
    half = 32 * layout.scale_words
    if not layout.is_float:
        zeros = 8.0
        if layout.spec.asymmetric:
            zeros = -_spread(scales[..., half:], layout, _as_16_bits) - 2.0**layout.fraction_bits
        x = x - zeros
    values = {True: _small_scale, False: _as_16_bits}[layout.is_float]
    return x * _spread(scales[..., :half], layout, values)


def _small_value(magnitude: UInt32[Array, "*S"]) -> Float[Array, "*S"]:
    """What a float4_e2m1fn magnitude, 0 to 7, stands for; without a table, which no kernel may hold."""
    twice = (2 + (magnitude & 1)) << ((magnitude >> 1).clip(1) - 1)
    return jnp.where(magnitude < 2, magnitude, twice).astype(jnp.float32) * 0.5


def _spread(words: UInt32[Array, "*B words"], layout: Layout, value: Any) -> Float[Array, "*B 64 64"]:
    """Scales of blocks, each as often as it has columns."""
    batch, in_word, per = words.shape[:-1], 32 // layout.scale_bits, SIDE // layout.scale_columns
    mask, words = (1 << layout.scale_bits) - 1, rotated(words, -layout.scale_left)
    x = jnp.stack([(words >> (i * layout.scale_bits)) & mask for i in range(in_word)], -1)
    x = _moved(value(x, layout).reshape(*batch, 4, 8, 2, per), len(batch), (0, 2, 1, 3)).reshape(*batch, SIDE, per)
    return jnp.repeat(x, layout.scale_columns, axis=-1)


def _as_16_bits(x: UInt32[Array, "..."], layout: Layout) -> Float[Array, "..."]:
    return jax.lax.bitcast_convert_type(x.astype(jnp.uint16), jnp.dtype(layout.dtype)).astype(jnp.float32)


def _small_scale(bits: UInt32[Array, "..."], layout: Layout) -> Float[Array, "..."]:
    """Of float4_e2m1fn: an NVFP4 scale by `_FACTOR` smaller, or a power of two relative to the largest."""
    if layout.spec.has_global_scale:
        value = jax.lax.bitcast_convert_type((bits << 20) + ((127 - 21 - 8) << 23), jnp.float32)
        return jnp.where(bits == 255, jnp.nan, value)
    top, least, nan = _exponents(layout)
    power = jax.lax.bitcast_convert_type((bits.clip(least) + 127 - top) << 23, jnp.float32)
    return jnp.where(bits == nan, jnp.nan, power)


@functools.partial(jax.jit, static_argnames="dtype")
def _dequantize(array: PreparedArray, dtype: str) -> Array:
    (rows, columns), halves, batch = array.matrix, array.halves, array.shape[:-2]
    x = decoded(array.values, array.layout)
    x = jnp.swapaxes(x, -3, -2).reshape(*batch, halves, -1, array.values.shape[-3] * SIDE)
    x = x[..., : rows // halves, :columns] * array.scales[..., None, None]
    return x.reshape(*batch, rows, columns).astype(dtype)
