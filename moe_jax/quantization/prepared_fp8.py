"""Weights of four-bit floats as FP8: what ``nvfp4_fp8`` and ``mxfp4_fp8`` multiply with rows of float8_e4m3fn, and its order.

A tensor core adds up products of 8-bit floats 32 columns at a time, and 16 or 32 columns share a scale: so the scale goes into
the code. `fp8_blocks` is what these formats mean: the product of a code and its scale is rounded to float8_e4m3fn, of which 128
rows x 128 columns share a factor in float32, a power of two times the global scale.

- MXFP4: a product has two significant bits and is exact.
- NVFP4: a code has up to two and a scale up to four. A product is rounded to four, ties to even: those of codes 1.5, 3 and 6 with
  five of eight fractions of a scale, by up to 4.8 %. Weights of NVFP4 are then off by 9.7 % in the place of 9.5 %, Gaussian ones
  (benchmarks/results/2026-11-27-cpu-quantization-error.json).
- A scale below 2**-10 of the largest power of two among the scales of its block: its products become the nearest of the codes'
  values times 2**-10 of that. They are off by less than 2**-10 of it (MXFP4: 2**-12), where the largest weights are 4 or 6 times
  as much as it.

`prepare_fp8` keeps four bits, in the order in which a kernel makes the same FP8 of them (`moe_jax.kernels.hopper.fp8_from_four`):
blocks of 64 rows x 128 columns, each of which lies in memory as a whole. A thread has 64 columns of a row, four words of eight
codes for each 32. A scale is the byte of its product with 0.5. The bytes of the others lie at fixed distances from it, but for
those of 1.5, 3 and 6, which for five of eight fractions lie one further, as its highest bit says.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Int32, UInt8

from moe_jax.quantization.array import QuantizedArray
from moe_jax.quantization.formats import Spec
from moe_jax.quantization.fp4 import fp4_code, fp4_value
from moe_jax.quantization.prepared import PreparedArray
from moe_jax.quantization.prepared_layout import LANES
from moe_jax.quantization.rounding import scale_to_float32, to_fp8

ROWS, COLUMNS = 64, 128  # of a block of codes
SIDE = 128  # rows and columns that share a factor
CODE_LINES = 32  # lines of codes in a block of them; those of scales follow
BLOCKS = Spec("float8_e4m3fn", "block", (SIDE, SIDE))
_OCTAVES = 10  # between a block's largest scale and the least
_LEAST = 2.0**-_OCTAVES
_TOP = 5  # a block's largest scale, 1 to 2, is FP8 from 32 to 64: its product with 6 is at most 352
_LEAST_POWER = -100  # of a block's largest scale: its factor is a normal float
_NAN_BYTE, _NAN_CODE = 99, 7  # of which the kernel makes NaN: 99 + 28 = 127


def fp8_blocks(weights: QuantizedArray) -> QuantizedArray:
    """NVFP4 or MXFP4 as FP8 with a scale for each 128 x 128: what is multiplied with rows of float8_e4m3fn.

    Args:
        weights: ``[..., N, K]``, or what `prepare_fp8` made of them: both give the same bits.

    Raises:
        ValueError: weights of another format, or prepared for rows of another dtype.

    Example:
        >>> from moe_jax.quantization import quant_format, quantize
        >>> w = quantize(jnp.array([[[4.5] * 32 + [-0.25] * 32]]), quant_format("mxfp4").weights)
        >>> fp8_blocks(w).dequantize()[0, 0, ::32].tolist(), w.dequantize()[0, 0, ::32].tolist()
        ([4.0, -0.25], [4.0, -0.25])
    """
    if isinstance(weights, PreparedFp8):
        return _unprepared(weights)
    _check(weights)
    return _fp8_blocks(weights)


def _check(weights: QuantizedArray) -> None:
    if weights.spec.dtype != "float4_e2m1fn" or isinstance(weights, PreparedArray):
        prepared = isinstance(weights, PreparedArray)
        what = f"weights prepared for rows of {weights.row_dtype}" if prepared else f"weights of {weights.spec}"
        raise ValueError(f"{what} do not become FP8; give NVFP4 or MXFP4 as quantize() makes them")


@functools.partial(jax.jit)
def _fp8_blocks(weights: QuantizedArray) -> QuantizedArray:
    codes, scales, powers = _relative(weights)
    size = weights.spec.block[1]
    values = to_fp8(fp4_value(codes) * _of_codes(scales, size, codes.shape[-1]) * 2.0**_TOP)
    return QuantizedArray(values, _factors(weights, powers), spec=BLOCKS, halves=weights.halves)


def _of_codes(scales: Array, size: int, columns: int) -> Array:
    return jnp.repeat(scales, size, axis=-1)[..., :columns]


def _factors(weights: QuantizedArray, powers: Int[Array, "*B halves n k"]) -> Float[Array, "*B blocks k"]:
    """Of blocks, with the global scale."""
    factors = lax.bitcast_convert_type((powers - _TOP + 127) << 23, jnp.float32)
    if weights.global_scale is not None:
        factors = factors * scale_to_float32(weights.global_scale).reshape(*powers.shape[:-2], 1, 1)
    return factors.reshape(*powers.shape[:-3], -1, powers.shape[-1])


def _relative(weights: QuantizedArray) -> tuple[UInt8[Array, "*B N K"], Float[Array, "*B N groups"], Array]:
    """Codes, scales from 2**-10 to 2 (or NaN) relative to a power of two for each block, and its exponent."""
    batch, (rows, columns), size = weights.shape[:-2], weights.shape[-2:], weights.spec.block[1]
    given, codes, halves = scale_to_float32(weights.scales), weights.codes(), weights.halves
    scales, per = jnp.abs(given), SIDE // size
    blocks = jnp.where(jnp.isnan(scales), 0, scales).reshape(*batch, halves, rows // halves, -1)
    fill = [(0, 0)] * (len(batch) + 1) + [(0, -(rows // halves) % SIDE), (0, -blocks.shape[-1] % per)]
    blocks = jnp.pad(blocks, fill).reshape(*batch, halves, -(-rows // halves // SIDE), SIDE, -(-columns // SIDE), per)
    powers = jnp.maximum(_exponent(jnp.max(blocks, axis=(-3, -1))), _LEAST_POWER)
    mine = jnp.repeat(jnp.repeat(powers, SIDE, axis=-2)[..., : rows // halves, :], per, axis=-1)
    exponent = _exponent(scales) - mine.reshape(*batch, rows, -1)[..., : scales.shape[-1]] + 127
    fraction = lax.bitcast_convert_type(scales, jnp.int32) & 0x7FFFFF
    scales = jnp.where(
        jnp.isnan(scales), jnp.nan, lax.bitcast_convert_type((exponent.clip(0) << 23) | fraction, jnp.float32)
    )
    scales = jnp.where((exponent > 0) | jnp.isnan(scales), scales, 0)
    below = scales < _LEAST
    codes = codes ^ (_of_codes(jnp.signbit(given), size, columns).astype(jnp.uint8) << 3)
    nearest = fp4_code(fp4_value(codes) * _of_codes(jnp.where(below, scales, 0) / _LEAST, size, columns))
    codes = jnp.where(_of_codes(below, size, columns), nearest, codes)
    return codes, jnp.where(below, _LEAST, scales), powers


def _exponent(x: Float[Array, "*S"]) -> Int[Array, "*S"]:
    """Of floats that are not negative; of zero less than all."""
    return (lax.bitcast_convert_type(x, jnp.int32) >> 23) - 127


@dataclass(frozen=True)
class Fp8Layout:
    """How blocks of codes are laid out that become FP8.

    Attributes:
        spec: of the codes, NVFP4 or MXFP4.

    Example:
        >>> Fp8Layout(Spec("float4_e2m1fn", "group", 32, "float8_e8m0fnu")).shape
        (34, 32)
    """

    spec: Spec

    @property
    def has_fractions(self) -> bool:
        """Scales are no powers of two."""
        return self.spec.has_global_scale

    @property
    def scales_of_row(self) -> int:
        """Scales, a byte each, of the 128 columns of a row."""
        return COLUMNS // self.spec.block[1]

    @property
    def shape(self) -> tuple[int, int]:
        """Of a block, in words of 32 bits."""
        return CODE_LINES + ROWS * self.scales_of_row // 4 // LANES, LANES


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PreparedFp8(PreparedArray):
    """A `QuantizedArray` of four-bit floats in the order of a kernel that makes FP8 of them; made by `prepare_fp8`.

    Attributes:
        values: int32 ``[..., halves * ceil(N / halves / 64), ceil(K / 128), lines, 32]``.
        scales: float32 ``[..., halves * ceil(N / halves / 128), ceil(K / 128)]``, those of `fp8_blocks`.
        matrix: (N, K) (static).
        row_dtype: ``float8_e4m3fn`` (static).
    """

    @property
    def layout(self) -> Fp8Layout:
        """Of its blocks."""
        return Fp8Layout(self.spec)

    def dequantize(self, dtype: DTypeLike = "float32") -> Float[Array, "*B N K"]:
        """What its FP8 stand for, multiplied in float32 and rounded once, to `dtype`."""
        return fp8_blocks(self).dequantize(dtype)


@jax.jit
def prepare_fp8(weights: QuantizedArray) -> PreparedFp8:
    """NVFP4 or MXFP4 in the order in which a kernel makes `fp8_blocks` of it.

    Args:
        weights: ``[E, N, K]``; what is prepared already is returned as it is.

    Raises:
        ValueError: weights of another format, or prepared for rows of another dtype.

    Example:
        >>> from moe_jax.quantization import quant_format, quantize
        >>> natural = quantize(jnp.ones((2, 64, 128)), quant_format("nvfp4").weights)
        >>> prepared = prepare_fp8(natural)
        >>> prepared.values.shape, bool((prepared.dequantize() == fp8_blocks(natural).dequantize()).all())
        ((2, 1, 1, 36, 32), True)
    """
    if isinstance(weights, PreparedFp8):
        return weights
    _check(weights)
    codes, scales, powers = _relative(weights)
    size, columns = weights.spec.block[1], codes.shape[-1]
    bits = lax.bitcast_convert_type(scales, jnp.int32)
    byte = ((bits >> 20) - (127 << 3) + ((_OCTAVES + 1) << 3)) & 127
    byte = byte | (((byte & 7) - 1).astype(jnp.uint32) < 5).astype(jnp.int32) << 7
    nan = jnp.isnan(scales)
    codes = jnp.where(_of_codes(nan, size, columns), codes & 8 | _NAN_CODE, codes).astype(jnp.uint32)
    blocks = _padded(codes, weights.halves, COLUMNS)
    of_scales = _padded(jnp.where(nan, _NAN_BYTE, byte).astype(jnp.uint32), weights.halves, COLUMNS // size)
    words = jnp.concatenate([_code_words(blocks), _scale_words(of_scales)], axis=-1)
    values = words.reshape(*words.shape[:-1], -1, LANES).view(jnp.int32)
    more = dict(halves=weights.halves, matrix=weights.shape[-2:], row_dtype="float8_e4m3fn")
    return PreparedFp8(values, _factors(weights, powers), spec=weights.spec, **more)


def _padded(x: Array, halves: int, columns: int) -> Array:
    """Blocks ``[*B, n, k, 64, columns]``, whole ones in each half, filled up with zeros."""
    *batch, rows, width = x.shape
    x = x.reshape(*batch, halves, rows // halves, width)
    x = jnp.pad(x, [(0, 0)] * (len(batch) + 1) + [(0, -(rows // halves) % ROWS), (0, -width % columns)])
    x = x.reshape(*batch, -1, ROWS, x.shape[-1] // columns, columns)
    return jnp.swapaxes(x, -3, -2)


def _code_words(codes: Array) -> Array:
    """Words of blocks, for each 32 columns those of one thread after the other.

    The magnitudes of eight columns are the nibbles of a word, 2 and 3 exchanged; the signs of the first four are the highest bits
    of its bytes, those of the others lie four bits below.
    """
    magnitude = codes & 7
    magnitude = magnitude ^ (magnitude >> 1 == 1)
    x = codes.reshape(*codes.shape[:-1], 2, 2, 4, 8)  # row, half, 32 columns, word, column
    magnitude = magnitude.reshape(x.shape)
    signs = [7 + 8 * j for j in range(4)] + [3 + 8 * j for j in range(4)]
    words = sum(magnitude[..., j] << (4 * j) | x[..., j] >> 3 << signs[j] for j in range(8))
    words = jnp.moveaxis(words, -4, -2)  # half, 32 columns, row, word
    words = jnp.swapaxes(words, -4, -3)
    return words.reshape(*words.shape[:-4], -1)


def _scale_words(bytes_: Array) -> Array:
    """Words of blocks: of eight scales of a row first four of each row, then the others."""
    x = bytes_.reshape(*bytes_.shape[:-1], -1, 4)
    words = sum(x[..., i] << (8 * i) for i in range(4))
    return jnp.swapaxes(words, -2, -1).reshape(*words.shape[:-2], -1)


def fp8_of(blocks: Int32[Array, "*B lines 32"], layout: Fp8Layout) -> Float[Array, "*B 64 128"]:
    """The float8_e4m3fn that a kernel makes of blocks."""
    batch = blocks.shape[:-2]
    words = lax.bitcast_convert_type(blocks.reshape(*batch, -1), jnp.uint32)
    codes, scales = words[..., : CODE_LINES * LANES], words[..., CODE_LINES * LANES :]
    codes = codes.reshape(*batch, 2, 2, ROWS, 4)
    codes = jnp.moveaxis(codes, -2, -4)  # row, 32 columns, half, word
    codes = jnp.swapaxes(codes, -3, -2)
    magnitude = jnp.stack([(codes >> (4 * j)) & 7 for j in range(8)], -1)
    signs = [7 + 8 * j for j in range(4)] + [3 + 8 * j for j in range(4)]
    sign = jnp.stack([(codes >> shift) & 1 for shift in signs], -1)
    magnitude, sign = (x.reshape(*batch, ROWS, COLUMNS) for x in (magnitude, sign))
    magnitude = magnitude ^ (magnitude >> 1 == 1)
    scales = jnp.swapaxes(scales.reshape(*batch, -1, ROWS), -2, -1)
    scales = jnp.stack([(scales >> (8 * i)) & 255 for i in range(4)], -1).reshape(*batch, ROWS, -1)
    scales = jnp.repeat(scales, COLUMNS // layout.scales_of_row, axis=-1)
    further = jnp.where((magnitude & 1 == 1) & (magnitude > 1), scales >> 7, 0)
    byte = (scales & 127) + jnp.where(magnitude > 1, magnitude * 4, 0) + further
    byte = jnp.where(magnitude == 0, 0, byte) | (sign << 7)
    return lax.bitcast_convert_type(byte.astype(jnp.uint8), jnp.float8_e4m3fn)


@jax.jit
def _unprepared(array: PreparedFp8) -> QuantizedArray:
    (rows, columns), halves, batch = array.matrix, array.halves, array.shape[:-2]
    x = jnp.swapaxes(fp8_of(array.values, array.layout), -3, -2)
    x = x.reshape(*batch, halves, -1, array.values.shape[-3] * COLUMNS)[..., : rows // halves, :columns]
    return QuantizedArray(x.reshape(*batch, rows, columns), array.scales, spec=BLOCKS, halves=halves)
