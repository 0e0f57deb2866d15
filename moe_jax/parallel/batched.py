"""The batched format: for each local expert the same room for rows, and how many it has."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.config import MoEConfig
from moe_jax.expert_gradient import with_gradient
from moe_jax.experts import up_projection
from moe_jax.moe import layer_plan
from moe_jax.ops.combine import combine
from moe_jax.ops.emulate import emulate_rows
from moe_jax.ops.gather import gather
from moe_jax.ops.group_tokens import Groups, group_tokens, max_tiles, tile_schedule
from moe_jax.ops.grouped_matmul import grouped_matmul
from moe_jax.ops.quantize_rows import quantize_tokens
from moe_jax.parallel.config import ParallelConfig
from moe_jax.parallel.exchange import Exchange, Prepared
from moe_jax.parallel.gather_scatter import AllGatherReduceScatter
from moe_jax.parallel.rank_experts import gather_codes
from moe_jax.parallel.tokens import QuantizedTokens
from moe_jax.quantization.rows import QuantizedRows
from moe_jax.tuning.plan import LayerPlan
from moe_jax.types import ExpertWeights, TopK

OVERFLOW = ("error", "drop")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PreparedRows:
    """Rows of the local experts.

    Attributes:
        rows: ``[E_local, max_tokens, H]``, one for each (token, slot) whose expert lives here, in the order of tokens; as
            `QuantizedRows` those of one expert after the other. Undefined from the count on.
        counts: int32 ``[E_local]``.
        positions: int32 ``[M, k]``, the row of each pair, ``expert * max_tokens + place``; -1 for none.
        dropped: int32 ``[]``, pairs for which an expert had no room.
        inner: what was brought here.
    """

    rows: Float[Array, "E_local max_tokens H"] | QuantizedRows | Any
    counts: Int[Array, " E_local"] | Any
    positions: Int[Array, "M k"] | Any
    dropped: Int[Array, ""] | Any
    inner: Prepared = field(default=None)


@dataclass(frozen=True)
class Batched(Exchange):
    """Another exchange, whose tokens are then laid out for each local expert: ``[E_local, max_tokens, H]`` with counts.

    A matmul over them reads no row past the count.

    Attributes:
        inner: brings the tokens; it may quantize them before.
        max_tokens: room of an expert, a multiple of 8.
        overflow: ``error``: refuse a room that could be too small for some routing; ``drop``: the rows of the later tokens of an
            expert that has no room for them are left out, exactly, and counted, see `PreparedRows.dropped`.

    Raises:
        ValueError: another overflow policy, a room that is none.

    Example:
        >>> Batched(AllGatherReduceScatter(), max_tokens=64, overflow="drop").activation_format
        'batched'
    """

    inner: Exchange = AllGatherReduceScatter()
    max_tokens: int = 8
    overflow: str = "error"
    activation_format: ClassVar[str] = "batched"

    def __post_init__(self) -> None:
        if self.overflow not in OVERFLOW:
            raise ValueError(f"overflow={self.overflow!r} must be one of {', '.join(OVERFLOW)}")
        if self.max_tokens < 8 or self.max_tokens % 8:
            raise ValueError(f"max_tokens={self.max_tokens} must be a positive multiple of 8; round it up")
        if self.quantize_before:
            raise ValueError(
                "quantize_before=True belongs to the exchange inside: Batched(AllToAll(quantize_before=True), ...)"
            )

    @property
    def output_is_reduced(self) -> bool:
        """As the exchange inside."""
        return self.inner.output_is_reduced

    def reason_against(self, parallel: ParallelConfig) -> str | None:
        """As the exchange inside."""
        return self.inner.reason_against(parallel)

    def prepare(
        self,
        x: Float[Array, "T H"],
        topk: TopK,
        config: MoEConfig,
        parallel: ParallelConfig,
        expert_map: Int[Array, "ep E"] | None,
        num_tokens: Int[Array, ""] | None = None,
        *,
        num_local_experts: int | None = None,
        input_scale: Float[Array, ""] | None = None,
        implementation: str = "auto",
    ) -> PreparedRows:
        """The rows of the local experts; arguments as in `Exchange.prepare`.

        Raises:
            ValueError: a room that could be too small, with ``overflow="error"``; a format with one scale taken from all
                rows; `num_local_experts` missing.
        """
        spec = None if config.quantization is None else config.quantization.activations
        if spec is not None and spec.granularity == "tensor" and not spec.static:
            raise ValueError(
                f"format {config.quantization.name!r} takes one scale from all rows, but between those of a batch are others; "
                "use a format with static scales or with a scale a token, or an exchange of the standard format"
            )
        options = {"input_scale": input_scale, "implementation": implementation}
        inner = self.inner.prepare(x, topk, config, parallel, expert_map, num_tokens, **options)
        local = config.num_experts if expert_map is None else num_local_experts
        if local is None:
            raise ValueError("num_local_experts is missing: how many experts a rank has room for")
        self._check_room(inner.topk.ids.shape, config)
        groups, dropped = self._groups(inner, config, local, implementation)
        if isinstance(inner.x, QuantizedTokens):
            rows = gather_codes(inner.x, groups, implementation)
        elif spec is not None and not config.quantization.emulates:
            rows = quantize_tokens(inner.x, spec, groups, scales=input_scale, implementation=implementation)
        else:
            x = inner.x
            if spec is not None:
                x = emulate_rows(x, spec, scale=input_scale, implementation=implementation)
            rows = gather(x, groups, implementation=implementation).reshape(local, self.max_tokens, -1)
        return PreparedRows(rows, groups.group_sizes, groups.positions, dropped, inner)

    def _check_room(self, pairs: tuple[int, int], config: MoEConfig) -> None:
        """Where ids of a token may repeat, all its slots may be of one expert."""
        tokens, top_k = pairs
        most = tokens * (top_k if config.routing.rule is None else 1)
        if self.overflow == "error" and most > self.max_tokens:
            raise ValueError(
                f"max_tokens={self.max_tokens} is too small for a routing that sends all {tokens} tokens, {most} rows, to one "
                "expert; raise it, or set overflow='drop'"
            )

    def _groups(self, inner: Prepared, config: MoEConfig, local: int, implementation: str) -> tuple[Groups, Array]:
        """Where each pair's row lies, and how many have none. Only places and sizes count: there are no tiles yet."""
        packed = group_tokens(
            inner.topk.ids,
            num_experts=config.num_experts,
            num_local_experts=local,
            expert_map=inner.expert_map,
            implementation=implementation,
        )
        sizes = packed.group_sizes
        starts = jnp.cumsum(sizes, dtype=jnp.int32) - sizes
        ids = jnp.clip(inner.topk.ids, 0, config.num_experts - 1)
        expert = ids if inner.expert_map is None else inner.expert_map[ids]
        place = packed.positions - starts[expert]
        has_room = (packed.positions >= 0) & (place < self.max_tokens)
        positions = jnp.where(has_room, expert * self.max_tokens + place, -1).astype(jnp.int32)
        counts = jnp.minimum(sizes, self.max_tokens)
        total = local * self.max_tokens
        groups = dataclasses.replace(packed, positions=positions, group_sizes=counts, total_rows=total)
        return groups, jnp.sum(sizes - counts, dtype=jnp.int32)

    def finalize(self, y: Float[Array, "E_local max_tokens H"], prepared: PreparedRows) -> Float[Array, "T H"]:
        """The weighted sum of a token's rows, and on from there as the exchange inside."""
        weights = prepared.inner.topk.weights
        return self.inner.finalize(combine(y.reshape(-1, y.shape[-1]), prepared.positions, weights), prepared.inner)


