"""Parts of a quantized matrix, each with the right scales: tensor-parallel splits, gate and up, filled-up columns.

A part begins with a block of its own. Where a cut falls inside a block, the blocks of the part are made smaller, so that
none reaches over the cut, and the scale is repeated for each: what the part stands for does not change by a bit.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from moe_jax.quantization.array import QuantizedArray
from moe_jax.quantization.packing import pack_int4


def refine_blocks(array: QuantizedArray, block: tuple[int, int]) -> QuantizedArray:
    """The same matrix in smaller blocks, with the scale of each repeated.

    Args:
        array: with a scale a group or a block.
        block: (rows, columns) that divide the array's own.

    Raises:
        ValueError: an array without blocks, or a block that does not divide its own.

    Example:
        >>> from moe_jax.quantization import Spec, quantize
        >>> w = quantize(jnp.ones((256, 256)), Spec("int8", "block", (128, 128)))
        >>> refine_blocks(w, (64, 128)).scales.shape
        (4, 2)
    """
    old = array.spec.block
    if old is None:
        raise ValueError(
            f"granularity={array.spec.granularity!r} has no blocks to refine; only 'group' and 'block' have"
        )
    if block == old:
        return array
    if old[0] % block[0] or old[1] % block[1]:
        raise ValueError(f"block={block} does not divide block={old} of the array; a scale is that of whole blocks")
    new = dataclasses.replace(array, spec=dataclasses.replace(array.spec, block=block))
    leaves = (_refined(leaf, array, new) for leaf in (array.scales, array.zero_points))
    return _with(new, new.values, *leaves)


def _refined(leaf: Array | None, old: QuantizedArray, new: QuantizedArray) -> Array | None:
    """Scales or zero points, each repeated for the new blocks within an old one."""
    if leaf is None:
        return None
    batch, (halves, rows, columns) = leaf.shape[:-2], new.blocks.grid
    times = [a // b for a, b in zip(old.spec.block, new.spec.block, strict=True)]
    grid = leaf.reshape(*batch, *old.blocks.grid)
    if times[0] > 1:
        grid = jnp.repeat(grid, times[0], axis=-2)[..., :rows, :]
    if times[1] > 1:
        grid = jnp.repeat(grid, times[1], axis=-1)[..., :columns]
    return grid.reshape(*batch, halves * rows, columns)


def slice_rows(array: QuantizedArray, start: int, stop: int) -> QuantizedArray:
    """Rows ``[start, stop)`` with their scales; of an array with two halves those rows of each half.

    Raises:
        ValueError: rows that are not there.

    Example:
        >>> from moe_jax.quantization import Spec, quantize
        >>> w = quantize(jnp.ones((256, 64)), Spec("int8", "block", (128, 64)))
        >>> part = slice_rows(w, 192, 256)
        >>> part.shape, part.scales.shape, part.spec.block
        ((64, 64), (1, 1), (64, 64))
    """
    half = array.shape[-2] // array.halves
    _check_range("rows of a half" if array.halves == 2 else "rows", start, stop, half)
    if array.spec.block is not None:
        array = refine_blocks(array, (math.gcd(start, array.spec.block[0]), array.spec.block[1]))
    if array.spec.granularity == "tensor":
        pieces = slice(None)
    elif array.spec.block is None:
        pieces = slice(start, stop)
    else:
        pieces = slice(start // array.spec.block[0], -(-stop // array.spec.block[0]))

    axis = -1 if array.spec.block is None else -2
    scales, zero_points = (_of_halves(leaf, pieces, axis, array.halves) for leaf in (array.scales, array.zero_points))
    return _with(array, _of_halves(array.values, slice(start, stop), -2, array.halves), scales, zero_points)


def _of_halves(leaf: Array | None, where: slice, axis: int, halves: int) -> Array | None:
    """That part of each half of an axis."""
    if leaf is None or where == slice(None):
        return leaf
    size = leaf.shape[axis] // halves
    index = np.arange(halves * size).reshape(halves, size)[:, where].reshape(-1)
    return jnp.take(leaf, index, axis=axis, unique_indices=True, indices_are_sorted=True)


def slice_columns(array: QuantizedArray, start: int, stop: int) -> QuantizedArray:
    """Columns ``[start, stop)`` with their scales.

    Raises:
        ValueError: columns that are not there.

    Example:
        >>> from moe_jax.quantization import Spec, quantize
        >>> part = slice_columns(quantize(jnp.ones((2, 96)), Spec("int4", "group", 64)), 32, 96)
        >>> part.shape, part.scales.shape, part.spec.block
        ((2, 64), (2, 2), (1, 32))
    """
    _check_range("columns", start, stop, array.shape[-1])
    leaves = array.scales, array.zero_points
    if array.spec.block is not None:
        array = refine_blocks(array, (array.spec.block[0], math.gcd(start, array.spec.block[1])))
        size = array.spec.block[1]
        pieces = slice(start // size, -(-stop // size))
        leaves = (None if leaf is None else leaf[..., pieces] for leaf in (array.scales, array.zero_points))
    return with_codes(array, array.codes()[..., start:stop], *leaves)


def split_rows(array: QuantizedArray, parts: int) -> list[QuantizedArray]:
    """Equal parts of the rows, one a rank; of an array with two halves each part has its share of both.

    All parts have the same format: blocks as large as the cuts allow.

    Raises:
        ValueError: rows that `parts` does not divide.

    Example:
        >>> from moe_jax.quantization import Spec, quantize
        >>> w13 = quantize(jnp.ones((4, 2 * 192, 64)), Spec("float8_e4m3fn", "block", (128, 128)), halves=2)
        >>> [(part.shape, part.spec.block) for part in split_rows(w13, 2)]
        [((4, 192, 64), (32, 128)), ((4, 192, 64), (32, 128))]
    """
    size = _share("rows of a half" if array.halves == 2 else "rows", array.shape[-2] // array.halves, parts)
    if parts > 1 and array.spec.block is not None:
        array = refine_blocks(array, (math.gcd(size, array.spec.block[0]), array.spec.block[1]))
    return [slice_rows(array, i * size, (i + 1) * size) for i in range(parts)]


def split_columns(array: QuantizedArray, parts: int) -> list[QuantizedArray]:
    """Equal parts of the columns, one a rank, all of the same format.

    Raises:
        ValueError: columns that `parts` does not divide.

    Example:
        >>> from moe_jax.quantization import Spec, quantize
        >>> w2 = quantize(jnp.ones((4, 64, 192)), Spec("float8_e4m3fn", "block", (128, 128)))
        >>> [(part.shape, part.spec.block) for part in split_columns(w2, 2)]
        [((4, 64, 96), (128, 32)), ((4, 64, 96), (128, 32))]
    """
    size = _share("columns", array.shape[-1], parts)
    if parts > 1 and array.spec.block is not None:
        array = refine_blocks(array, (array.spec.block[0], math.gcd(size, array.spec.block[1])))
    return [slice_columns(array, i * size, (i + 1) * size) for i in range(parts)]


def join_halves(gate: QuantizedArray, up: QuantizedArray) -> QuantizedArray:
    """``w13`` of gate and up rows that were quantized apart, as checkpoints have them.

    Raises:
        ValueError: two that differ in shape or format, or have two halves already.

    Example:
        >>> from moe_jax.quantization import Spec, quantize
        >>> half = quantize(jnp.ones((4, 8, 16)), Spec("float8_e4m3fn", "tensor"))
        >>> w13 = join_halves(half, half)
        >>> w13.shape, w13.scales.shape, w13.halves
        ((4, 16, 16), (4, 2), 2)
    """
    parts_of = [(half.shape, half.spec, half.columns, half.halves) for half in (gate, up)]
    if parts_of[0] != parts_of[1] or gate.halves != 1:
        raise ValueError(
            f"gate {gate.shape} of {gate.spec} in {gate.halves} halves and up {up.shape} of {up.spec} in {up.halves} halves "
            "must agree, one half each; quantize them alike"
        )

    def join(a: Array | None, b: Array | None) -> Array | None:
        if a is None:
            return None
        if gate.spec.granularity == "tensor":
            return jnp.stack([a, b], axis=-1)
        return jnp.concatenate([a, b], axis=-1 if gate.spec.block is None else -2)

    joined = dataclasses.replace(gate, halves=2)
    if gate.global_scale is not None:
        joined = dataclasses.replace(joined, global_scale=jnp.stack([gate.global_scale, up.global_scale], axis=-1))
    values = jnp.concatenate([gate.values, up.values], axis=-2)
    return _with(joined, values, join(gate.scales, up.scales), join(gate.zero_points, up.zero_points))


def pad_columns(array: QuantizedArray, multiple: int) -> QuantizedArray:
    """The same matrix with its stored columns filled up to a multiple, by codes that stand for zero.

    Scales are left as they are: a kernel that reads the filled columns multiplies zeros by the last scale of the row.

    Example:
        >>> from moe_jax.quantization import Spec, quantize
        >>> w = pad_columns(quantize(jnp.ones((2, 100)), Spec("int8", "channel")), 64)
        >>> w.shape, w.values.shape
        ((2, 100), (2, 128))
    """
    columns = array.shape[-1]
    missing = -columns % multiple
    if not missing:
        return array
    shape = (*array.shape[:-1], missing)
    if array.zero_points is None:
        fill = jnp.full(shape, 8 if array.spec.dtype == "int4" else 0, array.codes().dtype)
    else:
        batch = array.shape[:-2]
        blocks, last = array.blocks, array.zero_points.reshape(*array.shape[:-2], *array.blocks.grid)[..., -1]
        rows = jnp.repeat(last, blocks.block_rows, axis=-1)[..., : array.shape[-2] // array.halves]
        fill = jnp.broadcast_to(rows.reshape(*batch, array.shape[-2], 1), shape)
    codes = jnp.concatenate([array.codes(), fill.astype(array.codes().dtype)], axis=-1)
    padded = with_codes(array, codes, array.scales, array.zero_points)
    return dataclasses.replace(padded, columns=columns)


def with_codes(
    array: QuantizedArray, codes: Shaped[Array, "*B N K"], scales: Array, zero_points: Array | None
) -> QuantizedArray:
    """The array with other contents, its codes given one by one as `QuantizedArray.codes` gives them."""
    if array.spec.codes_per_value == 1:
        return dataclasses.replace(array, values=codes, scales=scales, zero_points=zero_points, columns=None)
    columns = codes.shape[-1] if codes.shape[-1] % 2 else None
    return dataclasses.replace(array, values=pack_int4(codes), scales=scales, zero_points=zero_points, columns=columns)


def _with(array: QuantizedArray, values: Array, scales: Array, zero_points: Array | None) -> QuantizedArray:
    return dataclasses.replace(array, values=values, scales=scales, zero_points=zero_points)


def _check_range(what: str, start: int, stop: int, size: int) -> None:
    if not 0 <= start <= stop <= size:
        raise ValueError(f"[{start}, {stop}) must lie within the {size} {what}")


def _share(what: str, size: int, parts: int) -> int:
    if parts < 1 or size % parts:
        raise ValueError(
            f"{size} {what} have no {parts} equal parts; choose a divisor, or cut unequal parts with slice_rows or slice_columns"
        )
    return size // parts
