"""Weights quantized for both directions: in the order of a product, and in that of its input's gradient."""

from __future__ import annotations

import dataclasses

from jaxtyping import Array, Float

from moe_jax.ops import implementation as impl
from moe_jax.quantization.array import QuantizedArray
from moe_jax.quantization.formats import Spec
from moe_jax.quantization.fp8_training import BLOCKS, GROUP, TENSOR
from moe_jax.quantization.quantize import quantize


def quantize_both(
    weights: Float[Array, "E N K"],
    spec: Spec = BLOCKS,
    *,
    natural: bool = True,
    transposed: bool = True,
    implementation: str = "auto",
) -> tuple[QuantizedArray | None, QuantizedArray | None]:
    """``quantize(weights, spec)``, and the same codes and scales transposed.

    FP8 tensor cores take both operands with the contracted axis last. ``x @ w.T`` contracts K, the gradient of x contracts N.

    Args:
        weights: ``[E, N, K]``, N and K multiples of 128.
        spec: float8_e4m3fn, in blocks of 128 x 128 or with one scale for each matrix, which takes a pass of its own.
        natural: the first is wanted; None otherwise.
        transposed: the second is.
        implementation: ``auto``, ``xla``, ``mosaic`` or ``mosaic_interpret``.

    Returns:
        ``[E, N, K]`` and ``[E, K, N]``. They have no derivative of their own: what trains weights in FP8 passes gradients on.

    Raises:
        ValueError: sizes that 128 does not divide: blocks would not be the same both ways; another format.

    Example:
        >>> import jax.numpy as jnp
        >>> both = quantize_both(jnp.ones((2, 128, 256)))
        >>> [(q.shape, q.scales.shape) for q in both]
        [((2, 128, 256), (2, 1, 2)), ((2, 256, 128), (2, 2, 1))]
    """
    from moe_jax.kernels.hopper import quantize_blocks as kernel

    impl.check_name(implementation)
    if spec not in (BLOCKS, TENSOR):
        raise ValueError(
            f"{spec} must be {BLOCKS} or {TENSOR}, which are the same both ways; quantize twice for others"
        )
    if weights.shape[1] % GROUP or weights.shape[2] % GROUP:
        raise ValueError(
            f"weights of shape {weights.shape} must have multiples of {GROUP} rows and columns: blocks of {GROUP} x {GROUP} "
            "are the same both ways only if none is cut; pad them"
        )
    # In its own order alone, or where there is nothing, it is left to XLA.
    chosen = "xla"
    if transposed and weights.size:
        chosen = impl.choose("quantize_both", implementation, kernel.supports(weights))

    def run(weights):
        if chosen == "xla":
            found = quantize(weights, spec)
            return (found if natural else None), (_swapped(found) if transposed else None)
        options = {"natural": natural, "interpret": impl.interpret_params(chosen)}
        if spec == TENSOR:
            scales = quantize(weights, spec).scales  # the codes are not computed: nothing reads them
            codes = kernel.quantize_both(weights, spec, scales=scales, **options)
            found = [QuantizedArray(values, scales, spec=spec) for values in codes]
            return (found[0] if natural else None), found[-1]
        *own, values, scales = kernel.quantize_both(weights, spec, **options)
        return (QuantizedArray(*own, spec=spec) if natural else None), QuantizedArray(values, scales, spec=spec)

    return impl.without_gradient("quantize_both", run)(weights)


def _swapped(array: QuantizedArray) -> QuantizedArray:
    scales = array.scales if array.spec == TENSOR else array.scales.swapaxes(1, 2)
    return dataclasses.replace(array, values=array.values.swapaxes(1, 2), scales=scales)
