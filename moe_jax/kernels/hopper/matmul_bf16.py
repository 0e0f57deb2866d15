"""Grouped matmul of 16-bit floats on Hopper: rows of one group times the weights of its expert, activation in the epilogue.

A persistent, warp-specialised kernel. One producer warp brings tiles of weights and rows into a ring of shared-memory stages
with TMA; consumer warpgroups multiply them with wgmma and accumulate in float32. Every multiprocessor walks over the tiles that
hold rows (their number is read on the GPU), so empty experts cost nothing.

The operands are swapped: weights stand on the M side of wgmma (64 at a time, no other choice), rows on the N side, which comes
in multiples of 8. A tile with few rows therefore multiplies, reads and writes few rows: there is one copy of the inner loop for
each of `Config.row_counts`, and a tile takes the smallest that covers it. With one row an expert, as in decoding, the weights
are all that moves; with a hundred, hardly a row is multiplied in vain.

The gate and the up half of an up-projection lie in one tile: each consumer holds both accumulators of its 64 columns and
writes activation(gate, up), so nothing of size rows x 2I reaches memory.

Edges. TMA fills what lies outside a matrix with zeros and drops what is stored there: K, I and H need not be multiples of
the tile. Groups are packed: a tile may multiply rows of the next group, which change nothing in its own, and stores its own alone,
in runs of 32, 16, 8, ... rows (`views`). With few tokens every expert visited multiplies all of them from the hidden states
themselves, and only rows of tokens that chose it are stored.

The last round. Tiles are dealt out in turn; those of the last, incomplete round are cut into `Config.split` parts by columns, so
that all multiprocessors share it. A part fills the first rows of its blocks of weights; what stands in the others is multiplied
and dropped.

Bit-equality. Every output element is summed over K in steps of 16 in order, in one accumulator, whatever the tile: a row's
result does not depend on which rows share its tile, nor on the configuration.

Learned on an H200 (benchmarks/results/2026-11-22-h200-matmul-variants.txt; qwen3-30b-a3b, 4096 tokens, up + down projection):

- Rows on the M side, tiles of 128 x 256: 388 + 209 us. Skipping the 64-row halves that are padding did not change that:
  what the multiprocessors fetch from L2 and the stages they have for it bind, not the products.
- Clusters of two row tiles that share their weights by multicast: 369 + 213 us, four stages up; slower with three.
- Swapped, up to 192 rows, three stages: 356 + 201 us. Up to 160 rows, outputs stored in blocks of 32 rows, which leaves room
  for a fourth stage: 318 + 178 us (649 and 580 TFLOP/s). 128 rows and four stages: 352 + 190, more groups are split.
- Few rows (16 and 128 tokens): 128 weight rows x 128 of K a stage, four stages, one consumer reads weights at 4.0 to 4.3 TB/s;
  256 x 64 at 3.8 to 4.1; 128 x 256 with two stages at 3.8 to 3.9.
- Pairs of blocks of columns that fetch their rows together (`Config.cluster`), 192 rows and three stages, 16384 tokens, against
  160 rows and four stages alone: 2334 us a layer instead of 2381 for qwen3-30b-a3b, 6082 instead of 6111 for gpt-oss-120b, 8771
  instead of 8708 for qwen3-235b. With fewer rows they cost: mixtral-8x7b with 1024 tokens 1367 instead of 1304, qwen3-235b with
  4096 2530 instead of 2403 (2026-11-24-h200-plans-and-glue.txt).
- Programmatic dependent launch: no difference under XLA (208.0 and 207.7 us for a layer of 16 tokens).
- Long runs lower the clock: the sum of a layer's kernels, each measured alone, is up to 16 % below the layer's own time
  (2026-11-22-h200-bf16-layer.json).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from moe_jax import _compat
from moe_jax.activations import Activation
from moe_jax.kernels.hopper import tiles, views
from moe_jax.kernels.hopper.ahead import Ahead

_DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
_M = 64  # rows of weights that one wgmma takes
_FEW = (8, 16, 24, 32, 40, 48, 56, 64)
_SOME = (16, 32, 48, 64, 80, 96, 112, 128)
_MANY = (16, 32, 64, 96, 112, 120, 128, 136, 144, 152, 160)
# As many as the registers hold; three stages, two blocks together.
_MOST = (16, 32, 64, 96, 112, 128, 144, 160, 176, 192)


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile of the kernel: `consumers` x `halves` x 64 rows of weights, up to `row_counts[-1]` rows of a group."""

    row_counts: tuple[int, ...] = _MANY  # the last is the row tile of `group_tokens`
    consumers: int = 2
    halves: int = 2  # blocks of 64 weight rows per consumer: gate and up, or two neighbours; 1 only without a gate
    tile_k: int = 64
    stages: int = 3
    band: int = 8  # row tiles walked together before the next weight columns: what L2 holds at a time
    cluster: int = 1  # neighbouring blocks of weight columns that fetch their rows once and together
    split: int = 1  # parts of a tile in the last round: 1, 2 or 4

    def columns(self, gated: bool) -> int:
        """Columns of the output that a tile has."""
        return self.consumers * _M * (1 if gated else self.halves)

    @property
    def tile_rows(self) -> int:
        """Rows that a tile can hold."""
        return self.row_counts[-1]


