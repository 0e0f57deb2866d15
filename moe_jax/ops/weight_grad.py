"""The gradient of grouped weights: for each expert the product of two sets of its rows, contracted over the rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from moe_jax.ops import implementation as impl
from moe_jax.ops.group_tokens import Groups, group_starts
from moe_jax.ops.quantized_weight_grad import quantized_weight_grad
from moe_jax.quantization.array import QuantizedArray


def weight_grad(
    left: Float[Array, "R M"] | QuantizedArray,
    right: Float[Array, "R N"] | QuantizedArray,
    groups: Groups,
    *,
    accumulate: Float[Array, "E M N"] | None = None,
    out_dtype: DTypeLike | None = None,
    implementation: str = "auto",
) -> Float[Array, "E M N"]:
    """``left[rows of e].T @ right[rows of e]`` for each local expert e, summed in float32.

    An expert without rows has exactly zero, and rows of no group, which may be anything, count nowhere.

    Args:
        left: ``[R, M]``, grouped as `groups` says: cotangents of a grouped matmul. Or both are what
            `moe_jax.ops.quantize_transposed.quantize_transposed` makes of them.
        right: ``[R, N]``, the same rows: what it multiplied.
        groups: from `group_tokens`.
        accumulate: float32 ``[E, M, N]``, added before anything is rounded; the result is then float32.
        out_dtype: of the result; that of `left` by default, bfloat16 if it is quantized.
        implementation: ``auto``, ``xla``, ``mosaic`` or ``mosaic_interpret``.

    Returns:
        ``[E, M, N]``. It has no derivative of its own.

    Raises:
        TypeError: something to accumulate that is not float32, or another `out_dtype` with it; one operand that is quantized.
        ValueError: a kernel asked for by name that does not support the problem.

    Example:
        >>> from moe_jax.ops.group_tokens import group_tokens
        >>> groups = group_tokens(jnp.array([[0], [2], [2]], jnp.int32), num_experts=3, tile_rows=2)
        >>> rows = jnp.array([[1.0], [2.0], [3.0]])
        >>> weight_grad(rows, rows, groups).reshape(-1).tolist()
        [1.0, 0.0, 13.0]
    """
    from moe_jax.kernels.hopper import weight_grad as kernel

    impl.check_name(implementation)
    quantized = isinstance(left, QuantizedArray)
    if quantized != isinstance(right, QuantizedArray):
        raise TypeError(f"left is {type(left).__name__}, right is {type(right).__name__}: quantize both, or neither")
    usual = jnp.float32 if accumulate is not None else jnp.bfloat16 if quantized else left.dtype
    dtype = jnp.dtype(out_dtype or usual)
    if accumulate is not None and (accumulate.dtype != jnp.float32 or dtype != jnp.float32):
        raise TypeError(
            f"accumulate is {accumulate.dtype} and out_dtype={dtype}, but both must be float32; cast it, or leave it None"
        )
    if quantized:
        return quantized_weight_grad(left, right, groups, accumulate, out_dtype=dtype, implementation=implementation)
    shape = (groups.group_sizes.shape[0], left.shape[1], right.shape[1])
    if 0 in (*left.shape, *right.shape, *shape):
        return jnp.zeros(shape, dtype) if accumulate is None else accumulate
    chosen = impl.choose("weight_grad", implementation, kernel.supports(left, right, dtype))

    leaves, tree = jax.tree.flatten(groups)

    def run(left, right, accumulate, *leaves):
        groups = jax.tree.unflatten(tree, leaves)
        if chosen == "xla":
            return _plain(left, right, groups, accumulate).astype(dtype)
        padded = -left.shape[0] % kernel.ALIGNED_ROWS
        if padded:
            left, right = (jnp.pad(rows, ((0, padded), (0, 0))) for rows in (left, right))
        return kernel.weight_grad(
            left,
            right,
            group_starts(groups),
            groups.group_sizes,
            accumulate,
            out_dtype=dtype,
            config=kernel.default_config(*shape[1:]),
            interpret=impl.interpret_params(chosen),
        )

    return impl.without_gradient("weight_grad", run)(left, right, accumulate, *leaves)


def _plain(left: Array, right: Array, groups: Groups, accumulate: Array | None) -> Array:
    """One small matmul per tile that holds rows, in float32."""
    shape = (groups.group_sizes.shape[0], left.shape[1], right.shape[1])
    sources = [jnp.pad(rows, ((0, groups.tile_rows), (0, 0))) for rows in (left, right)]  # a whole tile from any row on

    def one(t, total):
        held = (jnp.arange(groups.tile_rows) < groups.tile_sizes[t])[:, None]
        a, b = (
            jnp.where(held, lax.dynamic_slice_in_dim(rows, groups.tile_starts[t], groups.tile_rows), 0).astype(
                jnp.float32
            )
            for rows in sources
        )
        product = lax.dot_general(a, b, (((0,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)
        return total.at[groups.tile_group[t]].add(product)

    start = jnp.zeros(shape, jnp.float32) if accumulate is None else accumulate
    return lax.fori_loop(0, groups.num_tiles[0], one, start)
