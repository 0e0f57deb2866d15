"""Grouped matmul whose rows are quantized for the next one: as they leave it, or by a kernel of their own."""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from moe_jax.activations import Activation
from moe_jax.kernels.hopper.matmul_config import Config
from moe_jax.ops import implementation as impl
from moe_jax.ops.group_tokens import Groups
from moe_jax.ops.grouped_matmul import grouped_matmul
from moe_jax.ops.quantize_rows import quantize_rows
from moe_jax.ops.quantized_matmul import quantized_matmul, reason_against
from moe_jax.quantization.array import QuantizedArray
from moe_jax.quantization.formats import Spec
from moe_jax.quantization.rows import QuantizedRows


def matmul_and_quantize(
    rows: Float[Array, "rows K"] | QuantizedRows,
    weights: QuantizedArray,
    groups: Groups,
    spec: Spec,
    *,
    bias: Float[Array, "E N"] | None = None,
    activation: Activation | None = None,
    scales: Float[Array, ""] | None = None,
    tokens_as_rows: bool = False,
    config: Config | None = None,
    out_dtype: DTypeLike = "bfloat16",
    implementation: str = "auto",
) -> QuantizedRows:
    """``quantize_rows(grouped_matmul(...), spec, ...)``, bit for bit.

    Args:
        rows: as in `moe_jax.ops.grouped_matmul.grouped_matmul`, and so are the arguments that are not named here.
        weights: of the experts.
        groups: of the rows.
        spec: of the result.
        bias: added before the activation.
        activation: gated or not.
        scales: one for all rows, for a static spec.
        tokens_as_rows: rows are those of the tokens.
        config: how the kernel tiles its work; with `Config.quantizes` it quantizes the rows as they leave it, where it can.
        out_dtype: that rows are rounded to before they are quantized.
        implementation: ``auto``, ``xla``, ``mosaic`` or ``mosaic_interpret``.
    """
    if scales is None and not tokens_as_rows and _as_they_leave(rows, weights, groups, spec, activation, config):
        not_first = None if config.rows_first else "rows_first=False"
        reason = reason_against(rows, weights, activation, groups.tile_rows, out_dtype, not_first=not_first)
        if reason is None and impl.choose("grouped_matmul", implementation, None) != "xla":
            values, found = quantized_matmul(
                rows,
                weights,
                groups,
                bias=bias,
                activation=activation,
                group_offset=0,
                tokens_as_rows=False,
                config=config,
                dtype=jnp.dtype(out_dtype),
                implementation=implementation,
                quantize=spec,
            )
            return QuantizedRows(values, found, spec)
    hidden = grouped_matmul(
        rows,
        weights,
        groups,
        bias=bias,
        activation=activation,
        tokens_as_rows=tokens_as_rows,
        config=config,
        out_dtype=out_dtype,
        implementation=implementation,
    )
    return quantize_rows(hidden, spec, groups=groups, scales=scales, implementation=implementation)


def _as_they_leave(rows, weights, groups, spec, activation, config) -> bool:
    """Whether a plan wants it and the kernel can."""
    from moe_jax.kernels.hopper.quantized_store import supports

    if config is None or not config.quantizes or not isinstance(rows, QuantizedRows) or rows.size == 0:
        return False
    gated = activation is not None and activation.is_gated
    return supports(spec, config, weights.shape[1] // (2 if gated else 1), gated) is None
