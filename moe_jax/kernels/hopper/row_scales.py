"""Scales of the rows of a tile, on their way into the registers of a consumer, or out of them.

A tile begins at any row. TMA takes the start of a box along the last axis only in steps of 16 bytes (elsewhere it ends the
kernel with an illegal instruction), and a load of two neighbouring numbers wants an even one. So a copy begins up to three
scales before the first of the tile, and registers take them from shared memory one by one.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax import _compat
from moe_jax.kernels.hopper.matmul_config import Config

_STEP = 4  # scales in 16 bytes
_MULTIPLE = 32  # scales in 128 bytes: what a copy is a multiple of


def held(rows: int) -> int:
    """Scales that are copied for so many rows.

    Example:
        >>> held(8), held(30), held(128)
        (32, 64, 160)
    """
    return pl.cdiv(rows + _STEP - 1, _MULTIPLE) * _MULTIPLE


def copy(source: Any, line: Any, first_row: Any, rows: int, target: Any, full: Any) -> None:
    """Asks for the scales of `rows` rows from `first_row` on.

    Args:
        source: ``[lines, rows and some to spare]`` in GPU memory.
        line: which line.
        first_row: any.
        rows: their number, static.
        target: `held(rows)` or more float32 in shared memory.
        full: the barrier to arrive at.
    """
    count = held(rows)
    begin = pl.ds(first_row & -_STEP, count)
    plgpu.copy_gmem_to_smem(source.at[line, begin], target.at[pl.ds(0, count)], full)


def before(first_row: Any) -> Any:
    """Scales that `copy` brings before that of the first row.

    Example:
        >>> before(8), before(11)
        (0, 3)
    """
    return first_row & (_STEP - 1)


def load(scales: Any, first_row: Any, rows: int, aligned: bool, interpret: bool) -> jax.Array:
    """float32 ``[rows]``, what `copy` brought, as columns of a tile that wgmma has made."""
    shift, layout = before(first_row), plgpu.Layout.WGMMA.reduce(0)
    if aligned:
        return plgpu.load(scales.at[pl.ds(0, rows)], layout=layout)
    if interpret:
        return scales[pl.ds(shift, rows)]

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT),
        return_type=plgpu.ShapeDtypeStruct((rows,), jnp.float32, layout=layout),
    )
    def run(ctx, scales, shift):
        del ctx
        return _compat.load_singly(scales, shift, layout, rows)

    return run(scales, shift)


def store(target: Any, line: Any, first_row: Any, scales: Any, size: Any, layout: Any, interpret: bool) -> None:
    """Stores the first `size` of scales that were made in registers to neighbouring rows of a line of ``[G, Rp]``."""
    if interpret:
        for i in range(scales.shape[0]):

            @pl.when(i < size)
            def _(i=i):
                target[line, first_row + i] = scales[i]

        return
    splat = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout, splat, splat, splat))
    def run(ctx, target, values, line, first, count):
        del ctx
        _compat.store_run(target, values, line, first, count)

    run(target, scales, line, first_row, size)


class RowScales:
    """One scale a row for a whole tile, ``[1, rows and some to spare]``.

    Its references are the scales in GPU memory, those of a tile in shared memory, and a barrier for each consumer.

    Args:
        config: how the work is tiled.
        aligned: every tile begins at a multiple of 4 rows.
        interpret: the kernel is interpreted.
    """

    def __init__(self, config: Config, *, aligned: bool, interpret: bool):
        self._rows, self._aligned, self._interpret = config.tile_rows, aligned, interpret
        self.scratch = [
            plgpu.SMEM((config.consumers, held(config.tile_rows)), jnp.float32),
            plgpu.Barrier(num_arrivals=1, num_barriers=config.consumers),
        ]

    def fetch(self, refs: tuple[Any, Any, Any], wg: Any, first_row: Any) -> None:
        """Asks for those of a tile, which begins at `first_row`."""
        source, target, full = refs
        copy(source, 0, first_row, self._rows, target.at[wg], full.at[wg])

    def spread(self, refs: tuple[Any, Any, Any], wg: Any, first_row: Any, shape: tuple[int, int]) -> jax.Array:
        """float32 ``[64, rows]``, when they have come."""
        _, numbers, full = refs
        plgpu.barrier_wait(full.at[wg])
        of_rows = load(numbers.at[wg], first_row, shape[1], self._aligned, self._interpret)
        return lax.broadcast_in_dim(of_rows, shape, [1])
