"""`FusedMoE`: what it computes, how it is loaded, copied and split over ranks, and that it trains like a loop over experts."""

import copy
import io
import pickle

import pytest

torch = pytest.importorskip("torch")

from torch.utils.checkpoint import checkpoint as rerun  # noqa: E402

from moe_jax_torch import FusedMoE, weight_cache  # noqa: E402
from moe_jax_torch.parallel import Ranks  # noqa: E402
from tests.interop.torch_layers import expert_loop  # noqa: E402
from tests.util import check_close, relative_error  # noqa: E402

EXPERT_PARALLEL = {"enable_expert_parallel": True}
SIZES = {"num_experts": 6, "top_k": 3, "hidden_size": 20, "intermediate_size": 12}


def layer_of(**arguments):
    torch.manual_seed(0)
    layer = FusedMoE(**SIZES | arguments)
    for bias in (layer.w13_bias, layer.w2_bias, layer.e_score_correction_bias):
        if bias is not None:
            bias.data.normal_(0, 0.5)
    return layer


def inputs_of(layer, *shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*shape, layer.hidden_size, generator=generator).to(dtype)
    return x, 2 * torch.randn(*shape, layer.num_experts, generator=generator)


def loop(layer, x, logits):
    """The layer in plain torch, softmax renormalised over the chosen."""
    chosen, ids = logits.topk(layer.top_k, dim=1)
    kwargs = {"activation": layer.activation, "expert_map": layer.expert_map}
    numbers = dict(zip(("swiglu_alpha", "swiglu_beta", "swiglu_limit"), layer._swiglu, strict=True))
    biases = {"w1_bias": layer.w13_bias, "w2_bias": layer.w2_bias} | numbers
    return expert_loop(x, layer.w13_weight, layer.w2_weight, chosen.softmax(1), ids, **kwargs, **biases)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"has_bias": True, "activation": "swigluoai"},
        {"ep_size": 4, "ep_rank": 1},
        {"swiglu_limit": 0.4},
        {"activation": "swigluoai", "swiglu_alpha": 1.3, "swiglu_limit": 0.6},
    ],
    ids=str,
)
def test_layer_equals_the_loop(arguments):
    layer = layer_of(**arguments)
    x, logits = inputs_of(layer, 2, 5)
    out = layer(x, logits)
    assert out.shape == x.shape
    expected = loop(layer, x.flatten(0, 1), logits.flatten(0, 1)).detach()
    check_close(out.detach().flatten(0, 1), expected, 2e-6)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"renormalize": False, "routed_scaling_factor": 0.5},
        {"scoring_func": "sigmoid", "ep_size": 2},
        {"num_expert_group": 3, "topk_group": 2},
        {"num_expert_group": 3, "topk_group": 2, "scoring_func": "sigmoid", "has_correction_bias": True},
        {"num_expert_group": 3, "topk_group": 2, "scoring_func": "sigmoid"},  # has no method: two operators
        {"top_k": 1, "apply_router_weight_on_input": True, "activation": "swigluoai", "has_bias": True},
    ],
    ids=str,
)
def test_one_operator_without_gradients_is_routing_and_experts(arguments):
    layer = layer_of(**arguments)
    x, logits = inputs_of(layer, 11)
    logits[3] = float("nan")  # no expert
    expected = layer(x, logits).detach()
    with torch.no_grad():
        check_close(layer(x, logits), expected, 1e-6)
        assert not layer(x, logits)[3].any() and layer(x[:0], logits[:0]).shape == (0, 20)
        batch = torch.func.vmap(layer)(x[:, None], logits[:, None])
        check_close(batch[:, 0], expected, 1e-6)
        with pytest.raises(ValueError, match="gating_output"):
            layer(x, logits[:4])


