"""Quantizing and back, in plain JAX. This file is the arithmetic that every kernel reproduces, bit for bit.

Of the elements that share a scale, all in float32:

- ``amax`` is their largest magnitude; an infinity counts as the largest finite float32 (and becomes the
  largest code).
- ``scale = amax * fl(1 / 448)`` for FP8, where amax is at least 1e-10, and ``amax * fl(1 / 127)`` for int8; fl rounds to float32.
  int4 takes the smallest scale that clips nothing, ``max(max(x) * fl(1 / 7), max(-x) * fl(1 / 8))``; with a zero point
  ``(max(x, 0) + max(-x, 0)) * fl(1 / 15)`` and ``zero = round(max(-x, 0) * r)``. A scale below the smallest normal float32 is
  zero. A ``float8_e8m0fnu`` scale is then rounded up to a power of two.
- ``r = reciprocal(scale)``, correctly rounded, 0 for a zero scale.
- ``q = round(clip(x * r))``, ties to even, saturating: no element is divided. ``x * r`` is 0 where r is, whatever x is.

NaN: FP8 has one, so an element that is NaN stays NaN (code 0x7f) and amax passes over it. Integers have none, so the scale
of elements among which one is NaN is NaN, their codes 0, and all of them NaN when dequantized: an error is not hidden. Scales
that are given are used as they are; a NaN among integers then becomes the code of zero.
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
from moe_jax.quantization.packing import pack_int4
from moe_jax.quantization.rounding import F32_MAX, reciprocal, scale_to_float32, to_e8m0, to_fp8

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
        valid: ``[..., rows]``; where False a row is quantized as if it were zero, whatever it holds, NaN included: its codes
            are zero and it has no part in the scale of other rows.
        halves: 2 for ``w13`` of a gated activation: gate and up rows share no scale.

    Returns:
        `QuantizedArray` of the shape of x.

    Raises:
        ValueError: a static spec without scales, scales of the wrong shape or where zero points are needed, an odd number of rows
            for two halves.

    Example:
        >>> q = quantize(jnp.array([[448.0, -1.0], [0.5, 0.25]]), Spec("float8_e4m3fn", "token"))
        >>> q.values.astype(jnp.float32).tolist(), q.scales.shape
        ([[448.0, -1.0], [448.0, 224.0]], (2,))
    """
    blocks = Blocks.of(spec, *x.shape[-2:], halves)
    if scales is None and spec.static:
        raise ValueError(
            f"{spec} is static: its scales are not taken from x; pass scales=, or use a spec with static=False"
        )
    if scales is not None:
        scales = _given_scales(scales, spec, (*x.shape[:-2], *blocks.scales_shape))
    return _quantize(jnp.asarray(x), scales, None if valid is None else jnp.asarray(valid), spec, halves)


def _given_scales(scales: ArrayLike, spec: Spec, shape: tuple[int, ...]) -> Array:
    if spec.asymmetric:
        raise ValueError(f"{spec} has zero points, which given scales alone do not determine; leave scales None")
    scales = jnp.asarray(scales)
    if scales.dtype != jnp.float8_e8m0fnu:
        scales = scales.astype(jnp.float32)
    if scales.shape == () and spec.granularity == "tensor":
        scales = jnp.broadcast_to(scales, shape)
    if scales.shape != shape:
        raise ValueError(
            f"scales have shape {scales.shape}, but must be {shape}: granularity={spec.granularity!r}, block={spec.block}"
        )
    if spec.scale_dtype == "float8_e8m0fnu":
        return scales if scales.dtype == jnp.float8_e8m0fnu else to_e8m0(scales)
    return scale_to_float32(scales)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _quantize(x: Array, scales: Array | None, valid: Array | None, spec: Spec, halves: int) -> QuantizedArray:
    batch, (rows, columns) = x.shape[:-2], x.shape[-2:]
    x = x.astype(jnp.float32)
    if valid is not None:
        x = jnp.where(valid[..., None], x, 0.0)
    blocks = Blocks.of(spec, rows, columns, halves)
    x = blocks.cut(x)
    if scales is None:
        scales = blocks.as_stored(_scales(x, spec))
        if spec.scale_dtype == "float8_e8m0fnu":
            scales = to_e8m0(scales)
    factor = reciprocal(blocks.per_block(scale_to_float32(scales), batch))
    scaled = jnp.where(factor == 0, 0.0, x * factor)

    if spec.is_float:
        codes = to_fp8(jnp.where(jnp.isnan(x), jnp.nan, scaled))
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
    """A scale for each block of `Blocks.cut`, float32."""
    nan = jnp.isnan(x)
    x = jnp.clip(jnp.where(nan, 0.0, x), -F32_MAX, F32_MAX)

    if spec.dtype == "float8_e4m3fn":
        return jnp.maximum(_largest(jnp.abs(x)), FP8_AMAX_FLOOR) * _inverse(448)
    if spec.dtype == "int8":
        scales = _largest(jnp.abs(x)) * _inverse(127)
    elif spec.asymmetric:
        scales = jnp.minimum(_largest(x) + _largest(-x), F32_MAX) * _inverse(15)
    else:
        scales = jnp.maximum(_largest(x) * _inverse(7), _largest(-x) * _inverse(8))
    scales = jnp.where(scales < _TINY, 0.0, scales)
    return jnp.where(jnp.any(nan, axis=_WITHIN_A_BLOCK), jnp.nan, scales)


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

    Args:
        x: ``[..., rows, columns]``.
        spec: of the activations; a format, or its name, has one. A weight-only format leaves x alone, up to `valid`.
        scales: see `quantize`.
        valid: see `quantize`; invalid rows become zero.

    Example:
        >>> fake_quantize_activations(jnp.array([[1.0, 3.1]]), "fp8_channel").tolist()
        [[0.9964..., 3.0999...]]
    """
    if not isinstance(spec, Spec):
        spec = quant_format(spec).activations
    if spec is None:
        return x if valid is None else jnp.where(jnp.asarray(valid)[..., None], x, 0)
    return quantize(x, spec, scales=scales, valid=valid).dequantize(x.dtype)


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
