"""Grouped matmul of 16-bit floats on Hopper: rows of one group times the weights of its expert, activation in the epilogue.

A persistent, warp-specialised kernel. One producer warp (a warpgroup where rows are fetched one by one: `rows_by_token`) brings
tiles of weights and rows into a ring of shared-memory stages with TMA; consumer warpgroups multiply them with wgmma and
accumulate in float32. Every multiprocessor walks over the tiles that hold rows (their number is read on the GPU), so empty
experts cost nothing.

The operands are swapped: weights stand on the M side of wgmma (64 at a time, no other choice), rows on the N side, which comes
in multiples of 8. A tile with few rows therefore multiplies, reads and writes few rows: there is one copy of the inner loop for
each of `Config.row_counts`, and a tile takes the smallest that covers it. With one row an expert, as in decoding, the weights
are all that moves; with a hundred, hardly a row is multiplied in vain.

The gate and the up half of an up-projection lie in one tile: each consumer holds both accumulators of its 64 columns and
writes activation(gate, up), so nothing of size rows x 2I reaches memory.

Edges. TMA fills what lies outside a matrix with zeros and drops what is stored there: K, I and H need not be multiples of
the tile. Groups are packed: a tile may multiply rows of the next group, which change nothing in its own, and stores its own
alone (`views`). With few tokens every expert visited multiplies all of them from the hidden states themselves, and only rows of
tokens that chose it are stored.

Narrow tiles. A few experts' weights are too few tiles for all multiprocessors. `Config.columns` = 32 or 16 makes two or four
times as many: a stage holds as many bytes, of fewer rows of weights and more of K, and wgmma, which takes 64 rows, reads on into
the rows after them. What it makes of those is dropped.

Teams. Consumers that decode their weights are busy, and none of them decodes while all have an epilogue. `Config.teams` of them
have tiles, stages and a producer warp of their own, and the second begins when the first has done half a tile.

Bit-equality. Every output element is summed over K in steps of 16 in order, in one accumulator, whatever the tile: a row's
result does not depend on which rows share its tile, nor on the configuration.

Learned on an H200 (benchmarks/results/2026-11-22-h200-matmul-variants.txt; qwen3-30b-a3b, 4096 tokens, up + down projection):

- Rows on the M side, tiles of 128 x 256: 388 + 209 us. Skipping the 64-row halves that are padding did not change that:
  what the multiprocessors fetch from L2 and the stages they have for it bind, not the products.
- Clusters of two row tiles that share their weights by multicast: 369 + 213 us, four stages up; slower with three.
- Swapped, up to 192 rows, three stages: 356 + 201 us. Up to 160 rows, stored by 32, which leaves room for a fourth stage: 318 +
  178 us (649 and 580 TFLOP/s). 128 rows and four stages: 352 + 190, more groups are split.
- Few rows (16 and 128 tokens): 128 weight rows x 128 of K a stage, four stages, one consumer reads weights at 4.0 to 4.3 TB/s;
  256 x 64 at 3.8 to 4.1; 128 x 256 with two stages at 3.8 to 3.9.
- Pairs of blocks of columns that fetch their rows together (`Config.cluster`), 192 rows and three stages, 16384 tokens, against
  160 rows and four stages alone: 6082 us a layer instead of 6111 for gpt-oss-120b, 8771 instead of 8708 for qwen3-235b. With
  fewer rows they cost: qwen3-235b with 4096 2530 instead of 2403 (2026-11-24-h200-plans-and-glue.txt).
- Narrow tiles, one token: 32.7 us a layer for a rank of DeepSeek-V3 and 59.9 for gpt-oss-120b (2026-11-24-h200-packed-rows.json),
  42.0 and 61.8 with 64 columns (2026-11-24-h200-packing-variants.txt). Three rounds of tiles of 16 columns are slower than one of
  64, though: 29.7 instead of 27.8 us for qwen3-30b-a3b (tuning/configs). Cutting only the last round's tiles into narrow parts
  leaves too few bytes on their way.
- Asking for the next kernel's first weights ahead (L2 prefetch): 0 to 3 % slower. Programmatic dependent launch: no
  difference, under CUDA graphs as XLA makes them (2026-11-28-h200-few-rows-variants.txt).
  A tile's numbers loaded while the tile before is multiplied: 0 to 2 % slower (2026-11-28-h200-variants.txt).
- The loop over K has to stay in uniform registers, where a warp computes an address once. A tile's row and size loaded before
  the loop, and its ragged edge stored by branches for 16, 8, 4, 2 and 1 rows, pushed the counters into vector registers (52
  vector instructions a step instead of 16, for 160 rows: 2026-11-24-machine-code.txt): layers of 16384 tokens took 8 to 15 %
  longer, 2661 instead of 2360 us for qwen3-30b-a3b (2026-11-24-h200-packed-rows.json, 2026-11-25-h200-variants.txt). Hence the
  loads behind the loop and the loops in `views.Staged.store_first`. `benchmarks/machine_code.py` counts.
- Rows fetched by their tokens (`Config.gather`): no kernel before it, no rows written and read again. Layers of 16384 and 4096
  tokens took 5 and 3 % less for qwen3-30b-a3b, 4096 tokens of qwen3-235b 1 to 6 % less; 16384 of gpt-oss-120b 5 to 13 % more, for
  which four tiles of 128 rows are worse than three of 176 (2026-11-25-h200-variants.txt).
- Crowded experts beside nearly empty ones: a rank of DeepSeek-V3 with 4096 tokens, half of them on one expert, takes 1.2 times
  as long as with even ones: full tiles wait for the tensor cores, those of a few rows for memory, one after the other. Tiles
  taken from both ends in turn, or multiprocessors apart for the tiles of full groups, so that both are busy at the same time,
  made it 4 to 9 % slower still (2026-11-25-h200-variants.txt).
- Long runs lower the clock: the sum of a layer's kernels, each measured alone, is up to 18 % below the layer's own time with
  4096 tokens and more. What saves traffic saves power there, and time beyond its own.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, Shaped

from moe_jax import _compat
from moe_jax.activations import Activation
from moe_jax.kernels.hopper import codes, four_bit_halves, four_bits, interleaved, rows_by_token, tiles, views
from moe_jax.kernels.hopper.epilogue import Epilogue
from moe_jax.kernels.hopper.matmul_bf16_problem import DTYPES as DTYPES
from moe_jax.kernels.hopper.matmul_bf16_problem import supports as supports
from moe_jax.kernels.hopper.matmul_config import FEW_ROWS, PRODUCER_REGISTERS, WGMMA_ROWS, Config, registers
from moe_jax.kernels.hopper.pairs import Pairs
from moe_jax.kernels.hopper.weight_tiles import KMajor, MMajor
from moe_jax.quantization.prepared import PreparedArray


def grouped_matmul(
    rows: Float[Array, "rows K"],
    weights: Shaped[Array, "E N K"] | Shaped[Array, "E K N"] | PreparedArray,
    tile_group: Int[Array, "tiles"],
    tile_starts: Int[Array, "tiles"],
    tile_sizes: Int[Array, "tiles"],
    num_tiles: Int[Array, "1"],
    bias: Float[Array, "E N"] | None,
    activation: Activation | None,
    *,
    config: Config,
    tile_spans: Int[Array, "tiles 2"] | None = None,
    tile_tokens: Int[Array, "tiles"] | None = None,
    row_tokens: Int[Array, "padded_rows"] | None = None,
    weight_scales: Float[Array, "E ..."] | None = None,
    transposed: bool = False,
    total_rows: int | None = None,
    interpret: Any = None,
    multiprocessors: int | None = None,
) -> Float[Array, "R N_out"] | tuple[Array, ...]:
    """`activation(rows @ weights[group].T + bias[group])` for the rows of the tiles; the others are undefined.

    Args:
        rows: of all groups; with `tile_tokens` those of all tokens, at most as many as a tile holds.
        weights: of the experts; prepared ones are decoded: see `four_bits`.
        tile_group: the expert of each tile.
        tile_starts: its first row.
        tile_sizes: its rows.
        num_tiles: tiles that hold rows.
        bias: added before the activation.
        activation: gated or not; None for none.
        config: how the work is tiled.
        tile_spans: the tiles of each tile's group, first and end, for the order: `tiles.visit`.
        tile_tokens: the tokens that have a row in each tile, a bit each.
        row_tokens: the token of each row, and a tile more; rows are then fetched from those of all tokens.
        weight_scales: float32, where weights are codes of a byte: see `codes`.
        transposed: weights are ``[E, K, N]``, and read as they lie: `input_grad`. Neither codes nor narrow tiles.
        total_rows: R, with `tile_tokens` or `row_tokens`.
        interpret: for the interpreter.
        multiprocessors: of the device, by default.
    """
    k = rows.shape[1]
    n_weights = weights.shape[2 if transposed else 1]
    shared = tile_tokens is not None
    gated = activation is not None and activation.is_gated and not transposed
    n_out = n_weights // 2 if gated else n_weights
    dtype = rows.dtype
    tile_rows, tk, stages = config.tile_rows, config.tile_k, config.stages
    gathered = row_tokens is not None
    of_producer = 56 if gathered else PRODUCER_REGISTERS
    total_rows = total_rows if shared or gathered else rows.shape[0]
    consumers, halves, block_cols = config.consumers, config.halves, config.columns
    wg_cols = block_cols if gated else halves * block_cols  # columns of the output that one consumer makes
    whole = config.whole
    tile_cols = whole.consumers * wg_cols
    n_tiles = pl.cdiv(n_out, tile_cols)
    k_steps = pl.cdiv(k, tk)
    cluster = config.cluster
    teams, everyone = config.teams, config.everyone
    programs = (multiprocessors or _compat.num_multiprocessors()) // cluster
    workers = programs * teams
    n_steps = pl.cdiv(n_tiles, cluster)  # past the last columns TMA reads zeros and stores nothing
    tile_spans = tiles.spans_for(tile_spans, tile_rows, n_steps, workers)
    swizzled_axis = math.gcd(k, n_weights) if transposed else k  # both operands of wgmma have one swizzle
    transforms = tiles.transforms(swizzled_axis, dtype)
    swizzled = tiles.swizzle_bytes(swizzled_axis, dtype) // dtype.itemsize
    operand = views.Operand(everyone.stages, tile_rows, tk, swizzled, dtype, interpret is not None or gathered)
    coded, few = None, tile_rows <= FEW_ROWS
    four_bit = isinstance(weights, PreparedArray)
    if four_bit:
        prepared, weights, weight_scales = weights, weights.values, weights.scales
        coded = four_bits.FourBits(prepared, everyone, gated, interpret=interpret is not None)
    elif weight_scales is not None:
        to_decode = weights, weight_scales, everyone, n_out, gated, dtype
        coded = codes.Codes(*to_decode, interpret=interpret is not None)
    bias_dtype = None if bias is None else bias.dtype
    epilogue = Epilogue(
        everyone.whole, n_out, dtype, activation, bias_dtype, marked=shared, interpret=interpret is not None
    )
    pairs = Pairs(everyone, interpret is not None) if config.paired else None
    whole = dataclasses.replace(whole, stages=everyone.stages)
    if four_bit and config.interleaved:
        of_weights = four_bit_halves.HalfBlocks(prepared, whole)
    elif four_bit:
        of_weights = four_bits.Blocks(prepared, whole, gated)
    elif transposed:
        of_weights = MMajor(config, dtype, transforms)
    else:
        of_weights = KMajor(whole, n_out, gated, weights.dtype, coded.transforms if coded else transforms)

    def body(rows_g, weights_g, group_g, starts_g, sizes_g, count_g, *refs):
        refs = list(refs)
        spans_g = refs.pop(0) if tile_spans is not None else None
        tokens_g = refs.pop(0) if shared else None
        row_tokens_g = refs.pop(0) if gathered else None
        scales_g = refs.pop(0) if coded else None
        bias_g = refs.pop(0) if bias is not None else None
        out_g = refs.pop(0)
        rows_s, weights_s, full, empty = refs[:4]
        refs = refs[4:]
        row_done = refs.pop(0) if gathered and interpret is not None else None
        begun = refs.pop(0) if teams > 1 else None
        of_codes = coded.references(scales_g, refs) if coded else None
        of_pairs = [refs.pop(0) for _ in pairs.scratch] if pairs else None
        ends = epilogue.references(out_g, bias_g, refs)
        program, wg = lax.axis_index("sm"), lax.axis_index("wg")
        team = lax.div(wg, jnp.int32(consumers)) if teams > 1 else 0
        writer, own = pairs.place(wg) if pairs else (wg, 0)  # its place in the epilogue; the first half that is summed
        unit = writer - team * whole.consumers  # of a tile's columns
        m_tiles = count_g[0]

        def share_of(team):
            """A team's number among those of all multiprocessors, and its tiles."""
            worker = program + team * programs
            return worker, tiles.share(m_tiles * n_steps, worker, workers)

        worker, my_tiles = share_of(team)

        def tile_at(i, worker=worker):
            m, n = tiles.visit(worker + i * workers, m_tiles, n_steps, 1 if spans_g is None else config.band, spans_g)
            return m, n if cluster == 1 else n * cluster + lax.axis_index("cta")

        def rows_of(m):
            """Rows that are multiplied."""
            return jnp.int32(rows.shape[0]) if shared else sizes_g[m]

        def consume(i):
            m, n = tile_at(i)
            col = n * tile_cols + unit * wg_cols
            epilogue.begin(coded is not None and coded.fetches)
            ask = functools.partial(epilogue.fetch_bias, ends, writer, group_g[m], col)
            if pairs:
                pl.when(own == 0)(ask)
            else:
                ask()
            ahead = None
            if coded:
                coded.fetch(of_codes, wg, group_g[m], col + own * n_out if pairs else col)
                if few:
                    ahead = numbers(m), coded.factors(of_codes, group_g[m], own)
            tiles.for_row_count(config.row_counts, rows_of(m), functools.partial(multiply, i, m, col, ahead))

        def numbers(m):
            return starts_g[m], (tokens_g if shared else sizes_g)[m]

        def multiply(i, m, col, ahead, count, below):
            first_turn, ring = i * k_steps, team * stages
            expert = group_g[m] if coded else None

            def accumulate(*accs):
                def multiply_step(step, slot):
                    at = ring + slot
                    plgpu.barrier_wait(full.at[at])
                    block_at = functools.partial(of_weights.block, weights_s, at, unit)
                    places = [(piece, half) for piece in range(operand.pieces) for half in range(halves)]
                    loaded = []
                    for turn, (piece, half) in enumerate(places):
                        b = operand.eights(rows_s).at[at, piece, pl.ds(0, count)]
                        if coded:
                            if turn == len(loaded):
                                some = places[turn : turn + coded.ahead]
                                loaded += coded.load(block_at, [(own + h, p * swizzled) for p, h in some], col)
                            place = codes.Place(expert, col, own + half, step * tk + piece * swizzled)
                            a = coded.decode(loaded[turn], of_codes, wg, turn, place)
                        else:
                            a = block_at(own + half, piece * swizzled, swizzled)
                        plgpu.wgmma(accs[half], a, b.T)
                        if coded:  # registers are read until the products are done
                            plgpu.wgmma_wait(coded.under_way)
                    under_way = halves * operand.pieces if config.overlap else None
                    tiles.hand_back(empty, step, slot, stages, under_way, ring)
                    return tiles.next_slot(slot, stages)

                lax.fori_loop(0, k_steps, multiply_step, lax.rem(first_turn, stages))
                # On their way while the last products run; before a loop of many rows they cost it its registers.
                mine = ahead[0] if ahead else numbers(m)
                if config.overlap:
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(empty.at[ring + lax.rem(first_turn + k_steps - 1, stages)])
                return tuple(acc[...] for acc in accs), mine

            accs, mine = pl.run_scoped(accumulate, *[plgpu.ACC((WGMMA_ROWS, count)) for _ in range(halves)])
            if config.interleaved:
                accs = interleaved.split(*accs, interpret is not None)
            if coded:
                factors = ahead[1] if ahead else coded.factors(of_codes, expert, own)
                accs = coded.scale(accs, of_codes, wg, factors)

            def finish(accs):
                epilogue.finish(ends, writer, accs, *mine, col, below)

            if pairs:
                pairs.meet(of_pairs, wg, i, *accs, finish)
            else:
                finish(accs)

        def produce(team=0):
            (worker, my_tiles), ring = share_of(team), team * stages
            if teams > 1:
                pl.when(team > 0)(lambda: plgpu.barrier_wait(begun.at[team - 1]))
            by_token = rows_by_token.RowsByToken(rows_g, tile_rows, interpret is not None) if gathered else None
            turns = my_tiles * k_steps

            def hand_over(turn, under_way):
                by_token.finish(under_way)
                plgpu.barrier_arrive(full.at[lax.rem(turn, stages)])

            @pl.loop(0, my_tiles)
            def _tile(i):
                m, n = tile_at(i, worker)
                expert, size = group_g[m], rows_of(m)
                # Not known to be 0 where all rows are meant: there may be fewer than are fetched.
                first_row = m * 0 if shared else starts_g[m]
                tokens = by_token.tokens(row_tokens_g, first_row, size) if gathered else None

                @pl.loop(0, k_steps)
                def _step(step):
                    turn = i * k_steps + step
                    slot = ring + lax.rem(turn, stages)

                    pl.when(turn >= stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
                    if teams > 1:
                        pl.when((turn == middle) & (team < teams - 1))(lambda: plgpu.barrier_arrive(begun.at[team]))

                    of_weights.fetch(weights_g, weights_s, expert, n, step, slot, full)

                    if gathered:
                        tile = [operand.eights(rows_s).at[slot, piece] for piece in range(operand.pieces)]
                        by_token.start(tokens, tile, step * tk, row_done)
                        pl.when(turn > 0)(lambda: hand_over(turn - 1, 1))
                        return

                    def load_rows(count, below):
                        del below

                        # The interpreter has no multicast: there every CTA fetches all of its rows.
                        together = dict(collective_axes="cta") if cluster > 1 and interpret is None else {}
                        for piece in range(operand.pieces):
                            source = rows_g.at[pl.ds(first_row, count), pl.ds(step * tk + piece * swizzled, swizzled)]
                            tile = operand.singles(rows_s).at[slot, piece, pl.ds(0, count)]
                            plgpu.copy_gmem_to_smem(source, tile, full.at[slot], **together)

                    tiles.for_row_count(config.row_counts, size, load_rows)

            if gathered:
                pl.when(turns > 0)(lambda: hand_over(turns - 1, 0))

            if teams > 1:
                pl.when((turns <= middle) & (team < teams - 1))(lambda: plgpu.barrier_arrive(begun.at[team]))
            tiles.observe_all(empty, turns, stages, ring)

        @pl.when(wg < everyone.consumers)
        def _():
            if everyone.consumers > 1:
                plgpu.set_max_registers(registers(everyone.consumers, of_producer), action="increase")
            pl.loop(0, my_tiles)(consume)
            if pairs:
                pairs.observe(of_pairs, wg, my_tiles)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == everyone.consumers)
        def _():
            if everyone.consumers > 1:
                plgpu.set_max_registers(of_producer, action="decrease")
            if gathered:
                produce()
            else:
                plgpu.warp_map(lambda warp: pl.when(warp < teams)(lambda: produce(warp if teams > 1 else 0)))

    body.__name__ = "input_grad" if transposed else f"grouped_matmul_{'up' if activation is not None else 'down'}"
    operands = [rows, weights, tile_group, tile_starts, tile_sizes, num_tiles]
    more = tile_spans, tile_tokens, row_tokens, weight_scales, bias
    operands += [operand for operand in more if operand is not None]
    scratch = [
        operand.scratch,
        of_weights.scratch,
        plgpu.Barrier(
            num_arrivals=(1 if gathered else operand.pieces) + of_weights.copies, num_barriers=everyone.stages
        ),
        plgpu.Barrier(num_arrivals=consumers, num_barriers=everyone.stages)
        if cluster == 1
        else plgpu.ClusterBarrier(collective_axes=("cta",), num_arrivals=consumers, num_barriers=stages),
    ]
    if gathered and interpret is not None:
        scratch += [plgpu.Barrier(num_arrivals=1)]
    if teams > 1:  # a team that has done about half a tile lets the next begin, for epilogues at different times
        middle = stages + max(0, min(stages, k_steps // 2) - 1)
        scratch += [plgpu.Barrier(num_arrivals=1, num_barriers=teams - 1)]
    scratch += coded.scratch if coded else []
    scratch += pairs.scratch if pairs else []
    scratch += epilogue.scratch
    return _compat.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((total_rows, n_out), dtype),
        grid=(programs,),
        grid_names=("sm",),
        **(dict(cluster=(cluster,), cluster_names=("cta",)) if cluster > 1 else {}),
        num_threads=everyone.consumers + 1,
        thread_name="wg",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
            lowering_semantics=_compat.LANE,
            reduction_scratch_bytes=views.ALIGNED,  # none is needed: rows are numbered within a warp
        ),
        interpret=interpret,
    )(*operands)
