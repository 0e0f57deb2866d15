"""The experts of a rank, on what an exchange has brought there."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from moe_jax import checks
from moe_jax.config import MoEConfig
from moe_jax.experts import expert_mlp, row_multiple
from moe_jax.moe import apply_experts, layer_plan
from moe_jax.ops.gather import gather, plain_gather
from moe_jax.ops.group_tokens import Groups, group_tokens
from moe_jax.parallel.exchange import Prepared
from moe_jax.parallel.tokens import QuantizedTokens
from moe_jax.quantization.rows import QuantizedRows
from moe_jax.tuning.plan import LayerPlan
from moe_jax.types import ExpertWeights


def rank_experts(
    prepared: Prepared,
    experts: ExpertWeights,
    config: MoEConfig,
    *,
    plan: LayerPlan | None = None,
    implementation: str = "auto",
) -> Float[Array, "M H"]:
    """For each token that is here the weighted sum over those of its experts that live here; zero if none does.

    Args:
        prepared: tokens as they are, or quantized already.
        experts: of this rank.
        config: the layer as the rank sees it, see `moe_jax.parallel.exchange.of_rank`.
        plan: as in `moe_jax.moe`.
        implementation: ``auto``, ``xla``, ``mosaic`` or ``mosaic_interpret``.
    """
    x, topk = prepared.x, prepared.topk
    if not isinstance(x, QuantizedTokens):
        options = {"expert_map": prepared.expert_map, "plan": plan, "implementation": implementation}
        return apply_experts(x, experts, topk, config, **options)
    checks.check_topk(x.values, topk, config)
    plan = plan or layer_plan(x.shape[0], experts, config, implementation)
    groups = group_tokens(
        topk.ids,
        num_experts=config.num_experts,
        num_local_experts=experts.num_local_experts,
        expert_map=prepared.expert_map,
        tile_rows=None if plan is None else plan.tile_rows,
        row_multiple=1 if plan is None else row_multiple(config),
        implementation=implementation,
    )
    plan = plan if plan is None else plan.for_tile_rows(groups.tile_rows)
    rows = gather_codes(x, groups, implementation)
    return expert_mlp(rows, experts, groups, topk.weights, config, plan=plan, implementation=implementation)


def gather_codes(tokens: QuantizedTokens, groups: Groups, implementation: str) -> QuantizedRows:
    """The codes and scales of each row's token; undefined on a GPU for rows without one."""
    from moe_jax.kernels.hopper.gather_quantize import scales_shape

    values = tokens.values
    hidden = values.shape[1]
    if hidden % 2 == 0:  # bytes are copied two at a time, as one number
        pairs = lax.bitcast_convert_type(values.reshape(-1, hidden // 2, 2), jnp.bfloat16)
        rows = gather(pairs, groups, implementation=implementation)
        rows = lax.bitcast_convert_type(rows, values.dtype).reshape(-1, hidden)
    else:
        rows = plain_gather(values, groups.positions, groups.num_rows)
    lines, length = scales_shape(groups.num_rows, hidden, tokens.spec)
    if tokens.scales.ndim == 0:
        scales = jnp.broadcast_to(tokens.scales, (lines, length))
    else:
        scales = plain_gather(tokens.scales, groups.positions, length).T
    return QuantizedRows(rows, scales, tokens.spec)
