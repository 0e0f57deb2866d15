"""Shared memory of the block-scaled matmul: tiles of rows of 128 bytes, in the swizzle that TMA writes and tcgen05 reads."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax.kernels.blackwell.config import LINE


def bits(dtype: Any) -> int:
    """Of an element: four of float4_e2m1fn, which NumPy gives a byte.

    Example:
        >>> bits("float4_e2m1fn"), bits("float8_e4m3fn")
        (4, 8)
    """
    return 4 if jnp.dtype(dtype) == jnp.float4_e2m1fn else 8 * jnp.dtype(dtype).itemsize


def tiled(shape: tuple[int, ...], rows: int, dtype: Any) -> Any:
    """Shared memory of that shape, whose rows have 128 bytes, in swizzled tiles of so many of them."""
    swizzle = plgpu.SwizzleTransform(LINE)
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((rows, shape[-1])), swizzle))


class Rows:
    """Rows that begin anywhere in memory, seen by eights and one by one: `moe_jax.kernels.hopper.views` says why and how.

    Args:
        shape: ``[..., rows, columns]``, 128 bytes a row.
        dtype: of the elements; four-bit ones are packed.
        interpret: the kernel is interpreted.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any, interpret: bool):
        self._union = not interpret
        eights = tiled(shape, 8, dtype)
        self.scratch = plgpu.RefUnion(eights, tiled(shape, 1, dtype)) if self._union else eights

    def eights(self, ref: Any) -> Any:
        """What tensor cores read, and registers fill."""
        return ref[0] if self._union else ref

    def singles(self, ref: Any) -> Any:
        """What TMA copies rows to and from."""
        return ref[1] if self._union else ref
