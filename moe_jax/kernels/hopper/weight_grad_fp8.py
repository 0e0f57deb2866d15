"""The gradient of grouped weights on Hopper, of FP8 operands: for each expert the product of two sets of its rows.

FP8 wgmma reads operands with the contracted axis last alone. So the rows come as columns (`quantize_blocks`), those of an expert
in whole blocks of 128, filled up with zeros: no block belongs to two experts, and nothing is to be cleared here.

The machine is that of `matmul_rows_first`: a producer warp, a ring of stages of 128 of the contracted axis, two consumers with 64
rows by 128 columns twice. Every 128 a sum is scaled, by the product of the scales of two blocks, and added to float32 registers.
How many steps a tile takes is read on the GPU; an expert without rows takes none, and its gradient is zero.

Every element is summed over blocks in order, in one accumulator: the same bits run after run. By ptxas nothing spills, and a
step has 159 vector instructions a thread, 128 of which scale and add up. On an H100, 16384 tokens: qwen3-30b-a3b 772 us, 1069
TFLOP/s, and 397; in 16 bits 1383 and 716 (benchmarks/results/2026-11-27-h100-training-fp8.json).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, Shaped

from moe_jax import _compat
from moe_jax.kernels.hopper import tiles
from moe_jax.kernels.hopper.gradient_store import GradientStore, Refs
from moe_jax.kernels.hopper.matmul_config import WGMMA_ROWS

CONSUMERS, HALVES = 2, 2
GROUP = 128  # of the contracted axis that share a scale, and of the other: a step
TILE = CONSUMERS * WGMMA_ROWS, HALVES * GROUP
_OPERANDS = (jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float8_e5m2))  # in any pair: wgmma takes both together
_OUTPUTS = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16), jnp.dtype(jnp.float32))


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is tiled.

    Attributes:
        stages: of the ring.
        band: tiles of left walked together before the next columns of right: what L2 holds at a time.
        buffers: blocks of 64 rows x 128 bytes of a consumer that are on their way to memory.
    """

    stages: int = 4
    band: int = 8
    buffers: int = 2


def supports(left: Any, right: Any, out_dtype: Any) -> str | None:
    """Why this kernel cannot run the problem; None if it can. Shapes as in `weight_grad`."""
    for name, operand in (("left", left), ("right", right)):
        if operand.dtype not in _OPERANDS:
            return f"{name} is {operand.dtype}, but must be float8_e4m3fn or float8_e5m2"
        if operand.shape[0] % GROUP or operand.shape[1] % GROUP:
            return f"{name} has shape {operand.shape}: both must be multiples of {GROUP}, of whole blocks"
    if jnp.dtype(out_dtype) not in _OUTPUTS:
        return f"out_dtype={out_dtype} must be bfloat16, float16 or float32"
    return None


