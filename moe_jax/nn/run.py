"""What both flax layers compute, as a function of their weights: so they give the same numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from moe_jax import losses
from moe_jax.config import MoEConfig
from moe_jax.moe import apply_experts, shared_expert
from moe_jax.nn.settings import Settings
from moe_jax.parallel.sharded import moe_sharded
from moe_jax.parallel.weights import place_experts
from moe_jax.router_training import drop_over_capacity, expert_capacity, jitter
from moe_jax.routing import route
from moe_jax.types import ExpertWeights, MoELayerWeights


def run_layer(
    x: Float[Array, "*B H"],
    weights: MoELayerWeights,
    settings: Settings,
    *,
    key: Array | None = None,
    input_ids: Array | None = None,
    hash_indices_table: Array | None = None,
) -> tuple[Float[Array, "*B H"], dict[str, Array]]:
    """Router, routed experts and shared expert; and what the layers sow.

    Weights may be of any floating dtype: experts are cast to `config.dtype`, the router to float32.

    Returns:
        ``[..., H]`` of `config.dtype`, and by name: ``load_balancing_loss``, ``sequence_balance_loss`` (for x of ``[B, S, H]``),
        ``router_z_loss``, ``expert_loads`` ``[E]`` and ``num_dropped``.
    """
    config, lead = settings.config, x.shape[:-1]
    if x.ndim < 2 or x.shape[-1] != config.hidden_size:
        raise ValueError(f"x of shape {x.shape} must be [..., tokens, hidden_size={config.hidden_size}]")
    tokens = x.reshape(-1, config.hidden_size)
    noise, routing_key = (None, None) if key is None else jax.random.split(key)

    router_logits = _router_logits(tokens, weights, settings, noise)
    tokens = tokens.astype(config.dtype)
    experts = jax.tree.map(lambda leaf: leaf.astype(config.dtype), weights.experts)
    chosen = {
        "correction_bias": weights.correction_bias,
        "input_ids": None if input_ids is None else input_ids.reshape(-1),
        "hash_indices_table": hash_indices_table,
        "key": routing_key,
    }
    # Under a mesh the ranks route; here it is for the losses, and without them compiled away. Partitioned by XLA, hence plain.
    by_ranks = settings.mesh is not None
    topk = route(
        router_logits,
        config,
        hidden_states=tokens,
        implementation="xla" if by_ranks else settings.implementation,
        **chosen,
    )
    ids, dropped = topk.ids, jnp.int32(0)
    if by_ranks:
        y, dropped = moe_sharded(
            tokens,
            _placed(experts, settings),
            router_logits,
            config,
            parallel=settings.parallel,
            mesh=settings.mesh,
            exchange=settings.exchange,
            return_dropped=True,
            implementation=settings.implementation,
            **chosen,
        )
    else:
        if settings.capacity_factor is not None:
            capacity = expert_capacity(tokens.shape[0], config, settings.capacity_factor)
            topk, dropped = drop_over_capacity(topk, config.num_experts, capacity, keep=settings.keep)
        y = apply_experts(tokens, experts, topk, config, implementation=settings.implementation)
    if weights.shared is not None:
        shared = jax.tree.map(lambda leaf: leaf.astype(config.dtype), weights.shared)
        y = y + shared_expert(tokens, shared, config)

    sown = _sown(router_logits.reshape(*lead, -1), ids.reshape(*lead, -1), config) | {"num_dropped": dropped}
    return y.reshape(x.shape), sown


def _router_logits(tokens: Array, weights: MoELayerWeights, settings: Settings, key: Array | None) -> Array:
    tokens = tokens.astype(jnp.float32)
    if key is not None and settings.jitter_eps > 0:
        tokens = jitter(tokens, key, settings.jitter_eps)
    router = weights.router.astype(jnp.float32)
    logits = jnp.matmul(tokens, router.T, precision=lax.Precision.HIGHEST)
    return logits if weights.router_bias is None else logits + weights.router_bias.astype(jnp.float32)[None, :]


def _placed(experts: ExpertWeights, settings: Settings) -> ExpertWeights:
    """The weights in the order of ranks, which they have already where every rank has as many whole experts."""
    parallel, num_experts = settings.parallel, settings.config.num_experts
    if parallel.enable_expert_parallel and num_experts % parallel.ep_size == 0:
        return experts
    return place_experts(experts, settings.config, parallel)


def _sown(router_logits: Array, ids: Array, config: MoEConfig) -> dict[str, Array]:
    rule = config.routing.rule
    score = (
        "sqrtsoftplus" if rule is None else rule.score
    )  # hash routing; the other methods without a rule have no score
    score = "softmax" if score == "identity" or config.routing.method == "custom" else score
    flat = router_logits.reshape(-1, config.num_experts), ids.reshape(-1, config.top_k)
    sown = {
        "load_balancing_loss": losses.load_balancing_loss(*flat, score=score),
        "router_z_loss": losses.router_z_loss(*flat),
        "expert_loads": losses.expert_loads(ids, config.num_experts),
    }
    if ids.ndim == 3:
        sown["sequence_balance_loss"] = losses.sequence_balance_loss(router_logits, ids, score=score)
    return sown
