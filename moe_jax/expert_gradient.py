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

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from moe_jax.config import MoEConfig
from moe_jax.fp8_products import Fp8Products
from moe_jax.ops.combine import combine
from moe_jax.ops.group_rows import (
    expert_of,
    packed,
    precise_dot,
    row_weights,
    sums_of_groups,
    without_sizes,
)
from moe_jax.ops.group_tokens import Groups
from moe_jax.ops.implementation import without_gradient
from moe_jax.products import Products
from moe_jax.types import ExpertWeights

SAVED_NAMES = ("moe_x", "moe_pre_activation", "moe_routing")  # see `moe_jax.training`


def with_gradient(
    layer: Callable[..., Array], config: MoEConfig, *, implementation: str = "auto"
) -> Callable[[Array, ExpertWeights, Groups, Array | None], Array]:
    """A layer after grouping, ``layer(x, experts, groups, weights)``, with the gradient of this file.

    Where nothing is differentiated it is the same layer; where something is, it runs in the steps above, by the same kernels.
    With `MoEConfig.fp8_training` of the forward direction it runs in these steps in any case: quantized where they quantize.

    Args:
        layer: gather, expert MLP and combine; weights not quantized.
        config: gives the activation, and which products are FP8.
        implementation: ``auto``, ``xla``, ``mosaic`` or ``mosaic_interpret``, for both directions.
    """
    fp8 = config.fp8_training
    products = (Products if fp8 is None else Fp8Products)(config, implementation)

    def steps(x, experts, groups, weights, *, backward):
        here, later = products.weights(experts, backward=backward)
        h = checkpoint_name(products.up(x, here, groups), SAVED_NAMES[1])
        return products.down(h, here, groups, weights), later, h

    def alone(*operands):
        return steps(*operands, backward=False)[0]

    run = jax.custom_vjp(alone if fp8 is not None and fp8.forward else layer)

    def forward(x, experts, groups, weights):
        x = checkpoint_name(x, SAVED_NAMES[0])
        groups, weights = jax.tree.map(lambda leaf: checkpoint_name(leaf, SAVED_NAMES[2]), (groups, weights))
        y, later, h = steps(x, experts, groups, weights, backward=True)
        return y, (x, later, groups, weights, h)

    def gradient(saved, g):
        return _gradient(*saved, g, products)

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
    products: Products,
) -> tuple[Array, ExpertWeights, Array | None]:
    """Of x, the experts and the router weights."""
    positions, of_weights = groups.positions, row_weights(weights, groups)
    # That an up-projection may fetch its rows by token is of no use here.
    groups = packed(groups, experts.num_local_experts)
    rows = products.cotangents(g, groups)
    of_rows = products.back_to_pre_activation(rows, experts, groups, h, of_weights)
    d_rows, of_w13 = products.back_through_up(of_rows.pre_activation, x, experts, groups)
    found = ExpertWeights(w13=of_w13, w2=products.of_w2(rows, of_rows.activated, groups))
    dx = combine(d_rows, groups.positions, None, **products.options)
    has_row = positions >= 0
    d_weights = jnp.where(has_row, of_rows.row_weights[jnp.maximum(positions, 0)], 0)
    if experts.w13_bias is not None:
        sums = sums_of_groups(of_rows.pre_activation, groups)
        found = dataclasses.replace(found, w13_bias=sums.astype(experts.w13_bias.dtype))
    if experts.w2_bias is not None:
        # A token adds its cotangent to the bias of each of its experts, times its weight: no row is needed.
        chosen = jax.nn.one_hot(expert_of(positions, groups), groups.group_sizes.shape[0], dtype=jnp.float32)
        scale = jnp.where(has_row, 1.0 if weights is None else weights, 0)
        per_expert = jnp.einsum("tk,tke->te", scale, chosen, precision=lax.Precision.HIGHEST)
        sums = precise_dot(per_expert.T, g.astype(jnp.float32))
        found = dataclasses.replace(found, w2_bias=sums.astype(experts.w2_bias.dtype))
        of_biases = precise_dot(g.astype(jnp.float32), experts.w2_bias.astype(jnp.float32).T)
        of_slots = jnp.einsum("te,tke->tk", of_biases, chosen, precision=lax.Precision.HIGHEST)
        d_weights = d_weights + jnp.where(has_row, of_slots, 0)
    return dx.astype(x.dtype), found, None if weights is None else d_weights.astype(weights.dtype)
