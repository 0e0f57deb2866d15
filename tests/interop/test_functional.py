"""`fused_experts` and the routing functions against a loop over experts, at the edges too."""

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from moe_jax import MoEConfig, RoutingConfig, reference  # noqa: E402
from moe_jax_torch import fused_experts, fused_topk, grouped_topk  # noqa: E402
from tests.interop.torch_layers import TOLERANCE, layer_of  # noqa: E402
from tests.util import assert_discriminates, check_close  # noqa: E402


def run(layer, **more):
    return fused_experts(*layer[:5], **layer.kwargs, **more)


def check(out, layer):
    assert out.dtype == layer.x.dtype
    check_close(out.float(), layer.loop(), TOLERANCE[layer.x.dtype])


def test_the_check_can_fail():
    layer = layer_of()
    assert_discriminates(lambda out: check_close(out, layer.loop(), TOLERANCE[torch.float32]), run(layer).numpy())


LAYERS = {
    "float32": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "bias": {"bias": True},
    "bfloat16 bias": {"bias": True, "dtype": torch.bfloat16},
    "odd sizes": {"hidden": 7, "intermediate": 5, "tokens": 3},
    "no tokens": {"tokens": 0},
    "one token": {"tokens": 1},
    "a power of two of tokens": {"tokens": 16},
    "k is 1": {"top_k": 1},
    "k is E": {"top_k": 6},
    "one expert": {"experts": 1, "top_k": 1},
    "rank": {"local": [4, 1, 0]},
    "rank with E": {"local": [5], "global_num_experts": 6},
    "weight on input": {"top_k": 1, "apply_router_weight_on_input": True},
    "gelu": {"activation": "gelu"},
    "gelu_tanh": {"activation": "gelu_tanh"},
    "relu2_no_mul": {"activation": "relu2_no_mul"},
    "silu_no_mul": {"activation": "silu_no_mul", "bias": True},
    "swigluoai": {"activation": "swigluoai", "bias": True},
    "swigluoai_uninterleave": {"activation": "swigluoai_uninterleave"},
    "silu with a limit": {"swiglu_limit": 0.4},
    "swigluoai with numbers": {"activation": "swigluoai", "swiglu_alpha": 1.3, "swiglu_beta": 0.5, "swiglu_limit": 0.6},
}


@pytest.mark.parametrize("arguments", LAYERS.values(), ids=LAYERS)
def test_layer_equals_the_loop(arguments):
    layer = layer_of(**arguments)
    check(run(layer), layer)


def test_one_bias_alone():
    layer = layer_of(bias=True)
    for name in ("w1_bias", "w2_bias"):
        kwargs = {key: value for key, value in layer.kwargs.items() if key != name}
        alone = layer._replace(kwargs=kwargs)
        check(run(alone), alone)


def test_ids_of_minus_one_and_of_other_ranks_contribute_nothing():
    layer = layer_of(local=[2, 0])
    layer.ids[0, 1] = -1
    layer.ids[3] = -1
    layer.ids[4] = torch.tensor([1, 3, 4])  # none of them here
    out = run(layer)
    check(out, layer)
    assert (out[3] == 0).all() and (out[4] == 0).all()


def test_a_token_without_expert_is_zero_even_if_it_is_not_finite():
    layer = layer_of()
    layer.ids[2] = -1
    layer.x[2] = float("nan")
    out = run(layer)
    assert (out[2] == 0).all() and torch.isfinite(out).all()


def test_all_tokens_on_one_expert():
    layer = layer_of(top_k=1)
    layer.ids.fill_(4)
    check(run(layer), layer)


def test_ranks_add_up_to_the_layer():
    whole = layer_of()
    total = torch.zeros_like(whole.x)
    for local in ([5, 2], [0], [1, 3, 4]):
        expert_map = torch.full((6,), -1)
        expert_map[local] = torch.arange(len(local))
        total += fused_experts(
            whole.x, whole.w1[local], whole.w2[local], whole.weights, whole.ids, expert_map=expert_map
        )
    check(total, whole)


def test_int64_ids_and_half_weights():
    layer = layer_of()
    assert torch.equal(run(layer), run(layer._replace(ids=layer.ids.long())))
    halves = layer._replace(weights=layer.weights.bfloat16())
    check(run(halves), halves)


