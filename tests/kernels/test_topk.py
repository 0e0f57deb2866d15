"""The routing kernel, interpreted: every rule and every edge against plain Python, and lowered for CUDA."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import RoutingConfig
from moe_jax.ops.topk import topk
from tests.contracts import check_topk, discriminate_topk
from tests.lowering import assert_lowers_to_kernels, like
from tests.oracles import RULES, E, bias_of, config_of, logits_of, special_logits


def run(logits, config, bias=None):
    bias = None if bias is None else jnp.asarray(bias)
    return topk(
        jnp.asarray(logits),
        config.top_k,
        config.routing.rule,
        correction_bias=bias,
        implementation="mosaic_interpret",
    )


@pytest.mark.parametrize("name", RULES)
def test_rules(name):
    """66 tokens: a full block of the kernel and the beginning of another."""
    config = config_of(name)
    special = special_logits()[:10]
    logits = np.concatenate([logits_of(0, 54), special, logits_of(1, 2)])
    bias = bias_of(0, config)
    found = run(logits, config, bias)
    check_topk(found, logits, config, bias)
    plain_rows = np.r_[0:54, 64:66]
    ordinary = type(found)(found.ids[plain_rows], found.weights[plain_rows])
    discriminate_topk(ordinary, logits[plain_rows], config, bias)


@pytest.mark.parametrize("name", ["default", "deepseek_v3"])
@pytest.mark.parametrize("top_k", [1, 8])
def test_one_expert_and_all_experts(name, top_k):
    config = config_of(name, top_k, 8)
    logits, bias = logits_of(3, 3, 8), bias_of(3, config)
    check_topk(run(logits, config, bias), logits, config, bias)


@pytest.mark.parametrize("num_experts", [4, 20, 264])
def test_numbers_of_experts(num_experts):
    """264: more columns than one copy brings."""
    config = config_of("deepseek_v4", 3, num_experts)
    logits, bias = logits_of(4, 2, num_experts), bias_of(4, config)
    check_topk(run(logits, config, bias), logits, config, bias)


@pytest.mark.parametrize("num_tokens", [1, 64])
def test_numbers_of_tokens(num_tokens):
    config, logits = config_of("renormalize"), logits_of(5, num_tokens)
    check_topk(run(logits, config), logits, config)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_logits_of_16_bits(dtype):
    config, logits = config_of("renormalize_naive"), jnp.asarray(logits_of(6, 3), dtype)
    check_topk(run(logits, config), np.asarray(logits, np.float32), config)


@pytest.mark.parametrize("name", ["default", "renormalize", "deepseek_v2_grouped"])
def test_equal_logits_go_to_the_lowest_expert(name):
    config = config_of(name)
    logits = np.random.default_rng(7).choice([-1.0, 0.0, 1.0], (5, E)).astype(np.float32)
    check_topk(run(logits, config), logits, config)


def test_a_token_does_not_see_the_others():
    config, logits = config_of("deepseek_v3_grouped"), logits_of(8, 5)
    bias = bias_of(8, config)
    together, alone = run(logits, config, bias), run(logits[3:4], config, bias)
    np.testing.assert_array_equal(together.ids[3:4], alone.ids)
    np.testing.assert_array_equal(together.weights[3:4], alone.weights)


def test_the_scaling_factor_cannot_make_weights_infinite():
    config = config_of("topk")
    config = dataclasses.replace(config, routing=RoutingConfig("topk", routed_scaling_factor=1e6))
    found = run(np.full((2, E), np.inf, np.float32), config)
    np.testing.assert_array_equal(found.weights, np.finfo(np.float32).max)


LOWERED = {
    "qwen3": (RoutingConfig(), 1000, 128, 8, "float32"),
    "deepseek": (RoutingConfig("deepseek_v3", 8, 4, routed_scaling_factor=2.5), 4096, 256, 8, "float32"),
    "384 experts": (RoutingConfig("deepseek_v3"), 100, 384, 8, "float32"),
    "bfloat16": (RoutingConfig("deepseek_v2", 8, 3), 64, 160, 6, "bfloat16"),
    "sqrtsoftplus": (RoutingConfig("deepseek_v4"), 65, 256, 6, "float32"),
    "llama4": (RoutingConfig("llama4"), 17, 16, 1, "float32"),
}


@pytest.mark.parametrize("name", LOWERED)
def test_lowers_for_cuda(name):
    routing, num_tokens, num_experts, top_k, dtype = LOWERED[name]
    run = functools.partial(topk, top_k=top_k, rule=routing.rule, implementation="mosaic")
    logits = like(dtype, num_tokens, num_experts)
    if routing.takes_correction_bias:
        bias = like("float32", num_experts)
        assert_lowers_to_kernels(lambda logits, bias: run(logits, correction_bias=bias), logits, bias)
    else:
        assert_lowers_to_kernels(run, logits)
