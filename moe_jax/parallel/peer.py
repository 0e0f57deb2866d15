"""Tokens straight into the memory of other GPUs, and results straight back: two kernels of our own, no collective."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from moe_jax.ops.combine import combine
from moe_jax.ops.exchange import send_rows
from moe_jax.parallel.all_to_all import AllToAll, peer_maps, who_gets
from moe_jax.parallel.config import ParallelConfig
from moe_jax.parallel.exchange import Prepared, map_of_rank
from moe_jax.parallel.tokens import QuantizedTokens
from moe_jax.types import TopK


@dataclass(frozen=True)
class PeerExchange(AllToAll):
    """`AllToAll` by `moe_jax.ops.exchange.send_rows`, for GPUs of one host that reach each other.

    A token keeps its number: rank r writes it into row ``r * T + t`` of every rank that has one of its experts, and its results
    come back into row ``r * T + t`` of rank r's own. So nobody needs to know how many others send. Ids and weights of all tokens
    go to all ranks with the rows; what is not for a rank its expert map drops.

    Attributes:
        implementation: of `send_rows`.

    Example:
        >>> PeerExchange().reason_against(ParallelConfig(dp_size=2, enable_expert_parallel=True)) is None
        True
    """

    implementation: str = "auto"

    def send(
        self, x: Array | QuantizedTokens, topk: TopK, parallel: ParallelConfig, expert_map: Int[Array, "ep E"] | None
    ) -> Prepared:
        """The tokens of rank r from row ``r * T`` on."""
        axes, (tokens, top_k) = parallel.token_axes, topk.ids.shape
        maps = peer_maps(expert_map, parallel)
        sends = who_gets(topk.ids, maps)
        ranks, me = sends.shape[1], lax.axis_index(axes)
        rows = ranks * tokens
        there = jnp.arange(ranks, dtype=jnp.int32)[None] * rows + me * tokens + _numbers(tokens)
        leaves, tree = jax.tree.flatten(x)
        travelling = [leaf.ndim == 2 for leaf in leaves]  # what all tokens share stays
        moved, notes = send_rows(
            [leaf for leaf, goes in zip(leaves, travelling, strict=True) if goes],
            jnp.where(sends, there, -1),
            num_rows=rows,
            axis_names=axes,
            notes=_notes(topk),
            implementation=self.implementation,
        )
        arrived = iter(moved)
        x = jax.tree.unflatten(
            tree, [next(arrived) if goes else leaf for leaf, goes in zip(leaves, travelling, strict=True)]
        )
        ids, weights = jnp.split(notes.reshape(rows, 2 * top_k), 2, axis=1)
        mine, ids = map_of_rank(expert_map, parallel), ids.astype(jnp.int32)
        here = who_gets(ids, mine[None])
        topk = TopK(jnp.where(here, ids, -1), weights)
        return Prepared(x, topk, mine, (sends, here), parallel)

    def back(
        self, y: Float[Array, "M H"], state: tuple[Bool[Array, "T R"], Bool[Array, "M 1"]], axes: tuple[str, ...]
    ) -> Float[Array, "T H"]:
        """As in `AllToAll`; `state` is who of the tokens goes where, and which rows came here."""
        (sends, here), (tokens, ranks) = state, state[0].shape
        me, rank = lax.axis_index(axes), jnp.arange(ranks, dtype=jnp.int32)[None]
        there = (rank * (ranks * tokens) + me * tokens + _numbers(tokens)).T.reshape(-1, 1)
        options = {"axis_names": axes, "implementation": self.implementation}
        (rows,), _ = send_rows([y], jnp.where(here, there, -1), num_rows=ranks * tokens, **options)
        positions = jnp.where(sends, rank * tokens + _numbers(tokens), -1)
        return combine(rows, positions, None, implementation=self.implementation)


def _numbers(tokens: int) -> Int[Array, "T 1"]:
    return jnp.arange(tokens, dtype=jnp.int32)[:, None]


def _notes(topk: TopK) -> Float[Array, "T twice_k"]:
    """Ids, as numbers that float32 holds exactly, then weights: in one array, which has a derivative."""
    return jnp.concatenate([topk.ids.astype(jnp.float32), topk.weights.astype(jnp.float32)], axis=1)
