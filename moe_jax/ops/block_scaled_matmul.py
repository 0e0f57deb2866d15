"""Grouped matmul of rows and weights in the same block-scaled format: what the kernel of Blackwell GPUs takes, and its operands.

That kernel was interpreted, lowered and compiled for sm_100a. It has not yet run on hardware.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moe_jax.activations import Activation
from moe_jax.ops import implementation as impl
from moe_jax.ops.group_tokens import Groups
from moe_jax.quantization.array import QuantizedArray
from moe_jax.quantization.formats import Spec
from moe_jax.quantization.prepared import PreparedArray
from moe_jax.quantization.rows import QuantizedRows

# Codes, columns of a scale, its dtype.
_FORMATS = {
    ("float4_e2m1fn", 16, "float8_e4m3fn"): "NVFP4",
    ("float4_e2m1fn", 32, "float8_e8m0fnu"): "MXFP4",
    ("float8_e4m3fn", 32, "float8_e8m0fnu"): "MXFP8",
}
_OUTPUTS = ("bfloat16", "float16")


def format_of(spec: Spec) -> str | None:
    """``NVFP4``, ``MXFP4`` or ``MXFP8``; None for what the tensor cores do not scale themselves.

    Example:
        >>> format_of(Spec("float4_e2m1fn", "group", 16, "float8_e4m3fn")), format_of(Spec("int8", "channel"))
        ('NVFP4', None)
    """
    if spec.granularity != "group":
        return None
    return _FORMATS.get((spec.dtype, spec.block[1], spec.scale_dtype))


def reason_against(
    rows: QuantizedRows,
    weights: QuantizedArray,
    activation: Activation | None,
    tile_rows: int,
    dtype: DTypeLike,
    *,
    tokens_as_rows: bool = False,
) -> str | None:
    """Why the kernel cannot run the problem; None if it can. The device is another question: `impl.blackwell_reason`."""
    from moe_jax.kernels.blackwell import config as tiling

    gated = activation is not None and activation.is_gated
    k, n_out = weights.shape[2], weights.shape[1] // (2 if gated else 1)
    names = format_of(rows.spec), format_of(weights.spec)
    if None in names or names[0] != names[1]:
        return f"rows {rows.spec} and weights {weights.spec} must both be NVFP4, both MXFP4 or both MXFP8; quantize both so"
    if isinstance(weights, PreparedArray):
        return "weights were put into the order of the Hopper kernels by prepare_experts(); pass them as quantize() gives them"
    if weights.columns is not None:
        return f"weights with {weights.columns} of their stored columns in use; store them without filling"
    if weights.halves == 2 and not gated:
        return "weights with two halves, and no gate; quantize them with halves=1"
    if tokens_as_rows:
        return "tokens_as_rows=True: it takes rows of groups; gather them"
    columns = tiling.columns_of_step(4 if rows.spec.codes_per_value == 2 else 8)
    if k % columns:
        return (
            f"the contracted size={k} must be a multiple of {columns} (a line of {tiling.LINE} bytes); pad the weights"
        )
    if n_out % 64:
        return f"the output size={n_out} must be a multiple of 64 (a line of {tiling.LINE} bytes); pad the weights"
    if tile_rows > tiling.TILE_ROWS:
        return f"tile_rows={tile_rows} must be at most {tiling.TILE_ROWS}, the lanes of tensor memory; group with fewer"
    if jnp.dtype(dtype).name not in _OUTPUTS:
        return f"the output {jnp.dtype(dtype)} must be bfloat16 or float16"
    return None


def runs(rows: Any, weights: QuantizedArray, implementation: str, **problem: Any) -> bool:
    """Whether the kernel takes the problem on the device of a jit call; where it does not on a Blackwell GPU, a warning says why.

    Args:
        rows: quantized, or not.
        weights: quantized.
        implementation: ``auto`` and ``mosaic`` may choose it.
        **problem: of `reason_against`.
    """
    if not isinstance(rows, QuantizedRows) or format_of(weights.spec) is None:
        return False
    if implementation not in ("auto", "mosaic") or impl.blackwell_reason() is not None:
        return False
    reason = reason_against(rows, weights, **problem)
    if reason is not None:
        impl.warn_once("grouped_matmul", reason)
    return reason is None


def block_scaled_matmul(
    rows: QuantizedRows,
    weights: QuantizedArray,
    groups: Groups,
    tile_group: Int[Array, " tiles"],
    *,
    bias: Float[Array, "E N"] | None = None,
    activation: Activation | None = None,
    dtype: DTypeLike = "bfloat16",
    interpret: Any = None,
) -> Float[Array, "R N_out"]:
    """``activation(rows @ weights[group].T + bias[group])`` in block-scaled tensor cores, float32 sums; see `grouped_matmul`.

    Scales are brought into the order of the tensor cores first, those of the weights in every call, by XLA.

    Args:
        rows: as `quantize_block_scaled` or `gather_quantize` makes them.
        weights: ``[E, N, K]`` of the same format.
        groups: of the rows; of the standard format, or of the batched one (`moe_jax.parallel.batched.batch_groups`).
        tile_group: the expert of each tile.
        bias: added before the activation.
        activation: gated or not.
        dtype: of the result.
        interpret: for the interpreter.

    Raises:
        ValueError: a problem that the kernel cannot run, see `reason_against`.
    """
    from moe_jax.kernels.blackwell import block_scaled as kernel
    from moe_jax.kernels.blackwell import scales as order
    from moe_jax.kernels.blackwell.config import default_config

    reason = reason_against(rows, weights, activation, groups.tile_rows, dtype)
    if reason is not None:
        raise ValueError(f"the block-scaled kernel cannot run grouped_matmul: {reason}")
    spec, num_rows = weights.spec, rows.shape[0]
    gated = activation is not None and activation.is_gated
    halves, bits = 2 if gated else 1, 4 if spec.codes_per_value == 2 else 8
    tiles = groups.tile_starts, groups.tile_sizes
    of_rows = rows.scales.T[:num_rows].astype(spec.scale_dtype)  # each a number of that dtype: nothing is rounded
    row_factors, weight_factors = None, None
    if weights.global_scale is not None:
        weight_factors = jnp.broadcast_to(weights.global_scale.reshape(len(weights), -1), (len(weights), halves))
    if rows.global_scale is not None and rows.global_scale.ndim == 0:
        weight_factors = weight_factors * rows.global_scale
    elif rows.global_scale is not None:
        row_factors = order.rows_of_tiles(rows.global_scale, *tiles)
    return kernel.grouped_matmul(
        _codes(rows.values, spec),
        order.of_tiles(of_rows, *tiles),
        _codes(weights.values, spec),
        order.of_weights(weights.scales, halves),
        tile_group,
        *tiles,
        groups.num_tiles,
        row_factors,
        weight_factors,
        bias,
        activation,
        config=default_config(gated, bits, spec.block[1]),
        out_dtype=jnp.dtype(dtype),
        interpret=interpret,
    )


def _codes(values: Array, spec: Spec) -> Array:
    """Two codes a byte, the even column in the low nibble, as float4_e2m1fn, which a GPU stores in the same way."""
    if spec.codes_per_value == 1:
        return values
    pairs = lax.bitcast_convert_type(values, jnp.float4_e2m1fn)
    return jax.lax.reshape(pairs, (*values.shape[:-1], 2 * values.shape[-1]))
