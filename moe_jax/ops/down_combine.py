"""Down-projection and combine: from the activations of all rows to the output of the layer."""

from __future__ import annotations

import dataclasses

from jax.typing import DTypeLike
from jaxtyping import Array, Float

from moe_jax.kernels.hopper.matmul_config import Config
from moe_jax.ops import implementation as impl
from moe_jax.ops.combine import combine
from moe_jax.ops.group_tokens import Groups
from moe_jax.ops.grouped_matmul import grouped_matmul
from moe_jax.quantization.array import QuantizedArray
from moe_jax.quantization.rows import QuantizedRows

_SCHEDULE = ("positions", "tile_group", "tile_starts", "tile_sizes", "num_tiles")


def down_combine(
    hidden: Float[Array, "R I"] | QuantizedRows,
    weights: Float[Array, "E H I"] | QuantizedArray,
    groups: Groups,
    scales: Float[Array, "T k"] | None,
    *,
    bias: Float[Array, "E H"] | None = None,
    config: Config | None = None,
    out_dtype: DTypeLike | None = None,
    implementation: str = "auto",
) -> Float[Array, "T H"]:
    """``combine(grouped_matmul(hidden, weights, groups, bias=bias), groups.positions, scales)``, bit for bit.

    One token's may be one kernel: where it spreads as well over the multiprocessors as the two.

    Args:
        hidden: ``[R, I]``, grouped as `groups` says.
        weights: ``[E, H, I]``.
        groups: from `route_groups` or `group_tokens`.
        scales: float32 ``[T, k]``, the router's weights; None for a plain sum.
        bias: ``[E, H]``.
        config: how the kernel of the grouped matmul tiles its work.
        out_dtype: of the result, for quantized operands; see `grouped_matmul`.
        implementation: ``auto``, ``xla``, ``mosaic`` or ``mosaic_interpret``.

    Example:
        >>> import jax.numpy as jnp
        >>> from moe_jax.ops.group_tokens import group_tokens
        >>> groups = group_tokens(jnp.array([[0, 1]], jnp.int32), num_experts=2, tile_rows=1)
        >>> down_combine(jnp.ones((2, 1)), jnp.array([[[2.0]], [[3.0]]]), groups, jnp.array([[1.0, 2.0]])).tolist()
        [[8.0]]
    """
    from moe_jax.kernels.hopper import down_combine as kernel

    impl.check_name(implementation)

    def two(hidden, weights, schedule, scales, bias, implementation):
        named = dataclasses.replace(groups, **schedule)
        rows = grouped_matmul(
            hidden, weights, named, bias=bias, config=config, out_dtype=out_dtype, implementation=implementation
        )
        return combine(rows, named.positions, scales, implementation=implementation)

    schedule = {name: getattr(groups, name) for name in _SCHEDULE}
    operands = (hidden, weights, schedule, scales, bias)
    # Shared tiles hold a row of each expert that the token visits, in their order.
    quantized = isinstance(weights, QuantizedArray)
    one_kernel = (
        not quantized
        and groups.tile_tokens is not None
        and kernel.supports(hidden, weights, *groups.positions.shape) is None
    )
    chosen = impl.choose("down_combine", implementation, None)
    if not one_kernel or chosen == "xla":
        return two(*operands, implementation)

    def run(hidden, weights, schedule, scales, bias):
        named = dataclasses.replace(groups, **schedule)
        interpret = impl.interpret_params(chosen)
        return kernel.down_combine(
            hidden, weights, named.tile_group, named.num_tiles, named.positions, scales, bias, interpret=interpret
        )

    return impl.with_plain_gradient(run, lambda *operands: two(*operands, "xla"))(*operands)
