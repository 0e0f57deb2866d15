"""Gather: the hidden states of the tokens, copied into the rows of their experts."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.ops import implementation as impl
from moe_jax.ops.group_tokens import Groups


def gather(x: Float[Array, "T H"], groups: Groups, *, implementation: str = "auto") -> Float[Array, "rows H"]:
    """``x[row_token]`` for the rows that hold a token.

    Padding rows are undefined on a GPU and must not be read: `groups.tile_sizes` says which they are. With
    `groups.shared_rows` the hidden states are the rows of every tile, and come back as they are, or as one tile.

    Args:
        x: ``[T, H]``.
        groups: from `group_tokens`.
        implementation: ``auto``, ``xla``, ``mosaic`` or ``mosaic_interpret``.

    Example:
        >>> from moe_jax.ops.group_tokens import group_tokens
        >>> groups = group_tokens(jnp.array([[1], [0]], jnp.int32), num_experts=2, tile_rows=1)
        >>> gather(jnp.array([[1.0], [2.0]]), groups).tolist()
        [[2.0], [1.0]]
    """
    from moe_jax.kernels.hopper import gather as kernel

    impl.check_name(implementation)
    if groups.shared_rows:
        tokens = x.shape[0]
        # TMA brings rows into the tile by eights, of a matrix that has eights or fewer.
        return (
            x
            if tokens <= 8 or tokens % 8 == 0
            else gather(x, _one_tile(tokens, groups.tile_rows), implementation=implementation)
        )
    if x.size == 0 or groups.row_token.size == 0:
        return jnp.zeros((groups.row_token.shape[0], x.shape[1]), x.dtype)
    chosen = impl.choose("gather", implementation, kernel.supports(x))

    def plain(x, token, tile_sizes, positions):
        del positions
        rows = jnp.arange(groups.tile_rows)[None, :] < tile_sizes[:, None]  # those of each tile that hold a token
        return jnp.where(rows.reshape(-1, 1), x[jnp.clip(token, 0, x.shape[0] - 1)], 0)

    if chosen == "xla":
        return plain(x, groups.row_token, groups.tile_sizes, groups.positions)

    def run(x, token, tile_sizes, positions):
        return kernel.gather(x, positions, token.shape[0], interpret=impl.interpret_params(chosen))

    return impl.with_plain_gradient(run, plain)(x, groups.row_token, groups.tile_sizes, groups.positions)


def _one_tile(tokens: int, tile_rows: int) -> Groups:
    """A single expert that gets the tokens in order."""
    positions = jnp.arange(tokens, dtype=jnp.int32)[:, None]
    size, none = jnp.full((1,), tokens, jnp.int32), jnp.zeros((1,), jnp.int32)
    row_token = jnp.arange(tile_rows, dtype=jnp.int32)
    return Groups(positions, row_token, none, size, size, jnp.ones((1,), jnp.int32), tile_rows=tile_rows)
