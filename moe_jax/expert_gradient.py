"""The experts of a layer with their gradient: what is kept for it, and what is computed again.

Forward, a row r of token t is ``y_r = w2 act(h_r)`` with ``h_r = w13 x_t``, and a token is the sum of its rows times their router
weights s. For the gradient x, h and the routing are kept, and nothing else of the size of all rows: activations follow from h
element by element, gathered rows from x. With g the cotangents of the output:

    d_r    = w2.T g_t                            the product of the down-projection's gradient
    s_r'   = <d_r, act(h_r)> + <g_t, b2>         its epilogue, as the next two
    h_r'   = s_r d_r * act'(h_r)
    a_r    = s_r act(h_r)
    w2'    = sum over rows of g_t a_r.T
    w13'   = sum over rows of h_r' x_t.T
    x_t'   = sum over the token's rows of w13.T h_r'

The router weights meet sums of I elements, not the outputs of the down-projection, which are therefore not kept
(Guo et al., SonicMoE, 2025).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from moe_jax.config import MoEConfig
from moe_jax.ops.combine import combine
from moe_jax.ops.down_combine import down_combine
from moe_jax.ops.gather import gather
from moe_jax.ops.group_rows import (
    expert_of,
    first_slots,
    packed,
    precise_dot,
    row_weights,
    sums_of_groups,
    without_sizes,
)
from moe_jax.ops.group_tokens import Groups
from moe_jax.ops.grouped_matmul import grouped_matmul
from moe_jax.ops.implementation import without_gradient
from moe_jax.ops.input_grad import activation_input_grad, input_grad
from moe_jax.ops.weight_grad import weight_grad
from moe_jax.types import ExpertWeights

SAVED_NAMES = ("moe_x", "moe_pre_activation", "moe_routing")  # see `moe_jax.training`


def with_gradient(
    layer: Callable[..., Array], config: MoEConfig, *, implementation: str = "auto"
) -> Callable[[Array, ExpertWeights, Groups, Array | None], Array]:
    """A layer after grouping, ``layer(x, experts, groups, weights)``, with the gradient of this file.

    Where nothing is differentiated it is the same layer; where something is, it runs in the steps above, by the same kernels.

    Args:
        layer: gather, expert MLP and combine; weights not quantized.
        config: gives the activation.
        implementation: ``auto``, ``xla``, ``mosaic`` or ``mosaic_interpret``, for both directions.
    """
    run = jax.custom_vjp(layer)
    options = {"implementation": implementation}

    def forward(x, experts, groups, weights):
        x = checkpoint_name(x, SAVED_NAMES[0])
        groups, weights = jax.tree.map(lambda leaf: checkpoint_name(leaf, SAVED_NAMES[2]), (groups, weights))
        rows, by_token = gather(x, groups, **options), groups.tokens_as_rows
        h = grouped_matmul(rows, experts.w13, groups, bias=experts.w13_bias, tokens_as_rows=by_token, **options)
        h = checkpoint_name(h, SAVED_NAMES[1])
        y = down_combine(config.act(h), experts.w2, groups, weights, bias=experts.w2_bias, **options)
        return y, (x, experts, groups, weights, h)

    def gradient(saved, g):
        return _gradient(*saved, g, config, options)

    def backward(saved, g):
        x, experts, weights = without_gradient("the gradient of a layer", gradient)(saved, g)
        return x, experts, None, weights

    run.defvjp(forward, backward)

    return lambda x, experts, groups, weights: run(x, experts, without_sizes(groups), weights)


def _gradient(
    x: Float[Array, "T H"],
    experts: ExpertWeights,
    groups: Groups,
    weights: Float[Array, "T k"] | None,
    h: Float[Array, "R N"],
    g: Float[Array, "T H"],
    config: MoEConfig,
    options: dict[str, Any],
) -> tuple[Array, ExpertWeights, Array | None]:
    """Of x, the experts and the router weights."""
    once, of_weights = first_slots(groups), row_weights(weights, groups)
    groups = packed(
        groups, experts.num_local_experts
    )  # that an up-projection may fetch its rows by token is of no use here
    rows = gather(g, groups, **options)
    of_rows = activation_input_grad(rows, experts.w2, groups, h, of_weights, config.act, **options)
    d_rows = input_grad(of_rows.pre_activation, experts.w13, groups, **options)
    found = ExpertWeights(
        w13=weight_grad(of_rows.pre_activation, gather(x, groups, **options), groups, **options),
        w2=weight_grad(rows, of_rows.activated, groups, **options),
    )
    dx = combine(d_rows, once, None, **options)
    has_row = groups.positions >= 0
    d_weights = jnp.where(has_row, of_rows.row_weights[jnp.maximum(groups.positions, 0)], 0)
    if experts.w13_bias is not None:
        sums = sums_of_groups(of_rows.pre_activation, groups)
        found = dataclasses.replace(found, w13_bias=sums.astype(experts.w13_bias.dtype))
    if experts.w2_bias is not None:
        # A token adds its cotangent to the bias of each of its experts, times its weight: no row is needed.
        chosen = jax.nn.one_hot(expert_of(groups.positions, groups), groups.group_sizes.shape[0], dtype=jnp.float32)
        scale = jnp.where(has_row, 1.0 if weights is None else weights, 0)
        per_expert = jnp.einsum("tk,tke->te", scale, chosen, precision=lax.Precision.HIGHEST)
        sums = precise_dot(per_expert.T, g.astype(jnp.float32))
        found = dataclasses.replace(found, w2_bias=sums.astype(experts.w2_bias.dtype))
        products = precise_dot(g.astype(jnp.float32), experts.w2_bias.astype(jnp.float32).T)
        of_slots = jnp.einsum("te,tke->tk", products, chosen, precision=lax.Precision.HIGHEST)
        d_weights = d_weights + jnp.where(has_row, of_slots, 0)
    return dx.astype(x.dtype), found, None if weights is None else d_weights.astype(weights.dtype)
