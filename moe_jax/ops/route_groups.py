"""Routing and grouping together: on a GPU what grouping has to count is counted while the tokens are routed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.ops import implementation as impl
from moe_jax.ops import topk as plain_topk
from moe_jax.ops.group_tokens import Groups, check_row_multiple, default_tile_rows, group_tokens, max_tiles
from moe_jax.routing_methods import RoutingRule
from moe_jax.types import TopK

SHARED_ROWS = 16  # so many tokens at most may share the tiles of all experts


def shared_tile_rows(num_tokens: int) -> int:
    """Rows of the tiles that multiply all of a few tokens: the least that the matrix unit takes.

    Example:
        >>> shared_tile_rows(3), shared_tile_rows(9)
        (8, 16)
    """
    return 8 if num_tokens <= 8 else SHARED_ROWS


def route_groups(
    router_logits: Float[Array, "T E"],
    top_k: int,
    rule: RoutingRule,
    *,
    correction_bias: Float[Array, " E"] | None = None,
    num_local_experts: int | None = None,
    expert_map: Int[Array, " E"] | None = None,
    tile_rows: int | None = None,
    share_rows: bool = False,
    row_tokens: bool = False,
    row_multiple: int = 1,
    implementation: str = "auto",
) -> tuple[TopK, Groups]:
    """`topk`, then `group_tokens` of its ids, in two launches where both have a kernel, in one with `share_rows`.

    Args:
        router_logits: ``[T, E]``, as in `topk`.
        top_k: experts per token.
        rule: how experts are scored, selected and weighted.
        correction_bias: ``[E]``, added to the scores for the selection only.
        num_local_experts: E_local; E by default.
        expert_map: int32 ``[E]``, global to local id, -1 for experts that live elsewhere; needed if E_local is not E.
        tile_rows: rows of a tile; `default_tile_rows` by default, `shared_tile_rows` with shared rows.
        share_rows: for at most 16 tokens, and where the kernel runs: let every expert visited multiply all tokens and keep
            the rows of its own (`Groups.tile_tokens`).
        row_tokens: where the kernel runs, and not with shared rows: also give `Groups.row_tokens`.
        row_multiple: see `Groups.row_multiple`; where rows are shared it is 1.
        implementation: ``auto``, ``xla``, ``mosaic`` or ``mosaic_interpret``.

    Example:
        >>> from moe_jax.config import RoutingConfig
        >>> topk, groups = route_groups(jnp.array([[0.0, 2.0, 1.0]]), 2, RoutingConfig("default").rule, tile_rows=2)
        >>> topk.ids.tolist(), groups.positions.tolist()
        ([[1, 2]], [[0, 1]])
    """
    from moe_jax.kernels.hopper import group_tokens as grouping
    from moe_jax.kernels.hopper import topk as routing

    check_row_multiple(row_multiple, row_tokens)
    tokens, num_experts = router_logits.shape
    num_local = num_experts if num_local_experts is None else num_local_experts
    if expert_map is None and num_local != num_experts:
        raise ValueError(f"num_local_experts={num_local} of num_experts={num_experts}: say which in expert_map")
    reason = routing.supports(router_logits, top_k, rule)
    reason = reason or grouping.supports(num_experts, num_local, tokens * top_k)
    if tokens == 0 or reason is not None or impl.choose("route_groups", implementation, None) == "xla":
        topk = plain_topk.topk(
            router_logits, top_k, rule, correction_bias=correction_bias, implementation=implementation
        )
        return topk, group_tokens(
            topk.ids,
            num_experts=num_experts,
            num_local_experts=num_local,
            expert_map=expert_map,
            tile_rows=tile_rows,
            row_tokens=row_tokens,
            row_multiple=row_multiple,
            implementation=implementation,
        )

    chosen = impl.choose("route_groups", implementation, None)
    interpret = impl.interpret_params(chosen)
    expert_map = None if expert_map is None else expert_map.astype(jnp.int32)
    share = share_rows and tokens <= SHARED_ROWS
    if share:
        tile_rows = shared_tile_rows(tokens)
        tiles = min(tokens * top_k, num_local)
    else:
        tile_rows = tile_rows or default_tile_rows(tokens * top_k, num_local, chosen)
        tiles = max_tiles(tokens * top_k, num_local, tile_rows)

    def run(logits, bias, expert_map):
        wanted = routing.Share(num_local, expert_map, tiles) if share else routing.Count(num_local, expert_map)
        return routing.topk(logits, top_k, rule, bias, grouping=wanted, interpret=interpret)

    def plain(logits, bias, expert_map):
        ids, weights = plain_topk.plain(logits, bias, top_k=top_k, rule=rule)
        _, _, *counted = jax.eval_shape(run, logits, bias, expert_map)
        return ids, weights, *(jnp.zeros(c.shape, c.dtype) for c in counted)  # integers: without derivative

    operands = (router_logits, correction_bias, expert_map)
    ids, weights, *counted = impl.with_plain_gradient(run, plain)(*operands)
    if share:
        positions, tile_group, tile_starts, tile_sizes, tile_tokens, sizes, num_tiles = counted
        groups = Groups(
            positions,
            tile_group,
            tile_starts,
            tile_sizes,
            sizes[:num_local],
            num_tiles,
            tile_rows=tile_rows,
            tile_tokens=tile_tokens,
        )
        return TopK(ids, weights), groups
    counted_tokens = routing.ROWS * routing.Count(num_local).warpgroups(tokens, num_experts)
    positions, *rest = grouping.place_pairs(
        *counted,
        num_local,
        tile_rows,
        tiles,
        tile_tokens=counted_tokens,
        row_tokens=row_tokens,
        row_multiple=row_multiple,
        interpret=interpret,
    )
    return TopK(ids, weights), Groups.of((positions.reshape(tokens, top_k), *rest), tile_rows, row_multiple)
