"""The gradient of grouped weights on Hopper: for each expert the product of two sets of its rows, contracted over the rows.

``out[e] = left[rows of e].T @ right[rows of e]``. Both operands lie with the contracted axis, the rows, as the slow one. wgmma
reads 16-bit operands from shared memory either way, so they are brought as they lie; nothing is transposed in memory.

A persistent, warp-specialised kernel. One producer warp brings 64 rows of both operands into a ring of stages with TMA; two
consumer warpgroups have 64 columns of `left` each and share those of `right`. Tiles are walked expert by expert: those that are
at work at one time share an expert's rows in L2. How many steps a tile takes is read on the GPU; an expert without rows takes
none, and its gradient is zero.

Edges. Swizzled tiles begin at a multiple of eight rows, groups anywhere. A group's steps begin at the multiple before its first
row; in the first and the last step the consumers overwrite what is not the group's with zeros, in both operands: the rows of
other groups, and those of no group, which may be NaN. Columns past a matrix are read as zeros and not stored.

Every element is summed over the rows in order, in one accumulator: the same bits run after run. No atomics.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from moe_jax import _compat
from moe_jax.kernels.hopper import tiles

DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
STEP_ROWS, ALIGNED_ROWS = 64, 8  # rows of a step; where a swizzled tile may begin
_COLUMNS, _CONSUMERS = 64, 2  # of a swizzled tile and of a consumer
_MEMORY = 227 * 1024 - 2048  # bytes of shared memory, but for barriers


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile of the kernel: 128 columns of `left` by `tile_n` of `right`."""

    tile_n: int = 256  # a multiple of 64, up to 256
    stages: int = 4
    band: int = 8  # tiles of columns of `left` that are walked together

    def memory(self, out_dtype: Any) -> int:
        """Bytes of shared memory: the ring, and two blocks a consumer on their way out."""
        ring = self.stages * STEP_ROWS * (_CONSUMERS * _COLUMNS + self.tile_n) * 2
        return ring + _CONSUMERS * 2 * _COLUMNS * _COLUMNS * jnp.dtype(out_dtype).itemsize


def default_config(n: int, out_dtype: Any) -> Config:
    """The configuration for that many columns of `right`.

    Example:
        >>> default_config(768, "bfloat16"), default_config(64, "float32").tile_n
        (Config(tile_n=256, stages=4, band=8), 64)
    """
    tile_n = min(256, n)
    stages = next(stages for stages in (4, 3) if Config(tile_n, stages).memory(out_dtype) <= _MEMORY)
    return Config(tile_n, stages)


def supports(left: Any, right: Any, out_dtype: Any) -> str | None:
    """Why this kernel cannot run the problem; None if it can. Shapes as in `weight_grad`."""
    if left.dtype not in DTYPES or right.dtype != left.dtype:
        return f"operands {left.dtype} and {right.dtype} must both be bfloat16 or both float16"
    if jnp.dtype(out_dtype) not in (*DTYPES, jnp.dtype(jnp.float32)):
        return f"out_dtype={out_dtype} must be bfloat16, float16 or float32"
    for name, size in (("left", left.shape[1]), ("right", right.shape[1])):
        if size % _COLUMNS or size == 0:
            return f"the {size} columns of {name} must be a multiple of {_COLUMNS} (swizzled tiles); pad the weights"
    if left.shape[0] == 0:
        return "no rows need no kernel"
    return None


