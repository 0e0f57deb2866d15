"""Grouped matmul of 8-bit numbers on Hopper: FP8 or int8 rows of one group times the weights of its expert, with their scales.

The same machine as `matmul_bf16`: a producer warp, a ring of stages, consumers with weights on the M side of wgmma, one copy of
the loop for each row count. What is different are the scales.

- One scale a row and one a channel, or one for all: products are summed over all of K in the tensor cores,
  int8 exactly, and scaled once, before the bias.
- A scale for each 128 columns of a row and for each block of weights: a sum over 128 of K is scaled and added up in float32
  registers. Scales of rows come with the stage, those of blocks are loaded as numbers: 64 rows of weights have one.

FP8 wgmma alone adds up with fewer bits than float32; what is promoted every 128 does not lose them. Both ways sum in an order
that depends on nothing but K: a row has the same bits in any tile.

Registers bind: a consumer holds both sums of its 64 columns, gate and up, and products of 128 of K, one of which is scaled while
the other is computed. There is room for 96 rows. `matmul_rows_first` takes tiles of 128, where groups are large.

Learned on an H100 (benchmarks/results/2026-11-26-h100-fp8-*.txt; up-projections):

- qwen3-30b-a3b, 256 rows for each expert: 1002 TFLOP/s with scales of channels, 1007 int8; mixtral-8x7b, 4096 rows: 1385.
- Scales of blocks, groups of random size: both products under way 229 us instead of 250 (qwen3-30b-a3b); scales fetched a step
  ahead 940 us instead of 995 (dsv3-ep8, 512 rows). Worse: a stage handed back before the last sums (237 us instead of 229),
  scales of rows loaded after the products (262 us instead of 250), counts that take different times (`eight_bit`).
- Scales of rows that are taken from shared memory one by one cost a loop of blocks 5 to 14 % (dsv3-ep8 460 -> 524 us): groups
  then begin at multiples of 4 rows. A tile scaled once does not notice.
- Where products are scaled once, a stage that is handed back a step late (`Config.overlap`) takes the loop its uniform registers:
  10 moves and 50 vector instructions a step instead of 13 (2026-11-26-machine-code.txt).
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
from moe_jax.kernels.hopper import fp8_from_four, tiles, views
from moe_jax.kernels.hopper import row_scales as of_rows
from moe_jax.kernels.hopper.codes import block_rows, block_scale
from moe_jax.kernels.hopper.epilogue import Columns, Epilogue
from moe_jax.kernels.hopper.gather_quantize import scales_shape
from moe_jax.kernels.hopper.matmul_config import WGMMA_ROWS, Config
from moe_jax.kernels.hopper.quantized_store import QuantizedStore, References
from moe_jax.quantization.formats import Spec
from moe_jax.quantization.prepared_fp8 import PreparedFp8

SHORT = 16  # steps of a tile where scales of blocks are better not fetched a step ahead
GROUP = 128  # columns of K that share a scale where they are promoted
ROW_MULTIPLE = 4  # where tiles with scales of such groups should begin
_DTYPES = {"float8_e4m3fn": "float8_e4m3fn", "float8_e5m2": "float8_e4m3fn", "int8": "int8"}  # of rows: of weights
_OUTPUTS = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))


def supports(
    rows: Any, row_scales: Any, weights: Any, weight_scales: Any, activation: Activation | None, out_dtype: Any
) -> str | None:
    """Why this kernel cannot run the problem; None if it can. Shapes as in `grouped_matmul`."""
    n, k = weights.shape[1:]
    gated = activation is not None and activation.is_gated
    out = n // (2 if gated else 1)
    made = "float8_e4m3fn" if isinstance(weights, PreparedFp8) else weights.dtype.name
    if _DTYPES.get(rows.dtype.name) != made:
        return f"rows {rows.dtype} and weights {made} must both be float8_e4m3fn (rows also float8_e5m2) or both int8"
    if jnp.dtype(out_dtype) not in _OUTPUTS:
        return f"the output {jnp.dtype(out_dtype)} must be bfloat16 or float16"
    if (tiles.swizzle_bytes(k, rows.dtype) or 0) < 64:
        return f"the contracted size={k} must be a multiple of 64 (TMA and wgmma rows of 64 bytes); pad the weights"
    for name, size in (("the output size", out), ("the weight rows", n)):
        if tiles.swizzle_bytes(size, out_dtype) is None:
            return f"{name}={size} must be a multiple of 16 (TMA rows of 32 bytes); pad the weights"
    if 0 in rows.shape or 0 in weights.shape:
        return f"an empty operand (rows {rows.shape}, weights {weights.shape}) needs no kernel"
    if weight_scales.ndim == 3:
        blocks = n if weight_scales.shape[1] == 0 else block_rows(out, weight_scales.shape[1], gated)
        if row_scales.shape[0] != pl.cdiv(k, GROUP) or weight_scales.shape[2] != pl.cdiv(k, GROUP):
            return (
                f"scales of blocks: rows have {row_scales.shape[0]} and weights {weight_scales.shape[2]} scales along the "
                f"contracted size={k}, but must have one for each {GROUP} columns"
            )
        if blocks is None:
            return (
                f"{weight_scales.shape[1]} blocks of {n} weight rows: blocks must have a multiple of {WGMMA_ROWS} rows"
            )
    return None


def grouped_matmul(
    rows: Shaped[Array, "rows K"],
    row_scales: Float[Array, "groups padded_rows"],
    weights: Shaped[Array, "E N K"] | PreparedFp8,
    weight_scales: Float[Array, "E ..."],
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
    tile_tokens: Int[Array, "tiles"] | None = None,
    total_rows: int | None = None,
    aligned: bool = False,
    quantize: Spec | None = None,
    interpret: Any = None,
    multiprocessors: int | None = None,
) -> Float[Array, "R N_out"] | tuple[Shaped[Array, "R N_out"], Float[Array, "G Rp"]]:
    """`activation((rows * their scales) @ (weights[group] * their scales).T + bias[group])` for the rows of the tiles.

    Args:
        rows: of all groups, float8_e4m3fn, float8_e5m2 or int8; with `tile_tokens` those of all tokens, at most as many as a
            tile holds.
        row_scales: float32, of each row one ``[1, rows + a tile]``, or one for each 128 columns ``[K / 128, rows + a tile]``.
        weights: of the experts, of the same dtype, or four-bit floats that become it (`fp8_from_four`); float8_e4m3fn beside
            float8_e5m2.
        weight_scales: float32; of each row ``[E, N]``; of a matrix, or of its two halves, ``[E, 1]`` or ``[E, 2]``; of blocks
            ``[E, N blocks, K / 128]``, with a gate those of the halves one after the other.
        tile_group: the expert of each tile.
        tile_starts: its first row.
        tile_sizes: its rows.
        num_tiles: tiles that hold rows.
        bias: added before the activation.
        activation: gated or not; None for none.
        config: how the work is tiled.
        out_dtype: bfloat16 or float16.
        tile_tokens: the tokens that have a row in each tile, a bit each.
        total_rows: R, with `tile_tokens`.
        aligned: every tile begins at a multiple of 4 rows: their scales then come in pairs.
        quantize: the format of the result, which is then codes and scales as `gather_quantize` makes them of `out_dtype`; see
            `quantized_store.supports`.
        interpret: for the interpreter.
        multiprocessors: of the device, by default.
    """
    (n_weights, k), dtype = weights.shape[1:], rows.dtype
    shared, gated = tile_tokens is not None, activation is not None and activation.is_gated
    n_out = n_weights // 2 if gated else n_weights
    promote, interpreted = weight_scales.ndim == 3, interpret is not None
    by_channel = not promote and weight_scales.shape[1] == n_weights and n_weights > 2
    tile_rows, tk, stages = config.tile_rows, config.tile_k, config.stages
    total_rows = total_rows if shared else rows.shape[0]
    consumers, halves, depth, block_cols = config.consumers, config.halves, config.depth, config.columns
    wg_cols = block_cols if gated else halves * block_cols  # columns of the output that one consumer makes
    tile_cols = consumers * wg_cols
    n_tiles, k_steps = pl.cdiv(n_out, tile_cols), pl.cdiv(k, tk)
    workers = multiprocessors or _compat.num_multiprocessors()
    tile_spans = tiles.spans_for(tile_spans, tile_rows, n_tiles, workers)
    swizzled = tiles.swizzle_bytes(k, dtype)  # columns of K, a byte each
    a_group = GROUP // swizzled  # pieces
    groups = tk // GROUP  # of a stage
    operand = views.Operand(stages, tile_rows, tk, swizzled, dtype, interpreted)
    decoder, transforms, made = None, tiles.transforms(k, dtype), weights.dtype
    if isinstance(weights, PreparedFp8):
        decoder = fp8_from_four.Decoder(weights, config, gated, transforms, interpret=interpreted)
        weights, made = weights.values, jnp.float8_e4m3fn
    bias_dtype = None if bias is None else bias.dtype
    of_epilogue = dict(marked=shared, interpret=interpreted, stores=quantize is None)
    epilogue = Epilogue(config, n_out, out_dtype, activation, bias_dtype, **of_epilogue)
    stored = None if quantize is None else QuantizedStore(quantize, out_dtype, interpret=interpreted)
    channels = Columns(config, n_out, gated, jnp.float32)
    scales_of_rows = of_rows.RowScales(config, aligned=aligned, interpret=interpreted)
    row_counts = tuple(c for c in config.row_counts if dtype != jnp.int8 or c <= 32 or c % 16 == 0 or c == tile_rows)
    block = block_rows(n_out, weight_scales.shape[1], gated) if promote else None
    sums = jnp.int32 if dtype == jnp.int8 else jnp.float32
    out_types = [jax.ShapeDtypeStruct((total_rows, n_out), out_dtype)]
    if quantize is not None:
        out_types = [
            jax.ShapeDtypeStruct((total_rows, n_out), quantize.storage_dtype),
            jax.ShapeDtypeStruct(scales_shape(total_rows, n_out, quantize), jnp.float32),
        ]
    pieces = [  # of the weights of a stage: (its row there, the row of the expert's matrix, the first column of K)
        (
            ((wg * depth + piece) * halves + half) * block_cols,
            half * n_out + wg * wg_cols if gated else (wg * halves + half) * block_cols,
            piece * (tk // depth),
        )
        for wg in range(consumers)
        for piece in range(depth)
        for half in range(halves)
    ]

    def body(rows_g, row_scales_g, weights_g, weight_scales_g, group_g, starts_g, sizes_g, count_g, *refs):
        refs = list(refs)
        spans_g = refs.pop(0) if tile_spans is not None else None
        tokens_g = refs.pop(0) if shared else None
        bias_g = refs.pop(0) if bias is not None else None
        outs = [refs.pop(0) for _ in out_types]
        rows_s, weights_s, full, empty = refs[:4]
        refs = refs[4:]
        codes = None if stored is None else References(*outs, *(refs.pop(0) for _ in stored.scratch))
        row_scales_s = refs.pop(0) if promote else None
        a_row = None if promote else (row_scales_g, refs.pop(0), refs.pop(0))
        of_channels = (weight_scales_g, refs.pop(0), refs.pop(0)) if by_channel else None
        of_codes = [refs.pop(0) for _ in decoder.scratch] if decoder else None
        ends = epilogue.references(outs[0], bias_g, refs)
        worker, wg = lax.axis_index("sm"), lax.axis_index("wg")
        m_tiles = count_g[0]
        my_tiles = tiles.share(m_tiles * n_tiles, worker, workers)

        def tile_at(i):
            return tiles.visit(worker + i * workers, m_tiles, n_tiles, 1 if spans_g is None else config.band, spans_g)

        def rows_of(m):
            """Rows that are multiplied."""
            return jnp.int32(rows.shape[0]) if shared else sizes_g[m]

        def first_row_of(m):
            """Not known to be 0 where all rows are meant: there may be fewer than are fetched."""
            return m * 0 if shared else starts_g[m]

        def product(acc, slot, piece, half, count):
            side, at = divmod(piece * swizzled, tk // depth)
            weight_rows = pl.ds(((wg * depth + side) * halves + half) * block_cols, WGMMA_ROWS)
            b = operand.eights(rows_s).at[slot, piece, pl.ds(0, count)]
            plgpu.wgmma(acc, weights_s.at[slot, weight_rows, pl.ds(at, swizzled)], b.T)

        def consume(i):
            m, n = tile_at(i)
            col = n * tile_cols + wg * wg_cols
            epilogue.begin(not promote)
            epilogue.fetch_bias(ends, wg, group_g[m], col)
            if not promote:
                scales_of_rows.fetch(a_row, wg, first_row_of(m))
            if by_channel:
                channels.fetch(of_channels, wg, group_g[m], col)
            multiply = promoted if promote else scaled_once
            tiles.for_row_count(row_counts, rows_of(m), functools.partial(multiply, i, m, col))

        def finish(m, col, accs, below):
            mine = starts_g[m], (tokens_g if shared else sizes_g)[m]
            if stored is not None:
                (tile,) = epilogue.activated(ends, wg, accs)
                stored.store(codes, wg, tile, *mine, col)
                return
            epilogue.finish(ends, wg, accs, *mine, col, below)

        def scaled_once(i, m, col, count, below):
            first_turn = i * k_steps

            def accumulate(*accs):
                def step(step, slot):
                    plgpu.barrier_wait(full.at[slot])
                    for piece in range(operand.pieces):
                        for half, acc in enumerate(accs):
                            product(acc, slot, piece, half, count)
                    tiles.hand_back(empty, step, slot, stages, halves * operand.pieces if config.overlap else None)
                    return tiles.next_slot(slot, stages)

                lax.fori_loop(0, k_steps, step, lax.rem(first_turn, stages))
                if config.overlap:
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(empty.at[lax.rem(first_turn + k_steps - 1, stages)])
                return tuple(acc[...] for acc in accs)

            accs = pl.run_scoped(accumulate, *[plgpu.ACC((WGMMA_ROWS, count), sums) for _ in range(halves)])
            shape = WGMMA_ROWS, count
            scales = scales_of_rows.spread(a_row, wg, first_row_of(m), shape)
            if by_channel:
                of_weights = channels.spread(of_channels, wg, shape)
            else:
                last = weight_scales.shape[1] - 1
                of_weights = [weight_scales_g[group_g[m], min(half, last) if gated else 0] for half in range(halves)]
            accs = [acc.astype(jnp.float32) * scales * scale for acc, scale in zip(accs, of_weights, strict=True)]
            finish(m, col, accs, below)

        def promoted(i, m, col, count, below):
            first_turn = i * k_steps
            shape = WGMMA_ROWS, count
            first_row = first_row_of(m)
            ahead = halves == 1 or k_steps > SHORT

            def of_blocks(step):
                def of_block(half, group):
                    row = lax.div(col + (0 if gated else half * block_cols), block)
                    row = row + half * (weight_scales.shape[1] // 2) if gated else row
                    return block_scale(weight_scales_g, group_g[m], row, step * groups + group)

                return [[of_block(half, group) for half in range(halves)] for group in range(groups)]

            def step(step, carry):
                slot, totals, *fetched = carry
                of_weights = fetched[0] if ahead else of_blocks(step)
                following = [of_blocks(step + 1)] if ahead else []
                plgpu.barrier_wait(full.at[slot])
                for group in range(groups):
                    a_scale = of_rows.load(row_scales_s.at[slot, group], first_row, count, aligned, interpreted)

                    def multiply(*parts, group=group, a_scale=a_scale):
                        for half, part in enumerate(parts):
                            for piece in range(a_group):
                                product(part, slot, group * a_group + piece, half, count)
                        for half, part in enumerate(parts):
                            under_way = (halves - 1 - half) * a_group
                            found = plgpu.wgmma_accumulator_load(part, wait_n=under_way).astype(jnp.float32)
                            scale = lax.broadcast_in_dim(a_scale * of_weights[group][half], shape, [1])
                            totals[half] = totals[half] + found * scale
                        return tuple(totals)

                    totals = list(pl.run_scoped(multiply, *[plgpu.ACC(shape, sums)] * halves))
                if interpreted:  # it does not know that each thread arrives, after its own loads
                    plgpu.commit_smem()
                plgpu.barrier_arrive(empty.at[slot])
                return tiles.next_slot(slot, stages), totals, *following

            zeros = [plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA) for _ in range(halves)]
            fetched = [of_blocks(0)] if ahead else []
            _, accs, *_ = lax.fori_loop(0, k_steps, step, (lax.rem(first_turn, stages), zeros, *fetched))
            finish(m, col, accs, below)

        def produce():
            turns = my_tiles * k_steps

            @pl.loop(0, my_tiles)
            def _tile(i):
                m, n = tile_at(i)
                expert, size = group_g[m], rows_of(m)
                first_row = first_row_of(m)

                @pl.loop(0, k_steps)
                def _step(step):
                    turn = i * k_steps + step
                    slot = lax.rem(turn, stages)
                    pl.when(turn >= stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
                    for at, row, column in [] if decoder else pieces:
                        ks = pl.ds(step * tk + column, tk // depth)
                        source = weights_g.at[expert, pl.ds(n * tile_cols + row, block_cols), ks]
                        plgpu.copy_gmem_to_smem(source, weights_s.at[slot, pl.ds(at, block_cols)], full.at[slot])

                    def load_rows(count, below):
                        del below
                        for piece in range(operand.pieces):
                            source = rows_g.at[pl.ds(first_row, count), pl.ds(step * tk + piece * swizzled, swizzled)]
                            tile = operand.singles(rows_s).at[slot, piece, pl.ds(0, count)]
                            plgpu.copy_gmem_to_smem(source, tile, full.at[slot])
                        for group in range(groups if promote else 0):
                            part = row_scales_s.at[slot, group]
                            of_rows.copy(row_scales_g, step * groups + group, first_row, count, part, full.at[slot])

                    tiles.for_row_count(row_counts, size, load_rows)

            tiles.observe_all(empty, turns, stages)

        def produce_both(warp):
            pl.when(warp == 0)(produce)
            if decoder:
                codes = weights_g, of_codes, group_g, tile_at, my_tiles, k_steps
                pl.when(warp == 1)(lambda: decoder.produce(*codes))

        @pl.when(wg < consumers)
        def _():
            if consumers == 2 or decoder:
                plgpu.set_max_registers(fp8_from_four.registers(config)[0] if decoder else 240, action="increase")
            pl.loop(0, my_tiles)(consume)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == consumers)
        def _():
            if consumers == 2 or decoder:
                plgpu.set_max_registers(24, action="decrease")
            plgpu.warp_map(produce_both)

        if decoder:
            pl.when(wg > consumers)(lambda: decoder.decode(of_codes, weights_s, full, empty, my_tiles * k_steps))

    body.__name__ = f"grouped_matmul_{'up' if activation is not None else 'down'}"
    operands = [rows, row_scales, weights, weight_scales, tile_group, tile_starts, tile_sizes, num_tiles]
    operands += [operand for operand in (tile_spans, tile_tokens, bias) if operand is not None]
    arrivals = (1 if decoder else len(pieces)) + operand.pieces + (groups if promote else 0)
    scratch = [
        operand.scratch,
        plgpu.SMEM((stages, config.stage_rows, tk // depth), made, transforms=transforms),
        plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages),
        plgpu.Barrier(num_arrivals=consumers, num_barriers=stages),
        *([] if stored is None else stored.scratch),
        *([plgpu.SMEM((stages, groups, of_rows.held(tile_rows)), jnp.float32)] if promote else []),
        *([] if promote else scales_of_rows.scratch),
        *(channels.scratch if by_channel else []),
        *(decoder.scratch if decoder else []),
        *epilogue.scratch,
    ]
    result = _compat.kernel(
        body,
        out_type=out_types[0] if stored is None else out_types,
        grid=(workers,),
        grid_names=("sm",),
        num_threads=consumers + (2 if decoder else 1),
        thread_name="wg",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, lowering_semantics=_compat.LANE
        ),
        interpret=interpret,
    )(*operands)
    return result if stored is None else tuple(result)
