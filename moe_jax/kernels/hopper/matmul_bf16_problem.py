"""Which problems the grouped matmul of 16-bit floats can run."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from moe_jax.activations import Activation
from moe_jax.kernels.hopper import codes, four_bits, rows_by_token, tiles
from moe_jax.kernels.hopper.matmul_config import MOST_ROWS
from moe_jax.quantization.prepared import PreparedArray

DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))


def supports(
    rows: Any,
    weights: Any,
    bias: Any,
    activation: Activation | None,
    tile_rows: int,
    gather: bool = False,
    weight_scales: Any = None,
) -> str | None:
    """Why this kernel cannot run the problem; None if it can. Shapes as in `grouped_matmul`."""
    k = weights.shape[2]
    out = weights.shape[1] // (2 if activation is not None and activation.is_gated else 1)
    prepared = isinstance(weights, PreparedArray)
    if rows.dtype not in DTYPES or (weights.dtype != rows.dtype and weight_scales is None and not prepared):
        return f"rows {rows.dtype} and weights {weights.dtype} must both be bfloat16 or both float16"
    if weight_scales is not None:
        reason = codes.supports(weights, weight_scales, out)
    elif prepared:
        reason = four_bits.supports(weights, rows)
    else:
        reason = None
    if reason is not None:
        return reason
    for name, size in (("the contracted size", k), ("the output size", out), ("the weight rows", weights.shape[1])):
        if tiles.swizzle_bytes(size, rows.dtype) is None:
            return (
                f"{name}={size} must be a multiple of 16 (TMA and wgmma rows of 32 bytes); pad the weights, "
                "or use implementation='xla'"
            )
    if tile_rows % 8 or not 8 <= tile_rows <= MOST_ROWS:
        return f"tile_rows={tile_rows} must be a multiple of 8 and at most {MOST_ROWS}"
    if gather and (k % rows_by_token.PIECE or tile_rows % rows_by_token.ROWS):
        return (
            f"rows fetched by their tokens: the contracted size={k} must be a multiple of {rows_by_token.PIECE} and "
            f"tile_rows={tile_rows} of {rows_by_token.ROWS}; gather them first (Config.gather False)"
        )
    if bias is not None and bias.dtype not in (*DTYPES, jnp.dtype(jnp.float32)):
        return f"bias {bias.dtype} must be bfloat16, float16 or float32"
    if 0 in rows.shape or 0 in weights.shape:
        return f"an empty operand (rows {rows.shape}, weights {weights.shape}) needs no kernel"
    return None
