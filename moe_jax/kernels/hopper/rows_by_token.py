"""Rows gathered on their way into shared memory: every row of a tile comes from wherever its token lies.

TMA copies boxes, and on Hopper its rows are neighbours in memory. The older `cp.async` copies 16 bytes a thread from anywhere, so
a warpgroup brings 16 rows of 128 bytes an instruction, to the places where the swizzle of a wgmma operand wants them. The copies
are asynchronous too: a stage is handed over when the next one has been asked for.

Learned on an H200 (benchmarks/results/2026-11-25-h200-variants.txt; up-projection of qwen3-30b-a3b, 4096 tokens):

- 333 us with the rows gathered before, in 38 us. 397 when a stage's copies had to be there before the next stage's were asked
  for: their latency and the waiting then take longer than a stage's products. 340 with two stages under way.
- The proxy fence between the copies and wgmma costs nothing: 338 us without it (4097 tokens).
- Not timed yet: a TMA copy for each row, 160 a stage.

The interpreter knows no PTX. There a row is a TMA copy, with the same hand-over.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax import _compat
from moe_jax.kernels.hopper.selection import LAYOUT, row_numbers

PIECE = 64  # columns that a swizzle of 128 bytes spans, of 16-bit elements
ROWS = 16  # that a warpgroup copies at a time, eight threads a row
LAYOUT_OF_ROWS = LAYOUT.reduce(1)


class RowsByToken:
    """Copies tiles of rows of `x` into a ring of stages. A warpgroup calls it.

    Args:
        x: reference ``[T, K]``, K a multiple of 64, 16-bit elements.
        tile_rows: the most rows of a tile, a multiple of 16.
        interpret: the kernel is interpreted.
    """

    def __init__(self, x: Any, tile_rows: int, interpret: bool):
        self._x, self._tile_rows, self._interpret = x, tile_rows, interpret

    def tokens(self, row_tokens: Any, first: Any, size: Any) -> Any:
        """The tokens of `size` rows from `first` on, -1 for the rest of a tile. The reference holds a tile more than rows."""
        if self._interpret:
            return row_tokens.at[pl.ds(first, self._tile_rows)], size
        tokens = plgpu.load(row_tokens.at[pl.ds(first, self._tile_rows)], layout=LAYOUT_OF_ROWS, optimized=False)
        return jnp.where(row_numbers(self._tile_rows) < size, tokens, -1)

    def start(self, tokens: Any, pieces: list[Any], column: Any, row_done: Any) -> None:
        """Begins to copy the columns from `column` on, a piece of 64 of the tile after the other; zeros past the last."""
        if self._interpret:
            source, size = tokens

            @pl.loop(0, size)
            def _(row):
                for i, piece in enumerate(pieces):
                    wanted = self._x.at[pl.ds(source[row], 1), pl.ds(column + i * PIECE, PIECE)]
                    plgpu.copy_gmem_to_smem(wanted, piece.at[pl.ds(row, 1)], row_done)
                    plgpu.barrier_wait(row_done)

            return
        width = self._x.shape[1]
        swizzled = plgpu.RefType((plgpu.TilingTransform((8, PIECE)), plgpu.SwizzleTransform(128)))
        for i, piece in enumerate(pieces):
            bytes_there = jnp.where(column + i * PIECE < width, 16, 0)

            @plgpu.inline_mgpu(
                arg_types=(plgpu.RefType(), swizzled, LAYOUT_OF_ROWS, plgpu.Layout.WG_SPLAT, plgpu.Layout.WG_SPLAT)
            )
            def copy(ctx, x, tile, tokens, at, there):
                del ctx
                _compat.copy_rows(x, tile, tokens, at, there)

            copy(self._x, piece, tokens, jnp.minimum(column + i * PIECE, width - PIECE), bytes_there)
        _ptx("cp.async.commit_group;")

    def finish(self, under_way: int) -> None:
        """Waits until all copies are done but those of the last `under_way` calls of `start`; then wgmma may read them."""
        if not self._interpret:
            _ptx(f"cp.async.wait_group {under_way};")
            _ptx("fence.proxy.async.shared::cta;")


def _ptx(code: str) -> None:
    @plgpu.inline_mgpu()
    def run(ctx):
        del ctx
        _compat.ptx(code)

    run()
