"""Grouped matmul of 16-bit floats on Hopper: rows of one group times the weights of its expert, activation in the epilogue.

A persistent, warp-specialised kernel. One producer warpgroup (a single thread of it) brings tiles of rows and weights into a
ring of shared-memory stages with TMA; two consumer warpgroups multiply them with wgmma and accumulate in float32. Every
multiprocessor walks over the tiles that hold rows (their number is read on the GPU), so empty experts cost nothing.

The gate and the up half of an up-projection lie in one tile: each consumer holds both accumulators of its columns and
writes activation(gate, up), so nothing of size rows x 2I reaches memory.

Edges. TMA fills what lies outside a matrix with zeros and drops what is stored there: K, I and H need not be multiples of
the tile. Rows are padded to whole tiles per group by `group_tokens`, hence a tile never touches a neighbour's rows.

Bit-equality. Every output element is summed over K in steps of 16 in order, in one accumulator, whatever the tile: a row's
result does not depend on which rows share its tile, nor on `tile_rows`.
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
from moe_jax.activations import Activation
from moe_jax.kernels.hopper import tiles

_CONSUMERS = 2
_DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
_SHARED_MEMORY_BYTES = 227 * 1024


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile of the kernel. `tile_rows` is the row tile that `group_tokens` padded the groups to."""

    tile_rows: int = 128  # 128: a consumer takes 64 rows of the tile; 64: both take all rows and half of the columns
    tile_cols: int = 256  # rows of weights in a tile: gate and up together for a gated up-projection
    stages: int = 3
    group_m: int = 16  # row tiles walked together before the next weight columns: what L2 holds at a time

    @property
    def splits_rows(self) -> bool:
        return self.tile_rows == 128

    def shared_memory(self, itemsize: int, gated: bool) -> int:
        stage = (self.tile_rows + self.tile_cols) * tiles.TILE_K
        output = self.tile_rows * self.tile_cols // (2 if gated else 1)
        return (self.stages * stage + output) * itemsize


def default_config(tile_rows: int, gated: bool) -> Config:
    """The configuration for a row tile: as many stages as shared memory holds."""
    config = Config(tile_rows=tile_rows)
    fits = [s for s in (3, 4, 5) if dataclasses.replace(config, stages=s).shared_memory(2, gated) <= _SHARED_MEMORY_BYTES - 4096]
    return dataclasses.replace(config, stages=max(fits))


def supports(rows: Any, weights: Any, bias: Any, activation: Activation | None, tile_rows: int) -> str | None:
    """Why this kernel cannot run the problem; None if it can. Shapes as in `grouped_matmul`."""
    k = weights.shape[2]
    out = weights.shape[1] // (2 if activation is not None and activation.is_gated else 1)
    if rows.dtype not in _DTYPES or weights.dtype != rows.dtype:
        return f"rows {rows.dtype} and weights {weights.dtype} must both be bfloat16 or both float16"
    for name, size in (("the contracted size", k), ("the output size", out), ("the weight rows", weights.shape[1])):
        if tiles.swizzle_bytes(size, rows.dtype) is None:
            return f"{name}={size} must be a multiple of 16 (TMA and wgmma rows of 32 bytes); pad the weights, or use implementation='xla'"
    if tile_rows not in (64, 128):
        return f"tile_rows={tile_rows} must be 64 or 128"
    if bias is not None and bias.dtype not in (*_DTYPES, jnp.dtype(jnp.float32)):
        return f"bias {bias.dtype} must be bfloat16, float16 or float32"
    if 0 in rows.shape or 0 in weights.shape:
        return f"an empty operand (rows {rows.shape}, weights {weights.shape}) needs no kernel"
    return None


