"""Weights on the M side of wgmma: how a stage of the ring holds them, with their rows or their columns as rows of the output.

A projection contracts over the columns of a matrix ``[N, K]``, which are neighbours in memory: `KMajor`. The gradient of its
input contracts over the rows: `MMajor`. wgmma reads 16-bit operands from shared memory either way, so the matrix is brought as it
lies and transposed on its way into the tensor cores. Nothing is copied in memory.
"""

from __future__ import annotations

from typing import Any

from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax.kernels.hopper import interleaved
from moe_jax.kernels.hopper.matmul_config import WGMMA_ROWS, Config


class KMajor:
    """Weights ``[E, N, K]`` contracted over K: a row of an expert's matrix is a column of the output.

    A stage holds the weights of one consumer after the other, of each the pieces of K, of each gate then up, or a block of
    columns then the next.

    Args:
        config: how the work is tiled.
        n_out: columns of the output.
        gated: the second block of 64 weight rows is that of the other half.
        dtype: of the weights.
        transforms: of shared memory; its swizzle is that of the rows they are multiplied with.
    """

    def __init__(self, config: Config, n_out: int, gated: bool, dtype: Any, transforms: Any):
        self._config, halves, depth, columns = config, config.halves, config.depth, config.columns
        wg_cols = columns if gated else halves * columns
        self._tile_cols = config.consumers * wg_cols
        self._pieces = [  # (row of the stage, row of the expert's matrix, first column of K)
            (
                ((wg * depth + piece) * halves + half) * columns,
                half * n_out + wg * wg_cols if gated else (wg * halves + half) * columns,
                piece * (config.tile_k // depth),
            )
            for wg in range(config.consumers)
            for piece in range(depth)
            for half in range(halves)
        ]
        self._rows_a_copy = columns
        if config.interleaved:  # by eights
            self._rows_a_copy = interleaved.EIGHT
            self._pieces = [
                (wg * WGMMA_ROWS + 2 * first + half * interleaved.EIGHT, half * n_out + wg * columns + first, 0)
                for wg in range(config.consumers)
                for first in range(0, columns, interleaved.EIGHT)
                for half in range(2)
            ]
        if not gated and depth == 1:  # neighbours: one copy for as many as TMA takes
            self._rows_a_copy = min(256, self._tile_cols)
            self._pieces = [(start, start, 0) for start in range(0, self._tile_cols, self._rows_a_copy)]
        self.copies = len(self._pieces)
        shape = (config.stages, config.stage_rows, config.tile_k // depth)
        self.scratch = plgpu.SMEM(shape, dtype, transforms=transforms)

    def fetch(self, source: Any, target: Any, expert: Any, n: Any, step: Any, slot: Any, full: Any) -> None:
        """Asks for the weights of a step of tile column `n`."""
        tk, depth = self._config.tile_k, self._config.depth
        for at, row, column in self._pieces:
            ks = pl.ds(step * tk + column, tk // depth)
            part = source.at[expert, pl.ds(n * self._tile_cols + row, self._rows_a_copy), ks]
            plgpu.copy_gmem_to_smem(part, target.at[slot, pl.ds(at, self._rows_a_copy)], full.at[slot])

    def block(self, ref: Any, slot: Any, wg: Any, half: Any, column: int, columns: int) -> Any:
        """``[64, columns]`` of a stage, from `column` of its K on."""
        config = self._config
        side, at = divmod(column, config.tile_k // config.depth)
        first = ((wg * config.depth + side) * config.halves + half) * config.columns
        rows = pl.ds(wg * WGMMA_ROWS if config.interleaved else first, WGMMA_ROWS)
        return ref.at[slot, rows, pl.ds(at, columns)]


class MMajor:
    """Weights ``[E, K, N]`` contracted over K, the rows of an expert's matrix: its columns are those of the output.

    Args:
        config: how the work is tiled; blocks of 64 columns.
        dtype: of the weights, 16 bits.
        transforms: as in `KMajor`.
    """

    def __init__(self, config: Config, dtype: Any, transforms: Any):
        self._config, self._tile_cols = config, config.consumers * config.halves * WGMMA_ROWS
        self.copies = 1
        self.scratch = plgpu.SMEM((config.stages, config.tile_k, self._tile_cols), dtype, transforms=transforms)

    def fetch(self, source: Any, target: Any, expert: Any, n: Any, step: Any, slot: Any, full: Any) -> None:
        """Asks for the weights of a step of tile column `n`."""
        ks, columns = (
            pl.ds(step * self._config.tile_k, self._config.tile_k),
            pl.ds(n * self._tile_cols, self._tile_cols),
        )
        plgpu.copy_gmem_to_smem(source.at[expert, ks, columns], target.at[slot], full.at[slot])

    def block(self, ref: Any, slot: Any, wg: Any, half: int, column: int, columns: int) -> Any:
        """``[64, columns]`` of a stage, from `column` of its K on: transposed."""
        mine = pl.ds((wg * self._config.halves + half) * WGMMA_ROWS, WGMMA_ROWS)
        return ref.at[slot, pl.ds(column, columns), mine].T
