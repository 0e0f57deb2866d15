"""Routing and experts as functions of tensors, with the names and meaning that vLLM gave them."""

from __future__ import annotations

from typing import Any

import torch

from moe_jax_torch.checks import check_activation, check_devices, check_gating, refuse_forward_mode
from moe_jax_torch.gradients import FusedExperts, Route, differentiably
from moe_jax_torch.quantized import QuantConfig, quantized_experts

_EPSILON = 1e-20  # as in the grouped methods of moe_jax: a sum of scores that all underflow gives weights of 0


def fused_topk(
    hidden_states: torch.Tensor,
    gating_output: torch.Tensor,
    topk: int,
    renormalize: bool,
    *,
    scoring_func: str = "softmax",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k experts of every token with the highest scores.

    The rules for NaN, infinities and ties are those of `moe_jax.route`: a slot without an expert has id -1 and weight 0.

    Args:
        hidden_states: ``[T, H]``; only its T is looked at.
        gating_output: ``[T, E]`` router logits, bfloat16, float16 or float32; the arithmetic is float32.
        topk: k, in [1, E].
        renormalize: divide the weights of a token by their sum.
        scoring_func: ``softmax`` over all experts, or ``sigmoid``.

    Returns:
        (weights, ids): float32 and int32 ``[T, k]``, by descending weight. The weights have a gradient, of `gating_output`.

    Raises:
        ValueError, TypeError: a shape, dtype or name that does not fit.

    Source: vLLM's function of this name, which returns a third tensor besides.

    Example:
        >>> weights, ids = fused_topk(torch.zeros(1, 4), torch.tensor([[0.0, 2.0, 1.0]]), 2, renormalize=True)
        >>> ids.tolist(), round(float(weights.sum()), 6)
        ([[1, 2]], 1.0)
    """
    check_gating(hidden_states, gating_output, topk, scoring_func)
    if scoring_func == "softmax" and renormalize:  # the same as a softmax of the chosen logits, which cannot underflow
        rule = ("identity", "softmax", False, 0.0, 1, 1, "max", 1.0)
    else:
        rule = (scoring_func, "score", renormalize, 0.0, 1, 1, "max", 1.0)
    return _route(gating_output, None, topk, rule)


def grouped_topk(
    hidden_states: torch.Tensor,
    gating_output: torch.Tensor,
    topk: int,
    renormalize: bool,
    num_expert_group: int,
    topk_group: int,
    *,
    scoring_func: str = "softmax",
    routed_scaling_factor: float = 1.0,
    e_score_correction_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`fused_topk` among the experts of the best groups (DeepSeek-V2 and V3).

    A group of neighbouring experts counts by its best score; with a correction bias by the sum of its two best biased scores.
    The bias is for selection only: weights are the scores without it.

    Args:
        hidden_states: ``[T, H]``; only its T is looked at.
        gating_output: ``[T, E]`` router logits.
        topk: k, at most the experts of `topk_group` groups.
        renormalize: divide the weights of a token by their sum.
        num_expert_group: groups, of equal size.
        topk_group: groups that a token may visit.
        scoring_func: ``softmax`` or ``sigmoid``.
        routed_scaling_factor: multiplies the weights in the end.
        e_score_correction_bias: ``[E]``.

    Returns:
        (weights, ids): float32 and int32 ``[T, k]``, by descending weight.

    Raises:
        ValueError, TypeError: a shape, dtype or name that does not fit.

    Source: the DeepSeek-V2 and V3 reports; vLLM's function of this name for the arguments.

    Example:
        >>> logits = torch.tensor([[9.0, 0.0, 5.0, 6.0]])
        >>> grouped_topk(torch.zeros(1, 8), logits, 2, True, 2, 1)[1].tolist()
        [[0, 1]]
    """
    check_gating(hidden_states, gating_output, topk, scoring_func)
    experts = gating_output.shape[1]
    if num_expert_group < 1 or experts % num_expert_group or not 1 <= topk_group <= num_expert_group:
        raise ValueError(
            f"num_expert_group={num_expert_group} must divide the {experts} experts of gating_output, and topk_group="
            f"{topk_group} lie in [1, num_expert_group]"
        )
    per_group = experts // num_expert_group
    if topk > topk_group * per_group:
        raise ValueError(
            f"topk={topk} must not exceed the {topk_group * per_group} experts of topk_group={topk_group} groups"
        )
    bias = e_score_correction_bias
    if bias is not None:
        if tuple(bias.shape) != (experts,) or not bias.is_floating_point():
            raise ValueError(
                f"e_score_correction_bias is {bias.dtype} {tuple(bias.shape)}, but must be floating [{experts}]"
            )
        if per_group < 2 and topk_group < num_expert_group:
            raise ValueError(
                f"with a correction bias a group counts by its two best experts, but num_expert_group={num_expert_group} "
                f"leaves {per_group} of {experts}; use fewer groups"
            )
        bias = bias.float()
    grouped = topk_group < num_expert_group
    groups = (num_expert_group, topk_group, "max" if bias is None else "top2_sum") if grouped else (1, 1, "max")
    rule = (scoring_func, "score", renormalize, _EPSILON, *groups, float(routed_scaling_factor))
    return _route(gating_output, bias, topk, rule)


def fused_experts(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    activation: str = "silu",
    apply_router_weight_on_input: bool = False,
    global_num_experts: int = -1,
    expert_map: torch.Tensor | None = None,
    w1_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    swiglu_alpha: float | None = None,
    swiglu_beta: float | None = None,
    swiglu_limit: float | None = None,
    quant_config: QuantConfig | None = None,
    inplace: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Every token through its experts, summed with the weights of its slots, in float32.

    Differentiable in `hidden_states`, `w1`, `w2`, `topk_weights` and the biases. Each static configuration is compiled once for
    each power of two of tokens; the rows up to it visit no expert. On a GPU the kernels are launched on torch's current stream
    and can be captured in a CUDA graph, after one call with as many tokens; see `moe_jax_torch.set_launch` for the exceptions.

    Args:
        hidden_states: ``[T, H]``, bfloat16, float16 or float32, any strides; T may be 0.
        w1: ``[E_local, 2I, H]``, gate rows first, or ``[E_local, I, H]`` for an activation without a gate; the dtype of
            `hidden_states`.
        w2: ``[E_local, H, I]``, of the same dtype.
        topk_weights: ``[T, k]``, floating.
        topk_ids: ``[T, k]`` global expert ids, int32 or int64. Slots of id -1 contribute nothing. One outside [-1, E) raises on a
            CPU; on a GPU, where looking would make the host wait, it contributes nothing.
        activation: a name of `moe_jax.activations.ACTIVATIONS`. As in vLLM ``swigluoai`` has gate and up rows of `w1` alternate
            (gpt-oss), which costs a copy of `w1` at every call; ``swigluoai_uninterleave`` has gate rows first.
        apply_router_weight_on_input: weigh the rows that enter the experts instead of those that leave them; needs k = 1.
        global_num_experts: E; -1 is the length of `expert_map`, or E_local without one.
        expert_map: integers ``[E]``, global id to local id, -1 for experts that live elsewhere, which contribute nothing: the
            result is then this rank's part of the sum.
        w1_bias: ``[E_local, 2I]`` or ``[E_local, I]``, floating, in the order of the rows of `w1`.
        w2_bias: ``[E_local, H]``, floating.
        swiglu_alpha, swiglu_beta, swiglu_limit: parameters of the activation, None for its own: see
            `moe_jax.activations.get_activation`.
        quant_config: the number format of `w1` and `w2`, which then are its codes, and their scales. Without a gradient.
        inplace: write the result into `hidden_states`, without a gradient.
        out: ``[T, H]``, of the dtype and device of `hidden_states`, any strides: written in place, without a gradient.

    Returns:
        ``[T, H]``, of the dtype of `hidden_states`; `out` if given.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or values that do not fit.
        RuntimeError: a gradient wanted through `out`, `inplace` or quantized weights; a device that JAX does not have; a CUDA
            graph being captured that cannot record this layer, or before the first call.

    Source: vLLM's function of this name for names and meaning; `moe_jax.apply_experts` computes it.

    Example:
        >>> x, w1, w2 = torch.ones(2, 8), torch.ones(4, 32, 8), torch.ones(4, 8, 16)
        >>> ids = torch.tensor([[0, 3], [-1, -1]])
        >>> y = fused_experts(x, w1, w2, torch.full((2, 2), 0.5), ids)
        >>> y.shape, bool((y[1] == 0).all())
        (torch.Size([2, 8]), True)
    """
    check_activation(activation, swiglu_alpha, swiglu_beta, swiglu_limit)
    if global_num_experts == -1:
        global_num_experts = w1.shape[0] if expert_map is None else expert_map.shape[0]
    topk_weights = topk_weights.float() if topk_weights.is_floating_point() else topk_weights  # integers are refused
    tensors = (hidden_states, w1, w2, topk_weights, topk_ids, expert_map, w1_bias, w2_bias)
    check_devices(tensors)  # here too: tensors on meta and elsewhere never reach an operator's kernel
    refuse_forward_mode(tensors)
    swiglu = (swiglu_alpha, swiglu_beta, swiglu_limit)
    static = (activation, apply_router_weight_on_input, global_num_experts, *swiglu)
    arguments = (*tensors, *static)
    if quant_config is not None:
        result = quantized_experts(tensors, quant_config, static)
        return result if out is None and not inplace else _target(hidden_states, out, inplace, arguments).copy_(result)
    if out is None and not inplace:
        return differentiably(FusedExperts, torch.ops.moe_jax.fused_experts.default, *arguments)
    out = _target(hidden_states, out, inplace, arguments)
    torch.ops.moe_jax.fused_experts_out(*arguments, out)
    return out


def _target(
    hidden_states: torch.Tensor, out: torch.Tensor | None, inplace: bool, arguments: tuple[Any, ...]
) -> torch.Tensor:
    if inplace and out is not None:
        raise ValueError("inplace=True writes into hidden_states, out= elsewhere; give one of them")
    out = hidden_states if inplace else out
    if torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in (*arguments, out)):
        raise RuntimeError(
            "a result that is written in place has no gradient, but an argument requires one; leave out and inplace "
            "alone, or call under torch.no_grad()"
        )
    if (out.shape, out.dtype, out.device) != (hidden_states.shape, hidden_states.dtype, hidden_states.device):
        raise ValueError(
            f"out is {tuple(out.shape)}, {out.dtype} on {out.device}, but must be like hidden_states: "
            f"{tuple(hidden_states.shape)}, {hidden_states.dtype} on {hidden_states.device}, with any strides"
        )
    return out


def _route(
    logits: torch.Tensor, bias: torch.Tensor | None, topk: int, rule: tuple[Any, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    check_devices((logits, bias))
    refuse_forward_mode((logits, bias))
    return differentiably(Route, torch.ops.moe_jax.route.default, logits, bias, topk, *rule)
