"""Quantizing and back, in plain JAX. This file is the arithmetic that every kernel reproduces, bit for bit.

Of the elements that share a scale, all in float32:

- ``amax`` is their largest magnitude; an infinity counts as the largest finite float32 (and becomes the
  largest code).
- ``scale = amax * fl(1 / 448)`` for float8_e4m3fn and ``amax * fl(1 / 57344)`` for float8_e5m2, where amax is at least 1e-10, and
  ``amax * fl(1 / 127)`` for int8; fl rounds to float32. int4 takes the smallest scale that clips nothing,
  ``max(max(x) * fl(1 / 7), max(-x) * fl(1 / 8))``; with a zero point ``(max(x, 0) + max(-x, 0)) * fl(1 / 15)`` and
  ``zero = round(max(-x, 0) * r)``. A scale below the smallest normal float32 is zero. A ``float8_e8m0fnu`` scale is then rounded
  up to a power of two.
- float4_e2m1fn with power-of-two scales (MXFP4): `moe_jax.quantization.rounding.fp4_power` of amax. With float8_e4m3fn scales
  (NVFP4) there is a ``global_scale = amax * fl(1 / 2688)``, of the whole matrix and zero below the smallest normal float32;
  2688 is 448 * 6. ``stored = to_fp8((amax * fl(1 / 6)) * reciprocal(global_scale))``, saturating, of each group, and
  ``scale = stored * global_scale``.
- ``r = reciprocal(scale)``, correctly rounded, 0 for a zero scale.
- ``q = round(clip(x * r))``, ties to even, saturating: no element is divided. ``x * r`` is 0 where r is, whatever x is. A zero
  of floats keeps its sign.

NaN: FP8 has one, so an element that is NaN stays NaN (code 0x7f) and amax passes over it. Integers and float4_e2m1fn have none,
so the scale of elements among which one is NaN is NaN, their codes 0, and all of them NaN when dequantized: an error is not
hidden (the global scale passes over it). Scales that are given are used as they are; a NaN among integers then becomes the code
of zero.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float

from moe_jax.quantization.array import QuantizedArray
from moe_jax.quantization.blocks import Blocks
from moe_jax.quantization.formats import QuantFormat, Spec, quant_format
from moe_jax.quantization.fp4 import fp4_code
from moe_jax.quantization.packing import pack_int4
from moe_jax.quantization.rounding import F32_MAX, fp4_power, reciprocal, scale_to_float32, to_e8m0, to_fp8

FP8_AMAX_FLOOR = 1e-10
_TINY = np.finfo(np.float32).tiny
_WITHIN_A_BLOCK = (-3, -1)


def _inverse(number: int) -> np.float32:
    return np.float32(1.0) / np.float32(number)


def quantize(
    x: Float[Array | np.ndarray, "*B rows columns"],
    spec: Spec,
    *,
    scales: ArrayLike | None = None,
    global_scale: ArrayLike | None = None,
    valid: Bool[Array | np.ndarray, "*B rows"] | None = None,
    halves: int = 1,
) -> QuantizedArray:
    """Codes and scales of a matrix, or of each matrix of a stack; the rules are at the top of this file.

    Blocks at an edge that the sizes do not divide are filled up with zeros inside; the scales are those of what is there.

    Args:
        x: ``[..., rows, columns]``, any floating dtype; no row, or no column, is fine.
        spec: the number format.
        scales: given instead of taken from x: in the shape that `QuantizedArray` says, or a scalar for ``tensor``; zero, or
            within [2^-126, 2^126]. What exceeds them saturates. A static spec needs them.
        global_scale: given instead of taken from x, for a spec that has one: one a matrix, ``[...]`` or ``[..., 2]`` with two
            halves, or a scalar. A static spec needs it, and so do given scales.
        valid: ``[..., rows]``; where False a row is quantized as if it were zero, whatever it holds, NaN included: its codes
            are zero and it has no part in the scale of other rows.
        halves: 2 for ``w13`` of a gated activation: gate and up rows share no scale.

    Returns:
        `QuantizedArray` of the shape of x.

    Raises:
        ValueError: a static spec without scales, scales of the wrong shape or where zero points are needed, a global scale where
            the format has none, an odd number of rows for two halves.

    Example:
        >>> q = quantize(jnp.array([[448.0, -1.0], [0.5, 0.25]]), Spec("float8_e4m3fn", "token"))
        >>> q.values.astype(jnp.float32).tolist(), q.scales.shape
        ([[448.0, -1.0], [448.0, 224.0]], (2,))
    """
    blocks = Blocks.of(spec, *x.shape[-2:], halves)
    global_scale = _given_global_scale(
        global_scale, scales, spec, x.shape[:-2] if halves == 1 else (*x.shape[:-2], halves)
    )
    if scales is None and spec.static and not spec.has_global_scale:
        raise ValueError(
            f"{spec} is static: its scales are not taken from x; pass scales=, or use a spec with static=False"
        )
    if scales is not None:
        scales = _given_scales(scales, spec, (*x.shape[:-2], *blocks.scales_shape))
    valid = None if valid is None else jnp.asarray(valid)
    return _quantize(jnp.asarray(x), scales, global_scale, valid, spec, halves)


def _given_global_scale(
    given: ArrayLike | None, scales: ArrayLike | None, spec: Spec, shape: tuple[int, ...]
) -> Array | None:
    if given is None:
        if spec.has_global_scale and (spec.static or scales is not None):
            what = "is static" if scales is None else "has scales given"
            raise ValueError(f"{spec} {what}: its global scale is not taken from x; pass global_scale=")
        return None
    if not spec.has_global_scale:
        raise ValueError(f"{spec} has no global scale, only float8_e4m3fn scales have one; leave global_scale None")
    given = jnp.asarray(given, jnp.float32)
    if given.shape not in ((), shape):
        raise ValueError(f"global_scale has shape {given.shape}, but must be {shape}, one a matrix, or a scalar")
    return scale_to_float32(jnp.broadcast_to(given, shape))


def _given_scales(scales: ArrayLike, spec: Spec, shape: tuple[int, ...]) -> Array:
    if spec.asymmetric:
        raise ValueError(f"{spec} has zero points, which given scales alone do not determine; leave scales None")
    scales = jnp.asarray(scales)
    if scales.dtype not in (jnp.float8_e8m0fnu, jnp.float8_e4m3fn):
        scales = scales.astype(jnp.float32)
    if scales.shape == () and spec.granularity == "tensor":
        scales = jnp.broadcast_to(scales, shape)
    if scales.shape != shape:
        raise ValueError(
            f"scales have shape {scales.shape}, but must be {shape}: granularity={spec.granularity!r}, block={spec.block}"
        )
    if spec.scale_dtype == "float8_e8m0fnu":
        return scales if scales.dtype == jnp.float8_e8m0fnu else to_e8m0(scale_to_float32(scales))
    if spec.has_global_scale:
        return scales if scales.dtype == jnp.float8_e4m3fn else to_fp8(scale_to_float32(scales))
    return scale_to_float32(scales)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _quantize(
    x: Array, scales: Array | None, global_scale: Array | None, valid: Array | None, spec: Spec, halves: int
) -> QuantizedArray:
    batch, (rows, columns) = x.shape[:-2], x.shape[-2:]
    x = x.astype(jnp.float32)
    if valid is not None:
        x = jnp.where(valid[..., None], x, 0.0)
    blocks = Blocks.of(spec, rows, columns, halves)
    x = blocks.cut(x)
    if spec.has_global_scale and global_scale is None:
        global_scale = _global_scales(x, halves)
    if scales is None:
        scales = _scales(x, spec)
        if spec.has_global_scale:
            unit = jnp.squeeze(reciprocal(blocks.per_half(global_scale, batch)), _WITHIN_A_BLOCK)
            scales = to_fp8(scales * unit)
        elif spec.scale_dtype == "float8_e8m0fnu":
            scales = to_e8m0(scales)
        scales = blocks.as_stored(scales)
    scale = blocks.per_block(scale_to_float32(scales), batch)
    factor = reciprocal(scale * blocks.per_half(global_scale, batch) if spec.has_global_scale else scale)
    scaled = jnp.where(factor == 0, 0.0, x * factor)

    if spec.dtype == "float4_e2m1fn":
        codes = pack_int4(blocks.join(fp4_code(jnp.where(jnp.isnan(scaled), 0.0, scaled))))
        odd = columns if columns % 2 else None
        return QuantizedArray(codes, scales, None, global_scale, spec=spec, halves=halves, columns=odd)
    if spec.is_float:
        codes = to_fp8(jnp.where(jnp.isnan(x), jnp.nan, scaled), spec.storage_dtype)
        return QuantizedArray(blocks.join(codes), scales, spec=spec, halves=halves)

    integers = jnp.round(jnp.where(jnp.isnan(scaled), 0.0, scaled))
    if spec.dtype == "int8":
        codes = jnp.clip(integers, spec.smallest, spec.largest).astype(jnp.int8)
        return QuantizedArray(blocks.join(codes), scales, spec=spec, halves=halves)

    zeros = None
    if spec.asymmetric:
        below = jnp.maximum(jnp.max(-x, axis=_WITHIN_A_BLOCK, keepdims=True, initial=0.0), 0.0) * factor
        zero = jnp.clip(jnp.round(jnp.where(jnp.isnan(below), 0.0, below)), 0.0, 15.0)
        zeros = blocks.as_stored(jnp.squeeze(zero, _WITHIN_A_BLOCK)).astype(jnp.uint8)
    else:
        zero = 8.0
    codes = blocks.join(jnp.clip(integers + zero, 0.0, 15.0).astype(jnp.uint8))
    return QuantizedArray(
        pack_int4(codes), scales, zeros, spec=spec, halves=halves, columns=columns if columns % 2 else None
    )


def _scales(x: Array, spec: Spec) -> Array:
    """A scale for each block of `Blocks.cut`, float32; of a spec with a global scale what that is still to divide."""
    nan = jnp.isnan(x)
    x = jnp.clip(jnp.where(nan, 0.0, x), -F32_MAX, F32_MAX)

    if spec.is_float:
        return jnp.maximum(_largest(jnp.abs(x)), FP8_AMAX_FLOOR) * _inverse(spec.largest)
    if spec.has_global_scale:
        scales = _largest(jnp.abs(x)) * _inverse(6)
    elif spec.dtype == "float4_e2m1fn":
        scales = fp4_power(_largest(jnp.abs(x)))
    elif spec.dtype == "int8":
        scales = _largest(jnp.abs(x)) * _inverse(127)
    elif spec.asymmetric:
        scales = jnp.minimum(_largest(x) + _largest(-x), F32_MAX) * _inverse(15)
    else:
        scales = jnp.maximum(_largest(x) * _inverse(7), _largest(-x) * _inverse(8))
    scales = jnp.where(scales < _TINY, 0.0, scales)
    return jnp.where(jnp.any(nan, axis=_WITHIN_A_BLOCK), jnp.nan, scales)


def _global_scales(x: Array, halves: int) -> Array:
    """``[...]``, or ``[..., 2]`` with two halves, of what `Blocks.cut` gives: the largest magnitude becomes 448 * 6."""
    finite = jnp.clip(jnp.where(jnp.isnan(x), 0.0, x), -F32_MAX, F32_MAX)
    scales = jnp.max(jnp.abs(finite), axis=(-4, -3, -2, -1), initial=0.0) * _inverse(2688)
    scales = jnp.where(scales < _TINY, 0.0, scales)
    return scales if halves == 2 else scales[..., 0]


def _largest(values: Array) -> Array:
    return jnp.max(values, axis=_WITHIN_A_BLOCK, initial=0.0)


def dequantize(
    array: QuantizedArray | Float[Array | np.ndarray, "*B rows columns"], dtype: DTypeLike = "float32"
) -> Float[Array, "*B rows columns"]:
    """`QuantizedArray.dequantize`; an array that is not quantized is only cast.

    Example:
        >>> dequantize(quantize(jnp.array([[1.0, 3.0]]), Spec("int8", "channel")), "bfloat16").tolist()
        [[0.9921875, 3.0]]
    """
    if isinstance(array, QuantizedArray):
        return array.dequantize(dtype)
    return jnp.asarray(array).astype(dtype)


def fake_quantize_activations(
    x: Float[Array, "*B rows columns"],
    spec: Spec | QuantFormat | str,
    *,
    scales: ArrayLike | None = None,
    valid: Bool[Array | np.ndarray, "*B rows"] | None = None,
) -> Float[Array, "*B rows columns"]:
    """Activations as a quantized matmul sees them: quantized and dequantized, in the dtype they came in.

    A global scale that is not given is one a row, so that no row depends on which others there are.

    Args:
        x: ``[..., rows, columns]``.
        spec: of the activations; a format, or its name, has one. A weight-only format leaves x alone, up to `valid`.
        scales: see `quantize`. For a spec with a global scale: that one, a scalar or one a matrix, ``[...]``.
        valid: see `quantize`; invalid rows become zero.

    Example:
        >>> fake_quantize_activations(jnp.array([[1.0, 3.1]]), "fp8_channel").tolist()
        [[0.9964..., 3.0999...]]
    """
    if not isinstance(spec, Spec):
        spec = quant_format(spec).activations
    if spec is None:
        return x if valid is None else jnp.where(jnp.asarray(valid)[..., None], x, 0)
    if not spec.has_global_scale:
        return quantize(x, spec, scales=scales, valid=valid).dequantize(x.dtype)
    if scales is not None or spec.static:
        return quantize(x, spec, global_scale=scales, valid=valid).dequantize(x.dtype)
    valid = None if valid is None else jnp.asarray(valid)[..., None]
    return quantize(x[..., None, :], spec, valid=valid).dequantize(x.dtype)[..., 0, :]


def merge_half_scales(array: QuantizedArray) -> QuantizedArray:
    """``w13`` with a scale for gate and one for up, ``[..., 2]``, as with one for both, ``[...]``: the larger of the two.

    Codes of the half with the smaller scale are dequantized and quantized again, which costs it precision; the other
    half keeps its codes. An array with one half is returned as it is.

    Raises:
        ValueError: scales that are not one a tensor.

    Example:
        >>> w13 = jnp.concatenate([jnp.ones((1, 8, 4)), 2 * jnp.ones((1, 8, 4))], axis=1)
        >>> w = quantize(w13, Spec("float8_e4m3fn", "tensor"), halves=2)
        >>> w.scales.shape, merge_half_scales(w).scales.shape, merge_half_scales(w).dequantize()[0, :, 0].tolist()[7:9]
        ((1, 2), (1,), [1.0, 2.0])
    """
    if array.halves == 1:
        return array
    if array.spec.granularity != "tensor":
        raise ValueError(
            f"scales with granularity={array.spec.granularity!r} are not one a half, there is nothing to merge; only 'tensor' has"
        )
    of_halves = scale_to_float32(array.scales)
    scales = jnp.max(of_halves, axis=-1)  # NaN if one of them is
    merged = quantize(array.dequantize(), array.spec, scales=scales)
    # Twice rounded products could end beside a code; the half whose scale it is must not change.
    kept = jnp.repeat(of_halves == scales[..., None], array.shape[-2] // 2, axis=-1)[..., None]
    return QuantizedArray(jnp.where(kept, array.values, merged.values), merged.scales, spec=array.spec)
