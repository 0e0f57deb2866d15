"""Rows of groups quantized for a contraction over the rows: as codes of a matrix whose columns they are."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moe_jax.ops import implementation as impl
from moe_jax.ops.gather import plain_gather
from moe_jax.ops.gather_quantize import plain_gather_quantize
from moe_jax.ops.group_tokens import Groups, group_starts, max_tiles, row_tokens, tile_schedule
from moe_jax.quantization.array import QuantizedArray
from moe_jax.quantization.formats import Spec
from moe_jax.quantization.fp8_training import DTYPE, GROUP, blocks_spec, rows_spec
from moe_jax.quantization.quantize import quantize
from moe_jax.quantization.rows import QuantizedRows


class ColumnBlocks(NamedTuple):
    """Where rows of groups stand as columns: in blocks of 128, each of one group, in the order of groups.

    Attributes:
        group: int32 ``[blocks]``, -1 after the last.
        starts: int32 ``[blocks]``, the first row.
        sizes: int32 ``[blocks]``, rows; the other columns of a block are zero.
        count: int32 ``[1]``, blocks that hold rows; they come first.
    """

    group: Int[Array, " blocks"]
    starts: Int[Array, " blocks"]
    sizes: Int[Array, " blocks"]
    count: Int[Array, "1"]


def column_blocks(groups: Groups) -> ColumnBlocks:
    """The blocks of groups: their tiles, where these have 128 rows.

    Example:
        >>> from moe_jax.ops.group_tokens import group_tokens
        >>> groups = group_tokens(jnp.array([[0], [2], [2]], jnp.int32), num_experts=3, tile_rows=2)
        >>> blocks = column_blocks(groups)
        >>> blocks.group.tolist(), blocks.starts.tolist(), blocks.sizes.tolist(), blocks.count.tolist()
        ([0, 2, -1], [0, 1, 0], [1, 2, 0], [2])
    """
    if groups.tile_rows == GROUP:
        return ColumnBlocks(groups.tile_group, groups.tile_starts, groups.tile_sizes, groups.num_tiles)
    most = max_tiles(groups.positions.size, groups.group_sizes.shape[0], GROUP)
    group, starts, sizes, _, count, _ = tile_schedule(groups.group_sizes, group_starts(groups), GROUP, most)
    return ColumnBlocks(group, starts, sizes, count)


def quantize_transposed(
    rows: Float[Array, "R_or_T M"],
    groups: Groups,
    *,
    dtype: DTypeLike = DTYPE,
    by_token: bool = False,
    scale: Float[Array, ""] | None = None,
    implementation: str = "auto",
) -> QuantizedArray:
    """The rows of all groups as columns, in FP8: a scale for each 128 of their elements x a block of `column_blocks`, or one.

    FP8 tensor cores take operands with the contracted axis last: `moe_jax.ops.weight_grad.weight_grad` contracts the rows of
    an expert. Zeros fill its last block, so that no block belongs to two experts. Blocks after the last that holds rows are
    undefined on a GPU.

    Args:
        rows: ``[R, M]``, grouped as `groups` says; M a multiple of 128. Rows of no group count nowhere, whatever they hold.
        groups: from `moe_jax.ops.group_tokens.group_tokens`.
        dtype: of the codes: ``float8_e4m3fn`` or ``float8_e5m2``.
        by_token: `rows` are hidden states instead, ``[T, M]``, and each row is that of its token: a gather that writes nothing.
        scale: one for all, which `moe_jax.ops.quantize_rows.shared_scale` made.
        implementation: ``auto``, ``xla``, ``mosaic`` or ``mosaic_interpret``.

    Returns:
        ``[M, 128 * blocks]``, with scales ``[M / 128, blocks]``, or the given one. It has no derivative of its own.

    Raises:
        ValueError: columns that 128 does not divide.

    Example:
        >>> from moe_jax.ops.group_tokens import group_tokens
        >>> groups = group_tokens(jnp.array([[0], [2], [2]], jnp.int32), num_experts=3, tile_rows=2)
        >>> found = quantize_transposed(jnp.ones((3, 256)), groups)
        >>> found.shape, found.scales.shape, found.dequantize()[0, 128:131].tolist()
        ((256, 384), (2, 3), [1.0, 1.0, 0.0])
    """
    return _both(rows, groups, dtype, by_token, scale, implementation, of_rows=False)[1]


def quantize_rows_both(
    rows: Float[Array, "R_or_T M"],
    groups: Groups,
    *,
    dtype: DTypeLike = DTYPE,
    by_token: bool = False,
    scale: Float[Array, ""] | None = None,
    implementation: str = "auto",
) -> tuple[QuantizedRows, QuantizedArray]:
    """``quantize_rows(rows, rows_spec(dtype), groups=groups)`` and ``quantize_transposed(rows, groups, dtype=dtype)``, read once.

    Args:
        rows: as in `quantize_transposed`.
        groups: of the rows.
        dtype: as there.
        by_token: as there; the first is then ``quantize_tokens(rows, rows_spec(dtype), groups)``.
        scale: as there, of both: the codes are the same.
        implementation: ``auto``, ``xla``, ``mosaic`` or ``mosaic_interpret``.

    Returns:
        What contracts the columns of the rows, and what contracts the rows.

    Raises:
        ValueError: as `quantize_transposed`.

    Example:
        >>> from moe_jax.ops.group_tokens import group_tokens
        >>> groups = group_tokens(jnp.array([[0, 2], [2, -1]], jnp.int32), num_experts=3, tile_rows=2)
        >>> [found.shape for found in quantize_rows_both(jnp.ones((2, 256)), groups, by_token=True)]
        [(4, 256), (256, 384)]
    """
    return _both(rows, groups, dtype, by_token, scale, implementation, of_rows=True)


def _both(
    rows: Array,
    groups: Groups,
    dtype: DTypeLike,
    by_token: bool,
    scale: Array | None,
    implementation: str,
    *,
    of_rows: bool,
) -> tuple[QuantizedRows | None, QuantizedArray]:
    from moe_jax.kernels.hopper import quantize_blocks as kernel
    from moe_jax.kernels.hopper.gather_quantize import scales_shape

    impl.check_name(implementation)
    if rows.shape[1] % GROUP:
        raise ValueError(f"{rows.shape[1]} columns must be a multiple of {GROUP}, as many share a scale; pad them")
    scaling = "block" if scale is None else "tensor"
    of_codes, of_columns = rows_spec(dtype, scaling), blocks_spec(dtype, scaling)
    blocks = column_blocks(groups)
    chosen = "xla"
    if rows.size and blocks.group.size:
        chosen = impl.choose("quantize_transposed", implementation, kernel.supports(rows))

    def run(rows, scale, positions, *blocks):
        one = None if scale is None else scale.reshape(1)
        if chosen == "xla":
            own = None
            if of_rows:
                total_rows = groups.num_rows if by_token else rows.shape[0]
                places = positions if by_token else None
                own = plain_gather_quantize(rows, places, of_codes, one, total_rows=total_rows)
            gathered = plain_gather(rows, positions, groups.num_rows) if by_token else rows
            return own, plain_quantize_transposed(gathered, ColumnBlocks(*blocks), of_columns, scale)
        options = {"row_spec": of_codes if of_rows else None, "interpret": impl.interpret_params(chosen)}
        if by_token:
            options["row_tokens"] = row_tokens(positions, groups.num_rows + GROUP)
        if scale is not None:
            *own, values = kernel.quantize_rows_of_blocks(rows, *blocks[1:], of_columns, scale=one, **options)
            lines = [jnp.broadcast_to(scale, scales_shape(*codes.shape, of_codes)) for codes in own]
            own = QuantizedRows(*own, *lines, of_codes) if of_rows else None
            return own, QuantizedArray(values, scale, spec=of_columns)
        *own, values, scales = kernel.quantize_rows_of_blocks(rows, *blocks[1:], of_columns, **options)
        return (QuantizedRows(*own, of_codes) if of_rows else None), QuantizedArray(values, scales, spec=of_columns)

    return impl.without_gradient("quantize_transposed", run)(rows, scale, groups.positions, *blocks)


def plain_quantize_transposed(
    rows: Float[Array, "R M"], blocks: ColumnBlocks, spec: Spec, scale: Float[Array, ""] | None = None
) -> QuantizedArray:
    """In plain JAX."""
    columns = rows.shape[1]
    if rows.shape[0] == 0:
        rows = jnp.zeros((1, columns), rows.dtype)
    place = jnp.arange(GROUP)
    held = place[None, :] < blocks.sizes[:, None]
    source = jnp.minimum(blocks.starts[:, None] + place[None, :], rows.shape[0] - 1)
    picked = jnp.where(held[:, :, None], rows[source], 0)
    return quantize(picked.reshape(-1, columns).T, spec, scales=scale)
