"""Down-projection of one token and the weighted sum over its experts, in one kernel: decoding without a batch.

A multiprocessor makes narrow columns of the output and reads for them the weights of all experts of the token, one after the
other, as one stream. What each expert makes is rounded, as it would be on its way to memory, and kept in shared memory; the sum
is `combine`'s, in slot order. So the bits are those of `matmul_bf16` and `combine`, and a launch and its start are saved.

It is worth it where the columns of the output divide evenly over the multiprocessors (`columns_for`).

Learned on an H200 (benchmarks/results/2026-11-25-h200-variants.txt), layers of one token, the two kernels against this one: 32.9
and 31.1 us for a rank of DeepSeek-V3, 30.6 and 29.8 for qwen3-30b-a3b, 80.9 and 78.6 for qwen3-235b, 172.1 and 169.7 for
mixtral-8x7b. Stages with pieces of 128 columns of K are wasted on an I of 768, which they do not divide: 30.4 us.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from moe_jax import _compat
from moe_jax.kernels.hopper import tiles, views
from moe_jax.kernels.hopper.matmul_config import WGMMA_ROWS

_ROWS = 8  # the least that wgmma multiplies
_PIECE = 64  # columns of K that lie side by side in a stage: a swizzled row of 16-bit floats
_RING = 200 * 1024  # bytes of shared memory for stages
_MOST_STAGES = 12
_MOST_SLOTS = 16


def columns_for(hidden_size: int, slots: int, multiprocessors: int | None = None) -> int | None:
    """Columns of a tile, or None where the down-projection alone spreads better over the multiprocessors.

    Example:
        >>> columns_for(2048, 8, multiprocessors=132), columns_for(2880, 4, multiprocessors=132)
        (16, None)
    """
    workers = multiprocessors or _compat.num_multiprocessors()

    def work(tiles_of_a_column: int, columns: int, more: int) -> int:  # columns times experts of the busiest
        return pl.cdiv(tiles_of_a_column * pl.cdiv(hidden_size, columns), workers) * columns * more

    widths = (64, 32, 16)
    best = min(widths, key=lambda columns: work(1, columns, slots))  # the widest of equal ones
    alone = min(work(slots, columns, 1) for columns in widths)
    return best if work(1, best, slots) <= 1.1 * alone else None


def supports(hidden: Any, weights: Any, tokens: int, slots: int) -> str | None:
    """Why this kernel does not run the down-projection of `hidden` [R, I] by `weights` [E, H, I]; None if it does."""
    if tokens != 1 or not 1 <= slots <= _MOST_SLOTS:
        return f"it sums the rows of one token with at most {_MOST_SLOTS} slots, here of {tokens} with {slots}"
    size = weights.shape[2]
    if tiles.swizzle_bytes(size, hidden.dtype) != 128:
        return f"the contracted size={size} must be a multiple of 64"
    if columns_for(weights.shape[1], slots) is None:
        return f"hidden_size={weights.shape[1]} does not divide evenly over the multiprocessors"
    return None


def down_combine(
    hidden: Float[Array, "R I"],
    weights: Float[Array, "E H I"],
    tile_group: Int[Array, "tiles"],
    num_tiles: Int[Array, "1"],
    positions: Int[Array, "1 k"],
    scales: Float[Array, "1 k"] | None,
    bias: Float[Array, "E H"] | None,
    *,
    interpret: Any = None,
    multiprocessors: int | None = None,
) -> Float[Array, "1 H"]:
    """`sum_j scales[0, j] * (hidden[positions[0, j]] @ weights[its expert].T + bias)`; slots with position -1 add nothing.

    Args:
        hidden: a row for each expert that the token visits, in the order of the tiles.
        weights: of the experts.
        tile_group: the expert of each row.
        num_tiles: rows.
        positions: the row of each slot.
        scales: router weights; None for ones.
        bias: added to each row before it is rounded.
        interpret: for the interpreter.
        multiprocessors: of the device, by default.
    """
    slots = positions.shape[1]
    size, n_out, dtype = weights.shape[2], weights.shape[1], hidden.dtype
    workers = multiprocessors or _compat.num_multiprocessors()
    columns = columns_for(n_out, slots, workers) or 16
    depth = WGMMA_ROWS // columns
    tile_k = _PIECE * depth
    k_steps = pl.cdiv(size, tile_k)
    n_tiles = pl.cdiv(n_out, columns)
    stage_rows = 2 * WGMMA_ROWS - columns  # wgmma reads on into the rows after a piece: `matmul_bf16`, narrow tiles
    stages = min(_MOST_STAGES, _RING // ((stage_rows * _PIECE + _ROWS * tile_k) * dtype.itemsize))
    operand = views.Operand(stages, _ROWS, tile_k, _PIECE, dtype, interpret is not None)
    staged = views.Staged(1, columns, n_out, dtype, interpret is not None)

    def body(hidden_g, weights_g, group_g, count_g, positions_g, *refs):
        refs = list(refs)
        scales_g = refs.pop(0) if scales is not None else None
        bias_g = refs.pop(0) if bias is not None else None
        out_g, rows_s, weights_s, made_s, out_s, full, empty = refs[:7]
        bias_s, bias_full = refs[7:] if bias is not None else (None, None)
        worker, wg = lax.axis_index("sm"), lax.axis_index("wg")
        experts = count_g[0]
        my_tiles = tiles.share(n_tiles, worker, workers)
        turns = my_tiles * experts * k_steps

        def multiply(tile, row, slot):
            """Row `row` of the token for a tile of columns; returns the next stage."""
            if bias is not None:
                source = bias_g.at[group_g[row], pl.ds(tile * columns, WGMMA_ROWS)]
                plgpu.copy_gmem_to_smem(source, bias_s, bias_full)

            def accumulate(acc):
                def step(step, slot):
                    plgpu.barrier_wait(full.at[slot])
                    for piece in range(depth):
                        a = weights_s.at[slot, pl.ds(piece * columns, WGMMA_ROWS)]
                        plgpu.wgmma(acc, a, operand.eights(rows_s).at[slot, piece].T)
                    plgpu.wgmma_wait(depth)  # those of the step before are done
                    pl.when(step > 0)(lambda: plgpu.barrier_arrive(empty.at[jnp.where(slot > 0, slot, stages) - 1]))
                    return tiles.next_slot(slot, stages)

                slot_after = lax.fori_loop(0, k_steps, step, slot)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(empty.at[jnp.where(slot_after > 0, slot_after, stages) - 1])
                return acc[...], slot_after

            made, slot = pl.run_scoped(accumulate, plgpu.ACC((WGMMA_ROWS, _ROWS)))
            if bias is not None:
                plgpu.barrier_wait(bias_full)
                column = plgpu.load(bias_s, layout=plgpu.Layout.WGMMA.reduce(1)).astype(jnp.float32)
                made = made + lax.broadcast_in_dim(column, made.shape, [0])
                plgpu.commit_smem()  # every warp has its bias before the next one comes
            _compat.store_scattered(made_s.at[row], made.astype(dtype))
            return slot

        def add_up(found):
            """The weighted sum in slot order, of one column of each block that counts: the token's."""
            total = None if slots <= 8 else 0.0  # as `combine` begins
            for row, scale in found:
                block = plgpu.load(made_s.at[jnp.maximum(row, 0)], layout=plgpu.Layout.WGMMA, optimized=False)
                term = jnp.where(row < 0, 0.0, block.astype(jnp.float32)) * scale
                total = term if total is None else total + term
            return total

        @pl.when(wg == 0)
        def _consumer():
            found = []  # row and weight of each slot, asked for before there is anything to add up
            for slot in range(slots):
                row, scale = positions_g[0, slot], scales_g[0, slot] if scales is not None else jnp.float32(1)
                found.append((row, jnp.where(row < 0, jnp.float32(0), scale)))

            def tile(i, slot):
                n = worker + i * workers
                slot = lax.fori_loop(0, experts, lambda row, slot: multiply(n, row, slot), slot)
                plgpu.commit_smem()
                block = plgpu.layout_cast(add_up(found).astype(dtype), plgpu.Layout.WGMMA_TRANSPOSED)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                staged.fill(out_s, 0, 0, block)
                plgpu.commit_smem()
                staged.store(out_s, 0, 0, 0, 1, out_g, 0, n * columns)
                plgpu.commit_smem_to_gmem_group()
                return slot

            lax.fori_loop(0, my_tiles, tile, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

        def produce():
            def fetch(turn, n, row, expert, step):
                slot = lax.rem(turn, stages)
                pl.when(turn >= stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
                for piece in range(depth):
                    ks = pl.ds(step * tile_k + piece * _PIECE, _PIECE)
                    source = weights_g.at[expert, pl.ds(n * columns, columns), ks]
                    plgpu.copy_gmem_to_smem(source, weights_s.at[slot, pl.ds(piece * columns, columns)], full.at[slot])
                    target = operand.singles(rows_s).at[slot, piece, pl.ds(0, 1)]
                    plgpu.copy_gmem_to_smem(hidden_g.at[pl.ds(row, 1), ks], target, full.at[slot])

            def of_tile(i):
                def of_row(row, expert):
                    # The next row's expert is asked for before the stages of this one are waited for.
                    following = group_g[jnp.minimum(row + 1, experts - 1)]
                    first = (i * experts + row) * k_steps
                    pl.loop(0, k_steps)(lambda step: fetch(first + step, worker + i * workers, row, expert, step))
                    return following

                lax.fori_loop(0, experts, of_row, group_g[0])

            pl.loop(0, my_tiles)(of_tile)

            tiles.observe_all(empty, turns, stages)

        @pl.when(wg == 1)
        def _producer():
            plgpu.warp_map(lambda warp: pl.when(warp == 0)(produce))

    body.__name__ = "down_combine"
    operands = [hidden, weights, tile_group, num_tiles, positions]
    operands += [scales] if scales is not None else []
    operands += [bias] if bias is not None else []
    scratch = [
        operand.scratch,
        plgpu.SMEM((stages, stage_rows, _PIECE), dtype, transforms=tiles.transforms(size, dtype)),
        plgpu.SMEM((slots, WGMMA_ROWS, _ROWS), dtype),
        staged.scratch,
        plgpu.Barrier(num_arrivals=2 * depth, num_barriers=stages),
        plgpu.Barrier(num_arrivals=1, num_barriers=stages),
    ]
    if bias is not None:
        scratch += [plgpu.SMEM((WGMMA_ROWS,), bias.dtype), plgpu.Barrier(num_arrivals=1)]
    return _compat.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((1, n_out), dtype),
        grid=(workers,),
        grid_names=("sm",),
        num_threads=2,
        thread_name="wg",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, lowering_semantics=_compat.LANE),
        interpret=interpret,
    )(*operands)
