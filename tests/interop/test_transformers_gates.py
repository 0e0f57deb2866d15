"""Experts modules of transformers one by one: layouts, gates known and unknown, ids of other ranks, and what is refused."""

import builtins
import copy
import importlib
import re
import sys
import types
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from moe_jax_torch import gates  # noqa: E402
from moe_jax_torch.gates import Gate, recognise  # noqa: E402
from moe_jax_torch.linear import expert_linear, linear_forward  # noqa: E402
from moe_jax_torch.program import Program  # noqa: E402
from moe_jax_torch.transformers import own_weights, register  # noqa: E402
from tests.interop.test_launch_program import like, lowered  # noqa: E402
from tests.util import assert_discriminates, check_close, relative_error  # noqa: E402

register()

EXPERTS, HIDDEN, INTERMEDIATE = 6, 16, 12

# What the experts classes read from their configs, whatever they call it.
CONFIG = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("hidden_size", "moe_hidden_size"), HIDDEN),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), INTERMEDIATE),
    "hidden_act": "silu",
    "hidden_activation": "gelu_pytorch_tanh",
    "mlp_hidden_act": "relu2",
    "moe_latent_size": None,
    "swiglu_alpha": 1.3,
    "swiglu_limit": 0.8,
    "mlp_gate_softcap": 1.5,
    "mlp_up_softcap": 2.0,
    "post_norm_eps": 1e-5,
}

# model: (class, what its gate is recognised as, None for three stages)
MODULES = {
    "mixtral": ("MixtralExperts", Gate("silu")),
    "gpt_oss": ("GptOssExperts", None),  # rows of gate and up alternate
    "openai_privacy_filter": ("OpenAIPrivacyFilterExperts", Gate("swigluoai_uninterleave", 1.3, 0.8)),
    "minimax_m3_vl": ("MiniMaxM3VLExperts", Gate("swigluoai_uninterleave", 1.3, 0.8)),
    "deepseek_v4": ("DeepseekV4Experts", Gate("silu", None, 0.8)),
    "aria": ("AriaExperts", Gate("silu")),
    "gemma4": ("Gemma4TextExperts", Gate("gelu_tanh")),
    "nemotron_h": ("NemotronHExperts", Gate("relu2_no_mul")),
    "lfm2_moe": ("Lfm2MoeExperts", Gate("silu")),
    "beam": ("BeamExperts", Gate("silu")),
    "inkling2": ("Inkling2Experts", None),
    "muse_spark": ("MuseSparkExperts", Gate("silu")),  # with a norm after the experts, hence in three stages too
}


def experts_of(model="mixtral", **config):
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    return made(getattr(module, MODULES[model][0]), **config)


def made(kind, **config):
    torch.manual_seed(0)
    experts = kind(types.SimpleNamespace(**CONFIG | {"_experts_implementation": "moe_jax"} | config))
    with torch.no_grad():
        for name, parameter in experts.named_parameters():
            parameter.normal_(0, 0.3 if "bias" in name else 0.4)
    own_weights(experts)
    return experts


def slots_of(count=9, top_k=2):
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(count, HIDDEN, generator=generator)
    ids = torch.rand(count, EXPERTS, generator=generator).argsort(dim=1)[:, :top_k]
    return x, ids, torch.rand(count, top_k, generator=generator) + 0.2


def run(experts, slots, implementation):
    """Output, and the gradients of the hidden states, the weights of the slots and the parameters."""
    x, ids, weights = slots
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    experts.config._experts_implementation = implementation
    experts.zero_grad()
    out = experts(x, ids, weights)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(5)))
    return [out.detach(), x.grad, weights.grad, *(parameter.grad for parameter in experts.parameters())]


def check_equals_eager(experts, slots):
    found, expected = run(experts, slots, "moe_jax"), run(experts, slots, "eager")
    check_close(found[0], expected[0], 2e-6)
    for gradient, wanted in zip(found[1:], expected[1:], strict=True):
        check_close(gradient, wanted, 1e-5)
    return found[0], expected[0]


