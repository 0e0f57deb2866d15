"""The oracle against plain Python in float64, and what the layer promises about maps, ids of -1 and shared experts."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import reference
from moe_jax.activations import ACTIVATIONS
from moe_jax.config import MoEConfig, RoutingConfig
from moe_jax.types import ExpertWeights, SharedExpertWeights, TopK
from tests.oracles import (
    BIASED,
    F32_MAX,
    RULES,
    E,
    bias_of,
    config_of,
    logits_of,
    python_activation,
    python_experts,
    python_route,
    special_logits,
)
from tests.util import assert_discriminates, check_close, without_type_checks

unchecked = without_type_checks("moe_jax.reference")


def layer_config(num_experts=4, top_k=2, **fields):
    return MoEConfig(num_experts, top_k, hidden_size=10, intermediate_size=7, **fields)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def experts_of(seed, config, bias=False):
    num, rows, hidden, inner = config.num_experts, config.w13_rows, config.hidden_size, config.intermediate_size
    return ExpertWeights(
        w13=normal(seed, num, rows, hidden) / hidden**0.5,
        w2=normal(seed + 1, num, hidden, inner) / inner**0.5,
        w13_bias=normal(seed + 2, num, rows) if bias else None,
        w2_bias=normal(seed + 3, num, hidden) if bias else None,
    )


def topk_of(seed, config, num_tokens=9):
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(config.num_experts)[: config.top_k] for _ in range(num_tokens)])
    weights = -np.sort(-rng.uniform(0.1, 1.0, ids.shape))
    return TopK(jnp.asarray(ids, jnp.int32), jnp.asarray(weights, jnp.float32))


# --- routing


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("seed", [0, 1])
def test_route(name, seed):
    config = config_of(name)
    logits, bias = logits_of(seed), bias_of(seed, config)
    topk = reference.route(jnp.asarray(logits), config, correction_bias=None if bias is None else jnp.asarray(bias))
    ids, weights = python_route(logits, config, bias)
    assert topk.ids.dtype == jnp.int32 and topk.weights.dtype == jnp.float32
    np.testing.assert_array_equal(topk.ids, ids)
    assert_discriminates(lambda out: check_close(out, weights, 1e-6), topk.weights)


@pytest.mark.parametrize("name", RULES)
def test_route_values_that_are_not_finite(name):
    config, logits = config_of(name), special_logits()
    bias = bias_of(8, config)
    topk = reference.route(jnp.asarray(logits), config, correction_bias=None if bias is None else jnp.asarray(bias))
    ids, weights = python_route(logits, config, bias)
    np.testing.assert_array_equal(topk.ids, ids)
    for row in range(len(logits)):
        check_close(topk.weights[row], np.minimum(weights[row], F32_MAX), 1e-6)


@pytest.mark.parametrize("name", [name for name, (routing, _) in RULES.items() if routing.method.value in BIASED])
def test_route_bias_that_is_not_finite_excludes(name):
    config = config_of(name)
    logits, bias = logits_of(9), bias_of(9, config)
    bias[[0, 5]] = np.nan, -np.inf
    topk = reference.route(jnp.asarray(logits), config, correction_bias=jnp.asarray(bias))
    np.testing.assert_array_equal(topk.ids, python_route(logits, config, bias)[0])


@pytest.mark.parametrize("name", ["default", "renormalize", "deepseek_v3_grouped"])
@pytest.mark.parametrize("num_tokens", [0, 1])
def test_route_no_token_and_one_token(name, num_tokens):
    config = config_of(name)
    topk = reference.route(jnp.zeros((num_tokens, E)), config)
    assert topk.weights.shape == (num_tokens, config.top_k)
    np.testing.assert_array_equal(topk.ids, np.tile(np.arange(config.top_k), (num_tokens, 1)))  # ties: lowest id


@pytest.mark.parametrize("top_k", [1, E])
def test_route_one_and_all_experts(top_k):
    config = config_of("renormalize", top_k)
    topk = reference.route(jnp.asarray(logits_of(3)), config)
    ids, weights = python_route(logits_of(3), config)
    np.testing.assert_array_equal(topk.ids, ids)
    check_close(topk.weights, weights, 1e-6)


def test_route_rounds_to_the_dtype_of_the_router_logits():
    config = MoEConfig(E, 4, 8, 8, routing=RoutingConfig("default", router_logits_dtype="bfloat16"))
    logits = logits_of(4)
    rounded = np.asarray(jnp.asarray(logits).astype(jnp.bfloat16).astype(jnp.float32))
    ids, weights = python_route(rounded, config)
    topk = reference.route(jnp.asarray(logits), config)
    np.testing.assert_array_equal(topk.ids, ids)
    check_close(topk.weights, weights, 1e-6)
    with pytest.raises(AssertionError):
        check_close(topk.weights, python_route(logits, config)[1], 1e-6)


def test_route_refuses_what_is_no_top_k_rule():
    config = layer_config(routing=RoutingConfig("hash"))
    with pytest.raises(ValueError, match=r"not 'hash'; get a TopK from moe_jax.route"):
        unchecked.route(jnp.zeros((2, 4)), config)


# --- activations

PARAMETERS = [
    *((name, {}) for name in ACTIVATIONS),
    ("silu", {"swiglu_limit": 0.5}),
    ("silu", {"swiglu_alpha": 1.7, "swiglu_beta": 0.5}),
    ("silu", {"swiglu_alpha": 1.702, "swiglu_beta": 1.0, "swiglu_limit": 1.0}),
    ("swigluoai", {"swiglu_limit": 0.75}),
    ("swigluoai", {"swiglu_alpha": 1.25, "swiglu_beta": 0.5}),
    ("swiglustep", {"swiglu_limit": 0.75}),
]
IDS = ["-".join([name, *parameters]) for name, parameters in PARAMETERS]


@pytest.mark.parametrize(("name", "parameters"), PARAMETERS, ids=IDS)
def test_activation(name, parameters):
    config = layer_config(activation=name, **parameters)
    h = 3.0 * normal(0, 11, config.w13_rows)
    expected = python_activation(np.asarray(h, np.float64), config)
    assert_discriminates(lambda out: check_close(out, expected, 1e-6), reference.activation(h, config))


# --- experts


@pytest.mark.parametrize(("name", "parameters"), PARAMETERS, ids=IDS)
def test_apply_experts(name, parameters):
    config = layer_config(activation=name, has_bias=True, **parameters)
    x, experts, topk = 2.0 * normal(0, 9, 10), experts_of(1, config, True), topk_of(2, config)
    expected = python_experts(x, experts, topk.ids, topk.weights, config)
    out = reference.apply_experts(x, experts, topk, config)
    assert out.dtype == jnp.float32
    assert_discriminates(lambda out: check_close(out, expected, 1e-6), out)


@pytest.mark.parametrize("top_k", [1, 3, 4])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_apply_experts_any_k(top_k, seed):
    config = layer_config(top_k=top_k)
    x, experts, topk = normal(seed, 9, 10), experts_of(seed + 10, config), topk_of(seed, config)
    expected = python_experts(x, experts, topk.ids, topk.weights, config)
    assert_discriminates(
        lambda out: check_close(out, expected, 1e-6), reference.apply_experts(x, experts, topk, config)
    )


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_apply_experts_no_token_and_one_token(num_tokens):
    config = layer_config()
    x, experts, topk = normal(0, num_tokens, 10), experts_of(1, config), topk_of(2, config, max(num_tokens, 1))
    topk = TopK(topk.ids[:num_tokens], topk.weights[:num_tokens])
    out = reference.apply_experts(x, experts, topk, config)
    assert out.shape == (num_tokens, 10)
    check_close(out, python_experts(x, experts, topk.ids, topk.weights, config), 1e-6)


def test_router_weight_on_input_is_applied_once_and_inside():
    inside = layer_config(top_k=1, apply_router_weight_on_input=True, has_bias=True)
    outside = layer_config(top_k=1, has_bias=True)
    x, experts = normal(0, 9, 10), experts_of(1, inside, True)
    topk = topk_of(2, inside)
    expected = python_experts(x, experts, topk.ids, topk.weights, inside)
    check = lambda out: check_close(out, expected, 1e-6)  # noqa: E731
    assert_discriminates(check, reference.apply_experts(x, experts, topk, inside))
    with pytest.raises(AssertionError):
        check(reference.apply_experts(x, experts, topk, outside))
    with pytest.raises(AssertionError):  # once more outside
        check(np.asarray(reference.apply_experts(x, experts, topk, inside)) * np.asarray(topk.weights))
    ones = TopK(topk.ids, jnp.ones_like(topk.weights))
    np.testing.assert_array_equal(
        reference.apply_experts(x, experts, ones, inside), reference.apply_experts(x, experts, ones, outside)
    )


@pytest.mark.parametrize("on_input", [False, True])
def test_ids_of_minus_one_add_nothing(on_input):
    config = layer_config(top_k=1 if on_input else 2, apply_router_weight_on_input=on_input, has_bias=True)
    x, experts, topk = normal(0, 9, 10), experts_of(1, config, True), topk_of(2, config)
    ids = topk.ids.at[0].set(-1).at[3, -1].set(-1)
    out = reference.apply_experts(x, experts, TopK(ids, topk.weights), config)
    np.testing.assert_array_equal(out[0], 0.0)  # not even the bias
    expected = python_experts(x, experts, ids, topk.weights, config)
    assert_discriminates(lambda out: check_close(out, expected, 1e-6), out)


def test_an_expert_in_two_slots_counts_twice():
    config = layer_config()
    x, experts = normal(0, 1, 10), experts_of(1, config)
    twice = TopK(jnp.array([[2, 2]], jnp.int32), jnp.array([[0.7, 0.2]]))
    expected = python_experts(x, experts, twice.ids, twice.weights, config)
    check_close(reference.apply_experts(x, experts, twice, config), expected, 1e-6)


@pytest.mark.parametrize("seed", [0, 1])
def test_maps_give_partial_sums_that_add_up(seed):
    config = layer_config(top_k=3, has_bias=True)
    x, experts, topk = normal(seed, 9, 10), experts_of(seed + 1, config, True), topk_of(seed + 2, config)
    owner = np.array([0, 2, 1, 2])  # uneven, not contiguous; rank 3 has no expert
    parts = []
    for rank in range(4):
        mine = np.flatnonzero(owner == rank)
        mine = np.random.default_rng(seed).permutation(mine)  # local order is free
        expert_map = np.full(config.num_experts, -1)
        expert_map[mine] = np.arange(len(mine))
        local = jax.tree.map(lambda w, mine=mine: w[mine], experts)
        part = reference.apply_experts(x, local, topk, config, expert_map=jnp.asarray(expert_map))
        check_close(part, python_experts(x, local, topk.ids, topk.weights, config, expert_map), 1e-6)
        parts.append(np.asarray(part))
    whole = np.asarray(reference.apply_experts(x, experts, topk, config))
    assert_discriminates(lambda out: check_close(out, whole, 1e-6), sum(parts))
    np.testing.assert_array_equal(parts[3], 0.0)
    with pytest.raises(AssertionError):
        check_close(sum(parts[:2]), whole, 1e-2)


def test_local_experts_without_a_map_are_refused():
    config = layer_config()
    local = jax.tree.map(lambda w: w[:3], experts_of(0, config))
    with pytest.raises(ValueError, match="3 local of 4 experts need an expert_map"):
        unchecked.apply_experts(jnp.zeros((2, 10)), local, topk_of(0, config, 2), config)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_arrays_are_taken_to_float32(dtype):
    config = layer_config(has_bias=True)
    narrow = lambda tree: jax.tree.map(lambda a: a.astype(dtype), tree)  # noqa: E731
    wide = lambda tree: jax.tree.map(lambda a: a.astype(jnp.float32), tree)  # noqa: E731
    x, experts = narrow(normal(0, 9, 10)), narrow(experts_of(1, config, True))
    logits = narrow(normal(2, 9, 4))
    out = reference.moe(x, experts, logits, config)
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, reference.moe(wide(x), wide(experts), wide(logits), config))


# --- the layer


@pytest.mark.parametrize("gate", [False, True])
def test_shared_experts(gate):
    config = layer_config(num_shared_experts=1, shared_intermediate_size=5, shared_expert_gate=gate)
    shared = SharedExpertWeights(normal(0, 10, 10), normal(1, 10, 5), normal(2, 1, 10) if gate else None)
    x = normal(3, 9, 10)
    as_expert = ExpertWeights(shared.w13[None], shared.w2[None])
    weight = 1 / (1 + np.exp(-np.asarray(x, np.float64) @ np.asarray(shared.gate)[0])) if gate else np.ones(9)
    expected = python_experts(x, as_expert, np.zeros((9, 1), int), weight[:, None], config)
    assert_discriminates(lambda out: check_close(out, expected, 1e-6), reference.shared_experts(x, shared, config))


@pytest.mark.parametrize("name", ["renormalize", "deepseek_v3_grouped"])
def test_layer(name):
    config = config_of(name)
    x, logits, bias = normal(0, 33, 8), logits_of(1), bias_of(1, config)
    experts = experts_of(2, config)
    shared = SharedExpertWeights(normal(3, 10, 8), normal(4, 8, 5))
    correction_bias = None if bias is None else jnp.asarray(bias)
    routed = python_experts(x, experts, *python_route(logits, config, bias), config)
    as_expert = ExpertWeights(shared.w13[None], shared.w2[None])
    visited_by_all = python_experts(x, as_expert, np.zeros((33, 1), int), np.ones((33, 1)), config)
    call = lambda **kwargs: reference.moe(  # noqa: E731
        x, experts, jnp.asarray(logits), config, correction_bias=correction_bias, **kwargs
    )
    assert_discriminates(lambda out: check_close(out, routed, 2e-6), call())
    assert_discriminates(lambda out: check_close(out, routed + visited_by_all, 2e-6), call(shared=shared))
    nowhere = jnp.full(config.num_experts, -1)
    np.testing.assert_array_equal(call(expert_map=nowhere), 0.0)


def test_a_token_of_nan_logits_gives_zero():
    config = layer_config(has_bias=True)
    out = reference.moe(normal(0, 3, 10), experts_of(1, config, True), normal(2, 3, 4).at[1].set(jnp.nan), config)
    np.testing.assert_array_equal(out[1], 0.0)
    assert np.all(np.isfinite(out)) and np.all(np.abs(np.asarray(out)[[0, 2]]).sum(axis=1) > 0)


@pytest.mark.parametrize("activation", ["silu", "relu2_no_mul"])
def test_gradients(activation):
    """Along a random direction of every input: by autodiff, and by differences in float64."""
    config = layer_config(4, activation=activation, has_bias=True)
    experts, logits, mix = experts_of(1, config, True), normal(2, 4, 4), normal(3, 4, 10)
    inputs = {"x": normal(0, 4, 10)} | {name: leaf for name, leaf in vars(experts).items() if leaf is not None}

    def jax_sum(inputs):
        weights = {field: value for field, value in inputs.items() if field != "x"}
        return jnp.sum(mix * reference.moe(inputs["x"], ExpertWeights(**weights), logits, config))

    def python_sum(inputs):
        topk = python_route(logits, config)
        return np.sum(np.asarray(mix) * python_experts(inputs["x"], types.SimpleNamespace(**inputs), *topk, config))

    gradients = jax.jit(jax.grad(jax_sum))(inputs)
    for seed, (field, value) in enumerate(inputs.items()):
        value, way = np.asarray(value, np.float64), np.random.default_rng(seed).standard_normal(value.shape)
        up, down = (python_sum({**inputs, field: value + shift * way}) for shift in (1e-5, -1e-5))
        numeric = (up - down) / 2e-5
        assert abs(numeric) > 1e-3
        assert float(np.sum(np.asarray(gradients[field]) * way)) == pytest.approx(numeric, rel=1e-4)
