"""Routing on Hopper: scores, grouped and biased selection, weights and their order, in one kernel; it can count pairs as well.

A warpgroup takes tiles of 16 tokens, whose logits stay in registers (`selection`). On the way to the grouping it also ranks the
pairs of its tokens among those of their expert (`ranks`), so that all that grouping needs to know of other CTAs is how many pairs
of each expert they have. With many tokens a CTA has four warpgroups, which tell one another their counts: fewer counts for the
next kernel to add up.

Learned on an H200 (benchmarks/results/2026-11-24-h200-plans-and-glue.txt; 128 experts, 8 slots; with the ranks):

- 3.4 us for 128 tokens, 7.9 for 4096, 15.3 for 16384. A tile of 64 tokens in the layout of wgmma's accumulator was the first
  form: 6 us without the ranks for any number of tokens up to 128 (2026-11-22-h200-bf16-layer.json).
- Instructions bind, some thousand a warp and tile: 64 CTAs take half as long as 128 with two rounds (10 and 18 us), and twice the
  CTAs would take turns. Marking the pairs from what the selection struck out, instead of comparing every slot with every expert,
  brought 18.6 us down to 15.3.
- A round of the selection in which a thread exchanges its best score together with its expert, and a load in the place of a sum
  over all experts where a number is looked up: 4.8 us for 16 tokens, 5.6 before; 3.4 for 128, 3.9 before. Then the schedule of 16
  tokens an expert a thread, and its sums by shuffles: 3.6 (2026-11-28-h200-few-rows-variants.txt, -four-bits-variants.txt).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from moe_jax import _compat
from moe_jax.kernels.hopper import one_token, ranks
from moe_jax.kernels.hopper.selection import COLUMNS, LAYOUT, ROWS, Scores, repeat, row_numbers, select
from moe_jax.routing_methods import RoutingRule

_BOX = 256  # TMA's limit per dimension: more experts come in several pieces
_MAX_EXPERTS = 512
_MAX_TOP_K = 32
_WARPS = 4
_TILES = 1 << 16  # a count of rows plus so many times a count of tiles
MANY_TOKENS = 1024  # so many CTAs of one warpgroup would be more counts than the next kernel likes to add up


@dataclasses.dataclass(frozen=True)
class Count:
    """What grouping wants to know.

    Attributes:
        num_local_experts: E_local.
        expert_map: global expert id to local id, or -1; None if all experts are local.
        max_blocks: at most so many CTAs, since each of the next kernel's adds up the counts of all.
    """

    num_local_experts: int
    expert_map: Int[Array, "E"] | None = None
    max_blocks: int = 128

    def warpgroups(self, tokens: int, experts: int) -> int:
        """Tiles that a CTA takes at a time. Many tokens need few CTAs, with registers for the logits of all their tiles."""
        if tokens <= MANY_TOKENS:
            return 1
        return 4 if experts <= 128 else 2 if experts <= 256 else 1


@dataclasses.dataclass(frozen=True)
class Share:
    """Grouping of so few tokens (at most 16) that every expert visited may simply multiply all of them.

    Attributes:
        num_local_experts: E_local.
        expert_map: global expert id to local id, or -1; None if all experts are local.
        max_tiles: the most tiles.
    """

    num_local_experts: int
    expert_map: Int[Array, "E"] | None
    max_tiles: int


def supports(router_logits: Any, top_k: int, rule: RoutingRule) -> str | None:
    """Why this kernel cannot route; None if it can."""
    tokens, experts = router_logits.shape
    if router_logits.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"router_logits {router_logits.dtype} must be float32, bfloat16 or float16"
    if experts * router_logits.dtype.itemsize % 16:
        return f"num_experts={experts} of {router_logits.dtype} must fill whole 16 bytes (TMA strides); pass float32 logits"
    if experts > _MAX_EXPERTS or top_k > _MAX_TOP_K:
        return (
            f"num_experts={experts} must be at most {_MAX_EXPERTS} and top_k={top_k} at most {_MAX_TOP_K} (registers)"
        )
    if rule.num_expert_group > 32:
        return f"num_expert_group={rule.num_expert_group} must be at most 32"
    if tokens == 0:
        return "no tokens: an empty operand needs no kernel"
    return None


def _row(refs: list[Any], widths: list[int], starts: list[int]) -> Scores:
    """A vector over experts, seen in every row of a tile."""
    parts = [plgpu.load(r.at[pl.ds(0, w)], layout=LAYOUT.reduce(0)) for r, w in zip(refs, widths, strict=True)]
    return Scores([repeat(part, ROWS) for part in parts], starts)


def topk(
    router_logits: Float[Array, "T E"],
    top_k: int,
    rule: RoutingRule,
    correction_bias: Float[Array, "E"] | None = None,
    *,
    grouping: Count | Share | None = None,
    interpret: Any = None,
) -> tuple[Array, ...]:
    """(ids, weights) as `moe_jax.ops.topk` defines them, and what `grouping` asks for.

    With `Count` also (tickets [T, k], block counts [blocks, width]). A ticket is ``rank * 1024 + local expert``, rank being that
    of the pair in its block and expert; -1 without local expert.

    With `Share` also (positions [T, k], tile_group, tile_starts, tile_sizes, tile_tokens [tiles], group_sizes [width],
    num_tiles [1]): a tile an expert visited.
    """
    tokens, experts = router_logits.shape
    dtype = router_logits.dtype
    starts = list(range(0, experts, _BOX))
    widths = [pl.cdiv(min(_BOX, experts - start), COLUMNS) * COLUMNS for start in starts]
    counted = isinstance(grouping, Count)
    wgs = grouping.warpgroups(tokens, experts) if counted else 1
    chunks = pl.cdiv(tokens, ROWS * wgs * grouping.max_blocks) if counted else 1
    blocks = pl.cdiv(tokens, ROWS * wgs * chunks)
    tail = tokens % ROWS
    biased = correction_bias is not None
    mapped = grouping is not None and grouping.expert_map is not None
    single, interpreted = None, interpret is not None
    if isinstance(grouping, Share) and one_token.applies(tokens, experts, top_k):
        single = one_token.OneToken(experts, top_k)
    columns = [(correction_bias, jnp.float32)] if biased else []
    columns += [(grouping.expert_map, jnp.int32)] if mapped else []

    def route_topk(logits_g, *refs):
        columns_g, refs = refs[: len(columns)], refs[len(columns) :]
        ids_g, weights_g = refs[:2]
        refs = refs[2:]
        groups_g, refs = refs[:more], refs[more:]
        tail_s, tail_weights_s, loaded, columns_loaded, logits_s, *refs = refs
        if grouping is not None:
            seen_s, counts_s, scan_s, counts_known, tables_s, *refs = refs
        if single is not None:
            single_s, refs = refs[: len(single.scratch)], refs[len(single.scratch) :]
        columns_s = [refs[i * len(starts) : (i + 1) * len(starts)] for i in range(len(columns))]
        block, wg = lax.axis_index("block"), lax.axis_index("wg")
        mine = jnp.minimum(chunks, pl.cdiv(tokens, ROWS * wgs) - block * chunks)

        def first_token(chunk):
            return ((block * chunks + chunk) * wgs + wg) * ROWS

        def fetch(chunk):
            for i, (start, width) in enumerate(zip(starts, widths, strict=True)):
                # Past the end TMA fills with zeros; the column index, made dynamic, may point there.
                source = logits_g.at[pl.ds(first_token(chunk), ROWS), pl.ds(start + block * 0, width)]
                buffer = lax.rem(chunk, 2)
                plgpu.copy_gmem_to_smem(source, logits_s[i].at[wg, buffer], loaded.at[wg * 2 + buffer])

        # A single row is loaded straight into registers, where no columns past its end are needed.
        straight = single is not None and experts == widths[0]
        if not straight:
            fetch(0)

        @pl.when(wg == 0)
        def _():
            for source, pieces in zip(columns_g, columns_s, strict=True):
                for start, piece in zip(starts, pieces, strict=True):
                    part = pl.ds(start + block * 0, piece.shape[0])
                    plgpu.copy_gmem_to_smem(source.at[part], piece, columns_loaded)

        if columns:
            plgpu.barrier_wait(columns_loaded)

        def local_experts(ids, first):
            there = row_numbers(ROWS) < tokens - first  # behind the last token TMA has filled in zeros
            locals_ = [jnp.where(there, expert, -1) for expert in ids]
            if mapped:
                table = _row(columns_s[-1], widths, starts)
                locals_ = [jnp.where(expert >= 0, table.at(expert), -1) for expert in locals_]
                locals_ = [jnp.where(local < grouping.num_local_experts, local, -1) for local in locals_]
            return [jnp.maximum(local, -1) for local in locals_]

        def mark(locals_, chosen, first):
            if mapped:
                ranks.mark_pairs(locals_, ROWS, seen_s.at[wg])
                return

            def inside(piece):
                token = plgpu.broadcasted_iota(jnp.int32, piece.shape, 0, layout=LAYOUT)
                return jnp.where(token < tokens - first, piece, 0)

            ranks.mark_chosen(chosen if tokens % (ROWS * wgs) == 0 else chosen.map(inside), ROWS, seen_s.at[wg])

        def block_tickets(locals_, chunk, before):
            """Tickets of this warpgroup's tile, and the counts of the block after all tiles of this chunk."""
            counts = ranks.count_tile(ROWS, seen_s.at[wg])
            if wgs == 1:
                return ranks.tickets(locals_, ROWS, seen_s.at[wg], before, interpreted), before + counts
            buffer = lax.rem(chunk, 2)  # the others may still read those of the chunk before
            counts_s[buffer, wg] = counts
            plgpu.barrier_arrive(counts_known)
            plgpu.barrier_wait(counts_known)
            of_all = [ranks.vector(counts_s.at[buffer, other]) for other in range(wgs)]
            base = before
            for other, theirs in enumerate(of_all[:-1]):
                base = base + theirs * jnp.where(other < wg, 1, 0)
            return ranks.tickets(locals_, ROWS, seen_s.at[wg], base, interpreted), before + ranks.add_up(of_all)

        def one(chunk, before):
            pl.when(chunk + 1 < mine)(lambda: fetch(chunk + 1))
            first = first_token(chunk)
            buffer = lax.rem(chunk, 2)
            if not straight:
                plgpu.barrier_wait(loaded.at[wg * 2 + buffer])
            biases = _row(columns_s[0], widths, starts) if biased else None
            if single is not None:
                row = logits_g.at[0] if straight else logits_s[0].at[wg, buffer, 0]
                logits = Scores([single.load(row).astype(jnp.float32)], starts)
                pick = functools.partial(single.pick, refs=single_s)
                ids, weights, _ = select(logits, biases, experts, top_k, rule, interpreted, pick)
                targets = [ids_g, weights_g, *groups_g]
                single.write(ids, weights, local_experts(ids, first), grouping.num_local_experts, targets, single_s)
                return before
            parts = [plgpu.load(p.at[wg, buffer], layout=LAYOUT, optimized=False) for p in logits_s]
            raw = Scores([part.astype(jnp.float32) for part in parts], starts)
            ids, weights, chosen = select(raw, biases, experts, top_k, rule, interpreted)
            outputs = [(ids_g, ids), (weights_g, weights)]
            if grouping is not None:
                locals_ = local_experts(ids, first)
                mark(locals_, chosen, first)
            if counted:
                tickets, before = block_tickets(locals_, chunk, before)
                outputs.append((groups_g[0], tickets))
            elif isinstance(grouping, Share):
                positions = _share_tiles(grouping, locals_, groups_g, seen_s.at[0], tables_s, scan_s, interpreted)
                outputs.append((groups_g[0], positions))
            full = first + ROWS <= tokens

            @pl.when(full)
            def _():
                for target, vectors in outputs:
                    for slot, values in enumerate(vectors):
                        _compat.store_scattered(target.at[pl.ds(first, ROWS), slot], values)

            if tail:

                @pl.when(jnp.logical_not(full) & (first < tokens))
                def _():
                    for target, vectors in outputs:
                        staged = tail_weights_s if target is weights_g else tail_s
                        plgpu.commit_smem()
                        for slot, values in enumerate(vectors):
                            staged[slot] = values
                        plgpu.commit_smem()

                        @plgpu.warp_map
                        def _(warp, target=target, staged=staged):
                            @pl.loop(0, lax.div(tail - warp + _WARPS - 1, _WARPS))
                            def _(i):
                                row = warp + i * _WARPS
                                for slot in range(top_k):
                                    target[first + row, slot] = staged[slot, row]

            return before

        before = ranks.zeros(local_width) if counted else block * 0
        counts = one(block * 0, before) if chunks == 1 else lax.fori_loop(0, mine, one, before)
        if counted:

            @pl.when(wg == wgs - 1)
            def _():
                groups_g[1][block] = counts

    out_type = [
        jax.ShapeDtypeStruct((tokens, top_k), jnp.int32),
        jax.ShapeDtypeStruct((tokens, top_k), jnp.float32),
    ]
    scratch = [
        plgpu.SMEM((top_k, ROWS), jnp.int32),
        plgpu.SMEM((top_k, ROWS), jnp.float32),
        plgpu.Barrier(num_arrivals=len(starts), num_barriers=2 * wgs),
        plgpu.Barrier(num_arrivals=max(1, len(columns) * len(starts))),
        [plgpu.SMEM((wgs, 2, ROWS, width), dtype) for width in widths],
    ]
    if grouping is not None:
        local_width = ranks.padded(grouping.num_local_experts)
        scratch += [plgpu.SMEM((wgs, ROWS, local_width), jnp.int32), plgpu.SMEM((2, wgs, local_width), jnp.int32)]
        scratch += [plgpu.SMEM((2, 2 * local_width), jnp.int32), plgpu.Barrier(num_arrivals=wgs)]
        scratch += [plgpu.SMEM((1 if counted else 4, local_width), jnp.int32)]
        scratch += single.scratch if single is not None else []
        shapes = [(tokens, top_k)]
        if counted:
            shapes += [(blocks, local_width)]
        else:
            shapes += [(grouping.max_tiles,)] * 4 + [(local_width,), (1,)]
        out_type += [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes]
    more = len(out_type) - 2
    scratch += [plgpu.SMEM((width,), kind) for _, kind in columns for width in widths]
    return _compat.kernel(
        route_topk,
        out_type=tuple(out_type),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=wgs,
        thread_name="wg",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, lowering_semantics=_compat.LANE),
        interpret=interpret,
    )(router_logits, *(column.astype(kind) for column, kind in columns))


