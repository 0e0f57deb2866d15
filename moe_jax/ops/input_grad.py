"""The gradient of a grouped matmul's input: cotangents of rows, times the weights that the rows were multiplied with."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from moe_jax.ops import implementation as impl
from moe_jax.ops.group_tokens import Groups


def input_grad(
    rows: Float[Array, "R N"],
    weights: Float[Array, "E N K"],
    groups: Groups,
    *,
    implementation: str = "auto",
) -> Float[Array, "R K"]:
    """``rows @ weights[group]``, accumulated in float32.

    If ``y = x @ weights[group].T``, as in `grouped_matmul`, and `rows` are the cotangents of y, these are the cotangents of x.
    Rows of no group are not to be read: their content is undefined.

    Args:
        rows: ``[R, N]``, grouped as `groups` says.
        weights: ``[E, N, K]``, as `grouped_matmul` takes them; contracted over N, without a transposed copy.
        groups: from `moe_jax.ops.group_tokens.group_tokens`.
        implementation: ``auto``, ``xla``, ``mosaic`` or ``mosaic_interpret``.

    Returns:
        ``[R, K]`` in the dtype of `rows`. It has no derivative of its own.

    Raises:
        ValueError: a kernel asked for by name that does not support the problem.

    Example:
        >>> from moe_jax.ops.group_tokens import group_tokens
        >>> groups = group_tokens(jnp.array([[0], [1]], jnp.int32), num_experts=2, tile_rows=1)
        >>> input_grad(jnp.ones((2, 2)), jnp.array([[[2.0], [1.0]], [[3.0], [1.0]]]), groups).tolist()
        [[3.0], [4.0]]
    """
    from moe_jax.kernels.hopper import input_grad as kernel

    impl.check_name(implementation)
    if rows.size == 0 or weights.size == 0:
        return jnp.zeros((rows.shape[0], weights.shape[2]), rows.dtype)
    chosen = impl.choose("input_grad", implementation, kernel.supports(rows, weights, groups.tile_rows))
    schedule = groups.tile_group, groups.tile_starts, groups.tile_sizes, groups.num_tiles
    if chosen == "xla":
        return plain_input_grad(rows, weights, groups)
    config = kernel.config_for(groups.tile_rows)
    return kernel.input_grad(rows, weights, *schedule, config=config, interpret=impl.interpret_params(chosen))


def plain_input_grad(rows: Float[Array, "R N"], weights: Float[Array, "E N K"], groups: Groups) -> Float[Array, "R K"]:
    """In plain JAX: one small matmul per tile that holds rows, so time and memory grow with rows; zeros in rows of no group.

    Example:
        >>> from moe_jax.ops.group_tokens import group_tokens
        >>> groups = group_tokens(jnp.array([[0], [-1]], jnp.int32), num_experts=1, tile_rows=1)
        >>> plain_input_grad(jnp.ones((2, 1)), jnp.full((1, 1, 1), 3.0), groups).tolist()
        [[3.0], [0.0]]
    """
    tile_rows = groups.tile_rows
    source = jnp.pad(rows, ((0, tile_rows), (0, 0)))  # with room for a whole tile from any row on

    def one(t, out):
        start = groups.tile_starts[t]
        mine = lax.dynamic_slice_in_dim(source, start, tile_rows)
        dims = (((1,), (0,)), ((), ()))
        precise = {"precision": lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
        product = lax.dot_general(mine, weights[groups.tile_group[t]], dims, **precise)
        # What runs over the end of a tile is written again by the next, or is left zero.
        held = (jnp.arange(tile_rows) < groups.tile_sizes[t])[:, None]
        return lax.dynamic_update_slice_in_dim(out, jnp.where(held, product, 0).astype(rows.dtype), start, 0)

    out = jnp.zeros((source.shape[0], weights.shape[2]), rows.dtype)
    return lax.fori_loop(0, groups.num_tiles[0], one, out)[: rows.shape[0]]
