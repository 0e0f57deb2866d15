"""Top-k routing: scores, grouped and biased selection, weights. One operation for every rule; its form on a GPU is one kernel."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from moe_jax.ops import implementation as impl
from moe_jax.routing_methods import RoutingRule
from moe_jax.types import TopK

_LARGEST = float(jnp.finfo(jnp.float32).max)


def topk(
    router_logits: Float[Array, "T E"],
    top_k: int,
    rule: RoutingRule,
    *,
    correction_bias: Float[Array, " E"] | None = None,
    implementation: str = "auto",
) -> TopK:
    """The `top_k` experts of every token by `rule`, in float32.

    An expert whose logit or biased score is NaN or -inf is never selected; +inf counts as the largest finite float32. Slots
    for which no expert is left have id -1 and weight 0. Equal scores go to the lowest expert id. Slots are sorted by
    descending weight, those without an expert last.

    Args:
        router_logits: ``[T, E]``, float32, bfloat16 or float16.
        top_k: experts per token.
        rule: how experts are scored, selected and weighted.
        correction_bias: ``[E]``, added to the scores for the selection only.
        implementation: ``auto``, ``xla``, ``mosaic`` or ``mosaic_interpret``.

    Example:
        >>> from moe_jax.config import RoutingConfig
        >>> topk(jnp.array([[0.0, 2.0, 1.0]]), 2, RoutingConfig("default").rule).ids.tolist()
        [[1, 2]]
    """
    from moe_jax.kernels.hopper import topk as kernel

    impl.check_name(implementation)
    tokens = router_logits.shape[0]
    if tokens == 0:
        return TopK(jnp.zeros((0, top_k), jnp.int32), jnp.zeros((0, top_k), jnp.float32))
    chosen = impl.choose("topk", implementation, kernel.supports(router_logits, top_k, rule))
    run_plain = functools.partial(plain, top_k=top_k, rule=rule)
    if chosen == "xla":
        return TopK(*run_plain(router_logits, correction_bias))

    def run(logits, bias):
        return kernel.topk(logits, top_k, rule, bias, interpret=impl.interpret_params(chosen))

    return TopK(*impl.with_plain_gradient(run, run_plain)(router_logits, correction_bias))


def plain(logits: Array, bias: Array | None, *, top_k: int, rule: RoutingRule) -> tuple[Array, Array]:
    """The plain-JAX form: (ids, weights)."""
    logits = logits.astype(jnp.float32)
    selectable = logits > -jnp.inf  # false for NaN
    logits = jnp.where(selectable, jnp.minimum(logits, _LARGEST), -jnp.inf)
    scores = _score(logits, rule.score)
    selection = scores if bias is None else scores + bias.astype(jnp.float32)[None, :]
    selection = jnp.where(selectable & (selection > -jnp.inf), jnp.minimum(selection, _LARGEST), -jnp.inf)
    if rule.num_expert_group > 1:
        selection = _keep_groups(selection, rule)

    best, ids = lax.top_k(lax.stop_gradient(selection), top_k)  # ties: the lowest id first
    found = best > -jnp.inf
    values = jnp.where(found, jnp.take_along_axis(scores, ids, axis=1), -jnp.inf)
    weights = jnp.where(found, _weigh(values, rule), 0.0)
    if rule.renormalize and rule.weight != "softmax":
        total = jnp.sum(weights, axis=1, keepdims=True) + rule.renorm_epsilon
        weights = weights / jnp.where(total > 0, total, 1.0)
    weights = jnp.clip(weights * rule.scale, -_LARGEST, _LARGEST)
    ids = jnp.where(found, ids, -1).astype(jnp.int32)
    if bias is not None:
        order = jnp.lexsort((ids, -weights, ~found), axis=1)
        ids, weights = jnp.take_along_axis(ids, order, axis=1), jnp.take_along_axis(weights, order, axis=1)
    return ids, weights


def _softmax(x: Array) -> Array:
    """Softmax of rows whose -inf entries weigh 0, also if there is nothing else."""
    top = lax.stop_gradient(jnp.maximum(jnp.max(x, axis=1, keepdims=True), -_LARGEST))
    e = jnp.exp(x - top)
    total = jnp.sum(e, axis=1, keepdims=True)
    return e / jnp.where(total > 0, total, 1.0)


def _score(logits: Array, score: str) -> Array:
    if score == "softmax":
        return _softmax(logits)
    if score == "sigmoid":
        return jax.nn.sigmoid(logits)
    if score == "sqrtsoftplus":
        softplus = jnp.maximum(logits, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(logits)))
        positive = softplus > 0
        return jnp.where(positive, jnp.sqrt(jnp.where(positive, softplus, 1.0)), 0.0)  # the slope at 0 stays finite
    assert score == "identity", score
    return logits


def _weigh(values: Array, rule: RoutingRule) -> Array:
    if rule.weight == "softmax":
        return _softmax(values)
    if rule.weight == "sigmoid":
        return jax.nn.sigmoid(values)
    return values


def _keep_groups(selection: Array, rule: RoutingRule) -> Array:
    """-inf for the experts of all but the best `topk_group` groups; the lowest group wins ties."""
    tokens, experts = selection.shape
    groups = selection.reshape(tokens, rule.num_expert_group, experts // rule.num_expert_group)
    quality = jnp.sum(lax.top_k(groups, 2)[0], axis=-1) if rule.group_score == "top2_sum" else jnp.max(groups, axis=-1)
    chosen = lax.top_k(quality, rule.topk_group)[1]
    kept = jnp.any(chosen[:, :, None] == jnp.arange(rule.num_expert_group)[None, None, :], axis=1)
    return jnp.where(kept[:, :, None], groups, -jnp.inf).reshape(tokens, experts)
