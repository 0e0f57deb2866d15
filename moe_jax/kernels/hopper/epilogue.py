"""What a grouped matmul does with a tile that is summed: bias, activation, rounding, and its own rows to memory.

The tile stands in registers, 64 columns of the output by rows of a group. Few rows leave from there (`direct_store`). Others do
through two blocks of shared memory in turn (`views.Staged`), 32 rows at a time, while the next block is computed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax import _compat
from moe_jax.activations import Activation
from moe_jax.kernels.hopper import direct_store, interleaved, tiles, views
from moe_jax.kernels.hopper.matmul_config import FEW_ROWS, WGMMA_ROWS, Config


class References(NamedTuple):
    """References of an epilogue in a kernel.

    Attributes:
        out_g: the output ``[rows, N_out]`` in GPU memory.
        out_s: blocks on their way to it; None where rows leave from registers.
        bias: those of `Columns`; None without a bias.
    """

    out_g: Any
    out_s: Any = None
    bias: tuple[Any, Any, Any] | None = None


class Columns:
    """A number for each row of weights, of which a tile needs those of its columns: a bias, the scales of channels.

    Its references are the numbers ``[E, N]`` in GPU memory, those of a tile in shared memory, and a barrier for each consumer.

    Args:
        config: how the work is tiled.
        n_out: columns of the output.
        gated: the second block of 64 weight rows is that of the other half.
        dtype: of the numbers.
        rows_first: as in `Config`: a block then has 128 rows of weights, on the other side of wgmma.
    """

    def __init__(self, config: Config, n_out: int, gated: bool, dtype: Any, rows_first: bool = False):
        self._axis = 1 if rows_first else 0
        self._width = 2 * WGMMA_ROWS if rows_first else WGMMA_ROWS
        self._halves = 2 if config.interleaved else config.halves
        self._of_tile = interleaved.COLUMNS if config.interleaved else self._width  # of those that are fetched
        self._layout = interleaved.LAYOUT if config.interleaved else plgpu.Layout.WGMMA
        self._distance = n_out if gated else self._width if rows_first else config.columns
        self.scratch = [
            plgpu.SMEM((config.consumers, self._halves * self._width), dtype),
            plgpu.Barrier(num_arrivals=self._halves, num_barriers=config.consumers),
        ]

    def fetch(self, refs: tuple[Any, Any, Any], wg: Any, expert: Any, col: Any) -> None:
        """Asks for those of a consumer's columns from `col` on."""
        source, target, full = refs
        for half in range(self._halves):
            part = target.at[wg, pl.ds(half * self._width, self._width)]
            columns = pl.ds(col + half * self._distance, self._width)
            plgpu.copy_gmem_to_smem(source.at[expert, columns], part, full.at[wg])

    def spread(self, refs: tuple[Any, Any, Any], wg: Any, shape: tuple[int, int]) -> list[Any]:
        """For each block of weight rows float32 of that shape when they have come: ``[64, rows]``, or 32, or rows first."""
        _, numbers, full = refs
        plgpu.barrier_wait(full.at[wg])
        found = []
        for half in range(self._halves):
            part = numbers.at[wg, pl.ds(half * self._width, self._of_tile)]
            column = plgpu.load(part, layout=self._layout.reduce(1 - self._axis)).astype(jnp.float32)
            found.append(plgpu.layout_cast(lax.broadcast_in_dim(column, shape, [self._axis]), self._layout))
        return found


