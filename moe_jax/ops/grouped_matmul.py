"""Grouped matmul: the rows of each group times the weights of its expert, with bias and activation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from moe_jax.activations import Activation
from moe_jax.kernels.hopper.matmul_config import Config, default_config
from moe_jax.ops import implementation as impl
from moe_jax.ops.gather import plain_gather
from moe_jax.ops.group_tokens import Groups
from moe_jax.ops.quantized_matmul import quantized_matmul
from moe_jax.quantization.array import QuantizedArray
from moe_jax.quantization.rows import QuantizedRows


def grouped_matmul(
    rows: Float[Array, "rows K"] | QuantizedRows,
    weights: Float[Array, "E N K"] | QuantizedArray,
    groups: Groups,
    *,
    bias: Float[Array, "E N"] | None = None,
    activation: Activation | None = None,
    group_offset: int | Array = 0,
    tokens_as_rows: bool = False,
    config: Config | None = None,
    out_dtype: DTypeLike | None = None,
    implementation: str = "auto",
) -> Float[Array, "R N_out"]:
    """``activation(rows @ weights[group].T + bias[group])``, accumulated in float32.

    A gated activation takes the first half of the weight rows as gate and the second as up: N_out = N / 2.
    Rows of no group are not to be read: their content is undefined.

    Args:
        rows: ``[R, K]``, grouped as `groups` says; ``[T, K]`` hidden states with `tokens_as_rows`. Quantized rows need
            quantized weights.
        weights: ``[E, N, K]``, contracted axis last; group g uses ``weights[g + group_offset]``.
        groups: from `group_tokens`.
        bias: ``[E, N]``, added in float32 before the activation.
        activation: applied to the float32 accumulator; None for none.
        group_offset: index of the first group's weights.
        tokens_as_rows: each tile takes its rows from the hidden states; only where `groups` has `tile_tokens` or
            `row_tokens`.
        config: how the kernel tiles its work, see `moe_jax.tuning`; the kernel's `default_config` by default. The result
            does not depend on it, and the plain-JAX form does not use it.
        out_dtype: of the result, for quantized rows; bfloat16 by default. Others have their own.
        implementation: ``auto``, ``xla``, ``mosaic`` or ``mosaic_interpret``.

    Returns:
        ``[R, N_out]`` in the dtype of `rows`, or `out_dtype`. Quantized operands have no gradient.

    Raises:
        ValueError: a `config` for another row tile than that of `groups`, or one that the kernel cannot run; a kernel asked
            for by name that does not support the problem; `tokens_as_rows` for groups that do not say which.

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
            f"config.tile_rows={config.tile_rows} must be groups.tile_rows={groups.tile_rows}, which the groups were cut by; "
            f"group them with group_tokens(..., tile_rows={config.tile_rows}), or leave config None"
        )
    if tokens_as_rows and not groups.tokens_as_rows:
        raise ValueError(
            "tokens_as_rows=True needs groups.tile_tokens, which route_groups(..., share_rows=True) gives for few tokens, or "
            "groups.row_tokens, which group_tokens(..., row_tokens=True) gives; gather the rows and leave it False"
        )
    n_out = weights.shape[1] // 2 if gated else weights.shape[1]
    quantized = isinstance(rows, QuantizedRows)
    if quantized and not isinstance(weights, QuantizedArray):
        raise TypeError("rows are quantized and weights are not; quantize both, or neither")
    dtype = out_dtype or ("bfloat16" if quantized else rows.dtype)
    if not quantized and jnp.dtype(dtype) != rows.dtype:
        raise ValueError(
            f"out_dtype={out_dtype} must be that of the rows, {rows.dtype}; leave it None and cast the result"
        )
    if rows.size == 0 or weights.size == 0:
        return jnp.zeros((groups.num_rows, n_out), dtype)
    if isinstance(weights, QuantizedArray):
        return quantized_matmul(
            rows,
            weights,
            groups,
            bias=bias,
            activation=activation,
            group_offset=group_offset,
            tokens_as_rows=tokens_as_rows,
            config=config,
            dtype=dtype,
            implementation=implementation,
        )
    gathered = groups.row_tokens if tokens_as_rows else None
    reason = kernel.supports(rows, weights, bias, activation, groups.tile_rows, gathered is not None)
    chosen = impl.choose("grouped_matmul", implementation, reason)
    tile_group = groups.tile_group
    if not (isinstance(group_offset, int) and group_offset == 0):
        tile_group = tile_group + group_offset
    schedule = (tile_group, groups.tile_starts, groups.tile_sizes, groups.num_tiles)
    tokens = (groups.tile_tokens if tokens_as_rows else None, gathered)
    plain = _plain(groups.tile_rows, activation, n_out)
    if tokens_as_rows:
        plain = _of_tokens(plain)
    if chosen == "xla":
        return plain(rows, weights, bias, schedule, tokens, groups.positions)
    if config is not None:
        _check_config(config, gated, rows.dtype.name)

    def run(rows, weights, bias, schedule, tokens, positions):
        likely_tiles = min(positions.size, weights.shape[0])
        return kernel.grouped_matmul(
            rows,
            weights,
            *schedule,
            bias,
            activation,
            config=config or default_config(groups.tile_rows, gated, n_out, likely_tiles),
            tile_tokens=tokens[0],
            row_tokens=tokens[1],
            total_rows=positions.size,
            interpret=impl.interpret_params(chosen),
        )

    operands = (rows, weights, bias, schedule, tokens, groups.positions)
    return impl.with_plain_gradient(run, plain)(*operands)