def weight_grad(
    left: Shaped[Array, "M K"],
    left_scales: Float[Array, "M_blocks K_blocks"],
    right: Shaped[Array, "N K"],
    right_scales: Float[Array, "N_blocks K_blocks"],
    firsts: Int[Array, "E"],
    counts: Int[Array, "E"],
    accumulate: Float[Array, "E M N"] | None = None,
    *,
    out_dtype: Any,
    config: Config = Config(),
    interpret: Any = None,
    multiprocessors: int | None = None,
) -> Float[Array, "E M N"]:
    """``left[:, blocks of e] @ right[:, blocks of e].T`` for each expert e, on top of `accumulate`.

    Args:
        left: codes.
        left_scales: float32, of blocks of 128 x 128.
        right: codes of the same columns.
        right_scales: float32, of blocks.
        firsts: the first block of columns of each expert.
        counts: its blocks.
        accumulate: float32, added to the sums.
        out_dtype: of the result; float32 with `accumulate`.
        config: how the work is tiled.
        interpret: for the interpreter.
        multiprocessors: of the device, by default.
    """
    (m, _), n, experts, stages = left.shape, right.shape[0], firsts.shape[0], config.stages
    (tile_m, tile_n), out_dtype = TILE, jnp.dtype(out_dtype)
    m_tiles, n_tiles = pl.cdiv(m, tile_m), pl.cdiv(n, tile_n)
    total = experts * m_tiles * n_tiles
    workers = min(multiprocessors or _compat.num_multiprocessors(), total)
    parts = [(0, half * GROUP) for half in range(HALVES)]
    store = GradientStore(parts, GROUP, out_dtype, config.buffers, CONSUMERS)
    interpreted = interpret is not None

    def body(left_g, left_scales_g, right_g, right_scales_g, firsts_g, counts_g, *refs):
        refs = list(refs)
        sums_g = refs.pop(0) if accumulate is not None else None
        out_g, left_s, right_s, out_s, full, empty = refs[:6]
        stored = Refs(out_g, out_s, sums_g, refs[6] if accumulate is not None else None)
        worker, wg = lax.axis_index("sm"), lax.axis_index("wg")
        my_tiles = tiles.share(total, worker, workers)

        def tile_at(i):
            """A tile's expert, and its place among those of the expert."""
            index = worker + i * workers
            expert = lax.div(index, jnp.int32(m_tiles * n_tiles))
            of_expert = index - expert * (m_tiles * n_tiles)
            return expert, *tiles.visit(of_expert, jnp.int32(m_tiles), n_tiles, config.band)

        def consume(i, slot):
            expert, at_m, at_n = tile_at(i)
            first, steps, shape = firsts_g[expert], counts_g[expert], (WGMMA_ROWS, GROUP)
            place = expert, at_m * tile_m + wg * WGMMA_ROWS, at_n * tile_n
            store.ask(stored, wg, place)

            def scales(step):
                block = jnp.minimum(first + step, left_scales.shape[1] - 1)  # one more is asked for than there may be
                of_left = left_scales_g[at_m, block]
                at = (jnp.minimum(at_n * HALVES + half, right_scales.shape[0] - 1) for half in range(HALVES))
                return [of_left * right_scales_g[column, block] for column in at]

            def step(step, carry):
                slot, totals, now = carry
                following = scales(step + 1)
                plgpu.barrier_wait(full.at[slot])

                def add(half, total):
                    def product(acc):
                        a = left_s.at[slot, pl.ds(wg * WGMMA_ROWS, WGMMA_ROWS)]
                        plgpu.wgmma(acc, a, right_s.at[slot, pl.ds(half * GROUP, GROUP)].T)
                        return acc[...]

                    return total + pl.run_scoped(product, plgpu.ACC(shape)) * now[half]

                def first_half(total):
                    return lax.optimization_barrier(add(0, total))

                # As in `matmul_rows_first`: no registers for two products at a time.
                totals[0] = lax.cond(steps < 2**30, first_half, lambda total: total, totals[0])
                totals[1] = add(1, totals[1])
                if interpreted:  # it does not know that each thread arrives, after its own products
                    plgpu.commit_smem()
                plgpu.barrier_arrive(empty.at[slot])
                return tiles.next_slot(slot, stages), totals, following

            zeros = [plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA) for _ in range(HALVES)]
            slot, accs, _ = lax.fori_loop(0, steps, step, (slot, zeros, scales(0)))
            store.send(stored, wg, place, accs)
            return slot

        def produce():
            def one(i, turn):
                expert, at_m, at_n = tile_at(i)
                first = firsts_g[expert]

                def step(step, turn):
                    slot = lax.rem(turn, stages)
                    pl.when(turn >= stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
                    columns = pl.ds((first + step) * GROUP, GROUP)
                    plgpu.copy_gmem_to_smem(
                        left_g.at[pl.ds(at_m * tile_m, tile_m), columns], left_s.at[slot], full.at[slot]
                    )
                    plgpu.copy_gmem_to_smem(
                        right_g.at[pl.ds(at_n * tile_n, tile_n), columns], right_s.at[slot], full.at[slot]
                    )
                    return turn + 1

                return lax.fori_loop(0, counts_g[expert], step, turn)

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

    body.__name__ = "weight_grad_fp8"
    scratch = [
        plgpu.SMEM((stages, tile_m, GROUP), left.dtype, transforms=tiles.transforms(GROUP, left.dtype)),
        plgpu.SMEM((stages, tile_n, GROUP), right.dtype, transforms=tiles.transforms(GROUP, right.dtype)),
        store.buffers(n),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
    ]
    operands = [left, left_scales, right, right_scales, firsts, counts]
    if accumulate is not None:
        operands.append(accumulate)
        scratch.append(store.fetched)
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
