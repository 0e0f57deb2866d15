"""Rows of hidden states copied to their groups on Hopper: a token is read once and written to each of its rows.

Seen from the rows it is a gather, but done from the tokens' side: one bulk copy brings a token into shared memory, k bulk
copies write it to the rows that its slots were given. Padding is not touched. On an H200, 4096 tokens of 2048 bf16 elements go
to 8 rows each in 38 us (3.5 TB/s written); a copy per row, eight rows a store, took 60 (benchmarks/results/2026-11-22-h200-*).

An up-projection can do without (`rows_by_token`, with the figures of both).

A row of H elements is seen as (H / c, c) with c at most 256, TMA's limit per dimension. Where no such c has whole multiples of
128 bytes, a row takes one copy per 256 columns: TMA fills past the end with zeros, and the last store is cut to what is left
(a store that is contiguous in memory is a plain bulk copy, which nothing cuts at the end of a row).
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
_BUFFER_BYTES = 200 * 1024  # shared memory of all CTAs of a multiprocessor


@dataclasses.dataclass(frozen=True)
class Config:
    """Tokens in flight."""

    stages: int = 4  # tokens in shared memory at a time
    ahead: int = 2  # of these, tokens on their way in; the others are on their way out
    ctas_per_sm: int = 8  # at most


def supports(x: Any) -> str | None:
    """Why this kernel cannot copy rows of `x` [T, H]; None if it can."""
    hidden = x.shape[1]
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"dtype {x.dtype} must be bfloat16, float16 or float32"
    if hidden * x.dtype.itemsize % 16:
        return (
            f"hidden_size={hidden} of {x.dtype} must fill a multiple of 16 bytes (TMA strides); pad it, "
            "or use implementation='xla'"
        )
    if hidden * x.dtype.itemsize > 48 * 1024:
        return f"hidden_size={hidden} of {x.dtype}: {Config.stages} rows must fit in shared memory"
    if 0 in x.shape:
        return f"an empty operand (x {x.shape}) needs no kernel"
    return None


def gather(
    x: Float[Array, "T H"],
    positions: Int[Array, "T k"],
    total_rows: int,
    *,
    config: Config = Config(),
    interpret: Any = None,
    multiprocessors: int | None = None,
) -> Float[Array, "R H"]:
    """Row `positions[t, j]` is `x[t]`; rows at which no position points are undefined."""
    tokens, hidden = x.shape
    top_k = positions.shape[1]
    columns = tiles.even_columns(hidden, x.dtype, _COLUMNS)
    whole = columns is not None
    columns = columns or _COLUMNS
    chunks = pl.cdiv(hidden, columns)
    last = hidden - (chunks - 1) * columns
    stages, ahead = config.stages, config.ahead
    row_bytes = chunks * columns * x.dtype.itemsize
    ctas = max(1, min(config.ctas_per_sm, _BUFFER_BYTES // (stages * row_bytes)))
    workers = min((multiprocessors or _compat.num_multiprocessors()) * ctas, tokens)

    def gather_rows(x_g, positions_g, out_g, buffer_s, full):
        worker = lax.axis_index("sm")
        mine = tiles.share(tokens, worker, workers)

        def fetch(i):
            slot = lax.rem(i, stages)
            token = worker + i * workers
            if whole:
                plgpu.copy_gmem_to_smem(x_g.at[token], buffer_s.at[slot], full.at[slot])
            else:

                @pl.loop(0, chunks)
                def _(c):
                    source = x_g.at[token, pl.ds(c * columns, columns)]
                    plgpu.copy_gmem_to_smem(source, buffer_s.at[slot, c], full.at[slot])

        def store(slot, row):
            if whole:
                plgpu.copy_smem_to_gmem(buffer_s.at[slot], out_g.at[row], commit_group=False)
                return
            for c in range(chunks):
                width = columns if c < chunks - 1 else last
                source = buffer_s.at[slot, c, pl.ds(0, width)]
                plgpu.copy_smem_to_gmem(source, out_g.at[row, pl.ds(c * columns, width)], commit_group=False)

        @pl.loop(0, jnp.minimum(ahead, mine))
        def _(i):
            fetch(i)

        @pl.loop(0, mine)
        def _token(i):
            slot = lax.rem(i, stages)
            rows = [positions_g[worker + i * workers, j] for j in range(top_k)]

            @pl.when(i + ahead < mine)
            def _():
                plgpu.wait_smem_to_gmem(
                    stages - ahead - 1, wait_read_only=True
                )  # the stores that last read that buffer
                fetch(i + ahead)

            plgpu.barrier_wait(full.at[slot])
            for row in rows:
                pl.when(row >= 0)(lambda row=row: store(slot, row))
            plgpu.commit_smem_to_gmem_group()

        plgpu.wait_smem_to_gmem(0)

    result = _compat.kernel(
        gather_rows,
        out_type=jax.ShapeDtypeStruct((total_rows, chunks, columns) if whole else (total_rows, hidden), x.dtype),
        grid=(workers,),
        grid_names=("sm",),
        scratch_types=[
            plgpu.SMEM((stages, chunks, columns), x.dtype),
            plgpu.Barrier(num_arrivals=1 if whole else chunks, num_barriers=stages),
        ],
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, lowering_semantics=_compat.LANE),
        interpret=interpret,
    )(x.reshape(tokens, chunks, columns) if whole else x, positions)
    return result.reshape(total_rows, hidden)
