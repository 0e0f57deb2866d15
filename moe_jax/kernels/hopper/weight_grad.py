"""The gradient of grouped weights on Hopper: for each expert the product of two sets of its rows, contracted over the rows.

``out[e] = left[rows of e].T @ right[rows of e]``.

A persistent, warp-specialised kernel. One producer warp brings steps of 64 rows of both operands into a ring of stages with TMA;
two consumer warpgroups have columns of `left` each and share those of `right`. Both operands lie with the contracted axis, the
rows, as the slow one. wgmma reads 16-bit operands from shared memory that way too: nothing is transposed in memory.

Tiles are walked expert by expert: those that are at work at one time share the rows of one or two experts, which stay in L2. The
experts with the most rows come first (`by_size`). How many steps a tile takes is read on the GPU; an expert without rows takes
none, and its gradient is zero. A tile leaves through `Config.buffers` blocks of shared memory while the producer fetches for the
next one. With few rows an expert a tile has few steps and its way out counts: with a buffer for each block nothing waits there.

Edges. Swizzled tiles begin at a multiple of eight rows, groups anywhere. A group's steps begin at the multiple before its first
row; in the first and the last step the consumers overwrite what is not the group's with zeros, in both operands: the rows of
other groups, and those of no group, which may be NaN. Columns past a matrix are read as zeros and not stored.

Sums of earlier gradients (`accumulate`) come by TMA through the same buffers, asked for before the first product.

Every element is summed over the rows in order, in one accumulator: the same bits run after run. No atomics.

Measured on an H100, bfloat16 out (benchmarks/results/2026-11-27-h100-training-kernels.txt), with two buffers, four stages and no
choice but these: 128 experts, 131072 rows, 1536 x 2048 1230 us (670 TFLOP/s; torch's grouped product 1329), with unlike groups
1384 us, 2048 x 768 626 us (658). Tiles of 192 columns 1324 us, of 128 1421 us; three stages or other bands no difference; float32
out 1432 us. 8 experts, 32768 rows, 28672 x 4096: 10758 us (715; torch 12046), in bands of 4 10386 us. The
buffers beyond two and narrower swizzles came after that and have not run on a GPU.
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
from moe_jax.kernels.hopper.gradient_store import LINE, GradientStore, Refs
from moe_jax.kernels.hopper.matmul_bf16 import DTYPES
from moe_jax.kernels.hopper.matmul_config import WGMMA_ROWS

CONSUMERS = 2
ALIGNED_ROWS = 8  # where a swizzled tile may begin
_SHARED_BYTES = 227 * 1024  # that a block of threads can have
_OTHER_BYTES = 2048  # of those, for barriers and alignment
MOST_COLUMNS = 256  # of a consumer's sums, in blocks of 64 rows: 128 registers a thread


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile of the kernel: two consumers x `blocks` x 64 columns of left by `tile_n` of right.

    Attributes:
        blocks: of 64 columns of left that a consumer multiplies.
        tile_n: columns of right, multiplied by both consumers.
        stages: of the ring.
        step_rows: rows that a stage holds.
        band: tiles of left walked together before the next columns of right: what L2 holds at a time.
        buffers: the most blocks of 64 rows x 128 bytes of a consumer that are on their way to memory.
        overlap: products of a step run while the next are issued; its stage is handed back after that.
        largest_first: experts are visited in the order of their rows, the most first: see `by_size`.
    """

    blocks: int = 1
    tile_n: int = 256
    stages: int = 3
    step_rows: int = 64
    band: int = 16
    buffers: int = 5
    overlap: bool = True
    largest_first: bool = True

    @property
    def consumer_rows(self) -> int:
        """Rows of the output that a consumer makes."""
        return self.blocks * WGMMA_ROWS

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns of an output tile."""
        return CONSUMERS * self.consumer_rows, self.tile_n

    @property
    def shared_bytes(self) -> int:
        """Shared memory of the ring and of the blocks on their way."""
        ring = self.stages * self.step_rows * sum(self.tile) * 2
        return ring + CONSUMERS * self.buffers * WGMMA_ROWS * LINE


def config_misfit(config: Config) -> str | None:
    """Why no kernel has this configuration; None if it can.

    Example:
        >>> config_misfit(Config()), config_misfit(Config(blocks=2))
        (None, 'blocks=2 x tile_n=256 must be at most 256, for the registers')
    """
    if config.tile_n % WGMMA_ROWS or not WGMMA_ROWS <= config.tile_n <= MOST_COLUMNS:
        return f"tile_n={config.tile_n} must be 64, 128, 192 or 256"
    if config.blocks < 1 or config.blocks * config.tile_n > MOST_COLUMNS:
        return f"blocks={config.blocks} x tile_n={config.tile_n} must be at most {MOST_COLUMNS}, for the registers"
    if config.step_rows % WGMMA_ROWS or not WGMMA_ROWS <= config.step_rows <= 256:
        return f"step_rows={config.step_rows} must be 64, 128, 192 or 256"
    if config.stages < 2 or config.buffers < 2 or config.band < 1:
        return f"stages={config.stages} and buffers={config.buffers} must be at least 2, band={config.band} at least 1"
    if config.shared_bytes > _SHARED_BYTES - _OTHER_BYTES:
        return f"{config.shared_bytes} bytes of shared memory are more than {_SHARED_BYTES - _OTHER_BYTES}"
    return None


def default_config(m: int, n: int) -> Config:
    """The configuration for gradients ``[E, m, n]``: the tile that computes least outside of them.

    Tiles of 192 columns compute 7 % less in a second (benchmarks/results/2026-11-27-h100-training-kernels.txt).

    Args:
        m: columns of left.
        n: columns of right.

    Example:
        >>> default_config(1536, 2048).tile, default_config(256, 128).tile, default_config(2048, 192).tile
        ((128, 256), (256, 128), (128, 192))
    """

    def time(config: Config) -> float:
        rows, columns = config.tile
        area = pl.cdiv(m, rows) * rows * pl.cdiv(n, columns) * columns
        return area * (1.07 if columns == 192 else 1.0)

    return min(Config(1, 256), Config(2, 128), Config(1, 192), key=time)  # the first of equal ones


def by_size(
    starts: Int[Array, "E"], sizes: Int[Array, "E"]
) -> tuple[Int[Array, "E"], Int[Array, "E"], Int[Array, "E"]]:
    """Experts in the order of their rows, the most first, with their starts and sizes in that order.

    Multiprocessors take tiles in turn. When no tile takes longer than the one before, the busiest of them has at most one tile
    of the largest expert more to do than the idlest. Two sums over pairs of experts: XLA's sort is slower.

    Example:
        >>> [a.tolist() for a in by_size(jnp.array([0, 3, 4]), jnp.array([3, 1, 9]))]
        [[2, 0, 1], [4, 0, 3], [9, 3, 1]]
    """
    expert = jnp.arange(sizes.shape[0], dtype=jnp.int32)
    larger, equal = sizes[None, :] > sizes[:, None], sizes[None, :] == sizes[:, None]
    rank = jnp.sum(larger | (equal & (expert[None, :] < expert[:, None])), axis=1)
    visited = rank[None, :] == expert[:, None]  # [place in the order, expert]
    return tuple(jnp.sum(jnp.where(visited, a[None, :], 0), axis=1, dtype=jnp.int32) for a in (expert, starts, sizes))


def supports(left: Any, right: Any, out_dtype: Any) -> str | None:
    """Why this kernel cannot run the problem; None if it can. Shapes as in `weight_grad`."""
    if left.dtype not in DTYPES or right.dtype != left.dtype:
        return f"operands {left.dtype} and {right.dtype} must both be bfloat16 or both float16"
    if jnp.dtype(out_dtype) not in (*DTYPES, jnp.dtype(jnp.float32)):
        return f"out_dtype={out_dtype} must be bfloat16, float16 or float32"
    for name, size in (("left", left.shape[1]), ("right", right.shape[1])):
        if size == 0 or tiles.swizzle_bytes(size, left.dtype) is None:
            return (
                f"the {size} columns of {name} must be a multiple of 16 (TMA and wgmma rows of 32 bytes); pad the weights, "
                "or use implementation='xla'"
            )
    return None if left.shape[0] else "no rows need no kernel"


def weight_grad(
    left: Float[Array, "R M"],
    right: Float[Array, "R N"],
    starts: Int[Array, "E"],
    sizes: Int[Array, "E"],
    accumulate: Float[Array, "E M N"] | None,
    *,
    out_dtype: Any,
    config: Config,
    interpret: Any = None,
    multiprocessors: int | None = None,
) -> Float[Array, "E M N"]:
    """``left[rows of e].T @ right[rows of e]`` for each group e, on top of `accumulate`.

    Args:
        left: rows of all groups; R is a multiple of 8.
        right: the same rows of the other matrix.
        starts: the first row of each group.
        sizes: its rows; their start and the size add up to at most R.
        accumulate: float32, added to the sums.
        out_dtype: of the result; float32 with `accumulate`.
        config: how the work is tiled.
        interpret: for the interpreter.
        multiprocessors: of the device, by default.

    Raises:
        ValueError: a `config` that no kernel can have.
    """
    misfit = config_misfit(config)
    if misfit is not None:
        raise ValueError(f"config={config} cannot run: {misfit}")
    (m, n), dtype, experts = (left.shape[1], right.shape[1]), left.dtype, starts.shape[0]
    stages, rows = config.stages, config.step_rows
    tile_m, tile_n = config.tile
    m_tiles, n_tiles = pl.cdiv(m, tile_m), pl.cdiv(n, tile_n)
    total = experts * m_tiles * n_tiles
    workers = min(multiprocessors or _compat.num_multiprocessors(), total)
    # One swizzle for both: wgmma knows no two.
    narrow = min((m, n), key=lambda size: tiles.swizzle_bytes(size, dtype))
    out_dtype = jnp.dtype(out_dtype)
    transforms = tiles.transforms(narrow, dtype)
    parts = [(b * WGMMA_ROWS, 0) for b in range(config.blocks)]
    store = GradientStore(parts, tile_n, out_dtype, config.buffers, CONSUMERS)

    if config.largest_first:
        order, starts, sizes = by_size(starts, sizes)

    def body(left_g, right_g, starts_g, sizes_g, *refs):
        refs = list(refs)
        order_g = refs.pop(0) if config.largest_first else None
        sums_g = refs.pop(0) if accumulate is not None else None
        out_g, left_s, right_s, out_s, full, empty, cleared = refs[:7]
        stored = Refs(out_g, out_s, sums_g, refs[7] if accumulate is not None else None)
        worker, wg = lax.axis_index("sm"), lax.axis_index("wg")
        my_tiles = tiles.share(total, worker, workers)

        def tile_at(i):
            """The place of a tile's expert, its first row and column of the output, and of the rows: the first that is
            fetched, how many before the group's that is, and how many up to its end.
            """
            index = worker + i * workers
            nth = lax.div(index, jnp.int32(m_tiles * n_tiles))
            of_expert = index - nth * (m_tiles * n_tiles)
            at_m, at_n = tiles.visit(of_expert, jnp.int32(m_tiles), n_tiles, config.band)
            start, size = starts_g[nth], sizes_g[nth]
            before = lax.rem(start, ALIGNED_ROWS)
            return nth, at_m * tile_m, at_n * tile_n, start - before, before, jnp.where(size > 0, before + size, 0)

        def steps_of(end):
            return lax.div(end + (rows - 1), rows)

        def clear(part, first, end):
            """Zeros in the rows of 64 columns of a stage that are not the group's."""
            for row in range(0, rows, WGMMA_ROWS):
                piece = part.at[pl.ds(row, WGMMA_ROWS)]
                held = plgpu.load(piece, layout=plgpu.Layout.WGMMA)
                at = plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, held.shape, 0), plgpu.Layout.WGMMA) + row
                piece[...] = jnp.where((at >= first) & (at < end), held, jnp.zeros_like(held))

        def consume(i, slot):
            nth, row, col, _, before, end = tile_at(i)
            expert = order_g[nth] if config.largest_first else nth
            own = wg * config.consumer_rows  # the first of the consumer's columns of left
            place = expert, row + own, col
            store.ask(stored, wg, place)
            steps = steps_of(end)

            def multiply(*accs):
                def step(step, slot):
                    plgpu.barrier_wait(full.at[slot])
                    first = jnp.where(step == 0, before, 0)
                    left_over = end - step * rows

                    @pl.when((first > 0) | (left_over < rows))
                    def _():
                        for b in range(config.blocks):
                            clear(left_s.at[slot, :, pl.ds(own + b * WGMMA_ROWS, WGMMA_ROWS)], first, left_over)
                        for block in range(0, tile_n, CONSUMERS * WGMMA_ROWS):
                            column = block + wg * WGMMA_ROWS

                            def clear_shared(column=column):
                                clear(right_s.at[slot, :, pl.ds(column, WGMMA_ROWS)], first, left_over)

                            if block + CONSUMERS * WGMMA_ROWS <= tile_n:
                                clear_shared()
                            else:
                                pl.when(column < tile_n)(clear_shared)
                        plgpu.commit_smem()
                        plgpu.barrier_arrive(cleared)
                        plgpu.barrier_wait(cleared)

                    for b, acc in enumerate(accs):
                        a = left_s.at[slot, :, pl.ds(own + b * WGMMA_ROWS, WGMMA_ROWS)]
                        plgpu.wgmma(acc, a.T, right_s.at[slot])
                    tiles.hand_back(empty, step, slot, stages, config.blocks if config.overlap else None)
                    return tiles.next_slot(slot, stages)

                after = lax.fori_loop(0, steps, step, slot)
                if config.overlap:
                    plgpu.wgmma_wait(0)
                    last = jnp.where(after > 0, after, stages) - 1
                    pl.when(steps > 0)(lambda: plgpu.barrier_arrive(empty.at[last]))
                return tuple(acc[...] for acc in accs), after

            accs, slot = pl.run_scoped(multiply, *[plgpu.ACC((WGMMA_ROWS, tile_n)) for _ in range(config.blocks)])
            store.send(stored, wg, place, accs)
            return slot

        def produce():
            def one(i, turn):
                _, row, col, first_row, _, end = tile_at(i)

                def step(step, turn):
                    slot = lax.rem(turn, stages)
                    pl.when(turn >= stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
                    source = pl.ds(first_row + step * rows, rows)
                    plgpu.copy_gmem_to_smem(left_g.at[source, pl.ds(row, tile_m)], left_s.at[slot], full.at[slot])
                    plgpu.copy_gmem_to_smem(right_g.at[source, pl.ds(col, tile_n)], right_s.at[slot], full.at[slot])
                    return turn + 1

                return lax.fori_loop(0, steps_of(end), step, turn)

            turns = lax.fori_loop(0, my_tiles, one, jnp.int32(0))
            tiles.observe_all(empty, turns, stages)

        @pl.when(wg < CONSUMERS)
        def _():
            plgpu.set_max_registers(240, action="increase")
            lax.fori_loop(0, my_tiles, consume, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == CONSUMERS)
        def _():
            plgpu.set_max_registers(24, action="decrease")
            plgpu.warp_map(lambda warp: pl.when(warp == 0)(produce))

    body.__name__ = "weight_grad"
    operands = [left, right, starts, sizes]
    operands += [order] if config.largest_first else []
    operands += [accumulate] if accumulate is not None else []
    scratch = [
        plgpu.SMEM((stages, rows, tile_m), dtype, transforms=transforms),
        plgpu.SMEM((stages, rows, tile_n), dtype, transforms=transforms),
        store.buffers(n),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
        plgpu.Barrier(num_arrivals=CONSUMERS),
    ]
    if accumulate is not None:
        scratch += [store.fetched]
    return _compat.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((experts, m, n), out_dtype),
        grid=(workers,),
        grid_names=("sm",),
        num_threads=CONSUMERS + 1,
        thread_name="wg",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, lowering_semantics=_compat.LANE),
        interpret=interpret,
    )(*operands)