class Epilogue:
    """The epilogue of all tiles of a kernel.

    Args:
        config: how the work is tiled.
        n_out: columns of the output.
        dtype: of the output.
        activation: gated or not; None for none.
        bias_dtype: of the bias; None without one.
        marked: a tile says with a bit for each of its rows which to store, instead of how many.
        interpret: the kernel is interpreted.
        stores: `finish` is called, and not `activated` alone.
        rows_first: as in `Config`; then it does not store.
    """

    def __init__(
        self,
        config: Config,
        n_out: int,
        dtype: Any,
        activation: Activation | None,
        bias_dtype: Any | None,
        *,
        marked: bool,
        interpret: bool,
        stores: bool = True,
        rows_first: bool = False,
    ):
        self._halves, self._columns, self._n_out, self._dtype = config.halves, config.columns, n_out, dtype
        self._activation, self._gated = activation, activation is not None and activation.is_gated
        self._marked, self._interpret = marked, interpret
        self._direct = marked or config.tile_rows <= FEW_ROWS
        self._layout = interleaved.LAYOUT if config.interleaved else plgpu.Layout.WGMMA
        self._staged = views.Staged(config.consumers, config.columns, n_out, dtype, interpret)
        self._bias = None if bias_dtype is None else Columns(config, n_out, self._gated, bias_dtype, rows_first)
        self._stages = stores and not self._direct
        self.scratch = [*([self._staged.scratch] if self._stages else []), *(self._bias.scratch if self._bias else [])]

    def references(self, out_g: Any, bias_g: Any, scratch: Any) -> References:
        """Of the output, the bias or None, and the references of `scratch`."""
        out_s, *of_bias = scratch if self._stages else (None, *scratch)
        return References(out_g, out_s, (bias_g, *of_bias) if self._bias else None)

    def begin(self, fetches: bool) -> None:
        """A consumer's next tile begins. If it fetches a bias or scales, all its warps have taken those of the tile before.

        Stores through shared memory see to that with a barrier of their own.
        """
        if self._direct and (fetches or self._bias is not None):
            plgpu.commit_smem()

    def fetch_bias(self, refs: References, wg: Any, expert: Any, col: Any) -> None:
        """Asks for the bias of a consumer's columns from `col` on."""
        if self._bias is not None:
            self._bias.fetch(refs.bias, wg, expert, col)

    def activated(self, refs: References, wg: Any, accs: Any) -> list[Any]:
        """Sums ``[64, rows]``, or rows first, as they leave, float32: with the bias, after the activation."""
        if self._bias is not None:
            columns = self._bias.spread(refs.bias, wg, accs[0].shape)
            accs = [self._plus(acc, column) for acc, column in zip(accs, columns, strict=True)]
        if self._gated:
            return [self._activation.apply_gated(*accs, divide=tiles.divide)]
        if self._activation is not None:
            return [self._activation.apply(acc, divide=tiles.divide) for acc in accs]
        return list(accs)

    def _plus(self, acc: Any, column: Any) -> Any:
        """The sum of two arrays, rounded once more where `acc` is a product with a scale.

        Left to themselves compilers merge the two into a fused multiply-add in some copies of a kernel and not in others, and a
        row's bits would depend on its tile.
        """
        if self._interpret:
            return acc + column
        layout = self._layout

        @plgpu.inline_mgpu(
            arg_types=(layout, layout), return_type=plgpu.ShapeDtypeStruct(acc.shape, acc.dtype, layout=layout)
        )
        def run(ctx, acc, column):
            del ctx
            return _compat.rounded_sum(acc, column)

        return run(acc, column)

    def finish(self, refs: References, wg: Any, accs: Any, first_row: Any, size: Any, col: Any, below: int) -> None:
        """Stores a consumer's part of a tile.

        Args:
            refs: of the kernel.
            wg: the consumer.
            accs: float32 ``[64, rows]`` each, gate and up or neighbouring columns.
            first_row: of the output.
            size: rows of the tile, or their marks.
            col: first column of the output.
            below: so many rows it has at least, less one.
        """
        count = accs[0].shape[1]
        accs = self.activated(refs, wg, accs)
        if self._direct:
            for half, acc in enumerate(accs):
                place = first_row, size, col + half * self._columns, self._columns
                options = dict(marked=self._marked, interpret=self._interpret, layout=self._layout)
                direct_store.store(refs.out_g, acc.astype(self._dtype), *place, **options)
            return
        blocks = [(half, start) for half in range(len(accs)) for start in range(0, count, views.STORED)]
        for i, (half, start) in enumerate(blocks):
            most = min(views.STORED, count - start)
            block = accs[half][:, start : start + most].astype(self._dtype)
            block = plgpu.layout_cast(block, plgpu.Layout.WGMMA_TRANSPOSED)
            # The block before the last has left its buffer. The interpreter counts copies, and a block may have none.
            plgpu.wait_smem_to_gmem(0 if self._interpret else 1, wait_read_only=True)
            self._staged.fill(refs.out_s, wg, i % 2, block)
            plgpu.commit_smem()
            left = most if start + most <= below else size - start  # mostly known: few branches
            to = refs.out_g, first_row + start, col + half * self._columns
            self._staged.store_first(refs.out_s, wg, i % 2, left, most, *to)
            plgpu.commit_smem_to_gmem_group()
        if len(blocks) % 2 == 1:  # the next tile begins with the buffer that was filled last
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
