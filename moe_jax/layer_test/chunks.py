"""The part of a rank, cut in the plainest way: what the reference of a rank is computed from.

Nothing is shared with `moe_jax.parallel.weights`, which these parts are to be compared with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from moe_jax.quantization import QuantizedArray
from moe_jax.types import ExpertWeights


def rank_chunk(num: int, rank: int, world_size: int) -> int:
    """How many of `num` things a rank has; the first ones have one more if need be.

    Example:
        >>> [rank_chunk(7, rank, 3) for rank in range(3)]
        [3, 2, 2]
    """
    return num // world_size + (rank < num % world_size)


def chunk_by_rank(array: Shaped[Array, "..."], rank: int, world_size: int, axis: int = 0) -> Shaped[Array, "..."]:
    """An equal part along an axis.

    Raises:
        ValueError: an axis without equal parts.

    Example:
        >>> chunk_by_rank(jnp.arange(6), 1, 3).tolist()
        [2, 3]
    """
    size, rest = divmod(array.shape[axis], world_size)
    if rest:
        raise ValueError(f"axis {axis} of shape {array.shape} has no {world_size} equal parts")
    return jax.lax.slice_in_dim(array, rank * size, (rank + 1) * size, axis=axis)


def maybe_chunk_by_rank(array: Array | None, rank: int, world_size: int, axis: int = 0) -> Array | None:
    """`chunk_by_rank` of what may be missing."""
    return None if array is None else chunk_by_rank(array, rank, world_size, axis)


def tp_chunk_gate_up(w13: Shaped[Array, "..."], rank: int, world_size: int, axis: int = 1) -> Shaped[Array, "..."]:
    """An equal part of the gate rows and of the up rows.

    Example:
        >>> tp_chunk_gate_up(jnp.arange(8)[None], 1, 2).tolist()
        [[2, 3, 6, 7]]
    """
    gate, up = jnp.split(w13, 2, axis=axis)
    return jnp.concatenate([chunk_by_rank(half, rank, world_size, axis) for half in (gate, up)], axis=axis)


def chunk_scales(scales: Array | None, experts: Sequence[int]) -> Array | None:
    """The scales of some experts; one alone is everyone's."""
    return scales if scales is None or scales.ndim == 0 else scales[jnp.asarray(experts, jnp.int32)]


def expert_chunk(weights: ExpertWeights, experts: Sequence[int]) -> ExpertWeights:
    """Whole experts."""
    return jax.tree.map(lambda leaf: chunk_scales(leaf, experts), weights)


def tp_chunk(weights: ExpertWeights, rank: int, world_size: int) -> ExpertWeights:
    """A part of every expert's intermediate size; scales must be those of rows, or one for all rows and columns.

    Raises:
        ValueError: scales of blocks, whose parts are blocks of their own.
    """
    w13, w2 = weights.w13, weights.w2
    for array in (w13, w2):
        if isinstance(array, QuantizedArray) and array.spec.block is not None:
            raise ValueError(f"{array.spec} has scales of blocks; the sum over ranks is the whole layer then")
    if isinstance(w13, QuantizedArray):
        of_rows = w13.spec.granularity == "channel"
        w13 = dataclasses.replace(
            w13,
            values=tp_chunk_gate_up(w13.values, rank, world_size),
            scales=tp_chunk_gate_up(w13.scales, rank, world_size) if of_rows else w13.scales,
        )
        w2 = dataclasses.replace(w2, values=chunk_by_rank(w2.values, rank, world_size, 2))
    else:
        w13, w2 = tp_chunk_gate_up(w13, rank, world_size), chunk_by_rank(w2, rank, world_size, 2)
    return dataclasses.replace(weights, w13=w13, w2=w2)
