"""Selection in registers: scores, groups, top-k, weights and their order, for a tile of tokens.

A tile is a [16, E] matrix, eight threads a row: the k rounds of "row maximum, lowest index that has it, strike it out" need no
shared memory. All arithmetic is float32, and that of a row does not depend on the rows beside it.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax import _compat, _compat_routing
from moe_jax.routing_methods import RoutingRule

ROWS = 16  # tokens of a tile
COLUMNS = 32  # a multiple of it is the number of columns of a tile
# A warp has four rows, eight threads a row, four neighbouring columns a thread at a time.
LAYOUT = _compat.tiled_layout(((16, 32), (4, 32), (4,)), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)
LARGEST = float(jnp.finfo(jnp.float32).max)
NEVER = -float("inf")
_NO_EXPERT = -(1 << 20)  # below the negative of any expert id


def spread(vector: Any, like: Any) -> Any:
    """A value per token, repeated over the experts."""
    return plgpu.layout_cast(lax.broadcast_in_dim(vector, like.shape, [0]), LAYOUT)


def repeat(vector: Any, rows: int) -> Any:
    """A value per expert, repeated over the tokens."""
    return plgpu.layout_cast(lax.broadcast_in_dim(vector, (rows, *vector.shape), [1]), LAYOUT)


def row_numbers(rows: int) -> Any:
    """0, 1, ... as a value per token."""
    return jnp.max(plgpu.broadcasted_iota(jnp.int32, (rows, COLUMNS), 0, layout=LAYOUT), axis=1)


class Scores:
    """A [rows, E] matrix in registers, as pieces: what one copy brings."""

    def __init__(self, pieces: list[Any], starts: list[int]):
        self.pieces, self.starts = pieces, starts
        self.experts = [
            plgpu.broadcasted_iota(jnp.int32, piece.shape, 1, layout=LAYOUT) + start
            for piece, start in zip(pieces, starts, strict=True)
        ]

    def map(self, fn: Any, *others: Scores) -> Scores:
        """`fn` of each piece, and of the same piece of the others."""
        return Scores([fn(*xs) for xs in zip(self.pieces, *(o.pieces for o in others), strict=True)], self.starts)

    def map_indexed(self, fn: Any, *others: Scores) -> Scores:
        """`map`, where `fn` takes the experts of the elements first."""
        zipped = zip(self.experts, self.pieces, *(o.pieces for o in others), strict=True)
        return Scores([fn(*xs) for xs in zipped], self.starts)

    def reduce(self, along: Any, combine: Any) -> Any:
        """A value per token: `along` reduces each piece over its experts, `combine` joins two pieces."""
        total = along(self.pieces[0], axis=1)
        for piece in self.pieces[1:]:
            total = combine(total, along(piece, axis=1))
        return total

    def max(self) -> Any:
        """The largest score of each token."""
        return self.reduce(jnp.max, jnp.maximum)

    def sum(self) -> Any:
        """The sum of each token's scores."""
        return self.reduce(jnp.sum, jnp.add)

    def first(self, value: Any) -> Any:
        """The lowest expert whose score is `value`."""
        hits = self.map_indexed(lambda e, x: jnp.where(x == spread(value, x), -e, _NO_EXPERT))
        return -hits.max()

    def at(self, expert: Any) -> Any:
        """The score of one expert of each token, 0 where it is none of them."""
        return self.map_indexed(lambda e, x: jnp.where(e == spread(expert, x), x, jnp.zeros((), x.dtype))).sum()

    def strike(self, expert: Any) -> Scores:
        """The scores without one expert of each token."""
        return self.map_indexed(lambda e, x: jnp.where(e == spread(expert, x), NEVER, x))