def tile_rows_for(mean_rows: float) -> int:
    """The row tile for a mean number of rows per expert."""
    if mean_rows <= 96:
        return _FEW[-1] if mean_rows <= 48 else _SOME[-1]
    return _MANY[-1] if mean_rows < 512 else _MOST[-1]


def default_config(tile_rows: int, gated: bool, n_out: int, likely_tiles: int) -> Config:
    """The configuration for a row tile, from measurements on an H200 (benchmarks/results).

    Args:
        tile_rows: of `group_tokens`.
        gated: whether the activation takes gate and up.
        n_out: columns of the output.
        likely_tiles: row tiles that a spread-out routing makes.

    With few rows the stream of weights is all that counts: narrow tiles keep every multiprocessor busy, 128 elements of K a
    stage read memory in longer runs.
    """

    def up_to(counts):
        return tuple(c for c in counts if c < tile_rows) + (tile_rows,)

    if tile_rows > _MANY[-1]:
        return Config(up_to(_MOST), stages=3, cluster=2 if tile_rows % 16 == 0 else 1)
    if tile_rows > _FEW[-1]:
        return Config(up_to(_MANY if tile_rows > _SOME[-1] else _SOME), stages=4)
    narrow = not gated and likely_tiles * pl.cdiv(n_out, 2 * _M) < _compat.num_multiprocessors()
    return Config(up_to(_FEW), consumers=1, halves=1 if narrow else 2, tile_k=128, stages=6 if narrow else 4, split=4)


def supports(rows: Any, weights: Any, bias: Any, activation: Activation | None, tile_rows: int) -> str | None:
    """Why this kernel cannot run the problem; None if it can. Shapes as in `grouped_matmul`."""
    k = weights.shape[2]
    out = weights.shape[1] // (2 if activation is not None and activation.is_gated else 1)
    if rows.dtype not in _DTYPES or weights.dtype != rows.dtype:
        return f"rows {rows.dtype} and weights {weights.dtype} must both be bfloat16 or both float16"
    for name, size in (("the contracted size", k), ("the output size", out), ("the weight rows", weights.shape[1])):
        if tiles.swizzle_bytes(size, rows.dtype) is None:
            return (
                f"{name}={size} must be a multiple of 16 (TMA and wgmma rows of 32 bytes); pad the weights, "
                "or use implementation='xla'"
            )
    if tile_rows % 8 or not 8 <= tile_rows <= _MOST[-1]:
        return f"tile_rows={tile_rows} must be a multiple of 8 and at most {_MOST[-1]}"
    if bias is not None and bias.dtype not in (*_DTYPES, jnp.dtype(jnp.float32)):
        return f"bias {bias.dtype} must be bfloat16, float16 or float32"
    if 0 in rows.shape or 0 in weights.shape:
        return f"an empty operand (rows {rows.shape}, weights {weights.shape}) needs no kernel"
    return None


