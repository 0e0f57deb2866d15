"""A linear layer for each expert, as one operator: for experts whose activation only torch knows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import torch

from moe_jax.ops.combine import combine
from moe_jax.ops.gather import gather
from moe_jax.ops.group_tokens import group_tokens
from moe_jax.ops.grouped_matmul import grouped_matmul
from moe_jax_torch.bridge import to_torch
from moe_jax_torch.calls import implementation_for
from moe_jax_torch.checks import check_devices, once_differentiable, refuse_forward_mode
from moe_jax_torch.gradients import differentiably
from moe_jax_torch.launch import launch
from moe_jax_torch.ops import (
    BACKWARD_TAGS,
    TAGS,
    check_range,
    each,
    imported,
    known_weights,
    operators,
    owned,
    padded,
    register,
)

_ARGUMENTS = "Tensor x, Tensor weight, Tensor ids, Tensor? bias"
_OPERANDS = (0, 1, 3)  # of the arguments, those with gradients

operators.define(f"expert_linear({_ARGUMENTS}) -> Tensor", tags=TAGS)
operators.define(f"expert_linear_backward(Tensor grad, {_ARGUMENTS}, bool[] needs) -> Tensor[]", tags=BACKWARD_TAGS)


def expert_linear(
    x: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``x[t] @ weight[ids[t, j]].T + bias[ids[t, j]]`` for each slot j of each token t, zero where the id is -1.

    Differentiable in `x`, `weight` and `bias`. It is half of what `fused_experts` does, and slower than half of it: rows are
    grouped by expert and put back into the order of the slots.

    Args:
        x: ``[T, K]``, bfloat16, float16 or float32.
        weight: ``[E, N, K]``, of the same dtype.
        ids: int32 or int64 ``[T, k]``, in [-1, E).
        bias: ``[E, N]``, floating.

    Returns:
        ``[T * k, N]``, of the dtype of `x`; the row of slot j of token t is ``t * k + j``.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or values that do not fit.

    Source: `moe_jax.ops.grouped_matmul` computes it.

    Example:
        >>> x, weight = torch.ones(2, 3), torch.stack([torch.ones(1, 3), torch.full((1, 3), 2.0)])
        >>> expert_linear(x, weight, torch.tensor([[1, 0], [-1, 1]])).tolist()
        [[6.0], [3.0], [0.0], [6.0]]
    """
    if x.dim() != 2 or weight.dim() != 3 or x.shape[1] != weight.shape[2] or x.dtype != weight.dtype:
        raise ValueError(
            f"x is {x.dtype} {tuple(x.shape)} and weight {weight.dtype} {tuple(weight.shape)}, but they must be [T, K] and "
            "[E, N, K] of one dtype"
        )
    if ids.dim() != 2 or ids.shape[0] != x.shape[0] or ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"ids is {ids.dtype} {tuple(ids.shape)}, but must be int32 or int64 [T={x.shape[0]}, k]")
    if bias is not None and bias.shape != weight.shape[:2]:
        raise ValueError(f"bias is {tuple(bias.shape)}, but must be {tuple(weight.shape[:2])}, a row for each expert")
    tensors = (x, weight, ids, bias)
    check_devices(tensors)
    refuse_forward_mode(tensors)
    return differentiably(ExpertLinear, torch.ops.moe_jax.expert_linear.default, *tensors)


