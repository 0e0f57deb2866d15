"""Grouping on Hopper: a stable counting sort of (token, slot) pairs by local expert, in one or two kernels.

`_place` lets every warp count its own contiguous pairs per local expert, then walk over them again: the place of a pair in its
group is the number of that group's pairs in earlier blocks and warps, plus those that its own warp saw before it. More than
2048 pairs take several blocks, and `_count` adds up the pairs of every block first. Warps take pairs in order and nothing is
added atomically, so rows of a group keep token order and the result repeats.

Groups start at multiples of `tile_rows`, so that a row tile belongs to one group; a group of several tiles is spread evenly
over them. Pairs whose id is -1 or out of range, or whose expert the map sends to -1, are dropped here: they get no row.

A warp's loop is scalar code, a chain of dependent loads for each pair, so the pairs are spread over many warps: 512 for
1024 tokens with 8 experts each.
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

_WARPS = 4  # warps of a warpgroup
_TOGETHER = 4  # pairs that a warp places at a time, so that their loads and divisions overlap
_VECTOR = 128  # threads of a warpgroup: vectors over experts are padded to a multiple
_MAX_EXPERTS = 1024


def supports(num_experts: int, num_local_experts: int, tile_rows: int, num_pairs: int) -> str | None:
    """Why these kernels cannot group the pairs; None if they can."""
    if max(num_experts, num_local_experts) > _MAX_EXPERTS:
        return f"num_experts={max(num_experts, num_local_experts)} must be at most {_MAX_EXPERTS} (counters in shared memory)"
    if num_pairs == 0:
        return "no pairs: an empty operand needs no kernel"
    return None


@dataclasses.dataclass(frozen=True)
class Config:
    """How pairs are spread over warps."""

    warpgroups: int | None = None  # by default 4 for up to 512 pairs, 8 for more
    box: int = (
        64  # pairs of a warpgroup in one copy; several blocks take several of them when there are too many blocks
    )
    max_box: int = 256  # TMA's limit per dimension: one block takes all pairs while they fit
    max_blocks: int = 256  # every block sums the counts of all blocks


class _Plan:
    """Who takes which pairs: blocks of a few warpgroups of 4 warps, each warp a contiguous run."""

    def __init__(self, num_pairs: int, num_experts: int, num_local_experts: int, config: Config):
        self.warpgroups = config.warpgroups or (4 if num_pairs <= 512 else 8)
        self.warps = self.warpgroups * _WARPS
        one_block = config.max_box * self.warpgroups
        share = pl.cdiv(num_pairs, self.warpgroups)
        self.box = max(32, 1 << (share - 1).bit_length()) if num_pairs <= one_block else config.box
        if self.box % (_WARPS * _TOGETHER):
            raise ValueError(
                f"box={self.box} must be a multiple of {_WARPS * _TOGETHER}: each warp takes {_TOGETHER} pairs at a time"
            )
        # At most 8 boxes: they lie in shared memory.
        self.boxes = max(1, min(8, pl.cdiv(num_pairs, config.max_blocks * self.warpgroups * self.box)))
        self.per_warpgroup = self.boxes * self.box
        self.per_warp = self.per_warpgroup // _WARPS
        self.per_block = self.per_warpgroup * self.warpgroups
        self.blocks = pl.cdiv(num_pairs, self.per_block)
        self.width = pl.cdiv(num_local_experts, _VECTOR) * _VECTOR
        self.map_boxes = pl.cdiv(num_experts, config.max_box)
        self.map_box = config.max_box

    def scratch(self, mapped: bool) -> list[Any]:
        """Shared memory of both kernels: pairs, counters, their barriers, and the map if there is one."""
        found = [
            plgpu.SMEM((self.warpgroups, self.per_warpgroup), jnp.int32),
            plgpu.SMEM((self.warps, self.width), jnp.int32),
            plgpu.Barrier(num_arrivals=self.boxes, num_barriers=self.warpgroups),
            plgpu.Barrier(num_arrivals=self.warpgroups),
        ]
        if mapped:
            found += [
                plgpu.SMEM((self.map_boxes * self.map_box,), jnp.int32),
                plgpu.Barrier(num_arrivals=self.map_boxes),
            ]
        return found


def _vector(ref: Any) -> Any:
    return plgpu.load(ref, layout=plgpu.Layout.WG_STRIDED(ref.shape, vec_size=1))


def _zeros(width: int) -> Any:
    return plgpu.layout_cast(jnp.zeros((width,), jnp.int32), plgpu.Layout.WG_STRIDED((width,), vec_size=1))


class _Pairs:
    """The pairs of a block in shared memory, and the walk of a warp over its own."""

    def __init__(self, plan, num_pairs, num_experts, num_local, ids_g, map_g, ids_s, loaded, map_s, map_loaded):
        self.plan, self.num_pairs, self.num_experts, self.num_local = plan, num_pairs, num_experts, num_local
        self.ids_s, self.map_s = ids_s, map_s
        self.block, self.wg = lax.axis_index("block"), lax.axis_index("wg")
        first = self.first = self.block * plan.per_block + self.wg * plan.per_warpgroup
        for box in range(plan.boxes):
            source = ids_g.at[pl.ds(first + box * plan.box, plan.box)]  # past the end: zeros, never looked at
            plgpu.copy_gmem_to_smem(source, ids_s.at[self.wg, pl.ds(box * plan.box, plan.box)], loaded.at[self.wg])
        if map_g is not None:

            @pl.when(self.wg == 0)
            def _():
                for box in range(plan.map_boxes):
                    part = pl.ds(self.block * 0 + box * plan.map_box, plan.map_box)
                    plgpu.copy_gmem_to_smem(map_g.at[part], map_s.at[part], map_loaded)

            plgpu.barrier_wait(map_loaded)
        plgpu.barrier_wait(loaded.at[self.wg])

    def count(self, counts_s: Any) -> None:
        """Fills the counters: pairs of each warp per local expert.

        The id of a pair gives way to what `walk` needs of it: its local expert, and how many pairs of that expert its warp
        had before; -1 for a pair that is dropped.
        """
        plan, wg = self.plan, self.wg
        for warp in range(_WARPS):
            counts_s[wg * _WARPS + warp] = _zeros(plan.width)

        @plgpu.warp_map
        def _(warp):
            row = wg * _WARPS + warp
            first = warp * plan.per_warp

            @pl.loop(0, jnp.clip(self.num_pairs - self.first - first, 0, plan.per_warp))
            def _(i):
                expert = self.ids_s[wg, first + i]
                known = (expert >= 0) & (expert < self.num_experts)
                local = expert if self.map_s is None else self.map_s[jnp.where(known, expert, 0)]
                local = jnp.where(known & (local >= 0) & (local < self.num_local), local, -1)
                seen = counts_s[row, jnp.maximum(local, 0)]
                self.ids_s[wg, first + i] = jnp.where(local < 0, -1, seen * _MAX_EXPERTS + local)

                @pl.when(local >= 0)
                def _():
                    counts_s[row, local] = seen + 1

    def walk(self, warp: Any, visit: Any) -> None:
        """After `count`: calls `visit` with lists of (pair, local expert or -1, rank in the warp) of one warp."""
        first = warp * self.plan.per_warp

        @pl.loop(0, self.plan.per_warp // _TOGETHER)
        def _(i):
            found = []
            for j in range(_TOGETHER):
                at = first + i * _TOGETHER + j
                pair = self.first + at
                packed = jnp.where(pair < self.num_pairs, self.ids_s[self.wg, at], -1)
                local = jnp.where(packed < 0, -1, lax.rem(packed, _MAX_EXPERTS))
                found.append((pair, local, lax.div(packed, _MAX_EXPERTS)))
            visit(found)


def _add_up(vectors: list[Any]) -> Any:
    total = vectors[0]
    for vector in vectors[1:]:
        total = total + vector
    return total


def _count(ids, expert_map, num_experts: int, num_local: int, plan: _Plan, interpret: Any):
    """Pairs per local expert of every block [blocks, width]."""
    num_pairs = ids.shape[0]
    mapped = expert_map is not None

    def count_pairs(ids_g, *refs):
        map_g = refs[0] if mapped else None
        block_counts_g, ids_s, counts_s, loaded, counted, *map_refs = refs[int(mapped) :]
        pairs = _Pairs(
            plan, num_pairs, num_experts, num_local, ids_g, map_g, ids_s, loaded, *(map_refs or (None, None))
        )
        pairs.count(counts_s)
        plgpu.barrier_arrive(counted)
        plgpu.barrier_wait(counted)

        @pl.when(pairs.wg == 0)
        def _():
            block_counts_g[pairs.block] = _add_up([_vector(counts_s.at[row]) for row in range(plan.warps)])

    return _compat.kernel(
        count_pairs,
        out_type=jax.ShapeDtypeStruct((plan.blocks, plan.width), jnp.int32),
        grid=(plan.blocks,),
        grid_names=("block",),
        num_threads=plan.warpgroups,
        thread_name="wg",
        scratch_types=plan.scratch(mapped),
        compiler_params=plgpu.CompilerParams(lowering_semantics=_compat.LANE),
        interpret=interpret,
    )(*((ids, expert_map) if mapped else (ids,)))


def _place(ids, expert_map, block_counts, num_experts, num_local, top_k, tile_rows, max_tiles, plan, interpret):
    num_pairs = ids.shape[0]
    width, warpgroups = plan.width, plan.warpgroups
    mapped, counted = expert_map is not None, block_counts is not None
    ahead = 8  # loads of other blocks' counts under way at a time

    def place_pairs(ids_g, *refs):
        block_counts_g = refs[0] if counted else None
        map_g = refs[int(counted)] if mapped else None
        refs = refs[int(counted) + int(mapped) :]
        positions_g, token_g, group_g, tile_sizes_g, sizes_g, num_tiles_g = refs[:6]
        partial_s, sizes_s, shares_s, first_tile_s, scan_s, base_s, summed = refs[6:13]
        ids_s, counts_s, loaded, based, *map_refs = refs[13:]
        pairs = _Pairs(
            plan, num_pairs, num_experts, num_local, ids_g, map_g, ids_s, loaded, *(map_refs or (None, None))
        )
        block, wg = pairs.block, pairs.wg
        pairs.count(counts_s)

        if counted:  # each warpgroup sums its share of the blocks: all of them, and those before this one

            def add(step, carry):
                total, before = carry
                others = [(step * ahead + i) * warpgroups + wg for i in range(ahead)]
                counts = [_vector(block_counts_g.at[jnp.minimum(o, plan.blocks - 1)]) for o in others]
                for other, count in zip(others, counts, strict=True):
                    total = total + count * jnp.where(other < plan.blocks, 1, 0)
                    before = before + count * jnp.where(other < block, 1, 0)
                return total, before

            steps = pl.cdiv(plan.blocks, warpgroups * ahead)
            total, before = lax.fori_loop(0, steps, add, (_zeros(width), _zeros(width)))
            partial_s[0, wg] = total
            partial_s[1, wg] = before
        plgpu.barrier_arrive(summed)
        plgpu.barrier_wait(summed)

        def set_base(row, running):
            base_s[row] = running

        # Where each warp goes on: after the pairs of the blocks and warps before it.
        counts = [_vector(counts_s.at[row]) for row in range(plan.warps)]
        if counted:
            total = _add_up([_vector(partial_s.at[0, other]) for other in range(warpgroups)])
            running = _add_up([_vector(partial_s.at[1, other]) for other in range(warpgroups)])
        else:
            total, running = _add_up(counts), _zeros(width)
        for row, count in enumerate(counts):
            pl.when(wg == row // _WARPS)(lambda row=row, running=running: set_base(row, running))
            running = running + count

        @pl.when(wg == 0)
        def _():
            num_tiles = lax.div(total + (tile_rows - 1), jnp.full_like(total, tile_rows))
            even = lax.div(total + num_tiles - 1, jnp.maximum(num_tiles, 1))
            shares = jnp.minimum(lax.div(even + 7, jnp.full_like(even, 8)) * 8, tile_rows)
            shares_s[...] = jnp.maximum(shares, 1)  # of an empty group too: something is divided by it
            # Tiles of the experts before each one: an inclusive scan in shared memory (below it lie zeros), less its own.
            scan_s[pl.ds(0, width)] = _zeros(width)
            scan_s[pl.ds(width, width)] = num_tiles
            distance = 1
            while distance < num_local:
                lower = _vector(scan_s.at[pl.ds(width - distance, width)])
                scan_s[pl.ds(width, width)] = _vector(scan_s.at[pl.ds(width, width)]) + lower
                distance *= 2
            first_tile_s[...] = _vector(scan_s.at[pl.ds(width, width)]) - num_tiles
            sizes_s[...] = total

        plgpu.barrier_arrive(based)
        plgpu.barrier_wait(based)

        @plgpu.warp_map
        def _(warp):
            row = wg * _WARPS + warp

            def place(found):
                positions = []
                for _, local, seen in found:
                    expert = jnp.maximum(local, 0)
                    rank = base_s[row, expert] + seen
                    share = shares_s[expert]
                    tile = first_tile_s[expert] + lax.div(rank, share)
                    positions.append(jnp.where(local < 0, -1, tile * tile_rows + lax.rem(rank, share)))
                for (pair, local, _), position in zip(found, positions, strict=True):

                    @pl.when(local >= 0)
                    def _(pair=pair, position=position):
                        token_g[position] = lax.div(pair, top_k)

                    @pl.when(pair < num_pairs)
                    def _(pair=pair, position=position):
                        positions_g[pair] = position

            pairs.walk(warp, place)

            # The tile schedule: an expert a warp.
            workers = plan.blocks * plan.warps
            worker = block * plan.warps + row
            all_tiles = scan_s[width + num_local - 1]

            @pl.loop(0, lax.div(num_local - worker + (workers - 1), workers))
            def _(i):
                expert = worker + i * workers
                size = sizes_s[expert]
                first_tile = first_tile_s[expert]
                share = shares_s[expert]
                group_tiles = lax.div(size + (tile_rows - 1), tile_rows)
                sizes_g[expert] = size

                @pl.loop(0, group_tiles)
                def _(t):
                    group_g[first_tile + t] = expert
                    tile_sizes_g[first_tile + t] = jnp.clip(size - t * share, 0, share)

            # Tiles without rows.
            @pl.loop(0, lax.div(max_tiles - all_tiles - worker + (workers - 1), workers))
            def _(i):
                group_g[all_tiles + worker + i * workers] = -1
                tile_sizes_g[all_tiles + worker + i * workers] = 0

            @pl.when(worker == 0)
            def _():
                num_tiles_g[0] = all_tiles

    def i32(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    operands = [ids] + ([block_counts] if counted else []) + ([expert_map] if mapped else [])
    return _compat.kernel(
        place_pairs,
        out_type=(
            i32(num_pairs),
            i32(max_tiles * tile_rows),
            i32(max_tiles),
            i32(max_tiles),
            i32(num_local),
            i32(1),
        ),
        grid=(plan.blocks,),
        grid_names=("block",),
        num_threads=warpgroups,
        thread_name="wg",
        scratch_types=[
            plgpu.SMEM((2, warpgroups, width), jnp.int32),
            plgpu.SMEM((width,), jnp.int32),
            plgpu.SMEM((width,), jnp.int32),
            plgpu.SMEM((width,), jnp.int32),
            plgpu.SMEM((2 * width,), jnp.int32),
            plgpu.SMEM((plan.warps, width), jnp.int32),
            plgpu.Barrier(num_arrivals=warpgroups),
            *plan.scratch(mapped),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=_compat.LANE),
        interpret=interpret,
    )(*operands)


def group_tokens(
    topk_ids: Int[Array, "T k"],
    expert_map: Int[Array, "E"] | None,
    *,
    num_experts: int,
    num_local_experts: int,
    tile_rows: int,
    max_tiles: int,
    config: Config = Config(),
    interpret: Any = None,
) -> tuple[Array, ...]:
    """(positions, row_token, tile_group, tile_sizes, group_sizes, num_tiles) as `moe_jax.ops.group_tokens` defines them."""
    tokens, top_k = topk_ids.shape
    ids = topk_ids.reshape(-1)
    plan = _Plan(tokens * top_k, num_experts, num_local_experts, config)
    counts = _count(ids, expert_map, num_experts, num_local_experts, plan, interpret) if plan.blocks > 1 else None
    positions, *rest = _place(
        ids, expert_map, counts, num_experts, num_local_experts, top_k, tile_rows, max_tiles, plan, interpret
    )
    return positions.reshape(tokens, top_k), *rest
