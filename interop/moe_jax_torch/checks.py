"""What a layer's tensors must be like: each check raises with the rule, the values and the way out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from moe_jax.activations import ACTIVATIONS, ALIASES, get_activation
from moe_jax_torch.calls import TORCH_ACTIVATIONS

_ACTIVATIONS = frozenset((*ACTIVATIONS, *ALIASES, *TORCH_ACTIVATIONS))
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_SCORES = ("softmax", "sigmoid")


def refuse_forward_mode(tensors: tuple[torch.Tensor | None, ...]) -> None:
    """Raises NotImplementedError for a tensor with a forward-mode tangent.

    Example:
        >>> refuse_forward_mode((torch.ones(2), None))
    """
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:  # the compiler refuses it itself
        return
    if any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError(
            "moe_jax_torch has no forward-mode derivatives; use reverse mode (backward, torch.func.grad, torch.func.vjp), "
            "or jax.jvp on moe_jax itself"
        )


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """torch's decorator of this name, for ``backward`` of a `torch.autograd.Function`, without its hole.

    A second derivative raises. torch's own does not see one where the incoming gradient is constant, as that of a sum is: it
    would take the first derivative for a constant, and leave the second out of a gradient penalty without a word.

    Example:
        >>> class Double(torch.autograd.Function):
        ...     @staticmethod
        ...     def forward(ctx, x):
        ...         return 2 * x
        ...
        ...     @staticmethod
        ...     @once_differentiable
        ...     def backward(ctx, grad):
        ...         return 2 * grad
        >>> x = torch.ones(2, requires_grad=True)
        >>> (gradient,) = torch.autograd.grad(Double.apply(x).sum(), x, create_graph=True)
        >>> gradient.sum().backward()
        Traceback (most recent call last):
        ...
        RuntimeError: trying to differentiate twice a function that was marked with @once_differentiable
    """
    once = torch.autograd.function.once_differentiable(backward)

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = tuple(_as_variable(grad) for grad in grads)
        return once(ctx, *grads)

    return checked


def _as_variable(grad: torch.Tensor | None) -> torch.Tensor | None:
    if grad is None or grad.requires_grad or not grad.is_floating_point():
        return grad
    grad = grad.detach()
    grad.requires_grad = True
    return grad


def check_activation(activation: str, alpha: float | None, beta: float | None, limit: float | None) -> None:
    """Refuses a name that no activation has, and parameters that it does not take.

    Raises:
        ValueError: as said.

    Example:
        >>> check_activation("gelu", None, None, 7.0)
        Traceback (most recent call last):
        ...
        ValueError: swiglu_limit=7.0 has no meaning for activation='gelu'; ...
    """
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is not one of {', '.join(sorted(_ACTIVATIONS))}")
    if (
        torch.compiler.is_compiling()
    ):  # the operator looks at the parameters again, and the compiler cannot look into JAX
        return
    if not (alpha is None and beta is None and limit is None):
        name, _ = TORCH_ACTIVATIONS.get(activation, (activation, False))
        get_activation(name, alpha, beta, limit)


def check_gating(
    hidden_states: torch.Tensor, gating_output: torch.Tensor, topk: int, scoring_func: str = "softmax"
) -> None:
    """Raises ValueError or TypeError for router logits or a routing that do not fit.

    Example:
        >>> check_gating(torch.ones(3, 8), torch.ones(3, 4), 2)
    """
    if gating_output.dim() != 2 or gating_output.shape[0] != hidden_states.shape[0]:
        raise ValueError(
            f"gating_output is {tuple(gating_output.shape)}, but must be [T, E] with the T of hidden_states, "
            f"{hidden_states.shape[0]}"
        )
    if gating_output.dtype not in _FLOATS:
        raise TypeError(f"gating_output is {gating_output.dtype}, not bfloat16, float16 or float32; cast it")
    if not 1 <= topk <= gating_output.shape[1]:
        raise ValueError(f"topk={topk} must lie in [1, E={gating_output.shape[1]}]")
    if scoring_func not in _SCORES:
        raise ValueError(f"scoring_func={scoring_func!r} is not one of {', '.join(_SCORES)}")


def check_weights(
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    activation: str,
    w1_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
) -> None:
    """Raises ValueError or TypeError for hidden states ``[T, H]``, weights and biases that do not belong to one layer.

    Example:
        >>> check_weights(torch.ones(3, 8), torch.ones(2, 32, 8), torch.ones(2, 8, 16), "silu", None, None)
    """
    if x.dim() != 2 or x.dtype not in _FLOATS:
        raise ValueError(
            f"hidden_states is {x.dtype} {tuple(x.shape)}, but must be bfloat16, float16 or float32 [T, H]; cast it, or "
            "flatten(0, -2) its leading axes"
        )
    if w1.dim() != 3 or w2.dim() != 3:
        raise ValueError(
            f"w1 and w2 have {w1.dim()} and {w2.dim()} axes, but must be [E_local, N, H] and [E_local, H, I]"
        )
    if w1.dtype != x.dtype or w2.dtype != x.dtype:
        raise TypeError(
            f"hidden_states is {x.dtype}, w1 {w1.dtype}, w2 {w2.dtype}, but all must be the same; cast them"
        )
    gated = not activation.endswith("_no_mul")
    local, hidden, intermediate = w1.shape[0], x.shape[1], w2.shape[2]
    rows = 2 * intermediate if gated else intermediate
    if tuple(w1.shape) != (local, rows, hidden) or tuple(w2.shape) != (local, hidden, intermediate):
        raise ValueError(
            f"w1 is {tuple(w1.shape)} and w2 {tuple(w2.shape)}, but for H={hidden} and activation={activation!r} they must be "
            f"[E_local, {'2I' if gated else 'I'}, H] and [E_local, H, I]: the contracted axis comes last"
        )
    for name, bias, width in (("w1_bias", w1_bias, rows), ("w2_bias", w2_bias, hidden)):
        if bias is not None and (tuple(bias.shape) != (local, width) or bias.dtype not in _FLOATS):
            raise ValueError(f"{name} is {bias.dtype} {tuple(bias.shape)}, but must be floating {(local, width)}")


def check_slots(
    x: torch.Tensor,
    w1: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    experts: int,
    on_input: bool,
) -> None:
    """Raises ValueError or TypeError for slots ``[T, k]`` or an expert map that do not fit E experts and their weights.

    Example:
        >>> slots = torch.ones(3, 2), torch.zeros(3, 2, dtype=torch.int32)
        >>> check_slots(torch.ones(3, 8), torch.ones(4, 32, 8), *slots, None, 4, False)
    """
    if topk_ids.dtype not in (torch.int32, torch.int64) or not topk_weights.is_floating_point():
        raise TypeError(
            f"topk_ids is {topk_ids.dtype} and topk_weights {topk_weights.dtype}, but must be int32 or int64, and "
            "floating; note their order: weights, then ids"
        )
    if topk_ids.dim() != 2 or topk_ids.shape[0] != x.shape[0] or topk_weights.shape != topk_ids.shape:
        raise ValueError(
            f"topk_weights is {tuple(topk_weights.shape)} and topk_ids {tuple(topk_ids.shape)}, but both must be [T, k] "
            f"with the T of hidden_states, {x.shape[0]}"
        )
    if not 1 <= topk_ids.shape[1] <= experts:
        raise ValueError(f"topk_ids has k={topk_ids.shape[1]} slots a token, which must lie in [1, E={experts}]")
    if on_input and topk_ids.shape[1] != 1:
        raise ValueError(
            f"apply_router_weight_on_input needs k = 1, got topk_ids of shape {tuple(topk_ids.shape)}: with more experts a "
            "token has no single weight"
        )
    if expert_map is None:
        if w1.shape[0] != experts:
            raise ValueError(
                f"w1 holds {w1.shape[0]} experts of global_num_experts={experts}; pass the expert_map that says which"
            )
    elif tuple(expert_map.shape) != (experts,) or expert_map.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"expert_map is {expert_map.dtype} {tuple(expert_map.shape)}, but must be int32 or int64 [{experts}]: for "
            "each global expert its local id, or -1"
        )


def check_devices(tensors: tuple[torch.Tensor | None, ...]) -> None:
    """Raises ValueError for tensors on several devices.

    Example:
        >>> check_devices((torch.ones(2), None))
    """
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        raise ValueError(f"the tensors are on {', '.join(sorted(map(str, devices)))}; move them to one device")
