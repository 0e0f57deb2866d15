"""The expert MLP on grouped rows: up-projection, activation, down-projection, weighted sum."""

from __future__ import annotations

from jaxtyping import Array, Float

from moe_jax.config import MoEConfig
from moe_jax.ops.down_combine import down_combine
from moe_jax.ops.group_tokens import Groups
from moe_jax.ops.grouped_matmul import grouped_matmul
from moe_jax.tuning.plan import LayerPlan
from moe_jax.types import ExpertWeights


def expert_mlp(
    rows: Float[Array, "rows H"],
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
        rows: ``[R, H]``, grouped as `groups` says, from `moe_jax.ops.gather.gather`.
        experts: the weights of the local experts.
        groups: from `moe_jax.ops.group_tokens.group_tokens`.
        weights: ``[T, k]``, the router's; None for a plain sum.
        config: gives the activation.
        plan: how the kernels tile their work, for the row tile of `groups`; their own rule by default.
        implementation: ``auto``, ``xla``, ``mosaic`` or ``mosaic_interpret``.

    Returns:
        ``[T, H]``.
    """
    up, down = (None, None) if plan is None else (plan.up, plan.down)
    hidden = grouped_matmul(
        rows,
        experts.w13,
        groups,
        bias=experts.w13_bias,
        activation=config.act,
        tokens_as_rows=groups.tokens_as_rows,
        config=up,
        implementation=implementation,
    )
    return down_combine(
        hidden, experts.w2, groups, weights, bias=experts.w2_bias, config=down, implementation=implementation
    )
