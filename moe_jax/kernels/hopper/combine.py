"""Weighted sum over the k rows of a token on Hopper, in float32 and in slot order.

Work is cut into (token, up to 1024 columns): k copies into shared memory, a weighted sum in registers, one store. The rows of
the next unit are on their way while one is summed. A slot without a row (-1) is read from past the end of the rows, where TMA
fills with zeros, and its weight counts as zero: whatever lies in memory there, it adds nothing.
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
_STAGES = 2
_MAX_SLOTS = 8  # slots summed from one buffer; more take further rounds


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut."""

    chunks: int = 4  # columns of a unit, in chunks of 256
    ctas_per_sm: int = 6


def supports(rows: Any) -> str | None:
    """Why this kernel cannot combine `rows` [R, H]; None if it can."""
    hidden = rows.shape[1]
    if rows.dtype not in (jnp.bfloat16, jnp.float16):
        return f"dtype {rows.dtype} must be bfloat16 or float16"
    if hidden % 8:
        return f"hidden_size={hidden} must be a multiple of 8 (TMA strides of 16 bytes); pad it, or use implementation='xla'"
    if 0 in rows.shape:
        return f"an empty operand (rows {rows.shape}) needs no kernel"
    return None


def combine(
    rows: Float[Array, "R H"],
    positions: Int[Array, "T k"],
    weights: Float[Array, "T k"] | None,
    *,
    config: Config = Config(),
    interpret: Any = None,
    multiprocessors: int | None = None,
) -> Float[Array, "T H"]:
    """`sum_j weights[t, j] * rows[positions[t, j]]`; slots with position -1 add nothing; without weights a plain sum."""
    total_rows, hidden = rows.shape
    tokens, k = positions.shape
    whole = hidden % _COLUMNS == 0
    total_chunks = pl.cdiv(hidden, _COLUMNS)
    # A unit never straddles the end of a row: one that is contiguous in memory is stored by a plain bulk copy, which TMA
    # does not cut at the row's end.
    chunks = max(c for c in range(1, config.chunks + 1) if total_chunks % c == 0) if whole else config.chunks
    parts = pl.cdiv(total_chunks, chunks)
    last_columns = hidden - (total_chunks - 1) * _COLUMNS
    slots = min(k, _MAX_SLOTS)
    rounds = pl.cdiv(k, slots)
    units = tokens * parts
    workers = min((multiprocessors or _compat.num_multiprocessors()) * config.ctas_per_sm, units)
    # A thread holds 2 * chunks elements of a row, loaded in the widest powers of two that divide them.
    layout = plgpu.Layout.WG_STRIDED((chunks, _COLUMNS), vec_size=min(8, (2 * chunks) & -(2 * chunks)))

    def combine_rows(rows_g, positions_g, *refs):
        weights_g = refs[0] if weights is not None else None
        out_g, rows_s, out_s, full = refs[int(weights is not None) :]
        worker = lax.axis_index("sm")
        steps = tiles.share(units, worker, workers) * rounds

        def locate(step):
            unit = worker + lax.div(step, rounds) * workers
            return lax.div(unit, parts), lax.rem(unit, parts) * chunks, lax.rem(step, rounds) * slots

        def scalars(step):
            """Row and weight of each slot of a step; the steps after the last read those of the last."""
            token, _, first = locate(jnp.minimum(step, steps - 1))
            found = []
            for j in range(slots):
                slot = jnp.minimum(first + j, k - 1)
                row = jnp.where(first + j < k, positions_g[token, slot], -1)
                weight = weights_g[token, slot] if weights is not None else jnp.float32(1)
                found.append((jnp.where(row < 0, total_rows, row), jnp.where(row < 0, jnp.float32(0), weight)))
            return [row for row, _ in found], [weight for _, weight in found]

        def fetch(step, sources):
            buffer = lax.rem(step, _STAGES)
            _, chunk, _ = locate(step)
            for j, row in enumerate(sources):
                if whole:
                    plgpu.copy_gmem_to_smem(rows_g.at[row, pl.ds(chunk, chunks)], rows_s.at[buffer, j], full.at[buffer])
                else:
                    for c in range(chunks):
                        source = rows_g.at[row, pl.ds((chunk + c) * _COLUMNS, _COLUMNS)]
                        plgpu.copy_gmem_to_smem(source, rows_s.at[buffer, j, c], full.at[buffer])

        sources, factors = scalars(0)
        fetch(0, sources)

        def one(step, carry):
            total, factors = carry
            sources, next_factors = scalars(step + 1)

            @pl.when(step + 1 < steps)
            def _():
                fetch(step + 1, sources)

            buffer = lax.rem(step, _STAGES)
            plgpu.barrier_wait(full.at[buffer])
            # Each round starts from zero or goes on from the sum before: slot order, whatever the number of rounds.
            total = (
                total * jnp.where(lax.rem(step, rounds) == 0, jnp.float32(0), jnp.float32(1)) if rounds > 1 else None
            )
            for j in range(slots):
                term = plgpu.load(rows_s.at[buffer, j], layout=layout).astype(jnp.float32) * factors[j]
                total = term if total is None else total + term
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out_s[...] = total.astype(rows.dtype)
            plgpu.commit_smem()  # also: every thread is done with the buffer

            @pl.when(lax.rem(step, rounds) == rounds - 1)
            def _():
                token, chunk, _ = locate(step)
                if whole:
                    plgpu.copy_smem_to_gmem(out_s, out_g.at[token, pl.ds(chunk, chunks)])
                else:
                    for c in range(chunks):

                        @pl.when(chunk + c < total_chunks - 1)
                        def _():
                            plgpu.copy_smem_to_gmem(
                                out_s.at[c], out_g.at[token, pl.ds((chunk + c) * _COLUMNS, _COLUMNS)]
                            )

                        @pl.when(chunk + c == total_chunks - 1)
                        def _():
                            source = out_s.at[c, pl.ds(0, last_columns)]
                            plgpu.copy_smem_to_gmem(source, out_g.at[token, pl.ds(hidden - last_columns, last_columns)])

            return (total if rounds > 1 else jnp.float32(0)), next_factors

        zero = plgpu.layout_cast(jnp.zeros((chunks, _COLUMNS), jnp.float32), layout) if rounds > 1 else jnp.float32(0)
        lax.fori_loop(0, steps, one, (zero, factors))
        plgpu.wait_smem_to_gmem(0)

    operands = [rows.reshape(total_rows, total_chunks, _COLUMNS) if whole else rows, positions]
    operands += [weights] if weights is not None else []
    result = _compat.kernel(
        combine_rows,
        out_type=jax.ShapeDtypeStruct((tokens, total_chunks, _COLUMNS) if whole else (tokens, hidden), rows.dtype),
        grid=(workers,),
        grid_names=("sm",),
        scratch_types=[
            plgpu.SMEM((_STAGES, slots, chunks, _COLUMNS), rows.dtype),
            plgpu.SMEM((chunks, _COLUMNS), rows.dtype),
            plgpu.Barrier(num_arrivals=slots * (1 if whole else chunks), num_barriers=_STAGES),
        ],
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, lowering_semantics=_compat.LANE),
        interpret=interpret,
    )(*operands)
    return result.reshape(tokens, hidden)
