"""The layout in which block-scaled tensor cores read scales: 128 rows times 4 columns, 512 bytes that lie together."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

TILE_ROWS, TILE_COLUMNS = 128, 4
_LANES = 32  # rows r, r + 32, r + 64 and r + 96 of a tile lie next to each other


def swizzle_scales(scales: Shaped[Array | np.ndarray, "*B M C"]) -> Shaped[Array, "*B padded_M padded_C"]:
    """Scales, one for each row and group of columns, in the order of 128x4 tiles.

    Byte ``(m % 32) * 16 + m // 32 % 4 * 4 + c % 4`` of tile ``(m // 128, c // 4)`` is that of row m and group c; tiles follow one
    another row by row. What is filled up to whole tiles is zero.

    Args:
        scales: ``[..., M, C]``, any dtype of eight bits.

    Returns:
        ``[..., M', C']`` with M' a multiple of 128 and C' of 4: the shape that other libraries give it, though its rows are none.

    Example:
        >>> tile = swizzle_scales(jnp.arange(128 * 4, dtype=jnp.int32).reshape(128, 4))
        >>> tile.reshape(-1)[:20].tolist()
        [0, 1, 2, 3, 128, 129, 130, 131, 256, 257, 258, 259, 384, 385, 386, 387, 4, 5, 6, 7]
    """
    scales = jnp.asarray(scales)
    *batch, rows, columns = scales.shape
    missing = -rows % TILE_ROWS, -columns % TILE_COLUMNS
    scales = jnp.pad(scales, [(0, 0)] * len(batch) + [(0, n) for n in missing])
    padded = scales.shape
    tiles = scales.reshape(-1, padded[-2] // TILE_ROWS, 4, _LANES, padded[-1] // TILE_COLUMNS, TILE_COLUMNS)
    return tiles.transpose(0, 1, 4, 3, 2, 5).reshape(padded)


def deswizzle_scales(swizzled: Shaped[Array | np.ndarray, "*B padded_M padded_C"], rows: int, columns: int) -> Array:
    """The inverse of `swizzle_scales`.

    Args:
        swizzled: ``[..., M', C']``.
        rows: M.
        columns: C.

    Returns:
        ``[..., M, C]``.

    Raises:
        ValueError: other sizes than `swizzle_scales` gives M and C.

    Example:
        >>> scales = jnp.arange(5 * 3, dtype=jnp.uint8).reshape(5, 3)
        >>> bool((deswizzle_scales(swizzle_scales(scales), 5, 3) == scales).all())
        True
    """
    swizzled = jnp.asarray(swizzled)
    wanted = -(-rows // TILE_ROWS) * TILE_ROWS, -(-columns // TILE_COLUMNS) * TILE_COLUMNS
    if swizzled.shape[-2:] != wanted:
        raise ValueError(
            f"swizzled scales have shape {swizzled.shape}, but those of {rows} rows and {columns} groups are [..., "
            f"{wanted[0]}, {wanted[1]}]: whole tiles of {TILE_ROWS}x{TILE_COLUMNS}"
        )
    tiles = swizzled.reshape(-1, wanted[0] // TILE_ROWS, wanted[1] // TILE_COLUMNS, _LANES, 4, TILE_COLUMNS)
    return tiles.transpose(0, 1, 4, 3, 2, 5).reshape(swizzled.shape)[..., :rows, :columns]
