"""Rows quantized as they leave a grouped matmul, in groups of 128 columns: what two consumers make of a tile side by side.

Each consumer rounds its 64 columns to 16 bits and puts 32 rows of them into shared memory, as the epilogue does. When both have,
each takes 16 of the rows whole, eight threads a row, and the rest is that of `gather_quantize`: the largest magnitude, a scale,
codes. So the bits are those of a kernel that reads the rows again, and nothing of 16 bits passes through memory.

Learned on an H100 (benchmarks/results/2026-11-26-h100-fp8-paired.txt): up-projections of tiles of up to 96 rows take 251 instead
of 237 us (qwen3-30b-a3b, 4096 tokens) and 871 instead of 822 us (16384 tokens); a kernel that reads the rows again takes 30 and
119 us. Tiles of 128 rows have no registers left: dsv3-ep8, 16384 tokens, 1032 instead of 940 us, against 32 us.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax import _compat
from moe_jax.kernels.hopper import row_scales
from moe_jax.kernels.hopper.matmul_config import Config
from moe_jax.kernels.hopper.row_stream import Tile
from moe_jax.kernels.hopper.scaling import Scaling
from moe_jax.quantization.formats import Spec

COLUMNS = 128  # of a group, and of a tile of both consumers
_HALF = COLUMNS // 2  # that a consumer makes
_BLOCK = 32  # rows that pass through shared memory together
_SHARE = _BLOCK // 2  # of them that a consumer quantizes


def supports(spec: Spec, config: Config, n_out: int, gated: bool) -> str | None:
    """Why rows cannot be quantized as they leave; None if they can."""
    if spec.granularity != "group" or spec.block[1] != COLUMNS:
        return f"{spec} must have a scale for each {COLUMNS} columns"
    if not gated or config.consumers != 2 or config.columns != _HALF:
        return (
            f"a gated projection with consumers={config.consumers} and columns={config.columns} must have 2 and {_HALF}: "
            f"together they make {COLUMNS} columns"
        )
    if n_out % COLUMNS:
        return f"the output size={n_out} must be a multiple of {COLUMNS}, of whole groups"
    odd = [count for count in config.row_counts if count % _BLOCK]
    return f"row_counts {odd} must be multiples of {_BLOCK}" if odd else None


class References(NamedTuple):
    """Codes ``[R, N_out]`` and scales ``[N_out / 128, R and more]`` in GPU memory, and those of `QuantizedStore.scratch`."""

    codes_g: Any
    scales_g: Any
    rows_s: Any
    codes_s: Any
    both: Any


class QuantizedStore:
    """Stores tiles of a kernel with two consumers.

    Args:
        spec: of the codes.
        dtype: that rows are rounded to before.
        interpret: the kernel is interpreted.
    """

    def __init__(self, spec: Spec, dtype: Any, *, interpret: bool):
        self._dtype, self._interpret = dtype, interpret
        self._scaling = Scaling(spec, given=False, interpret=interpret)
        self._tile = Tile(_HALF, jnp.dtype(dtype), interpret)  # 16 rows of one consumer's columns
        swizzled = plgpu.TilingTransform((8, _HALF)), plgpu.SwizzleTransform(_HALF * jnp.dtype(dtype).itemsize)
        self.scratch = [
            plgpu.SMEM((2, 2, 2, _SHARE, _HALF), dtype, transforms=swizzled),  # consumer, buffer, who quantizes them
            plgpu.SMEM((2, 2, _SHARE, COLUMNS), spec.storage_dtype),
            plgpu.Barrier(num_arrivals=2),
        ]

    def store(self, refs: References, wg: Any, tile: Any, first_row: Any, size: Any, col: Any) -> None:
        """Quantizes and stores a consumer's part of a tile.

        Args:
            refs: of the kernel.
            wg: the consumer.
            tile: float32 ``[64, rows]``, its columns of the output.
            first_row: of the output.
            size: rows that are stored.
            col: first column of this consumer.
        """
        blocks = tile.shape[1] // _BLOCK
        group = lax.div(col, COLUMNS)
        for i in range(blocks):
            buffer = i % 2
            for share in range(2):
                first = i * _BLOCK + share * _SHARE
                block = plgpu.layout_cast(
                    tile[:, first : first + _SHARE].astype(self._dtype), plgpu.Layout.WGMMA_TRANSPOSED
                )
                refs.rows_s.at[wg, buffer, share].T[...] = block
            self._meet(refs.both)
            mine = i * _BLOCK + wg * _SHARE
            self._quantize(refs, wg, buffer, first_row + mine, size - mine, group)
        if blocks % 2:  # the next tile begins with the first buffer again
            self._meet(refs.both)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def _meet(self, both: Any) -> None:
        """Both consumers are here, and what they wrote can be read."""
        plgpu.commit_smem()
        plgpu.barrier_arrive(both)
        plgpu.barrier_wait(both)

    def _quantize(self, refs: References, wg: Any, buffer: int, row: Any, size: Any, group: Any) -> None:
        """16 rows, of which the first `size` count, to `row` and the columns of a group."""
        scaling, tile = self._scaling, self._tile
        a_scale = tile.layout.reduce(1)
        halves = [self._load(refs.rows_s.at[half, buffer, wg]) for half in range(2)]
        order = jnp.maximum(*(jnp.max(scaling.order(half), axis=1) for half in halves))
        scale = scaling.scale(scaling.amax(order))
        inverse = tile.spread(scaling.reciprocal(scale, a_scale))
        # The codes before the last have left their buffer. The interpreter counts copies, and there may have been none.
        plgpu.wait_smem_to_gmem(0 if self._interpret else 1, wait_read_only=True)
        codes = refs.codes_s.at[wg, buffer]
        for half, values in enumerate(halves):
            _compat.store_scattered(codes.at[:, pl.ds(half * _HALF, _HALF)], scaling.encode(values, inverse))
        plgpu.commit_smem()

        def send(first, count):
            target = refs.codes_g.at[pl.ds(row + first, count), pl.ds(group * COLUMNS, COLUMNS)]
            plgpu.copy_smem_to_gmem(codes.at[pl.ds(first, count)], target, commit_group=False)

        pl.when(size >= _SHARE)(lambda: send(0, _SHARE))
        pl.when(size < _SHARE)(lambda: pl.loop(0, jnp.maximum(size, 0))(lambda one: send(one, 1)))
        plgpu.commit_smem_to_gmem_group()
        row_scales.store(refs.scales_g, group, row, scale, size, a_scale, self._interpret)

    def _load(self, block: Any) -> Any:
        """float32 ``[16, 64]``."""
        if self._interpret:
            return block[...].astype(jnp.float32)
        return plgpu.load(block, layout=self._tile.layout).astype(jnp.float32)
