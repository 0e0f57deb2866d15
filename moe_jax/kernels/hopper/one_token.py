"""Routing of one token, as in decoding without a batch: all of a warpgroup works on its scores.

`selection` gives a token eight threads and takes its experts one after the other, each round a chain of dependent reductions.
Here every row of the tile holds the same token. An expert's place is the number of experts before it; each row counts a
sixteenth of them, for all experts at once, and the counts are added up. Which experts, which slots and which weights come out is
the same, bit for bit: comparisons round nothing, and the arithmetic is `selection`'s own.

The tiles need no scan either: a pair's row is the number of smaller experts among a handful.

On an H200, 8 of 128 experts: 3.0 us, 4.9 in rounds (benchmarks/results/2026-11-25-h200-variants.txt).
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax.kernels.hopper import ranks
from moe_jax.kernels.hopper.selection import COLUMNS, LAYOUT, NEVER, ROWS, Scores, repeat, row_numbers, spread

_LEAST_SLOTS = 4  # fewer rounds than that are as fast as counting
_MAX_EXPERTS = 256  # the counts grow with the square
_WARPS = 4


def applies(tokens: int, experts: int, top_k: int) -> bool:
    """Whether this is how to route."""
    return tokens == 1 and _LEAST_SLOTS <= top_k <= ROWS and experts <= _MAX_EXPERTS


class OneToken:
    """The scratch of a kernel that routes one token, and what it does with it.

    Args:
        experts: E.
        top_k: number of slots.
    """

    def __init__(self, experts: int, top_k: int):
        self._top_k = top_k
        self._width = pl.cdiv(experts, COLUMNS) * COLUMNS
        self._padded = ranks.padded(experts)

    @property
    def scratch(self) -> list[Any]:
        """Shared memory, for the `refs` of the methods."""
        return [
            plgpu.SMEM((ROWS, self._width), jnp.float32),  # scores
            plgpu.SMEM((ROWS, self._padded), jnp.int32),  # counts
            plgpu.SMEM((self._padded,), jnp.int32),  # places
            plgpu.SMEM((ROWS, COLUMNS), jnp.int32),  # experts, a row a slot
            plgpu.SMEM((ROWS, COLUMNS), jnp.float32),  # their scores
            plgpu.SMEM((3 * self._top_k + 1, ROWS), jnp.int32),  # ids, local experts once, rows; number of tiles
            plgpu.SMEM((self._top_k, ROWS), jnp.float32),  # weights
        ]

    def load(self, logits: Any) -> Any:
        """The logits ``[E]`` of the token in every row of a tile."""
        return repeat(plgpu.load(logits, layout=LAYOUT.reduce(0), optimized=False), ROWS)

    def pick(self, selection: Scores, scores: Scores, refs: list[Any]) -> tuple[list[Any], list[Any]]:
        """The experts of the slots and their `scores`, best first; see `selection.rounds`."""
        scores_s, counts_s, places_s, experts_s, values_s, *_ = refs
        (x,), (expert,), (score,) = selection.pieces, selection.experts, scores.pieces
        row = row_numbers(ROWS)
        scores_s[...] = x
        plgpu.commit_smem()
        before = jnp.zeros_like(expert)
        for first in range(0, self._width, ROWS):
            other = spread(plgpu.load(scores_s.at[0, pl.ds(first, ROWS)], layout=LAYOUT.reduce(1)), x)
            number = spread(row + first, expert)
            before = before + jnp.where((other > x) | ((other == x) & (number < expert)), 1, 0)
        counts_s[:, pl.ds(0, self._width)] = before
        plgpu.commit_smem()
        places_s[...] = ranks.add_up([ranks.vector(counts_s.at[r]) for r in range(ROWS)])
        plgpu.commit_smem()
        places = repeat(plgpu.load(places_s.at[pl.ds(0, self._width)], layout=LAYOUT.reduce(0)), ROWS)
        here = (places == spread(row, places)) & (x > NEVER)  # a row is a slot from now on
        for target, found in (
            (experts_s, jnp.max(jnp.where(here, expert, -1), axis=1)),
            (values_s, jnp.sum(jnp.where(here, score, 0.0), axis=1)),
        ):
            target[...] = plgpu.layout_cast(lax.broadcast_in_dim(found, (ROWS, COLUMNS), [0]), LAYOUT)
        plgpu.commit_smem()

        def slots(ref):
            return [plgpu.load(ref.at[s, pl.ds(0, ROWS)], layout=LAYOUT.reduce(1)) for s in range(self._top_k)]

        return slots(experts_s), slots(values_s)

    def write(
        self,
        ids: list[Any],
        weights: list[Any],
        locals_: list[Any],
        num_local: int,
        targets: list[Any],
        refs: list[Any],
    ) -> None:
        """Writes what routing and grouping give.

        Args:
            ids: experts of the slots.
            weights: of the slots.
            locals_: local experts of the slots, or -1.
            num_local: E_local.
            targets: references to ids, weights, positions, then the schedule, as `topk.topk` returns them.
            refs: the scratch.
        """
        *_, lines_s, weights_s = refs
        ids_g, weights_g, positions_g, group_g, starts_g, sizes_g, tokens_g, group_sizes_g, num_tiles_g = targets
        top_k = self._top_k
        # A token has one row with an expert, whatever slots lead there.
        news = []
        for slot, local in enumerate(locals_):
            new = local >= 0
            for other in locals_[:slot]:
                new = new & (other != local)
            news.append(jnp.where(new, 1, 0))
        for slot, (expert, weight, local, new) in enumerate(zip(ids, weights, locals_, news, strict=True)):
            smaller = [jnp.where(other < local, there, 0) for other, there in zip(locals_, news, strict=True)]
            lines_s[slot] = expert
            lines_s[top_k + slot] = jnp.where(new > 0, local, -1)
            lines_s[2 * top_k + slot] = jnp.where(local >= 0, ranks.add_up(smaller), -1)
            weights_s[slot] = weight
        lines_s[3 * top_k] = ranks.add_up(news)
        plgpu.commit_smem()
        layout = plgpu.Layout.WG_STRIDED(group_sizes_g.shape, vec_size=1)
        number = plgpu.broadcasted_iota(jnp.int32, group_sizes_g.shape, 0, layout=layout)
        chosen = [jnp.where(number == lines_s[top_k + slot, 0], 1, 0) for slot in range(top_k)]
        group_sizes_g[...] = jnp.minimum(ranks.add_up(chosen), 1)

        @plgpu.warp_map
        def _(warp):
            num_tiles = lines_s[3 * top_k, 0]

            @pl.loop(0, lax.div(top_k - warp + _WARPS - 1, _WARPS))
            def _(i):
                slot = warp + i * _WARPS
                local, row = lines_s[top_k + slot, 0], lines_s[2 * top_k + slot, 0]
                ids_g[0, slot] = lines_s[slot, 0]
                weights_g[0, slot] = weights_s[slot, 0]
                positions_g[0, slot] = row

                @pl.when(local >= 0)
                def _():
                    for target, value in ((group_g, local), (starts_g, row), (sizes_g, 1), (tokens_g, 1)):
                        target[row] = jnp.int32(value)

            @pl.loop(0, lax.div(group_g.shape[0] - num_tiles - warp + _WARPS - 1, _WARPS))
            def _(i):
                for target, value in ((group_g, -1), (starts_g, 0), (sizes_g, 0), (tokens_g, 0)):
                    target[num_tiles + warp + i * _WARPS] = jnp.int32(value)

            @pl.when(warp == 0)
            def _():
                num_tiles_g[0] = num_tiles
