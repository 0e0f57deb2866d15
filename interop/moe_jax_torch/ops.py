"""The operators that torch knows: `torch.ops.moe_jax`, with fake kernels for the compiler and gradients for autograd.

They are low-level: `moe_jax_torch.functional` checks arguments and calls them. Their gradients are those of `FusedExperts` and
`Route`; called alone an operator has none, and torch warns when one is asked for. `moe` is for inference alone. An operator's
kernel is the only place that launches kernels and from which tensors cross to JAX, so that the compiler, vmap and autograd never
look into that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import torch

from moe_jax.routing_methods import RoutingRule
from moe_jax_torch import calls
from moe_jax_torch.bridge import to_jax, to_torch
from moe_jax_torch.checks import once_differentiable
from moe_jax_torch.launch import launcher
from moe_jax_torch.weight_cache import WeightCache

_LAYER = (
    "Tensor hidden_states, Tensor w1, Tensor w2, Tensor topk_weights, Tensor topk_ids, Tensor? expert_map, "
    "Tensor? w1_bias, Tensor? w2_bias, str activation, bool apply_router_weight_on_input, int global_num_experts, "
    "float? swiglu_alpha, float? swiglu_beta, float? swiglu_limit"
)
_RULE = (
    "Tensor logits, Tensor? bias, int top_k, str score, str weight, bool renormalize, float renorm_epsilon, "
    "int num_expert_group, int topk_group, str group_score, float scale"
)
_MOE = (
    "Tensor hidden_states, Tensor w1, Tensor w2, Tensor logits, Tensor? bias, Tensor? expert_map, Tensor? w1_bias, "
    "Tensor? w2_bias, str activation, bool apply_router_weight_on_input, float? swiglu_alpha, float? swiglu_beta, "
    "float? swiglu_limit, int top_k, str method, bool? renormalize, "
    "int num_expert_group, int topk_group, float routed_scaling_factor"
)
# Of the arguments of a layer, those with gradients: as `calls.Operands` has them.
_OPERANDS = (0, 1, 2, 3, 6, 7)

# The compiler must keep strides as they are, and split CUDA graphs around what JAX runs, which is not launched on torch's stream.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
_BACKWARD_TAGS = (*_TAGS, torch.Tag.cudagraph_unsafe)

_library = torch.library.Library("moe_jax", "DEF")  # the operators live as long as this object
_library.define(f"fused_experts({_LAYER}) -> Tensor", tags=_TAGS)
_library.define(f"fused_experts_out({_LAYER}, Tensor(a!) out) -> ()", tags=_TAGS)
_library.define(f"moe({_MOE}) -> Tensor", tags=_TAGS)
_library.define(f"fused_experts_backward(Tensor grad, {_LAYER}, bool[] needs) -> Tensor[]", tags=_BACKWARD_TAGS)
_library.define(f"route({_RULE}) -> (Tensor, Tensor)", tags=_TAGS)
_library.define(f"route_backward(Tensor grad, {_RULE}) -> Tensor", tags=_BACKWARD_TAGS)

_weights = WeightCache()


def bucket(tokens: int) -> int:
    """The token count that a call is compiled for: the next power of two. The rows in between visit no expert.

    Example:
        >>> [bucket(tokens) for tokens in (1, 5, 64, 65)]
        [1, 8, 64, 128]
    """
    return 1 << max(0, tokens - 1).bit_length()


def _padded(tensor: torch.Tensor, value: float | None = 0) -> torch.Tensor:
    """The tensor with rows of `value` up to its bucket; of anything for None, where no kernel reads rows without an expert."""
    tokens = tensor.shape[0]
    if tokens == bucket(tokens):
        return tensor
    padded = tensor.new_empty((bucket(tokens), *tensor.shape[1:]))
    padded[:tokens] = tensor
    if value is not None:
        padded[tokens:] = value
    return padded


def _check_range(name: str, ids: torch.Tensor, bound: int) -> None:
    """Refuses ids outside [-1, bound) where they are at hand; on a GPU, where looking is waiting, such an id is no expert."""
    if ids.device.type != "cpu" or ids.numel() == 0:
        return
    low, high = (int(value) for value in torch.aminmax(ids))
    if low < -1 or high >= bound:
        raise ValueError(f"{name} ranges from {low} to {high}, but must lie in [-1, {bound}), -1 for no expert")


# What `calls` takes, but tensors.
_Layer = tuple[calls.Operands, torch.Tensor, torch.Tensor | None]


def _padded_layer(layer: tuple[Any, ...], value: float | None = None) -> tuple[_Layer, calls.Static]:
    """The tensors of a layer, those with tokens padded (ids with -1, others with `value`), and its static part."""
    x, w1, w2, topk_weights, topk_ids, expert_map, w1_bias, w2_bias, activation, on_input, experts, *swiglu = layer
    _check_range("topk_ids", topk_ids, experts)
    if expert_map is not None:
        _check_range("expert_map", expert_map, w1.shape[0])
    operands = calls.Operands(_padded(x, value), w1, w2, _padded(topk_weights, value), w1_bias, w2_bias)
    static = calls.Static(activation, on_input, experts, calls.implementation_for(x.device.type), *swiglu)
    return (operands, _padded(topk_ids, -1), expert_map), static


def _cross(operands: calls.Operands, tensor: Callable[[Any], Any], weight: Callable[[Any], Any]) -> calls.Operands:
    """`weight` of each of the weights, `tensor` of all else."""
    x, w1, w2, topk_weights, w1_bias, w2_bias = operands
    topk_weights = None if topk_weights is None else tensor(topk_weights)
    w1_bias, w2_bias = (None if bias is None else weight(bias) for bias in (w1_bias, w2_bias))
    return calls.Operands(tensor(x), weight(w1), weight(w2), topk_weights, w1_bias, w2_bias)


def _import(tensor: torch.Tensor) -> jax.Array:
    return to_jax(tensor, detach=True)


def _run(function: Any, tensors: Any, static: dict[str, Any], tokens: int, out: torch.Tensor | None) -> torch.Tensor:
    """A layer, its `calls.Operands` first: launched on torch's stream where it can be, else by JAX."""
    operands, *others = tensors
    launch = launcher(function, tensors, static)
    if launch is None:
        operands = _cross(operands, _import, _weights)
        return to_torch(function(operands, *jax.tree.map(_import, others), **static), out=out, rows=tokens)
    (result,) = launch((_cross(operands, lambda tensor: tensor, _weights.own), *others))
    result = result if result.shape[0] == tokens else result[:tokens]
    return result if out is None else out.copy_(result)


