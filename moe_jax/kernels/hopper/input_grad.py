"""The gradient of a grouped matmul's input on Hopper: cotangents of the rows of a group times the weights of its expert.

It is the grouped matmul of `matmul_bf16` with another operand: the weights ``[E, N, K]`` are contracted over N, their rows, and
wgmma reads them transposed from shared memory (`weight_tiles.MMajor`). Schedule, row counts, ring and ragged stores are the same,
and so is what holds of them: any number of rows a group, no work for experts without rows, sums over N in order.

With `gradient_epilogue` a tile of the down-projection's gradient leaves as that of the up-projection. That form has not run on a
GPU: for tiles of 192 rows its code takes minutes to compile.

Measured on an H100, 131072 rows of 128 experts, 1536 columns contracted, 2048 out (2026-11-27-h100-training-kernels.txt in
benchmarks/results): tiles of 160 rows 1195 us (690 TFLOP/s), of 192 rows 1213 us in clusters of two and 1197 us alone.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.activations import Activation
from moe_jax.kernels.hopper import matmul_bf16, views
from moe_jax.kernels.hopper.matmul_config import Config, default_config


def supports(rows: Any, weights: Any, tile_rows: int) -> str | None:
    """Why this kernel cannot run the problem; None if it can. Shapes as in `input_grad`."""
    experts, n, k = weights.shape
    turned = jax.ShapeDtypeStruct((experts, k, n), weights.dtype)
    return matmul_bf16.supports(rows, turned, None, None, tile_rows)


def supports_activation(rows: Any, weights: Any, tile_rows: int) -> str | None:
    """Why `activation_input_grad` cannot run what `supports`; None if it can."""
    n_out = weights.shape[2]
    if n_out % views.COLUMNS:
        return f"the output size={n_out} must be a multiple of {views.COLUMNS}, columns that leave registers together"
    return supports(rows, weights, tile_rows)


def config_for(tile_rows: int, through_activation: bool = False) -> Config:
    """The tiles for groups that were cut into tiles of so many rows: those of a projection with many experts.

    Example:
        >>> config_for(160).row_counts[-1], config_for(8).columns
        (160, 64)
    """
    many = 1 << 20  # tiles enough for all multiprocessors: columns stay whole
    config = default_config(tile_rows, False, many, many)
    if through_activation:
        # The stages make room for the blocks that leave.
        config = dataclasses.replace(config, stages=min(config.stages, 3), cluster=1)
    return config


def input_grad(
    rows: Float[Array, "R N"],
    weights: Float[Array, "E N K"],
    tile_group: Int[Array, "tiles"],
    tile_starts: Int[Array, "tiles"],
    tile_sizes: Int[Array, "tiles"],
    num_tiles: Int[Array, "1"],
    *,
    config: Config,
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
        interpret: for the interpreter.
        multiprocessors: of the device, by default.
    """
    schedule = tile_group, tile_starts, tile_sizes, num_tiles
    more = {"config": config, "interpret": interpret, "multiprocessors": multiprocessors}
    return matmul_bf16.grouped_matmul(rows, weights, *schedule, None, None, transposed=True, **more)


def activation_input_grad(
    rows: Float[Array, "R H"],
    weights: Float[Array, "E H I"],
    tile_group: Int[Array, "tiles"],
    tile_starts: Int[Array, "tiles"],
    tile_sizes: Int[Array, "tiles"],
    num_tiles: Int[Array, "1"],
    pre_activation: Float[Array, "R N"],
    row_weights: Float[Array, " R"],
    activation: Activation,
    *,
    config: Config,
    interpret: Any = None,
    multiprocessors: int | None = None,
) -> tuple[Float[Array, "R N"], Float[Array, "R I"], Float[Array, "lines R"]]:
    """`input_grad` of a down-projection and back through the activation before it; arguments as there and in its op.

    Returns:
        Cotangents of the pre-activations, activations times router weights, and sums to be added up over the lines: the
        cotangents of the router weights.
    """
    # A copy of router weights begins at a multiple of four and brings 32 at a time; a line of them is whole 16 bytes.
    padded = jnp.pad(row_weights, (0, -row_weights.shape[0] % 4))[None]
    schedule = tile_group, tile_starts, tile_sizes, num_tiles
    more = {"config": config, "interpret": interpret, "multiprocessors": multiprocessors}
    gradient = pre_activation, padded
    return matmul_bf16.grouped_matmul(
        rows, weights, *schedule, None, activation, transposed=True, gradient=gradient, **more
    )
