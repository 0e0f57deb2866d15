"""What an exchange is: it brings tokens to the ranks that have their experts, and the results back."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from moe_jax.config import MoEConfig
from moe_jax.ops.combine import combine
from moe_jax.parallel.config import ParallelConfig
from moe_jax.parallel.tokens import QuantizedTokens, quantize
from moe_jax.types import ExpertWeights, TopK


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prepared:
    """What an exchange brings to a rank, and what it must remember to bring the results back.

    Attributes:
        x: ``[M, H]``, the tokens that are here now, from all ranks that sent some; undefined where no slot of a token is local.
        topk: ids ``[M, k]``, global, -1 for none, and weights ``[M, k]``.
        expert_map: int32 ``[E]``, global to local id on this rank; None where each rank has a part of every expert.
        state: for `Exchange.finalize`.
        parallel: the ranks (static).
    """

    x: Float[Array, "M H"] | QuantizedTokens | Any
    topk: TopK
    expert_map: Int[Array, " E"] | Any | None
    state: Any = None
    parallel: ParallelConfig = field(default=ParallelConfig(), metadata={"static": True})


@dataclass(frozen=True)
class Exchange:
    """How tokens reach the ranks of their experts, and how the results return. Used inside `jax.shard_map`, rank by rank:

        prepared = exchange.prepare(x, topk, config, parallel, expert_map)
        y = ...  # [M, H]: the weighted sum, for each token of `prepared.x`, over those of its experts that live here
        out = exchange.finalize(y, prepared)  # [T, H]

    An exchange is a value: frozen and hashable.

    Attributes:
        quantize_before: quantize the hidden states where they are, so that codes and scales travel, not afterwards. For layers
            whose number format has quantized activations.
        activation_format: ``standard``: tokens ``[M, H]`` with their ids; ``batched``: rows ``[E_local, max_tokens, H]`` with
            counts.
        output_is_reduced: whether what `finalize` returns holds the results of all ranks, or a partial sum, to be added up over
            the `late_axes` of the ranks.
    """

    quantize_before: bool = field(default=False, kw_only=True)
    activation_format: ClassVar[str] = "standard"
    output_is_reduced: ClassVar[bool] = False

    def reason_against(self, parallel: ParallelConfig) -> str | None:
        """Why these ranks cannot use it; None if they can."""
        raise NotImplementedError

    def prepare(
        self,
        x: Float[Array, "T H"],
        topk: TopK,
        config: MoEConfig,
        parallel: ParallelConfig,
        expert_map: Int[Array, "ep E"] | None,
        num_tokens: Int[Array, ""] | None = None,
        *,
        num_local_experts: int | None = None,
        input_scale: Float[Array, ""] | None = None,
        implementation: str = "auto",
    ) -> Prepared:
        """Brings the tokens of all ranks to where their experts are.

        Args:
            x: ``[T, H]``, the tokens of this rank.
            topk: their experts, by global id; -1 for none.
            config: the layer.
            parallel: the ranks.
            expert_map: int32 ``[ep, E]``, of all ranks, see `ExpertPlacement`; None without expert parallelism.
            num_tokens: int32, how many of the T rows are tokens; the others visit no expert, whatever they hold.
            num_local_experts: experts that a rank has room for; only the batched format needs to know.
            input_scale: of a format whose activations have a static scale.
            implementation: ``auto``, ``xla``, ``mosaic`` or ``mosaic_interpret``.

        Raises:
            ValueError: ranks that cannot use this exchange; `quantize_before` without a format that quantizes activations.
        """
        reason = self.reason_against(parallel)
        if reason is not None:
            raise ValueError(f"{type(self).__name__} cannot be used here: {reason}")
        topk = only_tokens(topk, num_tokens)
        x, topk = weigh_input(x, topk, config, implementation)
        if self.quantize_before:
            x = quantize(x, topk, config, parallel.token_axes, input_scale, implementation)
        return self.send(x, topk, parallel, expert_map)

    def send(
        self, x: Array | QuantizedTokens, topk: TopK, parallel: ParallelConfig, expert_map: Int[Array, "ep E"] | None
    ) -> Prepared:
        """The communication of `prepare`."""
        raise NotImplementedError

    def finalize(self, y: Float[Array, "M H"], prepared: Prepared) -> Float[Array, "T H"]:
        """Brings the results back to the ranks of their tokens and adds them up."""
        raise NotImplementedError


def late_axes(parallel: ParallelConfig) -> tuple[str, ...]:
    """Axes of the mesh along which ranks hold the same tokens and other weights: partial sums are added up over them.

    Example:
        >>> late_axes(ParallelConfig(tp_size=2, dp_size=2))
        ('tp',)
        >>> late_axes(ParallelConfig(tp_size=2, dp_size=2, enable_expert_parallel=True, sequence_parallel=True))
        ()
    """
    return tuple(axis for axis in parallel.expert_axes if axis not in parallel.token_axes)


def only_tokens(topk: TopK, num_tokens: Int[Array, ""] | None) -> TopK:
    """Without experts for the rows past the tokens.

    Example:
        >>> topk = TopK(jnp.array([[1], [0]]), jnp.ones((2, 1)))
        >>> only_tokens(topk, jnp.int32(1)).ids.tolist()
        [[1], [-1]]
    """
    if num_tokens is None:
        return topk
    return TopK(rows_of_tokens(topk.ids, num_tokens, -1), rows_of_tokens(topk.weights, num_tokens))


def rows_of_tokens(
    array: Shaped[Array, "T N"], num_tokens: Int[Array, ""] | None, fill: int = 0
) -> Shaped[Array, "T N"]:
    """The array with `fill` in the rows past the tokens: whatever they hold, NaN too, reaches no result and no derivative.

    Example:
        >>> rows_of_tokens(jnp.array([[1.0], [jnp.nan]]), jnp.int32(1)).tolist()
        [[1.0], [0.0]]
    """
    if num_tokens is None:
        return array
    real = jnp.arange(array.shape[0], dtype=jnp.int32) < num_tokens
    return jnp.where(real[:, None], array, fill)


def weigh_input(x: Float[Array, "T H"], topk: TopK, config: MoEConfig, implementation: str) -> tuple[Array, TopK]:
    """The router's weights multiplied with the hidden states, where the layer says so, and then 1 for the results."""
    if not config.apply_router_weight_on_input:
        return x, topk
    tokens = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None]  # k = 1: each token is its own one-row sum
    x = combine(x, tokens, topk.weights, implementation=implementation)
    return x, topk._replace(weights=jnp.ones_like(topk.weights))


def of_rank(config: MoEConfig, experts: ExpertWeights) -> MoEConfig:
    """The layer as the experts of a rank see it, after `Exchange.prepare`: their part of I, inputs weighed already."""
    return dataclasses.replace(config, intermediate_size=experts.w2.shape[-1], apply_router_weight_on_input=False)


def map_of_rank(expert_map: Int[Array, "ep E"] | None, parallel: ParallelConfig) -> Array | None:
    """The row of this rank."""
    return None if expert_map is None else jnp.asarray(expert_map)[parallel.rank()]
