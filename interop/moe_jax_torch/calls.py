"""What crosses to JAX: one compiled function for each static configuration, and its gradient."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax import ExpertWeights, MoEConfig, RoutingConfig, TopK, apply_experts, moe
from moe_jax.ops.topk import topk
from moe_jax.routing_methods import RoutingRule

# torch's name: (ours, whether gate and up rows alternate in w1). gpt-oss has them alternating, and its activation the plain name.
TORCH_ACTIVATIONS = {"swigluoai": ("swigluoai", True), "swigluoai_uninterleave": ("swigluoai", False)}


class Operands(NamedTuple):
    """The arrays of a layer that have gradients; an absent bias is None.

    Attributes:
        x: ``[T, H]``.
        w1: ``[E_local, 2I, H]`` or ``[E_local, I, H]``.
        w2: ``[E_local, H, I]``.
        topk_weights: float32 ``[T, k]``, or None where the layer routes.
        w1_bias: ``[E_local, 2I]`` or ``[E_local, I]``.
        w2_bias: ``[E_local, H]``.

    Example:
        >>> Operands._fields[:3]
        ('x', 'w1', 'w2')
    """

    x: jax.Array
    w1: jax.Array
    w2: jax.Array
    topk_weights: jax.Array | None
    w1_bias: jax.Array | None = None
    w2_bias: jax.Array | None = None


class Static(NamedTuple):
    """What does not change from call to call: a static argument of the compiled functions.

    Attributes:
        activation: torch's name.
        apply_router_weight_on_input: as in `moe_jax.MoEConfig`.
        num_experts: global experts ``E``.
        implementation: as in `moe_jax.moe`, see `implementation_for`.
        swiglu_alpha, swiglu_beta, swiglu_limit: as in `moe_jax.MoEConfig`.

    Example:
        >>> Static("silu", False, 8).num_experts
        8
    """

    activation: str
    apply_router_weight_on_input: bool
    num_experts: int
    implementation: str = "auto"
    swiglu_alpha: float | None = None
    swiglu_beta: float | None = None
    swiglu_limit: float | None = None


@functools.cache
def routing_of(
    method: str, renormalize: bool | None, num_expert_group: int, topk_group: int, scale: float
) -> RoutingConfig:
    """The routing of `moe_forward`, made once.

    Example:
        >>> routing_of("sigmoid", None, 1, 1, 2.0).routed_scaling_factor
        2.0
    """
    return RoutingConfig(method, num_expert_group, topk_group, scale, renormalize)


def implementation_for(platform: str) -> str:
    """What runs where the tensors are: ``auto`` asks for JAX's default device, which with CPU tensors may be a GPU.

    Example:
        >>> implementation_for("cpu")
        'xla'
    """
    return "auto" if platform == "cuda" else "xla"


def _experts(operands: Operands, ids: jax.Array, expert_map: jax.Array | None, static: Static) -> jax.Array:
    experts, config = _layer(operands, static, top_k=ids.shape[1])
    topk_of_tokens = TopK(ids, operands.topk_weights)
    implementation = static.implementation
    return apply_experts(
        operands.x, experts, topk_of_tokens, config, expert_map=expert_map, implementation=implementation
    )


def _layer(operands: Operands, static: Static, **config: Any) -> tuple[ExpertWeights, MoEConfig]:
    x, w1, w2, _, w1_bias, w2_bias = operands
    activation, alternating = TORCH_ACTIVATIONS.get(static.activation, (static.activation, False))
    has_bias = w1_bias is not None or w2_bias is not None
    if has_bias:  # a layer has both
        w1_bias = jnp.zeros(w1.shape[:2], x.dtype) if w1_bias is None else w1_bias
        w2_bias = jnp.zeros(w2.shape[:2], x.dtype) if w2_bias is None else w2_bias
    if alternating:
        w1, w1_bias = _gate_first(w1), None if w1_bias is None else _gate_first(w1_bias)
    experts = ExpertWeights(w13=w1, w2=w2, w13_bias=w1_bias, w2_bias=w2_bias)
    return experts, MoEConfig(
        num_experts=static.num_experts,
        hidden_size=x.shape[1],
        intermediate_size=w2.shape[2],
        activation=activation,
        swiglu_alpha=static.swiglu_alpha,
        swiglu_beta=static.swiglu_beta,
        swiglu_limit=static.swiglu_limit,
        has_bias=has_bias,
        apply_router_weight_on_input=static.apply_router_weight_on_input,
        dtype=x.dtype,
        **config,
    )


def _gate_first(rows: jax.Array) -> jax.Array:
    """Rows g0, u0, g1, u1 ... along the second axis become g0, g1 ... u0, u1."""
    return jnp.concatenate([rows[:, 0::2], rows[:, 1::2]], axis=1)


experts_forward = jax.jit(_experts, static_argnames="static")


@functools.partial(jax.jit, static_argnames=("static", "top_k", "routing"))
def moe_forward(
    operands: Operands,
    logits: jax.Array,
    bias: jax.Array | None,
    expert_map: jax.Array | None,
    static: Static,
    top_k: int,
    routing: RoutingConfig,
) -> jax.Array:
    """The layer with its routing, which on a GPU is fewer kernels than both alone.

    Args:
        operands: without `Operands.topk_weights`, which is None.
        logits: ``[T, E]``.
        bias: float32 ``[E]`` or None, for the selection only.
        expert_map: int32 ``[E]`` or None.
        static: the layer.
        top_k: k.
        routing: how tokens choose.

    Example:
        >>> one = Operands(jnp.ones((1, 4)), jnp.ones((2, 8, 4)), jnp.ones((2, 4, 4)), None)
        >>> static, routing = Static("silu", False, 2, "xla"), RoutingConfig("renormalize")
        >>> moe_forward(one, jnp.ones((1, 2)), None, None, static=static, top_k=1, routing=routing).shape
        (1, 4)
    """
    experts, config = _layer(operands, static, top_k=top_k, routing=routing, has_correction_bias=bias is not None)
    return moe(
        operands.x,
        experts,
        logits,
        config,
        expert_map=expert_map,
        correction_bias=bias,
        implementation=static.implementation,
    )


@functools.partial(jax.jit, static_argnames=("static", "needs"))
def experts_backward(
    grad: jax.Array,
    operands: Operands,
    ids: jax.Array,
    expert_map: jax.Array | None,
    static: Static,
    needs: tuple[bool, ...],
) -> list[jax.Array]:
    """Gradients of the operands whose flag in `needs` is set, in their order; the others are not computed.

    Args:
        grad: ``[T, H]``, of the output.
        operands: as they were in the forward pass, which is run again.
        ids: int32 ``[T, k]``.
        expert_map: int32 ``[E]`` or None.
        static: as in the forward pass.
        needs: a flag for each field of `Operands`.

    Example:
        >>> one = Operands(jnp.ones((1, 4)), jnp.ones((1, 8, 4)), jnp.ones((1, 4, 4)), jnp.ones((1, 1)))
        >>> needs = (True, False, False, True, False, False)
        >>> grads = experts_backward(jnp.ones((1, 4)), one, jnp.zeros((1, 1), int), None, Static("silu", False, 1), needs)
        >>> [grad.shape for grad in grads]
        [(1, 4), (1, 1)]
    """

    def forward(wanted: list[jax.Array]) -> jax.Array:
        values = iter(wanted)
        chosen = (next(values) if need else old for need, old in zip(needs, operands, strict=True))
        return _experts(Operands(*chosen), ids, expert_map, static)

    _, pull = jax.vjp(forward, [operand for need, operand in zip(needs, operands, strict=True) if need])
    return pull(grad)[0]


@functools.partial(jax.jit, static_argnames=("top_k", "rule", "implementation"))
def route_forward(
    logits: jax.Array, bias: jax.Array | None, top_k: int, rule: RoutingRule, implementation: str = "auto"
) -> TopK:
    """The experts of every token, as in `moe_jax.ops.topk.topk`.

    Example:
        >>> from moe_jax import RoutingConfig
        >>> route_forward(jnp.array([[0.0, 2.0, 1.0]]), None, 2, RoutingConfig("default").rule).ids.tolist()
        [[1, 2]]
    """
    return topk(logits, top_k, rule, correction_bias=bias, implementation=implementation)


@functools.partial(jax.jit, static_argnames=("top_k", "rule", "implementation"))
def route_backward(
    grad: jax.Array,
    logits: jax.Array,
    bias: jax.Array | None,
    top_k: int,
    rule: RoutingRule,
    implementation: str = "auto",
) -> jax.Array:
    """The gradient of the logits, of that of the weights.

    Example:
        >>> from moe_jax import RoutingConfig
        >>> route_backward(jnp.ones((1, 2)), jnp.zeros((1, 3)), None, 2, RoutingConfig("renormalize").rule).shape
        (1, 3)
    """

    def weights(logits: jax.Array) -> jax.Array:
        return topk(logits, top_k, rule, correction_bias=bias, implementation=implementation).weights

    _, pull = jax.vjp(weights, logits)
    return pull(grad)[0]