def weight_grad(
    left: Float[Array, "R M"],
    right: Float[Array, "R N"],
    starts: Int[Array, " E"],
    sizes: Int[Array, " E"],
    accumulate: Float[Array, "E M N"] | None,
    *,
    out_dtype: Any,
    config: Config,
    interpret: Any = None,
    multiprocessors: int | None = None,
) -> Float[Array, "E M N"]:
    """``left[rows of e].T @ right[rows of e]`` for each expert, zero for one without rows.

    Args:
        left: of all groups; R is a multiple of 8.
        right: the same rows.
        starts: the first row of each expert.
        sizes: its rows.
        accumulate: float32, added before rounding.
        out_dtype: of the result.
        config: how the work is tiled.
        interpret: for the interpreter.
        multiprocessors: of the device, by default.
    """
    experts, m, n = sizes.shape[0], left.shape[1], right.shape[1]
    tile_m, tile_n, stages = _CONSUMERS * _COLUMNS, config.tile_n, config.stages
    m_tiles, n_tiles = pl.cdiv(m, tile_m), pl.cdiv(n, tile_n)
    a_matrix = m_tiles * n_tiles
    workers = min(multiprocessors or _compat.num_multiprocessors(), experts * a_matrix)

    def body(left_g, right_g, starts_g, sizes_g, *refs):
        refs = list(refs)
        sum_g = refs.pop(0) if accumulate is not None else None
        out_g, left_s, right_s, out_s, full, empty, cleared = refs
        worker, wg = lax.axis_index("sm"), lax.axis_index("wg")
        my_tiles = tiles.share(experts * a_matrix, worker, workers)

        def tile_at(i):
            """Expert, tile of rows and of columns of its matrix."""
            index = worker + i * workers
            expert = lax.div(index, jnp.int32(a_matrix))
            at, across = tiles.visit(index - expert * a_matrix, jnp.int32(m_tiles), n_tiles, config.band)
            return expert, at * tile_m, across * tile_n

        def run_of(expert):
            """The first row that is fetched, those before the group's own, those up to its end, and the steps."""
            start, size = starts_g[expert], sizes_g[expert]
            first = lax.div(start, ALIGNED_ROWS) * ALIGNED_ROWS
            end = start - first + size
            return first, start - first, end, jnp.where(size > 0, lax.div(end + (STEP_ROWS - 1), STEP_ROWS), 0)

        def keep(ref, before, end):
            """Rows of a block of a stage that are not `before` and not past `end` stay, the others become zero."""
            held = plgpu.load(ref, layout=plgpu.Layout.WGMMA)
            row = plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, held.shape, 0), plgpu.Layout.WGMMA)
            ref[...] = jnp.where((row >= before) & (row < end), held, jnp.zeros_like(held))

        def consume(i, slot):
            expert, row, col = tile_at(i)
            _, before, end, steps = run_of(expert)

            def accumulate_steps(acc):
                def one(step, slot):
                    plgpu.barrier_wait(full.at[slot])
                    at_edge = ((step == 0) & (before > 0)) | ((step + 1) * STEP_ROWS > end)

                    @pl.when(at_edge)
                    def _():
                        mine = before - step * STEP_ROWS, end - step * STEP_ROWS
                        keep(left_s.at[slot, :, pl.ds(wg * _COLUMNS, _COLUMNS)], *mine)
                        for block in range(0, tile_n // _COLUMNS, _CONSUMERS):
                            part = block + wg

                            def clear(part=part):
                                keep(right_s.at[slot, :, pl.ds(part * _COLUMNS, _COLUMNS)], *mine)

                            if block + _CONSUMERS <= tile_n // _COLUMNS:
                                clear()
                            else:
                                pl.when(part < tile_n // _COLUMNS)(clear)
                        plgpu.commit_smem()
                        plgpu.barrier_arrive(cleared)
                        plgpu.barrier_wait(cleared)

                    a = left_s.at[slot, :, pl.ds(wg * _COLUMNS, _COLUMNS)]
                    plgpu.wgmma(acc, a.T, right_s.at[slot])
                    tiles.hand_back(empty, step, slot, stages, 1)
                    return tiles.next_slot(slot, stages)

                slot_after = lax.fori_loop(0, steps, one, slot)
                plgpu.wgmma_wait(0)
                last = jnp.where(slot_after > 0, slot_after, stages) - 1
                pl.when(steps > 0)(lambda: plgpu.barrier_arrive(empty.at[last]))
                return acc[...], slot_after

            acc, slot = pl.run_scoped(accumulate_steps, plgpu.ACC((_COLUMNS, tile_n)))
            store(acc, expert, row + wg * _COLUMNS, col)
            return slot

        def store(acc, expert, row, col):
            for i in range(tile_n // _COLUMNS):
                block = acc[:, i * _COLUMNS : (i + 1) * _COLUMNS]
                place = expert, pl.ds(row, _COLUMNS), pl.ds(col + i * _COLUMNS, _COLUMNS)

                @pl.when((row < m) & (col + i * _COLUMNS < n))
                def _(block=block, place=place, i=i):
                    if sum_g is not None:
                        block = block + plgpu.load(sum_g.at[place], layout=plgpu.Layout.WGMMA, optimized=False)
                    plgpu.wait_smem_to_gmem(0 if interpret is not None else 1, wait_read_only=True)
                    out_s[wg, i % 2] = block.astype(out_dtype)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(out_s.at[wg, i % 2], out_g.at[place], commit_group=False)

                plgpu.commit_smem_to_gmem_group()
            if (tile_n // _COLUMNS) % 2:  # the next tile begins with the first buffer again
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def produce():
            def fetch_tile(i, turn):
                expert, row, col = tile_at(i)
                first, _, _, steps = run_of(expert)

                def fetch(step, turn):
                    slot = lax.rem(turn, stages)
                    pl.when(turn >= stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
                    rows = pl.ds(first + step * STEP_ROWS, STEP_ROWS)
                    for source, target, at, width in ((left_g, left_s, row, tile_m), (right_g, right_s, col, tile_n)):
                        columns = pl.ds(at, width)
                        plgpu.copy_gmem_to_smem(source.at[rows, columns], target.at[slot], full.at[slot])
                    return turn + 1

                return lax.fori_loop(0, steps, fetch, turn)

            turns = lax.fori_loop(0, my_tiles, fetch_tile, jnp.int32(0))
            tiles.observe_all(empty, turns, stages)

        @pl.when(wg < _CONSUMERS)
        def _():
            plgpu.set_max_registers(240, action="increase")
            lax.fori_loop(0, my_tiles, consume, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == _CONSUMERS)
        def _():
            plgpu.set_max_registers(24, action="decrease")
            plgpu.warp_map(lambda warp: pl.when(warp == 0)(produce))

    body.__name__ = "weight_grad"
    dtype = left.dtype
    scratch = [
        plgpu.SMEM((stages, STEP_ROWS, tile_m), dtype, transforms=_swizzled(dtype)),
        plgpu.SMEM((stages, STEP_ROWS, tile_n), dtype, transforms=_swizzled(dtype)),
        plgpu.SMEM((_CONSUMERS, 2, _COLUMNS, _COLUMNS), out_dtype, transforms=_swizzled(out_dtype)),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        plgpu.Barrier(num_arrivals=_CONSUMERS, num_barriers=stages),
        plgpu.Barrier(num_arrivals=_CONSUMERS),
    ]
    operands = [left, right, starts, sizes, *([] if accumulate is None else [accumulate])]
    return _compat.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((experts, m, n), out_dtype),
        grid=(workers,),
        grid_names=("sm",),
        num_threads=_CONSUMERS + 1,
        thread_name="wg",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, lowering_semantics=_compat.LANE),
        interpret=interpret,
    )(*operands)


def _swizzled(dtype: Any) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
    """Tiles of eight rows and 128 bytes."""
    return plgpu.TilingTransform((ALIGNED_ROWS, 128 // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(128)