@pytest.mark.parametrize("model", MODULES)
def test_gates_and_layouts_of_all_kinds(model):
    experts = experts_of(model)
    assert recognise(experts) == MODULES[model][1]
    check_equals_eager(experts, slots_of())


def test_every_class_of_the_interface():
    folder = Path(transformers.__file__).parent / "models"
    sources = {path: path.read_text() for path in sorted(folder.glob("*/modeling_*.py"))}
    found = 0
    for path, source in sources.items():
        for name in re.findall(r"^@use_experts_implementation.*\nclass (\w+)", source, re.MULTILINE):
            module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
            check_equals_eager(made(getattr(module, name)), slots_of())
            found += 1
    assert found >= len(MODULES)
    assert sum("@use_experts_implementation" in source for source in sources.values()) <= found


def test_the_check_can_fail():
    out, expected = check_equals_eager(experts_of(), slots_of())
    assert_discriminates(lambda out: check_close(out, expected, 2e-6), out)


def test_activations_by_their_objects():
    for hidden_act, gate in (
        ("gelu", Gate("gelu")),
        ("gelu_new", Gate("gelu_tanh")),
        ("gelu_pytorch_tanh", Gate("gelu_tanh")),
        ("swish", Gate("silu")),
        ("relu2", Gate("relu2")),
        ("tanh", None),
        ("quick_gelu", None),
    ):
        assert recognise(experts_of(hidden_act=hidden_act)) == gate
    check_equals_eager(experts_of(hidden_act="tanh"), slots_of())


def test_a_gate_that_changed_is_not_taken_for_another():
    experts = experts_of("deepseek_v4")
    experts.limit = 1.1
    assert recognise(experts) == Gate("silu", None, 1.1)
    experts.limit = torch.tensor(1.1)
    assert recognise(experts) is None
    experts.limit = 0.8

    class Doubled(type(experts)):
        def _apply_gate(self, gate_up):
            return 2 * super()._apply_gate(gate_up)

    experts.__class__ = Doubled
    assert recognise(experts) is None
    found = run(experts, slots_of(), "moe_jax")[0]
    experts.__class__ = Doubled.__base__
    assert recognise(experts) == Gate("silu", None, 0.8)
    check_close(found, 2 * run(experts, slots_of(), "eager")[0], 2e-6)
    experts._apply_gate = lambda gate_up: 3 * type(experts)._apply_gate(experts, gate_up)
    assert recognise(experts) is None


@pytest.mark.parametrize("model", ["mixtral", "gpt_oss", "inkling2", "muse_spark"])
def test_ids_of_other_ranks_contribute_nothing(model):
    experts = experts_of(model)
    x, ids, weights = slots_of()
    elsewhere = torch.zeros(ids.shape, dtype=torch.bool)
    elsewhere[0, 1] = elsewhere[3] = True
    expected = run(experts, (x, ids, weights.masked_fill(elsewhere, 0)), "eager")
    expected[2][elsewhere] = 0
    x[3] = float("nan")  # a token that has no expert here
    found = run(experts, (x, ids.masked_fill(elsewhere, EXPERTS), weights), "moe_jax")
    check_close(found[0], expected[0], 2e-6)
    assert (found[0][3] == 0).all() and (found[0][0] != 0).all()
    for gradient, wanted in zip(found[1:], expected[1:], strict=True):
        check_close(gradient, wanted, 1e-5)


def test_ranks_of_expert_parallelism_add_up():
    ranks = EXPERTS  # so that a rank has fewer experts than a token has slots
    whole, (x, ids, weights) = experts_of(), slots_of()
    expected = run(whole, (x, ids, weights), "eager")
    here = EXPERTS // ranks
    total, x_grad, weights_grad = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(weights)
    for rank in range(ranks):
        part = copy.deepcopy(whole)
        part.num_experts, part._is_expert_parallel = here, True
        for name, parameter in whole.named_parameters():
            setattr(part, name, torch.nn.Parameter(parameter.detach()[rank * here : (rank + 1) * here].clone()))
        own_weights(part)
        is_here = ids // here == rank
        local = torch.where(is_here, ids - rank * here, here)
        out, *gradients = run(part, (x, local, weights.masked_fill(~is_here, 0)), "moe_jax")
        assert relative_error(out, expected[0]) > 0.1
        total, x_grad, weights_grad = total + out, x_grad + gradients[0], weights_grad + gradients[1]
        for gradient, wanted in zip(gradients[2:], expected[3:], strict=True):
            check_close(gradient, wanted[rank * here : (rank + 1) * here], 1e-5)
    check_close(total, expected[0], 2e-6)
    check_close(x_grad, expected[1], 1e-5)
    check_close(weights_grad, expected[2], 1e-5)


