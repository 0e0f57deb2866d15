"""Grouping: (token, slot) pairs sorted by local expert, every group padded to whole row tiles, and the schedule of the tiles."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from moe_jax.ops import implementation as impl


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Groups:
    """Where the rows of each local expert lie, and which tile belongs to which expert.

    Groups follow one another; each starts at a multiple of `tile_rows`, so that a tile of `tile_rows` rows belongs to one
    group. A group that needs several tiles is spread evenly over them, in shares of a multiple of 8 rows: no tile is left
    with a few rows for which all weights would be read again. Rows of a group keep token order.
    R = tiles * tile_rows is the largest number of rows that any routing can need.

    Attributes:
        positions: int32 ``[T, k]``, the row of each pair; -1 for a pair without a local expert.
        row_token: int32 ``[R]``, the token of each row; undefined for padding.
        tile_group: int32 ``[tiles]``, the local expert of each tile; -1 for the tiles after the last.
        tile_sizes: int32 ``[tiles]``, rows of each tile without padding; they come first in the tile.
        group_sizes: int32 ``[E_local]``, rows of each local expert, without padding.
        num_tiles: int32 ``[1]``, tiles that hold rows; they come first.
        tile_rows: rows of a tile (static).
        shared_rows: every tile holds all tokens, in order: the hidden states themselves are its rows, and nothing is gathered
            (static; only for few tokens, see `moe_jax.ops.route_groups`).
    """

    positions: Int[Array, "T k"]
    row_token: Int[Array, " R"]
    tile_group: Int[Array, " tiles"]
    tile_sizes: Int[Array, " tiles"]
    group_sizes: Int[Array, " E_local"]
    num_tiles: Int[Array, "1"]
    tile_rows: int = field(metadata={"static": True})
    shared_rows: bool = field(default=False, metadata={"static": True})

    @property
    def num_rows(self) -> int:
        """R."""
        return self.tile_group.shape[0] * self.tile_rows


def max_tiles(num_pairs: int, num_local_experts: int, tile_rows: int) -> int:
    """The most tiles that any routing of `num_pairs` pairs can need.

    Each of the experts visited can leave one tile nearly empty; the remaining pairs fill whole tiles.

    Example:
        >>> max_tiles(num_pairs=10, num_local_experts=4, tile_rows=4)
        5
    """
    visited = min(num_pairs, num_local_experts)
    return visited + (num_pairs - visited) // tile_rows


def default_tile_rows(num_pairs: int, num_local_experts: int, chosen: str) -> int:
    """Rows of a tile for a problem: near the mean group, as coarse as the implementation likes.

    It depends on shapes only, never on the routing.

    Example:
        >>> default_tile_rows(num_pairs=32768, num_local_experts=128, chosen="mosaic")
        160
    """
    mean = num_pairs / max(1, num_local_experts)
    if chosen == "xla":
        return min(128, max(8, 1 << max(0, round(mean) - 1).bit_length()))
    from moe_jax.kernels.hopper.matmul_bf16 import tile_rows_for

    return tile_rows_for(mean)


def offset_map(num_experts: int, num_local_experts: int, group_offset: int | Array) -> Int[Array, " E"]:
    """The expert map of a rank that owns `num_local_experts` neighbours from `group_offset` on.

    Example:
        >>> offset_map(4, 2, 1).tolist()
        [-1, 0, 1, -1]
    """
    local = jnp.arange(num_experts, dtype=jnp.int32) - jnp.asarray(group_offset, jnp.int32)
    return jnp.where((local >= 0) & (local < num_local_experts), local, -1)


def group_tokens(
    topk_ids: Int[Array, "T k"],
    *,
    num_experts: int,
    num_local_experts: int | None = None,
    expert_map: Int[Array, " E"] | None = None,
    group_offset: int | Array = 0,
    tile_rows: int | None = None,
    implementation: str = "auto",
) -> Groups:
    """Sorts the pairs of `topk_ids` by local expert.

    Pairs whose id is -1 or outside ``[0, E)``, or whose expert is not local, get no row.

    Args:
        topk_ids: int32 ``[T, k]``, global expert ids.
        num_experts: E.
        num_local_experts: E_local; E by default.
        expert_map: int32 ``[E]``, global to local id, -1 for experts that live elsewhere. Without it the local experts are
            the `num_local_experts` neighbours from `group_offset` on.
        group_offset: the first local expert, if there is no map.
        tile_rows: rows of a tile; `default_tile_rows` by default.
        implementation: ``auto``, ``xla``, ``mosaic`` or ``mosaic_interpret``.

    Example:
        >>> groups = group_tokens(jnp.array([[1, 0], [1, -1]], jnp.int32), num_experts=2, tile_rows=2)
        >>> groups.positions.tolist(), groups.group_sizes.tolist()
        ([[2, 0], [3, -1]], [1, 2])
    """
    from moe_jax.kernels.hopper import group_tokens as kernel

    tokens, top_k = topk_ids.shape
    num_local = num_experts if num_local_experts is None else num_local_experts
    reason = kernel.supports(num_experts, num_local, tile_rows or 64, tokens * top_k)
    chosen = impl.choose("group_tokens", implementation, None if topk_ids.size == 0 else reason)
    tile_rows = tile_rows or default_tile_rows(tokens * top_k, num_local, chosen)
    tiles = max_tiles(tokens * top_k, num_local, tile_rows)
    if expert_map is None and not (num_local == num_experts and isinstance(group_offset, int) and group_offset == 0):
        expert_map = offset_map(num_experts, num_local, group_offset)
    if chosen == "xla" or topk_ids.size == 0:
        found = _xla(topk_ids, expert_map, num_experts, num_local, tile_rows, tiles)
    else:
        found = kernel.group_tokens(
            topk_ids.astype(jnp.int32),
            None if expert_map is None else expert_map.astype(jnp.int32),
            num_experts=num_experts,
            num_local_experts=num_local,
            tile_rows=tile_rows,
            max_tiles=tiles,
            interpret=impl.interpret_params(chosen),
        )
    return Groups(*found, tile_rows=tile_rows)


def _xla(topk_ids, expert_map, num_experts, num_local, tile_rows, tiles):
    top_k = topk_ids.shape[1]
    ids = topk_ids.reshape(-1).astype(jnp.int32)
    known = (ids >= 0) & (ids < num_experts)
    local = ids if expert_map is None else jnp.asarray(expert_map, jnp.int32)[jnp.where(known, ids, 0)]
    local = jnp.where(known & (local >= 0) & (local < num_local), local, num_local)  # dropped pairs sort last

    order = jnp.argsort(local, stable=True).astype(jnp.int32)
    sizes = jnp.zeros(num_local, jnp.int32).at[local].add(1, mode="drop")
    group_tiles = -(-sizes // tile_rows)
    last_tile = jnp.cumsum(group_tiles, dtype=jnp.int32)
    # Two ends where every list of groups starts with 0 and dropped pairs find an entry.
    before = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(sizes, dtype=jnp.int32)])
    start = jnp.concatenate([(last_tile - group_tiles) * tile_rows, jnp.zeros(1, jnp.int32)])
    group = local[order]
    even = -(-sizes // jnp.maximum(group_tiles, 1))
    shares = jnp.concatenate([jnp.maximum(jnp.minimum(-(-even // 8) * 8, tile_rows), 1), jnp.ones(1, jnp.int32)])
    rank = jnp.arange(order.size, dtype=jnp.int32) - before[group]
    row = start[group] + rank // shares[group] * tile_rows + rank % shares[group]
    row = jnp.where(group < num_local, row, tiles * tile_rows)
    row_token = jnp.full(tiles * tile_rows, -1, jnp.int32).at[row].set(order // top_k, mode="drop")
    positions = jnp.zeros_like(ids).at[order].set(jnp.where(group < num_local, row, -1)).reshape(topk_ids.shape)

    num_tiles = jnp.sum(group_tiles, dtype=jnp.int32)
    tile = jnp.arange(tiles, dtype=jnp.int32)
    tile_group = jnp.searchsorted(last_tile, tile, side="right").astype(jnp.int32)
    within = (
        tile - jnp.concatenate([jnp.zeros(1, jnp.int32), last_tile])[tile_group]
    )  # tiles of the same group before it
    size = jnp.concatenate([sizes, jnp.zeros(1, jnp.int32)])[tile_group]
    tile_sizes = jnp.clip(size - within * shares[tile_group], 0, shares[tile_group]) * (tile < num_tiles)
    return positions, row_token, jnp.where(tile < num_tiles, tile_group, -1), tile_sizes, sizes, num_tiles[None]
