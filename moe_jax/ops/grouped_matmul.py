"""Grouped matmul: the rows of each group times the weights of its expert, with bias and activation."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from moe_jax.activations import Activation
from moe_jax.kernels.hopper.matmul_config import Config, default_config
from moe_jax.ops import implementation as impl
from moe_jax.ops.gather import plain_gather
from moe_jax.ops.group_rows import without_sizes
from moe_jax.ops.group_tokens import Groups
from moe_jax.ops.matmul_gradient import matmul_gradient
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
    if config is not None and chosen != "xla":
        from moe_jax.tuning.fit import check_config

        check_config(config, gated, rows.dtype.name)
    if not (isinstance(group_offset, int) and group_offset == 0):
        groups = dataclasses.replace(groups, tile_group=groups.tile_group + group_offset)

    def run(rows, weights, bias, groups):
        schedule = groups.tile_group, groups.tile_starts, groups.tile_sizes, groups.num_tiles
        if chosen == "xla":
            rows = plain_gather(rows, groups.positions) if tokens_as_rows else rows
            return _plain(rows, weights, bias, schedule, groups.tile_rows, activation)
        likely_tiles = min(groups.positions.size, weights.shape[0])
        return kernel.grouped_matmul(
            rows,
            weights,
            *schedule,
            bias,
            activation,
            config=config or default_config(groups.tile_rows, gated, n_out, likely_tiles),
            tile_spans=groups.tile_spans,
            tile_tokens=groups.tile_tokens if tokens_as_rows else None,
            row_tokens=groups.row_tokens if tokens_as_rows else None,
            total_rows=groups.positions.size,
            interpret=impl.interpret_params(chosen),
        )

    def gradient(operands, cotangent):
        # The activation's input is computed again.
        options = {"tokens_as_rows": tokens_as_rows, "implementation": implementation}
        more = {"bias": operands[2], **options}
        h = None if activation is None else grouped_matmul(operands[0], operands[1], operands[3], **more)
        return matmul_gradient(*operands, h, cotangent, activation, **options)

    def backward(operands, cotangent):
        found = impl.without_gradient("the gradient of grouped_matmul", gradient)(operands, cotangent)
        return *found, None

    call = jax.custom_vjp(run)
    call.defvjp(lambda *operands: (run(*operands), operands), backward)
    return call(rows, weights, bias, without_sizes(groups))


def _plain(
    rows: Array,
    weights: Array,
    bias: Array | None,
    schedule: tuple[Array, ...],
    tile_rows: int,
    activation: Activation | None,
) -> Array:
    """The plain-JAX form: one small matmul per tile that holds rows, so time and memory grow with rows."""
    tile_group, tile_starts, _, num_tiles = schedule
    source = jnp.pad(rows, ((0, tile_rows), (0, 0)))  # with room for a whole tile from any row on
    dims = (((1,), (1,)), ((), ()))

    # Tiles are written one after the other, each whole: what runs over its end is written again by the next.
    def one(t, out):
        group, mine = tile_group[t], lax.dynamic_slice_in_dim(source, tile_starts[t], tile_rows)
        precise = {"precision": lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
        h = lax.dot_general(mine, weights[group], dims, **precise)
        h = h if bias is None else h + bias[group].astype(jnp.float32)[None, :]
        y = (h if activation is None else activation(h)).astype(rows.dtype)
        return lax.dynamic_update_slice_in_dim(out, y, tile_starts[t], 0)

    gated = activation is not None and activation.is_gated
    n_out = weights.shape[1] // 2 if gated else weights.shape[1]
    out = jnp.zeros((source.shape[0], n_out), rows.dtype)
    return lax.fori_loop(0, num_tiles[0], one, out)[: rows.shape[0]]