def test_routing_that_models_have():
    layer = layer_of(
        scoring_func="sigmoid", num_expert_group=3, topk_group=2, routed_scaling_factor=2.5, has_correction_bias=True
    )
    x, logits = inputs_of(layer, 40)
    weights, ids = layer.select_experts(x, logits)
    check_close(weights.sum(1), torch.full((40,), 2.5), 1e-6)
    assert all(len({int(i) // 2 for i in row}) <= 2 for row in ids)
    scores = torch.sigmoid(logits).gather(1, ids.long())
    check_close(weights, 2.5 * scores / scores.sum(1, keepdim=True), 1e-6)
    unbiased = copy.deepcopy(layer)
    unbiased.e_score_correction_bias.zero_()
    assert not torch.equal(unbiased.select_experts(x, logits)[1].sort(1).values, ids.sort(1).values)
    scaled = layer_of(routed_scaling_factor=3.0)
    check_close(scaled.select_experts(x, logits)[0].sum(1), torch.full((40,), 3.0), 1e-6)


def checkpoint(layer, seed=5):
    """(expert, shard, kind): tensors of every expert, whole."""
    generator = torch.Generator().manual_seed(seed)
    inner, hidden = layer.intermediate_size, layer.hidden_size
    shapes = {"w1": (inner, hidden), "w3": (inner, hidden), "w2": (hidden, inner)}
    tensors = {}
    for expert in range(layer.num_experts):
        for shard, shape in shapes.items():
            tensors[expert, shard, "weight"] = torch.randn(shape, generator=generator) * shape[1] ** -0.5
            tensors[expert, shard, "bias"] = torch.randn(shape[0], generator=generator) * 0.3
    return tensors


def load(layer, tensors):
    loaded = set()
    for (expert, shard, kind), tensor in tensors.items():
        param = getattr(layer, f"{'w2' if shard == 'w2' else 'w13'}_{kind}")
        if param is not None and layer.weight_loader(param, tensor, f"experts.{expert}.{shard}.{kind}", shard, expert):
            loaded.add(expert)
    return loaded


def loaded_layer(tensors, **arguments):
    layer = layer_of(**arguments)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(float("nan"))  # what is not loaded shows
    return layer, load(layer, tensors)


@pytest.mark.parametrize("activation", ["silu", "swigluoai"])
def test_shards_of_a_checkpoint_find_their_places(activation):
    tensors = checkpoint(layer_of())
    layer, loaded = loaded_layer(tensors, has_bias=True, activation=activation)
    assert loaded == set(range(6))
    x, logits = inputs_of(layer, 9)
    weights, ids = logits.topk(3, dim=1)
    weights, expected = weights.softmax(1), torch.zeros(9, 20)
    for token in range(9):
        for weight, expert in zip(weights[token], ids[token].tolist(), strict=True):
            part = {
                shard: tensors[expert, shard, "weight"] @ x[token] + tensors[expert, shard, "bias"]
                for shard in ("w1", "w3")
            }
            gate, up = part["w1"], part["w3"]
            if activation == "swigluoai":
                gate, up = gate.clamp(max=7), up.clamp(-7, 7)
                h = (up + 1) * gate * torch.sigmoid(1.702 * gate)
            else:
                h = torch.nn.functional.silu(gate) * up
            expected[token] += weight * (tensors[expert, "w2", "weight"] @ h + tensors[expert, "w2", "bias"])
    check_close(layer(x, logits).detach(), expected, 2e-6)


@pytest.mark.parametrize(
    "ranks",
    [
        [{"ep_size": 4, "ep_rank": rank} for rank in range(4)],
        [{"tp_size": 3, "tp_rank": rank} for rank in range(3)],
        [{"ep_size": 2, "ep_rank": e, "tp_size": 2, "tp_rank": t} for e in range(2) for t in range(2)],
        [{"dp_size": 2, "dp_rank": d, "tp_size": 3, "tp_rank": t} for d in range(2) for t in range(3)],
        [
            {"dp_size": 2, "dp_rank": d, "tp_size": 2, "tp_rank": t} | EXPERT_PARALLEL
            for d in range(2)
            for t in range(2)
        ],
        [{"expert_map": torch.tensor(m)} for m in ([1, -1, 0, -1, -1, 2], [-1, 2, -1, 0, 1, -1])],
    ],
    ids=["ep", "tp", "ep and tp", "dp and tp", "dp as ep", "maps"],
)
def test_ranks_loaded_from_one_checkpoint_add_up(ranks):
    tensors = checkpoint(layer_of())
    whole, _ = loaded_layer(tensors, has_bias=True)
    x, logits = inputs_of(whole, 15)
    expected = whole(x, logits).detach()
    total = torch.zeros_like(expected)
    for arguments in ranks:
        part, loaded = loaded_layer(tensors, has_bias=True, **arguments)
        assert len(loaded) == part.num_local_experts
        out = part(x, logits).detach()
        assert relative_error(out, expected) > 0.1
        total += out
    check_close(total, expected, 2e-6)


def test_what_the_loader_refuses():
    layer = layer_of(ep_size=2, tp_size=2)
    good = torch.ones(12, 20)
    wrong = [
        ((layer.w13_weight, good, "w1", 6), "expert_id=6"),
        ((layer.w13_weight, good, "w4", 0), "not one of w1, w2, w3"),
        ((layer.w13_weight, good.t(), "w2", 0), "does not belong"),
        ((layer.w2_weight, good, "w1", 0), "does not belong"),
        ((None, good, "w1", 0), "does not belong"),
        ((layer.w13_weight, torch.ones(6, 20), "w1", 0), "axis 0 must be the whole intermediate_size=12"),
        (
            (layer.w13_weight, torch.ones(12, 19), "w1", 0),
            r"\(6, 19\), but shard 'w1' of an expert here is .*\(6, 20\)",
        ),
    ]
    for (param, tensor, shard, expert), message in wrong:
        with pytest.raises(ValueError, match=f"some.name.*{message}"):
            layer.weight_loader(param, tensor, "some.name", shard, expert)
    with pytest.raises(ValueError, match="not one of w1, w2, activation='silu_no_mul'"):
        ungated = layer_of(activation="silu_no_mul")
        ungated.weight_loader(ungated.w13_weight, good, "some.name", "w3", 0)


def test_what_the_constructor_refuses():
    for arguments, message in (
        ({"top_k": 7}, "top_k=7"),
        ({"tp_size": 5}, "multiple of tp_size=5"),
        ({"ep_size": 2, "ep_rank": 2}, "ep_rank=2"),
        ({"expert_map": torch.tensor([0, 1, 1, -1, -1, -1])}, "once each"),
        ({"expert_map": torch.tensor([0, 1])}, "each of num_experts=6"),
        ({"activation": "gelu", "swiglu_alpha": 2.0}, "swiglu_alpha=2.0 has no meaning for activation='gelu'"),
        ({"activation": "tanh"}, "activation='tanh' is not one of"),
        ({"dp_size": 2, "dp_rank": 3}, "dp_rank=3 must lie in"),
        ({"ep_size": 2, "dp_size": 2}, "ep_size=2 is given, but follows from dp_size=2, tp_size=1 and"),
        ({"enable_expert_parallel": True, "tp_size": 2, "expert_map": torch.arange(6)}, "give one of them"),
        ({"ep_size": 2, "expert_map": torch.arange(6)}, "give one of them"),
    ):
        with pytest.raises(ValueError, match=message):
            FusedMoE(**SIZES | arguments)


def test_copies_and_state_dicts():
    layer = layer_of(has_bias=True, has_correction_bias=True, ep_size=2)
    assert set(layer.state_dict()) == {"w13_weight", "w2_weight", "w13_bias", "w2_bias", "e_score_correction_bias"}
    x, logits = inputs_of(layer, 7)
    expected = layer(x, logits).detach()
    other = FusedMoE(**SIZES, has_bias=True, has_correction_bias=True, ep_size=2, device="meta").to_empty(device="cpu")
    other.load_state_dict(layer.state_dict())
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(saved, weights_only=False), other]
    with torch.no_grad():
        layer.w13_weight.zero_()
    for twin in copies:
        assert torch.equal(twin(x, logits), expected)
        assert twin.weight_loader(twin.w2_weight, torch.zeros(20, 12), "w2", "w2", 0)


def test_other_dtypes_by_to_and_by_autocast():
    layer = layer_of()
    x, logits = inputs_of(layer, 8)
    expected = layer(x, logits)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x, logits)
    assert out.dtype == torch.bfloat16
    check_close(out.float().detach(), expected.detach(), 1e-2)
    out.float().sum().backward()
    assert layer.w13_weight.grad.dtype == torch.float32
    halved = layer.to(torch.bfloat16)
    assert torch.equal(halved(x.bfloat16(), logits), out)


def test_weights_cross_once_and_their_updates_are_seen(monkeypatch):
    crossed = []
    cross = weight_cache.to_jax
    monkeypatch.setattr(weight_cache, "to_jax", lambda tensor, **k: crossed.append(tensor.shape) or cross(tensor, **k))
    layer = layer_of()
    x, logits = inputs_of(layer, 8)
    for _ in range(3):
        with torch.no_grad():
            layer.w13_weight.mul_(1.5)
        check_close(layer(x, logits).detach(), loop(layer, x, logits).detach(), 2e-6)
    with torch.no_grad():
        layer(x, logits)
    assert crossed == [layer.w13_weight.shape, layer.w2_weight.shape]


def train(layer, gate, forward):
    """The losses of 25 steps."""
    generator = torch.Generator().manual_seed(3)
    x, target = (torch.randn(48, 20, generator=generator) for _ in range(2))
    optimizer = torch.optim.AdamW([*layer.parameters(), *gate.parameters()], lr=3e-3)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = (forward(x, gate(x)) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_it_trains_like_the_loop_compiled_or_not():
    layer, gate = layer_of(), torch.nn.Linear(20, 6, bias=False)
    runs = []
    for kind in ("loop", "eager", "compiled"):
        twin, router = copy.deepcopy(layer), copy.deepcopy(gate)
        forward = {
            "loop": lambda x, logits, twin=twin: loop(twin, x, logits),
            "eager": twin,
            "compiled": torch.compile(twin, fullgraph=True, backend="aot_eager"),
        }[kind]
        runs.append(train(twin, router, forward))
    for losses in runs[1:]:
        check_close(losses, runs[0], 1e-5)
    assert runs[0][-1] < 0.95 * runs[0][0]


def test_the_correction_bias_stays_float32():
    layer = layer_of(has_correction_bias=True)
    bias = layer.e_score_correction_bias.clone()
    assert torch.equal(layer.to(torch.bfloat16).e_score_correction_bias, bias)
    assert layer.w2_weight.dtype == torch.bfloat16


def test_torch_func_and_checkpointing_of_the_module():
    layer = layer_of(has_bias=True)
    x, logits = inputs_of(layer, 8)
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x, logits)).square().sum()

    layer(x, logits).square().sum().backward()
    expected = {name: parameter.grad for name, parameter in layer.named_parameters()}
    layer.zero_grad()
    rerun(layer, x.clone().requires_grad_(), logits, use_reentrant=False).square().sum().backward()
    batched = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, torch.stack([-x, x]))
    for name, gradient in torch.func.grad(loss)(parameters, x).items():
        assert torch.equal(gradient, expected[name])
        assert torch.equal(batched[name][1], expected[name])
        assert torch.equal(layer.get_parameter(name).grad, expected[name])
    with pytest.raises(NotImplementedError, match="no forward-mode derivatives"):
        torch.func.jvp(lambda x: layer(x, logits), (x,), (x,))
    (gradient,) = torch.autograd.grad(layer(leaf := x.clone().requires_grad_(), logits).sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"tp_size": 2}, (1, 2)),
        ({"dp_size": 2}, (1, 2)),
        ({"tp_size": 2, "dp_size": 2}, (1, 4)),
        ({"tp_size": 2} | EXPERT_PARALLEL, (2, 1)),
        ({"dp_size": 2} | EXPERT_PARALLEL, (2, 1)),
        ({"tp_size": 2, "dp_size": 2} | EXPERT_PARALLEL, (4, 1)),
        ({"tp_size": 2, "ep_size": 2}, (2, 2)),
    ],
    ids=str,
)
def test_sizes_of_parallelism(given, found):
    ranks = Ranks.of(**given)
    assert (ranks.ep_size, ranks.tp_size) == found
