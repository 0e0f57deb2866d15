"""Routing by top-k rules, against an implementation in plain Python, and the invariants of every rule."""

import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from moe_jax.config import MoEConfig, RoutingConfig
from moe_jax.routing import route
from tests.oracles import BIASED, F32_MAX, RULES, E, bias_of, config_of, logits_of, python_route, special_logits
from tests.util import assert_discriminates, check_close, without_type_checks


def routed(logits, config, bias=None):
    return route(jnp.asarray(logits), config, correction_bias=None if bias is None else jnp.asarray(bias))


def check_topk(topk, expected_ids, expected_weights, tolerance=2e-6):
    assert topk.ids.dtype == jnp.int32 and topk.weights.dtype == jnp.float32
    np.testing.assert_array_equal(topk.ids, expected_ids)
    check_close(topk.weights, expected_weights, tolerance)


# --- against plain Python


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rule(name, seed):
    config = config_of(name)
    logits, bias = logits_of(seed), bias_of(seed, config)
    ids, weights = python_route(logits, config, bias)
    topk = routed(logits, config, bias)
    check_topk(topk, ids, weights)
    assert_discriminates(lambda out: check_topk(topk._replace(weights=jnp.asarray(out)), ids, weights), topk.weights)
    if bias is not None:  # the bias of this test decides something
        with pytest.raises(AssertionError):
            check_topk(routed(logits, config), ids, weights)


@pytest.mark.parametrize("name", [name for name, (_, k) in RULES.items() if k == 4])
@pytest.mark.parametrize("top_k", [1, 7, E])
def test_any_k(name, top_k):
    config = config_of(name, top_k)
    logits, bias = logits_of(5), bias_of(5, config)
    check_topk(routed(logits, config, bias), *python_route(logits, config, bias))


@pytest.mark.parametrize("num_experts", [1, 60, 384])
@pytest.mark.parametrize("name", ["default", "renormalize", "deepseek_v4"])
def test_any_number_of_experts(name, num_experts):
    config = config_of(name, min(6, num_experts), num_experts)
    logits, bias = logits_of(6, 9, num_experts), bias_of(6, config)
    check_topk(routed(logits, config, bias), *python_route(logits, config, bias))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("num_tokens", [0, 1])
def test_no_token_and_one_token(name, num_tokens):
    config = config_of(name)
    logits, bias = logits_of(7, num_tokens), bias_of(7, config)
    topk = routed(logits, config, bias)
    assert topk.ids.shape == topk.weights.shape == (num_tokens, config.top_k)
    check_topk(topk, *python_route(logits, config, bias))


# --- what logits may be


@pytest.mark.parametrize("name", RULES)
def test_values_that_are_not_finite(name):
    config = config_of(name)
    logits = special_logits()
    bias = bias_of(8, config)
    topk = routed(logits, config, bias)
    ids, weights = python_route(logits, config, bias)
    np.testing.assert_array_equal(topk.ids, ids)
    assert np.all(np.isfinite(topk.weights))
    np.testing.assert_array_equal(np.asarray(topk.weights)[ids == -1], 0.0)
    for row in range(len(logits)):  # a row at a time: one weight is the largest float32
        check_close(topk.weights[row], np.minimum(weights[row], F32_MAX), 2e-6)
    assert np.all(ids[:2] == -1) and np.all(ids[6] >= 0)


@pytest.mark.parametrize("name", [name for name in RULES if RULES[name][0].method.value in BIASED])
def test_bias_that_is_not_finite_excludes(name):
    config = config_of(name)
    logits, bias = logits_of(9), bias_of(9, config)
    bias[[0, 5]] = math.nan, -math.inf
    ids, weights = python_route(logits, config, bias)
    topk = routed(logits, config, bias)
    check_topk(topk, ids, weights)
    assert not np.isin(topk.ids, [0, 5]).any()


@pytest.mark.parametrize("name", RULES)
def test_ties_go_to_the_lowest_id(name):
    config = config_of(name)
    logits = np.zeros((33, E), np.float32)  # as many rows as elsewhere: nothing new to compile
    logits[1:, [9, 13]] = 1.0
    ids, _ = python_route(logits, config)
    np.testing.assert_array_equal(routed(logits, config).ids, ids)
    np.testing.assert_array_equal(ids[0], np.arange(config.top_k))
    assert np.all(ids[1:, 0] == 9)


def test_equal_weights_selected_by_bias_are_in_order_of_ids():
    config = config_of("minimax2", top_k=3)
    bias = np.zeros(E, np.float32)
    bias[[12, 7, 2]] = 3.0, 2.0, 1.0
    topk = routed(np.zeros((1, E), np.float32), config, bias)
    assert topk.ids.tolist() == [[2, 7, 12]]


