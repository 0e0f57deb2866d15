"""The operators that torch knows: `torch.ops.moe_jax`, with fake kernels for the compiler and gradients for autograd.

They are low-level: `moe_jax_torch.functional` calls them. Their gradients are in `moe_jax_torch.gradients`; called alone an
operator has none, and torch warns when one is asked for. `moe` is for inference alone. An operator's kernel is the only place
that launches kernels and from which tensors cross to JAX, so that the compiler, vmap and autograd never look into that. It checks
its arguments where their shapes and dtypes are new to it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import torch

from moe_jax.routing_methods import RoutingRule
from moe_jax_torch import calls
from moe_jax_torch.bridge import as_jax_dtype, own_memory, to_jax, to_torch
from moe_jax_torch.checks import check_devices, check_gating, check_slots, check_weights
from moe_jax_torch.launch import key_of, launch, relaunch
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
OPERANDS = (0, 1, 2, 3, 6, 7)

# The compiler must keep strides as they are, and split CUDA graphs around what JAX runs, which is not launched on torch's stream.
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
BACKWARD_TAGS = (*TAGS, torch.Tag.cudagraph_unsafe)

operators = torch.library.Library("moe_jax", "DEF")  # the operators live as long as this object
operators.define(f"fused_experts({_LAYER}) -> Tensor", tags=TAGS)
operators.define(f"fused_experts_out({_LAYER}, Tensor(a!) out) -> ()", tags=TAGS)
operators.define(f"moe({_MOE}) -> Tensor", tags=TAGS)
operators.define(f"fused_experts_backward(Tensor grad, {_LAYER}, bool[] needs) -> Tensor[]", tags=BACKWARD_TAGS)
operators.define(f"route({_RULE}) -> (Tensor, Tensor)", tags=TAGS)
operators.define(f"route_backward(Tensor grad, {_RULE}) -> Tensor", tags=BACKWARD_TAGS)

known_weights = WeightCache()


def bucket(tokens: int) -> int:
    """The token count that a call is compiled for: the next power of two. The rows in between visit no expert.

    Example:
        >>> [bucket(tokens) for tokens in (1, 5, 64, 65)]
        [1, 8, 64, 128]
    """
    return 1 << max(0, tokens - 1).bit_length()


def padded(tensor: torch.Tensor, value: float | None) -> torch.Tensor:
    """The tensor with rows of `value` up to its bucket; of anything for None, where no kernel reads rows without an expert."""
    tokens = tensor.shape[0]
    if tokens == bucket(tokens):
        return tensor
    longer = tensor.new_empty((bucket(tokens), *tensor.shape[1:]))
    longer[:tokens] = tensor
    if value is not None:
        longer[tokens:] = value
    return longer


def check_range(name: str, ids: torch.Tensor, bound: int) -> None:
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
    if x.shape[0] != bucket(x.shape[0]):
        if not x.shape[:1] == topk_weights.shape[:1] == topk_ids.shape[:1]:
            _check_experts(layer)  # now: their buckets may be the same
        x, topk_weights, topk_ids = padded(x, value), padded(topk_weights, value), padded(topk_ids, -1)
    operands = calls.Operands(x, w1, w2, topk_weights, w1_bias, w2_bias)
    static = calls.Static(activation, on_input, experts, calls.implementation_for(x.device.type), *swiglu)
    return (operands, topk_ids, expert_map), static


def _cross(operands: calls.Operands, tensor: Callable[[Any], Any], weight: Callable[[Any], Any]) -> calls.Operands:
    """`weight` of each of the weights, `tensor` of all else."""
    x, w1, w2, topk_weights, w1_bias, w2_bias = operands
    topk_weights = None if topk_weights is None else tensor(topk_weights)
    w1_bias, w2_bias = (None if bias is None else weight(bias) for bias in (w1_bias, w2_bias))
    return calls.Operands(tensor(x), weight(w1), weight(w2), topk_weights, w1_bias, w2_bias)


def imported(tensor: torch.Tensor) -> jax.Array:
    """The tensor as an array, without its gradient: `bridge.to_jax`."""
    return to_jax(tensor, detach=True)


def owned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor where kernels can take it, a copy where they cannot: `bridge.own_memory`."""
    return own_memory(as_jax_dtype(tensor))


