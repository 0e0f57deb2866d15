"""Grouping: (token, slot) pairs sorted by local expert, packed row after row, and the schedule of the row tiles."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from moe_jax.ops import implementation as impl


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Groups:
    """Where the rows of each local expert lie, and which tile belongs to which expert.

    Groups follow one another without a gap, so there are as many rows as pairs, R = T * k, those of pairs without a local
    expert at the end. With `row_multiple` each begins at a multiple of it, and there are a few rows more (`padded_rows`).

    A tile is at most `tile_rows` rows of one group. A group that needs several tiles is spread evenly over them, in shares of a
    multiple of 8 rows: no tile is left with a few rows for which all weights would be read again. Rows of a group keep token
    order.

    Its arrays are also `Any`, because JAX puts other things in their places.

    Attributes:
        positions: int32 ``[T, k]``, the row of each pair; -1 for a pair without a local expert.
        tile_group: int32 ``[tiles]``, the local expert of each tile; -1 for the tiles after the last.
        tile_starts: int32 ``[tiles]``, the first row of each tile; 0 after the last.
        tile_sizes: int32 ``[tiles]``, rows of each tile; 0 after the last.
        group_sizes: int32 ``[E_local]``, rows of each local expert.
        num_tiles: int32 ``[1]``, tiles that hold rows; they come first.
        tile_rows: the most rows of a tile (static).
        tile_spans: None, or int32 ``[tiles, 2]``, of each tile the first tile of its group and the one after the last, 0 for the
            tiles after the last: kernels walk the tiles of a group together.
        row_multiple: 1, 2, 4 or 8: the first row of a group is a multiple of it, and so is that of a tile (static).
        total_rows: R, where it does not follow from the pairs (static).
        tile_tokens: None, or for at most 16 tokens int32 ``[tiles]``, bit t set if token t has a row in the tile: an
            up-projection then takes its rows from the hidden states themselves, and nothing is gathered (see
            `moe_jax.ops.route_groups`). A token has one row in a tile, whatever slots lead there.
        row_tokens: None, or int32 ``[R + a tile]``, the token of each row, undefined for rows of no group: an up-projection
            then fetches its rows from the hidden states itself.
    """

    positions: Int[Array, "T k"] | Any
    tile_group: Int[Array, " tiles"] | Any
    tile_starts: Int[Array, " tiles"] | Any
    tile_sizes: Int[Array, " tiles"] | Any
    group_sizes: Int[Array, " E_local"] | Any
    num_tiles: Int[Array, "1"] | Any
    tile_rows: int = field(metadata={"static": True})
    tile_spans: Int[Array, "tiles 2"] | Any | None = None
    tile_tokens: Int[Array, " tiles"] | Any | None = None
    row_tokens: Int[Array, " padded_rows"] | Any | None = None
    row_multiple: int = field(default=1, metadata={"static": True})
    total_rows: int | None = field(default=None, metadata={"static": True})

    @property
    def tokens_as_rows(self) -> bool:
        """Whether the up-projection takes its rows from the hidden states."""
        return self.tile_tokens is not None or self.row_tokens is not None

    @classmethod
    def of(cls, found: tuple[Array, ...], tile_rows: int, row_multiple: int = 1) -> Groups:
        """What the kernel and plain JAX give, in the order of the attributes, the tokens of the rows last if they are there."""
        row_tokens = found[7] if len(found) > 7 else None
        return cls(*found[:6], tile_rows, found[6], row_tokens=row_tokens, row_multiple=row_multiple)

    @property
    def num_rows(self) -> int:
        """R."""
        if self.total_rows is not None:
            return self.total_rows
        return padded_rows(self.positions.size, self.group_sizes.shape[0], self.row_multiple)


def padded_rows(num_pairs: int, num_local_experts: int, row_multiple: int) -> int:
    """Rows of that many pairs, each group beginning at a multiple of `row_multiple`.

    Example:
        >>> padded_rows(10, 4, 1), padded_rows(10, 4, 4), padded_rows(2, 4, 4)
        (10, 22, 8)
    """
    return num_pairs + (row_multiple - 1) * min(num_pairs, num_local_experts)


def row_tokens(positions: Int[Array, "T k"], num_rows: int | None = None) -> Int[Array, " R"]:
    """The token of each row; -1 for rows without one. There are as many rows as pairs, or `num_rows`; no two pairs share one.

    Example:
        >>> row_tokens(jnp.array([[1, 0], [2, -1]])).tolist()
        [0, 0, 1, -1]
    """
    num_rows = positions.size if num_rows is None else num_rows
    pair = jnp.arange(positions.size, dtype=jnp.int32)
    # Pairs without a row are past the last one, each at another place: XLA would sort what may repeat.
    rows = jnp.where(positions.reshape(-1) < 0, num_rows + pair, positions.reshape(-1))
    token = pair // max(1, positions.shape[1])
    return jnp.full(num_rows, -1, jnp.int32).at[rows].set(token, mode="drop", unique_indices=True)


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
    from moe_jax.kernels.hopper.matmul_config import tile_rows_for

    return tile_rows_for(mean, num_pairs)


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
    row_tokens: bool = False,
    row_multiple: int = 1,
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
        row_tokens: where the kernel runs, also give `Groups.row_tokens`.
        row_multiple: 1, 2, 4 or 8, see `Groups.row_multiple`.
        implementation: ``auto``, ``xla``, ``mosaic`` or ``mosaic_interpret``.

    Raises:
        ValueError: another `row_multiple`, or one together with `row_tokens`; an implementation that cannot do it.

    Example:
        >>> groups = group_tokens(jnp.array([[1, 0], [1, -1]], jnp.int32), num_experts=2, tile_rows=2)
        >>> groups.positions.tolist(), groups.group_sizes.tolist()
        ([[1, 0], [2, -1]], [1, 2])
    """
    from moe_jax.kernels.hopper import group_tokens as kernel

    check_row_multiple(row_multiple, row_tokens)
    tokens, top_k = topk_ids.shape
    num_local = num_experts if num_local_experts is None else num_local_experts
    reason = kernel.supports(num_experts, num_local, tokens * top_k)
    chosen = impl.choose("group_tokens", implementation, None if topk_ids.size == 0 else reason)
    tile_rows = tile_rows or default_tile_rows(tokens * top_k, num_local, chosen)
    tiles = max_tiles(tokens * top_k, num_local, tile_rows)
    if expert_map is None and not (num_local == num_experts and isinstance(group_offset, int) and group_offset == 0):
        expert_map = offset_map(num_experts, num_local, group_offset)
    if chosen == "xla" or topk_ids.size == 0:
        found = _xla(topk_ids, expert_map, num_experts, num_local, tile_rows, tiles, row_multiple)
    else:
        found = kernel.group_tokens(
            topk_ids.astype(jnp.int32),
            None if expert_map is None else expert_map.astype(jnp.int32),
            num_experts=num_experts,
            num_local_experts=num_local,
            tile_rows=tile_rows,
            max_tiles=tiles,
            row_tokens=row_tokens,
            row_multiple=row_multiple,
            interpret=impl.interpret_params(chosen),
        )
    return Groups.of(found, tile_rows, row_multiple)


