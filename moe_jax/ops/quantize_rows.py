"""Activations quantized: tokens on their way to their rows, and rows that are grouped already."""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from moe_jax.ops.gather_quantize import gather_quantize
from moe_jax.ops.group_rows import held_rows
from moe_jax.ops.group_tokens import Groups
from moe_jax.quantization.formats import Spec
from moe_jax.quantization.quantize import quantize
from moe_jax.quantization.rounding import scale_to_float32
from moe_jax.quantization.rows import QuantizedRows


def quantize_tokens(
    x: Float[Array, "T H"],
    spec: Spec,
    groups: Groups,
    *,
    scales: Float[Array, ""] | None = None,
    implementation: str = "auto",
) -> QuantizedRows:
    """The hidden states of each row's token, quantized; of all tokens where every tile takes its rows from these.

    Args:
        x: ``[T, H]``.
        spec: of the activations.
        groups: from `moe_jax.ops.group_tokens.group_tokens`.
        scales: one for all, for a static spec.
        implementation: ``auto``, ``xla``, ``mosaic`` or ``mosaic_interpret``.
    """
    positions, total_rows = groups.positions, groups.num_rows
    if groups.tokens_as_rows:
        # A token without a local expert has no part in the scale.
        if spec.granularity == "tensor" and not spec.static and scales is None:
            x = jnp.where((positions >= 0).any(axis=1)[:, None], x, 0)
        positions = total_rows = None
    return gather_quantize(x, positions, spec, scales=scales, total_rows=total_rows, implementation=implementation)


def quantize_rows(
    rows: Float[Array, "R I"],
    spec: Spec,
    *,
    groups: Groups,
    scales: Float[Array, ""] | None = None,
    implementation: str = "auto",
) -> QuantizedRows:
    """Rows of groups, quantized where they are. Rows of no group have no part in a scale that all share.

    Args:
        rows: ``[R, I]``.
        spec: of the activations.
        groups: of the rows.
        scales: as `quantize_tokens`.
        implementation: ``auto``, ``xla``, ``mosaic`` or ``mosaic_interpret``.

    Raises:
        ValueError: one scale for all that is not given, and rows of no group between the groups.
    """
    shared = spec.granularity == "tensor" and not spec.static and scales is None
    if shared and groups.row_multiple != 1:
        raise ValueError(
            f"one scale for all rows, and row_multiple={groups.row_multiple}: the rows between the groups would have a part in "
            "it; group the tokens with row_multiple=1, or give the scale (`shared_scale`)"
        )
    num_rows = jnp.sum(groups.group_sizes, dtype=jnp.int32)[None] if shared else None
    return gather_quantize(rows, None, spec, num_rows=num_rows, scales=scales, implementation=implementation)


def shared_scale(
    rows: Float[Array, "R_or_T M"], spec: Spec, groups: Groups, *, by_token: bool = False
) -> Float[Array, ""]:
    """One scale for the rows of all groups, wherever these lie, in plain JAX. Other rows have no part in it, NaN included.

    Args:
        rows: ``[R, M]``, grouped as `groups` says.
        spec: ``tensor``, of the codes.
        groups: of the rows.
        by_token: `rows` are hidden states instead, ``[T, M]``, and those of tokens with a row count.

    Example:
        >>> from moe_jax.ops.group_tokens import group_tokens
        >>> groups = group_tokens(jnp.array([[0], [-1]], jnp.int32), num_experts=1)
        >>> shared_scale(jnp.array([[448.0], [jnp.inf]]), Spec("float8_e4m3fn", "tensor"), groups, by_token=True).item()
        1.0
    """
    held = (groups.positions >= 0).any(axis=1) if by_token else held_rows(groups)
    return quantize(rows, spec, valid=held).scales  # the codes are not computed: nothing reads them


def quantize_block_scaled(
    rows: Float[Array, "R K"], spec: Spec, *, global_scale: ArrayLike | None = None
) -> QuantizedRows:
    """Rows as block-scaled tensor cores take them, NVFP4, MXFP4 or MXFP8, each by itself; in plain JAX on any device.

    Args:
        rows: ``[R, K]``.
        spec: of the activations, ``group``.
        global_scale: one for all rows, for a spec that has one (NVFP4); by default each row has its own. A static spec needs it.

    Example:
        >>> rows = quantize_block_scaled(jnp.array([[6.0, -3.0]]), Spec("float4_e2m1fn", "group", 16, "float8_e4m3fn"))
        >>> rows.shape, rows.values.tolist(), rows.scales.tolist(), rows.global_scale.shape
        ((1, 2), [[215]], [[448.0]], (1,))
    """
    found = quantize(rows[:, None], spec, global_scale=_of_all(global_scale, rows.shape[0]))
    scales = scale_to_float32(found.scales[:, 0]).T
    of_rows = found.global_scale
    if global_scale is not None:
        of_rows = jnp.asarray(global_scale, jnp.float32).reshape(())
    return QuantizedRows(found.values[:, 0], scales, spec, of_rows)


def _of_all(scale: ArrayLike | None, rows: int) -> Array | None:
    return None if scale is None else jnp.broadcast_to(jnp.asarray(scale, jnp.float32).reshape(()), (rows,))