def _run(
    function: Any,
    tensors: Any,
    static: dict[str, Any],
    check: Callable[[], None],
    tokens: int,
    out: torch.Tensor | None,
    again: Any = None,
) -> torch.Tensor:
    """A layer, its `calls.Operands` first: launched on torch's stream where it can be, else by JAX."""
    operands, *others = tensors

    def own() -> Any:
        return _cross(operands, owned, known_weights.own), *jax.tree.map(owned, others)

    results = launch(function, tensors, static, check=check, own=own, again=again)
    if results is None:
        arrays = _cross(operands, imported, known_weights), *jax.tree.map(imported, others)
        return to_torch(function(*arrays, **static), out=out, rows=tokens)
    result = results[0] if results[0].shape[0] == tokens else results[0][:tokens]
    return result if out is None else out.copy_(result)


def _check_experts(layer: tuple[Any, ...]) -> None:
    x, w1, w2, topk_weights, topk_ids, expert_map, w1_bias, w2_bias, activation, on_input, experts, *_ = layer
    check_weights(x, w1, w2, activation, w1_bias, w2_bias)
    check_slots(x, w1, topk_weights, topk_ids, expert_map, experts, on_input)
    check_devices(layer[:8])
    check_range("topk_ids", topk_ids, experts)
    if expert_map is not None:
        check_range("expert_map", expert_map, w1.shape[0])


def _run_experts(layer: tuple[Any, ...], out: torch.Tensor | None) -> torch.Tensor:
    x = layer[0]
    if x.dim() != 2 or x.shape[0] == 0:  # kernels cannot have grids of nothing
        _check_experts(layer)
        return _fake_fused_experts(*layer) if out is None else out
    tensors, static = _padded_layer(layer)
    check = functools.partial(_check_experts, layer)
    return _run(calls.experts_forward, tensors, {"static": static}, check, x.shape[0], out)


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
    operands, (ids, expert_map) = _cross(tensors[0], imported, known_weights), jax.tree.map(imported, tensors[1:])
    needs, grad = tuple(needs), imported(padded(grad, 0))
    grads = calls.experts_backward(grad, operands, ids, expert_map, static=static, needs=needs)
    with_tokens = [
        name in ("x", "topk_weights") for name, need in zip(calls.Operands._fields, needs, strict=True) if need
    ]
    return [to_torch(g, rows=tokens if rows else None) for g, rows in zip(grads, with_tokens, strict=True)]


def moe(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    expert_map: torch.Tensor | None,
    w1_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
    *static: Any,
) -> torch.Tensor:
    """The kernel of ``torch.ops.moe_jax.moe``, whose arguments it takes: routing and experts as one, without a gradient."""
    x, scores, tokens = hidden_states, logits, hidden_states.shape[0]
    if tokens & (tokens - 1) and logits.shape[:1] == x.shape[:1]:
        x, scores = padded(x, None), padded(logits, float("nan"))  # a row of NaN chooses no expert
    tensors = (x, w1, w2, w1_bias, w2_bias, scores, bias, expert_map)
    key = key_of("moe", static, tensors)
    results = relaunch(key, tensors)
    if results is not None:
        (result,) = results
        return result if result.shape[0] == tokens else result[:tokens]
    activation, on_input, alpha, beta, limit, top_k, *routing = static
    layer = hidden_states, w1, w2, activation, w1_bias, w2_bias
    check = functools.partial(_check_moe, layer, logits, bias, expert_map, top_k)
    if x.dim() != 2 or logits.dim() != 2 or logits.shape[0] != tokens or tokens == 0:
        check()
        return _fake_fused_experts(x)
    implementation = calls.implementation_for(x.device.type)
    arguments = {
        "static": calls.Static(activation, on_input, logits.shape[1], implementation, alpha, beta, limit),
        "top_k": top_k,
        "routing": calls.routing_of(*routing),
    }
    operands = calls.Operands(x, w1, w2, None, w1_bias, w2_bias), scores, bias, expert_map
    return _run(calls.moe_forward, operands, arguments, check, tokens, None, key)


def _check_moe(
    layer: tuple[Any, ...],
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    expert_map: torch.Tensor | None,
    top_k: int,
) -> None:
    x, w1, w2, _, w1_bias, w2_bias = layer
    check_weights(*layer)
    check_gating(x, logits, top_k)
    check_devices((x, w1, w2, w1_bias, w2_bias, logits, bias, expert_map))