def batch_groups(
    counts: Int[Array, " E_local"], max_tokens: int, tile_rows: int, num_pairs: int | None = None
) -> Groups:
    """The schedule of a grouped matmul over rows ``[E_local * max_tokens, H]``, of which each expert has its count.

    Args:
        counts: int32 ``[E_local]``.
        max_tokens: room of an expert, a multiple of 8.
        tile_rows: the most rows of a tile.
        num_pairs: the most rows of all experts together, if that is known.

    Example:
        >>> groups = batch_groups(jnp.array([3, 0, 1]), max_tokens=8, tile_rows=8)
        >>> groups.tile_group.tolist(), groups.tile_starts.tolist(), groups.tile_sizes.tolist()
        ([0, 2, -1], [0, 16, 0], [3, 1, 0])
    """
    experts = counts.shape[0]
    tiles = experts * -(-max_tokens // tile_rows)
    if num_pairs is not None:
        tiles = min(tiles, max_tiles(num_pairs, experts, tile_rows))
    starts = jnp.arange(experts, dtype=jnp.int32) * max_tokens
    row = jnp.arange(experts * max_tokens, dtype=jnp.int32)
    positions = jnp.where(row % max_tokens < jnp.repeat(counts, max_tokens), row, -1)[:, None]
    found = positions, *tile_schedule(counts, starts, tile_rows, tiles)
    return dataclasses.replace(Groups.of(found, tile_rows, row_multiple=8), total_rows=row.size)


def batched_experts(
    prepared: PreparedRows,
    experts: ExpertWeights,
    config: MoEConfig,
    *,
    plan: LayerPlan | None = None,
    implementation: str = "auto",
) -> Float[Array, "E_local max_tokens H"]:
    """Each row through its expert; undefined from the counts on.

    Args:
        prepared: rows as they are, or quantized.
        experts: of this rank.
        config: the layer as the rank sees it, see `moe_jax.parallel.exchange.of_rank`.
        plan: as in `moe_jax.moe`.
        implementation: ``auto``, ``xla``, ``mosaic`` or ``mosaic_interpret``.
    """
    tokens, pairs = prepared.positions.shape[0], prepared.positions.size
    plan = plan or layer_plan(tokens, experts, config, implementation)
    local = experts.num_local_experts
    hidden_size = experts.w2.shape[1]
    rows = prepared.rows if isinstance(prepared.rows, QuantizedRows) else prepared.rows.reshape(-1, hidden_size)
    max_tokens = rows.shape[0] // local
    tile_rows = min(64, max_tokens) if plan is None else plan.tile_rows
    groups = batch_groups(prepared.counts, max_tokens, tile_rows, pairs)
    plan = plan if plan is None else plan.for_tile_rows(tile_rows)
    options = {"out_dtype": config.dtype, "implementation": implementation}

    def layer(rows: Any, experts: ExpertWeights, groups: Groups, weights: None) -> Array:
        up = {
            "bias": experts.w13_bias,
            "activation": config.act,
            "config": None if plan is None else dataclasses.replace(plan.up, gather=False),
            **options,
        }
        hidden = up_projection(rows, experts, groups, config.quantization, valid=groups.positions[:, 0] >= 0, **up)
        down = None if plan is None else plan.down
        return grouped_matmul(hidden, experts.w2, groups, bias=experts.w2_bias, config=down, **options)

    if config.fp8_training is not None and config.fp8_training.anything:  # each row is a token with one expert
        layer = with_gradient(layer, config, implementation=implementation)
    return layer(rows, experts, groups, None).reshape(local, max_tokens, hidden_size)
