"""The gradient of a grouped matmul, by the kernels of its two products."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.activations import Activation
from moe_jax.ops.combine import combine
from moe_jax.ops.gather import gather
from moe_jax.ops.group_rows import held_rows, packed, sums_of_groups
from moe_jax.ops.group_tokens import Groups
from moe_jax.ops.input_grad import input_grad
from moe_jax.ops.weight_grad import weight_grad


def matmul_gradient(
    rows: Float[Array, "rows K"],
    weights: Float[Array, "E N K"],
    bias: Float[Array, "E N"] | None,
    groups: Groups,
    pre_activation: Float[Array, "R N"] | None,
    cotangent: Float[Array, "R N_out"],
    activation: Activation | None,
    *,
    tokens_as_rows: bool = False,
    implementation: str = "auto",
) -> tuple[Float[Array, "rows K"], Float[Array, "E N K"], Float[Array, "E N"] | None]:
    """The cotangents of rows, weights and bias of `grouped_matmul`.

    Args:
        rows: as `grouped_matmul` took them.
        weights: ``[E, N, K]``.
        bias: ``[E, N]``.
        groups: `Groups.tile_group` counts these weights.
        pre_activation: the result without the activation; None if there is none.
        cotangent: of the result; undefined for rows of no group.
        activation: of the matmul.
        tokens_as_rows: as there.
        implementation: ``auto``, ``xla``, ``mosaic`` or ``mosaic_interpret``.
    """
    groups, options = packed(groups, weights.shape[0]), {"implementation": implementation}
    # Undefined rows become zeros: they would reach whatever the rows were made of.
    held = held_rows(groups)[:, None]
    d_h = jnp.where(held, cotangent, 0)
    if activation is not None:
        h = jnp.where(held, pre_activation, 0)
        d_h = jax.vjp(activation, h)[1](d_h)[0]
    d_rows = input_grad(d_h, weights, groups, **options)
    of_rows = gather(rows, groups, **options) if tokens_as_rows else rows
    d_rows = combine(d_rows, groups.positions, None, **options) if tokens_as_rows else jnp.where(held, d_rows, 0)
    d_weights = weight_grad(d_h, of_rows, groups, **options)
    d_bias = None if bias is None else sums_of_groups(d_h, groups).astype(bias.dtype)
    return d_rows, d_weights, d_bias
