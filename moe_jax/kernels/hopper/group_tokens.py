"""Grouping on Hopper: a stable counting sort of (token, slot) pairs by local expert, in two kernels.

`_count` walks over the pairs once: every warp counts its own contiguous pairs per local expert. `_place` walks over them again:
a pair's row is the start of its group, plus the pairs of that group in earlier warps, plus those seen by its own warp so
far. Warps take pairs in order and nothing is added atomically, so rows of a group keep token order and the result repeats.

Groups start at multiples of `tile_rows`, so that a row tile belongs to one group. Pairs whose id is -1 or out of range, or
whose expert the map sends to -1, are dropped here: they get no row.
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
_VECTOR = 128  # threads of a warpgroup: vectors over experts are padded to a multiple
_MAX_EXPERTS = 1024


def supports(num_experts: int, num_local_experts: int, tile_rows: int, num_pairs: int) -> str | None:
    """Why these kernels cannot group the pairs; None if they can."""
    if max(num_experts, num_local_experts) > _MAX_EXPERTS:
        return f"num_experts={max(num_experts, num_local_experts)} must be at most {_MAX_EXPERTS} (counters in shared memory)"
    if tile_rows & (tile_rows - 1):
        return f"tile_rows={tile_rows} must be a power of two"
    if num_pairs == 0:
        return "no pairs: an empty operand needs no kernel"
    return None


@dataclasses.dataclass(frozen=True)
class Config:
    warpgroups: int = 4
    box: int = 256  # pairs that one copy brings to a warpgroup: TMA's limit per dimension
    max_blocks: int = 128  # more pairs than these take make the blocks larger: summing the counts of all blocks stays short


class _Plan:
    """Who takes which pairs: blocks of a few warpgroups of 4 warps, each warp a contiguous run."""

    def __init__(self, num_pairs: int, num_local_experts: int, config: Config):
        self.warpgroups, self.box = config.warpgroups, config.box
        self.warps = config.warpgroups * _WARPS
        # At most 8 boxes: they lie in shared memory.
        self.boxes = max(1, min(8, pl.cdiv(num_pairs, config.max_blocks * config.warpgroups * config.box)))
        self.per_warpgroup = self.boxes * config.box
        self.per_warp = self.per_warpgroup // _WARPS
        self.per_block = self.per_warpgroup * config.warpgroups
        self.blocks = pl.cdiv(num_pairs, self.per_block)
        self.width = pl.cdiv(num_local_experts, _VECTOR) * _VECTOR


def _vector(ref: Any) -> Any:
    return plgpu.load(ref, layout=plgpu.Layout.WG_STRIDED(ref.shape, vec_size=1))


def _zeros(width: int) -> Any:
    return plgpu.layout_cast(jnp.zeros((width,), jnp.int32), plgpu.Layout.WG_STRIDED((width,), vec_size=1))


def _fetch_pairs(plan: _Plan, ids_g: Any, ids_s: Any, loaded: Any, block: Any, wg: Any) -> None:
    first = block * plan.per_block + wg * plan.per_warpgroup
    for box in range(plan.boxes):
        source = ids_g.at[pl.ds(first + box * plan.box, plan.box)]  # past the end: zeros, never looked at
        plgpu.copy_gmem_to_smem(source, ids_s.at[wg, pl.ds(box * plan.box, plan.box)], loaded.at[wg])
    plgpu.barrier_wait(loaded.at[wg])


def _for_each_pair(plan: _Plan, num_pairs, num_experts, num_local, ids_s, map_g, block, wg, warp, visit) -> None:
    """Calls `visit(pair, local expert or -1)` for the pairs of one warp, in order."""
    first = block * plan.per_block + wg * plan.per_warpgroup + warp * plan.per_warp
    mine = jnp.clip(num_pairs - first, 0, plan.per_warp)

    @pl.loop(0, mine)
    def _(i):
        expert = ids_s[wg, warp * plan.per_warp + i]
        known = (expert >= 0) & (expert < num_experts)
        local = expert if map_g is None else map_g[jnp.where(known, expert, 0)]
        visit(first + i, jnp.where(known & (local >= 0) & (local < num_local), local, -1))


def _count(ids, expert_map, num_experts: int, num_local: int, plan: _Plan, interpret: Any):
    """Pairs per local expert: of every warp [blocks, 16, width] and of every block [blocks, width]."""
    num_pairs = ids.shape[0]

    def body(ids_g, *refs):
        map_g = refs[0] if expert_map is not None else None
        warp_counts_g, block_counts_g, ids_s, counts_s, loaded, counted = refs[int(expert_map is not None) :]
        block, wg = lax.axis_index("block"), lax.axis_index("wg")
        for warp in range(_WARPS):
            counts_s[wg * _WARPS + warp] = _zeros(plan.width)
        _fetch_pairs(plan, ids_g, ids_s, loaded, block, wg)

        @plgpu.warp_map
        def _(warp):
            def visit(pair, local):
                @pl.when(local >= 0)
                def _():
                    counts_s[wg * _WARPS + warp, local] = counts_s[wg * _WARPS + warp, local] + 1

            _for_each_pair(plan, num_pairs, num_experts, num_local, ids_s, map_g, block, wg, warp, visit)

        for warp in range(_WARPS):
            warp_counts_g[block, wg * _WARPS + warp] = _vector(counts_s.at[wg * _WARPS + warp])
        plgpu.barrier_arrive(counted)
        plgpu.barrier_wait(counted)

        @pl.when(wg == 0)
        def _():
            total = _vector(counts_s.at[0])
            for row in range(1, plan.warps):
                total = total + _vector(counts_s.at[row])
            block_counts_g[block] = total

    return _compat.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((plan.blocks, plan.warps, plan.width), jnp.int32),
            jax.ShapeDtypeStruct((plan.blocks, plan.width), jnp.int32),
        ),
        grid=(plan.blocks,),
        grid_names=("block",),
        num_threads=plan.warpgroups,
        thread_name="wg",
        scratch_types=[
            plgpu.SMEM((plan.warpgroups, plan.per_warpgroup), jnp.int32),
            plgpu.SMEM((plan.warps, plan.width), jnp.int32),
            plgpu.Barrier(num_arrivals=plan.boxes, num_barriers=plan.warpgroups),
            plgpu.Barrier(num_arrivals=plan.warpgroups),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=_compat.LANE),
        interpret=interpret,
    )(*((ids,) if expert_map is None else (ids, expert_map)))


def _place(ids, expert_map, warp_counts, block_counts, num_experts, num_local, top_k, tile_rows, max_tiles, plan, interpret):
    num_pairs = ids.shape[0]
    width = plan.width
    shift = tile_rows.bit_length() - 1

    def body(ids_g, warp_counts_g, block_counts_g, *refs):
        map_g = refs[0] if expert_map is not None else None
        refs = refs[int(expert_map is not None) :]
        positions_g, token_g, group_g, sizes_g, num_tiles_g = refs[:5]
        ids_s, next_s, partial_s, sizes_s, scan_s, loaded, summed, based = refs[5:]
        block, wg = lax.axis_index("block"), lax.axis_index("wg")

        # Each warpgroup sums every fourth block: all of them, and those before this one.
        def add(step, carry):
            total, before = carry
            other = step * plan.warpgroups + wg
            counts = _vector(block_counts_g.at[jnp.minimum(other, plan.blocks - 1)])
            total = total + counts * jnp.where(other < plan.blocks, 1, 0)
            return total, before + counts * jnp.where(other < block, 1, 0)

        steps = pl.cdiv(plan.blocks, plan.warpgroups)
        total, before = lax.fori_loop(0, steps, add, (_zeros(width), _zeros(width)))
        partial_s[0, wg] = total
        partial_s[1, wg] = before
        plgpu.barrier_arrive(summed)
        _fetch_pairs(plan, ids_g, ids_s, loaded, block, wg)
        plgpu.barrier_wait(summed)

        @pl.when(wg == 0)
        def _():
            total, before = _vector(partial_s.at[0, 0]), _vector(partial_s.at[1, 0])
            for other in range(1, plan.warpgroups):
                total = total + _vector(partial_s.at[0, other])
                before = before + _vector(partial_s.at[1, other])
            num_tiles = lax.shift_right_logical(total + (tile_rows - 1), jnp.full_like(total, shift))
            # Tiles of the experts before each one: an inclusive scan in shared memory (below it lie zeros), less its own.
            scan_s[pl.ds(0, width)] = _zeros(width)
            scan_s[pl.ds(width, width)] = num_tiles
            distance = 1
            while distance < num_local:
                lower = _vector(scan_s.at[pl.ds(width - distance, width)])
                scan_s[pl.ds(width, width)] = _vector(scan_s.at[pl.ds(width, width)]) + lower
                distance *= 2
            start = (_vector(scan_s.at[pl.ds(width, width)]) - num_tiles) * tile_rows
            sizes_s[...] = total
            running = start + before
            for row in range(plan.warps):
                counts = _vector(warp_counts_g.at[block, row])
                next_s[row] = running
                running = running + counts

        plgpu.barrier_arrive(based)
        plgpu.barrier_wait(based)

        @plgpu.warp_map
        def _(warp):
            row = wg * _WARPS + warp

            def visit(pair, local):
                @pl.when(local >= 0)
                def _():
                    position = next_s[row, local]
                    next_s[row, local] = position + 1
                    positions_g[pair] = position
                    token_g[position] = lax.div(pair, top_k)

                @pl.when(local < 0)
                def _():
                    positions_g[pair] = -1

            _for_each_pair(plan, num_pairs, num_experts, num_local, ids_s, map_g, block, wg, warp, visit)

            # The tile schedule, and the padding of each group's last tile: an expert a warp.
            workers = plan.blocks * plan.warps
            worker = block * plan.warps + row
            all_tiles = scan_s[width + num_local - 1]

            @pl.loop(0, lax.div(num_local - worker + (workers - 1), workers))
            def _(i):
                expert = worker + i * workers
                size = sizes_s[expert]
                end = scan_s[width + expert]
                tiles = lax.shift_right_logical(size + (tile_rows - 1), shift)
                sizes_g[expert] = size

                @pl.loop(0, tiles)
                def _(t):
                    group_g[end - tiles + t] = expert

                first_pad = (end - tiles) * tile_rows + size

                @pl.loop(0, tiles * tile_rows - size)
                def _(r):
                    token_g[first_pad + r] = -1

            # Tiles without rows.
            idle = (max_tiles - all_tiles) * tile_rows

            @pl.loop(0, lax.div(idle - worker + (workers - 1), workers))
            def _(i):
                token_g[all_tiles * tile_rows + worker + i * workers] = -1

            @pl.loop(0, lax.div(max_tiles - all_tiles - worker + (workers - 1), workers))
            def _(i):
                group_g[all_tiles + worker + i * workers] = -1

            @pl.when(worker == 0)
            def _():
                num_tiles_g[0] = all_tiles

    i32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731
    return _compat.kernel(
        body,
        out_type=(i32(num_pairs), i32(max_tiles * tile_rows), i32(max_tiles), i32(num_local), i32(1)),
        grid=(plan.blocks,),
        grid_names=("block",),
        num_threads=plan.warpgroups,
        thread_name="wg",
        scratch_types=[
            plgpu.SMEM((plan.warpgroups, plan.per_warpgroup), jnp.int32),
            plgpu.SMEM((plan.warps, width), jnp.int32),
            plgpu.SMEM((2, plan.warpgroups, width), jnp.int32),
            plgpu.SMEM((width,), jnp.int32),
            plgpu.SMEM((2 * width,), jnp.int32),
            plgpu.Barrier(num_arrivals=plan.boxes, num_barriers=plan.warpgroups),
            plgpu.Barrier(num_arrivals=plan.warpgroups),
            plgpu.Barrier(num_arrivals=plan.warpgroups),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=_compat.LANE),
        interpret=interpret,
    )(ids, warp_counts, block_counts, *(() if expert_map is None else (expert_map,)))


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
) -> tuple[Int[Array, "T k"], Int[Array, "R"], Int[Array, "tiles"], Int[Array, "E_local"], Int[Array, "1"]]:
    """(positions, row_token, tile_group, group_sizes, num_tiles) as `moe_jax.ops.group_tokens` defines them."""
    tokens, top_k = topk_ids.shape
    ids = topk_ids.reshape(-1)
    plan = _Plan(tokens * top_k, num_local_experts, config)
    warp_counts, block_counts = _count(ids, expert_map, num_experts, num_local_experts, plan, interpret)
    positions, *rest = _place(
        ids, expert_map, warp_counts, block_counts, num_experts, num_local_experts, top_k, tile_rows, max_tiles, plan, interpret
    )
    return positions.reshape(tokens, top_k), *rest
