"""The layer over the devices of a mesh."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from moe_jax.config import MoEConfig
from moe_jax.parallel.choice import choose_exchange
from moe_jax.parallel.config import ParallelConfig
from moe_jax.parallel.exchange import Exchange, late_axes
from moe_jax.parallel.layer import moe_parallel
from moe_jax.parallel.placement import ExpertPlacement
from moe_jax.parallel.weights import check_room, checked_placement, spec_of
from moe_jax.tuning.plan import LayerPlan
from moe_jax.types import ExpertWeights, SharedExpertWeights


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
    return_dropped: bool = False,
    plan: LayerPlan | None = None,
    implementation: str = "auto",
) -> Float[Array, "T H"] | tuple[Array, Array]:
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
        chunks: parts that the tokens of a rank are taken in: the exchange of one can overlap with the experts of another. Experts
            then have fewer rows at a time and read their weights once more: on two H100s over NVLink, 4096 tokens a rank of
            DeepSeek-V3's shape in FP8, two chunks take 5.74 ms instead of 4.41, of which 0.33 were the exchange
            (benchmarks/results/2026-11-27-h100x2-exchange-chunks.json). It may pay where the exchange takes longer.
        return_dropped: also return how many (token, slot) pairs of all ranks were dropped: an int32 scalar, zero but for
            `Batched` with ``overflow="drop"``.

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
        exchange = choose_exchange(parallel, mesh, config, implementation).exchange
    placement = checked_placement(placement, config, parallel)
    check_room(experts, config, parallel, placement, parallel.flattened_size)
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

    out = (tokens, PartitionSpec()) if return_dropped else tokens
    options = (config, parallel, exchange, chunks, return_dropped, plan, implementation)
    return _run(arrays, _Specs(mesh, tuple(specs.items()), out), options)


class _Specs(NamedTuple):
    mesh: Mesh | AbstractMesh
    operands: tuple[tuple[str, PartitionSpec], ...]
    out: PartitionSpec | tuple[PartitionSpec, PartitionSpec]


@functools.partial(jax.jit, static_argnums=(1, 2))
def _run(arrays: dict[str, Any], specs: _Specs, options: tuple[Any, ...]) -> Any:
    """All ranks; compiled, since outside a jit `jax.shard_map` runs one operation after the other."""
    names = ("config", "parallel", "exchange", "chunks", "return_dropped", "plan", "implementation")

    def rank(arrays: dict[str, Any]) -> Any:
        if "num_tokens" in arrays:
            arrays = arrays | {"num_tokens": arrays["num_tokens"][0]}
        return moe_parallel(**arrays, **dict(zip(names, options, strict=True)))

    in_specs = (dict(specs.operands),)
    return jax.shard_map(rank, mesh=specs.mesh, in_specs=in_specs, out_specs=specs.out, check_vma=False)(arrays)


def _on_mesh(tree: Any, spec: PartitionSpec, mesh: Mesh | AbstractMesh) -> Any:
    """The arrays as a mesh with explicit axes wants them; along automatic axes they move by themselves."""
    explicit = {axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit}
    if not explicit:
        return tree
    axes = [axis for names in spec for axis in ((names,) if isinstance(names, str) else names) if axis in explicit]
    sharding = NamedSharding(mesh, spec_of(tuple(axes)))
    return jax.tree.map(lambda array: jax.reshard(jnp.asarray(array), sharding), tree)
