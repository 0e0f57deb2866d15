"""Shared memory that holds rows of a matrix, seen in two ways: by eights of rows, and row by row.

Registers and wgmma take swizzled tiles of eight rows. TMA can copy such tiles only from and to rows that start at a multiple of
eight, but groups of rows start anywhere. A tile of one row has the same bytes: eight rows of 128 bytes lie one behind the other,
and where a swizzle puts 16 bytes follows from their address alone. So a `plgpu.RefUnion` of both is one buffer, and copies run
from any row to any row.

The interpreter gives each member of a union memory of its own and knows no tiles: there both views are the same reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax import _compat

LINE = 128  # bytes, of which copies begin at a multiple
COLUMNS = 64  # of a staged block: as many rows of weights as one wgmma takes
ALIGNED = 1024  # bytes: where a buffer of shared memory may begin
STORED = 32  # rows of an output that leave shared memory together: two such buffers a consumer are enough


def tiled(shape: tuple[int, ...], rows: int, dtype: Any) -> Any:
    """Shared memory of that shape in swizzled tiles of so many rows, as wide as the last axis."""
    columns = shape[-1]
    swizzle = plgpu.SwizzleTransform(columns * jnp.dtype(dtype).itemsize)
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((rows, columns)), swizzle))


def send_first(send: Callable[[Any, int], None], size: Any, most: int, *, row_bytes: int = LINE) -> None:
    """Calls `send(first, count)` for the first `size` of up to `most` rows: all together, by eights and the rest one by one.

    A copy begins at a multiple of 128 bytes of shared memory, or the kernel ends with a misaligned address, which the interpreter
    does not notice. So rows of 64 bytes go two by two, and a last one alone: it has an even number.
    """
    together = LINE // row_bytes
    pl.when(size >= most)(lambda: send(0, most))

    @pl.when(size < most)
    def _():
        eights = jnp.maximum(size, 0) // 8
        pl.loop(0, eights)(lambda run: send(run * 8, 8))
        if together == 1:  # the loop whose code was measured
            pl.loop(eights * 8, jnp.maximum(size, 0))(lambda row: send(row, 1))
            return
        begin, left = eights * 8, jnp.maximum(size, 0) - eights * 8
        pl.loop(0, left // together)(lambda run: send(begin + run * together, together))
        pl.when(left % together > 0)(lambda: send(begin + left - 1, 1))


class Operand:
    """A ring of tiles of rows for wgmma: ``[stages, pieces, rows, columns]``, a piece being what one swizzle spans.

    Args:
        stages: of the ring.
        rows: the most rows of a tile.
        tile_k: columns of a stage.
        columns: of a piece.
        dtype: of the elements.
        interpret: the kernel is interpreted.
    """

    def __init__(self, stages: int, rows: int, tile_k: int, columns: int, dtype: Any, interpret: bool):
        self.pieces = tile_k // columns
        shape = (stages, self.pieces, rows, columns)
        self._union = not interpret
        eights = tiled(shape, 8, dtype)
        self.scratch = plgpu.RefUnion(eights, tiled(shape, 1, dtype)) if self._union else eights

    def eights(self, ref: Any) -> Any:
        """What wgmma reads."""
        return ref[0] if self._union else ref

    def singles(self, ref: Any) -> Any:
        """What copies of rows fill."""
        return ref[1] if self._union else ref


class Staged:
    """Blocks of an output on their way to memory: two of up to 32 rows x 64 columns for each consumer.

    Registers fill a block whole; its first `columns` leave it, row by row or in runs of rows. Tiles need an output of whole 64
    columns. Others, and narrow blocks, take plain rows, which registers fill with conflicts of banks. A plain row alone is
    contiguous in memory: a bulk copy without a box, which nothing cuts at the end of the output's row.

    Args:
        consumers: their number.
        columns: of a block that are stored: 64 or fewer.
        n_out: columns of the output; what would lie past the last is not stored.
        dtype: of the elements.
        interpret: the kernel is interpreted.
    """

    def __init__(self, consumers: int, columns: int, n_out: int, dtype: Any, interpret: bool):
        self._columns, self._n_out = columns, n_out
        self._tiles = columns == COLUMNS and n_out % COLUMNS == 0
        self._union = self._tiles and not interpret
        shape = (consumers, 2, STORED, COLUMNS)
        eights = tiled(shape, 8, dtype) if self._tiles else plgpu.SMEM(shape, dtype)
        self.scratch = plgpu.RefUnion(eights, tiled(shape, 1, dtype)) if self._union else eights

    def fill(self, ref: Any, consumer: Any, buffer: Any, block: Any) -> None:
        """Writes registers ``[64, rows]`` into the block, transposed."""
        part = (ref[0] if self._union else ref).at[consumer, buffer, pl.ds(0, block.shape[1])]
        if self._tiles:
            part.T[...] = block
        else:
            _compat.store_scattered(part.T, block)

    def store(self, ref: Any, consumer: Any, buffer: Any, first: Any, count: int, out: Any, row: Any, col: Any) -> None:
        """Sends `count` rows from `first` on to rows of `out` from `row` on, at column `col`."""

        def send(columns):
            part = (ref[1] if self._union else ref).at[consumer, buffer, pl.ds(first, count)]
            part = part if columns == COLUMNS else part.at[:, pl.ds(0, columns)]
            target = out.at[pl.ds(row, count), pl.ds(col, columns)]
            plgpu.copy_smem_to_gmem(part, target, commit_group=False)

        if self._tiles or count > 1:
            send(self._columns)
            return
        pl.when(col + self._columns <= self._n_out)(lambda: send(self._columns))
        rest = self._n_out % self._columns
        if rest:
            pl.when((col < self._n_out) & (col + self._columns > self._n_out))(lambda: send(rest))

    def store_first(
        self, ref: Any, consumer: Any, buffer: Any, size: Any, most: int, out: Any, row: Any, col: Any
    ) -> None:
        """Sends the first `size` rows, or `most` if there are more: all together, or by eights and what is left row by row.

        `size` is an int if it is known to be `most`.
        """

        def send(first, count):
            self.store(ref, consumer, buffer, first, count, out, row + first, col)

        if self._columns != COLUMNS:  # rows that do not lie one behind the other
            pl.loop(0, jnp.clip(size, 0, most))(lambda row: send(row, 1))
            return
        if isinstance(size, int):
            send(0, most)
            return
        send_first(send, size, most)
