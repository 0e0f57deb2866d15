"""Rows to other GPUs over NVLink: each row is fetched once and written straight to its places in the memory of their owners.

One block has a run of neighbouring rows, their destinations in shared memory, and a ring of rows on their way: bulk copies alone,
one thread issues them. Rows without a destination are not fetched. What every rank needs of every row (`notes`: the experts of a
token, their weights) goes along in one piece a block and rank.

Ranks meet before the kernel ends: then all rows of all ranks have arrived. Before the first row is written all must have begun,
so that nothing that ran before uses the memory any more: JAX sees to that (`_compat.ranks_start_together`), or they meet once
more. A block waits for its namesakes on the other ranks, not for its neighbours.
There is no interpreter for that: it has no semaphores and no memory of others. One rank alone can be interpreted.

Measured on two H100s, rows of 7168 (benchmarks/results/2026-11-27-h100x2-exchange.json, .txt): 4096 bfloat16 tokens a rank in
165 us, 354 GB/s over NVLink, and back in 165 us (XLA: all-gather 267, reduce-scatter 270, ragged all-to-all 22100 us); float8 in
85 us. 128 tokens in 10.0 and 9.8 us (25 and 21). JAX's barrier before the kernel, 4 to 5 us, is not counted here; a meeting of
our own beside it took 3 us. Five stores that may still be reading their rows instead of three: 1.4 us; more stages are no better,
nor are up to 24 for rows of float8, nor first rows fetched together with their destinations (2026-11-27-h100x2-stages.txt).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int, Shaped

from moe_jax import _compat

BULK = 128  # bytes of which a copy into shared memory is a multiple: each of the threads arrives for its share
_MOST_STAGES, _UNREAD = 8, 5  # rows on their way; stores that may still be reading theirs
_RING = 200 * 1024  # bytes of shared memory


def supports(arrays: Sequence[Any]) -> str | None:
    """Why the kernel cannot send such rows; None if it can.

    Example:
        >>> supports([jax.ShapeDtypeStruct((4, 7), jnp.bfloat16)])
        'a row of 7 x bfloat16, 14 bytes, must be a multiple of 128 bytes; pad it'
    """
    for array in arrays:
        size = array.shape[1] * jnp.dtype(array.dtype).itemsize
        if size % BULK or size == 0:
            words = f"{array.shape[1]} x {jnp.dtype(array.dtype)}, {size} bytes"
            return f"a row of {words}, must be a multiple of {BULK} bytes; pad it"
    if _stages(arrays) < _UNREAD + 2:
        return f"rows of {_row_bytes(arrays)} bytes are too long for a ring of {_UNREAD + 2} in {_RING} bytes of shared memory"
    return None


def _row_bytes(arrays: Sequence[Any]) -> int:
    return sum(array.shape[1] * jnp.dtype(array.dtype).itemsize for array in arrays)


def _stages(arrays: Sequence[Any]) -> int:
    return min(_MOST_STAGES, _RING // max(1, _row_bytes(arrays)))


def _of_blocks(table: Array, blocks: int, mine: int, fill: int) -> Array:
    """A table with a line for each row as one line for each block, filled up to whole copies."""
    table = jnp.pad(table, [(0, blocks * mine - table.shape[0]), (0, 0)], constant_values=fill).reshape(blocks, -1)
    return jnp.pad(table, [(0, 0), (0, -table.shape[1] % (BULK // 4))], constant_values=fill)


def device_of(rank: Any, axis_names: tuple[str, ...]) -> dict[str, Any]:
    """The place on the mesh of a rank, which counts along the axes, the last one fastest."""
    place = {}
    for name in reversed(axis_names):
        size = lax.axis_size(name)
        place[name] = lax.rem(rank, jnp.int32(size))
        rank = lax.div(rank, jnp.int32(size))
    return place


def send_rows(
    arrays: Sequence[Shaped[Array, "T _"]],
    destinations: Int[Array, "T K"],
    notes: Shaped[Array, "T V"] | None,
    *,
    num_rows: int,
    axis_names: tuple[str, ...],
    interpret: Any = None,
    multiprocessors: int | None = None,
) -> tuple[list[Shaped[Array, "N _"]], Shaped[Array, "ranks T V"] | None]:
    """Rows of this rank into the `num_rows` rows of others; undefined where nobody sends one.

    Args:
        arrays: what a row consists of, 2-D each.
        destinations: int32, up to K of each row: ``rank * num_rows + row there``, or -1. No two rows have the same.
        notes: what goes to every rank, 4 bytes each.
        num_rows: N of every rank.
        axis_names: of the mesh; ranks count along them, the last one fastest. None of them: this rank alone.
        interpret: for the interpreter, without axes.
        multiprocessors: of the device, by default.

    Returns:
        The rows that were sent here, and the notes of all ranks.
    """
    tokens, places = destinations.shape
    ranks = math.prod(lax.axis_size(name) for name in axis_names)
    blocks = min(multiprocessors or _compat.num_multiprocessors(), tokens)
    mine = pl.cdiv(tokens, blocks)
    blocks = pl.cdiv(tokens, mine)
    table = _of_blocks(destinations.astype(jnp.int32), blocks, mine, -1)
    stages = _stages(arrays)
    ahead = stages - 1 - _UNREAD
    out_types = [jax.ShapeDtypeStruct((num_rows, array.shape[1]), array.dtype) for array in arrays]
    if notes is not None:
        columns, notes = notes.shape[1], _of_blocks(notes, blocks, mine, 0)
        out_types.append(jax.ShapeDtypeStruct((ranks, *notes.shape), notes.dtype))

    meets = ranks > 1 and not _compat.ranks_start_together()
    meetings = int(ranks > 1) + int(meets)

    # What lies within its array is fetched by a plain copy, which has no limit of 256 elements.
    copy_in = functools.partial(plgpu.copy_gmem_to_smem, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)

    def body(*refs):
        refs = list(refs)

        def take(count):
            taken = refs[:count]
            del refs[:count]
            return taken

        sources, (table_g,) = take(len(arrays)), take(1)
        (notes_g,) = take(1) if notes is not None else (None,)
        targets = take(len(arrays))
        (notes_out,) = take(1) if notes is not None else (None,)
        rings, (table_s, full, told) = take(len(arrays)), take(3)
        (notes_s,) = take(1) if notes is not None else (None,)
        semaphores = take(meetings)
        block = lax.axis_index("sm")
        me = lax.axis_index(axis_names) if axis_names else jnp.int32(0)

        def on(ref, rank):
            return plgpu.remote_ref(ref, device_of(rank, axis_names)) if ranks > 1 else ref

        def tell(semaphore):
            """To the namesakes on the other ranks, at each distance."""
            for distance in range(1, ranks):
                peer = device_of(lax.rem(me + distance, jnp.int32(ranks)), axis_names)
                pl.semaphore_signal(semaphore.at[distance - 1], device_id=peer)

        def hear(semaphore):
            for distance in range(1, ranks):
                pl.semaphore_wait(semaphore.at[distance - 1])

        if meets:
            tell(semaphores[1])
        copy_in(table_g.at[block], table_s, told)
        if notes is not None:
            copy_in(notes_g.at[block], notes_s, told)
        plgpu.barrier_wait(told)
        first = block * mine
        last = jnp.minimum(tokens - first, mine)

        def goes(i):
            """Whether the row goes anywhere."""
            at = jnp.minimum(i, mine - 1) * places
            found = table_s[at] >= 0
            for place in range(1, places):
                found = found | (table_s[at + place] >= 0)
            return found & (i < last)

        def fetch(i, count):
            wanted = goes(i)

            @pl.when(wanted)
            def _():
                slot = lax.rem(count, stages)
                for source, ring in zip(sources, rings, strict=True):
                    copy_in(source.at[first + i], ring.at[slot], full.at[slot])

            return count + wanted.astype(jnp.int32)

        count = lax.fori_loop(0, ahead, fetch, jnp.int32(0))
        if meets:
            hear(semaphores[1])
        if notes is not None:
            for rank in range(ranks):
                plgpu.copy_smem_to_gmem(notes_s, on(notes_out, jnp.int32(rank)).at[me, block], commit_group=False)
            plgpu.commit_smem_to_gmem_group()

        def one(i, carry):
            fetched, sent = carry
            wanted = goes(i)

            @pl.when(wanted)
            def _():
                slot = lax.rem(sent, stages)
                plgpu.barrier_wait(full.at[slot])
                for place in range(places):
                    destination = table_s[i * places + place]

                    @pl.when(destination >= 0)
                    def _(destination=destination):
                        rank, row = lax.div(destination, jnp.int32(num_rows)), lax.rem(destination, jnp.int32(num_rows))
                        for ring, target in zip(rings, targets, strict=True):
                            plgpu.copy_smem_to_gmem(ring.at[slot], on(target, rank).at[row], commit_group=False)

            plgpu.commit_smem_to_gmem_group()
            # The row that is fetched next takes the place of one that was sent `_UNREAD` rows ago or earlier.
            plgpu.wait_smem_to_gmem(_UNREAD, wait_read_only=True)
            return fetch(i + ahead, fetched), sent + wanted.astype(jnp.int32)

        lax.fori_loop(0, last, one, (count, jnp.int32(0)))
        plgpu.wait_smem_to_gmem(0)
        if ranks > 1:
            tell(semaphores[0])
            hear(semaphores[0])

    body.__name__ = "send_rows"
    operands = [*arrays, table, *([] if notes is None else [notes])]
    scratch = [
        *(plgpu.SMEM((stages, array.shape[1]), array.dtype) for array in arrays),
        plgpu.SMEM(table.shape[1:], jnp.int32),
        plgpu.Barrier(num_arrivals=len(arrays), num_barriers=stages),
        plgpu.Barrier(num_arrivals=1 if notes is None else 2),
        *([] if notes is None else [plgpu.SMEM(notes.shape[1:], notes.dtype)]),
        *(plgpu.SemaphoreType.REGULAR((ranks - 1,)) for _ in range(meetings)),
    ]
    results = _compat.kernel(
        body,
        out_type=out_types,
        grid=(blocks,),
        grid_names=("sm",),
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, lowering_semantics=_compat.LANE),
        interpret=interpret,
    )(*operands)
    rows = list(results[: len(arrays)])
    if notes is None:
        return rows, None
    found = results[-1][:, :, : mine * columns]
    return rows, found.reshape(ranks, blocks * mine, columns)[:, :tokens]
