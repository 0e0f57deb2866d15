"""The oracle of a quantized layer: float32 arithmetic on what the quantized operands stand for.

Slow and obvious, like `moe_jax.reference`: every expert is applied to every row. A fast path with the same quantized operands
differs from it only by the order of its sums.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from moe_jax import reference
from moe_jax.config import MoEConfig
from moe_jax.quantization.array import QuantizedArray
from moe_jax.quantization.formats import QuantFormat, quant_format
from moe_jax.quantization.prepared_fp8 import fp8_blocks
from moe_jax.quantization.quantize import dequantize, fake_quantize_activations
from moe_jax.types import ExpertWeights, TopK


def apply_experts(
    x: Float[Array, "T H"],
    experts: ExpertWeights,
    topk: TopK,
    config: MoEConfig,
    format: QuantFormat | str | None = None,
    *,
    expert_map: Int[Array, " E"] | None = None,
    input_scales: tuple[ArrayLike | None, ArrayLike | None] | None = None,
) -> Float[Array, "T H"]:
    """`moe_jax.reference.apply_experts` with quantized weights, and activations quantized as `format` says.

    The rows of (token, slot) pairs are quantized before the up-projection and again, rounded to ``config.dtype``, before the
    down-projection. A pair without a local expert is in no row: it has no part in a scale that rows share.

    Args:
        x: ``[T, H]``.
        experts: with a `QuantizedArray` for ``w13`` and ``w2``, or plain arrays.
        topk: which experts, with what weights.
        config: activation, dtype, and whether the router weight multiplies the input (before it is quantized).
        format: of the activations; None, or a weight-only format, leaves them alone. With FP8 activations four-bit weights
            are rounded to FP8 as well.
        expert_map: as in `moe_jax.reference.apply_experts`.
        input_scales: of the rows before the up- and the down-projection, for a format whose scales are static; None: computed.

    Returns:
        float32 ``[T, H]``.

    Example:
        >>> from moe_jax.quantization import quantize_experts
        >>> config = MoEConfig(num_experts=2, top_k=1, hidden_size=4, intermediate_size=4, activation="relu2_no_mul")
        >>> experts = ExpertWeights(w13=jnp.ones((2, 4, 4)), w2=jnp.ones((2, 4, 4)))
        >>> topk = TopK(jnp.array([[0], [-1]]), jnp.array([[0.5], [0.0]]))
        >>> apply_experts(jnp.ones((2, 4)), quantize_experts(experts, "fp8_tensor"), topk, config, "fp8_tensor").tolist()
        [[32.0, 32.0, 32.0, 32.0], [0.0, 0.0, 0.0, 0.0]]
    """
    becomes_fp8 = format is not None and quant_format(format).becomes_fp8
    spec, emulated = (
        (None, False) if format is None else (quant_format(format).activations, quant_format(format).emulates)
    )
    scales = input_scales or (None, None)
    expert_map = jnp.arange(config.num_experts) if expert_map is None else expert_map

    ids = topk.ids.reshape(-1)
    local = jnp.where(ids >= 0, jnp.asarray(expert_map)[jnp.maximum(ids, 0)], -1)
    weights = topk.weights.reshape(-1, 1)
    rows = jnp.repeat(x.astype(jnp.float32), topk.ids.shape[1], axis=0)
    if config.apply_router_weight_on_input:
        rows = rows * weights

    def seen(rows: Array, given: ArrayLike | None) -> Array:
        """Rows as the matmul sees them; those of no local expert are zero."""
        rows = rows.astype(config.dtype)
        if spec is None:
            return jnp.where((local >= 0)[:, None], rows, 0).astype(jnp.float32)
        rows = rows if emulated else rows.astype(jnp.float32)  # an emulation rounds what it dequantizes
        return fake_quantize_activations(rows, spec, scales=given, valid=local >= 0).astype(jnp.float32)

    def project(rows: Array, matrices: QuantizedArray | Array, bias: Array | None) -> Array:
        """Each row times the matrix of its expert."""
        out = jnp.zeros((rows.shape[0], matrices.shape[1]), jnp.float32)
        for expert in range(matrices.shape[0]):
            matrix = matrices[expert]
            matrix = fp8_blocks(matrix) if becomes_fp8 and isinstance(matrix, QuantizedArray) else matrix
            y = jnp.matmul(rows, dequantize(matrix).T, precision=lax.Precision.HIGHEST)
            if bias is not None:
                y = y + bias[expert].astype(jnp.float32)[None, :]
            out = jnp.where((local == expert)[:, None], y, out)
        return out

    hidden = reference.activation(project(seen(rows, scales[0]), experts.w13, experts.w13_bias), config)
    out = project(seen(hidden, scales[1]), experts.w2, experts.w2_bias)
    if not config.apply_router_weight_on_input:
        out = jnp.where((local >= 0)[:, None], out * weights, 0.0)
    return jnp.sum(out.reshape(*np.shape(topk.ids), x.shape[1]), axis=1)
