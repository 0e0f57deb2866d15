"""What follows from `Groups` for their rows: the router weight and the expert of each, and sums over the rows of an expert."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from moe_jax.ops.group_tokens import Groups


def without_sizes(groups: Groups) -> Groups:
    """The same without `Groups.group_sizes`: what is given to a function with a derivative of its own is computed unread.

    Example:
        >>> from moe_jax.ops.group_tokens import group_tokens
        >>> without_sizes(group_tokens(jnp.array([[0]], jnp.int32), num_experts=2)).group_sizes is None
        True
    """
    return dataclasses.replace(groups, group_sizes=None, total_rows=groups.num_rows)


def packed(groups: Groups, num_experts: int) -> Groups:
    """The same with the sizes of its groups, which follow from those of tiles, and rows that are one pair's each.

    The tokens of tiles and rows are left out; of a token's slots that share a row, the first has it (`first_slots`).

    Args:
        groups: perhaps `without_sizes`.
        num_experts: that `Groups.tile_group` counts.

    Example:
        >>> from moe_jax.ops.group_tokens import group_tokens
        >>> groups = group_tokens(jnp.array([[1], [1]], jnp.int32), num_experts=2)
        >>> packed(without_sizes(groups), 3).group_sizes.tolist()
        [0, 2, 0]
    """
    of_tiles = jax.nn.one_hot(groups.tile_group, num_experts, dtype=jnp.int32, axis=0) * groups.tile_sizes[None]
    sizes = jnp.sum(of_tiles, axis=1)
    once = first_slots(groups)
    return dataclasses.replace(groups, positions=once, group_sizes=sizes, tile_tokens=None, row_tokens=None)


def row_weights(weights: Float[Array, "T k"] | None, groups: Groups) -> Float[Array, " R"]:
    """The router weight of each row, or 1; zero for rows without a token. Slots that share a row add up.

    Example:
        >>> from moe_jax.ops.group_tokens import group_tokens
        >>> groups = group_tokens(jnp.array([[1, 0], [-1, 1]], jnp.int32), num_experts=2)
        >>> row_weights(jnp.array([[3.0, 1.0], [9.0, 2.0]]), groups).tolist()
        [1.0, 3.0, 2.0, 0.0]
    """
    positions, num_rows = groups.positions.reshape(-1), groups.num_rows
    of_slots = jnp.ones(positions.shape) if weights is None else weights.astype(jnp.float32).reshape(-1)
    # Slots without a row are past the last one, each at another place: XLA would sort what may repeat.
    nowhere = num_rows + jnp.arange(positions.size, dtype=jnp.int32)
    places = jnp.zeros(num_rows).at[jnp.where(positions < 0, nowhere, positions)]
    if groups.tile_tokens is not None:  # the rows of tiles that take all tokens
        return places.add(of_slots, mode="drop")
    return places.set(of_slots, mode="drop", unique_indices=True)


def held_rows(groups: Groups) -> Bool[Array, " R"]:
    """Which rows are a token's."""
    return row_weights(None, groups) > 0


def first_slots(groups: Groups) -> Int[Array, "T k"]:
    """The row of each slot as in `Groups.positions`, but each row once: in the first of a token's slots that share it."""
    positions = groups.positions
    if groups.tile_tokens is None:  # no two slots share one
        return positions
    earlier = jnp.tril(jnp.ones((positions.shape[1],) * 2, bool), -1)
    again = jnp.any((positions[:, :, None] == positions[:, None, :]) & earlier[None], axis=2)
    return jnp.where(again, -1, positions)


def expert_of(rows: Int[Array, "*B"], groups: Groups) -> Int[Array, "*B"]:
    """The group of rows that are in one.

    Example:
        >>> from moe_jax.ops.group_tokens import group_tokens
        >>> groups = group_tokens(jnp.array([[2], [0], [2]], jnp.int32), num_experts=3)
        >>> expert_of(jnp.arange(3), groups).tolist()
        [0, 2, 2]
    """
    # From the tiles: groups need not follow one another.
    there = groups.tile_group >= 0
    starts = jnp.where(there, groups.tile_starts, groups.num_rows)
    tile = jnp.searchsorted(starts, rows, side="right", method="compare_all") - 1
    return groups.tile_group[jnp.maximum(tile, 0)]


def sums_of_groups(rows: Float[Array, "R N"], groups: Groups) -> Float[Array, "E N"]:
    """The sum of each group's rows, in float32: a product with ones, because a sum of scattered rows has no fixed order.

    Example:
        >>> from moe_jax.ops.group_tokens import group_tokens
        >>> groups = group_tokens(jnp.array([[1], [1], [-1]], jnp.int32), num_experts=2)
        >>> sums_of_groups(jnp.array([[1.0], [2.0], [jnp.nan]]), groups).tolist()
        [[0.0], [3.0]]
    """
    held, experts = held_rows(groups), groups.group_sizes.shape[0]
    group = jnp.where(held, expert_of(jnp.arange(groups.num_rows, dtype=jnp.int32), groups), experts)
    ones = jax.nn.one_hot(group, experts, dtype=rows.dtype, axis=0)
    return precise_dot(ones, jnp.where(held[:, None], rows, 0))


def precise_dot(a: Float[Array, "M K"], b: Float[Array, "K N"]) -> Float[Array, "M N"]:
    """A product in float32.

    Example:
        >>> precise_dot(jnp.ones((1, 2)), jnp.ones((2, 1))).tolist()
        [[2.0]]
    """
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
