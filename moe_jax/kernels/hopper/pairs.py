"""Two consumers to a tile of gate and up: each decodes and sums one of them, and that of the up-projection hands its sums over.

With few rows a consumer is busy with decoding. Two to a tile take less time for it, where wider tiles would leave multiprocessors
without work, and have half as many sums in registers, so that four find room. Sums are added up as ever: the bits are those of
one consumer. What that is worth: `decoding_config`.

The sums pass through shared memory, each thread's to the thread of the same place: float32 ``[64, rows]``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax.kernels.hopper.matmul_config import WGMMA_ROWS, Config

_BANKS = 8  # columns more in a line: else eight rows of a tile would begin at the same bank


def handed_over(config: Config) -> tuple[int, int, int]:
    """The shape of the sums on their way.

    Example:
        >>> handed_over(Config((8,), consumers=2, halves=1, paired=True))
        (1, 64, 8)
    """
    rows = config.tile_rows
    return config.consumers // 2, WGMMA_ROWS, rows if rows <= _BANKS else rows + _BANKS


class Pairs:
    """The pairs of a kernel's consumers.

    Args:
        config: how the work is tiled, `Config.paired`.
        interpret: the kernel is interpreted.
    """

    def __init__(self, config: Config, interpret: bool):
        self._interpret = interpret
        pairs = config.consumers // 2
        self.scratch = [
            plgpu.SMEM(handed_over(config), jnp.float32),
            plgpu.Barrier(num_arrivals=1, num_barriers=pairs),
            plgpu.Barrier(num_arrivals=1, num_barriers=pairs),
        ]

    def place(self, wg: Any) -> tuple[Any, Any]:
        """A consumer's pair, and its half: 0 for the gate, 1 for up."""
        return lax.div(wg, jnp.int32(2)), lax.rem(wg, jnp.int32(2))

    def meet(self, refs: Any, wg: Any, i: Any, acc: Any, finish: Callable[[list[Any]], None]) -> None:
        """Hands the sums of the tile over, or takes them and calls `finish` with those of gate and up.

        Args:
            refs: of `scratch`.
            wg: the consumer.
            i: number of its tile.
            acc: its sums, float32 ``[64, rows]``.
            finish: what becomes of them.
        """
        (sums, full, empty), (pair, half) = refs, self.place(wg)
        part = sums.at[pair, :, pl.ds(0, acc.shape[1])]

        @pl.when(half == 1)
        def _():
            pl.when(i > 0)(lambda: plgpu.barrier_wait(empty.at[pair]))
            part[...] = acc
            if self._interpret:  # it does not know that each thread arrives, after its own stores
                plgpu.commit_smem()
            plgpu.barrier_arrive(full.at[pair])

        @pl.when(half == 0)
        def _():
            plgpu.barrier_wait(full.at[pair])
            up = plgpu.load(part, layout=plgpu.Layout.WGMMA, optimized=False)
            if self._interpret:
                plgpu.commit_smem()
            plgpu.barrier_arrive(empty.at[pair])
            finish([acc, up])

    def observe(self, refs: Any, wg: Any, my_tiles: Any) -> None:
        """A consumer's end: every phase of every barrier is observed before the kernel ends."""
        pair, half = self.place(wg)
        pl.when((half == 1) & (my_tiles > 0))(lambda: plgpu.barrier_wait(refs[2].at[pair]))
