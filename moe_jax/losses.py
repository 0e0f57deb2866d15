"""What keeps a router healthy while it is trained: losses, the bias that balances without a loss, and statistics of loads.

All functions are pure. Ids of -1 (padding, tokens without an expert) never count, and a token without any expert has no part in a
loss: its logits may be anything, NaN included. Where tokens are dropped for lack of capacity, give the ids that the router chose
(those before `moe_jax.router_training.drop_over_capacity`): a loss on what was left would not see the overload.

Losses come without their coefficient: multiply and add.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Num

AxisName = str | tuple[str, ...]

_LARGEST = float(jnp.finfo(jnp.float32).max)


def load_balancing_loss(
    router_logits: Float[Array, "T E"],
    topk_ids: Int[Array, "T k"],
    *,
    score: str = "softmax",
    axis_name: AxisName | None = None,
) -> Float[Array, ""]:
    """The load-balancing loss of the Switch Transformer, for any k: 1 when the experts are evenly chosen.

    ``E * sum_i f_i * P_i``: ``f_i`` is the share of the (token, slot) pairs that chose expert i, ``P_i`` the mean probability
    that the router gives it. Only ``P`` has a gradient. At its largest, all tokens on one expert with certainty, it is E.
    Hugging Face's ``load_balancing_loss_func`` counts pairs per token and is k times as large.

    Args:
        router_logits: ``[T, E]``.
        topk_ids: ``[T, k]``, what the router chose, -1 for none.
        score: what makes logits probabilities: ``softmax``, or ``sigmoid`` or ``sqrtsoftplus`` divided by their sum.
        axis_name: inside `jax.shard_map`, the axis over which tokens are split: the shares ``f`` are then those of the global
            batch, and the mean over the ranks of what each of them gets, or of its gradients, is that of the global batch, also
            where ranks have different numbers of tokens. In a `jax.jit` over sharded arrays leave it None: there the batch is
            global already.

    Raises:
        ValueError: an unknown `score`, or shapes that do not fit.

    Sources: Fedus et al. 2021 (https://arxiv.org/abs/2101.03961, equations 4 to 6); shares of the global batch: Qiu et al. 2025
    (https://arxiv.org/abs/2501.11873).

    Example:
        >>> logits = jnp.array([[2.0, 0.0], [0.0, 2.0], [9.0, 9.0]])
        >>> round(float(load_balancing_loss(logits, jnp.array([[0], [1], [-1]]))), 3)  # balanced; the last token is padding
        1.0
        >>> round(float(load_balancing_loss(jnp.array([[9.0, 0.0], [8.0, 0.0]]), jnp.array([[0], [0]]))), 3)
        2.0
    """
    loads, probabilities, tokens = _loads_and_probabilities(router_logits, topk_ids, score)
    ranks = 1
    if axis_name is not None:
        loads, tokens = lax.psum((loads, tokens), axis_name)
        ranks = lax.psum(1, axis_name)
    return _product(loads, probabilities, tokens / ranks)


def sequence_balance_loss(
    router_logits: Float[Array, "B S E"], topk_ids: Int[Array, "B S k"], *, score: str = "sigmoid"
) -> Float[Array, ""]:
    """The sequence-wise balance loss of DeepSeek-V3: `load_balancing_loss` of each sequence, averaged over those with tokens.

    Args:
        router_logits: ``[B, S, E]``.
        topk_ids: ``[B, S, k]``, -1 for none.
        score: as in `load_balancing_loss`; DeepSeek-V3 divides sigmoids by their sum.

    Raises:
        ValueError: an unknown `score`, or shapes that do not fit.

    Source: the DeepSeek-V3 report, equations 17 to 20 (https://arxiv.org/abs/2412.19437); its coefficient is 1e-4.

    Example:
        >>> ids = jnp.array([[[0], [1]], [[0], [0]]])
        >>> logits = 20.0 * jax.nn.one_hot(ids[..., 0], 2) - 10.0
        >>> round(float(sequence_balance_loss(logits, ids)), 3)  # 1 for the first sequence, 2 for the second
        1.5
    """
    if router_logits.ndim != 3 or topk_ids.ndim != 3:
        raise ValueError(
            f"router_logits {router_logits.shape} and topk_ids {topk_ids.shape} must be [B, S, E] and [B, S, k]: "
            "keep the axis of sequences, or use load_balancing_loss"
        )

    def one(logits: Array, ids: Array) -> tuple[Array, Array]:
        loads, probabilities, tokens = _loads_and_probabilities(logits, ids, score)
        return _product(loads, probabilities, tokens), tokens > 0

    losses, present = jax.vmap(one)(router_logits, topk_ids)
    return jnp.sum(losses) / jnp.maximum(jnp.sum(present), 1)


def router_z_loss(router_logits: Float[Array, "*T E"], topk_ids: Int[Array, "*T k"] | None = None) -> Float[Array, ""]:
    """The router z-loss of ST-MoE: the mean over tokens of ``logsumexp(logits) ** 2``, which keeps logits small.

    Args:
        router_logits: ``[..., E]``.
        topk_ids: ``[..., k]``, to leave out tokens without an expert; None: every token counts.

    Source: Zoph et al. 2022 (https://arxiv.org/abs/2202.08906, equation 5); its coefficient is 1e-3.

    Example:
        >>> round(float(router_z_loss(jnp.zeros((3, 8)))), 4)  # log(8) ** 2
        4.3241
    """
    present = jnp.ones(router_logits.shape[:-1], bool) if topk_ids is None else jnp.any(topk_ids >= 0, axis=-1)
    total = jax.nn.logsumexp(_clean(router_logits, present), axis=-1)
    return jnp.sum(jnp.where(present, total**2, 0.0)) / jnp.maximum(jnp.sum(present), 1)


def update_correction_bias(
    correction_bias: Float[Array, "*L E"], loads: Num[Array, "*L E"], rate: float | Float[Array, ""] = 1e-3
) -> Float[Array, "*L E"]:
    """The step of DeepSeek-V3's balancing without a loss: the bias of overloaded experts falls, that of the others rises.

    ``bias + rate * sign(mean(loads) - loads)``, once a training step, with the loads of the whole batch. The bias takes part in
    the selection of experts only (`moe_jax.route`, ``correction_bias``), so it has no gradient.

    Args:
        correction_bias: float32 ``[E]``, or ``[L, E]`` for stacked layers.
        loads: of the same shape, from `expert_loads`.
        rate: the size of the step (gamma); DeepSeek-V3 takes 1e-3, and 0 in the end.

    Source: Wang et al. 2024 (https://arxiv.org/abs/2408.15664); the DeepSeek-V3 report, section 2.1.2.

    Example:
        >>> update_correction_bias(jnp.zeros(3), jnp.array([9, 2, 4]), rate=0.5).tolist()
        [-0.5, 0.5, 0.5]
    """
    loads = lax.stop_gradient(loads).astype(jnp.float32)
    return correction_bias + rate * jnp.sign(jnp.mean(loads, axis=-1, keepdims=True) - loads)


def expert_loads(
    topk_ids: Int[Array, "*T k"], num_experts: int, *, axis_name: AxisName | None = None
) -> Int[Array, " E"]:
    """How many (token, slot) pairs each expert gets: int32 ``[E]``.

    Args:
        topk_ids: ``[..., k]``; ids outside ``[0, E)`` do not count.
        num_experts: E.
        axis_name: inside `jax.shard_map`, the axis over which tokens are split: loads are then summed over it.

    Example:
        >>> expert_loads(jnp.array([[0, 2], [2, -1]]), 4).tolist()
        [1, 0, 2, 0]
    """
    ids = jnp.where(topk_ids < 0, num_experts, topk_ids).reshape(-1)
    loads = jnp.zeros(num_experts, jnp.int32).at[ids].add(1, mode="drop")
    return loads if axis_name is None else lax.psum(loads, axis_name)


class LoadStatistics(NamedTuple):
    """How evenly experts are used; every field but `loads` is a float32 scalar, and 0 where nothing was routed.

    Attributes:
        loads: pairs of each expert, ``[E]``.
        max_violation: ``max(loads) / mean(loads) - 1``; 0 is perfect balance, E - 1 everything on one expert (MaxVio of Wang et
            al. 2024, https://arxiv.org/abs/2408.15664).
        mean_violation: ``mean(|loads - mean(loads)|) / mean(loads)``.
        entropy: of the shares of the experts, divided by log(E): 1 is perfect balance, 0 everything on one expert.
        dropped_share: pairs that were dropped, of all that were routed.
    """

    loads: Num[Array, " E"]
    max_violation: Float[Array, ""]
    mean_violation: Float[Array, ""]
    entropy: Float[Array, ""]
    dropped_share: Float[Array, ""]


def load_statistics(loads: Num[Array, " E"], num_dropped: int | Int[Array, ""] = 0) -> LoadStatistics:
    """How evenly the experts are used.

    Args:
        loads: ``[E]``, from `expert_loads` of what the router chose.
        num_dropped: how many of these pairs were dropped.

    Example:
        >>> stats = load_statistics(jnp.array([4, 2, 2, 0]), num_dropped=2)
        >>> [float(value) for value in stats[1:]]
        [1.0, 0.5, 0.75, 0.25]
    """
    pairs = jnp.sum(loads).astype(jnp.float32)
    share = loads / jnp.maximum(pairs, 1.0)
    experts = loads.shape[0]
    relative = share * experts  # 1 for a mean load
    routed = pairs > 0
    entropy = -jnp.sum(jax.scipy.special.xlogy(share, share))
    return LoadStatistics(
        loads=loads,
        max_violation=jnp.where(routed, jnp.max(relative) - 1.0, 0.0),
        mean_violation=jnp.where(routed, jnp.mean(jnp.abs(relative - 1.0)), 0.0),
        entropy=entropy / math.log(experts) if experts > 1 else routed.astype(jnp.float32),
        dropped_share=num_dropped / jnp.maximum(pairs, 1.0),
    )


def _loads_and_probabilities(logits: Array, ids: Array, score: str) -> tuple[Array, Array, Array]:
    """Of ``[T, E]`` and ``[T, k]``: pairs of each expert, sum of its probabilities, number of tokens with an expert."""
    if logits.shape[:-1] != ids.shape[:-1]:
        raise ValueError(f"router_logits {logits.shape} and topk_ids {ids.shape} must be of the same tokens")
    present = jnp.any(ids >= 0, axis=-1)
    probabilities = _probabilities(_clean(logits, present), score)
    probabilities = jnp.sum(jnp.where(present[:, None], probabilities, 0.0), axis=0)
    loads = expert_loads(ids, logits.shape[-1]).astype(jnp.float32)
    return loads, probabilities, jnp.sum(present).astype(jnp.float32)


def _product(loads: Array, probabilities: Array, tokens: Array) -> Array:
    share = loads / jnp.maximum(jnp.sum(loads), 1.0)
    return loads.shape[0] * jnp.sum(share * probabilities) / jnp.where(tokens > 0, tokens, 1.0)


def _clean(logits: Array, present: Array) -> Array:
    """Float32 logits without a NaN, also in the gradient: an expert whose logit is NaN is never chosen, so it is -inf."""
    logits = logits.astype(jnp.float32)
    logits = jnp.where(jnp.isnan(logits), -jnp.inf, jnp.minimum(logits, _LARGEST))
    return jnp.where(present[..., None], logits, 0.0)


def _probabilities(logits: Array, score: str) -> Array:
    if score == "softmax":
        return jax.nn.softmax(logits, axis=-1)
    if score == "sigmoid":
        scores = jax.nn.sigmoid(logits)
    elif score == "sqrtsoftplus":
        softplus = jax.nn.softplus(logits)
        scores = jnp.where(softplus > 0, jnp.sqrt(jnp.where(softplus > 0, softplus, 1.0)), 0.0)  # a finite slope at 0
    else:
        raise ValueError(f"score={score!r} must be one of softmax, sigmoid, sqrtsoftplus")
    total = jnp.sum(scores, axis=-1, keepdims=True)
    return scores / jnp.where(total > 0, total, 1.0)
