"""Scales and codes of elements in registers: the arithmetic of `moe_jax.quantization.quantize`, bit for bit.

Magnitudes are compared as integers. The bits of floats that are not negative sort as the floats do, with NaN above infinity: so
one NaN among integers' elements shows in the maximum. FP8 passes NaN over: an addition that takes infinity to the largest
integer makes NaN negative. Subnormal numbers need no care either.

Mosaic compiles a division to an approximate one, so reciprocals are an instruction of their own. The interpreter knows no
instructions; there a division is right, but XLA's CPU compiler may leave two conversions out or round them twice.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax import _compat
from moe_jax.quantization.formats import Spec
from moe_jax.quantization.quantize import FP8_AMAX_FLOOR
from moe_jax.quantization.rounding import to_fp8

_MAGNITUDE = 0x7FFFFFFF  # all bits but the sign
_INFINITY = 0x7F800000
_LARGEST = _INFINITY - 1  # the largest finite number
_ABOVE_INFINITY = _MAGNITUDE - _INFINITY
_TINY = float(np.finfo(np.float32).tiny)
_HAS_RECIPROCAL = 2.0**126  # beyond it, that is subnormal
_INTEGERS = 1.5 * 2.0**23  # floats of this size are integers, in their low bits


def _bits(x: Any) -> Any:
    return lax.bitcast_convert_type(x, jnp.int32)


def _float(bits: Any) -> Any:
    return lax.bitcast_convert_type(bits, jnp.float32)


def rounded(x: Any, dtype: Any) -> Any:
    """float32 rounded to a narrower dtype, as float32; a compiler may leave out a conversion there and back, but not this.

    Example:
        >>> rounded(jnp.float32([0.1, 3e-7, 1e5]), jnp.float16).tolist()
        [0.0999755859375, 2.980232238769531e-07, inf]
    """
    info = jnp.finfo(dtype)
    normal = lax.reduce_precision(x, exponent_bits=info.nexp, mantissa_bits=info.nmant)
    if info.dtype != jnp.float16:
        return normal  # what is subnormal there is subnormal here
    return jnp.where(jnp.abs(x) < 2.0**-14, jnp.round(x * 2.0**24) * 2.0**-24, normal)


def _rounded_reciprocal(x: Any, layout: Any) -> Any:
    """Correctly rounded; zero gives infinity."""

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=layout))
    def run(ctx, x):
        del ctx
        return _compat.rounded_reciprocal(x)

    return run(x)


@dataclasses.dataclass(frozen=True)
class Scaling:
    """How elements become codes.

    Attributes:
        spec: ``float8_e4m3fn``, ``float8_e5m2`` or ``int8``.
        given: scales are given, whatever they are; otherwise `scale` has made them.
        interpret: the kernel is interpreted.
    """

    spec: Spec
    given: bool
    interpret: bool

    def order(self, x: Any) -> Any:
        """int32 that sort as the magnitudes of `x` (float32): their maximum is what `scale` and `amax` take."""
        magnitude = _bits(x) & _MAGNITUDE
        return magnitude + _ABOVE_INFINITY if self.spec.is_float else magnitude

    def amax(self, order: Any) -> Any:
        """The largest magnitude as float32: an infinity is the largest finite number, NaN is NaN."""
        if self.spec.is_float:
            found = jnp.maximum(order, _ABOVE_INFINITY) - _ABOVE_INFINITY  # negative where all are NaN
            return _float(jnp.minimum(found, _LARGEST))
        return jnp.where(order > _INFINITY, jnp.float32(jnp.nan), _float(jnp.minimum(order, _LARGEST)))

    def scale(self, amax: Any) -> Any:
        """The scale of elements of that largest magnitude."""
        inverse = np.float32(1) / np.float32(self.spec.largest)
        if self.spec.is_float:
            return self.stored(jnp.maximum(amax, FP8_AMAX_FLOOR) * inverse)
        scale = amax * inverse
        # A GPU's product of NaN is another NaN than a CPU's.
        return jnp.where(scale != scale, jnp.float32(jnp.nan), jnp.where(scale < _TINY, jnp.float32(0), scale))

    def stored(self, scale: Any) -> Any:
        """A scale as the format holds it, as float32: `to_e8m0` or nothing, and zero if it is too small to be normal."""
        if self.spec.scale_dtype != "float8_e8m0fnu":
            return jnp.where(jnp.abs(scale) < _TINY, jnp.float32(0), scale) if self.given else scale
        if not self.given:
            return _float((_bits(scale) + _ABOVE_INFINITY) & _INFINITY)
        magnitude = jnp.minimum(_bits(scale) & _MAGNITUDE, _INFINITY)
        power = _float((magnitude + _ABOVE_INFINITY) & _INFINITY)
        return jnp.where(power == jnp.inf, jnp.float32(jnp.nan), power)

    def reciprocal(self, scale: Any, layout: Any) -> Any:
        """`moe_jax.quantization.rounding.reciprocal` of a vector in that layout."""
        inverse = 1.0 / scale if self.interpret else _rounded_reciprocal(scale, layout)
        if not self.given and self.spec.is_float:  # a floor keeps those far from any limit
            return inverse
        none = (jnp.abs(scale) < _TINY) | (jnp.abs(scale) > _HAS_RECIPROCAL)
        return jnp.where(none, jnp.float32(0), inverse)

    def encode(self, x: Any, reciprocal: Any) -> Any:
        """The codes of `x` (float32), given the reciprocals of its scales, in the same shape."""
        scaled = x * reciprocal
        if self.spec.is_float:
            if self.given:
                zero = jnp.where(x != x, x, jnp.float32(0))
                scaled = jnp.where(reciprocal == 0, zero, scaled)
            dtype = self.spec.storage_dtype
            return to_fp8(scaled, dtype) if self.interpret else scaled.astype(dtype)
        # A NaN shows in the scale that was taken from it, which is one comparison for all of a thread's elements.
        tell = scaled if self.given else reciprocal
        scaled = jnp.where(tell != tell, jnp.float32(0), scaled)
        limited = jnp.minimum(jnp.maximum(scaled, float(self.spec.smallest)), float(self.spec.largest))
        return _bits(limited + _INTEGERS).astype(jnp.int8)  # the addition rounds to even

    def weigh(self, x: Any, weight: Any) -> Any:
        """`x` times a weight in float32, rounded to the dtype of `x`; as float32."""
        product = x.astype(jnp.float32) * weight
        if not self.interpret:
            return product.astype(x.dtype).astype(jnp.float32)
        return rounded(product, x.dtype)
