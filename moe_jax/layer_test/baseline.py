"""What must come out of a run: float32 on what the quantized operands stand for, one device, no exchange."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array

from moe_jax import reference
from moe_jax.layer_test.chunks import expert_chunk, tp_chunk
from moe_jax.layer_test.config import MoETestConfig
from moe_jax.layer_test.data import MoETestData
from moe_jax.layer_test.quick import quick_jit
from moe_jax.quantization import quantize
from moe_jax.quantization import reference as quantized_reference
from moe_jax.types import ExpertWeights, SharedExpertWeights


def baseline(config: MoETestConfig, data: MoETestData) -> np.ndarray:
    """Float32 ``[tokens, k]``: the outputs of the rows that are tokens, in order."""
    x = jnp.asarray(np.asarray(data.x)[data.is_token])
    routed = x
    if data.transform is not None:
        routed = jnp.asarray(_product(x, data.transform[0]), config.in_dtype)
    logits = _product(routed, data.gate.T) if data.logits is None else np.asarray(data.logits)[data.is_token]
    held = None if data.placement is None else [data.placement.get_local_expert_ids(r) for r in range(config.ep_size)]
    run = quick_jit(functools.partial(_layer, config, held))
    out, shared = run(x, routed, jnp.asarray(logits, jnp.float32), data.experts, data.shared)
    if data.transform is not None:
        out = _product(out.astype(config.in_dtype), data.transform[1])
    return np.asarray(out, np.float32) + (0 if shared is None else np.asarray(shared))


def _layer(
    config: MoETestConfig,
    held: list[list[int]] | None,
    x: Array,
    routed: Array,
    logits: Array,
    experts: ExpertWeights,
    shared: SharedExpertWeights | None,
) -> tuple[Array, Array | None]:
    """What the routed experts make of their tokens, and the shared one of all.

    Routed experts are the sum over the parts of the ranks where rows are quantized by what a rank sees of them; otherwise the
    whole at once. The experts of the ranks are `held`.
    """
    moe_config, form = config.moe_config, config.moe_config.quantization
    topk = reference.route(logits, moe_config)
    spec = None if form is None else form.activations

    def layer(experts: ExpertWeights, expert_map: Array | None = None, scales: tuple | None = None) -> Array:
        return quantized_reference.apply_experts(
            routed, experts, topk, moe_config, form, expert_map=expert_map, input_scales=scales
        )

    whole = None if shared is None else reference.shared_experts(x, shared, moe_config)
    if spec is None or spec.granularity == "group":
        return layer(experts), whole
    if spec.static:
        return layer(experts, scales=(experts.w13_input_scale[0], experts.w2_input_scale[0])), whole
    scales = None
    if spec.granularity == "tensor" and config.quantize_before:
        scales = quantize(routed, spec).scales, None  # of all tokens, not of those that a rank gets
    if held is None:
        parts = [(tp_chunk(experts, rank, config.world_size), None) for rank in range(config.world_size)]
    else:
        parts = [(expert_chunk(experts, ids), _map_of(ids, config.num_experts)) for ids in held]
    return sum(layer(part, expert_map, scales) for part, expert_map in parts), whole


def _map_of(held: list[int], num_experts: int) -> Array:
    return jnp.asarray([held.index(expert) if expert in held else -1 for expert in range(num_experts)], jnp.int32)


def _product(a: ArrayLike, b: ArrayLike) -> np.ndarray:
    """A matmul in float64."""
    return np.asarray(a, np.float64) @ np.asarray(b, np.float64)