class ExpertLinear(torch.autograd.Function):
    """`torch.ops.moe_jax.expert_linear` with its gradient. Forward mode and second derivatives raise."""

    @staticmethod
    def forward(x: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The operator."""
        return torch.ops.moe_jax.expert_linear(x, weight, ids, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        """Keeps the inputs."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        """Of those inputs that have gradients and need them."""
        needs = [ctx.needs_input_grad[place] for place in _OPERANDS]
        grads = iter(torch.ops.moe_jax.expert_linear_backward(grad, *ctx.saved_tensors, needs))
        wanted = {place: next(grads) for place, need in zip(_OPERANDS, needs, strict=True) if need}
        return tuple(wanted.get(place) for place in range(4))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        """One element of the batch after the other."""
        return each(ExpertLinear.apply, info, in_dims, arguments)


def _linear(x: jax.Array, weight: jax.Array, bias: jax.Array | None, ids: jax.Array, implementation: str) -> jax.Array:
    groups = group_tokens(ids, num_experts=weight.shape[0], implementation=implementation)
    rows = gather(x, groups, implementation=implementation)
    out = grouped_matmul(rows, weight, groups, bias=bias, implementation=implementation)
    # Each pair is a sum of one row, its own; without an expert, of none.
    return combine(out, groups.positions.reshape(-1, 1), None, implementation=implementation)


linear_forward = jax.jit(_linear, static_argnames="implementation")


@functools.partial(jax.jit, static_argnames=("implementation", "needs"))
def _linear_backward(
    grad: jax.Array,
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    ids: jax.Array,
    implementation: str,
    needs: tuple[bool, ...],
) -> list[jax.Array]:
    operands = (x, weight, bias)

    def forward(wanted: list[jax.Array]) -> jax.Array:
        values = iter(wanted)
        chosen = (next(values) if need else old for need, old in zip(needs, operands, strict=True))
        return _linear(*chosen, ids, implementation)

    _, pull = jax.vjp(forward, [operand for need, operand in zip(needs, operands, strict=True) if need])
    return pull(grad)[0]


def _padded_operands(x: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, bias: torch.Tensor | None) -> Any:
    return (padded(x, 0), weight, bias, padded(ids, -1)), {"implementation": implementation_for(x.device.type)}


def _map_weights(function: Callable[[Any], Any], operands: tuple[Any, ...]) -> tuple[Any, ...]:
    x, weight, bias, ids = operands
    return x, function(weight), None if bias is None else function(bias), ids


def _expert_linear(x: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    out = _fake(x, weight, ids, bias)
    if out.numel() == 0:
        return out
    operands, static = _padded_operands(x, weight, ids, bias)

    def own() -> Any:
        x, weight, bias, ids = _map_weights(known_weights.own, operands)
        return owned(x), weight, bias, owned(ids)

    check = functools.partial(check_range, "ids", ids, weight.shape[0])
    results = launch(linear_forward, operands, static, check=check, own=own)
    if results is not None:
        return results[0][: out.shape[0]]
    x, weight, bias, ids = _map_weights(known_weights, operands)
    return to_torch(linear_forward(imported(x), weight, bias, imported(ids), **static), out=out, rows=out.shape[0])


def _expert_linear_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    bias: torch.Tensor | None,
    needs: list[bool],
) -> list[torch.Tensor]:
    outs = _fake_backward(grad, x, weight, ids, bias, needs)
    if grad.numel() == 0:
        return [out.zero_() for out in outs]
    operands, static = _padded_operands(x, weight, ids, bias)
    x, weight, bias, ids = _map_weights(known_weights, operands)
    grad = torch.nn.functional.pad(grad, (0, 0, 0, ids.numel() - grad.shape[0]))
    grads = _linear_backward(imported(grad), imported(x), weight, bias, imported(ids), **static, needs=tuple(needs))
    return [to_torch(g, out=out, rows=out.shape[0]) for g, out in zip(grads, outs, strict=True)]


def _fake(x: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, _: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty((ids.shape[0] * ids.shape[1], weight.shape[1]))


def _fake_backward(_: torch.Tensor, *arguments: Any) -> list[torch.Tensor]:
    *tensors, needs = arguments
    operands = (tensors[place] for place in _OPERANDS)
    return [operand.new_empty(operand.shape) for operand, need in zip(operands, needs, strict=True) if need]


register("expert_linear", _expert_linear, _fake)
register("expert_linear_backward", _expert_linear_backward, _fake_backward, vmap=True)