@pytest.mark.parametrize("name", ["sigmoid_renorm", "minimax2", "deepseek_v3_grouped", "deepseek_v4"])
def test_scores_that_underflow_give_no_weight_and_no_nan(name):
    config = config_of(name)
    topk = routed(np.full((33, E), -1e4, np.float32), config)
    np.testing.assert_array_equal(topk.weights, 0.0)
    np.testing.assert_array_equal(topk.ids, np.tile(np.arange(config.top_k), (33, 1)))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_arithmetic_is_float32_for_narrow_logits(name, dtype):
    config = config_of(name)
    logits = jnp.asarray(logits_of(10)).astype(dtype)
    narrow, wide = route(logits, config), route(logits.astype(jnp.float32), config)
    np.testing.assert_array_equal(narrow.ids, wide.ids)
    np.testing.assert_array_equal(narrow.weights, wide.weights)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("method", ["default", "renormalize", "deepseek_v3"])
def test_router_logits_dtype_rounds_first(dtype, method):
    config = MoEConfig(E, 4, 8, 8, routing=RoutingConfig(method, router_logits_dtype=dtype))
    plain = MoEConfig(E, 4, 8, 8, routing=RoutingConfig(method))
    logits = jnp.asarray(logits_of(11))
    rounded = jnp.asarray(np.asarray(logits).astype(jnp.dtype(dtype)).astype(np.float32))
    topk, expected = jax.jit(lambda x: route(x, config))(logits), route(rounded, plain)
    np.testing.assert_array_equal(topk.ids, expected.ids)
    check_close(topk.weights, expected.weights, 1e-6)
    if dtype != "float32":
        with pytest.raises(AssertionError):
            check_close(topk.weights, route(logits, plain).weights, 1e-6)


# --- invariants


@pytest.mark.parametrize("name", RULES)
def test_scaling_factor_is_honoured(name):
    routing, top_k = RULES[name]
    scaled = RoutingConfig(
        routing.method,
        routing.num_expert_group,
        routing.topk_group,
        3.0 * routing.routed_scaling_factor,
        routing.renormalize,
    )
    logits = logits_of(12)
    once, thrice = routed(logits, config_of(name)), routed(logits, MoEConfig(E, top_k, 8, 8, routing=scaled))
    np.testing.assert_array_equal(once.ids, thrice.ids)
    assert_discriminates(lambda out: check_close(out, 3.0 * np.asarray(once.weights), 1e-6), thrice.weights)


@pytest.mark.parametrize("name", [name for name, (routing, _) in RULES.items() if routing.method.value in BIASED])
def test_bias_selects_but_does_not_weigh(name):
    config = config_of(name)
    logits = logits_of(13)
    np.testing.assert_allclose(
        routed(logits, config, np.full(E, 0.25, np.float32)).weights, routed(logits, config).weights, rtol=1e-6
    )
    pushed = np.zeros(E, np.float32)
    pushed[3] = 100.0
    topk = routed(logits, config, pushed)
    assert np.all(np.any(np.asarray(topk.ids) == 3, axis=1))
    assert np.asarray(topk.weights).max() <= 2.0 * config.routing.routed_scaling_factor + 1.0


distinct_logits = st.lists(st.integers(-4000, 4000), min_size=E, max_size=E, unique=True).map(
    lambda values: np.asarray(values, np.float32)[None] / 512  # far enough apart to keep apart as scores
)


# A compiled function for each rule: hypothesis calls them many times.
COMPILED = {
    name: jax.jit(lambda logits, bias, config=config_of(name): route(logits, config, correction_bias=bias))
    for name in RULES
}


def compiled_route(name, logits, bias):
    return COMPILED[name](jnp.asarray(logits), None if bias is None else jnp.asarray(bias))


