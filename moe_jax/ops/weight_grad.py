"""The gradient of a grouped matmul's weights: for each group the rows on the left, transposed, times those on the right."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from moe_jax.ops import implementation as impl
from moe_jax.ops.group_tokens import Groups


def weight_grad(
    left: Float[Array, "R M"],
    right: Float[Array, "R N"],
    groups: Groups,
    *,
    accumulate: Float[Array, "E M N"] | None = None,
    out_dtype: DTypeLike | None = None,
    implementation: str = "auto",
) -> Float[Array, "E M N"]:
    """``left[rows of e].T @ right[rows of e]`` for each expert e, accumulated in float32; zero for one without rows.

    Args:
        left: ``[R, M]``, grouped as `groups` says.
        right: ``[R, N]``.
        groups: from `moe_jax.ops.group_tokens.group_tokens`.
        accumulate: float32 ``[E, M, N]``, to add to.
        out_dtype: of the result; that of `left` by default, float32 with `accumulate`.
        implementation: ``auto``, ``xla``, ``mosaic`` or ``mosaic_interpret``.
    """
    impl.check_name(implementation)
    experts, tile_rows = groups.group_sizes.shape[0], groups.tile_rows
    dtype = jnp.dtype(out_dtype or (left.dtype if accumulate is None else jnp.float32))
    start = jnp.zeros((experts, left.shape[1], right.shape[1]), jnp.float32) if accumulate is None else accumulate
    if left.size == 0 or right.size == 0:
        return start.astype(dtype)
    left, right = (jnp.pad(rows, ((0, tile_rows), (0, 0))) for rows in (left, right))

    def one(t, sums):
        held = (jnp.arange(tile_rows) < groups.tile_sizes[t])[:, None]
        a, b = (
            jnp.where(held, lax.dynamic_slice_in_dim(rows, groups.tile_starts[t], tile_rows), 0).astype(jnp.float32)
            for rows in (left, right)
        )
        return sums.at[groups.tile_group[t]].add(jnp.matmul(a.T, b, precision=lax.Precision.HIGHEST))

    return lax.fori_loop(0, groups.num_tiles[0], one, start).astype(dtype)
