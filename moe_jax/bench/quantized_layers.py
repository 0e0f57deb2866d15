"""Peers that run layers of quantized experts under torch, by name and number format.

Each gets the codes and scales that our layer gets, on the same memory, and quantizes activations itself: with float32 scales, as
the format says. What a peer cannot do with them ends in its row, as `PeerUnavailable`.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, NamedTuple

from moe_jax.bench.torch_layers import (
    NOT_TUNED,
    TORCH_LAYERS,
    TRITON,
    PeerUnavailable,
    Place,
    Routed,
    TorchLayer,
    import_vllm,
)
from moe_jax.config import MoEConfig

BLOCK = 128  # rows and columns of a block of weights, columns of a group of activations
FP8_LARGEST, FP8_AMAX_FLOOR = 448.0, 1e-10


class Coded(NamedTuple):
    """Quantized weights as torch tensors.

    Attributes:
        values: the codes, ``[E, N, K]``.
        scales: float32, in the shape that `moe_jax.quantization.QuantizedArray` says.
    """

    values: Any
    scales: Any


def _needs_blocks(config: MoEConfig) -> None:
    odd = [f"{name}={getattr(config, name)}" for name in _SIZES if getattr(config, name) % BLOCK]
    if odd:
        raise PeerUnavailable(f"{' and '.join(odd)}: with scales of blocks sizes must be multiples of {BLOCK}")


_SIZES = ("hidden_size", "intermediate_size")


def _quant_config(config: MoEConfig, w13: Coded, w2: Coded) -> Any:
    """vLLM's description of the weights and of what becomes of activations."""
    from vllm.model_executor.layers.fused_moe import config as configs

    name = config.quantization.name
    if name == "fp8_block":
        return configs.fp8_w8a8_moe_quant_config(w1_scale=w13.scales, w2_scale=w2.scales, block_shape=[BLOCK, BLOCK])
    if name == "int8_weight":
        return configs.int8_w8a16_moe_quant_config(w1_scale=w13.scales, w2_scale=w2.scales, w1_zp=None, w2_zp=None)
    scales = dict(w1_scale=w13.scales[..., None], w2_scale=w2.scales[..., None])  # one a row, [E, N, 1]
    if name == "fp8_channel":
        return configs.fp8_w8a8_moe_quant_config(**scales, per_act_token_quant=True, per_out_ch_quant=True)
    return configs.int8_w8a8_moe_quant_config(**scales, a1_scale=None, a2_scale=None, per_act_token_quant=True)


def vllm(torch: Any, config: MoEConfig) -> Place:
    """vLLM's Triton experts."""
    import_vllm(torch)
    from vllm.model_executor.layers.fused_moe import fused_experts, fused_topk
    from vllm.model_executor.layers.fused_moe.fused_moe import get_moe_configs

    blocks = config.quantization.weights.granularity == "block"
    if blocks:
        _needs_blocks(config)

    def place(w13, w2):
        quant = _quant_config(config, w13, w2)
        block = (BLOCK, BLOCK) if blocks else (0, 0)
        name = quant.config_name(getattr(torch, config.dtype))
        tuned = get_moe_configs(config.num_experts, config.intermediate_size, name, *block)

        def layer(x, logits):
            weight, ids, *_ = fused_topk(x, logits, config.top_k, True)
            return fused_experts(x, w13.values, w2.values, weight, ids, quant_config=quant)

        return TorchLayer(layer, TRITON if tuned is not None else f"{TRITON}, {NOT_TUNED}")

    return place


def _run(torch: Any, config: MoEConfig, experts: Any, rows: Coded, w13: Coded, w2: Coded, topk: tuple[Any, Any]) -> Any:
    """A call of one of vLLM's expert classes on quantized tokens, with the memory that it asks for."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    weight, ids = topk
    local, silu = config.num_experts, MoEActivation.SILU
    width = 2 * config.intermediate_size
    shapes = experts.workspace_shapes(ids.shape[0], width, config.hidden_size, config.top_k, local, local, None, silu)
    dtype = getattr(torch, config.dtype)
    first, second, out = (torch.empty(shape, device=ids.device, dtype=dtype) for shape in shapes)
    experts.apply(
        output=out,
        hidden_states=rows.values,
        w1=w13.values,
        w2=w2.values,
        topk_weights=weight,
        topk_ids=ids,
        activation=silu,
        global_num_experts=local,
        expert_map=None,
        a1q_scale=rows.scales,
        a2_scale=None,
        workspace13=first,
        workspace2=second,
        expert_tokens_meta=None,
        apply_router_weight_on_input=False,
    )
    return out


def cutlass(torch: Any, config: MoEConfig) -> Place:
    """vLLM's CUTLASS experts: FP8 with a scale for each channel and each token."""
    import_vllm(torch)
    from vllm import _custom_ops
    from vllm.model_executor.layers.fused_moe import CutlassExpertsFp8, fused_topk

    def place(w13, w2):
        sizes = types.SimpleNamespace(
            num_local_experts=config.num_experts,
            intermediate_size_per_partition=config.intermediate_size,
            hidden_dim=config.hidden_size,
            device=w13.values.device,
            in_dtype=getattr(torch, config.dtype),
        )
        experts = CutlassExpertsFp8(sizes, _quant_config(config, w13, w2))

        def layer(x, logits):
            weight, ids, *_ = fused_topk(x, logits, config.top_k, True)
            rows = Coded(*_custom_ops.scaled_fp8_quant(x, None, use_per_token_if_dynamic=True))
            return _run(torch, config, experts, rows, w13, w2, (weight, ids))

        return TorchLayer(layer, "vLLM CutlassExpertsFp8")

    return place


