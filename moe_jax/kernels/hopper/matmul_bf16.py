"""Grouped matmul of 16-bit floats on Hopper: rows of one group times the weights of its expert, activation in the epilogue.

A persistent, warp-specialised kernel. One producer warp brings tiles of rows and weights into a ring of shared-memory stages
with TMA; consumer warpgroups multiply them with wgmma and accumulate in float32. Every multiprocessor walks over the tiles that
hold rows (their number is read on the GPU), so empty experts cost nothing.

The gate and the up half of an up-projection lie in one tile: each consumer holds both accumulators of its columns and
writes activation(gate, up), so nothing of size rows x 2I reaches memory.

Edges. TMA fills what lies outside a matrix with zeros and drops what is stored there: K, I and H need not be multiples of
the tile. Rows are padded to whole tiles per group by `group_tokens`, hence a tile never touches a neighbour's rows. Of a tile
with few rows only these are read and written (rounded up to 8, 16, 32 or 64), and a consumer whose 64 rows are all padding
does not multiply: with few tokens the weights are all that moves.

Bit-equality. Every output element is summed over K in steps of 16 in order, in one accumulator, whatever the tile: a row's
result does not depend on which rows share its tile, nor on the configuration.
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
from moe_jax.kernels.hopper import tiles

_DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
_ROW_COUNTS = (8, 16, 32, 64, 128)  # rows of a tile that are read or written together
_SLAB = 64  # columns that leave shared memory together: one swizzle row


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile of the kernel. `tile_rows` is the row tile that `group_tokens` padded the groups to."""

    tile_rows: int = 128  # 128: each of two consumers takes 64 rows of the tile; 64: they share its columns
    tile_cols: int = 256  # rows of weights in a tile: gate and up together for a gated up-projection
    tile_k: int = 64
    stages: int = 3
    consumers: int = 2
    group_m: int = 8  # row tiles walked together before the next weight columns: what L2 holds at a time
    cluster: int = 1  # 2: two neighbouring row tiles go together; where they share an expert, its weights are fetched once for both


def default_config(tile_rows: int, gated: bool, n_out: int, likely_tiles: int) -> Config:
    """The configuration for a row tile, from measurements on an H200 (benchmarks/results).

    Args:
        tile_rows: of `group_tokens`.
        gated: whether the activation takes gate and up.
        n_out: columns of the output.
        likely_tiles: row tiles that a spread-out routing makes.

    With few rows the weights' stream is all that counts: narrow tiles keep every multiprocessor busy, 128 elements of K a
    stage read memory in longer runs. With many rows three stages do better than four: the multiprocessors stay closer
    together and share what they read from L2.
    """
    if tile_rows == 128:
        return Config(tile_rows=128, tile_cols=256, tile_k=64, stages=3, consumers=2)
    narrow = not gated and likely_tiles * pl.cdiv(n_out, 128) < _compat.num_multiprocessors()
    return Config(tile_rows=64, tile_cols=64 if narrow else 128, tile_k=128, stages=6 if narrow else 4, consumers=1)


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
    if tile_rows not in (64, 128):
        return f"tile_rows={tile_rows} must be 64 or 128"
    if bias is not None and bias.dtype not in (*_DTYPES, jnp.dtype(jnp.float32)):
        return f"bias {bias.dtype} must be bfloat16, float16 or float32"
    if 0 in rows.shape or 0 in weights.shape:
        return f"an empty operand (rows {rows.shape}, weights {weights.shape}) needs no kernel"
    return None


def _for_row_count(size: jax.Array, most: int, run: Any) -> None:
    """Calls `run(count)` for the smallest count of `_ROW_COUNTS` that covers `size` rows; not at all for none."""
    below = 0
    for count in _ROW_COUNTS:
        if count <= most:
            pl.when((size > below) & (size <= count))(lambda count=count: run(count))
            below = count


