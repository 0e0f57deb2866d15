"""Shared memory that holds rows of a matrix, seen in two ways: by eights of rows, and row by row.

Registers and wgmma take swizzled tiles of eight rows. TMA can copy such tiles only from and to rows that start at a multiple of
eight, but groups of rows start anywhere. A tile of one row has the same bytes: eight rows of 128 bytes lie one behind the other,
and where a swizzle puts 16 bytes follows from their address alone. So a `plgpu.RefUnion` of both is one buffer, and copies run
from any row to any row.

The interpreter gives each member of a union memory of its own and knows no tiles: there both views are the same reference.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

STORED = 32  # rows of an output that leave shared memory together: two such buffers a consumer are enough


def _tiled(shape: tuple[int, ...], rows: int, dtype: Any) -> Any:
    columns = shape[-1]
    swizzle = plgpu.SwizzleTransform(columns * jnp.dtype(dtype).itemsize)
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((rows, columns)), swizzle))


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
        self.pieces, self.columns = tile_k // columns, columns
        shape = (stages, self.pieces, rows, columns)
        self._union = not interpret
        eights = _tiled(shape, 8, dtype)
        self.scratch = plgpu.RefUnion(eights, _tiled(shape, 1, dtype)) if self._union else eights

    def eights(self, ref: Any) -> Any:
        """What wgmma reads."""
        return ref[0] if self._union else ref

    def singles(self, ref: Any) -> Any:
        """What copies of rows fill."""
        return ref[1] if self._union else ref


class Staged:
    """Blocks of an output on their way to memory: two of up to 32 rows x 64 columns for each consumer.

    Registers fill a block whole; `store` sends rows of it, and parts of 64 columns, anywhere.

    Args:
        consumers: their number.
        columns: that are stored together: 64, 32 or 16; a narrower part is stored in eights of rows.
        dtype: of the elements.
        interpret: the kernel is interpreted.
    """

    def __init__(self, consumers: int, columns: int, dtype: Any, interpret: bool):
        self.columns = columns
        self.together = STORED if columns == 64 else 8  # rows that lie one behind the other
        self._union = not interpret
        swizzle = plgpu.SwizzleTransform(columns * jnp.dtype(dtype).itemsize)
        eights = plgpu.SMEM(
            (consumers, 2, STORED, 64), dtype, transforms=(plgpu.TilingTransform((8, columns)), swizzle)
        )
        singles = (consumers, 2, STORED // self.together, 64 // columns, self.together, columns)
        self.scratch = plgpu.RefUnion(eights, _tiled(singles, 1, dtype)) if self._union else eights

    def block(self, ref: Any, consumer: Any, buffer: int, rows: int) -> Any:
        """What registers fill."""
        return (ref[0] if self._union else ref).at[consumer, buffer, pl.ds(0, rows)]

    def store(self, ref: Any, consumer: Any, buffer: int, first: Any, count: int, target: Any, parts: Any) -> None:
        """Sends rows ``[first, first + count)``, which lie in one run of `together`, to ``target(first, columns)``.

        Args:
            ref: the scratch memory.
            consumer: whose.
            buffer: 0 or 1.
            first: a row of the block.
            count: rows, static.
            target: gives the place in memory of so many columns from one on, ``target(start, columns)``.
            parts: how many parts of the 64 columns, from the first on.
        """
        columns = self.columns

        def part(i):
            if self._union:
                run, row = jax.lax.div(first, self.together), jax.lax.rem(first, self.together)
                source = ref[1].at[consumer, buffer, run, i, pl.ds(row, count)]
            else:
                source = ref.at[consumer, buffer, pl.ds(first, count), pl.ds(i * columns, columns)]
            plgpu.copy_smem_to_gmem(source, target(i * columns, columns), commit_group=False)

        if columns == 64:
            part(0)
        else:
            pl.loop(0, parts)(part)

    def store_first(self, ref: Any, consumer: Any, buffer: int, size: Any, most: int, target: Any, parts: Any) -> None:
        """Sends the first `size` rows, or `most` if there are more, in runs as long as they go: 32, 16, 8, ... rows.

        ``target(row, count)`` gives what `store` wants for rows from one on.
        """
        together = min(self.together, most)

        def send(run):
            start = run * together
            left = jnp.clip(size - start, 0, together)

            @pl.when(left == together)
            def _():
                self.store(ref, consumer, buffer, start, together, target(start, together), parts)

            count = 1 << (together - 1).bit_length() - 1
            while count:

                @pl.when((left < together) & (left & count != 0))
                def _(count=count):
                    first = start + (left & ~(2 * count - 1))
                    self.store(ref, consumer, buffer, first, count, target(first, count), parts)

                count //= 2

        if together == most:
            send(size * 0)
        else:
            pl.loop(0, jax.lax.div(jnp.minimum(size, most) + (together - 1), together))(send)

    def store_marked(
        self, ref: Any, consumer: Any, buffer: int, marks: Any, most: int, target: Any, parts: Any
    ) -> None:
        """Sends those of the first `most` rows whose bit is set in `marks`, to neighbouring rows.

        ``target(nth, 1)`` gives what `store` wants for the nth of them.
        """
        nth = marks * 0
        for row in range(most):
            marked = (marks >> row) & 1

            @pl.when(marked != 0)
            def _(row=row, nth=nth):
                self.store(ref, consumer, buffer, jnp.int32(row), 1, target(nth, 1), parts)

            nth = nth + marked
