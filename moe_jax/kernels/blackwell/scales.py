"""Scales in the order in which the block-scaled tensor cores take them: tiles of 128 rows x 4 groups of columns, 512 bytes each.

Plain JAX: small kernels of XLA's before that of the product.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Shaped

from moe_jax.quantization.scale_layout import TILE_COLUMNS, TILE_ROWS, swizzle_scales

_TILE = 32, 16  # how the bytes of a tile are seen by `tcgen05.cp`


def of_weights(scales: Shaped[Array, "E N C"], halves: int) -> Shaped[Array, "E H B C4 32 16"]:
    """Scales of weights by tiles, each half of the rows beginning with one; what is filled up is byte 0.

    Example:
        >>> of_weights(jnp.ones((2, 320, 12), jnp.float8_e4m3fn), halves=2).shape
        (2, 2, 2, 3, 32, 16)
    """
    experts, rows, columns = scales.shape
    swizzled = swizzle_scales(_bytes(scales).reshape(experts, halves, rows // halves, columns))
    blocks, across = swizzled.shape[2] // TILE_ROWS, swizzled.shape[3] // TILE_COLUMNS
    return lax.bitcast_convert_type(swizzled.reshape(experts, halves, blocks, across, *_TILE), scales.dtype)


def of_tiles(
    scales: Shaped[Array, "R C"], starts: Int[Array, " tiles"], sizes: Int[Array, " tiles"]
) -> Shaped[Array, "tiles C4 32 16"]:
    """Scales of the rows of each tile; byte 0 where it has no row: nothing of what lies there comes along.

    Args:
        scales: ``[R, C]``.
        starts: the first row of each tile.
        sizes: its rows, at most 128.

    Example:
        >>> of_tiles(jnp.ones((9, 5), jnp.float8_e4m3fn), jnp.array([4]), jnp.array([3])).astype(jnp.float32).sum().item()
        15.0
    """
    swizzled = swizzle_scales(rows_of_tiles(_bytes(scales), starts, sizes))
    swizzled = swizzled.reshape(starts.shape[0], swizzled.shape[2] // TILE_COLUMNS, *_TILE)
    return lax.bitcast_convert_type(swizzled, scales.dtype)


def _bytes(scales: Array) -> Array:
    """As bytes: float8_e8m0fnu has no zero to fill up with, byte 0 is its smallest number."""
    return lax.bitcast_convert_type(scales, jnp.uint8)


def rows_of_tiles(
    values: Shaped[Array, "R *more"], starts: Int[Array, " tiles"], sizes: Int[Array, " tiles"]
) -> Shaped[Array, "tiles 128 *more"]:
    """The entries of the rows of each tile; zero where it has no row.

    Example:
        >>> rows_of_tiles(jnp.arange(5.0), jnp.array([1]), jnp.array([2]))[0, :3].tolist()
        [1.0, 2.0, 0.0]
    """
    row = jnp.arange(TILE_ROWS, dtype=jnp.int32)[None]
    there = row < sizes[:, None]
    found = values[jnp.where(there, starts[:, None] + row, 0)]
    there = there.reshape(*there.shape, *[1] * (values.ndim - 1))
    return jnp.where(there, found, jnp.zeros((), values.dtype))
