"""The expert MLP on grouped rows: up-projection, activation, down-projection, weighted sum."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe_jax.config import MoEConfig
from moe_jax.ops.down_combine import down_combine
from moe_jax.ops.emulate import emulate_rows
from moe_jax.ops.gather import gather
from moe_jax.ops.group_tokens import Groups
from moe_jax.ops.grouped_matmul import grouped_matmul
from moe_jax.ops.matmul_and_quantize import matmul_and_quantize
from moe_jax.ops.quantize_rows import quantize_tokens
from moe_jax.quantization.formats import QuantFormat
from moe_jax.quantization.rows import QuantizedRows
from moe_jax.tuning.plan import LayerPlan
from moe_jax.types import ExpertWeights


def gather_rows(
    x: Float[Array, "T H"],
    experts: ExpertWeights,
    groups: Groups,
    config: MoEConfig,
    *,
    implementation: str = "auto",
) -> Float[Array, "rows H"] | QuantizedRows:
    """The hidden states of each row's token as the up-projection takes them, quantized if the number format says so.

    Args:
        x: ``[T, H]``.
        experts: give the scale of a static format.
        groups: from `moe_jax.ops.group_tokens.group_tokens`.
        config: gives the number format.
        implementation: ``auto``, ``xla``, ``mosaic`` or ``mosaic_interpret``.
    """
    form = config.quantization
    if form is None or form.activations is None:
        return gather(x, groups, implementation=implementation)
    scale = largest_scale(experts.w13_input_scale)
    if form.emulates:
        x = emulate_rows(x, form.activations, scale=scale, implementation=implementation)
        return gather(x, groups, implementation=implementation)
    spec = form.activations
    return quantize_tokens(x, spec, groups, scales=scale, implementation=implementation)


def row_multiple(config: MoEConfig) -> int:
    """Of which the first row of a group should be a multiple, see `moe_jax.ops.group_tokens.Groups`.

    Example:
        >>> layer = MoEConfig(num_experts=4, top_k=2, hidden_size=128, intermediate_size=128, quantization="fp8_block")
        >>> row_multiple(layer)
        4
    """
    from moe_jax.kernels.hopper.matmul_fp8 import ROW_MULTIPLE

    form, training = config.quantization, config.fp8_training
    if training is not None and training.contracts_columns and training.scaling == "block":
        return ROW_MULTIPLE
    if form is None or not form.multiplies_codes:
        return 1
    return ROW_MULTIPLE if form.activations.granularity == "group" else 1


def largest_scale(scales: Float[Array, " E_local"] | None) -> Float[Array, ""] | None:
    """One scale that serves all experts: the largest."""
    return None if scales is None else jnp.max(scales)


def up_projection(
    rows: Float[Array, "rows H"] | QuantizedRows,
    experts: ExpertWeights,
    groups: Groups,
    form: QuantFormat | None,
    *,
    valid: Bool[Array, " R"] | None = None,
    **options: Any,
) -> Float[Array, "R I"] | QuantizedRows:
    """The rows that the down-projection takes: through ``w13`` and the activation, quantized if the number format says so.

    Args:
        rows: ``[R, H]``, grouped as `groups` says.
        experts: of this rank.
        groups: of the rows.
        form: the number format, or None.
        valid: the rows that count, where activations are emulated; rows of no group need not be told, see `emulate_rows`.
        **options: of `moe_jax.ops.grouped_matmul.grouped_matmul`.
    """
    if form is None or form.activations is None:
        return grouped_matmul(rows, experts.w13, groups, **options)
    scale = largest_scale(experts.w2_input_scale)
    if form.emulates:
        hidden = grouped_matmul(rows, experts.w13, groups, **options)
        how = {"scale": scale, "valid": valid, "implementation": options["implementation"]}
        return emulate_rows(hidden, form.activations, **how)
    return matmul_and_quantize(rows, experts.w13, groups, form.activations, scales=scale, **options)


def expert_mlp(
    rows: Float[Array, "rows H"] | QuantizedRows,
    experts: ExpertWeights,
    groups: Groups,
    weights: Float[Array, "T k"] | None,
    config: MoEConfig,
    *,
    plan: LayerPlan | None = None,
    implementation: str = "auto",
) -> Float[Array, "T H"]:
    """Each row through its group's expert, and the weighted sum over the rows of a token.

    Args:
        rows: ``[R, H]``, grouped as `groups` says, from `gather_rows`.
        experts: the weights of the local experts.
        groups: from `moe_jax.ops.group_tokens.group_tokens`.
        weights: ``[T, k]``, the router's; None for a plain sum.
        config: gives the activation and the number format.
        plan: how the kernels tile their work, for the row tile of `groups`; their own rule by default.
        implementation: ``auto``, ``xla``, ``mosaic`` or ``mosaic_interpret``.

    Returns:
        ``[T, H]``.
    """
    up, down = (None, None) if plan is None else (plan.up, plan.down)
    options = {
        "bias": experts.w13_bias,
        "activation": config.act,
        "tokens_as_rows": groups.tokens_as_rows,
        "config": up,
        "out_dtype": config.dtype,
        "implementation": implementation,
    }
    hidden = up_projection(rows, experts, groups, config.quantization, **options)
    return down_combine(
        hidden,
        experts.w2,
        groups,
        weights,
        bias=experts.w2_bias,
        config=down,
        out_dtype=config.dtype,
        implementation=implementation,
    )