def deepgemm(torch: Any, config: MoEConfig) -> Place:
    """DeepGEMM's experts as vLLM calls them, at any T: FP8 with scales of blocks and of groups of 128."""
    import_vllm(torch)
    from vllm.model_executor.layers.fused_moe import DeepGemmExperts, fused_topk
    from vllm.model_executor.layers.quantization.utils import fp8_utils

    _needs_blocks(config)

    def arranged(weights: Coded) -> Coded:
        """With the scales as its kernels load them; float32 scales, on Hopper, stay what they are."""
        shape = (BLOCK, BLOCK)
        return Coded(
            *fp8_utils.deepgemm_post_process_fp8_weight_block(
                weights.values, weights.scales, quant_block_shape=shape, use_e8m0=False
            )
        )

    def place(w13, w2):
        w13, w2 = arranged(w13), arranged(w2)
        experts = DeepGemmExperts(None, _quant_config(config, w13, w2))

        def layer(x, logits):
            weight, ids, *_ = fused_topk(x, logits, config.top_k, True)
            rows = Coded(*fp8_utils.per_token_group_quant_fp8(x, BLOCK))
            return _run(torch, config, experts, rows, w13, w2, (weight, ids))

        return TorchLayer(layer, "vLLM DeepGemmExperts")

    return place


def torch_scaled(torch: Any, config: MoEConfig) -> Place:
    """torch's scaled grouped matmul, FP8 with a scale for each channel and each row, with torch operations around it."""
    if config.dtype != "bfloat16":
        raise PeerUnavailable(f"torch._scaled_grouped_mm makes bfloat16, not {config.dtype}; give --dtype bfloat16")

    def quantized(rows):
        rows = rows.float()
        scale = rows.abs().amax(1).clamp_min(FP8_AMAX_FLOOR) / FP8_LARGEST
        return (rows / scale[:, None]).to(torch.float8_e4m3fn), scale

    def multiplied(rows, scale, weights, ends):
        across = weights.values.transpose(1, 2)
        return torch._scaled_grouped_mm(
            rows, across, scale, weights.scales, offs=ends, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    def place(w13, w2):
        if not takes_scaled_grouped_mm(torch, w13):
            raise PeerUnavailable(f"torch {torch.__version__} has no scaled grouped matmul for {w13.values.device}")

        def layer(x, logits):
            routed = Routed(torch, config, logits)
            token, ends = routed.group()
            codes, scale = quantized(x)
            # Bytes: not all that torch does with rows it does with 8-bit floats.
            codes = codes.view(torch.uint8).index_select(0, token).view(torch.float8_e4m3fn)
            gate, up = multiplied(codes, scale[token], w13, ends).chunk(2, dim=-1)
            return routed.combine(multiplied(*quantized(torch.nn.functional.silu(gate) * up), w2, ends))

        return TorchLayer(layer, "torch._scaled_grouped_mm, quantized by torch operations")

    return place


def takes_scaled_grouped_mm(torch: Any, w13: Coded) -> bool:
    """Whether torch has a scaled grouped matmul for these weights."""
    return w13.values.is_cuda and hasattr(torch, "_scaled_grouped_mm")


QUANTIZED_LAYERS: dict[str, dict[str, Callable[[Any, MoEConfig], Place]]] = {
    "torch": {"fp8_channel": torch_scaled},
    "vllm": dict.fromkeys(("fp8_block", "fp8_channel", "int8_channel", "int8_weight"), vllm),
    "cutlass": {"fp8_channel": cutlass},
    "deepgemm": {"fp8_block": deepgemm},
}


def torch_layer(name: str, config: MoEConfig) -> Callable[[Any, MoEConfig], Place]:
    """What makes this peer's layer.

    Raises:
        PeerUnavailable: it has none for this number format, or for weights that are not quantized.
    """
    formats = QUANTIZED_LAYERS.get(name, {})
    if config.quantization is None:
        if name in TORCH_LAYERS:
            return TORCH_LAYERS[name]
        raise PeerUnavailable(f"takes quantized weights alone; give --quantization {' or '.join(formats)}")
    form = config.quantization.name
    if form in formats:
        return formats[form]
    takes = (
        f"takes {', '.join(formats)} of the quantized weights, not {form}" if formats else "takes no quantized weights"
    )
    raise PeerUnavailable(takes)
