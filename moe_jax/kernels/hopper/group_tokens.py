"""Grouping on Hopper: a stable counting sort of (token, slot) pairs by local expert, in two kernels.

`count_pairs` ranks the pairs of some tokens among those of their expert, and counts them (`ranks`); routing does the same on
the way where it can, and then only `place_pairs` is launched. That one adds up the counts of all blocks: the place of a pair in
its group is the number of that group's pairs in earlier blocks, plus its rank in its own. Nothing is added atomically, so rows
of a group keep token order and the result repeats.

Groups are packed: a pair's row is the first of its group plus its place there. Pairs whose id is -1 or out of range, or whose
expert the map sends to -1, are dropped here: they get no row.

Learned on an H200 (benchmarks/results/2026-11-24-h200-plans-and-glue.txt; 128 experts, 8 slots; `place_pairs`):

- 3.4 us for 128 tokens, 5.1 for 4096, 11.1 for 16384. The first form ranked pairs in a warp's scalar loop, a chain of dependent
  loads for each: 18 us for 128 tokens (2026-11-22-h200-bf16-layer.json).
- Sums over experts by shuffles instead of seven passes through shared memory: 2.8 us for 128 tokens, 3.3 before
  (2026-11-28-h200-few-rows-variants.txt).
- More blocks than multiprocessors take turns, and each of them adds up all counts: 128 at most. Warps go from pair to pair; a
  float quotient instead of integer divisions brought 14.2 us (16384 tokens) down to 11.1.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int

from moe_jax import _compat
from moe_jax.kernels.hopper import ranks
from moe_jax.kernels.hopper.matmul_config import MOST_ROWS
from moe_jax.kernels.hopper.ranks import MAX_EXPERTS, add_up, padded, vector, zeros
from moe_jax.kernels.hopper.selection import LAYOUT, row_numbers

_WARPS = 4  # warps of a warpgroup
_TOGETHER = 4  # pairs that a warp places at a time, so that their loads and divisions overlap
_BOX = 256  # TMA's limit per dimension
_ROWS = 32  # tokens of a tile of `count_pairs`: their ids are whole multiples of 128 bytes


def supports(num_experts: int, num_local_experts: int, num_pairs: int) -> str | None:
    """Why these kernels cannot group the pairs; None if they can."""
    if max(num_experts, num_local_experts) > MAX_EXPERTS:
        return f"num_experts={max(num_experts, num_local_experts)} must be at most {MAX_EXPERTS} (counters in shared memory)"
    if num_pairs == 0:
        return "no pairs: an empty operand needs no kernel"
    return None


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is spread."""

    max_blocks: int = 128  # of counts: every block of `place_pairs` adds up all of them
    warpgroups: int | None = None  # of `place_pairs`; 8 by default where there are many pairs or blocks, else 4


