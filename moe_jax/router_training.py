"""What training does around a router: noise on its inputs, and a limit to what an expert takes."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt32

from moe_jax.config import MoEConfig
from moe_jax.types import TopK

DROP_POLICIES = ("order", "weight")


def jitter(x: Float[Array, "*T H"], key: PRNGKeyArray | UInt32[Array, "2"], eps: float = 1e-2) -> Float[Array, "*T H"]:
    """The inputs of a router times uniform noise in ``[1 - eps, 1 + eps)``, drawn in float32; the dtype stays.

    Only the router's copy of the hidden states is meant to get it, not that of the experts, and only in training.

    Args:
        x: hidden states.
        key: random key; another one each step.
        eps: half the width; 0 gives x itself.

    Source: Fedus et al. 2021 (Switch Transformer, https://arxiv.org/abs/2101.03961), section 2.4.

    Example:
        >>> noisy = jitter(jnp.ones((2, 3)), jax.random.key(0), eps=0.1)
        >>> bool(jnp.all(jnp.abs(noisy - 1) <= 0.1)), bool(jnp.any(noisy != 1))
        (True, True)
    """
    if not 0 <= eps < 1:
        raise ValueError(f"eps={eps} must lie in [0, 1): it is how far the factors may be from 1; 1e-2 is usual")
    if eps == 0:
        return x
    noise = jax.random.uniform(key, x.shape, jnp.float32, 1.0 - eps, 1.0 + eps)
    return (x.astype(jnp.float32) * noise).astype(x.dtype)


def expert_capacity(num_tokens: int, config: MoEConfig, capacity_factor: float) -> int:
    """Pairs that an expert takes: its even share of ``T * k`` times `capacity_factor`, rounded up, T at most.

    Example:
        >>> config = MoEConfig(num_experts=8, top_k=2, hidden_size=16, intermediate_size=16)
        >>> expert_capacity(100, config, 1.25)
        32
    """
    if not (math.isfinite(capacity_factor) and capacity_factor > 0):
        raise ValueError(
            f"capacity_factor={capacity_factor} must be positive and finite; 1.25 is usual, None drops nothing"
        )
    return min(num_tokens, math.ceil(capacity_factor * num_tokens * config.top_k / config.num_experts))


def drop_over_capacity(
    topk: TopK, num_experts: int, capacity: int, *, keep: str = "order"
) -> tuple[TopK, Int[Array, ""]]:
    """Each expert keeps at most `capacity` of its pairs; the others get id -1 and weight 0, so that they add exactly nothing.

    The weights that stay are not changed: a token that lost an expert comes out smaller, one that lost all comes out as zero (its
    residual connection carries it). Shapes are those of `topk`, whatever is dropped.

    Args:
        topk: from `moe_jax.route`.
        num_experts: E.
        capacity: pairs that an expert takes, from `expert_capacity`.
        keep: which pairs an expert keeps: ``order``, its first in the order of tokens; ``weight``, those of the largest router
            weight, the first of equal ones.

    Returns:
        What is left, slots without expert last, and how many pairs were dropped (int32; pairs that had no expert before do not
        count). Gradients reach the weights that stay.

    Raises:
        ValueError: a negative capacity, or a policy that does not exist.

    Sources: Lepikhin et al. 2020 (GShard), Fedus et al. 2021 (capacity); Riquelme et al. 2021 (priority by weight).

    Example:
        >>> topk = TopK(jnp.array([[0, 1], [0, 2], [0, 1]]), jnp.array([[0.6, 0.4], [0.9, 0.1], [0.7, 0.3]]))
        >>> kept, dropped = drop_over_capacity(topk, 3, capacity=2)
        >>> kept.ids.tolist(), int(dropped)
        ([[0, 1], [0, 2], [1, -1]], 1)
        >>> drop_over_capacity(topk, 3, capacity=2, keep="weight")[0].ids.tolist()
        [[1, -1], [0, 2], [0, 1]]
    """
    if keep not in DROP_POLICIES:
        raise ValueError(f"keep={keep!r} must be one of {', '.join(DROP_POLICIES)}")
    if capacity < 0:
        raise ValueError(f"capacity={capacity} must not be negative: it is how many pairs an expert keeps")
    shape = topk.ids.shape
    has_expert = (topk.ids >= 0) & (topk.ids < num_experts)
    ids = jnp.where(has_expert, topk.ids, num_experts).reshape(-1)

    # Sorted by expert, and within one by priority (the sorts are stable), the place of a pair is how far it is from the
    # first of its expert.
    if keep == "order":
        order = jnp.argsort(ids, stable=True)
    else:
        order = jnp.lexsort((-lax.stop_gradient(topk.weights).reshape(-1), ids))
    sorted_ids = ids[order]
    first = jnp.searchsorted(sorted_ids, jnp.arange(num_experts + 1))
    place = jnp.arange(ids.size) - first[sorted_ids]
    kept = jnp.zeros(ids.shape, bool).at[order].set(place < capacity).reshape(shape) & has_expert

    last = jnp.argsort(~kept, axis=-1, stable=True)
    new_ids = jnp.take_along_axis(jnp.where(kept, topk.ids, -1), last, axis=-1)
    weights = jnp.take_along_axis(jnp.where(kept, topk.weights, 0.0), last, axis=-1)
    return TopK(new_ids.astype(jnp.int32), weights), jnp.sum(has_expert & ~kept, dtype=jnp.int32)
