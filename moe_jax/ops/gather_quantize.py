"""Gather and quantize: the hidden states of the tokens as codes and scales, in the rows of their experts."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from moe_jax.ops import implementation as impl
from moe_jax.ops.group_tokens import row_tokens
from moe_jax.quantization import Spec
from moe_jax.quantization.quantize import quantize
from moe_jax.quantization.rounding import scale_to_float32
from moe_jax.quantization.rows import QuantizedRows


def supports(x: Any, spec: Spec, top_k: int = 1) -> str | None:
    """Why the kernel cannot quantize rows of `x` [T, H] to `top_k` places each; None if it can.

    Example:
        >>> supports(jnp.zeros((4, 100)), Spec("int8", "token"))[:41]
        'hidden_size=100 must be a multiple of 16 '
    """
    from moe_jax.kernels.hopper import gather_quantize as kernel

    return kernel.supports(x, spec, top_k)


def gather_quantize(
    x: Float[Array, "T H"],
    positions: Int[Array, "T k"] | None,
    spec: Spec,
    *,
    scales: ArrayLike | None = None,
    weights: Float[Array, "T 1"] | None = None,
    num_rows: Int[Array, "1"] | None = None,
    total_rows: int | None = None,
    implementation: str = "auto",
) -> QuantizedRows:
    """The rows of the tokens, quantized as `moe_jax.quantization.quantize` does it, bit for bit.

    Rows without a token are undefined on a GPU, codes and scales, and must not be read. They have no part in a scale, nor have
    tokens without a place.

    Args:
        x: ``[T, H]``, bfloat16, float16 or float32.
        positions: int32 ``[T, k]``, the row of each slot, -1 for none; there are R = `total_rows`. None: R = T rows where they
            are.
        spec: of activations or of gradients: float8_e4m3fn, float8_e5m2 or int8; a scale a tensor, a token or a group of columns.
        scales: given instead of taken from x, where a row has one: a scalar, or ``[T]``, one a token. A static spec needs
            them.
        weights: float32 ``[T, 1]``: the router's weight, where it belongs to the input. Multiplied in float32 and rounded to the
            dtype of x, before quantizing.
        num_rows: int32 ``[1]``, without positions: only the first so many rows count, the others are rows without a token.
        total_rows: R, with positions; T * k by default.
        implementation: ``auto``, ``xla``, ``mosaic`` or ``mosaic_interpret``.

    Raises:
        ValueError: a spec that is none of activations, scales of another shape or where groups have their own, `num_rows`
            together with positions; an implementation that cannot do it.

    Example:
        >>> x, places = jnp.array([[448.0, 1.0], [3.0, 6.0]]), jnp.array([[1], [0]], jnp.int32)
        >>> rows = gather_quantize(x, places, Spec("float8_e4m3fn", "token"))
        >>> rows.values.astype(jnp.float32).tolist(), rows.scales[0, :2].tolist(), rows.scales.shape
        ([[224.0, 448.0], [448.0, 1.0]], [0.0133928582072258, 1.0], (1, 196))
    """
    from moe_jax.kernels.hopper import gather_quantize as kernel
    from moe_jax.kernels.hopper.row_amax import row_amax

    impl.check_name(implementation)
    scales = _checked(x, positions, spec, scales, num_rows)
    top_k = 1 if positions is None else positions.shape[1]
    rows = x.shape[0] * top_k if total_rows is None or positions is None else total_rows
    if x.size == 0 or rows == 0:
        shape = kernel.scales_shape(rows, x.shape[1], spec)
        return QuantizedRows(jnp.zeros((rows, x.shape[1]), spec.storage_dtype), jnp.zeros(shape, jnp.float32), spec)
    chosen = impl.choose("gather_quantize", implementation, kernel.supports(x, spec, top_k))
    if chosen == "xla":
        return plain_gather_quantize(x, positions, spec, scales, weights, num_rows, rows)
    options = {"weights": weights, "num_rows": num_rows, "interpret": impl.interpret_params(chosen)}
    amax = None
    if scales is None and spec.granularity == "tensor":
        amax = row_amax(x, positions, spec, **options)
    found = kernel.gather_quantize(x, positions, spec, scales=scales, amax=amax, total_rows=rows, **options)
    return QuantizedRows(*found, spec)


def _checked(x: Any, positions: Any, spec: Spec, scales: ArrayLike | None, num_rows: Any) -> Array | None:
    """The given scales, ``[1]`` or ``[T]``; None if there are none."""
    if spec.dtype not in ("float8_e4m3fn", "float8_e5m2", "int8") or spec.granularity not in (
        "tensor",
        "token",
        "group",
    ):
        raise ValueError(
            f"{spec} must be of float8_e4m3fn, float8_e5m2 or int8 with granularity tensor, token or group, as activations have; "
            "take QuantFormat.activations"
        )
    if positions is not None and num_rows is not None:
        raise ValueError(
            "num_rows is for rows that stay where they are; with positions the rows that count are those of tokens with a "
            "place: pass num_rows=None, or positions=None"
        )
    if scales is None:
        if spec.static:
            raise ValueError(f"{spec} is static: its scales are not taken from x; pass scales=")
        return None
    if spec.granularity == "group":
        raise ValueError(f"{spec} has a scale a group, which cannot be given; pass scales=None")
    scales = jnp.asarray(scales)
    scales = scale_to_float32(scales) if scales.dtype == jnp.float8_e8m0fnu else scales.astype(jnp.float32)
    if scales.size == 1:
        return scales.reshape(1)
    if scales.shape != x.shape[:1]:
        raise ValueError(
            f"scales have shape {scales.shape}, but must be one for all, (), or one a token, {x.shape[:1]}"
        )
    return scales


def plain_gather_quantize(
    x: Float[Array, "T H"],
    positions: Int[Array, "T k"] | None,
    spec: Spec,
    scales: Float[Array, " one_or_T"] | None = None,
    weights: Float[Array, "T 1"] | None = None,
    num_rows: Int[Array, "1"] | None = None,
    total_rows: int | None = None,
) -> QuantizedRows:
    """In plain JAX, with zeros in rows without a token.

    Example:
        >>> spec = Spec("int8", "tensor")
        >>> plain_gather_quantize(jnp.array([[127.0], [9e9]]), None, spec, num_rows=jnp.array([1])).values.tolist()
        [[127], [0]]
    """
    from moe_jax.kernels.hopper.gather_quantize import scales_shape
    from moe_jax.kernels.hopper.scaling import rounded

    tokens = jnp.arange(x.shape[0])
    valid = (tokens < num_rows[0]) if num_rows is not None else tokens >= 0
    if positions is not None:
        valid = (positions >= 0).any(axis=1)
    if weights is not None:
        x = rounded(x.astype(jnp.float32) * weights, x.dtype)
    asked = spec
    if scales is not None:
        spec = dataclasses.replace(spec, granularity="token")  # one a token, whether or not they are the same
        scales = jnp.broadcast_to(scales, tokens.shape)
    found = quantize(x, spec, scales=scales, valid=valid)
    values = found.values
    per_token = scale_to_float32(found.scales)
    if per_token.ndim < 2:
        per_token = jnp.broadcast_to(per_token, tokens.shape)[:, None]
    if positions is not None:
        token = row_tokens(positions, total_rows)
        has_one, token = token >= 0, jnp.maximum(token, 0)
        values = jnp.where(has_one[:, None], values[token], jnp.zeros((), values.dtype))
        per_token = jnp.where(has_one[:, None], per_token[token], 0)
    spare = scales_shape(values.shape[0], x.shape[1], spec)[1] - values.shape[0]
    return QuantizedRows(values, jnp.pad(per_token.T, ((0, 0), (0, spare))), asked)
