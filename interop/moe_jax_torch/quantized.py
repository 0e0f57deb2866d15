"""Experts whose weights are codes and scales, as an operator without a gradient."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import torch

from moe_jax import ExpertWeights, MoEConfig, TopK, apply_experts
from moe_jax.quantization import QuantizedArray, quant_format, quantize_experts
from moe_jax_torch import calls
from moe_jax_torch.bridge import TORCH_DTYPES, to_torch
from moe_jax_torch.checks import check_devices, check_slots
from moe_jax_torch.launch import launch
from moe_jax_torch.ops import TAGS, check_range, imported, known_weights, operators, owned, padded, register

_TENSORS = (
    "Tensor hidden_states, Tensor w1, Tensor w2, Tensor topk_weights, Tensor topk_ids, Tensor? expert_map, "
    "Tensor? w1_bias, Tensor? w2_bias, Tensor w1_scale, Tensor w2_scale, Tensor? w1_zp, Tensor? w2_zp, "
    "Tensor? a1_scale, Tensor? a2_scale, Tensor? w1_global_scale, Tensor? w2_global_scale"
)
_STATIC = (
    "str format, str activation, bool apply_router_weight_on_input, int global_num_experts, float? swiglu_alpha, "
    "float? swiglu_beta, float? swiglu_limit"
)
operators.define(f"quantized_experts({_TENSORS}, {_STATIC}) -> Tensor", tags=TAGS)


class QuantConfig(NamedTuple):
    """What `moe_jax_torch.fused_experts` needs beside the codes in `w1` and `w2`.

    Codes of four bits are uint8, two a byte, or `torch.float4_e2m1fn_x2`. Scales of eight bits may be uint8, their bytes.

    Attributes:
        format: a name of `moe_jax.quantization.quant_format`, such as ``fp8_block``, ``fp8_channel``, ``int8_weight``.
        w1_scale, w2_scale: as in `moe_jax.quantization.QuantizedArray`; gate and up share none. Of blocks
            ``[E_local, 2 * ceil(I / bn), ceil(H / bk)]`` and ``[E_local, ceil(H / bn), ceil(I / bk)]``, of channels
            ``[E_local, 2I]`` and ``[E_local, H]``, of tensors ``[E_local, 2]`` and ``[E_local]``. float32, float8_e8m0fnu or
            float8_e4m3fn.
        w1_zp, w2_zp: uint8 zero points, one a scale, of formats that have them.
        a1_scale, a2_scale: float32 ``[E_local]``, of the rows, for formats whose activations have static scales.
        w1_global_scale, w2_global_scale: float32 ``[E_local, 2]``, of gate and up, or ``[E_local]`` without a gate, and
            ``[E_local]``, for NVFP4: what its scales are multiplied by (ModelOpt's ``weight_scale_2``).

    Source: the names are those of vLLM's ``FusedMoEQuantConfig``.

    Example:
        >>> QuantConfig("fp8_tensor", torch.ones(4, 2), torch.ones(4)).a1_scale is None
        True
    """

    format: str
    w1_scale: torch.Tensor
    w2_scale: torch.Tensor
    w1_zp: torch.Tensor | None = None
    w2_zp: torch.Tensor | None = None
    a1_scale: torch.Tensor | None = None
    a2_scale: torch.Tensor | None = None
    w1_global_scale: torch.Tensor | None = None
    w2_global_scale: torch.Tensor | None = None


def as_stored(tensor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """The tensor as the dtype that a format stores, if its bytes came under another name: uint8 or float4_e2m1fn_x2.

    Example:
        >>> as_stored(torch.tensor([127], dtype=torch.uint8), torch.float8_e8m0fnu).float().item()
        1.0
    """
    bytes_of = (torch.uint8, torch.float4_e2m1fn_x2)
    if tensor is None or tensor.dtype == dtype or tensor.dtype not in bytes_of or dtype.itemsize != 1:
        return tensor
    return tensor.view(dtype)


def parameters_of(format: str, experts: int, rows: int, hidden: int, intermediate: int) -> dict[str, tuple[Any, ...]]:
    """Names, shapes and dtypes of what a layer of this format holds, as checkpoints and serving engines name them.

    Args:
        format: the format.
        experts: E_local.
        rows: of ``w13``, 2I or I.
        hidden: H.
        intermediate: I.

    Raises:
        ValueError: no such format.

    Example:
        >>> parameters_of("fp8_block", 4, 512, 128, 256)["w13_weight_scale_inv"]
        ((4, 4, 1), torch.float32)
        >>> list(parameters_of("int8_weight", 4, 512, 128, 256))
        ['w13_weight', 'w13_weight_scale', 'w2_weight', 'w2_weight_scale']
    """
    form = quant_format(format)
    plain = ExpertWeights(
        *(jax.ShapeDtypeStruct((experts, *s), "float32") for s in ((rows, hidden), (hidden, intermediate)))
    )
    quantized = jax.eval_shape(functools.partial(quantize_experts, format=format), plain)
    found = {}
    for name in ("w13", "w2"):
        part = getattr(quantized, name)
        arrays = {"weight": part.values, scale_name(format): part.scales, "weight_zero_point": part.zero_points}
        arrays["weight_scale_2"] = part.global_scale
        if form.activations is not None and form.activations.static:
            arrays["input_scale"] = jax.ShapeDtypeStruct((experts,), "float32")
        for kind, array in arrays.items():
            if array is not None:
                found[f"{name}_{kind}"] = tuple(array.shape), TORCH_DTYPES[array.dtype.name]
    return found


def scale_name(format: str) -> str:
    """What the scales of weights are called: those of blocks are named as in DeepSeek-V3.

    Example:
        >>> scale_name("fp8_channel")
        'weight_scale'
    """
    return "weight_scale_inv" if quant_format(format).weights.granularity == "block" else "weight_scale"


def scales_matrices(format: str, name: str) -> bool:
    """Whether a parameter of `parameters_of` has a number for a matrix, which ranks that share out its rows have in common.

    Example:
        >>> scales_matrices("fp8_tensor", "w13_weight_scale"), scales_matrices("fp8_channel", "w13_weight_scale")
        (True, False)
    """
    whole = quant_format(format).weights.granularity == "tensor"
    return name.endswith("weight_scale_2") or (whole and name.endswith(scale_name(format)))


def check_part(format: str, intermediate_size: int, tp_size: int) -> None:
    """Whether the parts of I that ranks have are whole blocks, each with a scale of its own.

    Raises:
        ValueError: they are not, or there is no such format.

    Example:
        >>> check_part("fp8_block", 768, 2)
    """
    part, block = intermediate_size // tp_size, quant_format(format).weights.block
    for size in block or ():
        if tp_size > 1 and part % size:
            raise ValueError(
                f"intermediate_size={intermediate_size} on tp_size={tp_size} ranks is {part} on each, but {format!r} has a scale "
                f"for {size} of it, which ranks cannot share; use expert parallelism (ep_size={tp_size}), or fewer ranks"
            )


class _Static(NamedTuple):
    format: str
    activation: str
    apply_router_weight_on_input: bool
    num_experts: int
    swiglu_alpha: float | None
    swiglu_beta: float | None
    swiglu_limit: float | None
    implementation: str


@functools.partial(jax.jit, static_argnames="static")
def quantized_forward(
    x: jax.Array,
    weights: jax.Array,
    ids: jax.Array,
    expert_map: jax.Array | None,
    arrays: tuple[jax.Array | None, ...],
    static: _Static,
) -> jax.Array:
    """The layer; `arrays` are those of the operator from ``w1`` on that belong to the experts."""
    w1, w2, w1_bias, w2_bias, w1_scale, w2_scale, w1_zp, w2_zp, a1_scale, a2_scale, w1_global, w2_global = arrays
    activation, _ = calls.TORCH_ACTIVATIONS.get(static.activation, (static.activation, False))
    spec, is_gated = quant_format(static.format).weights, not activation.endswith("_no_mul")
    w13 = QuantizedArray(w1, w1_scale, w1_zp, w1_global, spec=spec, halves=2 if is_gated else 1)
    down = QuantizedArray(w2, w2_scale, w2_zp, w2_global, spec=spec)
    experts = ExpertWeights(w13, down, w1_bias, w2_bias, a1_scale, a2_scale)
    config = MoEConfig(
        num_experts=static.num_experts,
        top_k=ids.shape[1],
        hidden_size=x.shape[1],
        intermediate_size=experts.w2.shape[2],
        activation=activation,
        swiglu_alpha=static.swiglu_alpha,
        swiglu_beta=static.swiglu_beta,
        swiglu_limit=static.swiglu_limit,
        has_bias=w1_bias is not None,
        apply_router_weight_on_input=static.apply_router_weight_on_input,
        quantization=static.format,
        dtype=x.dtype,
    )
    implementation = static.implementation
    return apply_experts(x, experts, TopK(ids, weights), config, expert_map=expert_map, implementation=implementation)


def quantized_experts(tensors: tuple[torch.Tensor | None, ...], quant: QuantConfig, static: tuple[Any, ...]) -> Any:
    """The operator, with the arguments of `torch.ops.moe_jax.fused_experts`.

    Raises:
        RuntimeError: a gradient wanted.
        ValueError, TypeError: codes and scales that do not fit the format.
    """
    activation = static[0]
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise RuntimeError(
            f"experts quantized as {quant.format!r} have no gradient, but an argument requires one; call under "
            "torch.no_grad(), or dequantize the weights to train"
        )
    if calls.TORCH_ACTIVATIONS.get(activation, (activation, False))[1]:
        raise ValueError(
            f"activation={activation!r} has gate and up rows of w1 alternate, which quantized weights must not: put the rows "
            "of gate first, with their scales, and use 'swigluoai_uninterleave'"
        )
    if (tensors[6] is None) != (tensors[7] is None):
        raise ValueError(
            "w1_bias and w2_bias must both be given, or neither, with quantized weights; pass zeros for one"
        )
    spec = quant_format(quant.format).weights
    codes, scales = (TORCH_DTYPES[dtype.name] for dtype in (spec.storage_dtype, jnp.dtype(spec.scale_dtype)))
    x, w1, w2, *others = tensors
    tensors = (x, as_stored(w1, codes), as_stored(w2, codes), *others)
    quant = quant._replace(w1_scale=as_stored(quant.w1_scale, scales), w2_scale=as_stored(quant.w2_scale, scales))
    return torch.ops.moe_jax.quantized_experts.default(*tensors, *quant[1:], quant.format, *static)


def _quantized_experts(*arguments: Any) -> torch.Tensor:
    x, w1, w2, topk_weights, topk_ids, expert_map, w1_bias, w2_bias, *quant = arguments[:16]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    tokens = x.shape[0]
    if tokens == 0:
        return out
    static = _Static(*arguments[16:], calls.implementation_for(x.device.type))

    def check() -> None:
        check_slots(x, w1, topk_weights, topk_ids, expert_map, static.num_experts, static.apply_router_weight_on_input)
        check_devices(arguments[:16])
        check_range("topk_ids", topk_ids, static.num_experts)
        if expert_map is not None:
            check_range("expert_map", expert_map, w1.shape[0])

    rows = (padded(x, 0), padded(topk_weights, 0), padded(topk_ids, -1), expert_map)
    arrays = (w1, w2, w1_bias, w2_bias, *quant)

    def own() -> Any:
        return *jax.tree.map(owned, rows), jax.tree.map(known_weights.own, arrays)

    results = launch(quantized_forward, (*rows, arrays), {"static": static}, check=check, own=own)
    if results is not None:
        return results[0][:tokens]
    operands = (*jax.tree.map(imported, rows), jax.tree.map(known_weights, arrays))
    return to_torch(quantized_forward(*operands, static=static), out=out, rows=tokens)


def _fake(hidden_states: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)


register("quantized_experts", _quantized_experts, _fake, vmap=True)
