"""The gradient of a grouped matmul's input: cotangents of rows, times the weights that the rows were multiplied with."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from moe_jax.activations import Activation
from moe_jax.ops import implementation as impl
from moe_jax.ops.group_tokens import Groups


def input_grad(
    rows: Float[Array, "R N"],
    weights: Float[Array, "E N K"],
    groups: Groups,
    *,
    implementation: str = "auto",
) -> Float[Array, "R K"]:
    """``rows @ weights[group]``, accumulated in float32.

    If ``y = x @ weights[group].T``, as in `grouped_matmul`, and `rows` are the cotangents of y, these are the cotangents of x.
    Rows of no group are not to be read: their content is undefined.

    Args:
        rows: ``[R, N]``, grouped as `groups` says.
        weights: ``[E, N, K]``, as `grouped_matmul` takes them; contracted over N, without a transposed copy.
        groups: from `moe_jax.ops.group_tokens.group_tokens`.
        implementation: ``auto``, ``xla``, ``mosaic`` or ``mosaic_interpret``.

    Returns:
        ``[R, K]`` in the dtype of `rows`. It has no derivative of its own.

    Raises:
        ValueError: a kernel asked for by name that does not support the problem.

    Example:
        >>> from moe_jax.ops.group_tokens import group_tokens
        >>> groups = group_tokens(jnp.array([[0], [1]], jnp.int32), num_experts=2, tile_rows=1)
        >>> input_grad(jnp.ones((2, 2)), jnp.array([[[2.0], [1.0]], [[3.0], [1.0]]]), groups).tolist()
        [[3.0], [4.0]]
    """
    from moe_jax.kernels.hopper import input_grad as kernel

    impl.check_name(implementation)
    if rows.size == 0 or weights.size == 0:
        return jnp.zeros((rows.shape[0], weights.shape[2]), rows.dtype)
    chosen = impl.choose("input_grad", implementation, kernel.supports(rows, weights, groups.tile_rows))

    def run(rows, weights, groups):
        if chosen == "xla":
            return plain_input_grad(rows, weights, groups)
        config, interpret = kernel.config_for(groups.tile_rows), impl.interpret_params(chosen)
        schedule = groups.tile_group, groups.tile_starts, groups.tile_sizes, groups.num_tiles
        return kernel.input_grad(
            rows, weights, *schedule, config=config, tile_spans=groups.tile_spans, interpret=interpret
        )

    return impl.without_gradient("input_grad", run)(rows, weights, groups)


class ActivationGradients(NamedTuple):
    """What the down-projection's cotangents become before its activation. Rows of no group are undefined.

    Attributes:
        pre_activation: ``[R, N]``, the cotangents of the up-projection, of gate and up if the activation has a gate.
        activated: ``[R, I]``, the activations times the router weights of their rows: what `weight_grad` of the down-projection
            takes.
        row_weights: float32 ``[R]``, the cotangents of the router weights.
    """

    pre_activation: Float[Array, "R N"]
    activated: Float[Array, "R I"]
    row_weights: Float[Array, " R"]


def activation_input_grad(
    rows: Float[Array, "R H"],
    weights: Float[Array, "E H I"],
    groups: Groups,
    pre_activation: Float[Array, "R N"],
    row_weights: Float[Array, " R"],
    activation: Activation,
    *,
    implementation: str = "auto",
) -> ActivationGradients:
    """`input_grad` of a down-projection, and back through the activation before it and the router weights after it.

    With h the pre-activation, s a row's router weight and ``d = rows @ weights[group]``, all in float32:
    ``s * d * activation'(h)``, ``s * activation(h)`` and ``sum(d * activation(h))``. The product leaves its kernel rounded to the
    dtype of the rows, and `through_activation` is a pass of its own, at memory speed. In the epilogue of the product's kernel the
    same took longer than both, when XLA still made the pass: its multiplications wait for it (1476 against about 1100 us for
    131072 rows of 2048, I 768, on an H100; benchmarks/results/2026-11-27-h100-training-epilogue.txt).

    Args:
        rows: ``[R, H]``, the cotangents of each row's token, grouped as `groups` says.
        weights: ``[E, H, I]``, of the down-projection.
        groups: from `moe_jax.ops.group_tokens.group_tokens`.
        pre_activation: ``[R, 2I]``, gate first, or ``[R, I]``: the up-projection without its activation.
        row_weights: float32 ``[R]``, the router weight of each row.
        activation: between the projections.
        implementation: ``auto``, ``xla``, ``mosaic`` or ``mosaic_interpret``.

    Example:
        >>> from moe_jax.activations import get_activation
        >>> from moe_jax.ops.group_tokens import group_tokens
        >>> groups = group_tokens(jnp.array([[0]], jnp.int32), num_experts=1, tile_rows=1)
        >>> h, s, relu2 = jnp.array([[3.0]]), jnp.array([0.5]), get_activation("relu2_no_mul")
        >>> found = activation_input_grad(jnp.ones((1, 1)), jnp.full((1, 1, 1), 2.0), groups, h, s, relu2)
        >>> [leaf.tolist() for leaf in found]
        [[[6.0]], [[4.5]], [18.0]]
    """

    def run(rows, weights, groups, pre_activation, row_weights):
        product = input_grad(rows, weights, groups, implementation=implementation)
        return through_activation(product, pre_activation, row_weights, activation, implementation=implementation)

    return impl.without_gradient("activation_input_grad", run)(rows, weights, groups, pre_activation, row_weights)


def through_activation(
    product: Float[Array, "R I"],
    pre_activation: Float[Array, "R N"],
    row_weights: Float[Array, " R"],
    activation: Activation,
    *,
    implementation: str = "auto",
) -> ActivationGradients:
    """`activation_input_grad` after its product: a kernel that reads and writes everything once, or plain JAX.

    Args:
        product: ``[R, I]``, the cotangents of the activations, before the router weights.
        pre_activation: ``[R, 2I]``, gate first, or ``[R, I]``.
        row_weights: float32 ``[R]``, the router weight of each row.
        activation: between the projections.
        implementation: ``auto``, ``xla``, ``mosaic`` or ``mosaic_interpret``.
    """
    from moe_jax.kernels.hopper import activation_grad as kernel

    impl.check_name(implementation)
    reason = kernel.supports(product, pre_activation)
    # XLA has what the kernel has not, and is not slow: no reason to warn, or to refuse.
    chosen = "xla" if reason is not None else impl.choose("through_activation", implementation, None)

    def run(product, pre_activation, row_weights):
        if chosen == "xla":
            return _plain_through_activation(product, pre_activation, row_weights, activation)
        interpret = impl.interpret_params(chosen)
        found = kernel.activation_grad(product, pre_activation, row_weights, activation, interpret=interpret)
        return ActivationGradients(*found)

    return impl.without_gradient("through_activation", run)(product, pre_activation, row_weights)


def _plain_through_activation(
    product: Float[Array, "R I"],
    pre_activation: Float[Array, "R N"],
    row_weights: Float[Array, " R"],
    activation: Activation,
) -> ActivationGradients:
    h, d, dtype = pre_activation.astype(jnp.float32), product.astype(jnp.float32), pre_activation.dtype
    scaled, s = d * row_weights[:, None], row_weights[:, None]
    if activation.is_gated:
        value, *slopes = activation.slopes_gated(*jnp.split(h, 2, axis=1))
        back = jnp.concatenate([scaled * slope for slope in slopes], axis=1)
    else:
        value, slope = activation.slope(h)
        back = scaled * slope
    return ActivationGradients(back.astype(dtype), (value * s).astype(dtype), jnp.sum(d * value, axis=1))


def plain_input_grad(rows: Float[Array, "R N"], weights: Float[Array, "E N K"], groups: Groups) -> Float[Array, "R K"]:
    """In plain JAX: one small matmul per tile that holds rows, so time and memory grow with rows; zeros in rows of no group.

    Example:
        >>> from moe_jax.ops.group_tokens import group_tokens
        >>> groups = group_tokens(jnp.array([[0], [-1]], jnp.int32), num_experts=1, tile_rows=1)
        >>> plain_input_grad(jnp.ones((2, 1)), jnp.full((1, 1, 1), 3.0), groups).tolist()
        [[3.0], [0.0]]
    """
    tile_rows = groups.tile_rows
    source = jnp.pad(rows, ((0, tile_rows), (0, 0)))  # with room for a whole tile from any row on

    def one(t, out):
        start = groups.tile_starts[t]
        mine = lax.dynamic_slice_in_dim(source, start, tile_rows)
        dims = (((1,), (0,)), ((), ()))
        precise = {"precision": lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
        product = lax.dot_general(mine, weights[groups.tile_group[t]], dims, **precise)
        # What runs over the end of a tile is written again by the next, or is left zero.
        held = (jnp.arange(tile_rows) < groups.tile_sizes[t])[:, None]
        return lax.dynamic_update_slice_in_dim(out, jnp.where(held, product, 0).astype(rows.dtype), start, 0)

    out = jnp.zeros((source.shape[0], weights.shape[2]), rows.dtype)
    return lax.fori_loop(0, groups.num_tiles[0], one, out)[: rows.shape[0]]
