"""The product of a stage where there are no block-scaled tensor cores: in the interpreter of Pallas.

That one knows tensor memory and `tcgen05.mma`, but not with scales (jax 0.11.2 and 0.12.0.1): `TcGen05Mma` asserts that there are
none, and `async_copy_scales_to_tmem`, which has no rule, raises "source must be an SMEM ref". So codes are multiplied by their
scales first, in float32, into shared memory that is there in the interpreter alone, and an unscaled product of these is issued in
the place of the scaled one. Schedule, copies, ring, barriers and epilogue are those of the GPU.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Shaped

from moe_jax.kernels.blackwell.config import BLOCK, TILE_ROWS


class EmulatedProduct:
    """Products of the stages of a ring.

    Args:
        stages: of the ring.
        halves: blocks of weights of a stage.
        columns: of K in a stage.
        group: columns that share a scale.
    """

    def __init__(self, stages: int, halves: int, columns: int, group: int):
        self._group = group
        self.scratch = [
            plgpu.SMEM((stages, TILE_ROWS, columns), jnp.float32),
            plgpu.SMEM((stages, halves, BLOCK, columns), jnp.float32),
        ]

    def __call__(
        self, acc: Any, a: Any, b: Any, a_scales: Any, b_scales: Any, refs: Any, slot: Any, half: int, **how: Any
    ) -> None:
        """``acc = accumulate * acc + a @ b.T``, and an arrival, as `plgpu.tcgen05_mma` with scales.

        Args:
            acc: of the sums, in tensor memory.
            a: codes of rows ``[128, columns]``.
            b: of weights.
            a_scales: tiles of scales ``[1, C, 32, 16]``.
            b_scales: of weights.
            refs: of `scratch`.
            slot: the stage.
            half: the block of weights in it.
            **how: of `plgpu.tcgen05_mma`.
        """
        # A stage's own memory: it is not filled again before its products are done.
        of_rows, of_weights = refs[0].at[slot], refs[1].at[slot, half]
        if half == 0:
            of_rows[...] = self._dequantized(a, a_scales)
        of_weights[...] = self._dequantized(b, b_scales)
        plgpu.commit_smem()
        plgpu.tcgen05_mma(acc, of_rows, of_weights.T, **how)

    def _dequantized(self, codes: Any, scales: Any) -> Shaped[Array, "128 columns"]:
        tiles = scales[...].astype(jnp.float32)[0]  # [C, 32, 16]
        c = tiles.shape[0]
        ordered = tiles.reshape(c, 32, 4, 4).transpose(2, 1, 0, 3).reshape(TILE_ROWS, 4 * c)
        return codes[...].astype(jnp.float32) * jnp.repeat(ordered, self._group, axis=1)
