"""What must come out of a run: float32 on what the quantized operands stand for, one device, no exchange."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array

from moe_jax import reference
from moe_jax.config import MoEConfig
from moe_jax.layer_test.chunks import expert_chunk, tp_chunk
from moe_jax.layer_test.config import MoETestConfig
from moe_jax.layer_test.data import MoETestData
from moe_jax.layer_test.quick import quick
from moe_jax.quantization import quantize
from moe_jax.quantization import reference as quantized_reference
from moe_jax.types import ExpertWeights, SharedExpertWeights, TopK


def baseline(config: MoETestConfig, data: MoETestData) -> np.ndarray:
    """Float32 ``[tokens, k]``: the outputs of the rows that are tokens, in order."""
    x = jnp.asarray(np.asarray(data.x)[data.is_token])
    routed = x
    if data.transform is not None:
        routed = jnp.asarray(_product(x, data.transform[0]), config.in_dtype)
    logits = _product(routed, data.gate.T) if data.logits is None else np.asarray(data.logits)[data.is_token]
    topk = _route(jnp.asarray(logits, jnp.float32), config.moe_config)
    parts, scales = _parts(config, data, routed)
    out = sum(_experts(routed, part, topk, expert_map, scales, config.moe_config) for part, expert_map in parts)
    if data.transform is not None:
        out = _product(out.astype(config.in_dtype), data.transform[1])
    out = np.asarray(out, np.float32)
    return out if data.shared is None else out + np.asarray(_shared(x, data.shared, config.moe_config))


def _parts(
    config: MoETestConfig, data: MoETestData, x: Array
) -> tuple[list[tuple[ExpertWeights, Array | None]], tuple | None]:
    """Weights and maps whose results add up to the routed experts', and scales of their rows if these are not taken from them.

    They are the parts of the ranks where rows are quantized by what a rank sees of them, otherwise the whole.
    """
    experts, form = data.experts, config.moe_config.quantization
    spec = None if form is None else form.activations
    if spec is None or (spec.granularity == "group" and not spec.static):
        return [(experts, None)], None
    if spec.static:
        return [(experts, None)], (experts.w13_input_scale[0], experts.w2_input_scale[0])
    scales = None
    if spec.granularity == "tensor" and config.quantize_before:
        scales = quantize(x, spec).scales, None  # of all tokens, not of those that a rank gets
    if data.placement is None:
        return [(tp_chunk(experts, rank, config.world_size), None) for rank in range(config.world_size)], scales
    held = [data.placement.get_local_expert_ids(rank) for rank in range(config.ep_size)]
    return [(expert_chunk(experts, ids), _map_of(ids, config.num_experts)) for ids in held if ids], scales


@quick(static_argnums=5)
def _experts(
    x: Array, experts: ExpertWeights, topk: TopK, expert_map: Array | None, scales: tuple | None, config: MoEConfig
) -> Array:
    options = {"expert_map": expert_map, "input_scales": scales}
    return quantized_reference.apply_experts(x, experts, topk, config, config.quantization, **options)


@quick(static_argnums=1)
def _route(logits: Array, config: MoEConfig) -> TopK:
    return reference.route(logits, config)


@quick(static_argnums=2)
def _shared(x: Array, shared: SharedExpertWeights, config: MoEConfig) -> Array:
    return reference.shared_experts(x, shared, config)


def _map_of(held: list[int], num_experts: int) -> Array:
    return jnp.asarray([held.index(expert) if expert in held else -1 for expert in range(num_experts)], jnp.int32)


def _product(a: ArrayLike, b: ArrayLike) -> np.ndarray:
    """A matmul in float64."""
    return np.asarray(a, np.float64) @ np.asarray(b, np.float64)
