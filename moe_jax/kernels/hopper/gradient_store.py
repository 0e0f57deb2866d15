"""How the sums of a weight gradient leave a consumer: in blocks of 64 rows x 128 bytes, through a ring of buffers, by TMA.

Sums of earlier gradients come by TMA through the same buffers, are added in float32 and leave with what was added.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax.kernels.hopper import tiles
from moe_jax.kernels.hopper.matmul_config import WGMMA_ROWS

LINE = 128  # bytes of a row of a block


class Refs(NamedTuple):
    """Where the sums of a kernel go.

    Attributes:
        out: ``[E, M, N]``.
        buffers: of all consumers, `GradientStore.buffers`.
        earlier: ``[E, M, N]``, added; None if there are none.
        fetched: `GradientStore.fetched`; None likewise.
    """

    out: Any
    buffers: Any
    earlier: Any = None
    fetched: Any = None


class GradientStore:
    """The way out of tiles whose consumers hold some sums of 64 rows each.

    Args:
        parts: the first row and the first column of each of a consumer's sums, in its part of the tile.
        columns: of each.
        dtype: of the gradient.
        most_buffers: of a consumer, at least two.
        consumers: that share the buffers' allocation.
    """

    def __init__(self, parts: list[tuple[int, int]], columns: int, dtype: Any, most_buffers: int, consumers: int):
        self._parts, self._dtype, self._consumers = parts, jnp.dtype(dtype), consumers
        self._width = LINE // self._dtype.itemsize
        self._blocks = [(part, c) for part in range(len(parts)) for c in range(0, columns, self._width)]
        self._buffers = min(most_buffers, len(self._blocks))

    def buffers(self, n: int) -> Any:
        """Their shared memory, for gradients of n columns."""
        shape = (self._consumers, self._buffers, WGMMA_ROWS, self._width)
        return plgpu.SMEM(shape, self._dtype, transforms=tiles.transforms(n, self._dtype))

    @property
    def fetched(self) -> Any:
        """Says that earlier sums are there."""
        return plgpu.Barrier(num_barriers=self._consumers * self._buffers)

    def ask(self, refs: Refs, wg: Any, place: tuple[Any, Any, Any]) -> None:
        """Asks for the first earlier sums of a tile, if there are any: before its products.

        Args:
            refs: of the kernel.
            wg: the consumer.
            place: the expert, and where the consumer's part of the tile begins.
        """
        if refs.earlier is None:
            return
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for block in range(self._buffers):
            self._fetch(refs, wg, place, block)

    def send(self, refs: Refs, wg: Any, place: tuple[Any, Any, Any], sums: Sequence[Any]) -> None:
        """Sends a consumer's sums on their way; arguments as in `ask`."""
        for block, (part, c) in enumerate(self._blocks):
            buffer = refs.buffers.at[wg, block % self._buffers]
            values = sums[part][:, c : c + self._width]
            if refs.earlier is not None:
                plgpu.barrier_wait(refs.fetched.at[wg * self._buffers + block % self._buffers])
                buffer[...] = values + plgpu.load(buffer, layout=plgpu.Layout.WGMMA)
            else:
                plgpu.wait_smem_to_gmem(self._younger(block), wait_read_only=True)  # what was in the buffer has left
                buffer[...] = values.astype(self._dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(buffer, refs.out.at[self._target(place, block)])
            if refs.earlier is not None and block > 0 and block - 1 + self._buffers < len(self._blocks):
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                self._fetch(refs, wg, place, block - 1 + self._buffers)

    def _target(self, place: tuple[Any, Any, Any], block: int) -> tuple[Any, Any, Any]:
        (expert, row, column), (part, c) = place, self._blocks[block]
        first_row, first_column = self._parts[part]
        return expert, pl.ds(row + first_row, WGMMA_ROWS), pl.ds(column + (first_column + c), self._width)

    def _fetch(self, refs: Refs, wg: Any, place: tuple[Any, Any, Any], block: int) -> None:
        to, there = block % self._buffers, refs.earlier.at[self._target(place, block)]
        plgpu.copy_gmem_to_smem(there, refs.buffers.at[wg, to], refs.fetched.at[wg * self._buffers + to])

    def _younger(self, block: int) -> int:
        """Blocks that a consumer stored after the one which was in this one's buffer: that of a tile before at first."""
        if block >= self._buffers:
            return self._buffers - 1
        return block + (len(self._blocks) - 1 - block) % self._buffers
