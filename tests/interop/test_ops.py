"""The operators under autograd, the compiler, `torch.func`, checkpointing, and what torch's own checks say of them."""

import copy
import shutil
import sysconfig
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from torch.utils.checkpoint import checkpoint  # noqa: E402

from moe_jax_torch import fused_experts, fused_topk, grouped_topk, ops  # noqa: E402
from tests.interop.torch_layers import TOLERANCE, layer_of  # noqa: E402
from tests.util import check_close  # noqa: E402

NAMES = ("x", "w1", "w2", "weights", "w1_bias", "w2_bias")
GRADIENT_TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 1.5e-2}


def leaves(layer):
    """Copies that require a gradient, by name; ids and map as they are."""
    tensors = dict(zip(("x", "w1", "w2", "weights"), layer[:4], strict=True)) | {
        name: layer.kwargs[name] for name in ("w1_bias", "w2_bias") if name in layer.kwargs
    }
    return {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}


def call(function, layer, tensors):
    kwargs = layer.kwargs | {name: tensor for name, tensor in tensors.items() if "bias" in name}
    return function(*(tensors[name] for name in NAMES[:4]), layer.ids, **kwargs)


def ours(layer, tensors):
    return call(fused_experts, layer, tensors)


def loop(layer, tensors):
    return call(lambda *arguments, **kwargs: layer.__class__(*arguments, kwargs).loop(), layer, tensors)


def gradients(function, layer):
    tensors = leaves(layer)
    out = function(layer, tensors)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    out.backward(cotangent)
    return {name: tensor.grad for name, tensor in tensors.items()}


LAYERS = {
    "plain": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "bias": {"bias": True},
    "rank": {"local": [4, 1]},
    "weight on input": {"top_k": 1, "apply_router_weight_on_input": True},
    "swigluoai": {"activation": "swigluoai", "bias": True},
    "one token": {"tokens": 1},
    "no tokens": {"tokens": 0},
}


@pytest.mark.parametrize("arguments", LAYERS.values(), ids=LAYERS)
def test_gradients_equal_those_of_the_loop(arguments):
    layer = layer_of(**arguments)
    layer.ids[1:2] = -1
    expected = gradients(loop, layer)
    for name, gradient in gradients(ours, layer).items():
        wanted = torch.zeros(gradient.shape) if expected[name] is None else expected[name]
        assert gradient.dtype == (torch.float32 if name == "weights" else layer.x.dtype)
        check_close(gradient.float(), wanted.float(), GRADIENT_TOLERANCE[layer.x.dtype])


def test_only_the_gradients_that_are_needed_are_computed(monkeypatch):
    seen = []
    backward = ops.calls.experts_backward
    monkeypatch.setattr(ops.calls, "experts_backward", lambda *a, **k: seen.append(k["needs"]) or backward(*a, **k))
    layer = layer_of()
    tensors = leaves(layer)
    tensors["w1"].requires_grad_(False), tensors["w2"].requires_grad_(False)
    ours(layer, tensors).sum().backward()  # the incoming gradient is expanded: all strides 0
    assert seen == [(True, False, False, True, False, False)]
    assert tensors["w1"].grad is None and tensors["x"].grad is not None


