"""The gradient of grouped weights of rows that are quantized: its plain form and its kernel."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moe_jax.ops import implementation as impl
from moe_jax.ops.group_tokens import Groups
from moe_jax.quantization.array import QuantizedArray
from moe_jax.quantization.fp8_training import GRADIENT_DTYPES, GROUP, SCALINGS, blocks_spec

_SPECS = tuple(blocks_spec(dtype, scaling) for dtype in GRADIENT_DTYPES for scaling in SCALINGS)


def quantized_weight_grad(
    left: QuantizedArray,
    right: QuantizedArray,
    groups: Groups,
    accumulate: Float[Array, "E M N"] | None = None,
    *,
    out_dtype: DTypeLike,
    implementation: str,
) -> Float[Array, "E M N"]:
    """`moe_jax.ops.weight_grad.weight_grad` of operands from `moe_jax.ops.quantize_transposed.quantize_transposed`.

    Args:
        left: ``[M, 128 * blocks]``.
        right: ``[N, 128 * blocks]``.
        groups: that both were made with.
        accumulate: float32, added.
        out_dtype: of the result; float32 with `accumulate`.
        implementation: a name that was checked.

    Raises:
        ValueError: operands of another format, or of other groups.
    """
    from moe_jax.kernels.hopper import weight_grad_fp8 as kernel

    shape = (groups.group_sizes.shape[0], left.shape[0], right.shape[0])
    for name, operand in (("left", left), ("right", right)):
        if operand.spec not in _SPECS or operand.ndim != 2 or operand.shape[1] != left.shape[1]:
            raise ValueError(
                f"{name} has shape {operand.shape} and {operand.spec}, but both must have {left.shape[1]} columns and be FP8 in "
                f"blocks of {GROUP} x {GROUP}, or with one scale; use quantize_transposed with the same groups"
            )
    if 0 in (*shape, left.shape[1]):
        return jnp.zeros(shape, out_dtype) if accumulate is None else accumulate

    chosen = impl.choose("weight_grad", implementation, kernel.supports(left.values, right.values, out_dtype))

    def run(left, right, firsts, counts, accumulate):
        if chosen != "xla":
            operands = left.values, _of_blocks(left), right.values, _of_blocks(right), firsts, counts, accumulate
            return kernel.weight_grad(*operands, out_dtype=out_dtype, interpret=impl.interpret_params(chosen))
        return _plain(left, right, firsts, counts, accumulate).astype(out_dtype)

    counts = -(-groups.group_sizes // GROUP)
    firsts = jnp.cumsum(counts, dtype=jnp.int32) - counts
    return impl.without_gradient("weight_grad", run)(left, right, firsts, counts, accumulate)


def _of_blocks(operand: QuantizedArray) -> Float[Array, "blocks_of_rows blocks"]:
    """Its scales, one repeated."""
    return jnp.broadcast_to(operand.scales, tuple(size // GROUP for size in operand.shape))


def _plain(
    left: QuantizedArray,
    right: QuantizedArray,
    firsts: Int[Array, " E"],
    counts: Int[Array, " E"],
    accumulate: Float[Array, "E M N"] | None,
) -> Float[Array, "E M N"]:
    """One product for each block of columns that holds rows, in float32 on what the codes stand for."""
    operands = left.dequantize(), right.dequantize()
    ends = firsts + counts

    def one(block, total):
        a, b = (lax.dynamic_slice_in_dim(operand, block * GROUP, GROUP, axis=1) for operand in operands)
        product = lax.dot_general(a, b, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST)
        return total.at[jnp.searchsorted(ends, block, side="right")].add(product)

    start = jnp.zeros((ends.shape[0], left.shape[0], right.shape[0]), jnp.float32) if accumulate is None else accumulate
    return lax.fori_loop(0, ends[-1], one, start)
