"""What the gradient of a down-projection's input does with a tile that is summed: back through the activation before it.

The tile stands in registers, 64 columns of I by rows of a group: the cotangents of activations, but for the router weights.
Blocks of 16 rows of the pre-activations, gate and up, come through shared memory, two blocks ahead. Of each block leave

- the cotangents of the pre-activations, gate and up,
- the activations times the router weights of their rows, which the gradient of the weights takes,
- the sums over columns of cotangents times activations, which are the cotangents of the router weights. A warp has 16 columns of
  a block; each stores the sums over its own, and they are added up afterwards, always in the same order.

Blocks are small because a thread holds up to 192 sums of the tile beside them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax import _compat
from moe_jax.activations import Activation
from moe_jax.kernels.hopper import row_scales, tiles, views
from moe_jax.kernels.hopper.matmul_config import WGMMA_ROWS, Config

ROWS = 16  # of a block
_WARPS = 4
_SPARE = 4  # router weights past those of a block, which a copy brings because it begins at a multiple of four


def lines(config: Config, n_out: int) -> int:
    """Sums of a row: one for each warp, over what its consumer has of the tiles.

    Example:
        >>> lines(Config(), 768)
        24
    """
    return pl.cdiv(n_out, config.consumers * config.halves * WGMMA_ROWS) * config.consumers * _WARPS


class References(NamedTuple):
    """References of the epilogue in a kernel.

    Attributes:
        h_g: pre-activations ``[rows, 2 * N_out]`` or ``[rows, N_out]``.
        outs: of `GradientEpilogue.out_types`.
        out_s: blocks on their way to the first two.
        h_s: blocks of pre-activations, and
        full: their barriers.
        scales: those of `row_scales.RowScales`.
    """

    h_g: Any
    outs: tuple[Any, Any, Any]
    out_s: Any
    h_s: Any
    full: Any
    scales: tuple[Any, Any, Any]


class GradientEpilogue:
    """The epilogue of all tiles of a kernel.

    Args:
        config: how the work is tiled.
        n_out: columns of a half of the pre-activations, a multiple of 64.
        dtype: of the pre-activations and of what leaves.
        activation: gated or not.
        interpret: the kernel is interpreted.
    """

    def __init__(self, config: Config, n_out: int, dtype: Any, activation: Activation, *, interpret: bool):
        self._config, self._n_out, self._dtype, self._activation = config, n_out, dtype, activation
        self._parts, self._interpret = 2 if activation.is_gated else 1, interpret
        blocks = config.consumers * 2
        self._pre = views.Operand(blocks, ROWS, self._parts * views.COLUMNS, views.COLUMNS, dtype, interpret)
        self._outs = self._parts + 1
        options = {"buffers": 2 * self._outs, "rows": ROWS}
        self._staged = views.Staged(config.consumers, views.COLUMNS, n_out, dtype, interpret, **options)
        self._scales = row_scales.RowScales(config, aligned=False, interpret=interpret)
        self.scratch = [
            self._staged.scratch,
            self._pre.scratch,
            plgpu.Barrier(num_arrivals=self._parts, num_barriers=blocks),
            *self._scales.scratch,
        ]

    def out_types(self, rows: int) -> list[jax.ShapeDtypeStruct]:
        """Cotangents of the pre-activations, scaled activations, and the parts of the cotangents of the router weights."""
        return [
            jax.ShapeDtypeStruct((rows, self._parts * self._n_out), self._dtype),
            jax.ShapeDtypeStruct((rows, self._n_out), self._dtype),
            jax.ShapeDtypeStruct((lines(self._config, self._n_out), rows), jnp.float32),
        ]

    def references(self, outs: tuple[Any, Any, Any], operands: tuple[Any, Any], scratch: Any) -> References:
        """Of results, pre-activations and router weights, and the references of `scratch`."""
        out_s, h_s, full, *of_scales = scratch
        return References(operands[0], outs, out_s, h_s, full, (operands[1], *of_scales))

    def _blocks(self, count: int) -> list[tuple[int, int]]:
        """(first row, which 64 columns), in their order."""
        return [(start, half) for start in range(0, count, ROWS) for half in range(self._config.halves)]

    def begin(self, refs: References, wg: Any, first_row: Any, col: Any) -> None:
        """Asks for what the first blocks of a tile need, before it is summed."""
        self._scales.fetch(refs.scales, wg, first_row)
        for i, block in enumerate(self._blocks(ROWS)[:2]):
            self._fetch(refs, wg, i, first_row, col, block)

    def _fetch(self, refs: References, wg: Any, i: int, first_row: Any, col: Any, block: tuple[int, int]) -> None:
        start, half = block
        slot = wg * 2 + i % 2
        # Past the last columns there are no cotangents, but numbers they can be multiplied with.
        column = jnp.minimum(col + half * WGMMA_ROWS, self._n_out - WGMMA_ROWS)
        for part in range(self._parts):
            columns = pl.ds(column + part * self._n_out, WGMMA_ROWS)
            source = refs.h_g.at[pl.ds(first_row + start, ROWS), columns]
            plgpu.copy_gmem_to_smem(source, self._pre.singles(refs.h_s).at[slot, part], refs.full.at[slot])

    def _load(self, refs: References, slot: Any, part: int, rows: int) -> Any:
        """float32 ``[64, rows]`` of the pre-activations."""
        block = self._pre.eights(refs.h_s).at[slot, part, pl.ds(0, rows)]
        if self._interpret:
            return block[...].T.astype(jnp.float32)
        loaded = plgpu.load(block.T, layout=plgpu.Layout.WGMMA_TRANSPOSED)
        return plgpu.layout_cast(loaded, plgpu.Layout.WGMMA).astype(jnp.float32)

    def finish(self, refs: References, wg: Any, accs: Any, first_row: Any, size: Any, col: Any, below: int) -> None:
        """Stores a consumer's part of a tile; arguments as in `epilogue.Epilogue.finish`."""
        count = accs[0].shape[1]
        blocks = self._blocks(count)
        line = lax.div(col, self._config.halves * WGMMA_ROWS) * _WARPS
        plgpu.barrier_wait(refs.scales[2].at[wg])
        sums = None
        for i, (start, half) in enumerate(blocks):
            most, slot = min(ROWS, count - start), wg * 2 + i % 2
            weights = refs.scales[1].at[wg, pl.ds(start, most + _SPARE)]
            weights = row_scales.load(weights, first_row, most, False, self._interpret)
            weights = lax.broadcast_in_dim(weights, (WGMMA_ROWS, most), [1])
            plgpu.barrier_wait(refs.full.at[slot])
            parts = [self._load(refs, slot, part, most) for part in range(self._parts)]
            slopes_of = self._activation.slopes_gated if self._parts == 2 else self._activation.slope
            value, *slopes = slopes_of(*parts, divide=tiles.divide)
            product = accs[half][:, start : start + most]
            sums = product * value if half == 0 else sums + product * value
            scaled = product * weights
            outs = [*(scaled * slope for slope in slopes), value * weights]
            # The block before the last has left its buffers. The interpreter counts copies, and a block may have none.
            plgpu.wait_smem_to_gmem(0 if self._interpret else 1, wait_read_only=True)
            for j, out in enumerate(outs):
                out = plgpu.layout_cast(out.astype(self._dtype), plgpu.Layout.WGMMA_TRANSPOSED)
                self._staged.fill(refs.out_s, wg, i % 2 * self._outs + j, out)
            plgpu.commit_smem()
            if i + 2 < len(blocks):
                self._fetch(refs, wg, i, first_row, col, blocks[i + 2])
            left = most if start + most <= below else size - start  # mostly known: few branches
            place = i % 2 * self._outs, left, most, first_row + start, col + half * WGMMA_ROWS
            pl.when(place[-1] < self._n_out)(lambda place=place: self._store(refs, wg, *place))
            plgpu.commit_smem_to_gmem_group()
            if half == self._config.halves - 1:
                self._store_sums(refs.outs[2], sums, line, first_row + start, size - start)
        if len(blocks) % 2:  # the next tile begins with the first buffers again
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def _store(self, refs: References, wg: Any, buffer: int, size: Any, most: int, row: Any, col: Any) -> None:
        to = [(refs.outs[0], col + part * self._n_out) for part in range(self._parts)] + [(refs.outs[1], col)]

        def send(first, count):
            for j, (out, column) in enumerate(to):
                self._staged.store(refs.out_s, wg, buffer + j, first, count, out, row + first, column)

        if isinstance(size, int):
            send(0, most)
        else:
            views.send_first(send, size, most)

    def _store_sums(self, target: Any, values: Any, line: Any, first: Any, size: Any) -> None:
        if self._interpret:
            of_warps = jnp.sum(values.reshape(_WARPS, -1, values.shape[1]), axis=1)
            for j in range(values.shape[1]):

                @pl.when(j < size)
                def _(j=j):
                    target[pl.ds(line, _WARPS), first + j] = of_warps[:, j]

            return
        splat = plgpu.Layout.WG_SPLAT

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA, splat, splat, splat))
        def run(ctx, target, values, line, first, count):
            del ctx
            _compat.store_column_sums(target, values, line, first, count)

        run(target, values, line, first, size)