def test_no_tokens():
    for model in ("mixtral", "inkling2"):
        found = run(experts_of(model), slots_of(count=0), "moe_jax")
        assert found[0].shape == (0, HIDDEN) and all((tensor == 0).all() for tensor in found)


@pytest.mark.parametrize("model", ["mixtral", "gpt_oss", "inkling2"])
def test_compiled_without_a_graph_break(model):
    gates._search.cache_clear()  # the compiler is the first to ask
    torch.compiler.reset()
    experts, slots = experts_of(model), slots_of()
    found = torch.compile(experts, fullgraph=True, backend="aot_eager")(*slots)
    check_close(found.detach(), run(experts, slots, "eager")[0], 2e-6)


def test_memory_that_jax_can_share():
    experts, slots = experts_of("gpt_oss"), slots_of()
    values = {name: tensor.clone() for name, tensor in experts.state_dict().items()}
    assert own_weights(experts) == []
    with torch.no_grad():  # the layout of a fresh model, and memory as a file has it
        experts.gate_up_proj.data = experts.gate_up_proj.data.contiguous()
        unaligned = torch.zeros(experts.down_proj.numel() + 1)[1:].view(experts.down_proj.shape)
        experts.down_proj.data = unaligned.copy_(experts.down_proj)
    optimizer = torch.optim.AdamW(experts.parameters())
    assert own_weights(torch.nn.ModuleDict({"experts": experts})) == ["experts.gate_up_proj", "experts.down_proj"]
    for name, tensor in experts.state_dict().items():
        assert torch.equal(tensor, values[name])
    assert optimizer.param_groups[0]["params"][0] is experts.gate_up_proj
    run(experts, slots, "moe_jax")
    optimizer.step()
    assert own_weights(experts) == []
    check_equals_eager(experts, slots)


@pytest.mark.filterwarnings("ignore:weights of shape")
def test_weights_are_copied_where_they_cannot_be_shared():
    experts = experts_of("aria")
    experts.gate_up_proj.data = experts.gate_up_proj.data.contiguous()
    check_equals_eager(experts, slots_of())


def test_what_cannot_be_served_says_why():
    slots = slots_of()
    with pytest.raises(TypeError, match=r"MixtralExperts.gate_up_proj is torch.float64.*cast the model"):
        experts_of().double()(*slots)
    experts = experts_of("gpt_oss")
    experts.down_proj_bias = None
    with pytest.raises(
        ValueError, match="GptOssExperts has has_gate=True and has_bias=True, but no down_proj or no bias"
    ):
        experts(*slots)
    experts = experts_of()
    experts.num_experts = 5
    with pytest.raises(
        ValueError, match=r"gate_up_proj is \(6, 24, 16\), but must be a matrix for each of num_experts=5"
    ):
        experts(*slots)
    with pytest.raises(ValueError, match=r"topk_ids ranges from -1 to 8"):
        experts_of()(slots[0], torch.tensor([[6, 8]]).expand(9, 2), slots[2])


def test_experts_that_transformers_quantized_are_refused():
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS

    experts = types.SimpleNamespace(down_proj=torch.zeros(1, dtype=torch.float8_e4m3fn))
    with pytest.raises(NotImplementedError, match=r"float8_e4m3fn.*dequantize=True"):
        ALL_FP8_EXPERTS_FUNCTIONS.get_interface("moe_jax", None)(experts, *slots_of())