def _share_tiles(share: Share, locals_, groups_g, seen_s, tables_s, scan_s, interpret: bool) -> list[Any]:
    """Rows of the pairs of a tile, which are marked, when every expert visited multiplies all tokens; writes the schedule."""
    _, *schedule_g, sizes_g, num_tiles_g = groups_g
    width = sizes_g.shape[0]
    # A token has one row with an expert, whatever slots lead there.
    pairs = [jnp.minimum(ranks.vector(seen_s.at[row]), 1) for row in range(ROWS)]
    sizes = ranks.add_up(pairs)
    sizes_g[...] = sizes
    # Rows and tiles in one scan: of each there are at most 16 * 32.
    sums, buffer = ranks.scan(sizes + jnp.minimum(sizes, 1) * _TILES, scan_s, share.num_local_experts, interpret)
    tiles = lax.div(sums, jnp.full_like(sums, _TILES))
    ends = sums - tiles * _TILES
    tokens = ranks.add_up([mine * (1 << row) for row, mine in enumerate(pairs)])
    before = ends - sizes
    for row, mine in enumerate(pairs):
        seen_s[row] = before
        before = before + mine
    plgpu.commit_smem()
    rows = ranks.look_up(locals_, ROWS, seen_s, interpret)

    last = lax.div(scan_s[buffer, width + share.num_local_experts - 1], jnp.int32(_TILES))
    write = functools.partial(_interpreted_schedule, tables_s=tables_s) if interpret else _scattered_schedule
    write(share, schedule_g, (tiles - 1, ends - sizes, sizes, tokens), last)

    @plgpu.warp_map
    def _(warp):
        @pl.when(warp == 0)
        def _():
            num_tiles_g[0] = last

    return [jnp.where(local >= 0, row, -1) for local, row in zip(locals_, rows, strict=True)]