def _check_config(config: Config, gated: bool, dtype: str) -> None:
    from moe_jax.tuning.fit import config_misfit

    reason = config_misfit(config, gated, dtype)
    if reason:
        raise ValueError(f"config={config} cannot run: {reason}; leave config None for the default")


def _of_tokens(plain):
    """The plain-JAX form for hidden states: their rows are gathered first."""

    def run(x, weights, bias, schedule, tokens, positions):
        return plain(plain_gather(x, positions), weights, bias, schedule, tokens, positions)

    return run


def _plain(tile_rows: int, activation: Activation | None, n_out: int):
    """The plain-JAX form: one small matmul per tile that holds rows, so time and memory grow with rows."""

    def dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
        dims = (((contract[0],), (contract[1],)), ((), ()))
        return lax.dot_general(a, b, dims, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)

    def finish(h: Array, bias: Array | None) -> Array:
        h = h if bias is None else h + bias.astype(jnp.float32)[None, :]
        return h if activation is None else activation(h)

    def tile(array: Array, start: Array) -> Array:
        return lax.dynamic_slice_in_dim(array, start, tile_rows)

    def padded(array: Array) -> Array:
        """With room for a whole tile from any row on."""
        return jnp.pad(array, ((0, tile_rows), (0, 0)))

    # Tiles are written one after the other, each whole: what runs over its end is written again by the next.
    @jax.custom_vjp
    def matmul(rows: Array, weights: Array, bias: Array | None, schedule: tuple[Array, ...]) -> Array:
        tile_group, tile_starts, _, num_tiles = schedule
        source = padded(rows)

        def one(t, out):
            group = tile_group[t]
            h = dot(tile(source, tile_starts[t]), weights[group], (1, 1))
            y = finish(h, None if bias is None else bias[group]).astype(rows.dtype)
            return lax.dynamic_update_slice_in_dim(out, y, tile_starts[t], 0)

        out = jnp.zeros((source.shape[0], n_out), rows.dtype)
        return lax.fori_loop(0, num_tiles[0], one, out)[: rows.shape[0]]

    def forward(*operands):
        return matmul(*operands), operands

    def backward(saved, cotangent):
        rows, weights, bias, schedule = saved
        tile_group, tile_starts, tile_sizes, num_tiles = schedule
        source, cotangent = padded(rows), padded(cotangent)

        def one(t, grads):
            d_rows, d_weights, d_bias = grads
            group, start = tile_group[t], tile_starts[t]
            # Rows that are not the tile's, which may be NaN, have no gradient.
            held = (jnp.arange(tile_rows) < tile_sizes[t])[:, None]
            x, w = jnp.where(held, tile(source, start), 0), weights[group]
            b = None if bias is None else bias[group]
            pull = jax.vjp(finish, dot(x, w, (1, 1)), b)[1]
            d_h, d_b = pull(jnp.where(held, tile(cotangent, start), 0).astype(jnp.float32))
            d_rows = lax.dynamic_update_slice_in_dim(
                d_rows, dot(d_h, w.astype(jnp.float32), (1, 0)).astype(rows.dtype), start, 0
            )
            d_weights = d_weights.at[group].add(dot(d_h, x.astype(jnp.float32), (0, 0)))
            return d_rows, d_weights, None if bias is None else d_bias.at[group].add(d_b.astype(jnp.float32))

        start = (
            jnp.zeros(source.shape, rows.dtype),
            jnp.zeros(weights.shape, jnp.float32),
            None if bias is None else jnp.zeros(bias.shape, jnp.float32),
        )
        d_rows, d_weights, d_bias = lax.fori_loop(0, num_tiles[0], one, start)
        d_bias = None if bias is None else d_bias.astype(bias.dtype)
        return d_rows[: rows.shape[0]], d_weights.astype(weights.dtype), d_bias, None

    matmul.defvjp(forward, backward)

    def run(rows, weights, bias, schedule, tokens, positions):
        del tokens, positions
        return matmul(rows, weights, bias, schedule)

    return run
