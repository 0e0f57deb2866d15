"""What the gradient of a down-projection's input does with a tile that is summed: back through the activation before it.

The tile stands in registers, 64 columns of I by rows of a group: the cotangents of activations, but for the router weights.
Blocks of 16 rows of the pre-activations, gate and up, come through shared memory, brought by a warp of their own. From each leave

- the cotangents of the pre-activations, gate and up,
- the activations times the router weights of their rows, which the gradient of the weights takes,
- the sums over columns of cotangents times activations, which are the cotangents of the router weights. A warp has 16 columns of
  a block; each stores the sums over its own, and they are added up afterwards, always in the same order.

Blocks are small because a thread holds up to 192 sums of the tile beside them. There is one copy of this for all row counts,
which leaves out the blocks that a tile does not have: it is long.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
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
        weights_g: router weights ``[1, padded rows]``.
        outs: of `GradientEpilogue.out_types`.
        out_s: blocks on their way to the first two.
        h_s: blocks of pre-activations,
        weights_s: router weights of their rows, and
        full, empty: their barriers.
    """

    h_g: Any
    weights_g: Any
    outs: tuple[Any, Any, Any]
    out_s: Any
    h_s: Any
    weights_s: Any
    full: Any
    empty: Any


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
        slots = config.consumers * config.halves  # one for each 64 columns of a tile
        self._pre = views.Operand(slots, ROWS, self._parts * views.COLUMNS, views.COLUMNS, dtype, interpret)
        self._outs = self._parts + 1
        options = {"buffers": config.halves * self._outs, "rows": ROWS}
        self._staged = views.Staged(config.consumers, views.COLUMNS, n_out, dtype, interpret, **options)
        self.scratch = [
            self._staged.scratch,
            self._pre.scratch,
            plgpu.SMEM((slots, row_scales.held(ROWS)), jnp.float32),
            plgpu.Barrier(num_arrivals=self._parts + 1, num_barriers=slots),
            plgpu.Barrier(num_arrivals=1, num_barriers=slots),
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
        return References(*operands, outs, *scratch)

    def produce(self, refs: References, num_tiles: Any, tile: Callable[[Any], tuple[Any, Any, Any]]) -> None:
        """Brings the blocks of all tiles, one after the other; for a warp of its own.

        Args:
            refs: of the kernel.
            num_tiles: tiles of this block.
            tile: the first row, the rows and the first column of each.
        """
        slots = self._config.consumers * self._config.halves

        def of_tile(i, turn):
            first_row, size, col = tile(i)
            blocks = pl.cdiv(size, ROWS)

            @pl.loop(0, blocks)
            def _(block):
                row = first_row + block * ROWS
                for slot in range(slots):
                    pl.when(turn + block > 0)(lambda slot=slot: plgpu.barrier_wait(refs.empty.at[slot]))
                    # Past the last columns there are no cotangents, but numbers they can be multiplied with.
                    column = jnp.minimum(col + slot * WGMMA_ROWS, self._n_out - WGMMA_ROWS)
                    for part in range(self._parts):
                        source = refs.h_g.at[pl.ds(row, ROWS), pl.ds(column + part * self._n_out, WGMMA_ROWS)]
                        plgpu.copy_gmem_to_smem(source, self._pre.singles(refs.h_s).at[slot, part], refs.full.at[slot])
                    row_scales.copy(refs.weights_g, 0, row, ROWS, refs.weights_s.at[slot], refs.full.at[slot])

            return turn + blocks

        turns = lax.fori_loop(0, num_tiles, of_tile, jnp.int32(0))
        for slot in range(slots):  # every phase of every barrier is observed
            pl.when(turns > 0)(lambda slot=slot: plgpu.barrier_wait(refs.empty.at[slot]))

    def _load(self, refs: References, slot: Any, part: int, rows: int) -> Any:
        """float32 ``[64, rows]`` of the pre-activations."""
        block = self._pre.eights(refs.h_s).at[slot, part, pl.ds(0, rows)]
        if self._interpret:
            return block[...].T.astype(jnp.float32)
        loaded = plgpu.load(block.T, layout=plgpu.Layout.WGMMA_TRANSPOSED)
        return plgpu.layout_cast(loaded, plgpu.Layout.WGMMA).astype(jnp.float32)

    def finish(self, refs: References, wg: Any, accs: Any, first_row: Any, size: Any, col: Any) -> None:
        """Stores a consumer's part of a tile.

        Args:
            refs: of the kernel.
            wg: the consumer.
            accs: float32 ``[64, rows]`` each, of neighbouring columns; as many rows as a tile can have.
            first_row: of the tile.
            size: its rows.
            col: first column.
        """
        for start in range(0, accs[0].shape[1], ROWS):
            of_rows = [acc[:, start : start + ROWS] for acc in accs]
            pl.when(start < size)(
                functools.partial(self._finish_rows, refs, wg, of_rows, first_row + start, size - start, col)
            )

    def _finish_rows(self, refs: References, wg: Any, accs: Any, row: Any, left: Any, col: Any) -> None:
        """A block of rows, `left` of which there are."""
        most, halves, sums = accs[0].shape[1], self._config.halves, None
        for half, product in enumerate(accs):
            slot = wg * halves + half
            plgpu.barrier_wait(refs.full.at[slot])
            weights = row_scales.load(refs.weights_s.at[slot], row, most, False, self._interpret)
            weights = lax.broadcast_in_dim(weights, (WGMMA_ROWS, most), [1])
            parts = [self._load(refs, slot, part, most) for part in range(self._parts)]
            slopes_of = self._activation.slopes_gated if self._parts == 2 else self._activation.slope
            value, *slopes = slopes_of(*parts, divide=tiles.divide)
            sums = product * value if half == 0 else sums + product * value
            scaled = product * weights
            outs = [*(scaled * slope for slope in slopes), value * weights]
            # The block before the last has left its buffers. The interpreter counts copies, and a block may have none.
            plgpu.wait_smem_to_gmem(0 if self._interpret or halves == 1 else 1, wait_read_only=True)
            for j, out in enumerate(outs):
                out = plgpu.layout_cast(out.astype(self._dtype), plgpu.Layout.WGMMA_TRANSPOSED)
                self._staged.fill(refs.out_s, wg, half * self._outs + j, out)
            plgpu.commit_smem()
            plgpu.barrier_arrive(refs.empty.at[slot])
            place = half * self._outs, left, most, row, col + half * WGMMA_ROWS
            pl.when(place[-1] < self._n_out)(functools.partial(self._store, refs, wg, *place))
            plgpu.commit_smem_to_gmem_group()
        line = lax.div(col, halves * WGMMA_ROWS) * _WARPS
        self._store_sums(refs.outs[2], sums, line, row, left)

    def _store(self, refs: References, wg: Any, buffer: int, size: Any, most: int, row: Any, col: Any) -> None:
        to = [(refs.outs[0], col + part * self._n_out) for part in range(self._parts)] + [(refs.outs[1], col)]

        def send(first, count):
            for j, (out, column) in enumerate(to):
                self._staged.store(refs.out_s, wg, buffer + j, first, count, out, row + first, column)

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