@pytest.mark.filterwarnings("ignore:weights of shape")
def test_tensors_that_are_not_contiguous():
    layer = layer_of()
    spread = layer._replace(
        x=torch.stack([layer.x, -layer.x], dim=1)[:, 0],
        w1=layer.w1.transpose(1, 2).contiguous().transpose(1, 2),
        w2=torch.cat([layer.w2, layer.w2], dim=2)[:, :, : layer.w2.shape[2]],
        weights=layer.weights.t().contiguous().t(),
        ids=torch.stack([layer.ids, layer.ids - 1], dim=2)[:, :, 0],
    )
    assert not any(tensor.is_contiguous() for tensor in spread[:5])
    assert torch.equal(run(spread), run(layer))


@pytest.mark.parametrize("tokens", [0, 1, 11])
def test_out_is_written_in_place_whatever_its_strides(tokens):
    layer = layer_of(tokens=tokens)
    expected = run(layer)
    gaps = torch.full((tokens, 20, 3), -5.0)
    for out in (torch.empty(tokens, 20), gaps[:, :, 1], torch.empty(20, tokens).t()):
        assert run(layer, out=out) is out
        assert torch.equal(out, expected)
    assert (gaps[:, :, [0, 2]] == -5).all()


def test_inplace_writes_into_the_hidden_states():
    layer = layer_of()
    expected, x = run(layer), layer.x
    assert run(layer, inplace=True) is x
    assert torch.equal(x, expected)


def test_out_may_be_the_hidden_states():
    layer = layer_of(tokens=16)  # no padding, so that JAX reads the very memory that is written
    expected = run(layer)
    assert torch.equal(run(layer, out=layer.x), expected)


def test_weights_changed_in_place_or_replaced_are_seen():
    layer = layer_of()
    run(layer)
    layer.w1.mul_(2)
    check(run(layer), layer)
    layer.w2.data = torch.randn_like(layer.w2)
    check(run(layer), layer)


def test_inputs_may_be_overwritten_or_freed_as_soon_as_the_call_is_back():
    layer = layer_of(tokens=64, hidden=64, intermediate=64)
    expected = run(layer)
    for round_ in range(30):
        x, weights, ids = layer.x.clone(), layer.weights.clone(), layer.ids.clone()
        out = fused_experts(x, layer.w1, layer.w2, weights, ids)
        x.fill_(float("nan")), weights.fill_(float("nan")), ids.fill_(0)
        del x, weights, ids
        assert torch.equal(out, expected), round_


def test_what_does_not_fit_is_refused_by_name():
    layer = layer_of()
    x, w1, w2, weights, ids, _ = layer
    wrong = [
        ((x.double(), w1, w2, weights, ids), {}, "hidden_states is torch.float64"),
        ((x[None], w1, w2, weights, ids), {}, "flatten"),
        ((x, w1.half(), w2, weights, ids), {}, "all must be the same"),
        ((x, w1.transpose(1, 2), w2, weights, ids), {}, "contracted axis comes last"),
        ((x, w1, w2, weights, ids), {"activation": "silu_no_mul"}, "contracted axis"),
        ((x, w1, w2, ids, weights), {}, "weights, then ids"),
        ((x[:3], w1, w2, weights, ids), {}, "with the T of hidden_states, 3"),
        ((x, w1, w2, weights, ids), {"activation": "tanh"}, "activation='tanh' is not one of"),
        ((x, w1, w2, weights, ids), {"activation": "gelu", "swiglu_limit": 7.0}, "swiglu_limit=7.0 has no meaning for"),
        ((x, w1, w2, weights, ids), {"swiglu_limit": -1.0}, "swiglu_limit=-1.0 must be positive"),
        ((x, w1, w2, weights, ids), {"global_num_experts": 8}, "expert_map"),
        ((x, w1, w2, weights, ids), {"expert_map": torch.zeros(6)}, "expert_map is torch.float32"),
        ((x, w1, w2, weights, ids), {"apply_router_weight_on_input": True}, "needs k = 1"),
        ((x, w1, w2, weights, ids), {"w1_bias": torch.zeros(6, 12)}, r"w1_bias is .* floating \(6, 24\)"),
        ((x, w1, w2, weights, ids + 4), {}, r"topk_ids ranges from 4 to 9.*\[-1, 6\)"),
        ((x, w1, w2, weights, ids.long() + 2**32), {}, "topk_ids ranges"),
        ((x, w1, w2, weights, ids), {"expert_map": torch.arange(6) + 1}, r"expert_map ranges from 1 to 6"),
        ((x, w1, w2, weights, ids), {"out": torch.empty(20, 11)}, "out is"),
        ((x, w1, w2, weights, ids), {"out": x, "inplace": True}, "give one of them"),
        ((x, w1, w2, weights, ids.to("meta")), {}, "move them to one device"),
    ]
    for arguments, kwargs, message in wrong:
        with pytest.raises((ValueError, TypeError), match=message):
            fused_experts(*arguments, **kwargs)
    with pytest.raises(RuntimeError, match="no gradient"):
        fused_experts(x, w1.requires_grad_(), w2, weights, ids, inplace=True)


