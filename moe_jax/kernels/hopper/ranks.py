"""Ranks of (token, slot) pairs among those of their expert, and how counts of pairs become places; inside a kernel.

The pairs of a few tokens are a matrix of ones, tokens by experts. A thread adds up its columns of it in shared memory, token by
token: what stands before a token is the rank of its pair, what stands after the last is the number of pairs. Nothing is added
atomically, so ranks follow the order of the tokens and repeat.

An integer `jnp.where` has its constant last: ``where(condition, constant, array)`` comes out of Mosaic unsigned (jax 0.11 and
0.12: the result takes the sign of the condition), and then -1 is neither below 0 nor below any number of experts.

Kernels that use it turn automatic barriers off: a column belongs to one thread, and `plgpu.commit_smem` stands wherever
registers cross from one thread's to another's.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax import _compat_routing
from moe_jax.kernels.hopper.selection import LAYOUT, Scores, repeat, spread

LANES = 128  # threads of a warpgroup: vectors over experts are padded to a multiple
MAX_EXPERTS = 1024  # a ticket is rank * MAX_EXPERTS + local expert; -1 for a pair that gets no row


def padded(num_experts: int) -> int:
    """Length of a vector over experts."""
    return pl.cdiv(num_experts, LANES) * LANES


def vector(ref: Any) -> Any:
    """A vector over experts in registers, an expert a thread."""
    return plgpu.load(ref, layout=plgpu.Layout.WG_STRIDED(ref.shape, vec_size=1))


def zeros(width: int) -> Any:
    """A vector over experts of zeros."""
    return plgpu.layout_cast(jnp.zeros((width,), jnp.int32), plgpu.Layout.WG_STRIDED((width,), vec_size=1))


def add_up(vectors: list[Any]) -> Any:
    """Sum of a list."""
    total = vectors[0]
    for other in vectors[1:]:
        total = total + other
    return total


def experts_of(rows: int, start: int) -> Any:
    """The expert of each element of 128 columns of a tile."""
    return plgpu.broadcasted_iota(jnp.int32, (rows, LANES), 1, layout=LAYOUT) + start


def look_up(locals_: list[Any], rows: int, table: Any, interpret: bool) -> list[Any]:
    """``table[local]`` of each slot, 0 where local is -1.

    Args:
        locals_: for each slot the local experts of the tile's tokens.
        rows: tokens of the tile.
        table: reference to a vector over experts, or to a matrix of tokens by experts, in shared memory.
        interpret: the kernel is interpreted: it adds up what is where the expert is.
    """
    if not interpret:
        return _loaded(locals_, rows, table)
    found = [jnp.zeros_like(local) for local in locals_]
    for start in range(0, table.shape[-1], LANES):
        experts = experts_of(rows, start)
        if len(table.shape) == 1:
            part = plgpu.load(table.at[pl.ds(start, LANES)], layout=LAYOUT.reduce(0))
            part = repeat(part, rows)
        else:
            part = plgpu.load(table.at[:, pl.ds(start, LANES)], layout=LAYOUT, optimized=False)
        for slot, local in enumerate(locals_):
            found[slot] = found[slot] + jnp.sum(jnp.where(experts == spread(local, experts), part, 0), axis=1)
    return found


def _loaded(locals_: list[Any], rows: int, table: Any) -> list[Any]:
    """`look_up` with a load for each thread."""
    vector = LAYOUT.reduce(1)
    result = plgpu.ShapeDtypeStruct((rows,), jnp.int32, layout=vector)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *[vector] * len(locals_)), return_type=(result,) * len(locals_))
    def run(ctx, table, *locals_):
        del ctx
        return tuple(_compat_routing.look_up(table, list(locals_)))

    return list(run(table, *locals_))


def mark_pairs(locals_: list[Any], rows: int, seen_s: Any) -> None:
    """Writes the pairs of a tile as a matrix of tokens by local experts: ones, and more where a token names one twice."""
    plgpu.commit_smem()  # every thread is done with the tile before
    for start in range(0, seen_s.shape[1], LANES):
        experts = experts_of(rows, start)
        ones = [jnp.where(experts == spread(local, experts), 1, 0) for local in locals_]
        seen_s[:, pl.ds(start, LANES)] = add_up(ones)
    plgpu.commit_smem()


def mark_chosen(chosen: Scores, rows: int, seen_s: Any) -> None:
    """`mark_pairs` where experts are local experts: a ninth of the instructions, for eight slots.

    Args:
        chosen: 1 where a token has chosen an expert, and 0.
        rows: tokens of the tile.
        seen_s: int32 [rows, width].
    """
    plgpu.commit_smem()
    for piece, start in zip(chosen.pieces, chosen.starts, strict=True):
        seen_s[:, pl.ds(start, piece.shape[1])] = piece
    end = chosen.starts[-1] + chosen.pieces[-1].shape[1]
    if end < seen_s.shape[1]:
        rest = (rows, seen_s.shape[1] - end)
        seen_s[:, pl.ds(end, rest[1])] = plgpu.layout_cast(jnp.zeros(rest, jnp.int32), LAYOUT)
    plgpu.commit_smem()


def count_tile(rows: int, seen_s: Any) -> Any:
    """Pairs of each local expert in a tile that was marked, as a vector."""
    return add_up([vector(seen_s.at[row]) for row in range(rows)])


def tickets(locals_: list[Any], rows: int, seen_s: Any, before: Any, interpret: bool) -> list[Any]:
    """Tickets of a tile's pairs, whose ranks go on from `before`.

    Args:
        locals_: for each slot the local experts of the tile's tokens, -1 for none.
        rows: tokens of the tile.
        seen_s: int32 [rows, width], the tile as it was marked; it is used up.
        before: vector over experts, the pairs of each in the tiles before.
        interpret: the kernel is interpreted.
    """
    pairs = [vector(seen_s.at[row]) for row in range(rows)]
    for row, mine in enumerate(pairs):
        seen_s[row] = before
        before = before + mine
    plgpu.commit_smem()
    found = []
    for slot, (local, rank) in enumerate(zip(locals_, look_up(locals_, rows, seen_s, interpret), strict=True)):
        for other in locals_[:slot]:  # of the same token: only where several experts share a local one, or ids repeat
            rank = rank + jnp.where(other == local, 1, 0)
        found.append(jnp.where(local >= 0, rank * MAX_EXPERTS + local, -1))
    return found


def scan(values: Any, scan_s: Any, length: int, interpret: bool) -> Any:
    """Inclusive sums over experts. One warpgroup calls it.

    Args:
        values: vector over experts.
        scan_s: scratch, int32 [2, 2 * width].
        length: experts that count.
        interpret: the kernel is interpreted: it knows no shuffles, and adds up twice as many with each step.

    Returns:
        The sums as a vector; and the row of `scan_s` in whose upper half they stand.
    """
    width = values.shape[0]
    if not interpret:
        sums = _scanned(values, scan_s.at[1, pl.ds(0, width)])
        scan_s[0, pl.ds(width, width)] = sums
        plgpu.commit_smem()
        return sums, 0
    for buffer in range(2):
        scan_s[buffer, pl.ds(0, width)] = zeros(width)
    scan_s[0, pl.ds(width, width)] = values
    distance, buffer = 1, 0
    while distance < length:
        plgpu.commit_smem()
        values = values + vector(scan_s.at[buffer, pl.ds(width - distance, width)])
        buffer = 1 - buffer
        scan_s[buffer, pl.ds(width, width)] = values
        distance *= 2
    plgpu.commit_smem()
    return values, buffer


def _scanned(values: Any, totals: Any) -> Any:
    """Inclusive sums: those of each warp by shuffles, then what the warps before have."""
    layout = plgpu.Layout.WG_STRIDED(values.shape, vec_size=1)
    result = plgpu.ShapeDtypeStruct(values.shape, jnp.int32, layout=layout)

    @plgpu.inline_mgpu(arg_types=(layout, plgpu.RefType()), return_type=result)
    def within(ctx, values, totals):
        del ctx
        return _compat_routing.scan_within_warps(values, totals)

    @plgpu.inline_mgpu(arg_types=(layout, plgpu.RefType()), return_type=result)
    def across(ctx, sums, totals):
        del ctx
        return _compat_routing.add_warps_before(sums, totals)

    sums = within(values, totals)
    plgpu.commit_smem()
    return across(sums, totals)


def scatter(targets: list[Any], places: Any, values: list[Any], kept: Any) -> None:
    """``target[place] = value`` in GPU memory for vectors of places and values, a store a thread, where `kept` is not 0."""
    layout = plgpu.Layout.WG_STRIDED(places.shape, vec_size=1)

    @plgpu.inline_mgpu(arg_types=(*[plgpu.RefType()] * len(targets), *[layout] * (2 + len(values))))
    def run(ctx, *operands):
        del ctx
        targets_, (places, kept, *values) = operands[: len(targets)], operands[len(targets) :]
        _compat_routing.scatter(list(targets_), places, list(values), kept)

    run(*targets, places, kept, *values)


def numbers(width: int) -> Any:
    """A vector 0, 1, ..."""
    return plgpu.broadcasted_iota(jnp.int32, (width,), 0, layout=plgpu.Layout.WG_STRIDED((width,), vec_size=1))