def grouped_matmul(
    rows: Float[Array, "rows K"],
    weights: Float[Array, "E N K"],
    tile_group: Int[Array, "tiles"],
    tile_starts: Int[Array, "tiles"],
    tile_sizes: Int[Array, "tiles"],
    num_tiles: Int[Array, "1"],
    bias: Float[Array, "E N"] | None,
    activation: Activation | None,
    *,
    config: Config,
    tile_tokens: Int[Array, "tiles"] | None = None,
    total_rows: int | None = None,
    ahead: Ahead | None = None,
    interpret: Any = None,
    multiprocessors: int | None = None,
) -> Float[Array, "R N_out"]:
    """`activation(rows @ weights[group].T + bias[group])` for the rows of the tiles; the others are undefined.

    Args:
        rows: of all groups; with `tile_tokens` those of all tokens, at most as many as a tile holds.
        weights: of the experts.
        tile_group: the expert of each tile.
        tile_starts: its first row.
        tile_sizes: its rows.
        num_tiles: tiles that hold rows.
        bias: added before the activation.
        activation: gated or not; None for none.
        config: how the work is tiled.
        tile_tokens: the tokens that have a row in each tile, a bit each.
        total_rows: R, with `tile_tokens`.
        ahead: the weights of the next kernel.
        interpret: for the interpreter.
        multiprocessors: of the device, by default.
    """
    k = rows.shape[1]
    n_weights = weights.shape[1]
    shared = tile_tokens is not None
    gated = activation is not None and activation.is_gated
    n_out = n_weights // 2 if gated else n_weights
    dtype = rows.dtype
    tile_rows, tk, stages = config.tile_rows, config.tile_k, config.stages
    total_rows = total_rows if shared else rows.shape[0]
    consumers, halves, split = config.consumers, config.halves, config.split
    wg_cols = _M if gated else halves * _M  # columns of the output that one consumer writes
    tile_cols = config.columns(gated)
    n_tiles = pl.cdiv(n_out, tile_cols)
    k_steps = pl.cdiv(k, tk)
    cluster = config.cluster
    workers = (multiprocessors or _compat.num_multiprocessors()) // cluster
    n_steps = pl.cdiv(n_tiles, cluster)  # past the last columns TMA reads zeros and stores nothing
    part_cols = wg_cols // split  # of a consumer in the last round
    operand = views.Operand(
        stages, tile_rows, tk, tiles.swizzle_bytes(k, dtype) // dtype.itemsize, dtype, interpret is not None
    )
    together = min(_M, part_cols, tiles.swizzle_bytes(math.gcd(n_out, _M), dtype) // dtype.itemsize)
    staged = views.Staged(consumers, together, dtype, interpret is not None)

    def pieces(wg_columns):
        """What is copied for a stage: (row of the stage, row of the tile's weights, rows)."""
        found = []
        for wg in range(consumers):
            for half in range(2 if gated else 1):
                found.append(((wg * halves + half) * _M, half * n_out + wg * wg_columns, wg_columns))
        rows_a_copy = min(256, tile_cols)
        if not gated and split == 1:  # neighbours: one copy for as many as TMA takes
            found = [(start, start, rows_a_copy) for start in range(0, tile_cols, rows_a_copy)]
        return found

    def for_row_count(size, run):
        """Calls `run(count)` for the smallest row count that covers `size`."""
        below = 0
        for count in config.row_counts:
            pl.when((size > below) & (size <= count))(lambda count=count: run(count))
            below = count

    def body(rows_g, weights_g, group_g, starts_g, sizes_g, count_g, *refs):
        refs = list(refs)
        tokens_g = refs.pop(0) if shared else None
        bias_g = refs.pop(0) if bias is not None else None
        ahead_g = refs.pop(0) if ahead is not None else None
        out_g, rows_s, weights_s, out_s, full, empty = refs[:6]
        bias_s, bias_full = refs[6:] if bias is not None else (None, None)
        worker, wg = lax.axis_index("sm"), lax.axis_index("wg")
        m_tiles = count_g[0]
        rounds = lax.div(m_tiles * n_steps, workers)
        rest = m_tiles * n_steps - rounds * workers
        my_tiles = rounds + tiles.share(rest * split, worker, workers)

        def tile_at(i):
            """Row tile, first column (of consumer 0) and whether it is a part of a tile."""
            turn = worker + i * workers
            if split == 1:
                m, n = tiles.visit(turn, m_tiles, n_steps, config.band)
                return m, (n if cluster == 1 else n * cluster + lax.axis_index("cta")) * tile_cols, None
            last = i >= rounds
            beyond = turn - rounds * workers
            turn = jnp.where(last, rounds * workers + lax.div(beyond, split), turn)
            m, n = tiles.visit(turn, m_tiles, n_steps, config.band)
            n = n if cluster == 1 else n * cluster + lax.axis_index("cta")
            col = n * tile_cols + jnp.where(last, lax.rem(beyond, split) * (consumers * part_cols), 0)
            return m, col, last

        def rows_of(m):
            """Rows that are multiplied."""
            return jnp.int32(rows.shape[0]) if shared else sizes_g[m]

        def consume(i):
            m, col, is_part = tile_at(i)
            col = col + wg * (wg_cols if is_part is None else jnp.where(is_part, part_cols, wg_cols))
            if bias is not None:
                for half in range(halves):
                    start = col + half * (n_out if gated else _M)
                    source = bias_g.at[group_g[m], pl.ds(start, _M)]
                    plgpu.copy_gmem_to_smem(source, bias_s.at[wg, pl.ds(half * _M, _M)], bias_full.at[wg])
            for_row_count(rows_of(m), lambda count: multiply(i * k_steps, m, col, is_part, count))

        def multiply(first_turn, m, col, is_part, count):
            def accumulate(*accs):
                @pl.loop(0, k_steps)
                def _step(step):
                    turn = first_turn + step
                    slot = lax.rem(turn, stages)
                    plgpu.barrier_wait(full.at[slot])
                    for piece in range(operand.pieces):
                        b = operand.eights(rows_s).at[slot, piece, pl.ds(0, count)]
                        for half, acc in enumerate(accs):
                            weight_rows = pl.ds((wg * halves + half) * _M, _M)
                            a = weights_s.at[slot, weight_rows, pl.ds(piece * operand.columns, operand.columns)]
                            plgpu.wgmma(acc, a, b.T)
                    # The products of the step before are done: its stage may be refilled.
                    plgpu.wgmma_wait(halves * operand.pieces)

                    @pl.when(step > 0)
                    def _():
                        plgpu.barrier_arrive(empty.at[lax.rem(turn - 1, stages)])

                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(empty.at[lax.rem(first_turn + k_steps - 1, stages)])
                return tuple(acc[...] for acc in accs)

            accs = pl.run_scoped(accumulate, *[plgpu.ACC((_M, count)) for _ in range(halves)])
            if bias is not None:
                plgpu.barrier_wait(bias_full.at[wg])
                accs = [acc + bias_column(half, acc) for half, acc in enumerate(accs)]
            if gated:
                outs = [activation.apply_gated(*accs, divide=tiles.divide)]
            elif activation is not None:
                outs = [activation.apply(acc, divide=tiles.divide) for acc in accs]
            else:
                outs = accs
            blocks = [(half, start) for half in range(len(outs)) for start in range(0, count, views.STORED)]
            for i, (half, start) in enumerate(blocks):
                size = min(views.STORED, count - start)
                block = plgpu.layout_cast(
                    outs[half][:, start : start + size].astype(dtype), plgpu.Layout.WGMMA_TRANSPOSED
                )
                # The block before the last has left its buffer. The interpreter counts copies, and a block may have none.
                plgpu.wait_smem_to_gmem(1 if interpret is None else 0, wait_read_only=True)
                staged.block(out_s, wg, i % 2, size).T[...] = block
                plgpu.commit_smem()
                store(i % 2, m, col + half * _M, half, start, size, is_part)
                plgpu.commit_smem_to_gmem_group()
            if len(blocks) % 2:  # the next tile begins with the first buffer again
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def store(buffer, m, col, half, start, size, is_part):
            """Stores rows `start` and on, `size` at most, of 64 columns, or of as many as a part of a tile has."""
            parts = _M // together
            if is_part is not None:
                of_part = min(max(part_cols - half * _M, 0), _M) // together
                if together == _M:  # then a part has this block whole, or not at all
                    if not of_part:
                        pl.when(jnp.logical_not(is_part))(lambda: store(buffer, m, col, half, start, size, None))
                        return
                else:
                    parts = jnp.where(is_part, of_part, parts)
            first_row = starts_g[m] + start

            def target(row, count):
                return lambda at, columns: out_g.at[pl.ds(first_row + row, count), pl.ds(col + at, columns)]

            if shared:
                staged.store_marked(out_s, wg, buffer, tokens_g[m], size, target, parts)
            else:
                staged.store_first(out_s, wg, buffer, sizes_g[m] - start, size, target, parts)

        def bias_column(half, acc):
            column = plgpu.load(bias_s.at[wg, pl.ds(half * _M, _M)], layout=plgpu.Layout.WGMMA.reduce(1))
            return lax.broadcast_in_dim(column.astype(jnp.float32), acc.shape, [0])

        def produce():
            @pl.loop(0, my_tiles)
            def _tile(i):
                m, col, is_part = tile_at(i)
                expert, size = group_g[m], rows_of(m)
                first_row = 0 if shared else starts_g[m]

                @pl.loop(0, k_steps)
                def _step(step):
                    turn = i * k_steps + step
                    slot = lax.rem(turn, stages)

                    @pl.when(turn >= stages)
                    def _():
                        plgpu.barrier_wait(empty.at[slot])

                    def load_weights(wg_columns):
                        for at, row, height in pieces(wg_columns):
                            source = weights_g.at[expert, pl.ds(col + row, height), pl.ds(step * tk, tk)]
                            plgpu.copy_gmem_to_smem(source, weights_s.at[slot, pl.ds(at, height)], full.at[slot])

                    def load_rows(count):
                        # The interpreter has no multicast: there every CTA fetches all of its rows.
                        together = dict(collective_axes="cta") if cluster > 1 and interpret is None else {}
                        for piece in range(operand.pieces):
                            ks = pl.ds(step * tk + piece * operand.columns, operand.columns)
                            tile = operand.singles(rows_s).at[slot, piece, pl.ds(0, count)]
                            source = rows_g.at[pl.ds(first_row, count), ks]
                            plgpu.copy_gmem_to_smem(source, tile, full.at[slot], **together)

                    if is_part is None:
                        load_weights(wg_cols)
                    else:
                        pl.when(jnp.logical_not(is_part))(lambda: load_weights(wg_cols))
                        pl.when(is_part)(lambda: load_weights(part_cols))
                    for_row_count(size, load_rows)

            if ahead is not None:
                number = worker if cluster == 1 else worker * cluster + lax.axis_index("cta")
                ahead.fetch(ahead_g, group_g, m_tiles, number)

            # Every phase of every barrier is observed before the kernel ends.
            turns = my_tiles * k_steps

            @pl.loop(jnp.maximum(turns - stages, 0), turns)
            def _drain(turn):
                plgpu.barrier_wait(empty.at[lax.rem(turn, stages)])

        @pl.when(wg < consumers)
        def _():
            if consumers == 2:
                plgpu.set_max_registers(240, action="increase")
            pl.loop(0, my_tiles)(consume)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == consumers)
        def _():
            if consumers == 2:
                plgpu.set_max_registers(24, action="decrease")
            plgpu.warp_map(lambda warp: pl.when(warp == 0)(produce))

    body.__name__ = f"grouped_matmul_{'up' if activation is not None else 'down'}"
    operands = [rows, weights, tile_group, tile_starts, tile_sizes, num_tiles]
    operands += [tile_tokens] if shared else []
    operands += [bias] if bias is not None else []
    operands += [ahead.weights] if ahead is not None else []
    arrivals = operand.pieces + len(pieces(wg_cols))
    scratch = [
        operand.scratch,
        plgpu.SMEM((stages, consumers * halves * _M, tk), dtype, transforms=tiles.transforms(k, dtype)),
        staged.scratch,
        plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages),
        plgpu.Barrier(num_arrivals=consumers, num_barriers=stages)
        if cluster == 1
        else plgpu.ClusterBarrier(collective_axes=("cta",), num_arrivals=consumers, num_barriers=stages),
    ]
    if bias is not None:
        scratch += [
            plgpu.SMEM((consumers, halves * _M), bias.dtype),
            plgpu.Barrier(num_arrivals=halves, num_barriers=consumers),
        ]
    return _compat.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((total_rows, n_out), dtype),
        grid=(workers,),
        grid_names=("sm",),
        **(dict(cluster=(cluster,), cluster_names=("cta",)) if cluster > 1 else {}),
        num_threads=consumers + 1,
        thread_name="wg",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, lowering_semantics=_compat.LANE
        ),
        interpret=interpret,
    )(*operands)
