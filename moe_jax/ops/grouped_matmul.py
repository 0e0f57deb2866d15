"""Grouped matmul: the rows of each group times the weights of its expert, with bias and activation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from moe_jax.activations import Activation
from moe_jax.kernels.hopper.matmul_bf16 import Config
from moe_jax.ops import implementation as impl
from moe_jax.ops.group_tokens import Groups


def grouped_matmul(
    rows: Float[Array, "rows K"],
    weights: Float[Array, "E N K"],
    groups: Groups,
    *,
    bias: Float[Array, "E N"] | None = None,
    activation: Activation | None = None,
    group_offset: int | Array = 0,
    config: Config | None = None,
    implementation: str = "auto",
) -> Float[Array, "R N_out"]:
    """``activation(rows @ weights[group].T + bias[group])``, accumulated in float32.

    A gated activation takes the first half of the weight rows as gate and the second as up: N_out = N / 2.
    Padding rows and rows of tiles past `num_tiles` are not to be read: their content is undefined.

    Args:
        rows: ``[R, K]``, grouped as `groups` says; ``[T, K]`` hidden states for an up-projection with `groups.shared_rows`.
        weights: ``[E, N, K]``, contracted axis last; group g uses ``weights[g + group_offset]``.
        groups: from `group_tokens`.
        bias: ``[E, N]``, added in float32 before the activation.
        activation: applied to the float32 accumulator; None for none.
        group_offset: index of the first group's weights.
        config: how the kernel tiles its work, see `moe_jax.tuning`; the kernel's `default_config` by default. The result
            does not depend on it, and the plain-JAX form does not use it.
        implementation: ``auto``, ``xla``, ``mosaic`` or ``mosaic_interpret``.

    Returns:
        ``[R, N_out]`` in the dtype of `rows`.

    Raises:
        ValueError: a `config` for another row tile than that of `groups`, or one that the kernel cannot run; a kernel asked
            for by name that does not support the problem.

    Example:
        >>> from moe_jax.ops.group_tokens import group_tokens
        >>> groups = group_tokens(jnp.array([[0], [1]], jnp.int32), num_experts=2, tile_rows=1)
        >>> grouped_matmul(jnp.ones((2, 1)), jnp.array([[[2.0]], [[3.0]]]), groups).tolist()
        [[2.0], [3.0]]
    """
    from moe_jax.kernels.hopper import matmul_bf16 as kernel

    impl.check_name(implementation)
    gated = activation is not None and activation.is_gated
    if config is not None and config.tile_rows != groups.tile_rows:
        raise ValueError(
            f"config.tile_rows={config.tile_rows} must be groups.tile_rows={groups.tile_rows}, which the rows were padded to; "
            f"group them with group_tokens(..., tile_rows={config.tile_rows}), or leave config None"
        )
    n_out = weights.shape[1] // 2 if gated else weights.shape[1]
    if rows.size == 0 or weights.size == 0:
        return jnp.zeros((groups.num_rows, n_out), rows.dtype)
    shared = groups.shared_rows and rows.shape[0] != groups.num_rows
    reason = kernel.supports(rows, weights, bias, activation, groups.tile_rows)
    chosen = impl.choose("grouped_matmul", implementation, reason)
    tile_group = groups.tile_group
    if not (isinstance(group_offset, int) and group_offset == 0):
        tile_group = tile_group + group_offset
    plain = _plain(groups.tile_rows, activation, n_out)
    if shared:
        plain = _with_rows_repeated(plain, groups)
    if chosen == "xla":
        return plain(rows, weights, bias, tile_group, groups.tile_sizes, groups.num_tiles)
    if config is not None:
        _check_config(config, gated, rows.dtype.name)

    def run(rows, weights, bias, tile_group, tile_sizes, num_tiles):
        likely_tiles = min(groups.positions.size, weights.shape[0])
        return kernel.grouped_matmul(
            rows,
            weights,
            tile_group,
            tile_sizes,
            num_tiles,
            bias,
            activation,
            config=config or kernel.default_config(groups.tile_rows, gated, n_out, likely_tiles),
            shared_rows=shared,
            interpret=impl.interpret_params(chosen),
        )

    return impl.with_plain_gradient(run, plain)(rows, weights, bias, tile_group, groups.tile_sizes, groups.num_tiles)


def _check_config(config: Config, gated: bool, dtype: str) -> None:
    from moe_jax.tuning.fit import config_misfit

    reason = config_misfit(config, gated, dtype)
    if reason:
        raise ValueError(f"config={config} cannot run: {reason}; leave config None for the default")


def _with_rows_repeated(plain, groups: Groups):
    """The plain-JAX form for rows that every tile shares: each tile gets its own."""

    def run(rows, *others):
        tile = jnp.pad(rows, ((0, groups.tile_rows - rows.shape[0]), (0, 0)))
        return plain(jnp.tile(tile, (groups.tile_group.shape[0], 1)), *others)

    return run


def _plain(tile_rows: int, activation: Activation | None, n_out: int):
    """The plain-JAX form: one small matmul per tile that holds rows, so time and memory grow with rows."""

    def dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
        dims = (((contract[0],), (contract[1],)), ((), ()))
        return lax.dot_general(a, b, dims, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)

    def finish(h: Array, bias: Array | None) -> Array:
        h = h if bias is None else h + bias.astype(jnp.float32)[None, :]
        return h if activation is None else activation(h)

    def tile(array: Array, t: Array) -> Array:
        return lax.dynamic_slice_in_dim(array, t * tile_rows, tile_rows)

    @jax.custom_vjp
    def run(
        rows: Array, weights: Array, bias: Array | None, tile_group: Array, tile_sizes: Array, num_tiles: Array
    ) -> Array:
        del tile_sizes  # rows past a tile's size are computed too: they are not to be read

        def one(t, out):
            group = tile_group[t]
            h = dot(tile(rows, t), weights[group], (1, 1))
            y = finish(h, None if bias is None else bias[group]).astype(rows.dtype)
            return lax.dynamic_update_slice_in_dim(out, y, t * tile_rows, 0)

        return lax.fori_loop(0, num_tiles[0], one, jnp.zeros((rows.shape[0], n_out), rows.dtype))

    def forward(*operands):
        return run(*operands), operands

    def backward(saved, cotangent):
        rows, weights, bias, tile_group, tile_sizes, num_tiles = saved

        def one(t, grads):
            d_rows, d_weights, d_bias = grads
            group = tile_group[t]
            held = (jnp.arange(tile_rows) < tile_sizes[t])[:, None]  # padding, which may be NaN, has no gradient
            x, w = jnp.where(held, tile(rows, t), 0), weights[group]
            b = None if bias is None else bias[group]
            pull = jax.vjp(finish, dot(x, w, (1, 1)), b)[1]
            d_h, d_b = pull(jnp.where(held, tile(cotangent, t), 0).astype(jnp.float32))
            d_rows = lax.dynamic_update_slice_in_dim(
                d_rows, dot(d_h, w.astype(jnp.float32), (1, 0)).astype(rows.dtype), t * tile_rows, 0
            )
            d_weights = d_weights.at[group].add(dot(d_h, x.astype(jnp.float32), (0, 0)))
            return d_rows, d_weights, None if bias is None else d_bias.at[group].add(d_b.astype(jnp.float32))

        start = (
            jnp.zeros(rows.shape, rows.dtype),
            jnp.zeros(weights.shape, jnp.float32),
            None if bias is None else jnp.zeros(bias.shape, jnp.float32),
        )
        d_rows, d_weights, d_bias = lax.fori_loop(0, num_tiles[0], one, start)
        return (
            d_rows,
            d_weights.astype(weights.dtype),
            None if bias is None else d_bias.astype(bias.dtype),
            None,
            None,
            None,
        )

    run.defvjp(forward, backward)
    return run
