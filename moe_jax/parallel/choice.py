"""Which exchange the ranks of a mesh use, and why no better one."""

from __future__ import annotations

from typing import NamedTuple

from jax.sharding import AbstractMesh, Mesh

from moe_jax.parallel.all_to_all import AllToAll
from moe_jax.parallel.config import ParallelConfig
from moe_jax.parallel.exchange import Exchange
from moe_jax.parallel.gather_scatter import AllGatherReduceScatter
from moe_jax.parallel.no_exchange import NoExchange


class Choice(NamedTuple):
    """An exchange, and the reason for it."""

    exchange: Exchange
    reason: str


def choose_exchange(parallel: ParallelConfig, mesh: Mesh | AbstractMesh | None = None) -> Choice:
    """The exchange of these ranks."""
    if not parallel.token_axes:
        return Choice(NoExchange(), "all ranks hold the same tokens")
    if parallel.use_ep:
        return Choice(AllToAll(), "tokens go to the ranks of their experts")
    return Choice(AllGatherReduceScatter(), "every rank has a part of every expert")
