"""Tiles of rows on their way from registers to memory: as floats of 16 bits, or as codes with a scale for each 128 columns.

A consumer holds 64 rows, which begin anywhere: shared memory is filled by eights of rows and read row by row, as `views` says.
A row's 128 columns lie in four neighbouring lanes, which find their largest magnitude with two shuffles: what is quantized here
never leaves its warp.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax.kernels.hopper import row_scales, views
from moe_jax.kernels.hopper.scaling import Scaling
from moe_jax.quantization.formats import Spec

ROWS = 64  # of a consumer
COLUMNS = 128  # of a group, and of a tile
_LINE = 128  # bytes of a row in shared memory: the widest swizzle


class RowStore:
    """Stores blocks of 64 rows x 128 bytes, one at a time for each consumer.

    Args:
        consumers: their number.
        n_out: columns of the output; blocks past the last are not stored.
        dtype: of the output.
        interpret: the kernel is interpreted.
    """

    def __init__(self, consumers: int, n_out: int, dtype: Any, *, interpret: bool):
        self.columns = _LINE // jnp.dtype(dtype).itemsize
        self._n_out, self._dtype, self._union = n_out, dtype, not interpret
        shape = (consumers, ROWS, self.columns)
        eights = views.tiled(shape, 8, dtype)
        self.scratch = plgpu.RefUnion(eights, views.tiled(shape, 1, dtype)) if self._union else eights

    def store(self, ref: Any, wg: Any, tile: Any, out: Any, row: Any, size: Any, col: Any) -> None:
        """Rounds a tile ``[64, columns]`` and stores its first `size` rows, from `row` and `col` of `out` on."""
        for start in range(0, tile.shape[1], self.columns):
            block = tile[:, start : start + self.columns].astype(self._dtype)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the block before has left
            (ref[0] if self._union else ref).at[wg][...] = block
            plgpu.commit_smem()
            pl.when(col + start < self._n_out)(lambda start=start: self._send(ref, wg, out, row, size, col + start))
            plgpu.commit_smem_to_gmem_group()

    def _send(self, ref: Any, wg: Any, out: Any, row: Any, size: Any, col: Any) -> None:
        def send(first, count):
            part = (ref[1] if self._union else ref).at[wg, pl.ds(first, count)]
            target = out.at[pl.ds(row + first, count), pl.ds(col, self.columns)]
            plgpu.copy_smem_to_gmem(part, target, commit_group=False)

        views.send_first(send, size, ROWS)


class QuantizedRowStore:
    """Quantizes tiles of 64 rows x 128 columns and stores codes and scales, bit for bit those of `gather_quantize`.

    Args:
        consumers: their number.
        n_out: columns of the output, a multiple of 128.
        spec: of the codes, a scale for each 128 columns of a row.
        dtype: that rows are rounded to before.
        interpret: the kernel is interpreted.
    """

    def __init__(self, consumers: int, n_out: int, spec: Spec, dtype: Any, *, interpret: bool):
        self._dtype, self._interpret = dtype, interpret
        self._scaling = Scaling(spec, given=False, interpret=interpret)
        self._codes = RowStore(consumers, n_out, spec.storage_dtype, interpret=interpret)
        self.scratch = self._codes.scratch

    def store(self, ref: Any, wg: Any, tile: Any, outs: tuple[Any, Any], row: Any, size: Any, col: Any) -> None:
        """Stores the first `size` rows of a tile, float32 ``[64, 128]``, as codes ``[R, N_out]`` and scales ``[G, Rp]``."""
        codes_g, scales_g = outs
        scaling, a_row = self._scaling, plgpu.Layout.WGMMA.reduce(1)
        values = tile.astype(self._dtype).astype(jnp.float32)
        scale = scaling.scale(scaling.amax(jnp.max(scaling.order(values), axis=1)))
        inverse = lax.broadcast_in_dim(scaling.reciprocal(scale, a_row), values.shape, [0])
        self._codes.store(ref, wg, scaling.encode(values, inverse), codes_g, row, size, col)
        row_scales.store(scales_g, lax.div(col, COLUMNS), row, scale, size, a_row, self._interpret)