def count_pairs(
    topk_ids: Int[Array, "T k"],
    expert_map: Int[Array, "E"] | None,
    num_experts: int,
    num_local: int,
    *,
    config: Config = Config(),
    interpret: Any = None,
) -> tuple[Int[Array, "T k"], Int[Array, "blocks width"]]:
    """(tickets, block counts), as routing makes them; see `moe_jax.kernels.hopper.topk.topk`."""
    tokens, top_k = topk_ids.shape
    chunks = pl.cdiv(tokens, _ROWS * config.max_blocks)
    blocks = pl.cdiv(tokens, _ROWS * chunks)
    width, map_width = padded(num_local), padded(num_experts)
    mapped = expert_map is not None
    tail = tokens % _ROWS
    pairs = _ROWS * top_k  # of a tile
    boxes = [(start, min(_BOX, pairs - start)) for start in range(0, pairs, _BOX)]
    map_boxes = [(start, min(_BOX, map_width - start)) for start in range(0, map_width, _BOX)]

    def count_pairs(ids_g, *refs):
        map_g = refs[0] if mapped else None
        tickets_g, counts_g, ids_s, seen_s, slots_s, loaded, *map_refs = refs[int(mapped) :]
        block = lax.axis_index("block")
        mine = jnp.minimum(chunks, pl.cdiv(tokens, _ROWS) - block * chunks)
        if mapped:
            map_s, map_loaded = map_refs
            for start, size in map_boxes:
                part = pl.ds(start + block * 0, size)  # past the end: zeros, never looked at
                plgpu.copy_gmem_to_smem(map_g.at[part], map_s.at[pl.ds(start, size)], map_loaded)
            plgpu.barrier_wait(map_loaded)

        def one(chunk, before):
            first = (block * chunks + chunk) * _ROWS
            for start, size in boxes:
                source = ids_g.at[pl.ds(first * top_k + start, size)]
                plgpu.copy_gmem_to_smem(source, ids_s.at[pl.ds(start, size)], loaded)
            plgpu.barrier_wait(loaded)

            @plgpu.warp_map
            def _(warp):
                @pl.loop(0, _ROWS // _WARPS)
                def _(i):
                    row = warp + i * _WARPS
                    for slot, expert in enumerate([ids_s[row * top_k + slot] for slot in range(top_k)]):
                        slots_s[slot, row] = expert

            plgpu.commit_smem()
            there = row_numbers(_ROWS) < tokens - first
            locals_ = []
            for slot in range(top_k):
                expert = plgpu.load(slots_s.at[slot], layout=LAYOUT.reduce(1))
                locals_.append(jnp.where(there & (expert >= 0) & (expert < num_experts), expert, -1))
            if mapped:
                found = ranks.look_up(locals_, _ROWS, map_s, interpret is not None)
                locals_ = [jnp.where(expert >= 0, local, -1) for expert, local in zip(locals_, found, strict=True)]
            locals_ = [jnp.maximum(jnp.where(local < num_local, local, -1), -1) for local in locals_]
            ranks.mark_pairs(locals_, _ROWS, seen_s)
            counts = ranks.count_tile(_ROWS, seen_s)
            tickets = ranks.tickets(locals_, _ROWS, seen_s, before, interpret is not None)
            full = first + _ROWS <= tokens

            @pl.when(full)
            def _():
                for slot, values in enumerate(tickets):
                    _compat.store_scattered(tickets_g.at[pl.ds(first, _ROWS), slot], values)

            if tail:

                @pl.when(jnp.logical_not(full))
                def _():
                    plgpu.commit_smem()
                    for slot, values in enumerate(tickets):
                        slots_s[slot] = values
                    plgpu.commit_smem()

                    @plgpu.warp_map
                    def _(warp):
                        @pl.loop(0, lax.div(tail - warp + _WARPS - 1, _WARPS))
                        def _(i):
                            row = warp + i * _WARPS
                            for slot in range(top_k):
                                tickets_g[first + row, slot] = slots_s[slot, row]

            return before + counts

        counts_g[block] = one(block * 0, zeros(width)) if chunks == 1 else lax.fori_loop(0, mine, one, zeros(width))

    scratch = [
        plgpu.SMEM((pairs,), jnp.int32),
        plgpu.SMEM((_ROWS, width), jnp.int32),
        plgpu.SMEM((top_k, _ROWS), jnp.int32),
        plgpu.Barrier(num_arrivals=len(boxes)),
    ]
    if mapped:
        scratch += [plgpu.SMEM((map_width,), jnp.int32), plgpu.Barrier(num_arrivals=len(map_boxes))]
    return _compat.kernel(
        count_pairs,
        out_type=(
            jax.ShapeDtypeStruct((tokens, top_k), jnp.int32),
            jax.ShapeDtypeStruct((blocks, width), jnp.int32),
        ),
        grid=(blocks,),
        grid_names=("block",),
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, lowering_semantics=_compat.LANE),
        interpret=interpret,
    )(topk_ids.reshape(-1), *((expert_map,) if mapped else ()))


