"""Scales of the rows of a tile, one a row, for a consumer's registers.

A tile begins at any row, but a load of two neighbouring numbers only at an even one: the scales pass through shared memory.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax.kernels.hopper.matmul_config import Config

MULTIPLE = 32  # a copy is a multiple of 128 bytes


class RowScales:
    """One scale a row, ``[1, rows]`` with as many to spare as a tile has rows.

    Its references are the scales in GPU memory, those of a tile in shared memory, and a barrier for each consumer.

    Args:
        config: how the work is tiled.
    """

    def __init__(self, config: Config):
        self._rows = pl.cdiv(config.tile_rows, MULTIPLE) * MULTIPLE
        self.scratch = [
            plgpu.SMEM((config.consumers, self._rows), jnp.float32),
            plgpu.Barrier(num_arrivals=1, num_barriers=config.consumers),
        ]

    def fetch(self, refs: tuple[Any, Any, Any], wg: Any, first_row: Any) -> None:
        """Asks for those of a tile, which begins at `first_row`."""
        source, target, full = refs
        plgpu.copy_gmem_to_smem(source.at[0, pl.ds(first_row, self._rows)], target.at[wg], full.at[wg])

    def spread(self, refs: tuple[Any, Any, Any], wg: Any, shape: tuple[int, int]) -> Any:
        """float32 ``[64, rows]``, when they have come."""
        _, numbers, full = refs
        plgpu.barrier_wait(full.at[wg])
        of_rows = plgpu.load(numbers.at[wg, pl.ds(0, shape[1])], layout=plgpu.Layout.WGMMA.reduce(0))
        return lax.broadcast_in_dim(of_rows, shape, [1])
