"""All-gather of tokens, reduce-scatter of results: works for any ranks, with or without expert parallelism."""

from __future__ import annotations

from dataclasses import dataclass

import jax
from jax import lax
from jaxtyping import Array, Float, Int

from moe_jax.parallel.config import ParallelConfig
from moe_jax.parallel.exchange import Exchange, Prepared, map_of_rank
from moe_jax.parallel.tokens import QuantizedTokens, travel
from moe_jax.types import TopK


@dataclass(frozen=True)
class AllGatherReduceScatter(Exchange):
    """Every rank gets the tokens of all, and each token's results are added up on their way home.

    Among ranks that hold the same tokens the output is a partial sum.

    Source: vLLM's ``allgather_reducescatter``.

    Example:
        >>> AllGatherReduceScatter().reason_against(ParallelConfig(tp_size=2, dp_size=2)) is None
        True
    """

    def reason_against(self, parallel: ParallelConfig) -> str | None:
        """Nothing."""
        return None

    def send(
        self, x: Array | QuantizedTokens, topk: TopK, parallel: ParallelConfig, expert_map: Int[Array, "ep E"] | None
    ) -> Prepared:
        """Tokens, ids and weights of all ranks, in their order."""

        def gather(array: Array) -> Array:
            return lax.all_gather(array, parallel.token_axes, tiled=True) if parallel.token_axes else array

        return Prepared(
            travel(gather, x), jax.tree.map(gather, topk), map_of_rank(expert_map, parallel), parallel=parallel
        )

    def finalize(self, y: Float[Array, "M H"], prepared: Prepared) -> Float[Array, "T H"]:
        """The sum over the ranks whose tokens were gathered, each token's on its own rank."""
        axes = prepared.parallel.token_axes
        return lax.psum_scatter(y, axes, scatter_dimension=0, tiled=True) if axes else y
