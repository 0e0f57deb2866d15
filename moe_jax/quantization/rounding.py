"""Rounding, bit for bit the same on every device: reciprocals, powers of two, the grids of FP8.

These are the steps where devices and compilers have a choice: a division may be an approximation, a conversion may round
twice or be left out by a compiler that keeps more precision than it was asked for. Nothing here leaves them one.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

F32_MAX = float(np.finfo(np.float32).max)


def _bits(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def _from_bits(bits: Array) -> Array:
    return lax.bitcast_convert_type(bits, jnp.float32)


def reciprocal(x: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """``1 / x`` correctly rounded to float32 (as ``rcp.rn.f32``), on any device and whatever it makes of a division.

    A zero or subnormal `x` gives 0: what has no scale is quantized to zero. So does an infinite one, or one whose reciprocal
    would be subnormal (beyond 2^126). NaN stays NaN.

    Args:
        x: float32, any shape.

    Example:
        >>> reciprocal(jnp.array([3.0, -0.5, 0.0])).tolist()
        [0.3333333432674408, -2.0, 0.0]
    """
    bits = _bits(x)
    exponent = (bits >> 23) & 0xFF
    mantissa = (bits & 0x7FFFFF) | 0x800000  # |x| = mantissa * 2^(exponent - 150)
    # An approximate quotient, right to a few units, then the exact remainder of 2^47 / mantissa. Its value is small, so the
    # product may wrap around: only the low 32 bits count.
    approximate = 1.0 / _from_bits((bits & 0x7FFFFF) | 0x3F800000)
    quotient = (approximate * 2.0**24).astype(jnp.int32)
    remainder = -(quotient * mantissa)
    quotient = quotient + (2 * remainder + mantissa) // (2 * mantissa)  # never a tie: only powers of two divide evenly
    is_power = mantissa == 0x800000
    new_exponent = jnp.where(is_power, 254 - exponent, 253 - exponent)
    new_mantissa = jnp.where(is_power, 0, quotient & 0x7FFFFF)
    sign = bits & jnp.int32(-(2**31))
    result = sign | (new_exponent << 23) | new_mantissa
    has_none = (exponent == 0) | (exponent == 255) | (new_exponent <= 0)
    return jnp.where(jnp.isnan(x), jnp.float32(jnp.nan), _from_bits(jnp.where(has_none, 0, result)))


def round_to_fp8(x: Float[Array, "*S"], dtype: DTypeLike = jnp.float8_e4m3fn) -> Float[Array, "*S"]:
    """The nearest value that FP8 can hold, ties to even, saturating; as float32, so that a conversion is exact.

    NaN stays NaN, and the sign of a zero stays.

    Args:
        x: float32, any shape.
        dtype: ``float8_e4m3fn``, up to 448, or ``float8_e5m2``, up to 57344 (and no infinity here).

    Example:
        >>> round_to_fp8(jnp.array([17.0, -1e9, 0.003])).tolist()
        [16.0, -448.0, 0.00390625]
        >>> round_to_fp8(jnp.array([17.0, -1e9]), jnp.float8_e5m2).tolist()
        [16.0, -57344.0]
    """
    info = jnp.finfo(dtype)
    largest, smallest_normal, step = (float(n) for n in (info.max, info.smallest_normal, info.smallest_subnormal))
    x = jnp.clip(x, -largest, largest)
    normal = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=info.nmant)
    below = jnp.round(x * (1.0 / step)) * step  # a power of two
    return jnp.where(jnp.abs(x) < smallest_normal, below, normal)


def to_fp8(x: Float[Array, "*S"], dtype: DTypeLike = jnp.float8_e4m3fn) -> Float[Array, "*S"]:
    """float32 to FP8: `round_to_fp8`, every NaN the code 0x7f.

    Example:
        >>> to_fp8(jnp.array([1.0, -1000.0])).tolist()
        [1.0, -448.0]
    """
    # Devices differ in the sign of the NaN that they write, and in which of the NaNs of e5m2 it is.
    nan = lax.bitcast_convert_type(jnp.uint8(0x7F), dtype)
    return jnp.where(jnp.isnan(x), nan, round_to_fp8(x, dtype).astype(dtype))


def to_e8m0(scale: Float[Array, "*S"]) -> Shaped[Array, "*S"]:
    """A scale as ``float8_e8m0fnu``, the next power of two that is not smaller; zero gives the smallest, 2^-127.

    NaN, infinity and what exceeds 2^127 give NaN (code 0xff). The sign is ignored: scales have none.

    Args:
        scale: float32, any shape.

    Example:
        >>> to_e8m0(jnp.array([1.0, 1.1, 0.25])).astype(jnp.float32).tolist()
        [1.0, 2.0, 0.25]
    """
    magnitude = jnp.minimum(
        _bits(scale) & 0x7FFFFFFF, 0x7F800000
    )  # NaN like infinity, whose exponent is the code of NaN
    return lax.bitcast_convert_type(((magnitude + 0x7FFFFF) >> 23).astype(jnp.uint8), jnp.float8_e8m0fnu)


def fp4_power(amax: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """The power of two that scales float4_e2m1fn values of at most `amax`: a quarter of it, rounded to two bits, then down.

    So the largest value becomes a code from 3.5 to just below 7, where what lies above 6 is still nearest to it: no scale is
    doubled for less than half a step. This is the "even" rule of OCP MX quantizers. Below 2^-126 it is 0.

    Args:
        amax: float32, not negative and finite, any shape.

    Example:
        >>> fp4_power(jnp.array([6.0, 6.9, 7.0, 1.0])).tolist()
        [1.0, 1.0, 2.0, 0.25]
    """
    exponent = ((_bits(amax) + 0x200000) >> 23) - 2
    return _from_bits(jnp.maximum(exponent, 0) << 23)


def scale_to_float32(scale: Shaped[Array, "*S"]) -> Float[Array, "*S"]:
    """A stored scale as float32, exactly; what is too small for a normal float32 counts as zero.

    Example:
        >>> scale_to_float32(to_e8m0(jnp.array([3.0]))).tolist()
        [4.0]
    """
    if scale.dtype != jnp.float8_e8m0fnu:
        scale = scale.astype(jnp.float32)
        return jnp.where(jnp.abs(scale) < np.finfo(np.float32).tiny, 0.0, scale)
    exponent = lax.bitcast_convert_type(scale, jnp.uint8).astype(jnp.int32)
    return jnp.where(exponent == 0xFF, jnp.float32(jnp.nan), _from_bits(exponent << 23))
