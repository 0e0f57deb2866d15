"""Back through the activation of a layer trained in FP8: as codes, for the products that follow."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from moe_jax.activations import Activation
from moe_jax.ops import implementation as impl
from moe_jax.ops.group_tokens import Groups
from moe_jax.ops.input_grad import through_activation
from moe_jax.ops.quantize_transposed import column_blocks, quantize_rows_both, quantize_transposed
from moe_jax.quantization.array import QuantizedArray
from moe_jax.quantization.fp8_training import BLOCKS, DTYPE, blocks_spec, rows_spec
from moe_jax.quantization.rows import QuantizedRows


class ActivationCodes(NamedTuple):
    """`moe_jax.ops.input_grad.ActivationGradients` in FP8.

    Attributes:
        pre_activation: the cotangents of the up-projection, ``[R, N]`` and ``[N, 128 * blocks]``, as `quantize_rows_both` gives
            them.
        activated: ``[I, 128 * blocks]``, the activations times the router weights of their rows, as `quantize_transposed` does.
        row_weights: float32 ``[R]``, the cotangents of the router weights.
    """

    pre_activation: tuple[QuantizedRows, QuantizedArray]
    activated: QuantizedArray
    row_weights: Float[Array, " R"]


def through_activation_to_codes(
    product: Float[Array, "R I"],
    pre_activation: Float[Array, "R N"],
    row_weights: Float[Array, " R"],
    groups: Groups,
    activation: Activation,
    *,
    dtype: DTypeLike = DTYPE,
    implementation: str = "auto",
) -> ActivationCodes:
    """`through_activation` with its two matrices quantized; a kernel writes neither in 16 bits.

    Args:
        product: the cotangents of the activations, before the router weights; I a multiple of 128.
        pre_activation: ``[R, 2I]``, gate first, or ``[R, I]``; of the same dtype.
        row_weights: float32 ``[R]``, the router weight of each row.
        groups: of the rows.
        activation: between the projections.
        dtype: of the codes of the cotangents; those of the activations are float8_e4m3fn.
        implementation: ``auto``, ``xla``, ``mosaic`` or ``mosaic_interpret``.

    Returns:
        Undefined where those of `quantize_rows_both` and `quantize_transposed` are; it has no derivative of its own.

    Raises:
        ValueError: a kernel asked for by name that does not support the problem.

    Example:
        >>> from moe_jax.activations import get_activation
        >>> from moe_jax.ops.group_tokens import group_tokens
        >>> groups = group_tokens(jnp.array([[0]], jnp.int32), num_experts=1, tile_rows=1)
        >>> d, h, s = jnp.ones((1, 128)), jnp.full((1, 128), 3.0), jnp.array([0.5])
        >>> found = through_activation_to_codes(d, h, s, groups, get_activation("relu2_no_mul"))
        >>> found.pre_activation[1].shape, found.activated.dequantize()[0, :2].round(2).tolist(), found.row_weights.tolist()
        ((128, 128), [4.5, 0.0], [1152.0])
    """
    from moe_jax.kernels.hopper import activation_blocks as kernel
    from moe_jax.kernels.hopper import quantize_blocks

    impl.check_name(implementation)
    blocks, chosen = column_blocks(groups), "xla"
    if product.size and blocks.group.size:
        chosen = impl.choose("through_activation_to_codes", implementation, quantize_blocks.supports(product))

    def run(product, pre_activation, row_weights, groups, *blocks):
        if chosen == "xla":
            found = through_activation(product, pre_activation, row_weights, activation)
            both = quantize_rows_both(found.pre_activation, groups, dtype=dtype, implementation="xla")
            activated = quantize_transposed(found.activated, groups, implementation="xla")
            return ActivationCodes(both, activated, found.row_weights)
        operands = product, pre_activation, row_weights, *blocks[1:], activation
        of_rows, of_columns = rows_spec(dtype), blocks_spec(dtype)
        options = {"row_spec": of_rows, "spec": of_columns, "activated_spec": BLOCKS}
        options["interpret"] = impl.interpret_params(chosen)
        *own, codes, scales, a, a_scales, sums = kernel.activation_blocks(*operands, **options)
        both = QuantizedRows(*own, of_rows), QuantizedArray(codes, scales, spec=of_columns)
        summed = jnp.sum(sums[:, : product.shape[0]], axis=0)
        return ActivationCodes(both, QuantizedArray(a, a_scales, spec=BLOCKS), summed)

    return impl.without_gradient("through_activation_to_codes", run)(
        product, pre_activation, row_weights, groups, *blocks
    )