def test_registering_without_transformers_or_with_an_old_one(monkeypatch):
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.4.1")
    with pytest.raises(
        ImportError, match=r"transformers 5.4.1 takes no .* 5.7 or newer: pip install 'moe_jax\[torch\]'"
    ):
        register()
    monkeypatch.undo()
    register(), register()
    find = builtins.__import__

    def without_transformers(name, *rest):
        if name.split(".")[0] == "transformers":
            raise ImportError(name)
        return find(name, *rest)

    monkeypatch.delitem(sys.modules, "transformers")
    monkeypatch.setattr(builtins, "__import__", without_transformers)
    with pytest.raises(ImportError, match=r"which is not installed; .*pip install 'moe_jax\[torch\]'"):
        register()


def test_a_linear_layer_for_each_expert():
    x, ids, _ = slots_of()
    ids[2] = ids[4, 0] = -1
    ids[5] = 1  # twice the same
    x, weight, bias = (t.requires_grad_() for t in (x, torch.randn(EXPERTS, 24, HIDDEN), torch.randn(EXPERTS, 24)))
    out = expert_linear(x, weight, ids, bias)
    pairs = [(token, expert) for token, row in enumerate(ids.tolist()) for expert in row]
    expected = torch.stack([weight[e] @ x[t] + bias[e] if e >= 0 else torch.zeros(24) for t, e in pairs])
    assert_discriminates(lambda out: check_close(out, expected.detach(), 2e-6), out.detach())
    cotangent = torch.randn(out.shape)
    wanted = torch.autograd.grad(expected, (x, weight, bias), cotangent)
    for gradient, other in zip(torch.autograd.grad(out, (x, weight, bias), cotangent), wanted, strict=True):
        check_close(gradient, other, 2e-6)


def test_the_linear_layer_under_torch_func():
    x, ids, _ = slots_of()
    weight = torch.randn(EXPERTS, 24, HIDDEN)

    def loss(x):
        return expert_linear(x, weight, ids).square().sum()

    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()
    with pytest.raises(NotImplementedError, match="no forward-mode derivatives"):
        torch.func.jvp(loss, (x,), (x,))
    batch = torch.stack([-x, x])
    assert torch.equal(torch.vmap(torch.func.grad(loss))(batch)[1], gradient.detach())


@pytest.mark.parametrize("tokens", [9, 0])
def test_opcheck_of_the_linear_layer(tokens):
    x, ids, _ = slots_of(tokens)
    arguments = (x, torch.randn(EXPERTS, 24, HIDDEN), ids, None)
    torch.library.opcheck(torch.ops.moe_jax.expert_linear.default, arguments)
    backward = torch.ops.moe_jax.expert_linear_backward.default
    torch.library.opcheck(backward, (torch.randn(2 * tokens, 24), *arguments, [True, True, False]))


def test_the_linear_layer_is_kernels_alone():
    shapes = (("bfloat16", 16, 256), ("bfloat16", 8, 384, 256), ("bfloat16", 8, 384), ("int32", 16, 2))
    program = Program.of(lowered(linear_forward, *(like(*shape) for shape in shapes), implementation="mosaic"))
    assert [tuple(output) for output in program.outputs] == [((32, 384), "bfloat16")]
    assert len(program.launches) >= 4  # group, gather, multiply, put back


def test_what_the_linear_layer_refuses():
    x, weight, ids = torch.ones(3, 7), torch.ones(4, 6, 7), torch.zeros(3, 2, dtype=torch.int64)
    for arguments, message in (
        ((x, weight.transpose(1, 2), ids), r"\[T, K\] and \[E, N, K\] of one dtype"),
        ((x.half(), weight, ids), "of one dtype"),
        ((x, weight, ids[:2]), r"ids is torch.int64 \(2, 2\), but must be int32 or int64 \[T=3, k\]"),
        ((x, weight, ids + 4), r"ids ranges from 4 to 4, but must lie in \[-1, 4\)"),
        ((x, weight, ids, torch.ones(6)), r"bias is \(6,\), but must be \(4, 6\)"),
    ):
        with pytest.raises(ValueError, match=message):
            expert_linear(*arguments)
