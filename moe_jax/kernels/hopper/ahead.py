"""Weights on their way into L2 before the kernel that multiplies them starts.

Between two kernels memory stands still for some microseconds: the last tiles of one end, the next is launched, its first loads
come back. What a multiprocessor will read first is known before: each asks for it when it has nothing else to do.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax.kernels.hopper import tiles

_BYTES = 128 * 1024  # that each multiprocessor asks for: 17 MB in all, what memory brings in 4 us
_BOX = 256  # TMA's limit per dimension


@dataclasses.dataclass(frozen=True)
class Ahead:
    """The first weights of a grouped matmul.

    Attributes:
        weights: ``[E, N, K]``.
        tile_cols: columns of the output that a multiprocessor computes together.
        gated: gate rows and up rows lie N / 2 apart.
        band: of that matmul's configuration.
    """

    weights: Any
    tile_cols: int
    gated: bool
    band: int

    def fetch(self, weights_g: Any, group_g: Any, num_tiles: Any, worker: Any) -> None:
        """Asks for the first tile that multiprocessor number `worker` will take, if there is one.

        Args:
            weights_g: the weights.
            group_g: ``[tiles]``, the expert of each row tile.
            num_tiles: row tiles.
            worker: number of the multiprocessor.
        """
        _, rows, k = self.weights.shape
        n_out = rows // 2 if self.gated else rows
        n_tiles = pl.cdiv(n_out, self.tile_cols)
        halves = (0, n_out) if self.gated else (0,)
        height = min(_BOX, self.tile_cols)
        starts = [half + start for half in halves for start in range(0, self.tile_cols, height)]
        depth = min(k, _BYTES // (self.tile_cols * len(halves) * jnp.dtype(self.weights.dtype).itemsize))

        @pl.when(worker < num_tiles * n_tiles)
        def _():
            m, n = tiles.visit(worker, num_tiles, n_tiles, self.band)
            expert = group_g[m]
            for start in starts:
                for at in range(0, depth, _BOX):
                    columns = pl.ds(at, min(_BOX, k - at))
                    plgpu.async_prefetch(weights_g.at[expert, pl.ds(n * self.tile_cols + start, height), columns])
