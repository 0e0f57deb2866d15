"""Top-k routing as one operation, in its plain-JAX form: every rule, dtype and edge, and its gradient."""

import dataclasses

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from moe_jax import reference
from moe_jax.config import RoutingConfig
from moe_jax.ops.topk import topk
from tests.contracts import check_topk, discriminate_topk
from tests.layers import quick_jit
from tests.oracles import RULES, E, bias_of, config_of, logits_of, special_logits
from tests.util import check_close

route = quick_jit(topk, static_argnames=("top_k", "rule", "implementation"))


def run(logits, config, bias=None, route=route):
    bias = None if bias is None else jnp.asarray(bias)
    rule = config.routing.rule
    return route(jnp.asarray(logits), config.top_k, rule, correction_bias=bias, implementation="xla")


@pytest.mark.parametrize("name", RULES)
def test_rules(name):
    config = config_of(name)
    for logits, bias in ((logits_of(0), bias_of(0, config)), (special_logits(), bias_of(8, config))):
        found = run(logits, config, bias)
        check_topk(found, logits, config, bias)
    operands = logits_of(1), config, bias_of(1, config)
    discriminate_topk(run(*operands), *operands)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_logits_of_16_bits_are_taken_as_they_are(dtype):
    config = config_of("renormalize_naive")
    logits = jnp.asarray(logits_of(2), dtype)
    check_topk(run(logits, config), np.asarray(logits, np.float32), config)


@pytest.mark.parametrize("name", ["default", "renormalize", "deepseek_v3", "topk"])
@pytest.mark.parametrize("top_k", [1, E])
def test_one_expert_and_all_experts(name, top_k):
    config = config_of(name, top_k)
    logits, bias = logits_of(3), bias_of(3, config)
    check_topk(run(logits, config, bias), logits, config, bias)


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_no_token_and_one(num_tokens):
    config = config_of("deepseek_v3_grouped")
    logits, bias = logits_of(4, num_tokens), bias_of(4, config)
    found = run(logits, config, bias)
    assert found.ids.shape == found.weights.shape == (num_tokens, 5)
    check_topk(found, logits, config, bias)


@hypothesis.settings(max_examples=30)
@hypothesis.given(data=st.data())
def test_equal_logits_go_to_the_lowest_expert(data):
    config = config_of(data.draw(st.sampled_from(["default", "renormalize", "sigmoid", "deepseek_v2_grouped"])))
    values = st.lists(st.sampled_from([-1.0, 0.0, 1.0, 2.0]), min_size=E, max_size=E)
    logits = np.asarray([data.draw(values) for _ in range(3)], np.float32)
    check_topk(run(logits, config), logits, config)


def test_the_scaling_factor_cannot_make_weights_infinite():
    config = config_of("topk")
    config = dataclasses.replace(config, routing=RoutingConfig("topk", routed_scaling_factor=1e6))
    found = run(np.full((2, E), np.inf, np.float32), config)
    np.testing.assert_array_equal(found.weights, np.finfo(np.float32).max)


@pytest.mark.parametrize("name", ["default", "renormalize", "sigmoid_renorm", "deepseek_v3_grouped", "deepseek_v4"])
def test_gradient(name):
    config, logits = config_of(name), jnp.asarray(logits_of(5))
    bias = bias_of(5, config)
    bias = None if bias is None else jnp.asarray(bias)
    cotangent = jnp.asarray(np.random.default_rng(0).standard_normal((33, config.top_k)), jnp.float32)

    def loss(weigh, logits):
        return jnp.sum(weigh(logits).weights * cotangent)

    plain = quick_jit(jax.grad(lambda x: loss(lambda x: run(x, config, bias, topk), x)))(logits)
    right = quick_jit(jax.grad(lambda x: loss(lambda x: reference.route(x, config, correction_bias=bias), x)))(logits)
    assert np.any(np.asarray(right))
    check_close(plain, right, 5e-6)


def test_the_gradient_is_finite_where_logits_are_not():
    for name in ("default", "renormalize", "sigmoid_renorm", "deepseek_v4"):
        config = config_of(name)
        gradient = quick_jit(jax.grad(lambda x: jnp.sum(run(x, config, None, topk).weights)))(
            jnp.asarray(special_logits())
        )
        assert np.isfinite(np.asarray(gradient)).all(), name