def grouped_matmul(
    rows: Float[Array, "R K"],
    weights: Float[Array, "E N K"],
    tile_group: Int[Array, "tiles"],
    tile_sizes: Int[Array, "tiles"],
    num_tiles: Int[Array, "1"],
    bias: Float[Array, "E N"] | None,
    activation: Activation | None,
    *,
    config: Config,
    interpret: Any = None,
    multiprocessors: int | None = None,
) -> Float[Array, "R N_out"]:
    """`activation(rows @ weights[group].T + bias[group])` for the rows that `tile_sizes` counts; the others are undefined."""
    total_rows, k = rows.shape
    n_weights = weights.shape[1]
    gated = activation is not None and activation.is_gated
    n_out = n_weights // 2 if gated else n_weights
    dtype = rows.dtype
    tm, tn, tk, stages, consumers = (
        config.tile_rows,
        config.tile_cols,
        config.tile_k,
        config.stages,
        config.consumers,
    )
    tn_out = tn // 2 if gated else tn
    n_tiles = pl.cdiv(n_out, tn_out)
    k_steps = pl.cdiv(k, tk)
    cluster = config.cluster
    workers = (multiprocessors or _compat.num_multiprocessors()) // cluster

    # What one consumer works on: 64 rows and all columns, or all (64) rows and its share of the columns.
    splits_rows = tm == 128
    col_shares = 1 if splits_rows else consumers
    wg_cols = tn // col_shares
    wg_cols_out = wg_cols // 2 if gated else wg_cols
    slabs = pl.cdiv(wg_cols_out, _SLAB)
    # A stage holds the weight rows in the order in which the consumers want them: for each share, gate then up.
    pieces = [  # (row of the stage, column of the tile, first row of the matrix)
        (share * wg_cols + part * wg_cols_out, share * wg_cols_out, part * n_out)
        for share in range(col_shares)
        for part in range(2 if gated else 1)
    ]

    def body(rows_g, weights_g, group_g, sizes_g, count_g, *refs):
        bias_g = refs[0] if bias is not None else None
        out_g, rows_s, weights_s, out_s, full, empty = refs[int(bias is not None) :][:6]
        bias_s, bias_full = refs[-2:] if bias is not None else (None, None)
        worker = lax.axis_index("sm")
        wg = lax.axis_index("wg")
        tiles.await_inputs(interpret)
        tiles.release_dependents(interpret)
        m_tiles = count_g[0]
        my_tiles = tiles.share(pl.cdiv(m_tiles, cluster) * n_tiles, worker, workers)

        def tile_at(i):
            """(row tile, rows in it, column tile) of this CTA's tile number `i`; a pair's second tile may not exist."""
            m, n = tiles.visit(worker + i * workers, pl.cdiv(m_tiles, cluster), n_tiles, config.group_m // cluster)
            if cluster == 1:
                return m, sizes_g[m], n
            m = m * cluster + lax.axis_index("cta")
            found = jnp.minimum(m, m_tiles - 1)
            return m, jnp.where(m < m_tiles, sizes_g[found], 0), n

        def compute(m, n, size, first_turn, row_half, col_share):
            col = n * tn_out + col_share * wg_cols_out
            if bias is not None:
                expert = group_g[m]
                for part in range(2 if gated else 1):
                    source = bias_g.at[expert, pl.ds(part * n_out + col, wg_cols_out)]
                    target = bias_s.at[wg, pl.ds(part * wg_cols_out, wg_cols_out)]
                    plgpu.copy_gmem_to_smem(source, target, bias_full.at[wg])

            def accumulate(acc):
                @pl.loop(0, k_steps)
                def _step(step):
                    turn = first_turn + step
                    slot = lax.rem(turn, stages)
                    plgpu.barrier_wait(full.at[slot])
                    a = rows_s.at[slot, pl.ds(row_half * 64, 64)]
                    b = weights_s.at[slot, pl.ds(col_share * wg_cols, wg_cols)]
                    plgpu.wgmma(acc, a, b.T)
                    plgpu.wgmma_wait(1)  # the product before this one is done: its stage may be refilled

                    @pl.when(step > 0)
                    def _():
                        plgpu.barrier_arrive(empty.at[lax.rem(turn - 1, stages)])

                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(empty.at[lax.rem(first_turn + k_steps - 1, stages)])
                return acc[...]

            acc = pl.run_scoped(accumulate, plgpu.ACC((64, wg_cols)))
            if bias is not None:
                plgpu.barrier_wait(bias_full.at[wg])

            def with_bias(x, start):
                if bias is None:
                    return x
                row = plgpu.load(bias_s.at[wg, pl.ds(start, x.shape[1])], layout=plgpu.Layout.WGMMA.reduce(0))
                return x + lax.broadcast_in_dim(row.astype(jnp.float32), x.shape, [1])

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last tile's store has left shared memory
            for slab in range(slabs):
                start, width = slab * _SLAB, min(_SLAB, wg_cols_out)
                x = with_bias(acc[:, start : start + width], start)
                if gated:
                    up = with_bias(acc[:, wg_cols_out + start : wg_cols_out + start + width], wg_cols_out + start)
                    x = activation.apply_gated(x, up, divide=tiles.divide)
                elif activation is not None:
                    x = activation.apply(x, divide=tiles.divide)
                out_s[wg, slab] = x.astype(dtype)
            plgpu.commit_smem()
            first_row = m * tm + row_half * 64

            def store(count):
                for slab in range(slabs):
                    target = out_g.at[pl.ds(first_row, count), pl.ds(col + slab * _SLAB, min(_SLAB, wg_cols_out))]
                    plgpu.copy_smem_to_gmem(out_s.at[wg, slab, pl.ds(0, count)], target)

            _for_row_count(jnp.minimum(size, 64), 64, store)

        def produce():
            @pl.loop(0, my_tiles)
            def _tile(i):
                m, size, n = tile_at(i)
                expert = group_g[jnp.minimum(m, m_tiles - 1)]
                if cluster == 2:  # the pair's tiles, seen the same way from both
                    first = m - lax.axis_index("cta")
                    second = jnp.minimum(first + 1, m_tiles - 1)
                    shared = (first + 1 < m_tiles) & (group_g[first] == group_g[second])

                @pl.loop(0, k_steps)
                def _step(step):
                    turn = i * k_steps + step
                    slot = lax.rem(turn, stages)

                    @pl.when(turn >= stages)
                    def _():
                        plgpu.barrier_wait(empty.at[slot])

                    ks = pl.ds(step * tk, tk)

                    def load_weights(**together):
                        for at, offset, base in pieces:
                            source = weights_g.at[expert, pl.ds(base + n * tn_out + offset, wg_cols_out), ks]
                            target = weights_s.at[slot, pl.ds(at, wg_cols_out)]
                            plgpu.copy_gmem_to_smem(source, target, full.at[slot], **together)

                    def load_rows(count):
                        source = rows_g.at[pl.ds(m * tm, count), ks]
                        plgpu.copy_gmem_to_smem(source, rows_s.at[slot, pl.ds(0, count)], full.at[slot])

                    if cluster == 1:
                        load_weights()
                    else:
                        pl.when(shared)(lambda: load_weights(collective_axes="cta"))
                        pl.when(jnp.logical_not(shared))(load_weights)
                        pl.when(size <= 0)(lambda: plgpu.barrier_arrive(full.at[slot]))
                    _for_row_count(size, tm, load_rows)

            # Every phase of every barrier is observed before the kernel ends.
            turns = my_tiles * k_steps

            @pl.loop(jnp.maximum(turns - stages, 0), turns)
            def _drain(turn):
                plgpu.barrier_wait(empty.at[lax.rem(turn, stages)])

        @pl.when(wg < consumers)
        def _consume():
            if consumers == 2:
                plgpu.set_max_registers(232, action="increase")
            row_half = wg if splits_rows else 0
            col_share = 0 if splits_rows else wg

            @pl.loop(0, my_tiles)
            def _tile(i):
                m, size, n = tile_at(i)
                size = size - row_half * 64
                first_turn = i * k_steps

                @pl.when(size <= 0)
                def _():  # only padding: let the stages pass
                    @pl.loop(0, k_steps)
                    def _step(step):
                        slot = lax.rem(first_turn + step, stages)
                        plgpu.barrier_wait(full.at[slot])
                        plgpu.barrier_arrive(empty.at[slot])

                @pl.when(size > 0)
                def _():
                    compute(m, n, size, first_turn, row_half, col_share)

            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == consumers)
        def _produce():
            if consumers == 2:
                plgpu.set_max_registers(40, action="decrease")

            @plgpu.warp_map
            def _warp(warp):
                pl.when(warp == 0)(produce)

    body.__name__ = f"grouped_matmul_{'up' if activation is not None else 'down'}"
    operands = [rows, weights, tile_group, tile_sizes, num_tiles] + ([bias] if bias is not None else [])
    operand_tiles = tiles.transforms(k, dtype)
    slab_shape = (consumers, slabs, 64, min(_SLAB, wg_cols_out))
    scratch = [
        plgpu.SMEM((stages, tm, tk), dtype, transforms=operand_tiles),
        plgpu.SMEM((stages, tn, tk), dtype, transforms=operand_tiles),
        plgpu.SMEM(slab_shape, dtype, transforms=tiles.transforms(math.gcd(n_out, slab_shape[-1]), dtype)),
        plgpu.Barrier(num_arrivals=1 + len(pieces), num_barriers=stages),
        plgpu.Barrier(num_arrivals=consumers, num_barriers=stages)
        if cluster == 1
        else plgpu.ClusterBarrier(collective_axes=("cta",), num_arrivals=consumers, num_barriers=stages),
    ]
    if bias is not None:
        scratch += [
            plgpu.SMEM((consumers, wg_cols), bias.dtype),
            plgpu.Barrier(num_arrivals=2 if gated else 1, num_barriers=consumers),
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