def _static_route(logits: torch.Tensor, top_k: int, rule: tuple[Any, ...]) -> dict[str, Any]:
    implementation = calls.implementation_for(logits.device.type)
    return {"top_k": top_k, "rule": RoutingRule(*rule), "implementation": implementation}


def _route(
    logits: torch.Tensor, bias: torch.Tensor | None, top_k: int, *rule: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = logits.shape[0]
    if tokens == 0:
        return _fake_route(logits, bias, top_k)
    tensors, static = (padded(logits, 0), bias), _static_route(logits, top_k, rule)
    check = functools.partial(check_devices, tensors)
    launched = launch(calls.route_forward, tensors, static, check=check, own=lambda: jax.tree.map(owned, tensors))
    if launched is None:
        ids, weights = (
            to_torch(array, rows=tokens) for array in calls.route_forward(*jax.tree.map(imported, tensors), **static)
        )
        return weights, ids
    ids, weights = launched
    return weights[:tokens], ids[:tokens]


def _route_backward(
    grad: torch.Tensor, logits: torch.Tensor, bias: torch.Tensor | None, top_k: int, *rule: Any
) -> torch.Tensor:
    out = _fake_route_backward(grad, logits)
    if (tokens := logits.shape[0]) > 0:
        arrays = jax.tree.map(imported, (padded(grad, 0), padded(logits, 0), bias))
        to_torch(calls.route_backward(*arrays, **_static_route(logits, top_k, rule)), out=out, rows=tokens)
    return out


def _fake_fused_experts(hidden_states: torch.Tensor, *_: Any) -> torch.Tensor:
    return hidden_states.new_empty(hidden_states.shape)


def _fake_fused_experts_backward(grad: torch.Tensor, *arguments: Any) -> list[torch.Tensor]:
    *layer, needs = arguments
    operands = (layer[place] for place in OPERANDS)
    return [operand.new_empty(operand.shape) for operand, need in zip(operands, needs, strict=True) if need]


def _fake_route(logits: torch.Tensor, _: Any, top_k: int, *__: Any) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int32)


def _fake_route_backward(_: torch.Tensor, logits: torch.Tensor, *__: Any) -> torch.Tensor:
    return logits.new_empty(logits.shape)


def each(operator: Any, info: Any, in_dims: tuple[Any, ...], arguments: tuple[Any, ...]) -> tuple[Any, Any]:
    """The rule of vmap: the operator on each element of the batch, one after the other."""

    def element(index: int) -> list[Any]:
        pairs = zip(arguments, in_dims, strict=True)
        return [a if dim is None or not isinstance(a, torch.Tensor) else a.select(dim, index) for a, dim in pairs]

    results = [operator(*element(index)) for index in range(info.batch_size)]
    if isinstance(results[0], torch.Tensor):
        return torch.stack(results), 0
    stacked = [torch.stack(parts) for parts in zip(*results, strict=True)]
    return type(results[0])(stacked), type(results[0])([0] * len(stacked))


def register(name: str, kernel: Callable[..., Any], fake: Callable[..., Any], *, vmap: bool = False) -> None:
    """Gives a defined operator its kernel, on CPUs and GPUs, its fake kernel, and with `vmap` the rule `each`."""
    for device in ("CPU", "CUDA"):
        operators.impl(name, kernel, device)
    torch.library.register_fake(f"moe_jax::{name}", fake, lib=operators)
    if vmap:
        operator = getattr(torch.ops.moe_jax, name)

        def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
            return each(operator, info, in_dims, arguments)

        torch.library.register_vmap(f"moe_jax::{name}", rule, lib=operators)


def _register() -> None:
    kernels = {
        "fused_experts": (_fused_experts, _fake_fused_experts),
        "fused_experts_out": (_fused_experts_out, lambda *_: None),
        "moe": (moe, _fake_fused_experts),
        "fused_experts_backward": (_fused_experts_backward, _fake_fused_experts_backward),
        "route": (_route, _fake_route),
        "route_backward": (_route_backward, _fake_route_backward),
    }
    for name, (kernel, fake) in kernels.items():
        register(name, kernel, fake, vmap=name in ("moe", "fused_experts_backward", "route_backward"))


_register()
