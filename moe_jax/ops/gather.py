"""Gather: the hidden states of the tokens, copied into the rows of their experts."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.ops import implementation as impl
from moe_jax.ops.group_tokens import Groups


def gather(x: Float[Array, "T H"], groups: Groups, *, implementation: str = "auto") -> Float[Array, "R H"]:
    """``x[row_token]``, zeros in the padding of a group's last tile.

    Rows of tiles past `num_tiles` are undefined on a GPU and must not be read.

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

    if x.size == 0 or groups.row_token.size == 0:
        return jnp.zeros((groups.row_token.shape[0], x.shape[1]), x.dtype)
    chosen = impl.choose("gather", implementation, kernel.supports(x))

    def plain(x, token, num_tiles):
        del num_tiles
        return jnp.where((token >= 0)[:, None], x[jnp.maximum(token, 0)], 0)

    if chosen == "xla":
        return plain(x, groups.row_token, groups.num_tiles)

    def run(x, token, num_tiles):
        return kernel.gather(x, token, num_tiles, groups.tile_rows, interpret=impl.interpret_params(chosen))

    return impl.with_plain_gradient(run, plain)(x, groups.row_token, groups.num_tiles)
