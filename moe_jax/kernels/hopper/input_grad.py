"""The gradient of a grouped matmul's input on Hopper: cotangents of the rows of a group times the weights of its expert.

It is the grouped matmul of `matmul_bf16` with another operand: the weights ``[E, N, K]`` are contracted over N, their rows, and
wgmma reads them transposed from shared memory (`weight_tiles.MMajor`). Schedule, row counts, ring and ragged stores are the same,
and so is what holds of them: any number of rows a group, no work for experts without rows, sums over N in order.

Measured on an H100, 131072 rows of 128 experts, 1536 columns contracted, 2048 out (2026-11-27-h100-training-kernels.txt in
benchmarks/results): tiles of 160 rows 1195 us (690 TFLOP/s), of 192 rows 1213 us in clusters of two and 1197 us alone.
"""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import Array, Float, Int

from moe_jax.kernels.hopper import matmul_bf16
from moe_jax.kernels.hopper.matmul_config import Config, default_config


def supports(rows: Any, weights: Any, tile_rows: int) -> str | None:
    """Why this kernel cannot run the problem; None if it can. Shapes as in `input_grad`."""
    experts, n, k = weights.shape
    turned = jax.ShapeDtypeStruct((experts, k, n), weights.dtype)
    return matmul_bf16.supports(rows, turned, None, None, tile_rows)


def config_for(tile_rows: int) -> Config:
    """The tiles for groups that were cut into tiles of so many rows: those of a projection with many experts.

    Example:
        >>> config_for(160).row_counts[-1], config_for(8).columns
        (160, 64)
    """
    many = 1 << 20  # tiles enough for all multiprocessors: columns stay whole
    return default_config(tile_rows, False, many, many)


def input_grad(
    rows: Float[Array, "R N"],
    weights: Float[Array, "E N K"],
    tile_group: Int[Array, "tiles"],
    tile_starts: Int[Array, "tiles"],
    tile_sizes: Int[Array, "tiles"],
    num_tiles: Int[Array, "1"],
    *,
    config: Config,
    tile_spans: Int[Array, "tiles 2"] | None = None,
    interpret: Any = None,
    multiprocessors: int | None = None,
) -> Float[Array, "R K"]:
    """``rows @ weights[group]`` for the rows of the tiles; the others are undefined.

    Args:
        rows: of all groups.
        weights: of the experts.
        tile_group: the expert of each tile.
        tile_starts: its first row.
        tile_sizes: its rows.
        num_tiles: tiles that hold rows.
        config: how the work is tiled.
        tile_spans: as in `matmul_bf16`.
        interpret: for the interpreter.
        multiprocessors: of the device, by default.
    """
    schedule = tile_group, tile_starts, tile_sizes, num_tiles
    more = {"config": config, "tile_spans": tile_spans, "interpret": interpret, "multiprocessors": multiprocessors}
    return matmul_bf16.grouped_matmul(rows, weights, *schedule, None, None, transposed=True, **more)
