"""The gradients of the operators, as `torch.autograd.Function`, for autograd, `torch.func` and the compiler."""

from __future__ import annotations

from typing import Any

import torch

from moe_jax_torch.checks import once_differentiable
from moe_jax_torch.ops import OPERANDS, each


def differentiably(function: type[torch.autograd.Function], operator: Any, *arguments: Any) -> Any:
    """An operator through its `torch.autograd.Function` where something asks for that, else alone, which is much quicker.

    Args:
        function: `FusedExperts` or `Route`.
        operator: what it is the gradient of.
        arguments: of both.
    """
    tensors = (argument for argument in arguments if isinstance(argument, torch.Tensor))
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
    ):
        return function.apply(*arguments)
    return operator(*arguments)


class FusedExperts(torch.autograd.Function):
    """`torch.ops.moe_jax.fused_experts` with its gradient. Forward mode and second derivatives raise.

    The backward pass runs the layer again and computes the gradients that are needed, those of frozen weights not.
    """

    @staticmethod
    def forward(  # torch.compile counts the parameters, so they are written out
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        expert_map: torch.Tensor | None,
        w1_bias: torch.Tensor | None,
        w2_bias: torch.Tensor | None,
        activation: str,
        apply_router_weight_on_input: bool,
        global_num_experts: int,
        swiglu_alpha: float | None,
        swiglu_beta: float | None,
        swiglu_limit: float | None,
    ) -> torch.Tensor:
        """The operator."""
        tensors = (hidden_states, w1, w2, topk_weights, topk_ids, expert_map, w1_bias, w2_bias)
        static = (activation, apply_router_weight_on_input, global_num_experts, swiglu_alpha, swiglu_beta, swiglu_limit)
        return torch.ops.moe_jax.fused_experts(*tensors, *static)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        """Keeps the inputs: an in-place write to one of them before the backward pass raises."""
        ctx.save_for_backward(*inputs[:8])
        ctx.static = inputs[8:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        """Of those inputs that have gradients and need them."""
        needs = [ctx.needs_input_grad[place] for place in OPERANDS]
        grads = iter(torch.ops.moe_jax.fused_experts_backward(grad, *ctx.saved_tensors, *ctx.static, needs))
        wanted = {place: next(grads) for place, need in zip(OPERANDS, needs, strict=True) if need}
        return tuple(wanted.get(place) for place in range(8 + len(ctx.static)))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *layer: Any) -> tuple[Any, Any]:
        """One element of the batch after the other."""
        return each(FusedExperts.apply, info, in_dims, layer)


class Route(torch.autograd.Function):
    """`torch.ops.moe_jax.route` with the gradient of its logits. Forward mode and second derivatives raise."""

    @staticmethod
    def forward(
        logits: torch.Tensor,
        bias: torch.Tensor | None,
        top_k: int,
        score: str,
        weight: str,
        renormalize: bool,
        renorm_epsilon: float,
        num_expert_group: int,
        topk_group: int,
        group_score: str,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The operator."""
        rule = (score, weight, renormalize, renorm_epsilon, num_expert_group, topk_group, group_score, scale)
        return torch.ops.moe_jax.route(logits, bias, top_k, *rule)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Keeps the inputs."""
        ctx.save_for_backward(*inputs[:2])
        ctx.static = inputs[2:]
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[Any, ...]:
        """Of the logits; the bias only selects."""
        logits = torch.ops.moe_jax.route_backward(grad, *ctx.saved_tensors, *ctx.static)
        return (logits, *[None] * (1 + len(ctx.static)))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        """One element of the batch after the other."""
        return each(Route.apply, info, in_dims, arguments)
