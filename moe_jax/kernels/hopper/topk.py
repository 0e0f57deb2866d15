"""Routing on Hopper: scores, grouped and biased selection, weights and their order, in one kernel.

A CTA takes 64 tokens; their logits stay in registers in the layout of wgmma's accumulator, four threads a row, so that the k
rounds of "row maximum, lowest index that has it, strike it out" need no shared memory. All arithmetic is float32.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from moe_jax import _compat
from moe_jax.routing_methods import RoutingRule

_ROWS = 64
_COLUMNS = 256  # TMA's limit per dimension: more experts come in several pieces
_MAX_EXPERTS = 512
_MAX_TOP_K = 32
_WGMMA = plgpu.Layout.WGMMA
_LARGEST = float(jnp.finfo(jnp.float32).max)
_NEVER = -float("inf")


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


def _rows(vector: Any, like: Any) -> Any:
    """A value per token, repeated over the experts."""
    return lax.broadcast_in_dim(vector, like.shape, [0])


class _Scores:
    """A [64, E] matrix in registers, as pieces of at most 256 columns."""

    def __init__(self, pieces: list[Any], starts: list[int]):
        self.pieces, self.starts = pieces, starts
        self.experts = [
            plgpu.broadcasted_iota(jnp.int32, piece.shape, 1, layout=_WGMMA) + start
            for piece, start in zip(pieces, starts, strict=True)
        ]

    def map(self, fn: Any, *others: _Scores) -> _Scores:
        return _Scores([fn(*xs) for xs in zip(self.pieces, *(o.pieces for o in others), strict=True)], self.starts)

    def map_indexed(self, fn: Any, *others: _Scores) -> _Scores:
        zipped = zip(self.experts, self.pieces, *(o.pieces for o in others), strict=True)
        return _Scores([fn(*xs) for xs in zipped], self.starts)

    def reduce(self, along: Any, combine: Any) -> Any:
        total = along(self.pieces[0], axis=1)
        for piece in self.pieces[1:]:
            total = combine(total, along(piece, axis=1))
        return total

    def max(self) -> Any:
        return self.reduce(jnp.max, jnp.maximum)

    def sum(self) -> Any:
        return self.reduce(jnp.sum, jnp.add)

    def first(self, value: Any) -> Any:
        """The lowest expert whose score is `value`."""
        none = -(2 * _MAX_EXPERTS)
        hits = self.map_indexed(lambda e, x: jnp.where(x == _rows(value, x), -e, none))
        return -hits.max()

    def at(self, expert: Any) -> Any:
        return self.map_indexed(lambda e, x: jnp.where(e == _rows(expert, x), x, 0.0)).sum()

    def strike(self, expert: Any) -> _Scores:
        return self.map_indexed(lambda e, x: jnp.where(e == _rows(expert, x), _NEVER, x))


def _score(logits: _Scores, score: str) -> _Scores:
    """Scores of clamped logits; -inf marks what cannot be selected and scores 0 where a score is a probability."""
    if score == "identity":
        return logits
    if score == "softmax":
        top = jnp.maximum(logits.max(), -_LARGEST)
        e = logits.map(lambda x: jnp.exp(x - _rows(top, x)))
        total = e.sum()
        return e.map(lambda x: x / _rows(jnp.where(total > 0, total, 1.0), x))
    if score == "sigmoid":
        return logits.map(lambda x: 1.0 / (1.0 + jnp.exp(-x)))
    assert score == "sqrtsoftplus", score

    def sqrtsoftplus(x):
        small = jnp.exp(-jnp.abs(x))
        above = 1.0 + small  # log(1 + small) to full precision: the rounding of the sum cancels in the quotient
        log1p = jnp.where(above == 1.0, small, jnp.log(above) * (small / jnp.where(above == 1.0, 1.0, above - 1.0)))
        return jnp.sqrt(jnp.maximum(x, 0.0) + log1p)

    return logits.map(sqrtsoftplus)


def _keep_groups(selection: _Scores, experts: int, rule: RoutingRule) -> _Scores:
    """Strikes out the experts of all but the best `topk_group` groups."""
    size = experts // rule.num_expert_group

    def inside(e, group):
        return (e >= group * size) & (e < (group + 1) * size)

    quality = []
    for group in range(rule.num_expert_group):
        members = selection.map_indexed(lambda e, x, g=group: jnp.where(inside(e, g), x, _NEVER))
        best = members.max()
        if rule.group_score == "top2_sum":
            second = members.strike(members.first(best)).max()
            best = best + second
        quality.append(best)
    kept = selection.map(lambda x: jnp.full_like(x, _NEVER))
    for group, mine in enumerate(quality):
        better = jnp.zeros_like(mine)
        for other, theirs in enumerate(quality):
            if other < group:
                better = better + jnp.where(theirs >= mine, 1.0, 0.0)
            elif other > group:
                better = better + jnp.where(theirs > mine, 1.0, 0.0)
        chosen = jnp.where(better < rule.topk_group, 1.0, 0.0)
        kept = kept.map_indexed(
            lambda e, old, x, g=group, c=chosen: jnp.where(inside(e, g) & (_rows(c, x) > 0.5), x, old), selection
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
    keys = [jnp.where(i < 0, _NEVER, w) for i, w in zip(ids, weights, strict=True)]
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


def topk(
    router_logits: Float[Array, "T E"],
    top_k: int,
    rule: RoutingRule,
    correction_bias: Float[Array, "E"] | None = None,
    *,
    interpret: Any = None,
) -> tuple[Int[Array, "T k"], Float[Array, "T k"]]:
    """(ids, weights) as `moe_jax.ops.topk` defines them."""
    tokens, experts = router_logits.shape
    dtype = router_logits.dtype
    starts = list(range(0, experts, _COLUMNS))
    widths = [pl.cdiv(min(_COLUMNS, experts - start), 8) * 8 for start in starts]
    # A copy must move a multiple of 128 bytes: 64 rows of at least 8 elements of 2 bytes always do.
    tail = tokens % _ROWS

    def route_topk(logits_g, *refs):
        bias_g = refs[0] if correction_bias is not None else None
        refs = refs[int(correction_bias is not None) :]
        ids_g, weights_g = refs[:2]
        ids_s, weights_s = refs[2:4]
        loaded = refs[4]
        logits_s = refs[5 : 5 + len(starts)]
        bias_s = refs[5 + len(starts) :]
        block = lax.axis_index("block")
        first = block * _ROWS
        for start, width, piece in zip(starts, widths, logits_s, strict=True):
            # Past the end TMA fills with zeros; the column index, made dynamic, may point there.
            source = logits_g.at[pl.ds(first, _ROWS), pl.ds(start + block * 0, width)]
            plgpu.copy_gmem_to_smem(source, piece, loaded)
        if bias_g is not None:
            for start, piece in zip(starts, bias_s, strict=True):
                plgpu.copy_gmem_to_smem(bias_g.at[pl.ds(start + block * 0, piece.shape[0])], piece, loaded)
        plgpu.barrier_wait(loaded)

        raw = _Scores([plgpu.load(p, layout=_WGMMA, optimized=False).astype(jnp.float32) for p in logits_s], starts)
        # NaN compares false: it counts as -inf, "cannot be selected", as do the columns past the last expert.
        logits = raw.map_indexed(lambda e, x: jnp.where((x > _NEVER) & (e < experts), jnp.minimum(x, _LARGEST), _NEVER))
        scores = _score(logits, rule.score)
        selection = scores
        if bias_g is not None:
            rows = [plgpu.load(p.at[pl.ds(0, w)], layout=_WGMMA.reduce(0)) for p, w in zip(bias_s, widths, strict=True)]
            biases = _Scores([lax.broadcast_in_dim(r, (_ROWS, r.shape[0]), [1]) for r in rows], starts)
            selection = scores.map(lambda x, b: x + b, biases)
        selection = selection.map(
            lambda x, logit: jnp.where((logit > _NEVER) & (x > _NEVER), jnp.minimum(x, _LARGEST), _NEVER), logits
        )
        if rule.num_expert_group > 1:
            selection = _keep_groups(selection, experts, rule)

        ids, values = [], []
        for _ in range(top_k):
            best = selection.max()
            expert = selection.first(best)
            selection = selection.strike(expert)
            values.append(best if bias_g is None else scores.at(expert))
            ids.append(jnp.where(best > _NEVER, expert, -1))
        weights = _weigh(ids, values, rule)
        if bias_g is not None:
            ids, weights = _sort(ids, weights)
        # Finite weights, whatever the scale and the logits.
        weights = [jnp.maximum(jnp.minimum(w * jnp.float32(rule.scale), _LARGEST), -_LARGEST) for w in weights]

        full = first + _ROWS <= tokens

        @pl.when(full)
        def _():
            for slot in range(top_k):
                _compat.store_scattered(ids_g.at[pl.ds(first, _ROWS), slot], ids[slot])
                _compat.store_scattered(weights_g.at[pl.ds(first, _ROWS), slot], weights[slot])

        if tail:

            @pl.when(jnp.logical_not(full))
            def _():
                for slot in range(top_k):
                    ids_s[slot] = ids[slot]
                    weights_s[slot] = weights[slot]

                @plgpu.warp_map
                def _(warp):
                    @pl.loop(0, lax.div(tail - warp + 3, 4))
                    def _(i):
                        row = warp + i * 4
                        for slot in range(top_k):
                            ids_g[first + row, slot] = ids_s[slot, row]
                            weights_g[first + row, slot] = weights_s[slot, row]

    operands = [router_logits] if correction_bias is None else [router_logits, correction_bias.astype(jnp.float32)]
    bias_widths = [pl.cdiv(w, 32) * 32 for w in widths] if correction_bias is not None else []
    return _compat.kernel(
        route_topk,
        out_type=(
            jax.ShapeDtypeStruct((tokens, top_k), jnp.int32),
            jax.ShapeDtypeStruct((tokens, top_k), jnp.float32),
        ),
        grid=(pl.cdiv(tokens, _ROWS),),
        grid_names=("block",),
        scratch_types=[
            plgpu.SMEM((top_k, _ROWS), jnp.int32),
            plgpu.SMEM((top_k, _ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=len(starts) + len(bias_widths)),
            *[plgpu.SMEM((_ROWS, width), dtype) for width in widths],
            *[plgpu.SMEM((width,), jnp.float32) for width in bias_widths],
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=_compat.LANE),
        interpret=interpret,
    )(*operands)
