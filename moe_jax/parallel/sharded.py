"""The layer over a mesh: route, prepare, experts, finalize, reduce."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from moe_jax import checks
from moe_jax.config import MoEConfig
from moe_jax.moe import shared_expert
from moe_jax.ops.implementation import check_name
from moe_jax.parallel.choice import choose_exchange
from moe_jax.parallel.config import ParallelConfig
from moe_jax.parallel.exchange import Exchange, late_axes, of_rank
from moe_jax.parallel.placement import ExpertPlacement
from moe_jax.parallel.rank_experts import rank_experts
from moe_jax.parallel.weights import checked_placement, spec_of
from moe_jax.routing import route
from moe_jax.tuning.plan import LayerPlan
from moe_jax.types import ExpertWeights, SharedExpertWeights, TopK


def moe_sharded(
    x: Float[Array, "T H"],
    experts: ExpertWeights,
    router_logits: Float[Array, "T E"],
    config: MoEConfig,
    *,
    parallel: ParallelConfig,
    mesh: Mesh | AbstractMesh,
    exchange: Exchange | None = None,
    placement: ExpertPlacement | None = None,
    shared: SharedExpertWeights | None = None,
    num_tokens: Int[Array, " shards"] | None = None,
    correction_bias: Float[Array, " E"] | None = None,
    input_ids: Int[Array, " T"] | None = None,
    hash_indices_table: Int[Array, "V k"] | None = None,
    key: Array | None = None,
    chunks: int = 1,
    plan: LayerPlan | None = None,
    implementation: str = "auto",
) -> Float[Array, "T H"]:
    """`moe_jax.moe` over the devices of a mesh: tokens are split over `parallel.token_axes`, weights over `expert_axes`.

    Args:
        x: ``[T, H]``, the tokens of all ranks one after the other; the number of token shards divides T.
        experts: as `place_experts` gives them.
        router_logits: ``[T, E]``.
        config: the layer.
        parallel: the ranks.
        mesh: with the axes that `parallel` names; others are left alone. Its axes may be automatic or explicit.
        exchange: how tokens reach their experts; by default what `choose_exchange` takes.
        placement: that of the experts.
        shared: the shared expert, as `place_shared` gives it.
        num_tokens: int32, for each shard how many of its T / shards rows are tokens; the outputs of the others are zero.
        correction_bias, input_ids, hash_indices_table, key, plan, implementation: as in `moe_jax.moe`.
        chunks: parts that the tokens of a rank are taken in: the exchange of one can overlap with the experts of another.

    Returns:
        ``[T, H]``, split as x is.

    Raises:
        ValueError: a mesh without these ranks, tokens that cannot be split, weights that are not placed, an exchange that these
            ranks cannot use.

    Example:
        >>> mesh = jax.make_mesh((1,), ("tp",))
        >>> config = MoEConfig(num_experts=4, top_k=2, hidden_size=16, intermediate_size=32, dtype="float32")
        >>> experts = ExpertWeights(w13=jnp.ones((4, 64, 16)), w2=jnp.ones((4, 16, 32)))
        >>> x, logits = jnp.ones((5, 16)), jnp.ones((5, 4))
        >>> moe_sharded(x, experts, logits, config, parallel=ParallelConfig.of_mesh(mesh), mesh=mesh).shape
        (5, 16)
    """
    parallel.check_mesh(mesh)
    if x.shape[0] % parallel.num_token_shards:
        raise ValueError(
            f"x has {x.shape[0]} tokens, which {parallel.num_token_shards} shards over {parallel.token_axes} do not divide; "
            "fill them up and say with num_tokens how many count"
        )
    if exchange is None:
        exchange = choose_exchange(parallel, mesh).exchange
    placement = checked_placement(placement, config, parallel)
    _check_room(experts, config, parallel, placement, parallel.flattened_size)
    tokens, weights, same = spec_of(parallel.token_axes), spec_of(parallel.expert_axes), PartitionSpec()
    operands: dict[str, tuple[Any, PartitionSpec]] = {
        "x": (x, tokens),
        "experts": (experts, weights),
        "router_logits": (router_logits, tokens),
        "placement": (placement, same),
        "shared": (shared, spec_of(late_axes(parallel))),
        "num_tokens": (num_tokens, tokens),
        "correction_bias": (correction_bias, same),
        "input_ids": (input_ids, tokens),
        "hash_indices_table": (hash_indices_table, same),
        "key": (key, same),
    }
    operands = {name: pair for name, pair in operands.items() if pair[0] is not None}
    specs = {name: spec for name, (_, spec) in operands.items()}
    arrays = {name: _on_mesh(array, spec, mesh) for name, (array, spec) in operands.items()}

    options = (config, parallel, exchange, chunks, plan, implementation)
    return _run(arrays, _Specs(mesh, tuple(specs.items()), tokens), options)


class _Specs(NamedTuple):
    mesh: Mesh | AbstractMesh
    operands: tuple[tuple[str, PartitionSpec], ...]
    out: PartitionSpec


@functools.partial(jax.jit, static_argnums=(1, 2))
def _run(arrays: dict[str, Any], specs: _Specs, options: tuple[Any, ...]) -> Array:
    """All ranks; compiled, since outside a jit `jax.shard_map` runs one operation after the other."""
    names = ("config", "parallel", "exchange", "chunks", "plan", "implementation")

    def rank(arrays: dict[str, Any]) -> Array:
        if "num_tokens" in arrays:
            arrays = arrays | {"num_tokens": arrays["num_tokens"][0]}
        return moe_parallel(**arrays, **dict(zip(names, options, strict=True)))

    in_specs = (dict(specs.operands),)
    return jax.shard_map(rank, mesh=specs.mesh, in_specs=in_specs, out_specs=specs.out, check_vma=False)(arrays)


def _on_mesh(tree: Any, spec: PartitionSpec, mesh: Mesh | AbstractMesh) -> Any:
    """The arrays where a mesh with explicit axes wants them; automatic axes move them by themselves."""
    if AxisType.Explicit not in mesh.axis_types:
        return tree
    return jax.tree.map(lambda array: jax.reshard(jnp.asarray(array), NamedSharding(mesh, spec)), tree)


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
    plan: LayerPlan | None = None,
    implementation: str = "auto",
) -> Float[Array, "T H"]:
    """The layer of one rank, inside your own `jax.shard_map` (with ``check_vma=False``, and derivatives taken outside).

    Args:
        x: ``[T, H]``, the tokens of this rank. T is the same on all ranks, and may be 0.
        experts: of this rank: its part of what `place_experts` gives.
        router_logits: ``[T, E]``, of its tokens, over all experts.
        config: the layer.
        parallel: the ranks.
        num_tokens: int32, how many of the T rows are tokens; the outputs of the others are zero.
        exchange, placement, shared, correction_bias, input_ids, hash_indices_table, key, chunks, plan, implementation: as in
            `moe_sharded`.

    Returns:
        ``[T, H]``, the whole layer for the tokens of this rank.
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
    plan: LayerPlan | None = None,
    implementation: str = "auto",
) -> Float[Array, "T H"]:
    """`moe_parallel` after routing, as `moe_jax.apply_experts` is `moe_jax.moe` after routing; `topk` has global ids."""
    exchange = exchange or choose_exchange(parallel).exchange
    placement = checked_placement(placement, config, parallel)
    expert_map = None if placement is None else jnp.asarray(placement.expert_map)
    local = _of_rank(experts, config, parallel)
    scale = None if local.w13_input_scale is None else jnp.max(local.w13_input_scale)
    rank_config = of_rank(config, local)
    _check_room(local, config, parallel, placement, ranks=1)
    checks.check_layer(x, local, rank_config, None if expert_map is None else expert_map[0])
    if x.shape[0] == 0:  # on all ranks
        return jnp.zeros(x.shape, config.dtype)
    chunks = min(chunks, x.shape[0])
    starts = [x.shape[0] * i // chunks for i in range(chunks + 1)]

    prepared = []
    for start, stop in zip(starts, starts[1:], strict=False):
        count = None if num_tokens is None else jnp.clip(num_tokens - start, 0, stop - start)
        part = TopK(topk.ids[start:stop], topk.weights[start:stop])
        options = {"input_scale": scale, "implementation": implementation}
        prepared.append(exchange.prepare(x[start:stop], part, config, parallel, expert_map, count, **options))
    outputs = []
    for one in prepared:
        y = rank_experts(one, local, rank_config, plan=plan, implementation=implementation)
        outputs.append(exchange.finalize(y, one))
    out = outputs[0] if chunks == 1 else jnp.concatenate(outputs)
    return _with_shared(out, x, shared, config, exchange.output_is_reduced, late_axes(parallel), num_tokens)


def _check_room(
    experts: ExpertWeights, config: MoEConfig, parallel: ParallelConfig, placement: ExpertPlacement | None, ranks: int
) -> None:
    """Refuses weights that are not those of so many ranks, as `place_experts` gives them."""
    room = config.num_experts if placement is None else placement.max_local_experts
    parts, columns = parallel.experts_tp_size, experts.w2.shape[-1]
    if experts.num_local_experts != ranks * room or columns * parts < config.intermediate_size:
        raise ValueError(
            f"the weights of {ranks} ranks hold {experts.num_local_experts} experts, with {columns} columns of w2, but each has "
            f"room for {room} of num_experts={config.num_experts}, and {parts} ranks share intermediate_size="
            f"{config.intermediate_size}; bring them into the order of ranks with place_experts(experts, config, parallel)"
        )


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
    y = shared_expert(x, shared, config)
    if num_tokens is not None:
        y = jnp.where((jnp.arange(x.shape[0]) < num_tokens)[:, None], y, 0)
    return out + reduce(y) if is_reduced else reduce(out + y)
