"""Grouped matmul of block-scaled numbers on Blackwell: NVFP4, MXFP4 or MXFP8 rows times weights of the same format.

Written without such a GPU: interpreted on a CPU, lowered and compiled for sm_100a, **not yet run on hardware**.

A warpgroup has a warp that asks TMA for stages and a warp that issues `tcgen05.mma`, which reads codes from shared memory and
scales from tensor memory and leaves its sums there; a second warpgroup takes them from it, scales them, applies bias and
activation and stores them. Rows of a group are on the M side, one a lane of tensor memory. Without a gate it holds two tiles of
sums: one is stored while the next is multiplied.

- Scales come in tiles of 128 x 4, the order in which `tcgen05.cp` copies them (`moe_jax.quantization.scale_layout`). A tile of
  rows begins with any row, so scales of rows are brought into that order tile by tile (`scales.of_tiles`).
- Rows are fetched in runs of 128, 64 ... 1 as the bits of a tile's size say, and stored all together, by eights and one by one:
  no row past the end of a tile is read or written. What is in shared memory in their place goes into sums that are not stored.
- Sums are float32 in tensor memory, over all of K in its order; the interpreter multiplies as `emulation` says.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, Shaped

from moe_jax import _compat
from moe_jax.activations import Activation
from moe_jax.kernels.blackwell.config import (
    BLOCK,
    TILE_ROWS,
    TMEM_COLUMNS,
    Config,
    columns_of_step,
)
from moe_jax.kernels.blackwell.emulation import EmulatedProduct
from moe_jax.kernels.blackwell.epilogue import Epilogue, Factors, Tile
from moe_jax.kernels.blackwell.stage import Rows, bits, tiled
from moe_jax.kernels.hopper import tiles
from moe_jax.quantization.scale_layout import TILE_COLUMNS

_RUNS = tuple(1 << bit for bit in range(TILE_ROWS.bit_length() - 1, -1, -1))  # rows of a copy, a bit of a size each
PRODUCER, MULTIPLIER = 0, 1  # warps of the first warpgroup


def grouped_matmul(
    rows: Shaped[Array, "rows K"],
    row_scales: Shaped[Array, "tiles C 32 16"],
    weights: Shaped[Array, "E N K"],
    weight_scales: Shaped[Array, "E H B C 32 16"],
    tile_group: Int[Array, "tiles"],
    tile_starts: Int[Array, "tiles"],
    tile_sizes: Int[Array, "tiles"],
    num_tiles: Int[Array, "1"],
    row_factors: Float[Array, "tiles 128"] | None,
    weight_factors: Float[Array, "E H"] | None,
    bias: Float[Array, "E N"] | None,
    activation: Activation | None,
    *,
    config: Config,
    out_dtype: Any,
    interpret: Any = None,
    multiprocessors: int | None = None,
) -> Float[Array, "R N_out"]:
    """`activation((rows @ weights[group].T) * factors + bias[group])` of scaled codes, for the rows of the tiles.

    Args:
        rows: codes of all groups, float4_e2m1fn or float8_e4m3fn.
        row_scales: of each tile, as `scales.of_tiles` makes them; float8_e4m3fn (16 columns each) or float8_e8m0fnu (32).
        weights: codes of the experts, of the same dtype.
        weight_scales: as `scales.of_weights` makes them, of the same dtype as those of the rows; H is 2 with a gate, else 1.
        tile_group: the expert of each tile.
        tile_starts: its first row.
        tile_sizes: its rows, at most 128.
        num_tiles: tiles that hold rows.
        row_factors: float32, by which the sums of each row are multiplied; None for none.
        weight_factors: float32, by which those of an expert's gate and up are; None for none.
        bias: added then, before the activation.
        activation: gated or not; None for none.
        config: how the work is tiled; `halves` 2 with a gate and only then.
        out_dtype: bfloat16 or float16.
        interpret: for the interpreter.
        multiprocessors: of the device, by default.
    """
    (n_weights, k), interpreted = weights.shape[1:], interpret is not None
    gated = activation is not None and activation.is_gated
    halves, stages, buffers = config.halves, config.stages, config.buffers
    n_out = n_weights // 2 if gated else n_weights
    scale_dtype = row_scales.dtype
    group = 16 if scale_dtype == jnp.float8_e4m3fn else 32
    tk = columns_of_step(bits(rows.dtype))
    c = tk // (group * TILE_COLUMNS)  # tiles of scales in a stage
    n_tiles, k_steps = pl.cdiv(n_out, BLOCK), k // tk
    workers = multiprocessors or _compat.num_multiprocessors()
    operand = Rows((stages, TILE_ROWS, tk), rows.dtype, interpreted)
    epilogue = Epilogue(n_out, out_dtype, activation, interpret=interpreted)
    emulated = EmulatedProduct(stages, halves, tk, group) if interpreted else None
    arrivals = len(_RUNS) + 1 + 2 * halves  # copies of a stage

    def body(rows_g, row_scales_g, weights_g, weight_scales_g, group_g, starts_g, sizes_g, count_g, *refs):
        refs = list(refs)
        factors = Factors(*(None if given is None else refs.pop(0) for given in optional))
        out_g, rows_s, weights_s, row_scales_s, weight_scales_s, acc, full, empty, done, free, out_s = refs[:11]
        worker, wg = lax.axis_index("sm"), lax.axis_index("wg")
        m_tiles = count_g[0]
        my_tiles = tiles.share(m_tiles * n_tiles, worker, workers)
        turns = my_tiles * k_steps

        def tile_at(i):
            return tiles.visit(worker + i * workers, m_tiles, n_tiles, config.band)

        def sums(i, half):
            """Where those of this worker's i-th tile are, of one half."""
            return acc.at[:, pl.ds((lax.rem(i, buffers) * halves + half) * BLOCK, BLOCK)]

        def produce():
            @pl.loop(0, my_tiles)
            def _tile(i):
                m, n = tile_at(i)
                expert, first_row, size = group_g[m], starts_g[m], sizes_g[m]

                @pl.loop(0, k_steps)
                def _step(step):
                    turn = i * k_steps + step
                    slot, ks = lax.rem(turn, stages), pl.ds(step * tk, tk)
                    pl.when(turn >= stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
                    ready, cs = full.at[slot], pl.ds(step * c, c)
                    plgpu.copy_gmem_to_smem(row_scales_g.at[m, cs], row_scales_s.at[slot, 0], ready)
                    for half in range(halves):
                        of_weights = weights_g.at[expert, pl.ds(half * n_out + n * BLOCK, BLOCK), ks]
                        plgpu.copy_gmem_to_smem(of_weights, weights_s.at[slot, half], ready)
                        scales = weight_scales_g.at[expert, half, n, cs]
                        plgpu.copy_gmem_to_smem(scales, weight_scales_s.at[slot, half, 0], ready)
                    for run in _RUNS:
                        first = size & -(2 * run)

                        def fetch(first=first, run=run):
                            part = operand.singles(rows_s).at[slot, pl.ds(first, run)]
                            plgpu.copy_gmem_to_smem(rows_g.at[pl.ds(first_row + first, run), ks], part, ready)

                        pl.when(size & run != 0)(fetch)
                        pl.when(size & run == 0)(lambda: plgpu.barrier_arrive(ready))

            tiles.observe_all(empty, turns, stages)

        def multiply():
            @pl.loop(0, my_tiles)
            def _tile(i):
                pl.when(i >= buffers)(lambda: plgpu.barrier_wait(free.at[lax.rem(i, buffers)]))

                @pl.loop(0, k_steps)
                def _step(step):
                    slot = lax.rem(i * k_steps + step, stages)
                    plgpu.barrier_wait(full.at[slot])
                    a, a_scales = operand.eights(rows_s).at[slot], row_scales_s.at[slot]
                    for half in range(halves):
                        b, b_scales = weights_s.at[slot, half], weight_scales_s.at[slot, half]
                        # The last product of a step hands its stage back, when all of them are done.
                        how = dict(accumulate=step > 0, barrier=empty.at[slot] if half == halves - 1 else None)
                        if emulated is not None:
                            emulated(sums(i, half), a, b, a_scales, b_scales, refs[11:], slot, half, **how)
                            continue
                        # A stage's own columns: a copy may overtake a product that was issued before it.
                        a_scales_t, b_scales_t = (
                            ref.at[:, pl.ds(slot * (4 * c), 4 * c)] for ref in (refs[11], refs[12 + half])
                        )
                        if half == 0:
                            plgpu.async_copy_scales_to_tmem(a_scales, a_scales_t)
                        plgpu.async_copy_scales_to_tmem(b_scales, b_scales_t)
                        plgpu.tcgen05_mma(sums(i, half), a, b.T, a_scale=a_scales_t, b_scale=b_scales_t, **how)

                plgpu.tcgen05_commit_arrive(done.at[lax.rem(i, buffers)])

            tiles.observe_all(free, my_tiles, buffers)

        @pl.when(wg == 0)
        def _():
            @plgpu.warp_map
            def _warp(warp):
                pl.when(warp == PRODUCER)(produce)
                pl.when(warp == MULTIPLIER)(multiply)

        @pl.when(wg == 1)
        def _():
            @pl.loop(0, my_tiles)
            def _tile(i):
                m, n = tile_at(i)
                buffer = lax.rem(i, buffers)
                tile = Tile(m, group_g[m], starts_g[m], sizes_g[m])
                plgpu.barrier_wait(done.at[buffer])
                of_halves = [sums(i, half) for half in range(halves)]
                release = functools.partial(plgpu.barrier_arrive, free.at[buffer])
                epilogue.finish(of_halves, factors, tile, out_g, out_s, n * BLOCK, release)

            plgpu.wait_smem_to_gmem(0)

    body.__name__ = f"block_scaled_matmul_{'up' if activation is not None else 'down'}"
    optional = row_factors, weight_factors, bias
    operands = [rows, row_scales, weights, weight_scales, tile_group, tile_starts, tile_sizes, num_tiles]
    operands += [given for given in optional if given is not None]
    ordered = functools.partial(plgpu.Barrier, num_arrivals=1, orders_tensor_core=True)
    scales_t = plgpu.TMEM((TILE_ROWS, 4 * c * stages), scale_dtype, layout=plgpu.TMEMLayout.SCALES_LAYOUT)
    scratch = [
        operand.scratch,
        tiled((stages, halves, BLOCK, tk), 8, rows.dtype),
        plgpu.SMEM((stages, 1, c, 32, 16), scale_dtype),
        plgpu.SMEM((stages, halves, 1, c, 32, 16), scale_dtype),
        plgpu.TMEM((TILE_ROWS, TMEM_COLUMNS), jnp.float32),
        plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages),
        ordered(num_barriers=stages),
        ordered(num_barriers=buffers),
        ordered(num_barriers=buffers),
        epilogue.scratch,
        *(emulated.scratch if emulated is not None else [scales_t] * (1 + halves)),
    ]
    return _compat.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((rows.shape[0], n_out), out_dtype),
        grid=(workers,),
        grid_names=("sm",),
        num_threads=2,
        thread_name="wg",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, lowering_semantics=_compat.LANE
        ),
        interpret=interpret,
    )(*operands)