def _score(logits: Scores, score: str) -> Scores:
    """Scores of clamped logits; -inf marks what cannot be selected and scores 0 where a score is a probability."""
    if score == "identity":
        return logits
    if score == "softmax":
        top = jnp.maximum(logits.max(), -LARGEST)
        e = logits.map(lambda x: jnp.exp(x - spread(top, x)))
        total = e.sum()
        return e.map(lambda x: x / spread(jnp.where(total > 0, total, 1.0), x))
    if score == "sigmoid":
        return logits.map(lambda x: 1.0 / (1.0 + jnp.exp(-x)))
    assert score == "sqrtsoftplus", score

    def sqrtsoftplus(x):
        small = jnp.exp(-jnp.abs(x))
        above = 1.0 + small  # log(1 + small) to full precision: the rounding of the sum cancels in the quotient
        log1p = jnp.where(above == 1.0, small, jnp.log(above) * (small / jnp.where(above == 1.0, 1.0, above - 1.0)))
        return jnp.sqrt(jnp.maximum(x, 0.0) + log1p)

    return logits.map(sqrtsoftplus)


def _keep_groups(selection: Scores, experts: int, rule: RoutingRule) -> Scores:
    """Strikes out the experts of all but the best `topk_group` groups."""
    size = experts // rule.num_expert_group

    def inside(e, group):
        return (e >= group * size) & (e < (group + 1) * size)

    quality = []
    for group in range(rule.num_expert_group):
        members = selection.map_indexed(lambda e, x, g=group: jnp.where(inside(e, g), x, NEVER))
        best = members.max()
        if rule.group_score == "top2_sum":
            second = members.strike(members.first(best)).max()
            best = best + second
        quality.append(best)
    kept = selection.map(lambda x: jnp.full_like(x, NEVER))
    for group, mine in enumerate(quality):
        better = jnp.zeros_like(mine)
        for other, theirs in enumerate(quality):
            if other < group:
                better = better + jnp.where(theirs >= mine, 1.0, 0.0)
            elif other > group:
                better = better + jnp.where(theirs > mine, 1.0, 0.0)
        chosen = jnp.where(better < rule.topk_group, 1.0, 0.0)
        kept = kept.map_indexed(
            lambda e, old, x, g=group, c=chosen: jnp.where(inside(e, g) & (spread(c, x) > 0.5), x, old), selection
        )
    return kept


def _weigh(ids: list[Any], values: list[Any], rule: RoutingRule) -> list[Any]:
    """Weights of the chosen slots: of their scores, or of their logits when the rule scores after the choice."""
    if rule.weight == "softmax":
        top = jnp.where(ids[0] < 0, 0.0, values[0])
        weights = [jnp.exp(v - top) for v in values]
    elif rule.weight == "sigmoid":
        weights = [1.0 / (1.0 + jnp.exp(-v)) for v in values]
    else:
        weights = values
    weights = [jnp.where(i < 0, 0.0, w) for i, w in zip(ids, weights, strict=True)]
    if rule.renormalize or rule.weight == "softmax":
        total = weights[0]
        for weight in weights[1:]:
            total = total + weight
        total = total + rule.renorm_epsilon
        total = jnp.where(total > 0, total, 1.0)
        weights = [w / total for w in weights]
    return weights


def _sort(ids: list[Any], weights: list[Any]) -> tuple[list[Any], list[Any]]:
    """Slots by descending weight, then by lowest id; those without an expert last."""
    keys = [jnp.where(i < 0, NEVER, w) for i, w in zip(ids, weights, strict=True)]
    ranks = []
    for j, (id_j, key_j) in enumerate(zip(ids, keys, strict=True)):
        rank = jnp.zeros_like(key_j)
        for i, (id_i, key_i) in enumerate(zip(ids, keys, strict=True)):
            if i != j:
                first = (id_i < id_j) | (id_i == id_j) if i < j else (id_i < id_j)
                rank = rank + jnp.where((key_i > key_j) | ((key_i == key_j) & first), 1.0, 0.0)
        ranks.append(rank)
    slots = range(len(ids))

    def pick(values, slot):
        found = values[-1]
        for value, rank in zip(values[:-1], ranks[:-1], strict=True):
            found = jnp.where(rank == float(slot), value, found)
        return found

    return [pick(ids, s) for s in slots], [pick(weights, s) for s in slots]


