"""Few rows of an output from registers straight to memory.

A consumer has 64 columns of the output in the rows of wgmma's sums, so what is one row in memory lies in many threads.
`views.Staged` brings it there through shared memory and TMA, a copy a row: a fence, a barrier of four warps and a thread that
asks for one row after the other, while its warp, and so the consumer, waits. Here an instruction transposes eight rows and
columns within a warp (`movmatrix`), four neighbouring threads then hold 16 bytes of a row, and each stores its own 4. Which rows
are stored, and where, each thread knows from the tile's numbers, so that nothing is divided between branches either.

Sectors of memory have 32 bytes, and get them from two instructions of the same warp. That is for tiles of up to 64 rows, where
weights bind and not what is written. Layers on an H200, through shared memory and this way: NVFP4, qwen3-30b-a3b, 16 tokens, 76.4
and 74.9 us, 128 tokens 116.8 and 114.4; `fp8_channel`, 128 tokens, 171.5 and 167.5; bfloat16, 16 tokens, 195.2 and 193.2, 1024
tokens the same (benchmarks/results/2026-11-28-h200-few-rows-variants.txt).
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax import _compat_words


def store(
    out: Any,
    tile: Any,
    first_row: Any,
    size: Any,
    col: Any,
    columns: int,
    *,
    marked: bool,
    interpret: bool,
    layout: Any = plgpu.Layout.WGMMA,
) -> None:
    """Stores rows of a tile to neighbouring rows of the output.

    Args:
        out: ``[rows, N_out]`` in GPU memory, 16-bit floats, N_out even.
        tile: ``[64, count]``, columns of the output by rows, as wgmma sums them, or ``[32, count]``.
        first_row: of the output.
        size: the first so many rows are stored; `marked`: those whose bit is set, one behind the other.
        col: first column of the output; what would lie past the last is not stored.
        columns: so many of the tile's are stored.
        marked: whether `size` are marks, of up to 32 rows.
        interpret: the kernel is interpreted.
        layout: of the tile.
    """
    if interpret:
        _interpreted(out, tile, first_row, size, col, columns, marked)
        return
    splat = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout, splat, splat, splat))
    def run(ctx, out, tile, first_row, size, col):
        del ctx
        _compat_words.store_transposed(out, tile, first_row, size, col, columns, marked)

    run(out, tile, first_row, size, col)


def _interpreted(out: Any, tile: Any, first_row: Any, size: Any, col: Any, columns: int, marked: bool) -> None:
    """Column by column: the last tile of an output may have fewer."""
    n_out, row = out.shape[1], first_row
    for i in range(tile.shape[1]):
        here = (size >> i) & 1 if marked else jnp.where(i < size, 1, 0)

        @pl.when(here != 0)
        def _(i=i, row=row):
            for width in sorted({columns, n_out % columns or columns}, reverse=True):
                fits = (col + columns <= n_out) if width == columns else (col + width == n_out)

                @pl.when(fits)
                def _(width=width):
                    out[row, pl.ds(col, width)] = tile[:width, i]

        row = row + here