@hypothesis.given(name=st.sampled_from(sorted(RULES)), logits=distinct_logits, seed=st.integers(0, 3))
@hypothesis.settings(max_examples=150)
def test_ids_are_distinct_weights_sorted_and_sums_right(name, logits, seed):
    config = config_of(name)
    topk = compiled_route(name, logits, bias_of(seed, config))
    ids, weights = np.asarray(topk.ids[0]), np.asarray(topk.weights[0])
    assert len(set(ids.tolist())) == config.top_k and ids.min() >= 0 and ids.max() < E
    assert np.all(weights[:-1] >= weights[1:])
    if config.routing.renormalizes:
        assert weights.sum() == pytest.approx(config.routing.routed_scaling_factor, rel=1e-5)
    groups = config.routing.num_expert_group
    assert len(set((ids // (E // groups)).tolist())) <= config.routing.topk_group


@hypothesis.given(
    name=st.sampled_from([name for name in sorted(RULES) if RULES[name][0].num_expert_group == 1]),
    logits=distinct_logits,
    permutation=st.permutations(range(E)),
    seed=st.integers(0, 3),
)
@hypothesis.settings(max_examples=100)
def test_renaming_experts_renames_ids(name, logits, permutation, seed):
    config = config_of(name)
    bias = bias_of(seed, config)
    before = compiled_route(name, logits, bias)
    after = compiled_route(name, logits[:, permutation], None if bias is None else bias[list(permutation)])
    renamed = np.asarray(permutation)[np.asarray(after.ids)]
    # Biased selections may hold equal weights, whose order is that of the ids: compare the experts' weights.
    by_expert = lambda ids, weights: sorted(zip(ids[0].tolist(), weights[0].tolist(), strict=True))  # noqa: E731
    expected, actual = by_expert(np.asarray(before.ids), before.weights), by_expert(renamed, after.weights)
    assert [e for e, _ in actual] == [e for e, _ in expected]
    np.testing.assert_allclose([w for _, w in actual], [w for _, w in expected], rtol=1e-5)


@pytest.mark.parametrize("name", RULES)
def test_a_token_is_routed_alike_alone_and_in_a_batch(name):
    config = config_of(name)
    logits, bias = logits_of(14), bias_of(14, config)
    batch = routed(logits, config, bias)
    for token in (0, 17, 32):
        alone = routed(logits[token : token + 1], config, bias)
        np.testing.assert_array_equal(alone.ids[0], batch.ids[token])
        np.testing.assert_array_equal(alone.weights[0], batch.weights[token])


@pytest.mark.parametrize(
    "name", ["default", "renormalize", "topk", "llama4", "sigmoid_renorm", "deepseek_v3_grouped", "deepseek_v4"]
)
def test_gradients_are_those_of_the_weights(name):
    config = config_of(name)
    logits, bias = logits_of(15, 3), bias_of(15, config)
    mix = np.random.default_rng(0).standard_normal((3, config.top_k)).astype(np.float32)
    gradient = jax.grad(lambda x: jnp.sum(routed(x, config, bias).weights * mix))(jnp.asarray(logits))
    numeric = np.zeros(logits.shape)
    for index in np.ndindex(logits.shape):
        shift = np.zeros(logits.shape)
        shift[index] = 1e-6
        up, down = (python_route(logits + sign * shift, config, bias)[1] for sign in (1, -1))
        numeric[index] = ((up - down) * mix).sum() / 2e-6
    assert_discriminates(lambda out: check_close(out, numeric, 1e-4), gradient)


# --- errors

unchecked = without_type_checks("moe_jax.routing")
PLAIN = config_of("renormalize")
BIASED_CONFIG = MoEConfig(E, 4, 8, 8, routing=RoutingConfig("deepseek_v3"), has_correction_bias=True)


@pytest.mark.parametrize("shape", [(E,), (3, E + 1), (2, 3, E), (E, 3)])
def test_logits_must_be_tokens_by_experts(shape):
    with pytest.raises(ValueError, match=r"router_logits of shape .* must be \[T, num_experts=16\]"):
        unchecked.route(jnp.zeros(shape), PLAIN)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bool_, jnp.float8_e4m3fn])
def test_logits_must_be_floating(dtype):
    with pytest.raises(TypeError, match="router_logits are .*bfloat16, float16, float32"):
        unchecked.route(jnp.zeros((2, E), dtype), PLAIN)


def test_correction_bias_must_be_there_when_the_router_has_one():
    with pytest.raises(ValueError, match=r"has_correction_bias=True but no correction_bias .*'deepseek_v3'.*\[16\]"):
        unchecked.route(jnp.zeros((2, E)), BIASED_CONFIG)


def test_correction_bias_must_be_taken_by_the_method():
    with pytest.raises(ValueError, match="correction_bias is not used by routing method 'renormalize'"):
        unchecked.route(jnp.zeros((2, E)), PLAIN, correction_bias=jnp.zeros(E))


@pytest.mark.parametrize("shape", [(E - 1,), (1, E), ()])
def test_correction_bias_must_have_one_entry_per_expert(shape):
    with pytest.raises(ValueError, match=r"correction_bias of shape .* must be \[16\]"):
        unchecked.route(jnp.zeros((2, E)), BIASED_CONFIG, correction_bias=jnp.zeros(shape))


def test_correction_bias_must_be_floating():
    with pytest.raises(TypeError, match="correction_bias is int32"):
        unchecked.route(jnp.zeros((2, E)), BIASED_CONFIG, correction_bias=jnp.zeros(E, jnp.int32))