def check_row_multiple(row_multiple: int, row_tokens: bool) -> None:
    """Raises ValueError for groups that nobody can make."""
    if row_multiple not in (1, 2, 4, 8):
        raise ValueError(
            f"row_multiple={row_multiple} must be 1, 2, 4 or 8: tiles of a group are multiples of 8 rows apart"
        )
    if row_tokens and row_multiple != 1:
        raise ValueError(
            f"row_multiple={row_multiple} is for rows that are written to memory, row_tokens for those that are not; "
            "leave one of them out"
        )


def _xla(topk_ids, expert_map, num_experts, num_local, tile_rows, tiles, row_multiple):
    ids = topk_ids.reshape(-1).astype(jnp.int32)
    known = (ids >= 0) & (ids < num_experts)
    local = ids if expert_map is None else jnp.asarray(expert_map, jnp.int32)[jnp.where(known, ids, 0)]
    local = jnp.where(known & (local >= 0) & (local < num_local), local, num_local)  # dropped pairs sort last

    order = jnp.argsort(local, stable=True).astype(jnp.int32)  # the pair of each row
    placed = local[order] < num_local
    sizes = jnp.zeros(num_local, jnp.int32).at[local].add(1, mode="drop")
    wide = -(-sizes // row_multiple) * row_multiple
    starts = jnp.cumsum(wide, dtype=jnp.int32) - wide
    moved = starts - (jnp.cumsum(sizes, dtype=jnp.int32) - sizes)  # by the gaps before each group
    rows = jnp.arange(ids.size, dtype=jnp.int32) + jnp.append(moved, jnp.zeros(1, jnp.int32))[local[order]]
    positions = jnp.zeros_like(ids).at[order].set(jnp.where(placed, rows, -1)).reshape(topk_ids.shape)
    return positions, *tile_schedule(sizes, starts, tile_rows, tiles)


def tile_schedule(
    sizes: Int[Array, " E_local"], starts: Int[Array, " E_local"], tile_rows: int, tiles: int
) -> tuple[Array, ...]:
    """The tiles of groups that lie anywhere, as `Groups` has them.

    Args:
        sizes: int32 ``[E_local]``, rows of each group.
        starts: int32 ``[E_local]``, the first row of each.
        tile_rows: the most rows of a tile.
        tiles: entries of the schedule.

    Returns:
        ``tile_group``, ``tile_starts``, ``tile_sizes``, ``group_sizes``, ``num_tiles`` and ``tile_spans``.

    Example:
        >>> [a.tolist() for a in tile_schedule(jnp.array([9, 0, 3]), jnp.array([0, 16, 32]), tile_rows=8, tiles=4)]
        [[0, 0, 2, -1], [0, 8, 32, 0], [8, 1, 3, 0], [9, 0, 3], [3], [[0, 2], [0, 2], [2, 3], [0, 0]]]
    """
    group_tiles = -(-sizes // tile_rows)
    last_tile = jnp.cumsum(group_tiles, dtype=jnp.int32)
    even = -(-sizes // jnp.maximum(group_tiles, 1))
    shares = jnp.minimum(-(-even // 8) * 8, tile_rows)
    num_tiles = jnp.sum(group_tiles, dtype=jnp.int32)
    tile = jnp.arange(tiles, dtype=jnp.int32)
    there = tile < num_tiles

    def of_tile(values):  # one more, for the tiles after the last
        return jnp.concatenate([values, jnp.zeros(1, jnp.int32)])[group]

    # All compared with all: a binary search is a loop, which a GPU would be asked about step by step.
    group = jnp.searchsorted(last_tile, tile, side="right", method="compare_all").astype(jnp.int32)
    first = of_tile(last_tile - group_tiles)
    before = (tile - first) * of_tile(shares)  # rows of the group in its earlier tiles
    tile_sizes = jnp.clip(of_tile(sizes) - before, 0, of_tile(shares))
    return (
        jnp.where(there, group, -1),
        jnp.where(there, of_tile(starts) + before, 0),
        jnp.where(there, tile_sizes, 0),
        sizes,
        num_tiles[None],
        jnp.where(there[:, None], jnp.stack([first, of_tile(last_tile)], axis=1), 0),
    )


def group_starts(groups: Groups) -> Int[Array, " E_local"]:
    """The first row of each local expert; R for one without rows.

    Example:
        >>> from moe_jax.ops.group_tokens import group_tokens
        >>> ids = jnp.array([[0], [2], [2]], jnp.int32)
        >>> group_starts(group_tokens(ids, num_experts=3, tile_rows=2)).tolist()
        [0, 3, 1]
    """
    # From the tiles: groups need not follow one another (`moe_jax.parallel.batched`).
    mine = groups.tile_group[None, :] == jnp.arange(groups.group_sizes.shape[0])[:, None]
    return jnp.min(jnp.where(mine, groups.tile_starts[None, :], groups.num_rows), axis=1, initial=groups.num_rows)
