"""Gather: the hidden states of the tokens, copied into the rows of their experts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.ops import implementation as impl
from moe_jax.ops.combine import combine
from moe_jax.ops.group_tokens import Groups, row_tokens


def gather(x: Float[Array, "T H"], groups: Groups, *, implementation: str = "auto") -> Float[Array, "rows H"]:
    """The hidden states of each row's token.

    Rows without a token are undefined on a GPU and must not be read. Where the up-projection takes its rows from the hidden
    states themselves (`groups.tokens_as_rows`), these come back as they are.

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
    if groups.tokens_as_rows:
        return x
    if x.size == 0 or groups.num_rows == 0:
        return jnp.zeros((groups.num_rows, x.shape[1]), x.dtype)
    chosen = impl.choose("gather", implementation, kernel.supports(x))

    @jax.custom_vjp
    def run(x, positions):
        if chosen == "xla":
            return plain_gather(x, positions, groups.num_rows)
        return kernel.gather(x, positions, groups.num_rows, interpret=impl.interpret_params(chosen))

    def backward(positions, cotangent):  # a token's sum over its rows; rows without a token have no part in it
        return combine(cotangent, positions, None, implementation=implementation), None

    run.defvjp(lambda x, positions: (run(x, positions), positions), backward)
    return run(x, groups.positions)


def plain_gather(
    x: Float[Array, "T H"], positions: Int[Array, "T k"], num_rows: int | None = None
) -> Float[Array, "R H"]:
    """In plain JAX, with zeros in rows without a token.

    Example:
        >>> plain_gather(jnp.array([[1.0], [2.0]]), jnp.array([[1], [-1]])).tolist()
        [[0.0], [1.0]]
    """
    token = row_tokens(positions, num_rows)
    return jnp.where((token >= 0)[:, None], x[jnp.maximum(token, 0)], 0)