def test_a_weight_that_changes_before_the_backward_pass_raises():
    layer = layer_of()
    tensors = leaves(layer)
    out = ours(layer, tensors)
    with torch.no_grad():
        tensors["w1"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_second_derivatives_and_forward_mode_raise():
    layer = layer_of()
    tensors = leaves(layer)
    (gradient,) = torch.autograd.grad(ours(layer, tensors).square().sum(), tensors["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()
    (gradient,) = torch.autograd.grad(ours(layer, tensors).sum(), tensors["x"], create_graph=True)  # of a constant
    with pytest.raises(RuntimeError, match="differentiate twice"):
        (gradient.square().sum() + tensors["x"].sum()).backward()
    logits = torch.randn(5, 4, requires_grad=True)
    weights, _ = fused_topk(logits, logits, 2, False)
    (gradient,) = torch.autograd.grad(weights.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.square().sum().backward()
    with pytest.raises(NotImplementedError, match="no forward-mode derivatives; use reverse mode"):
        torch.func.jvp(lambda x: fused_experts(x, *layer[1:5]), (layer.x,), (torch.ones_like(layer.x),))
    with pytest.raises(NotImplementedError, match="no forward-mode derivatives"):
        logits = torch.zeros(3, 4)
        torch.func.jvp(lambda logits: fused_topk(logits, logits, 2, True)[0], (logits,), (logits,))


def test_gradient_checkpointing():
    layer = layer_of()
    expected = gradients(ours, layer)
    found = gradients(lambda layer, tensors: checkpoint(ours, layer, tensors, use_reentrant=False), layer)
    for name in found:
        assert torch.equal(found[name], expected[name])


def test_gradients_of_routing():
    logits = torch.randn(9, 8, generator=torch.Generator().manual_seed(1))

    def by_torch(logits):
        return torch.softmax(logits.topk(3, dim=1).values, dim=1)

    def by_us(logits):
        return fused_topk(logits, logits, 3, True)[0]

    def grouped(logits):
        return grouped_topk(logits, logits, 3, False, 2, 2, scoring_func="sigmoid", routed_scaling_factor=2.0)[0]

    cotangent = torch.randn(9, 3, generator=torch.Generator().manual_seed(2))
    for function, reference in (
        (by_us, by_torch),
        (grouped, lambda logits: 2 * torch.sigmoid(logits.topk(3, dim=1).values)),
    ):
        found, expected = (
            torch.autograd.grad(f(leaf := logits.clone().requires_grad_()), leaf, cotangent)[0]
            for f in (function, reference)
        )
        check_close(found, expected, 2e-6)


NO_SWIGLU = (None, None, None)  # no alpha, beta, limit


def operands(layer):
    kwargs = layer.kwargs
    tensors = [*layer[:5], kwargs.get("expert_map"), kwargs.get("w1_bias"), kwargs.get("w2_bias")]
    return (*tensors, kwargs["activation"], False, layer.w1.shape[0], *NO_SWIGLU)


RULE = ("softmax", "score", True, 0.0, 1, 1, "max", 1.0)


@pytest.mark.parametrize("arguments", [{}, {"bias": True, "tokens": 16}, {"tokens": 0}], ids=["plain", "bias", "empty"])
def test_opcheck(arguments):
    layer = layer_of(**arguments)
    needs = [True, True, False, True, False, bool(layer.kwargs.get("w2_bias") is not None)]
    arguments = operands(layer)
    namespace = torch.ops.moe_jax
    torch.library.opcheck(namespace.fused_experts.default, arguments)
    torch.library.opcheck(namespace.fused_experts_out.default, (*arguments, torch.empty(20, layer.x.shape[0]).t()))
    torch.library.opcheck(namespace.fused_experts_backward.default, (torch.randn_like(layer.x), *arguments, needs))
    logits = torch.randn(layer.x.shape[0], 8)
    torch.library.opcheck(namespace.route.default, (logits, None, 3, *RULE))
    x, w1, w2 = arguments[:3]
    layer_arguments = (x, w1, w2, logits[:, :6].contiguous(), None, None, *arguments[6:8], "silu", False, *NO_SWIGLU, 3)
    torch.library.opcheck(namespace.moe.default, (*layer_arguments, "renormalize", None, 1, 1, 1.0))
    torch.library.opcheck(namespace.route_backward.default, (torch.randn(layer.x.shape[0], 3), logits, None, 3, *RULE))


def block(x, gate, w1, w2):
    weights, ids = fused_topk(x, x @ gate, 2, True)
    return fused_experts(x * 1.5, w1, w2, weights, ids).tanh()


# What torch's own backend compiles with.
HAS_COMPILER = (
    any(shutil.which(name) for name in ("g++", "clang++"))
    and (Path(sysconfig.get_path("include")) / "Python.h").exists()
)


@pytest.mark.parametrize(
    "backend",
    [
        "eager",
        "aot_eager",
        pytest.param(
            "inductor", marks=pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler and Python.h")
        ),
    ],
)
def test_compiled_without_a_graph_break(backend):
    layer = layer_of()
    gate = torch.randn(20, 6, generator=torch.Generator().manual_seed(5))
    results = []
    for function in (block, torch.compile(block, fullgraph=True, backend=backend)):
        tensors = [tensor.clone().requires_grad_() for tensor in (layer.x, gate, layer.w1, layer.w2)]
        out = function(*tensors)
        out.square().sum().backward()
        results.append([out.detach(), *(tensor.grad for tensor in tensors)])
    for found, expected in zip(*results, strict=True):
        check_close(found, expected, TOLERANCE[torch.float32])


def test_compiled_with_token_counts_that_change():
    layer = layer_of(tokens=9)
    compiled = torch.compile(lambda *a: fused_experts(*a) + 1, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (9, 5, 7, 3):
        part = (layer.x[:tokens], layer.w1, layer.w2, layer.weights[:tokens], layer.ids[:tokens])
        assert torch.equal(compiled(*part), fused_experts(*part) + 1)


def test_compiled_with_out():
    layer = layer_of()
    compiled = torch.compile(lambda out: fused_experts(*layer[:5], out=out), fullgraph=True, backend="aot_eager")
    out = torch.zeros(20, 11).t()
    compiled(out)
    assert torch.equal(out, fused_experts(*layer[:5]))


def test_one_compilation_serves_every_count_up_to_a_power_of_two():
    layer = layer_of(tokens=32, hidden=24)
    count = ops.calls.experts_forward._cache_size
    fused_experts(*layer[:5])
    before = count()
    for tokens in range(17, 33):
        part = (layer.x[:tokens], layer.w1, layer.w2, layer.weights[:tokens], layer.ids[:tokens])
        assert torch.equal(fused_experts(*part), fused_experts(*layer[:5])[:tokens])
    assert count() == before


def test_torch_func():
    layer = layer_of()
    rest = layer[1:5]

    def loss(x):
        return fused_experts(x, *rest).square().sum()

    expected = torch.autograd.grad(loss(x := layer.x.clone().requires_grad_()), x)[0]
    assert torch.equal(torch.func.grad(loss)(layer.x), expected)
    batch = torch.stack([layer.x, -layer.x, 2 * layer.x])
    assert torch.equal(torch.vmap(lambda x: fused_experts(x, *rest))(batch)[1], fused_experts(batch[1], *rest))
    assert torch.equal(torch.vmap(torch.func.grad(loss))(batch)[0], expected)
    weights, ids = torch.vmap(lambda x: fused_topk(x, x, 3, True))(batch)
    assert torch.equal(ids[2], fused_topk(batch[2], batch[2], 3, True)[1]) and weights.shape == (3, 11, 3)


def test_threads():
    import concurrent.futures

    layer = layer_of()
    expected = gradients(ours, layer)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: gradients(ours, copy.deepcopy(layer)), range(8)):
            for name in found:
                assert torch.equal(found[name], expected[name])
