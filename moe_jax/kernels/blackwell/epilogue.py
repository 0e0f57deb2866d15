"""What the block-scaled matmul does with a tile of sums: factors, bias, activation, rounding, and its own rows to memory.

A lane of tensor memory, and a thread, has a row. 128 bytes of each go through shared memory at a time, in two buffers in turn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax.activations import Activation
from moe_jax.kernels.blackwell.config import BLOCK, LINE, TILE_ROWS
from moe_jax.kernels.blackwell.stage import Rows
from moe_jax.kernels.hopper import tiles, views

_TILE = plgpu.Layout.TCGEN05
_BUFFERS = 2


class Factors(NamedTuple):
    """References in GPU memory, None where there is none: ``[tiles, 128]``, ``[E, halves]`` and ``[E, N]``."""

    rows: Any
    weights: Any
    bias: Any


class Tile(NamedTuple):
    """A tile of rows: its number, its expert, its first row, its size."""

    number: Any
    expert: Any
    first_row: Any
    size: Any


class Epilogue:
    """The epilogue of all tiles of a kernel.

    Args:
        n_out: columns of the output, a multiple of 64.
        dtype: of the output, 16 bits.
        activation: gated or not; None for none.
        interpret: the kernel is interpreted.
    """

    def __init__(self, n_out: int, dtype: Any, activation: Activation | None, *, interpret: bool):
        self._n_out, self._dtype, self._activation, self._interpret = n_out, dtype, activation, interpret
        self._columns = LINE // jnp.dtype(dtype).itemsize
        self._staged = Rows((_BUFFERS, TILE_ROWS, self._columns), dtype, interpret)
        self.scratch = self._staged.scratch

    def finish(
        self,
        sums: list[Any],
        factors: Factors,
        tile: Tile,
        out: Any,
        staged: Any,
        col: Any,
        release: Callable[[], None],
    ) -> None:
        """Stores a tile.

        Args:
            sums: in tensor memory, ``[128, 128]`` each: gate and up, or one.
            factors: of the kernel.
            tile: where its rows lie.
            out: the output ``[R, N_out]``.
            staged: the reference of `scratch`.
            col: first column of the output.
            release: called when the sums have been read.
        """
        of_rows = None
        if factors.rows is not None:
            of_rows = plgpu.load(factors.rows.at[tile.number], layout=_TILE.reduce(1), optimized=False)
        for i, start in enumerate(range(0, BLOCK, self._columns)):
            columns = pl.ds(start, self._columns)
            parts = [plgpu.async_load_tmem(half.at[:, columns], layout=_TILE) for half in sums]
            plgpu.wait_load_tmem()
            if start + self._columns == BLOCK:
                release()

            @pl.when(col + start < self._n_out)
            def _(i=i, start=start, parts=parts):
                block = self._finished(parts, factors, of_rows, tile.expert, col + start).astype(self._dtype)
                # The block before the last has left its buffer. The interpreter counts copies, of which a block may have many.
                plgpu.wait_smem_to_gmem(0 if self._interpret else 1, wait_read_only=True)
                self._staged.eights(staged).at[i % _BUFFERS][...] = block
                plgpu.commit_smem()
                self._send(staged, i % _BUFFERS, tile, out, col + start)
                plgpu.commit_smem_to_gmem_group()

    def _finished(self, parts: list[Any], factors: Factors, of_rows: Any, expert: Any, col: Any) -> jax.Array:
        shape = parts[0].shape
        for half, part in enumerate(parts):
            factor = None if factors.weights is None else factors.weights[expert, half]
            if of_rows is not None:
                scaled = of_rows if factor is None else of_rows * factor
                part = part * lax.broadcast_in_dim(scaled, shape, [0])
            elif factor is not None:
                part = part * factor
            if factors.bias is not None:
                source = factors.bias.at[expert, pl.ds(half * self._n_out + col, self._columns)]
                bias = plgpu.load(source, layout=_TILE.reduce(0), optimized=False).astype(jnp.float32)
                part = part + lax.broadcast_in_dim(bias, shape, [1])
            parts[half] = part
        if self._activation is None:
            return parts[0]
        if self._activation.is_gated:
            return self._activation.apply_gated(*parts, divide=tiles.divide)
        return self._activation.apply(parts[0], divide=tiles.divide)

    def _send(self, staged: Any, buffer: int, tile: Tile, out: Any, col: Any) -> None:
        """The rows of a tile and no others: all together, or by eights and what is left row by row."""

        def send(first, count):
            part = self._staged.singles(staged).at[buffer, pl.ds(first, count)]
            target = out.at[pl.ds(tile.first_row + first, count), pl.ds(col, self._columns)]
            plgpu.copy_smem_to_gmem(part, target, commit_group=False)

        views.send_first(send, tile.size, TILE_ROWS)
