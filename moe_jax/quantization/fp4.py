"""float4_e2m1fn: sign, two bits of exponent, one of fraction; its codes, what they stand for, and rounding to them.

Codes 0 to 7 stand for 0, 0.5, 1, 1.5, 2, 3, 4 and 6; bit 3 is the sign, of a zero too. There is neither infinity nor NaN.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from moe_jax.quantization.packing import unpack_int4

FP4_MAX = 6.0
_MAGNITUDES = np.float32([0, 0.5, 1, 1.5, 2, 3, 4, 6])
FP4_VALUES = np.concatenate([_MAGNITUDES, -_MAGNITUDES])


def fp4_code(x: Float[Array, "*S"]) -> UInt8[Array, "*S"]:
    """The code of the nearest value, ties to the even code, saturating; the sign is kept, that of a zero too.

    Args:
        x: float32, any shape, without NaN.

    Example:
        >>> fp4_code(jnp.array([0.25, 0.26, 5.0, 5.1, 1e9, -0.1])).tolist()
        [0, 1, 6, 7, 7, 8]
    """
    m = jnp.abs(x)
    # One step up for each boundary passed; a boundary itself belongs to the even one of its neighbours.
    passed = (m > 0.25, m >= 0.75, m > 1.25, m >= 1.75, m > 2.5, m >= 3.5, m > 5.0)
    magnitude = sum(step.astype(jnp.uint8) for step in passed)
    return magnitude | (jnp.signbit(x).astype(jnp.uint8) << 3)


def fp4_value(code: UInt8[Array, "*S"]) -> Float[Array, "*S"]:
    """What codes 0 to 15 stand for, float32.

    Example:
        >>> fp4_value(jnp.array([1, 7, 15], jnp.uint8)).tolist()
        [0.5, 6.0, -6.0]
    """
    return jnp.asarray(FP4_VALUES)[code]


def unpack_fp4(packed: UInt8[Array | np.ndarray, "*B packed"], dtype: DTypeLike = "float32") -> Float[Array, "*B K"]:
    """What bytes of two codes stand for, the low nibble first.

    Args:
        packed: uint8.
        dtype: of the result; every value is exact in float16, bfloat16 and float8_e4m3fn.

    Example:
        >>> unpack_fp4(jnp.array([0x71, 0x8A], jnp.uint8)).tolist()
        [0.5, 6.0, -1.0, -0.0]
    """
    return fp4_value(unpack_int4(packed)).astype(dtype)