def _scattered_schedule(share: Share, schedule_g, of_experts, last) -> None:
    """Writes the tiles, an expert a thread, and those without rows behind the last."""
    tile, start, size, tokens = of_experts
    ranks.scatter(schedule_g, tile, [ranks.numbers(size.shape[0]), start, size, tokens], jnp.minimum(size, 1))
    number = ranks.numbers(ranks.padded(share.max_tiles))
    nothing = ranks.zeros(number.shape[0])
    behind = jnp.where((number >= last) & (number < share.max_tiles), 1, 0)
    ranks.scatter(schedule_g, number, [nothing - 1, nothing, nothing, nothing], behind)


def _interpreted_schedule(share: Share, schedule_g, of_experts, last, tables_s) -> None:
    """`_scattered_schedule` by warps, in the interpreter."""
    width = tables_s.shape[1]
    for table, values in enumerate(of_experts):
        tables_s[table] = values
    plgpu.commit_smem()

    @plgpu.warp_map
    def _(warp):
        @pl.loop(0, pl.cdiv(share.num_local_experts, _WARPS))
        def _(i):
            expert = i * _WARPS + warp
            tile, start, size, mask = (tables_s[table, jnp.minimum(expert, width - 1)] for table in range(4))

            @pl.when((expert < share.num_local_experts) & (size > 0))
            def _():
                for target, value in zip(schedule_g, (expert, start, size, mask), strict=True):
                    target[tile] = value

        @pl.loop(0, lax.div(share.max_tiles - last - warp + _WARPS - 1, _WARPS))
        def _(i):
            for target, value in zip(schedule_g, (-1, 0, 0, 0), strict=True):
                target[last + warp + i * _WARPS] = jnp.int32(value)