def logits_of(tokens=13, experts=12):
    return 2 * torch.randn(tokens, experts, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("scoring_func", "renormalize", "method"),
    [
        ("softmax", True, "renormalize_naive"),
        ("softmax", False, "default"),
        ("sigmoid", True, "sigmoid_renorm"),
        ("sigmoid", False, "sigmoid"),
    ],
)
def test_fused_topk_is_the_method_of_that_meaning(scoring_func, renormalize, method, dtype):
    logits = logits_of().to(dtype)
    weights, ids = fused_topk(torch.empty(13, 5), logits, 4, renormalize, scoring_func=scoring_func)
    config = MoEConfig(num_experts=12, top_k=4, hidden_size=5, intermediate_size=4, routing=RoutingConfig(method))
    expected = reference.route(jnp.asarray(logits.float().numpy()), config)
    assert (weights.dtype, ids.dtype) == (torch.float32, torch.int32)
    np.testing.assert_array_equal(ids, expected.ids)
    check_close(weights, expected.weights, 1e-6)


def grouped_in_torch(logits, top_k, renormalize, groups, kept, score, scale, bias):
    scores = torch.softmax(logits, -1) if score == "softmax" else torch.sigmoid(logits)
    choice = (scores if bias is None else scores + bias).unflatten(1, (groups, -1))
    value = choice.amax(2) if bias is None else choice.topk(2, dim=2).values.sum(2)
    allowed = torch.zeros_like(value).scatter(1, value.topk(kept, dim=1).indices, 1.0)[:, :, None].expand_as(choice)
    ids = choice.masked_fill(allowed == 0, -torch.inf).flatten(1).topk(top_k, dim=1).indices
    weights = scores.gather(1, ids)
    weights = scale * (weights / weights.sum(1, keepdim=True) if renormalize else weights)
    order = weights.argsort(dim=1, descending=True)
    return weights.gather(1, order), ids.gather(1, order)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("kept", [2, 4])
def test_grouped_topk(score, biased, renormalize, kept):
    logits = logits_of()
    bias = 0.3 * torch.randn(12, generator=torch.Generator().manual_seed(4)) if biased else None
    weights, ids = grouped_topk(
        torch.empty(13, 5),
        logits,
        3,
        renormalize,
        4,
        kept,
        scoring_func=score,
        routed_scaling_factor=2.5,
        e_score_correction_bias=bias,
    )
    expected = grouped_in_torch(logits, 3, renormalize, 4, kept, score, 2.5, bias)
    assert torch.equal(ids.long(), expected[1])
    check_close(weights, expected[0], 1e-6)


def test_routing_of_nothing_and_what_it_refuses():
    weights, ids = fused_topk(torch.empty(0, 5), torch.empty(0, 12), 3, True)
    assert weights.shape == ids.shape == (0, 3)
    logits, x = logits_of(), torch.empty(13, 5)
    with pytest.raises(ValueError, match=r"topk=13 must lie in \[1, E=12\]"):
        fused_topk(x, logits, 13, True)
    with pytest.raises(ValueError, match="must be .T, E. with the T of hidden_states, 2"):
        fused_topk(x[:2], logits, 3, True)
    with pytest.raises(ValueError, match="'tanh' is not one of softmax, sigmoid"):
        fused_topk(x, logits, 3, True, scoring_func="tanh")
    with pytest.raises(ValueError, match="num_expert_group=5 must divide the 12 experts"):
        grouped_topk(x, logits, 3, True, 5, 2)
    with pytest.raises(ValueError, match="topk=5 must not exceed the 3 experts"):
        grouped_topk(x, logits, 5, True, 4, 1)
    with pytest.raises(ValueError, match="two best experts"):
        grouped_topk(x, logits, 2, True, 12, 3, e_score_correction_bias=torch.zeros(12))
