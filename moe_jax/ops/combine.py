"""Combine: a token's output is the weighted sum of its rows, in float32 and in slot order."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from moe_jax.ops import implementation as impl


def combine(
    rows: Float[Array, "R H"],
    positions: Int[Array, "T k"],
    weights: Float[Array, "T k"] | None,
    *,
    implementation: str = "auto",
) -> Float[Array, "T H"]:
    """``sum_j weights[t, j] * rows[positions[t, j]]``.

    A slot with position -1 adds exactly nothing, whatever its weight and the rows are.

    Args:
        rows: ``[R, H]``.
        positions: int32 ``[T, k]``, -1 for none.
        weights: float32 ``[T, k]``; None for a plain sum.
        implementation: ``auto``, ``xla``, ``mosaic`` or ``mosaic_interpret``.

    Returns:
        ``[T, H]`` in the dtype of `rows`.

    Example:
        >>> combine(jnp.array([[1.0], [2.0]]), jnp.array([[1, -1], [0, 1]]), jnp.array([[3.0, 9.0], [1.0, 1.0]])).tolist()
        [[6.0], [3.0]]
    """
    from moe_jax.kernels.hopper import combine as kernel

    impl.check_name(implementation)
    shape = (positions.shape[0], rows.shape[1])
    if rows.size == 0 or positions.size == 0:
        return jnp.zeros(shape, rows.dtype)
    chosen = impl.choose("combine", implementation, kernel.supports(rows))

    def plain(rows, weights, positions):
        def add(total, slot):
            row, weight = slot
            present = (row >= 0)[:, None]
            term = jnp.where(present, rows[jnp.maximum(row, 0)].astype(jnp.float32), 0.0)
            return total + (term if weight is None else term * jnp.where(present, weight[:, None], 0.0)), None

        slots = (positions.T, None if weights is None else weights.astype(jnp.float32).T)
        return lax.scan(add, jnp.zeros(shape, jnp.float32), slots)[0].astype(rows.dtype)

    if chosen == "xla":
        return plain(rows, weights, positions)

    def run(rows, weights, positions):
        scale = None if weights is None else weights.astype(jnp.float32)
        return kernel.combine(rows, positions.astype(jnp.int32), scale, interpret=impl.interpret_params(chosen))

    return impl.with_plain_gradient(run, plain)(rows, weights, positions)