def _run_experts(layer: tuple[Any, ...], out: torch.Tensor | None) -> torch.Tensor:
    tokens = layer[0].shape[0]
    if tokens == 0:  # kernels cannot have grids of nothing
        return _fake_fused_experts(*layer) if out is None else out
    tensors, static = _padded_layer(layer)
    return _run(calls.experts_forward, tensors, {"static": static}, tokens, out)


def _fused_experts(*layer: Any) -> torch.Tensor:
    return _run_experts(layer, None)


def _fused_experts_out(*arguments: Any) -> None:
    *layer, out = arguments
    _run_experts(tuple(layer), out)


def _fused_experts_backward(grad: torch.Tensor, *arguments: Any) -> list[torch.Tensor]:
    *layer, needs = arguments
    tokens = layer[0].shape[0]
    if tokens == 0:
        return [out.zero_() for out in _fake_fused_experts_backward(grad, *arguments)]
    tensors, static = _padded_layer(tuple(layer), 0)
    operands, (ids, expert_map) = _cross(tensors[0], _import, _weights), jax.tree.map(_import, tensors[1:])
    needs, grad = tuple(needs), _import(_padded(grad))
    grads = calls.experts_backward(grad, operands, ids, expert_map, static=static, needs=needs)
    with_tokens = [
        name in ("x", "topk_weights") for name, need in zip(calls.Operands._fields, needs, strict=True) if need
    ]
    return [to_torch(g, rows=tokens if rows else None) for g, rows in zip(grads, with_tokens, strict=True)]


def _moe(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    expert_map: torch.Tensor | None,
    w1_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
    activation: str,
    apply_router_weight_on_input: bool,
    swiglu_alpha: float | None,
    swiglu_beta: float | None,
    swiglu_limit: float | None,
    top_k: int,
    *routing: Any,
) -> torch.Tensor:
    tokens, experts = logits.shape
    if tokens == 0:
        return _fake_fused_experts(hidden_states)
    operands = calls.Operands(_padded(hidden_states, None), w1, w2, None, w1_bias, w2_bias)
    tensors = operands, _padded(logits, float("nan")), bias, expert_map  # a row of NaN chooses no expert
    implementation = calls.implementation_for(hidden_states.device.type)
    swiglu = (swiglu_alpha, swiglu_beta, swiglu_limit)
    static = {
        "static": calls.Static(activation, apply_router_weight_on_input, experts, implementation, *swiglu),
        "top_k": top_k,
        "routing": calls.routing_of(*routing),
    }
    return _run(calls.moe_forward, tensors, static, tokens, None)


