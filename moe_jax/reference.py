"""The oracle: a Mixture-of-Experts layer in float32, slow and obvious. Every other path is compared with it.

Nothing here is shared with the fast paths, the formulas are written out again. Each expert is applied to every token
and the tokens that did not choose it are masked out, so time grows with the number of experts: use it for checking, not
for running. Arrays may be of any floating dtype, they are taken to float32 first; results are float32. It is plain JAX,
so gradients of the fast paths can be compared with its own.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from moe_jax.config import MoEConfig, RoutingMethod
from moe_jax.types import ExpertWeights, SharedExpertWeights, TopK

F32_MAX = float(np.finfo(np.float32).max)


def _f32(x: ArrayLike) -> Array:
    return jnp.asarray(x).astype(jnp.float32)


def _matmul(x: Array, weight: Array) -> Array:
    """``x @ weight.T`` with nothing less than float32 inside."""
    return jnp.matmul(x, weight.T, precision=lax.Precision.HIGHEST)


def _sigmoid(x: Array) -> Array:
    small = jnp.exp(-jnp.abs(x))  # at most 1: no overflow, forwards or backwards
    return jnp.where(x >= 0, 1.0, small) / (1.0 + small)


def _scores(logits: Array, method: RoutingMethod) -> Array:
    """What the experts of a token are ranked by."""
    if method in (RoutingMethod.DEFAULT, RoutingMethod.RENORMALIZE_NAIVE, RoutingMethod.DEEPSEEK_V2):
        return _softmax(logits)
    if method in (
        RoutingMethod.SIGMOID,
        RoutingMethod.SIGMOID_RENORM,
        RoutingMethod.DEEPSEEK_V3,
        RoutingMethod.MINIMAX2,
    ):
        return _sigmoid(logits)
    if method is RoutingMethod.DEEPSEEK_V4:
        softplus = jnp.maximum(logits, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(logits)))
        return jnp.where(softplus > 0, jnp.sqrt(jnp.where(softplus > 0, softplus, 1.0)), 0.0)  # no slope of inf at 0
    if method in (RoutingMethod.RENORMALIZE, RoutingMethod.LLAMA4, RoutingMethod.TOPK):
        return logits
    raise ValueError(
        f"reference.route knows the top-k methods, not {method.value!r}; get a TopK from moe_jax.route and pass it to "
        "reference.apply_experts"
    )


def _softmax(logits: Array) -> Array:
    """Softmax over the last axis; a row of nothing but -inf gives zeros."""
    largest = jnp.max(logits, axis=-1, keepdims=True)
    exp = jnp.exp(logits - jnp.where(jnp.isfinite(largest), largest, 0.0))
    total = jnp.sum(exp, axis=-1, keepdims=True)
    return exp / jnp.where(total > 0, total, 1.0)


def _best(choice: Array, k: int) -> Array:
    """Column ids of the k largest values of a row, best first; the lowest id wins ties; -1 when only -inf is left."""
    ids = []
    for _ in range(k):
        best = jnp.argmax(choice, axis=-1)
        found = jnp.max(choice, axis=-1) > -jnp.inf
        ids.append(jnp.where(found, best, -1))
        choice = jnp.where(jnp.arange(choice.shape[-1])[None, :] == best[:, None], -jnp.inf, choice)
    return jnp.stack(ids, axis=-1).astype(jnp.int32)


def _only_best_groups(choice: Array, groups: int, topk_group: int, method: RoutingMethod) -> Array:
    """``choice`` with -inf for the experts outside the best groups.

    Experts that cannot be selected stand at -inf; so does a group with fewer selectable experts than its score adds up.
    """
    num_tokens, num_experts = choice.shape
    grouped = choice.reshape(num_tokens, groups, num_experts // groups)
    if method is RoutingMethod.DEEPSEEK_V3:
        descending = -jnp.sort(-grouped, axis=-1)
        group_score = descending[..., 0] + descending[..., 1]
    else:
        group_score = jnp.max(grouped, axis=-1)
    order = jnp.argsort(-group_score, axis=-1, stable=True)  # best group first, the lowest group wins ties
    rank = jnp.argsort(order, axis=-1, stable=True)
    return jnp.where(rank[:, :, None] < topk_group, grouped, -jnp.inf).reshape(choice.shape)


def route(
    router_logits: Float[Array, "T E"], config: MoEConfig, *, correction_bias: Float[Array, " E"] | None = None
) -> TopK:
    """The expert ids and weights of every token, for the routing methods that are top-k rules.

    An expert whose logit is NaN or -inf, or whose biased score is, is never selected; +inf counts as the largest
    finite float32. Slots for which no expert is left have id -1 and weight 0.

    Args:
        router_logits: ``[T, E]``.
        config: its `routing` is followed.
        correction_bias: ``[E]``, added to the scores for the selection.

    Raises:
        ValueError: the routing method is not a top-k rule.

    Example:
        >>> import jax.numpy as jnp
        >>> config = MoEConfig(num_experts=3, top_k=2, hidden_size=8, intermediate_size=8)
        >>> topk = route(jnp.array([[0.0, 1.0, 1.0]]), config)
        >>> topk.ids.tolist(), topk.weights.tolist()
        ([[1, 2]], [[0.5, 0.5]])
    """
    routing = config.routing
    method = routing.method
    logits = jnp.asarray(router_logits)
    if routing.router_logits_dtype is not None:
        logits = logits.astype(routing.router_logits_dtype)
    logits = _f32(logits)

    selectable = ~jnp.isnan(logits) & (logits > -jnp.inf)
    logits = jnp.where(selectable, jnp.minimum(logits, F32_MAX), -jnp.inf)
    scores = _scores(logits, method)

    choice = scores if correction_bias is None else scores + _f32(correction_bias)[None, :]
    choice = jnp.where(selectable & ~jnp.isnan(choice), choice, -jnp.inf)
    if routing.num_expert_group > 1:
        choice = _only_best_groups(choice, routing.num_expert_group, routing.topk_group, method)
    ids = _best(choice, config.top_k)

    chosen = ids >= 0
    if method is RoutingMethod.RENORMALIZE:
        chosen_logits = jnp.take_along_axis(logits, jnp.maximum(ids, 0), axis=-1)
        weights = _softmax(jnp.where(chosen, chosen_logits, -jnp.inf))
    elif method is RoutingMethod.LLAMA4:
        weights = _sigmoid(jnp.take_along_axis(logits, jnp.maximum(ids, 0), axis=-1))
    else:
        weights = jnp.take_along_axis(scores, jnp.maximum(ids, 0), axis=-1)
    weights = jnp.where(chosen, weights, 0.0)

    if routing.renormalizes and method is not RoutingMethod.RENORMALIZE:
        total = jnp.sum(weights, axis=-1, keepdims=True)
        weights = jnp.where(total > 0, weights / jnp.where(total > 0, total + routing.renorm_epsilon, 1.0), 0.0)
    weights = jnp.clip(weights * routing.routed_scaling_factor, -F32_MAX, F32_MAX)

    # Descending weights, slots without expert last. Equal weights: in order of selection, or by id if a bias chose.
    tie = ids if correction_bias is not None else jnp.broadcast_to(jnp.arange(config.top_k)[None, :], ids.shape)
    order = jnp.lexsort((tie, -weights, ~chosen), axis=-1)
    return TopK(jnp.take_along_axis(ids, order, axis=-1), jnp.take_along_axis(weights, order, axis=-1))


def activation(h: Float[Array, "*B N"], config: MoEConfig) -> Float[Array, "*B I"]:
    """The activation between the two expert matmuls, formula by formula.

    Args:
        h: rows of the up-projection, ``[..., 2I]`` (gate first, up second) or ``[..., I]`` for the un-gated ones.
        config: names the activation and its parameters.

    Raises:
        ValueError: an activation without a formula here.

    Example:
        >>> import jax.numpy as jnp
        >>> config = MoEConfig(num_experts=1, top_k=1, hidden_size=8, intermediate_size=1, activation="relu2")
        >>> activation(jnp.array([[3.0, 2.0]]), config).tolist()
        [[18.0]]
    """

    def gelu(x: Array) -> Array:
        return x * 0.5 * (1.0 + lax.erf(x / np.sqrt(2.0).astype(np.float32)))

    def gelu_tanh(x: Array) -> Array:
        return x * 0.5 * (1.0 + jnp.tanh(np.float32(np.sqrt(2.0 / np.pi)) * (x + 0.044715 * x**3)))

    h = _f32(h)
    name, alpha, beta, limit = config.activation, config.swiglu_alpha, config.swiglu_beta, config.swiglu_limit

    if name == "silu_no_mul":
        return h * _sigmoid(h)
    if name == "gelu_no_mul":
        return gelu(h)
    if name == "gelu_tanh_no_mul":
        return gelu_tanh(h)
    if name == "relu2_no_mul":
        return jnp.maximum(h, 0.0) ** 2

    half = h.shape[-1] // 2
    gate, up = h[..., :half], h[..., half:]
    if name == "gelu":
        return gelu(gate) * up
    if name == "gelu_tanh":
        return gelu_tanh(gate) * up
    if name == "relu2":
        return jnp.maximum(gate, 0.0) ** 2 * up
    if name == "silu":
        alpha = 1.0 if alpha is None else alpha
        beta = 0.0 if beta is None else beta
        limit = np.inf if limit is None else limit
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
        return gate * _sigmoid(alpha * gate) * (up + beta)
    if name == "swigluoai":
        alpha = 1.702 if alpha is None else alpha
        beta = 1.0 if beta is None else beta
        limit = 7.0 if limit is None else limit
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
        return gate * _sigmoid(alpha * gate) * (up + beta)
    if name == "swiglustep":
        limit = 7.0 if limit is None else limit
        return jnp.minimum(gate * _sigmoid(gate), limit) * jnp.clip(up, -limit, limit)
    raise ValueError(f"no formula for activation={name!r}")


def apply_experts(
    x: Float[Array, "T H"],
    experts: ExpertWeights,
    topk: TopK,
    config: MoEConfig,
    *,
    expert_map: Int[Array, " E"] | None = None,
) -> Float[Array, "T H"]:
    """The weighted sum of what a token's experts make of it.

    Args:
        x: ``[T, H]``.
        experts: the weights of the local experts.
        topk: which experts, with what weights; ids of -1 contribute nothing.
        config: activation, and whether the router weight multiplies the input or the output.
        expert_map: int32 ``[E]``, the local id of each global expert, or -1 for those that live elsewhere and
            contribute nothing here. None: all experts are local. Its values must be known (not traced).

    Returns:
        float32 ``[T, H]``, with a map the partial sum of the experts that live here.

    Raises:
        ValueError: no map was given, though not all experts are local.

    Example:
        >>> import jax.numpy as jnp
        >>> config = MoEConfig(num_experts=2, top_k=1, hidden_size=1, intermediate_size=1, activation="relu2_no_mul")
        >>> experts = ExpertWeights(w13=jnp.array([[[1.0]], [[2.0]]]), w2=jnp.array([[[1.0]], [[1.0]]]))
        >>> topk = TopK(jnp.array([[0], [1], [-1]]), jnp.array([[1.0], [0.5], [0.0]]))
        >>> apply_experts(jnp.full((3, 1), 3.0), experts, topk, config).tolist()
        [[9.0], [18.0], [0.0]]
    """
    x = _f32(x)
    if expert_map is None:
        if experts.num_local_experts != config.num_experts:
            raise ValueError(f"{experts.num_local_experts} local of {config.num_experts} experts need an expert_map")
        expert_map = np.arange(config.num_experts)

    out = jnp.zeros_like(x)
    for expert, local in enumerate(np.asarray(expert_map).tolist()):
        if local >= 0:
            out = out + _visit(x, experts, topk, expert, local, config)
    return out


@functools.partial(jax.jit, static_argnames="config")
def _visit(
    x: Array, experts: ExpertWeights, topk: TopK, expert: int | Array, local: int | Array, config: MoEConfig
) -> Array:
    """What one expert adds to the output: its weighted result for the tokens that chose it, zero for the others."""
    chosen = jnp.any(topk.ids == expert, axis=-1, keepdims=True)
    weight = jnp.sum(jnp.where(topk.ids == expert, _f32(topk.weights), 0.0), axis=-1, keepdims=True)

    h = _matmul(x * weight if config.apply_router_weight_on_input else x, _f32(experts.w13[local]))
    if experts.w13_bias is not None:
        h = h + _f32(experts.w13_bias[local])[None, :]
    y = _matmul(activation(h, config), _f32(experts.w2[local]))
    if experts.w2_bias is not None:
        y = y + _f32(experts.w2_bias[local])[None, :]
    if not config.apply_router_weight_on_input:
        y = y * weight
    return jnp.where(chosen, y, 0.0)


def shared_experts(x: Float[Array, "T H"], shared: SharedExpertWeights, config: MoEConfig) -> Float[Array, "T H"]:
    """What the shared expert, with the activation of the routed ones, makes of every token.

    Returns:
        float32 ``[T, H]``.

    Example:
        >>> import jax.numpy as jnp
        >>> config = MoEConfig(num_experts=2, top_k=1, hidden_size=1, intermediate_size=1, activation="relu2_no_mul")
        >>> shared = SharedExpertWeights(w13=jnp.array([[2.0]]), w2=jnp.array([[1.0]]), gate=jnp.array([[0.0]]))
        >>> shared_experts(jnp.array([[3.0]]), shared, config).tolist()
        [[18.0]]
    """
    x = _f32(x)
    y = _matmul(activation(_matmul(x, _f32(shared.w13)), config), _f32(shared.w2))
    if shared.gate is not None:
        y = y * _sigmoid(_matmul(x, _f32(shared.gate)))
    return y


def moe(
    x: Float[Array, "T H"],
    experts: ExpertWeights,
    router_logits: Float[Array, "T E"],
    config: MoEConfig,
    *,
    expert_map: Int[Array, " E"] | None = None,
    correction_bias: Float[Array, " E"] | None = None,
    shared: SharedExpertWeights | None = None,
) -> Float[Array, "T H"]:
    """The layer: `route`, `apply_experts`, and `shared_experts` if there are any.

    Args:
        x: ``[T, H]``.
        experts: the weights of the local experts.
        router_logits: ``[T, E]``.
        config: the layer.
        expert_map: see `apply_experts`.
        correction_bias: see `route`.
        shared: added to the routed sum when given. Of the ranks of a split, only one may be given it.

    Returns:
        float32 ``[T, H]``.

    Raises:
        ValueError: see `route` and `apply_experts`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> config = MoEConfig(num_experts=4, top_k=2, hidden_size=8, intermediate_size=16)
        >>> experts = ExpertWeights(w13=jnp.ones((4, 32, 8)), w2=jnp.ones((4, 8, 16)))
        >>> moe(jnp.ones((3, 8)), experts, jnp.ones((3, 4)), config).shape
        (3, 8)
    """
    topk = route(router_logits, config, correction_bias=correction_bias)
    out = apply_experts(x, experts, topk, config, expert_map=expert_map)
    return out if shared is None else out + shared_experts(x, shared, config)
