"""What comes out of a layer: the float32 reference of a sample of its tokens, and how far from it an output may be."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from moe_jax import reference
from moe_jax.config import MoEConfig
from moe_jax.quantization import QuantizedArray, dequantize, fake_quantize_activations, quantize
from moe_jax.quantization import reference as quantized_reference
from moe_jax.quantization.formats import Spec
from moe_jax.types import ExpertWeights, TopK

REFERENCE_TOKENS = 48  # compared with the reference, which is slow
# Largest relative error that is rounding: inputs, hidden rows and outputs are rounded once each.
TOLERANCE = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-5}
# With quantized experts, in any dtype. Hidden rows are quantized too: a sum that is a little off may fall to the next code, in
# FP8 a step of up to an eighth. So a difference of a thousandth before that is one of a hundredth after it.
QUANTIZED_TOLERANCE = 1e-2
# FP8 products that are not promoted every 128 of K are further off: with K 7168 up to 2.2e-2, ours and those of CUTLASS alike
# (2026-11-26-h100-fp8_channel-layer.json).
FP8_TOLERANCE = 3e-2
PEER_TOLERANCE = (
    4e-2  # peers also round gate and up to 16 bits, and divide by a scale or multiply by its inverse, as they like
)
# A layer's sums may be so far from the reference's. FP8 products are the least exact: their sum has fewer bits than float32.
SUMMED = 2e-3


def shared_scale(config: MoEConfig) -> Spec | None:
    """The format of activations if all rows of a batch have one scale, taken from them; None if not.

    Example:
        >>> shared_scale(MoEConfig(2, 1, 16, 16, quantization="fp8_tensor")).granularity
        'tensor'
        >>> shared_scale(MoEConfig(2, 1, 16, 16, quantization="fp8_tensor_static")) is None
        True
    """
    spec = None if config.quantization is None else config.quantization.activations
    return spec if spec is not None and spec.granularity == "tensor" and not spec.static else None


class Expected:
    """What the float32 reference makes of a sample of the tokens; computed once, compared with every implementation.

    The sample has the same size at every T, small ones repeat tokens: the reference compiles once for a case. Quantized experts
    are what their codes stand for, and meet activations that are quantized as the layer's are. Where all rows share a scale it
    is that of the whole batch, not of the sample: all tokens go through the up-projection for it.

    Args:
        config: the layer.
        weights: as the layer takes them.
        x: ``[T, H]``.
        logits: ``[T, E]``.
        unquantized: the weights that were quantized; None if none were.

    Attributes:
        sample: numbers of the tokens.
        outputs: float32, of the sample; more than one where a scale may round either way.
        unquantized: float32, of the sample, with the weights that were quantized; None if none were.
    """

    def __init__(
        self,
        config: MoEConfig,
        weights: ExpertWeights,
        x: Float[Array, "T H"],
        logits: Float[Array, "T E"],
        unquantized: ExpertWeights | None = None,
    ):
        self.sample = np.linspace(0, x.shape[0] - 1, REFERENCE_TOKENS).round().astype(int)
        few = x[self.sample], jnp.asarray(np.asarray(logits)[self.sample])
        self.unquantized = None if unquantized is None else reference.moe(few[0], unquantized, few[1], config)
        if config.quantization is None:
            self.outputs = [reference.moe(few[0], weights, few[1], config)]
            return
        topk = reference.route(few[1], config)
        self.outputs = [
            quantized_reference.apply_experts(
                few[0], weights, topk, config, config.quantization, input_scales=input_scales
            )
            for input_scales in _input_scales(config, weights, x, logits)
        ]

    def error(self, rows: Float[Array, "sample H"]) -> float:
        """Relative Frobenius error of the sample, `rows` of an output."""
        errors = [_relative(rows, output) for output in self.outputs]
        return math.nan if any(map(math.isnan, errors)) else min(errors)

    def error_unquantized(self, rows: Float[Array, "sample H"]) -> float | None:
        """The same against the layer that is not quantized, which is what the format costs; None if this is that layer."""
        return None if self.unquantized is None else _relative(rows, self.unquantized)


def _relative(rows: jax.Array, expected: jax.Array) -> float:
    return float(jnp.linalg.norm(rows.astype(jnp.float32) - expected) / jnp.linalg.norm(expected))


def _input_scales(config: MoEConfig, weights: ExpertWeights, x: jax.Array, logits: jax.Array) -> list[tuple | None]:
    """Scales of the rows before both projections that an output may have been made with; None where each row has its own."""
    if weights.w13_input_scale is not None:
        return [(jnp.max(weights.w13_input_scale), jnp.max(weights.w2_input_scale))]
    spec = shared_scale(config)
    if spec is None:
        return [None]
    first = _scale_of(jnp.max(jnp.abs(x.astype(jnp.float32))), spec)
    largest = _largest_hidden(config, weights, x, reference.route(logits, config), first)
    # The largest of the hidden rows is rounded to the layer's dtype. Next to where that turns, both neighbours are right.
    near = [largest] if config.dtype == "float32" else [largest * (1 + off) for off in (0.0, -SUMMED, SUMMED)]
    rounded = dict.fromkeys(float(jnp.asarray(value, config.dtype)) for value in near)
    return [(first, _scale_of(jnp.float32(value), spec)) for value in rounded]


def _scale_of(largest: Float[Array, ""], spec: Spec) -> Float[Array, ""]:
    return quantize(largest.reshape(1, 1), spec).scales.reshape(())


def _largest_hidden(config: MoEConfig, weights: ExpertWeights, x: jax.Array, topk: TopK, scale: jax.Array) -> float:
    """Largest magnitude in the hidden rows of all tokens; an expert at a time sees all of them, those that chose it count."""
    rows = fake_quantize_activations(x.astype(jnp.float32), config.quantization, scales=scale)
    found = jnp.float32(0)
    for expert in range(weights.num_local_experts):
        found = jnp.maximum(found, _largest_of_expert(rows, weights.w13[expert], topk.ids, expert, config))
    return float(found)


@functools.partial(jax.jit, static_argnames="config")
def _largest_of_expert(
    rows: jax.Array, w13: QuantizedArray, ids: jax.Array, expert: jax.Array | int, config: MoEConfig
) -> Float[Array, ""]:
    hidden = reference.activation(jnp.matmul(rows, dequantize(w13).T, precision=lax.Precision.HIGHEST), config)
    chosen = jnp.any(ids == expert, axis=-1, keepdims=True)
    return jnp.max(jnp.where(chosen, jnp.abs(hidden), 0.0))


def tolerance(config: MoEConfig, *, peer: bool = False) -> float:
    """The largest relative error that counts as rounding.

    Example:
        >>> def of(form):
        ...     return MoEConfig(2, 1, 16, 16, quantization=form)
        >>> [tolerance(of(form)) for form in (None, "int8_weight", "int8_channel", "fp8_block")]
        [0.01, 0.01, 0.01, 0.01]
        >>> tolerance(of("fp8_channel"))
        0.03
        >>> [tolerance(of(form), peer=True) for form in (None, "int8_weight", "fp8_block")]
        [0.01, 0.01, 0.04]
    """
    form = config.quantization
    if form is None:
        return TOLERANCE[config.dtype]
    if form.is_weight_only:
        return QUANTIZED_TOLERANCE
    if peer:
        return PEER_TOLERANCE
    promoted = form.weights.granularity in ("block", "group")
    return FP8_TOLERANCE if form.weights.is_float and not promoted else QUANTIZED_TOLERANCE


def wrong_output(error: float, largest: float) -> str | None:
    """Why an output with this error cannot be counted, or None.

    Example:
        >>> wrong_output(0.003, 0.01), wrong_output(0.5, 0.01)
        (None, 'wrong output: relative error 0.5 is more than 0.01')
    """
    if error <= largest:
        return None
    return f"wrong output: relative error {error:.2g} is more than {largest:g}"


def finite(error: float) -> float | None:
    """The error as JSON has it, which has no NaN."""
    return error if math.isfinite(error) else None