def _static_route(logits: torch.Tensor, top_k: int, rule: tuple[Any, ...]) -> dict[str, Any]:
    implementation = calls.implementation_for(logits.device.type)
    return {"top_k": top_k, "rule": RoutingRule(*rule), "implementation": implementation}


def _route(
    logits: torch.Tensor, bias: torch.Tensor | None, top_k: int, *rule: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = logits.shape[0]
    if tokens == 0:
        return _fake_route(logits, bias, top_k)
    tensors, static = (_padded(logits), bias), _static_route(logits, top_k, rule)
    launch = launcher(calls.route_forward, tensors, static)
    if launch is None:
        ids, weights = (
            to_torch(array, rows=tokens) for array in calls.route_forward(*jax.tree.map(_import, tensors), **static)
        )
        return weights, ids
    ids, weights = launch(tensors)
    return weights[:tokens], ids[:tokens]


def _route_backward(
    grad: torch.Tensor, logits: torch.Tensor, bias: torch.Tensor | None, top_k: int, *rule: Any
) -> torch.Tensor:
    out = _fake_route_backward(grad, logits)
    if (tokens := logits.shape[0]) > 0:
        arrays = jax.tree.map(_import, (_padded(grad), _padded(logits), bias))
        to_torch(calls.route_backward(*arrays, **_static_route(logits, top_k, rule)), out=out, rows=tokens)
    return out


def _fake_fused_experts(hidden_states: torch.Tensor, *_: Any) -> torch.Tensor:
    return hidden_states.new_empty(hidden_states.shape)


def _fake_fused_experts_backward(grad: torch.Tensor, *arguments: Any) -> list[torch.Tensor]:
    *layer, needs = arguments
    operands = (layer[place] for place in _OPERANDS)
    return [operand.new_empty(operand.shape) for operand, need in zip(operands, needs, strict=True) if need]


def _fake_route(logits: torch.Tensor, _: Any, top_k: int, *__: Any) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int32)


def _fake_route_backward(_: torch.Tensor, logits: torch.Tensor, *__: Any) -> torch.Tensor:
    return logits.new_empty(logits.shape)


def _each(operator: Any, info: Any, in_dims: tuple[Any, ...], arguments: tuple[Any, ...]) -> tuple[Any, Any]:
    """The rule of vmap: the operator on each element of the batch, one after the other."""

    def element(index: int) -> list[Any]:
        pairs = zip(arguments, in_dims, strict=True)
        return [a if dim is None or not isinstance(a, torch.Tensor) else a.select(dim, index) for a, dim in pairs]

    results = [operator(*element(index)) for index in range(info.batch_size)]
    if isinstance(results[0], torch.Tensor):
        return torch.stack(results), 0
    stacked = [torch.stack(parts) for parts in zip(*results, strict=True)]
    return type(results[0])(stacked), type(results[0])([0] * len(stacked))


def _register() -> None:
    kernels = {
        "fused_experts": (_fused_experts, _fake_fused_experts),
        "fused_experts_out": (_fused_experts_out, lambda *_: None),
        "moe": (_moe, _fake_fused_experts),
        "fused_experts_backward": (_fused_experts_backward, _fake_fused_experts_backward),
        "route": (_route, _fake_route),
        "route_backward": (_route_backward, _fake_route_backward),
    }
    for name, (kernel, fake) in kernels.items():
        for device in ("CPU", "CUDA"):
            _library.impl(name, kernel, device)
        torch.library.register_fake(f"moe_jax::{name}", fake, lib=_library)
    for name in ("moe", "fused_experts_backward", "route_backward"):
        operator = getattr(torch.ops.moe_jax, name)
        rule = lambda info, in_dims, *arguments, operator=operator: _each(operator, info, in_dims, arguments)  # noqa: E731
        torch.library.register_vmap(f"moe_jax::{name}", rule, lib=_library)


_register()


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
        needs = [ctx.needs_input_grad[place] for place in _OPERANDS]
        grads = iter(torch.ops.moe_jax.fused_experts_backward(grad, *ctx.saved_tensors, *ctx.static, needs))
        wanted = {place: next(grads) for place, need in zip(_OPERANDS, needs, strict=True) if need}
        return tuple(wanted.get(place) for place in range(8 + len(ctx.static)))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *layer: Any) -> tuple[Any, Any]:
        """One element of the batch after the other."""
        return _each(FusedExperts.apply, info, in_dims, layer)


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
        return _each(Route.apply, info, in_dims, arguments)
