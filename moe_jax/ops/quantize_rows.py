"""Activations quantized: tokens on their way to their rows, and rows that are grouped already."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.ops.gather_quantize import gather_quantize
from moe_jax.ops.group_tokens import Groups
from moe_jax.quantization.formats import Spec
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
    positions = groups.positions
    if groups.tokens_as_rows:
        if spec.granularity == "tensor" and not spec.static:  # a token without a local expert has no part in the scale
            x = jnp.where((positions >= 0).any(axis=1)[:, None], x, 0)
        positions = None
    return gather_quantize(x, positions, spec, scales=scales, implementation=implementation)


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
    """
    shared = spec.granularity == "tensor" and not spec.static
    num_rows = jnp.sum(groups.group_sizes, dtype=jnp.int32)[None] if shared else None
    return gather_quantize(rows, None, spec, num_rows=num_rows, scales=scales, implementation=implementation)
