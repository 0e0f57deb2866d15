"""All-to-all of tokens: each goes once to every rank that has one of its experts, and their results return to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from moe_jax.parallel import rows
from moe_jax.parallel.config import ParallelConfig
from moe_jax.parallel.exchange import Exchange, Prepared, late_axes, map_of_rank
from moe_jax.parallel.tokens import QuantizedTokens, travel
from moe_jax.types import TopK


@dataclass(frozen=True)
class AllToAll(Exchange):
    """Each token goes once to every rank that has one of its experts; a rank's weighted sum for it returns as one row.

    Every rank has room for all the tokens of all the others. Only rows that were sent travel, on NVIDIA GPUs
    (`jax.lax.ragged_all_to_all`). The sum over ranks is in float32 and in their order.

    Example:
        >>> AllToAll().reason_against(ParallelConfig(dp_size=2, enable_expert_parallel=True)) is None
        True
    """

    output_is_reduced: ClassVar[bool] = True

    def reason_against(self, parallel: ParallelConfig) -> str | None:
        """Tokens that are everywhere, or experts that are."""
        if not parallel.token_axes:
            return "all ranks hold the same tokens; use NoExchange()"
        if not parallel.use_ep:
            return "every rank has a part of every expert, so that all tokens would go everywhere; use AllGatherReduceScatter()"
        return None

    def send(
        self, x: Array | QuantizedTokens, topk: TopK, parallel: ParallelConfig, expert_map: Int[Array, "ep E"] | None
    ) -> Prepared:
        """The tokens that each rank sent here, those of rank r from row ``r * T`` on."""
        axes = parallel.token_axes
        sends = who_gets(topk.ids, peer_maps(expert_map, parallel))
        arrived = rows.received(sends, axes)[..., None]

        def flat(blocks: Array) -> Array:
            return blocks.reshape(-1, *blocks.shape[2:])

        x = travel(lambda array: flat(rows.dispatch(array, sends, axes)), x)
        ids, weights = rows.dispatch(tuple(topk), sends, axes)
        topk = TopK(flat(jnp.where(arrived, ids, -1)), flat(jnp.where(arrived, weights, 0.0)))
        return Prepared(x, topk, map_of_rank(expert_map, parallel), sends, parallel)

    def finalize(self, y: Float[Array, "M H"], prepared: Prepared) -> Float[Array, "T H"]:
        """The whole sum, also over ranks that hold the same tokens."""
        late = late_axes(prepared.parallel)
        out = self.back(y, prepared.state, prepared.parallel.token_axes)
        return lax.psum(out, late) if late else out

    def back(self, y: Float[Array, "M H"], state: Any, axes: tuple[str, ...]) -> Float[Array, "T H"]:
        """The sum of what the ranks of each token send back, of what `send` remembered: in float32 and in their order."""
        return rows.combine(y.reshape(*state.shape[::-1], y.shape[1]), state, axes)


def peer_maps(expert_map: Int[Array, "ep E"], parallel: ParallelConfig) -> Int[Array, "R E"]:
    """The maps of the ranks that this one exchanges tokens with: one for each shard of tokens, itself among them.

    Ranks that hold the same tokens each exchange with their like: the others' experts are the late reduce's business.
    """
    late = late_axes(parallel)
    maps = jnp.asarray(expert_map).reshape(parallel.num_token_shards, -1, expert_map.shape[1])
    return maps[:, lax.axis_index(late) if late else 0]


def who_gets(ids: Int[Array, "T k"], maps: Int[Array, "R E"]) -> Bool[Array, "T R"]:
    """Whether a token has an expert on each rank.

    Example:
        >>> maps = jnp.array([[0, 1, -1], [-1, -1, 0]])
        >>> who_gets(jnp.array([[0, 1], [2, 1], [-1, -1]]), maps).tolist()
        [[True, False], [True, True], [False, False]]
    """
    num_experts = maps.shape[1]
    known = (ids >= 0) & (ids < num_experts)
    owned = maps.T[jnp.where(known, ids, 0)] >= 0  # [T, k, R]
    return jnp.any(owned & known[..., None], axis=1)