def grouped_matmul(
    rows: Float[Array, "R K"],
    weights: Float[Array, "E N K"],
    tile_group: Int[Array, "tiles"],
    num_tiles: Int[Array, "1"],
    bias: Float[Array, "E N"] | None,
    activation: Activation | None,
    *,
    config: Config,
    interpret: Any = None,
    multiprocessors: int | None = None,
) -> Float[Array, "R N_out"]:
    """`activation(rows @ weights[group].T + bias[group])` for the tiles that hold rows; rows of other tiles are undefined."""
    total_rows, k = rows.shape
    experts, n_weights, _ = weights.shape
    gated = activation is not None and activation.is_gated
    n_out = n_weights // 2 if gated else n_weights
    dtype = rows.dtype
    tm, tn, stages = config.tile_rows, config.tile_cols, config.stages
    tn_out = tn // 2 if gated else tn
    n_tiles = pl.cdiv(n_out, tn_out)
    k_steps = pl.cdiv(k, tiles.TILE_K)
    workers = multiprocessors or _compat.num_multiprocessors()

    # What one consumer works on: all columns of half of the rows, or half of the columns of all rows.
    wg_cols = tn if config.splits_rows else tn // 2
    wg_cols_out = wg_cols // 2 if gated else wg_cols
    slabs = wg_cols_out // 64
    # A stage holds the weight rows in the order in which the consumers want them: for each column half, gate then up.
    pieces = []  # (row of the stage, rows, half of the columns)
    for half in range(1 if config.splits_rows else 2):
        for part in range(2 if gated else 1):
            pieces.append((half * wg_cols + part * wg_cols_out, half * wg_cols_out, part * n_out))

    def tile_at(index, m_tiles):
        return tiles.visit(index, m_tiles, n_tiles, config.group_m)

    def body(rows_g, weights_g, group_g, count_g, *refs):
        bias_g = refs[0] if bias is not None else None
        out_g, rows_s, weights_s, out_s, full, empty = refs[int(bias is not None) :][:6]
        bias_s, bias_full = refs[-2:] if bias is not None else (None, None)
        worker = lax.axis_index("sm")
        wg = lax.axis_index("wg")
        m_tiles = count_g[0]
        my_tiles = tiles.share(m_tiles * n_tiles, worker, workers)

        @pl.when(wg < _CONSUMERS)
        def _consume():
            plgpu.set_max_registers(232, action="increase")
            row_half = wg if config.splits_rows else 0
            col_half = 0 if config.splits_rows else wg

            @pl.loop(0, my_tiles)
            def _tile(i):
                m, n = tile_at(worker + i * workers, m_tiles)
                col = n * tn_out + col_half * wg_cols_out
                if bias is not None:
                    expert = group_g[m]
                    for part in range(2 if gated else 1):
                        source = bias_g.at[expert, pl.ds(part * n_out + col, wg_cols_out)]
                        plgpu.copy_gmem_to_smem(source, bias_s.at[wg, pl.ds(part * wg_cols_out, wg_cols_out)], bias_full.at[wg])

                def accumulate(acc):
                    @pl.loop(0, k_steps)
                    def _step(step):
                        turn = i * k_steps + step
                        slot = lax.rem(turn, stages)
                        plgpu.barrier_wait(full.at[slot])
                        a = rows_s.at[slot, pl.ds(row_half * 64, 64)]
                        b = weights_s.at[slot, pl.ds(col_half * wg_cols, wg_cols)]
                        plgpu.wgmma(acc, a, b.T)
                        plgpu.wgmma_wait(1)  # the product before this one is done: its stage may be refilled

                        @pl.when(step > 0)
                        def _():
                            plgpu.barrier_arrive(empty.at[lax.rem(turn - 1, stages)])

                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(empty.at[lax.rem(i * k_steps + k_steps - 1, stages)])
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
                    start = slab * 64
                    x = with_bias(acc[:, start : start + 64], start)
                    if gated:
                        up = with_bias(acc[:, wg_cols_out + start : wg_cols_out + start + 64], wg_cols_out + start)
                        x = activation.apply_gated(x, up)
                    elif activation is not None:
                        x = activation.apply(x)
                    out_s[wg, slab] = x.astype(dtype)
                plgpu.commit_smem()
                first_row = m * tm + row_half * 64
                for slab in range(slabs):
                    target = out_g.at[pl.ds(first_row, 64), pl.ds(col + slab * 64, 64)]
                    plgpu.copy_smem_to_gmem(out_s.at[wg, slab], target)

            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == _CONSUMERS)
        def _produce():
            plgpu.set_max_registers(40, action="decrease")

            @plgpu.warp_map
            def _warp(warp):
                @pl.when(warp == 0)
                def _():
                    @pl.loop(0, my_tiles)
                    def _tile(i):
                        m, n = tile_at(worker + i * workers, m_tiles)
                        expert = group_g[m]

                        @pl.loop(0, k_steps)
                        def _step(step):
                            turn = i * k_steps + step
                            slot = lax.rem(turn, stages)

                            @pl.when(turn >= stages)
                            def _():
                                plgpu.barrier_wait(empty.at[slot])

                            ks = pl.ds(step * tiles.TILE_K, tiles.TILE_K)
                            plgpu.copy_gmem_to_smem(rows_g.at[pl.ds(m * tm, tm), ks], rows_s.at[slot], full.at[slot])
                            for at, offset, base in pieces:
                                source = weights_g.at[expert, pl.ds(base + n * tn_out + offset, wg_cols_out), ks]
                                target = weights_s.at[slot, pl.ds(at, wg_cols_out)]
                                plgpu.copy_gmem_to_smem(source, target, full.at[slot])

                    # Every phase of every barrier is observed before the kernel ends.
                    turns = my_tiles * k_steps

                    @pl.loop(jnp.maximum(turns - stages, 0), turns)
                    def _drain(turn):
                        plgpu.barrier_wait(empty.at[lax.rem(turn, stages)])

    operands = [rows, weights, tile_group, num_tiles] + ([bias] if bias is not None else [])
    operand_tiles = tiles.transforms(k, dtype)
    scratch = [
        plgpu.SMEM((stages, tm, tiles.TILE_K), dtype, transforms=operand_tiles),
        plgpu.SMEM((stages, tn, tiles.TILE_K), dtype, transforms=operand_tiles),
        plgpu.SMEM((_CONSUMERS, slabs, 64, 64), dtype, transforms=tiles.transforms(n_out, dtype)),
        plgpu.Barrier(num_arrivals=1 + len(pieces), num_barriers=stages),
        plgpu.Barrier(num_arrivals=_CONSUMERS, num_barriers=stages),
    ]
    if bias is not None:
        scratch += [
            plgpu.SMEM((_CONSUMERS, wg_cols), bias.dtype),
            plgpu.Barrier(num_arrivals=2 if gated else 1, num_barriers=_CONSUMERS),
        ]
    return _compat.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((total_rows, n_out), dtype),
        grid=(workers,),
        grid_names=("sm",),
        num_threads=_CONSUMERS + 1,
        thread_name="wg",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, lowering_semantics=_compat.LANE
        ),
        interpret=interpret,
    )(*operands)
