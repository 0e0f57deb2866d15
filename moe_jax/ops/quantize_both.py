"""Weights quantized for both directions: in the order of a product, and in that of its input's gradient."""

from __future__ import annotations

import dataclasses

from jaxtyping import Array, Float

from moe_jax.ops import implementation as impl
from moe_jax.quantization.array import QuantizedArray
from moe_jax.quantization.fp8_training import BLOCKS, GROUP
from moe_jax.quantization.quantize import quantize


def quantize_both(
    weights: Float[Array, "E N K"],
    *,
    natural: bool = True,
    transposed: bool = True,
    implementation: str = "auto",
) -> tuple[QuantizedArray | None, QuantizedArray | None]:
    """``quantize(weights, Spec("float8_e4m3fn", "block", (128, 128)))``, and the same codes and scales transposed.

    FP8 tensor cores take both operands with the contracted axis last. ``x @ w.T`` contracts K, the gradient of x contracts N.

    Args:
        weights: ``[E, N, K]``, N and K multiples of 128.
        natural: the first is wanted; None otherwise.
        transposed: the second is.
        implementation: ``auto``, ``xla``, ``mosaic`` or ``mosaic_interpret``.

    Returns:
        ``[E, N, K]`` and ``[E, K, N]``.

    Raises:
        ValueError: sizes that 128 does not divide: blocks would not be the same both ways.

    Example:
        >>> import jax.numpy as jnp
        >>> both = quantize_both(jnp.ones((2, 128, 256)))
        >>> [(q.shape, q.scales.shape) for q in both]
        [((2, 128, 256), (2, 1, 2)), ((2, 256, 128), (2, 2, 1))]
    """
    impl.check_name(implementation)
    if weights.shape[1] % GROUP or weights.shape[2] % GROUP:
        raise ValueError(
            f"weights of shape {weights.shape} must have multiples of {GROUP} rows and columns: blocks of {GROUP} x {GROUP} "
            "are the same both ways only if none is cut; pad them"
        )
    found = quantize(weights, BLOCKS)
    other = dataclasses.replace(found, values=found.values.swapaxes(1, 2), scales=found.scales.swapaxes(1, 2))
    return found if natural else None, other if transposed else None
