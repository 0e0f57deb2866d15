"""Grouped matmul of 8-bit numbers with scales of blocks on Hopper, for many rows: rows stand on the M side of wgmma.

`matmul_fp8` has weights there, so that few rows waste nothing. Then a thread holds products of 32 rows and multiplies as many
scales of rows with that of the block, for gate and for up, every 128 of K. Here it holds products of two rows: two scales. That
leaves 157 instructions a thread and step in the place of 229 (benchmarks/results/2026-11-26-machine-code.txt), and the 128
columns that share a scale when the rows are quantized again lie in four lanes (`row_stores`).

Each of two consumers takes 64 rows of a tile by 128 rows of the gate's weights and 128 of the up-projection's, or 256. Sums are
those of `matmul_fp8` bit for bit: the same products in the same order, the same scales rounded once. A tile of at most 64 rows
leaves one consumer without work: for groups of many rows alone. Groups that begin at any row cost the loop no instruction: two
scales of rows are loaded one by one anyhow.

Learned on an H100 (benchmarks/results/2026-11-27-h100-fp8-rows-first.txt), up-projections beside those of `matmul_fp8`, groups of
random size: mixtral-8x7b, 2048 rows an expert, 3174 us instead of 3521 (1213 TFLOP/s); dsv3-ep8, 512 rows, 913 instead of 1042;
qwen3-235b, 1024 rows, 2926 instead of 3162. With 256 rows the times are equal, 241 and 238 us (qwen3-30b-a3b), but for rows that
are quantized as they leave: 244 and 253. With 128 rows 423 us instead of 367: the rule is `matmul_config.rows_first`.

What binds large products is power (2026-11-27-h100-counters.txt, -fp8-power.txt). mixtral-8x7b, 4096 tokens, a cool GPU, one run
of each kernel: the clock sinks to 1.54 GHz of 1.98, the tensor cores are busy 73 % (up) and 80 % (down) of the time, memory is
read at 1.7 of 3.06 TB/s; run again and again the layer takes 10 % longer than the sum of its kernels. Without gain, and out
again: a second consumer that stays a product behind the first, so that sums are added up by one while the other multiplies
(mixtral-8x7b, 16384 tokens: 5 to 10 % longer, qwen3-235b 3 % shorter). Bands of 4, 16 and 34 row tiles, or of equal heights, so
that no band is a single tile: within what the clock varies. So are blocks in pairs that fetch the weights of two row tiles of an
expert together, by multicast, a third less to be moved from L2: on an H200 layers of mixtral-8x7b, 4096 and 16384 tokens, 3070
and 10900 us and 3060 and 11560, qwen3-235b, 16384 tokens, 5650 and 5580, qwen3-30b-a3b 1700 and 1680, whose kernels alone, not
held back by power, become 4 to 6 % faster (2026-11-28-h200-variants.txt).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, Shaped

from moe_jax import _compat
from moe_jax.activations import Activation
from moe_jax.kernels.hopper import fp8_from_four, row_stores, tiles, views
from moe_jax.kernels.hopper import row_scales as of_rows
from moe_jax.kernels.hopper.codes import block_rows, block_scale
from moe_jax.kernels.hopper.epilogue import Epilogue
from moe_jax.kernels.hopper.gather_quantize import scales_shape
from moe_jax.kernels.hopper.matmul_config import Config
from moe_jax.kernels.hopper.matmul_fp8 import GROUP
from moe_jax.quantization.formats import Spec
from moe_jax.quantization.prepared_fp8 import PreparedFp8

CONSUMERS, HALVES = 2, 2
TILE_ROWS = CONSUMERS * row_stores.ROWS
COLUMNS = row_stores.COLUMNS  # of each half


def supports(n_out: int, blocks: int, gated: bool, config: Config, *, quantize: bool = False) -> str | None:
    """Why this kernel cannot run what `matmul_fp8.supports`; None if it can.

    Args:
        n_out: columns of the output.
        blocks: of weight rows in a matrix, of both halves if gated.
        gated: the activation takes gate and up.
        config: how the work is tiled.
        quantize: rows are quantized as they leave.

    Example:
        >>> config = Config((64, 128), tile_k=128, rows_first=True)
        >>> supports(768, 12, True, config), supports(768, 24, True, config)
        (None, 'blocks of 64 weight rows must have a multiple of 128, as many as a tile has columns')
    """
    wanted = {"consumers": CONSUMERS, "halves": HALVES, "columns": 64, "tile_rows": TILE_ROWS}
    for name, size in wanted.items():
        if getattr(config, name) != size:
            return f"rows_first=True needs {name}={size}, not {getattr(config, name)}"
    rows = block_rows(n_out, blocks, gated)
    if rows is None or rows % COLUMNS:
        return f"blocks of {rows} weight rows must have a multiple of {COLUMNS}, as many as a tile has columns"
    if n_out % (COLUMNS if quantize else 64):
        return f"the output size={n_out} must be a multiple of {COLUMNS if quantize else 64}"
    if quantize and not gated:
        return "rows are quantized as they leave a gated projection alone"
    return None


def grouped_matmul(
    rows: Shaped[Array, "rows K"],
    row_scales: Float[Array, "groups padded_rows"],
    weights: Shaped[Array, "E N K"] | PreparedFp8,
    weight_scales: Float[Array, "E blocks groups"],
    tile_group: Int[Array, "tiles"],
    tile_starts: Int[Array, "tiles"],
    tile_sizes: Int[Array, "tiles"],
    num_tiles: Int[Array, "1"],
    bias: Float[Array, "E N"] | None,
    activation: Activation | None,
    *,
    config: Config,
    out_dtype: Any,
    tile_spans: Int[Array, "tiles 2"] | None = None,
    aligned: bool = False,
    quantize: Spec | None = None,
    interpret: Any = None,
    multiprocessors: int | None = None,
) -> Float[Array, "rows N_out"] | tuple[Shaped[Array, "rows N_out"], Float[Array, "G Rp"]]:
    """`matmul_fp8.grouped_matmul` with scales of blocks; arguments as there."""
    (n_weights, k), dtype = weights.shape[1:], rows.dtype
    gated = activation is not None and activation.is_gated
    n_out = n_weights // 2 if gated else n_weights
    tile_cols, distance = (COLUMNS, n_out) if gated else (2 * COLUMNS, COLUMNS)
    tk, stages, interpreted = config.tile_k, config.stages, interpret is not None
    n_tiles, k_steps = pl.cdiv(n_out, tile_cols), pl.cdiv(k, tk)
    workers = multiprocessors or _compat.num_multiprocessors()
    swizzled = tiles.swizzle_bytes(k, dtype)
    in_group, groups = GROUP // swizzled, tk // GROUP
    operand = views.Operand(stages, TILE_ROWS, tk, swizzled, dtype, interpreted)
    block = block_rows(n_out, weight_scales.shape[1], gated)
    sums = jnp.int32 if dtype == jnp.int8 else jnp.float32
    decoder, transforms, made = None, tiles.transforms(k, dtype), weights.dtype
    if isinstance(weights, PreparedFp8):
        decoder = fp8_from_four.Decoder(weights, config, gated, transforms, interpret=interpreted)
        weights, made = weights.values, jnp.float8_e4m3fn
    bias_dtype = None if bias is None else bias.dtype
    epilogue = Epilogue(
        config,
        n_out,
        out_dtype,
        activation,
        bias_dtype,
        marked=False,
        interpret=interpreted,
        stores=False,
        rows_first=True,
    )
    if quantize is None:
        stored = row_stores.RowStore(CONSUMERS, n_out, out_dtype, interpret=interpreted)
        out_types = [jax.ShapeDtypeStruct((rows.shape[0], n_out), out_dtype)]
    else:
        stored = row_stores.QuantizedRowStore(CONSUMERS, n_out, quantize, out_dtype, interpret=interpreted)
        of_scales = jax.ShapeDtypeStruct(scales_shape(rows.shape[0], n_out, quantize), jnp.float32)
        out_types = [jax.ShapeDtypeStruct((rows.shape[0], n_out), quantize.storage_dtype), of_scales]

    def body(rows_g, row_scales_g, weights_g, weight_scales_g, group_g, starts_g, sizes_g, count_g, *refs):
        refs = list(refs)
        spans_g = refs.pop(0) if tile_spans is not None else None
        bias_g = refs.pop(0) if bias is not None else None
        outs = tuple(refs.pop(0) for _ in out_types)
        rows_s, weights_s, row_scales_s, out_s, full, empty = refs[:6]
        refs = refs[6:]
        of_codes = [refs.pop(0) for _ in decoder.scratch] if decoder else None
        ends = epilogue.references(None, bias_g, refs)
        worker, wg = lax.axis_index("sm"), lax.axis_index("wg")
        m_tiles = count_g[0]
        my_tiles = tiles.share(m_tiles * n_tiles, worker, workers)

        def tile_at(i):
            return tiles.visit(worker + i * workers, m_tiles, n_tiles, config.band, spans_g)

        def consume(i):
            m, n = tile_at(i)
            col, first = n * tile_cols, wg * row_stores.ROWS
            slot, mine = lax.rem(i * k_steps, stages), sizes_g[m] - first
            pl.when(mine > 0)(lambda: multiply(slot, m, col, first, mine))

            @pl.when(mine <= 0)
            def _():
                def skip(_, slot):
                    plgpu.barrier_wait(full.at[slot])
                    plgpu.barrier_arrive(empty.at[slot])
                    return tiles.next_slot(slot, stages)

                lax.fori_loop(0, k_steps, skip, slot)

        def multiply(slot, m, col, first, mine):
            expert, shape = group_g[m], (row_stores.ROWS, COLUMNS)
            first_scale = first if aligned else first + of_rows.before(starts_g[m])
            epilogue.fetch_bias(ends, wg, expert, col)

            def of_blocks(step):
                def of_block(half, group):
                    row = lax.div(col + (0 if gated else half * COLUMNS), block)
                    row = row + half * (weight_scales.shape[1] // 2) if gated else row
                    return block_scale(weight_scales_g, expert, row, step * groups + group)

                return [[of_block(half, group) for half in range(HALVES)] for group in range(groups)]

            def step(step, carry):
                slot, totals, of_weights = carry
                following = of_blocks(step + 1)
                plgpu.barrier_wait(full.at[slot])
                for group in range(groups):
                    scales = row_scales_s.at[slot, group, pl.ds(first_scale, row_stores.ROWS)]
                    a_scale = plgpu.load(scales, layout=plgpu.Layout.WGMMA.reduce(1))

                    def add(half, total, group=group, a_scale=a_scale):
                        def product(acc):
                            for piece in range(group * in_group, (group + 1) * in_group):
                                a = operand.eights(rows_s).at[slot, piece, pl.ds(first, row_stores.ROWS)]
                                columns = pl.ds(half * COLUMNS, COLUMNS), pl.ds(piece * swizzled, swizzled)
                                plgpu.wgmma(acc, a, weights_s.at[slot, *columns].T)
                            return acc[...]

                        part = pl.run_scoped(product, plgpu.ACC(shape, sums)).astype(jnp.float32)
                        return total + part * lax.broadcast_in_dim(a_scale * of_weights[group][half], shape, [0])

                    def first_half(total):
                        return lax.optimization_barrier(add(0, total))

                    # The barrier and the branch, which is always taken, keep the compilers from beginning the second product
                    # before the first is added up: there are no registers for both.
                    totals[0] = lax.cond(mine < 2**30, first_half, lambda total: total, totals[0])
                    totals[1] = add(1, totals[1])
                if interpreted:  # it does not know that each thread arrives, after its own loads
                    plgpu.commit_smem()
                plgpu.barrier_arrive(empty.at[slot])
                return tiles.next_slot(slot, stages), totals, following

            zeros = [plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA) for _ in range(HALVES)]
            _, accs, _ = lax.fori_loop(0, k_steps, step, (slot, zeros, of_blocks(0)))
            row = starts_g[m] + first
            for half, tile in enumerate(epilogue.activated(ends, wg, accs)):
                stored.store(out_s, wg, tile, outs if quantize else outs[0], row, mine, col + half * COLUMNS)

        def produce():
            turns = my_tiles * k_steps

            @pl.loop(0, my_tiles)
            def _tile(i):
                m, n = tile_at(i)
                expert, size, first_row = group_g[m], sizes_g[m], starts_g[m]

                @pl.loop(0, k_steps)
                def _step(step):
                    turn = i * k_steps + step
                    slot = lax.rem(turn, stages)
                    pl.when(turn >= stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
                    for half in [] if decoder else range(HALVES):
                        source = pl.ds(n * tile_cols + half * distance, COLUMNS), pl.ds(step * tk, tk)
                        target = weights_s.at[slot, pl.ds(half * COLUMNS, COLUMNS)]
                        plgpu.copy_gmem_to_smem(weights_g.at[expert, *source], target, full.at[slot])

                    def load_rows(count, below):
                        del below
                        for piece in range(operand.pieces):
                            source = rows_g.at[pl.ds(first_row, count), pl.ds(step * tk + piece * swizzled, swizzled)]
                            tile = operand.singles(rows_s).at[slot, piece, pl.ds(0, count)]
                            plgpu.copy_gmem_to_smem(source, tile, full.at[slot])
                        for group in range(groups):
                            part = row_scales_s.at[slot, group]
                            of_rows.copy(row_scales_g, step * groups + group, first_row, count, part, full.at[slot])

                    tiles.for_row_count(config.row_counts, size, load_rows)

            tiles.observe_all(empty, turns, stages)

        def produce_both(warp):
            pl.when(warp == 0)(produce)
            if decoder:
                codes = weights_g, of_codes, group_g, tile_at, my_tiles, k_steps
                pl.when(warp == 1)(lambda: decoder.produce(*codes))

        @pl.when(wg < CONSUMERS)
        def _():
            plgpu.set_max_registers(fp8_from_four.registers(config)[0] if decoder else 240, action="increase")
            pl.loop(0, my_tiles)(consume)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == CONSUMERS)
        def _():
            plgpu.set_max_registers(24, action="decrease")
            plgpu.warp_map(produce_both)

        if decoder:
            pl.when(wg > CONSUMERS)(lambda: decoder.decode(of_codes, weights_s, full, empty, my_tiles * k_steps))

    body.__name__ = f"grouped_matmul_{'up' if activation is not None else 'down'}"
    operands = [rows, row_scales, weights, weight_scales, tile_group, tile_starts, tile_sizes, num_tiles]
    operands += [operand for operand in (tile_spans, bias) if operand is not None]
    arrivals = (1 if decoder else HALVES) + operand.pieces + groups
    scratch = [
        operand.scratch,
        plgpu.SMEM((stages, HALVES * COLUMNS, tk), made, transforms=transforms),
        plgpu.SMEM((stages, groups, of_rows.held(TILE_ROWS)), jnp.float32),
        stored.scratch,
        plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages),
        plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
        *(decoder.scratch if decoder else []),
        *epilogue.scratch,
    ]
    result = _compat.kernel(
        body,
        out_type=out_types[0] if quantize is None else out_types,
        grid=(workers,),
        grid_names=("sm",),
        num_threads=CONSUMERS + (2 if decoder else 1),
        thread_name="wg",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, lowering_semantics=_compat.LANE
        ),
        interpret=interpret,
    )(*operands)
    return result if quantize is None else tuple(result)