def rounds(selection: Scores, scores: Scores, top_k: int, interpret: bool) -> tuple[list[Any], list[Any], Scores]:
    """The experts of the slots, -1 for none, and their `scores`; and the pairs as a matrix: 1 where an expert was chosen."""
    if not interpret:
        return _emitted_rounds(selection, scores, top_k)
    ids, values, left = [], [], selection
    for _ in range(top_k):
        best = left.max()
        expert = left.first(best)
        left = left.strike(expert)
        values.append(best if scores is selection else scores.at(expert))
        ids.append(jnp.where(best > NEVER, expert, -1))
    return ids, values, left.map(lambda x, before: jnp.where((x == NEVER) & (before > NEVER), 1, 0), selection)


def _emitted_rounds(selection: Scores, scores: Scores, top_k: int) -> tuple[list[Any], list[Any], Scores]:
    """`rounds` where a thread compares a score and its expert together: see `_compat_routing.best_in_turn`."""
    pieces, weighed = selection.pieces, [] if scores is selection else scores.pieces
    vector, rows = LAYOUT.reduce(1), (ROWS,)
    results = [
        plgpu.ShapeDtypeStruct(rows, kind, layout=vector) for kind in (jnp.int32, jnp.float32) for _ in range(top_k)
    ]
    results += [plgpu.ShapeDtypeStruct(piece.shape, jnp.int32, layout=LAYOUT) for piece in pieces]

    @plgpu.inline_mgpu(arg_types=(LAYOUT,) * (len(pieces) + len(weighed)), return_type=tuple(results))
    def run(ctx, *matrices):
        del ctx
        both = list(matrices[: len(pieces)]), list(matrices[len(pieces) :])
        return tuple(_compat_routing.best_in_turn(both[0], selection.starts, both[1] or None, top_k))

    found = list(run(*pieces, *weighed))
    return found[:top_k], found[top_k : 2 * top_k], Scores(found[2 * top_k :], selection.starts)


def select(
    raw: Scores,
    biases: Scores | None,
    experts: int,
    top_k: int,
    rule: RoutingRule,
    interpret: bool,
    pick: Any = None,
) -> tuple[list[Any], list[Any], Scores | None]:
    """(ids, weights): for each slot a vector over the tile's tokens; and the pairs as a matrix, if `rounds` has picked them.

    Args:
        raw: logits; columns past the last expert hold anything.
        biases: added to the scores for the selection.
        experts: number of experts.
        top_k: number of slots.
        rule: as in `moe_jax.ops.topk`.
        interpret: the kernel is interpreted.
        pick: gives the experts of the slots and their scores, instead of `rounds`.
    """
    # NaN compares false: it counts as -inf, "cannot be selected", as do the columns past the last expert.
    logits = raw.map_indexed(lambda e, x: jnp.where((x > NEVER) & (e < experts), jnp.minimum(x, LARGEST), NEVER))
    scores = _score(logits, rule.score)
    selection = scores if biases is None else scores.map(lambda x, b: x + b, biases)
    selection = selection.map(
        lambda x, logit: jnp.where((logit > NEVER) & (x > NEVER), jnp.minimum(x, LARGEST), NEVER), logits
    )
    if rule.num_expert_group > 1:
        selection = _keep_groups(selection, experts, rule)
    chosen, weighed = None, selection if biases is None else scores
    if pick is None:
        ids, values, chosen = rounds(selection, weighed, top_k, interpret)
    else:
        ids, values = pick(selection, weighed)
    weights = _weigh(ids, values, rule)
    if biases is not None:
        ids, weights = _sort(ids, weights)
    # Finite weights, whatever the scale and the logits.
    weights = [jnp.maximum(jnp.minimum(w * jnp.float32(rule.scale), LARGEST), -LARGEST) for w in weights]
    return ids, weights, chosen