def place_pairs(
    tickets: Int[Array, "T k"],
    block_counts: Int[Array, "blocks width"],
    num_local: int,
    tile_rows: int,
    max_tiles: int,
    *,
    tile_tokens: int,
    row_tokens: bool = False,
    row_multiple: int = 1,
    config: Config = Config(),
    interpret: Any = None,
) -> tuple[Array, ...]:
    """(positions, tile_group, tile_starts, tile_sizes, group_sizes, num_tiles, tile_spans) as in `moe_jax.ops.group_tokens`.

    With `row_tokens` also the token of each row, int32 [R + MOST_ROWS]; undefined behind the last row of a group.

    Args:
        tickets: of all pairs.
        block_counts: pairs of each local expert in each block of tokens.
        num_local: E_local.
        tile_rows: rows of a tile.
        max_tiles: the most tiles.
        tile_tokens: a block of counts is that of a multiple of so many tokens.
        row_tokens: also the token of each row.
        row_multiple: of which the first row of a group is a multiple.
        config: how the work is spread.
        interpret: for the interpreter.
    """
    tokens, top_k = tickets.shape
    blocks, width = block_counts.shape
    num_pairs = tokens * top_k
    counted = pl.cdiv(pl.cdiv(tokens, tile_tokens), blocks) * tile_tokens  # tokens of a row of counts
    splits = next(s for s in (8, 4, 2, 1) if counted % (16 * s) == 0 and blocks * s <= max(128, blocks))
    per_block = counted // splits * top_k  # pairs
    warpgroups = config.warpgroups or (8 if per_block > 256 or blocks > 16 else 4)
    warps = warpgroups * _WARPS
    fetched = pl.cdiv(per_block, ranks.LANES // 4) * (ranks.LANES // 4)  # a copy brings whole multiples of 128 bytes
    boxes = [(start, min(_BOX, fetched - start)) for start in range(0, fetched, _BOX)]
    ahead = 8  # loads of other blocks' counts under way at a time

    def place_pairs(tickets_g, counts_g, *refs):
        positions_g, group_g, tile_starts_g, tile_sizes_g, sizes_g, num_tiles_g, spans_g, *refs = refs
        row_tokens_g = refs.pop(0) if row_tokens else None
        tickets_s, partial_s, base_s, sizes_s, shares_s, starts_s, first_tile_s, scan_s, loaded, summed, based = refs
        block, wg = lax.axis_index("block"), lax.axis_index("wg")
        first = block * per_block
        counts_row = lax.div(block, splits)

        @pl.when(wg == 0)
        def _():
            for start, size in boxes:
                source = tickets_g.at[pl.ds(first + start, size)]  # past the end: zeros, never looked at
                plgpu.copy_gmem_to_smem(source, tickets_s.at[pl.ds(start, size)], loaded)

        def add(step, carry):
            """Each warpgroup sums its share of the blocks: all of them, and those before this one."""
            total, before = carry
            others = [(step * ahead + i) * warpgroups + wg for i in range(ahead)]
            counts = [vector(counts_g.at[jnp.minimum(other, blocks - 1)]) for other in others]
            for other, count in zip(others, counts, strict=True):
                total = total + count * jnp.where(other < blocks, 1, 0)
                before = before + count * jnp.where(other < counts_row, 1, 0)
            return total, before

        total, before = lax.fori_loop(0, pl.cdiv(blocks, warpgroups * ahead), add, (zeros(width), zeros(width)))
        partial_s[0, wg] = total
        partial_s[1, wg] = before
        plgpu.barrier_arrive(summed)

        @pl.when(wg == 0)
        def _():
            plgpu.barrier_wait(summed)
            total = add_up([vector(partial_s.at[0, other]) for other in range(warpgroups)])
            wide = total if row_multiple == 1 else (total + (row_multiple - 1)) & -row_multiple
            ends, _ = ranks.scan(wide, scan_s, num_local, interpret is not None)
            starts_s[...] = ends - wide
            base_s[...] = ends - wide + add_up([vector(partial_s.at[1, other]) for other in range(warpgroups)])
            num_tiles = lax.div(total + (tile_rows - 1), jnp.full_like(total, tile_rows))
            even = lax.div(total + num_tiles - 1, jnp.maximum(num_tiles, 1))
            shares_s[...] = jnp.minimum(lax.div(even + 7, jnp.full_like(even, 8)) * 8, tile_rows)
            sizes_s[...] = total
            plgpu.commit_smem()  # the first scan has been read
            tiles, _ = ranks.scan(num_tiles, scan_s, num_local, interpret is not None)
            first_tile_s[pl.ds(0, width)] = tiles - num_tiles
            first_tile_s[pl.ds(width, width)] = tiles
            plgpu.commit_smem()
            plgpu.barrier_arrive(based)

        plgpu.barrier_wait(based)
        plgpu.barrier_wait(loaded)

        @plgpu.warp_map
        def _(warp):
            row = wg * _WARPS + warp

            @pl.loop(0, pl.cdiv(per_block, warps * _TOGETHER))
            def _(i):
                pairs = [(i * warps + row) * _TOGETHER + j for j in range(_TOGETHER)]
                packed = [tickets_s[jnp.minimum(pair, per_block - 1)] for pair in pairs]
                bases = [base_s[lax.rem(jnp.maximum(ticket, 0), MAX_EXPERTS)] for ticket in packed]
                for pair, ticket, base in zip(pairs, packed, bases, strict=True):

                    @pl.when((pair < per_block) & (first + pair < num_pairs))
                    def _(pair=pair, ticket=ticket, base=base):
                        place = base + lax.div(ticket, MAX_EXPERTS)
                        positions_g[first + pair] = jnp.where(ticket < 0, -1, place)
                        if row_tokens:

                            @pl.when(ticket >= 0)
                            def _():
                                row_tokens_g[place] = lax.div(first + pair, top_k)

            # The tile schedule: an expert a warp.
            workers = blocks * splits * warps
            worker = block * warps + row
            all_tiles = first_tile_s[width + num_local - 1]

            @pl.loop(0, lax.div(num_local - worker + (workers - 1), workers))
            def _(i):
                expert = worker + i * workers
                size = sizes_s[expert]
                first_tile = first_tile_s[expert]
                share = shares_s[expert]
                start = starts_s[expert]
                sizes_g[expert] = size

                end = first_tile_s[width + expert]

                @pl.loop(0, end - first_tile)
                def _(t):
                    group_g[first_tile + t] = expert
                    tile_starts_g[first_tile + t] = start + t * share
                    tile_sizes_g[first_tile + t] = jnp.clip(size - t * share, 0, share)
                    spans_g[first_tile + t, 0] = first_tile
                    spans_g[first_tile + t, 1] = end

            # Tiles without rows.
            @pl.loop(0, lax.div(max_tiles - all_tiles - worker + (workers - 1), workers))
            def _(i):
                group_g[all_tiles + worker + i * workers] = -1
                tile_starts_g[all_tiles + worker + i * workers] = 0
                tile_sizes_g[all_tiles + worker + i * workers] = 0
                spans_g[all_tiles + worker + i * workers, 0] = 0
                spans_g[all_tiles + worker + i * workers, 1] = 0

            @pl.when(worker == 0)
            def _():
                num_tiles_g[0] = all_tiles

    def i32(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    return _compat.kernel(
        place_pairs,
        out_type=(
            *(i32(n) for n in (num_pairs, max_tiles, max_tiles, max_tiles, num_local, 1)),
            i32(max_tiles, 2),
            *([i32(num_pairs + MOST_ROWS)] if row_tokens else []),
        ),
        grid=(blocks * splits,),
        grid_names=("block",),
        num_threads=warpgroups,
        thread_name="wg",
        scratch_types=[
            plgpu.SMEM((fetched,), jnp.int32),
            plgpu.SMEM((2, warpgroups, width), jnp.int32),
            plgpu.SMEM((width,), jnp.int32),
            plgpu.SMEM((width,), jnp.int32),
            plgpu.SMEM((width,), jnp.int32),
            plgpu.SMEM((width,), jnp.int32),
            plgpu.SMEM((2 * width,), jnp.int32),
            plgpu.SMEM((2, 2 * width), jnp.int32),
            plgpu.Barrier(num_arrivals=len(boxes)),
            plgpu.Barrier(num_arrivals=warpgroups),
            plgpu.Barrier(num_arrivals=1),
        ],
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, lowering_semantics=_compat.LANE),
        interpret=interpret,
    )(tickets.reshape(-1), block_counts)


def group_tokens(
    topk_ids: Int[Array, "T k"],
    expert_map: Int[Array, "E"] | None,
    *,
    num_experts: int,
    num_local_experts: int,
    tile_rows: int,
    max_tiles: int,
    row_tokens: bool = False,
    row_multiple: int = 1,
    config: Config = Config(),
    interpret: Any = None,
) -> tuple[Array, ...]:
    """What `place_pairs` gives, of ids."""
    tickets, counts = count_pairs(
        topk_ids, expert_map, num_experts, num_local_experts, config=config, interpret=interpret
    )
    positions, *rest = place_pairs(
        tickets,
        counts,
        num_local_experts,
        tile_rows,
        max_tiles,
        tile_tokens=_ROWS,
        row_tokens=row_tokens,
        row_multiple=row_multiple,
        config=config,
        interpret=interpret,
    )
    return positions.reshape(topk_ids.shape), *rest
