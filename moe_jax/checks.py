"""Bad input is refused here, before anything is traced: each error names the rule, the values and the way out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import MoEConfig
from moe_jax.quantization.array import QuantizedArray
from moe_jax.types import ExpertWeights, TopK


def _shape(name: str, array: jax.Array | QuantizedArray, expected: tuple[int, ...], letters: str, way_out: str) -> None:
    if tuple(array.shape) != expected:
        raise ValueError(f"{name} has shape {tuple(array.shape)}, but must be {letters} = {expected}; {way_out}")


def check_layer(x: jax.Array, experts: ExpertWeights, config: MoEConfig, expert_map: jax.Array | None) -> None:
    """Shapes and dtypes of the hidden states, the weights and the map against the config."""
    dtype = jnp.dtype(config.dtype)
    hidden, intermediate = config.hidden_size, config.intermediate_size
    if x.ndim != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, but must be [T, H]; reshape it to (-1, {hidden}) first")
    _shape("x", x, (x.shape[0], hidden), "[T, H]", f"hidden_size={hidden} in the config")
    if experts.w13.ndim != 3:
        raise ValueError(
            f"w13 has shape {tuple(experts.w13.shape)}, but must be [E_local, N, H]; stack the experts' weights"
        )
    local = experts.num_local_experts
    kind = "gate and up rows: 2I" if config.is_gated else "an un-gated activation: I rows"
    way_out = f"activation={config.activation!r} has {kind}, the contracted axis comes last"
    _shape("w13", experts.w13, (local, config.w13_rows, hidden), "[E_local, N, H]", way_out)
    _shape("w2", experts.w2, (local, hidden, intermediate), "[E_local, H, I]", "the contracted axis comes last")
    for name, array, width in (("w13_bias", experts.w13_bias, config.w13_rows), ("w2_bias", experts.w2_bias, hidden)):
        if (array is not None) != config.has_bias:
            has = "has no" if array is None else "has a"
            raise ValueError(
                f"ExpertWeights {has} {name}, but the config says has_bias={config.has_bias}; make them agree"
            )
        if array is not None:
            _shape(name, array, (local, width), "[E_local, N]", "one bias row an expert")
            if not jnp.issubdtype(array.dtype, jnp.floating):
                raise TypeError(f"{name} is {array.dtype}, but must be a floating array; cast it to {config.dtype}")
    for name in ("w13_input_scale", "w2_input_scale"):
        scale = getattr(experts, name)
        if scale is not None:
            _shape(name, scale, (local,), "[E_local]", "one scale an expert; broadcast what is one for all")
            if scale.dtype != jnp.float32:
                raise TypeError(f"{name} is {scale.dtype}, but must be float32, as scales are; cast it")
    _check_quantization(experts, config)
    for name, array in (("x", x), ("w13", experts.w13), ("w2", experts.w2)):
        if array.dtype != dtype and not isinstance(array, QuantizedArray):
            raise TypeError(
                f"{name} is {array.dtype}, but config.dtype is {config.dtype}; cast it, or change the config"
            )
    if expert_map is None:
        if local != config.num_experts:
            raise ValueError(
                f"w13 holds {local} experts of num_experts={config.num_experts}; pass the expert_map that says which"
            )
        return
    if tuple(expert_map.shape) != (config.num_experts,):
        raise ValueError(
            f"expert_map has shape {tuple(expert_map.shape)}, but must have one entry for each of "
            f"num_experts={config.num_experts}: its local id, or -1"
        )
    if not jnp.issubdtype(expert_map.dtype, jnp.integer):
        raise TypeError(f"expert_map is {expert_map.dtype}, but must be an integer array; cast it to int32")
    _check_range("expert_map", expert_map, local, "the local experts of w13")


def _check_quantization(experts: ExpertWeights, config: MoEConfig) -> None:
    """Weights are quantized if and only if the config has a number format, as it says, up to the size of blocks."""
    form = config.quantization
    for name in ("w13", "w2"):
        weights = getattr(experts, name)
        if not isinstance(weights, QuantizedArray):
            if form is not None:
                raise TypeError(
                    f"{name} is {weights.dtype}, but config.quantization is {form.name!r}; "
                    f"use quantize_experts(experts, {form.name!r}), or a config without"
                )
            continue
        spec = weights.spec
        if form is None:
            raise TypeError(
                f"{name} is quantized ({spec.dtype}, a scale a {spec.granularity}), but config.quantization is None; "
                "name the format there, or use dequantize_experts(experts)"
            )
        if (spec.dtype, spec.granularity) != (form.weights.dtype, form.weights.granularity):
            raise TypeError(
                f"{name} is {spec.dtype} with a scale a {spec.granularity}, but config.quantization={form.name!r} has "
                f"{form.weights.dtype} with a scale a {form.weights.granularity}; make them agree"
            )
        weights.validate(name)
        if form.activations is not None and form.activations.static and getattr(experts, f"{name}_input_scale") is None:
            raise ValueError(
                f"config.quantization={form.name!r} has static scales of activations, but ExpertWeights has no "
                f"{name}_input_scale; give it, or use a format that computes them"
            )


def check_topk(x: jax.Array, topk: TopK, config: MoEConfig) -> None:
    """Shapes, dtypes and, where it costs no wait, the range of expert ids."""
    shape = (x.shape[0], config.top_k)
    _shape("topk.ids", topk.ids, shape, "[T, k]", "one row a token, one column a slot")
    _shape("topk.weights", topk.weights, shape, "[T, k]", "one row a token, one column a slot")
    if not jnp.issubdtype(topk.ids.dtype, jnp.integer):
        raise TypeError(f"topk.ids is {topk.ids.dtype}, but must be an integer array; cast it to int32")
    if topk.weights.dtype != jnp.float32:
        raise TypeError(f"topk.weights is {topk.weights.dtype}, but must be float32; cast it")
    _check_range("topk.ids", topk.ids, config.num_experts, "the experts of the config")


def _check_range(name: str, ids: jax.Array, bound: int, what: str) -> None:
    """Refuses ids outside [-1, bound) where they are at hand: not while tracing, and not on a device (no host sync)."""
    if isinstance(ids, jax.core.Tracer) or ids.size == 0:
        return
    if isinstance(ids, jax.Array) and any(d.platform != "cpu" for d in ids.devices()):
        return
    values = np.asarray(ids)  # a constant of a function being traced is still at hand, but not to jnp
    low, high = int(values.min()), int(values.max())
    if low < -1 or high >= bound:
        raise ValueError(f"{name} ranges from {low} to {high}, but must lie in [-1, {bound}): {what}, or -1 for none")
