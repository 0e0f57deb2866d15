"""The layer of one rank: route, prepare, experts, finalize, reduce."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from moe_jax import checks
from moe_jax.config import MoEConfig
from moe_jax.moe import shared_expert
from moe_jax.ops.implementation import check_name
from moe_jax.parallel.batched import PreparedRows, batched_experts
from moe_jax.parallel.choice import choose_exchange
from moe_jax.parallel.config import ParallelConfig
from moe_jax.parallel.exchange import Exchange, Prepared, late_axes, of_rank, rows_of_tokens
from moe_jax.parallel.placement import ExpertPlacement
from moe_jax.parallel.rank_experts import rank_experts
from moe_jax.parallel.weights import check_room, checked_placement
from moe_jax.routing import route
from moe_jax.tuning.plan import LayerPlan
from moe_jax.types import ExpertWeights, SharedExpertWeights, TopK


def moe_parallel(
    x: Float[Array, "T H"],
    experts: ExpertWeights,
    router_logits: Float[Array, "T E"],
    config: MoEConfig,
    *,
    parallel: ParallelConfig,
    exchange: Exchange | None = None,
    placement: ExpertPlacement | None = None,
    shared: SharedExpertWeights | None = None,
    num_tokens: Int[Array, ""] | None = None,
    correction_bias: Float[Array, " E"] | None = None,
    input_ids: Int[Array, " T"] | None = None,
    hash_indices_table: Int[Array, "V k"] | None = None,
    key: Array | None = None,
    chunks: int = 1,
    return_dropped: bool = False,
    plan: LayerPlan | None = None,
    implementation: str = "auto",
) -> Float[Array, "T H"] | tuple[Array, Array]:
    """The layer of one rank, inside your own `jax.shard_map` (with ``check_vma=False``, and derivatives taken outside).

    Args:
        x: ``[T, H]``, the tokens of this rank. T is the same on all ranks, and may be 0.
        experts: of this rank: its part of what `place_experts` gives.
        router_logits: ``[T, E]``, of its tokens, over all experts.
        config: the layer.
        parallel: the ranks.
        num_tokens: int32, how many of the T rows are tokens; the outputs of the others are zero.
        exchange, placement, shared, correction_bias, input_ids, hash_indices_table, key, chunks, return_dropped, plan,
            implementation: as in `moe_sharded`.

    Returns:
        ``[T, H]``, the whole layer for the tokens of this rank; with `return_dropped` also the number of dropped pairs.
    """
    check_name(implementation)
    if key is not None and parallel.token_axes:
        key = jax.random.fold_in(key, lax.axis_index(parallel.token_axes))
    topk = route(
        router_logits,
        config,
        correction_bias=correction_bias,
        hidden_states=x,
        input_ids=input_ids,
        hash_indices_table=hash_indices_table,
        key=key,
        implementation=implementation,
    )
    return apply_experts_parallel(
        x,
        experts,
        topk,
        config,
        parallel=parallel,
        exchange=exchange,
        placement=placement,
        shared=shared,
        num_tokens=num_tokens,
        chunks=chunks,
        return_dropped=return_dropped,
        plan=plan,
        implementation=implementation,
    )


def apply_experts_parallel(
    x: Float[Array, "T H"],
    experts: ExpertWeights,
    topk: TopK,
    config: MoEConfig,
    *,
    parallel: ParallelConfig,
    exchange: Exchange | None = None,
    placement: ExpertPlacement | None = None,
    shared: SharedExpertWeights | None = None,
    num_tokens: Int[Array, ""] | None = None,
    chunks: int = 1,
    return_dropped: bool = False,
    plan: LayerPlan | None = None,
    implementation: str = "auto",
) -> Float[Array, "T H"] | tuple[Array, Array]:
    """`moe_parallel` after routing, as `moe_jax.apply_experts` is `moe_jax.moe` after routing; `topk` has global ids."""
    exchange = exchange or choose_exchange(parallel, None, config, implementation).exchange
    placement = checked_placement(placement, config, parallel)
    expert_map = None if placement is None else jnp.asarray(placement.expert_map)
    local = _of_rank(experts, config, parallel)
    scale = None if local.w13_input_scale is None else jnp.max(local.w13_input_scale)
    rank_config = of_rank(config, local)
    check_room(local, config, parallel, placement, ranks=1)
    checks.check_layer(x, local, rank_config, None if expert_map is None else expert_map[0])
    checks.check_topk(x, topk, config)
    if x.shape[0] == 0:  # on all ranks
        out = jnp.zeros(x.shape, config.dtype)
        return (out, jnp.int32(0)) if return_dropped else out
    chunks = min(chunks, x.shape[0])
    starts = [x.shape[0] * i // chunks for i in range(chunks + 1)]

    run = batched_experts if exchange.activation_format == "batched" else rank_experts
    prepared = []
    for start, stop in zip(starts, starts[1:], strict=False):
        count = None if num_tokens is None else jnp.clip(num_tokens - start, 0, stop - start)
        part = TopK(topk.ids[start:stop], topk.weights[start:stop])
        options = {"input_scale": scale, "implementation": implementation, "num_local_experts": local.num_local_experts}
        prepared.append(exchange.prepare(x[start:stop], part, config, parallel, expert_map, count, **options))
    outputs = []
    for one in prepared:
        y = run(one, local, rank_config, plan=plan, implementation=implementation)
        outputs.append(exchange.finalize(y, one))
    out = outputs[0] if chunks == 1 else jnp.concatenate(outputs)
    out = _with_shared(out, x, shared, config, exchange.output_is_reduced, late_axes(parallel), num_tokens)
    return (out, _dropped(prepared, parallel)) if return_dropped else out


def _dropped(prepared: list[Prepared | PreparedRows], parallel: ParallelConfig) -> Array:
    """Pairs without room, of all ranks together; those that share every expert have the same."""
    here = sum((one.dropped for one in prepared if isinstance(one, PreparedRows)), start=jnp.int32(0))
    if not parallel.expert_axes:
        return here
    return lax.psum(here, parallel.expert_axes) // parallel.experts_tp_size


def _of_rank(experts: ExpertWeights, config: MoEConfig, parallel: ParallelConfig) -> ExpertWeights:
    """The weights, with the bias of the down-projection on one rank of those that share an expert."""
    if experts.w2_bias is None or parallel.experts_tp_size == 1:
        return experts
    return dataclasses.replace(experts, w2_bias=jnp.where(parallel.rank() == 0, experts.w2_bias, 0))


def _with_shared(
    out: Array,
    x: Array,
    shared: SharedExpertWeights | None,
    config: MoEConfig,
    is_reduced: bool,
    axes: tuple[str, ...],
    num_tokens: Array | None,
) -> Array:
    """The whole layer of partial sums: one reduce for the experts and the shared one, if both need it."""

    def reduce(y: Array) -> Array:
        return lax.psum(y, axes) if axes else y

    if shared is None:
        return out if is_reduced else reduce(out)
    y = shared_expert(rows_of_tokens(x, num_tokens), shared, config)  # without biases: of zeros it is zero
    return out + reduce(y) if is_reduced else reduce(out + y)
