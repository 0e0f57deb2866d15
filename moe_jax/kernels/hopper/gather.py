"""Gather of token rows into groups on Hopper: one bulk copy per row into shared memory, one per few rows out of it.

A row of H elements is seen as (H / 256, 256), since TMA takes at most 256 elements per dimension; where 256 does not divide
H, a row takes one copy per 256 columns, TMA fills past the end with zeros and drops what is stored there. A row without a
token (-1: padding of a group's last tile) is read from past the end of `x`, so TMA itself writes the zeros.
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

_COLUMNS = 256  # TMA's limit per dimension
_BUFFER_BYTES = 32 * 1024


@dataclasses.dataclass(frozen=True)
class Config:
    rows: int = 8  # rows in one store
    stages: int = 2  # buffers of `rows` rows per CTA
    ctas_per_sm: int = 3

    @classmethod
    def default(cls, hidden: int, itemsize: int) -> Config:
        row_bytes = pl.cdiv(hidden, _COLUMNS) * _COLUMNS * itemsize
        # At least two: a store of one row's columns would be contiguous, hence a plain bulk copy, which TMA does not cut at
        # the row's end.
        rows = next((r for r in (8, 4) if r * row_bytes <= _BUFFER_BYTES), 2)
        return cls(rows=rows, ctas_per_sm=max(1, min(3, 200 * 1024 // (2 * rows * row_bytes))))


def supports(x: Any) -> str | None:
    """Why this kernel cannot gather rows of `x` [T, H]; None if it can."""
    hidden = x.shape[1]
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"dtype {x.dtype} must be bfloat16, float16 or float32"
    if hidden * x.dtype.itemsize % 16:
        return f"hidden_size={hidden} of {x.dtype} must fill a multiple of 16 bytes (TMA strides); pad it, or use implementation='xla'"
    if pl.cdiv(hidden, _COLUMNS) * _COLUMNS * x.dtype.itemsize > 48 * 1024:
        return f"hidden_size={hidden} of {x.dtype}: four rows must fit in shared memory"
    if 0 in x.shape:
        return f"an empty operand (x {x.shape}) needs no kernel"
    return None


def gather(
    x: Float[Array, "T H"],
    row_token: Int[Array, "R"],
    num_tiles: Int[Array, "1"],
    tile_rows: int,
    *,
    config: Config | None = None,
    interpret: Any = None,
    multiprocessors: int | None = None,
) -> Float[Array, "R H"]:
    """`x[row_token]`, zeros where the token is -1, for the tiles that hold rows; rows of other tiles are undefined."""
    tokens, hidden = x.shape
    total_rows = row_token.shape[0]
    config = config or Config.default(hidden, x.dtype.itemsize)
    whole = hidden % _COLUMNS == 0
    chunks = pl.cdiv(hidden, _COLUMNS)
    rows, stages = config.rows, config.stages
    workers = (multiprocessors or _compat.num_multiprocessors()) * config.ctas_per_sm

    def body(x_g, token_g, count_g, out_g, buffer_s, full):
        worker = lax.axis_index("sm")
        mine = tiles.share(count_g[0] * (tile_rows // rows), worker, workers)

        def fetch(i):
            slot = lax.rem(i, stages)
            first = (worker + i * workers) * rows
            for r in range(rows):
                token = token_g[first + r]
                token = jnp.where(token < 0, tokens, token)  # past the end: TMA fills with zeros
                if whole:
                    plgpu.copy_gmem_to_smem(x_g.at[token], buffer_s.at[slot, r], full.at[slot])
                else:

                    @pl.loop(0, chunks)
                    def _(c):
                        source = x_g.at[token, pl.ds(c * _COLUMNS, _COLUMNS)]
                        plgpu.copy_gmem_to_smem(source, buffer_s.at[slot, c, r], full.at[slot])

        @pl.when(mine > 0)
        def _():
            fetch(0)

        @pl.loop(0, mine)
        def _unit(i):
            slot = lax.rem(i, stages)
            first = (worker + i * workers) * rows

            @pl.when(i + 1 < mine)
            def _():
                # The store that last read this buffer is `stages - 1` units old.
                plgpu.wait_smem_to_gmem(stages - 2, wait_read_only=True)
                fetch(i + 1)

            plgpu.barrier_wait(full.at[slot])
            if whole:
                plgpu.copy_smem_to_gmem(buffer_s.at[slot], out_g.at[pl.ds(first, rows)], commit_group=False)
            else:

                @pl.loop(0, chunks)
                def _(c):
                    target = out_g.at[pl.ds(first, rows), pl.ds(c * _COLUMNS, _COLUMNS)]
                    plgpu.copy_smem_to_gmem(buffer_s.at[slot, c], target, commit_group=False)
            plgpu.commit_smem_to_gmem_group()

        plgpu.wait_smem_to_gmem(0)

    shape = (stages, rows, chunks, _COLUMNS) if whole else (stages, chunks, rows, _COLUMNS)
    result = _compat.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((total_rows, chunks, _COLUMNS) if whole else (total_rows, hidden), x.dtype),
        grid=(workers,),
        grid_names=("sm",),
        scratch_types=[
            plgpu.SMEM(shape, x.dtype),
            plgpu.Barrier(num_arrivals=rows * (1 if whole else chunks), num_barriers=stages),
        ],
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, lowering_semantics=_compat.LANE),
        interpret=interpret,
    )(x.reshape(tokens, chunks, _COLUMNS) if whole else x, row_token, num_tiles)
    return result.reshape(total_rows, hidden)
