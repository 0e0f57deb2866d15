"""No exchange: every rank has all the tokens that its experts can get."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Array, Float, Int

from moe_jax.parallel.config import ParallelConfig
from moe_jax.parallel.exchange import Exchange, Prepared, map_of_rank
from moe_jax.parallel.tokens import QuantizedTokens
from moe_jax.types import TopK


@dataclass(frozen=True)
class NoExchange(Exchange):
    """All ranks hold the same tokens: nothing travels, and the output is a partial sum.

    Example:
        >>> NoExchange().reason_against(ParallelConfig(tp_size=2)) is None
        True
    """

    def reason_against(self, parallel: ParallelConfig) -> str | None:
        """Tokens that differ between ranks."""
        if not parallel.token_axes:
            return None
        return (
            f"tokens are split over the axes {parallel.token_axes}, and some of their experts, or parts of these, are on other "
            "ranks; use AllGatherReduceScatter()"
        )

    def send(
        self, x: Array | QuantizedTokens, topk: TopK, parallel: ParallelConfig, expert_map: Int[Array, "ep E"] | None
    ) -> Prepared:
        """What is here."""
        return Prepared(x, topk, map_of_rank(expert_map, parallel), parallel=parallel)

    def finalize(self, y: Float[Array, "T H"], prepared: Prepared) -> Float[Array, "T H"]:
        """A partial sum, over the experts of this rank or its part of every expert."""
        return y
