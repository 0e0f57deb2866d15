"""Rows from each rank to some of the others and back, in plain JAX."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

Axes = tuple[str, ...]


def dispatch(arrays: Any, sends: Bool[Array, "T R"], axes: Axes) -> Any:
    """Row t of each array to the ranks that `sends` says.

    Args:
        arrays: a pytree of ``[T, ...]``.
        sends: which ranks get row t.
        axes: of the mesh, whose R ranks take part.

    Returns:
        The pytree as ``[R, T, ...]``: block r is what rank r sent, at the index that the row has there; zeros where it sent none.
    """
    return jax.tree.map(lambda array: _dispatch(array, sends, axes), arrays)


def combine(y: Float[Array, "R T H"], sends: Bool[Array, "T R"], axes: Axes) -> Float[Array, "T H"]:
    """Block r back to rank r, and there the sum over the ranks that a row was sent to: in their order, in float32, rounded once.

    Args:
        y: what has become of the rows that `dispatch` brought.
        sends: as `dispatch` had it.
        axes: as `dispatch` had it.
    """
    return _combine(y, sends, axes)


def received(sends: Bool[Array, "T R"], axes: Axes) -> Bool[Array, "R T"]:
    """Which rows of each rank were sent to this one."""
    return lax.all_to_all(sends.T.astype(jnp.uint8), axes, 0, 0, tiled=True) != 0


# Each is the derivative of the other. Derived by JAX, `dispatch` would add up gradients in the order that a GPU's atomics take.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dispatch(array: Array, sends: Array, axes: Axes) -> Array:
    ranks = sends.shape[1]
    index = jnp.broadcast_to(jnp.arange(array.shape[0]), (ranks, array.shape[0]))
    return _move(array, index, sends.T, received(sends, axes), axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _combine(y: Array, sends: Array, axes: Axes) -> Array:
    ranks, tokens = y.shape[:2]
    index = jnp.arange(ranks * tokens).reshape(ranks, tokens)
    back = _move(y.reshape(-1, *y.shape[2:]), index, received(sends, axes), sends.T, axes)
    total = jnp.zeros(y.shape[1:], jnp.float32)
    for block, sent in zip(back, sends.T, strict=True):
        total = total + jnp.where(_column(sent, block), block.astype(jnp.float32), 0.0)
    return total.astype(y.dtype)


def _dispatch_backward(axes: Axes, sends: Array, cotangent: Array) -> tuple[Array | None, None]:
    if not jnp.issubdtype(cotangent.dtype, jnp.floating):  # of integers there is no derivative
        return None, None
    return _combine(cotangent, sends, axes), None


def _combine_backward(axes: Axes, sends: Array, cotangent: Array) -> tuple[Array, None]:
    return _dispatch(cotangent, sends, axes), None


_dispatch.defvjp(lambda array, sends, axes: (_dispatch(array, sends, axes), sends), _dispatch_backward)
_combine.defvjp(lambda y, sends, axes: (_combine(y, sends, axes), sends), _combine_backward)


def _column(mask: Array, array: Array) -> Array:
    """Booleans as they are multiplied with the rows of an array."""
    return mask.reshape(*mask.shape, *[1] * (array.ndim - mask.ndim))


def _move(rows: Array, index: Array, leaves: Array, arrives: Array, axes: Axes) -> Array:
    """``rows[index[r, t]]`` to rank r where ``leaves[r, t]``; block r of the result is from rank r, zero but where it arrives."""

    def whole(rows, index, leaves, arrives):
        blocks = rows[index]
        blocks = jnp.where(_column(leaves, blocks), blocks, jnp.zeros((), rows.dtype))
        return lax.all_to_all(blocks, axes, 0, 0, tiled=True)

    def ragged(rows, index, leaves, arrives):
        """Only what leaves goes over the wire: the rows of a block one after the other, and apart again on arrival."""
        ranks, size = index.shape
        packed = jnp.take_along_axis(index, jnp.argsort(~leaves, axis=1, stable=True), axis=1).reshape(-1)
        starts = jnp.arange(ranks, dtype=jnp.int32) * size
        there = jnp.full(ranks, lax.axis_index(axes) * size, jnp.int32)
        counts = [jnp.sum(mask, axis=1, dtype=jnp.int32) for mask in (leaves, arrives)]
        empty = jnp.zeros((ranks * size, *rows.shape[1:]), rows.dtype)
        blocks = lax.ragged_all_to_all(rows[packed], empty, starts, counts[0], there, counts[1], axis_name=axes)
        blocks = blocks.reshape(ranks, size, *rows.shape[1:])
        place = jnp.maximum(jnp.cumsum(arrives, axis=1, dtype=jnp.int32) - 1, 0)
        blocks = blocks[jnp.arange(ranks)[:, None], place]
        return jnp.where(_column(arrives, blocks), blocks, jnp.zeros((), rows.dtype))

    return lax.platform_dependent(rows, index, leaves, arrives, cuda=ragged, default=whole)
