"""The layer under jit, grad, scan and remat: gradients are those of the float32 reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax
from moe_jax import MoEConfig, RoutingConfig, reference
from moe_jax.types import MoELayerWeights, TopK
from tests.layers import (
    check_layer,
    correction_bias_of,
    experts_of,
    logits_of,
    normal,
    plain,
    quick_jit,
    rank_of,
    reference_moe,
    topk_of,
    x_of,
)
from tests.util import assert_discriminates, check_close

moe, apply_experts, moe_block = (
    functools.partial(door, implementation="xla") for door in (moe_jax.moe, moe_jax.apply_experts, moe_jax.moe_block)
)

f32 = functools.partial(MoEConfig, dtype="float32")
CONFIGS = {
    "qwen3": f32(8, 2, 24, 16),
    "gpt-oss": f32(6, 3, 16, 24, activation="swigluoai", has_bias=True),
    "no gate": f32(6, 2, 16, 24, activation="gelu_no_mul", has_bias=True),
    "llama4": f32(4, 1, 16, 12, routing=RoutingConfig("llama4"), apply_router_weight_on_input=True),
    "deepseek": f32(
        8, 3, 16, 12, routing=RoutingConfig("deepseek_v3", 4, 2, routed_scaling_factor=2.5), has_correction_bias=True
    ),
}


def gradients(layer, config, seed, num_tokens, logits=None, **kwargs):
    """Of a random projection of the output, with respect to hidden states, weights and logits."""
    cotangent = normal([seed, 20], num_tokens, config.hidden_size)
    if config.has_correction_bias:
        kwargs["correction_bias"] = correction_bias_of(seed, config)

    def loss(x, experts, logits):
        return jnp.sum(layer(x, experts, logits, config, **kwargs).astype(jnp.float32) * cotangent)

    experts = experts_of(seed, config)
    if "expert_map" in kwargs:
        _, experts = rank_of(experts, config, [0, 2])
    logits = logits_of(seed, config, num_tokens) if logits is None else logits
    # Not compiled as one, the reference takes seconds for each of its experts' operations.
    return quick_jit(jax.grad(loss, argnums=(0, 1, 2)))(x_of(seed, config, num_tokens), experts, logits)


def check_gradients(actual, expected, tolerance=5e-6):
    names = jax.tree_util.tree_flatten_with_path(expected)[0]
    assert len(names) == len(jax.tree.leaves(actual)) > 0
    for (path, leaf), mine in zip(names, jax.tree.leaves(actual), strict=True):
        assert np.any(np.asarray(leaf)), f"the gradient with respect to {path} is zero: nothing is compared"
        check_close(mine, leaf, tolerance)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients(name):
    config = CONFIGS[name]
    actual, expected = gradients(moe, config, 0, 23), gradients(reference.moe, config, 0, 23)
    check_gradients(actual, expected)
    for mine, right in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_discriminates(lambda g: check_close(g, right, 5e-6), mine)


def test_gradients_of_a_rank():
    config, expert_map = CONFIGS["qwen3"], jnp.asarray([0, -1, 1, -1, -1, -1, -1, -1], jnp.int32)
    actual = gradients(moe, config, 1, 23, expert_map=expert_map)
    check_gradients(actual, gradients(reference.moe, config, 1, 23, expert_map=expert_map))


def test_gradients_in_bfloat16():
    config = MoEConfig(8, 2, 32, 16)
    actual, expected = gradients(moe, config, 2, 23), gradients(reference.moe, config, 2, 23)
    assert actual[1].w13.dtype == jnp.bfloat16
    check_gradients(actual, expected, 1.5e-2)


def test_gradients_where_logits_are_not_finite():
    config = CONFIGS["qwen3"]
    logits = np.array(logits_of(3, config, 9))
    logits[0] = np.nan
    logits[1, 2:] = -np.inf
    logits[2, :7] = np.nan
    actual = gradients(moe, config, 3, 9, logits=jnp.asarray(logits))
    expected = gradients(reference.moe, config, 3, 9, logits=jnp.asarray(logits))
    check_gradients(actual[:2], expected[:2])
    assert np.isfinite(np.asarray(actual[2])).all()
    check_close(actual[2][3:], expected[2][3:], 5e-6)


def test_no_gradient_reaches_a_slot_without_an_expert():
    config = CONFIGS["qwen3"]
    x, experts, topk = x_of(0, config, 10), experts_of(0, config), topk_of(0, config, 10)
    empty = np.zeros(topk.ids.shape, bool)
    empty[:4, 1], empty[5] = True, True
    ids = jnp.where(empty, -1, topk.ids)

    def loss(layer, x, experts, weights):
        return jnp.sum(layer(x, experts, TopK(ids, weights), config) ** 2)

    def gradient(layer, weights):
        return quick_jit(jax.grad(functools.partial(loss, layer), argnums=(0, 1, 2)))(x, experts, weights)

    actual = gradient(apply_experts, jnp.where(empty, jnp.nan, topk.weights))
    expected = gradient(reference.apply_experts, topk.weights)
    check_gradients(actual[:2], expected[:2])
    np.testing.assert_array_equal(actual[2][empty], 0.0)
    check_close(actual[2][~empty], expected[2][~empty], 5e-6)
    np.testing.assert_array_equal(actual[0][5], 0.0)


def test_no_tokens_have_gradients_too():
    config = CONFIGS["gpt-oss"]
    for leaf in jax.tree.leaves(gradients(moe, config, 0, 0)):
        assert not np.any(np.asarray(leaf))


@pytest.mark.parametrize("num_tokens", [0, 1, 23])
def test_jit(num_tokens):
    config = CONFIGS["gpt-oss"]
    operands = x_of(4, config, num_tokens), experts_of(4, config), logits_of(4, config, num_tokens)
    out = plain(moe_jax.moe)(*operands, config)
    check_layer(out, reference_moe(*operands, config), config)


def test_one_trace_serves_any_routing():
    config = CONFIGS["qwen3"]
    traces = []

    @quick_jit
    def layer(x, experts, topk, expert_map):
        traces.append(1)
        return apply_experts(x, experts, topk, config, expert_map=expert_map)

    x, experts = x_of(5, config, 12), experts_of(5, config)
    everything = jnp.arange(8, dtype=jnp.int32)
    for ids in (topk_of(5, config, 12).ids, jnp.full((12, 2), 3, jnp.int32), jnp.full((12, 2), -1, jnp.int32)):
        topk = TopK(ids, topk_of(6, config, 12).weights)
        check_layer(layer(x, experts, topk, everything), reference.apply_experts(x, experts, topk, config), config)
    assert len(traces) == 1


def test_scan_over_layers():
    config = f32(4, 2, 16, 12)
    layers = [MoELayerWeights(experts_of(i, config), normal([i, 21], 4, 16)) for i in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    x = x_of(0, config, 9)

    def step(x, layer):
        return x + moe_block(x, layer, config), None

    scanned = quick_jit(lambda stacked: jax.lax.scan(step, x, stacked)[0])(stacked)
    expected = x
    for layer in layers:
        logits = jnp.matmul(expected, layer.router.T, precision="highest")
        expected = expected + reference_moe(expected, layer.experts, logits, config)
    assert_discriminates(lambda y: check_close(y, expected, 5e-6), scanned)

    def gradient(step):
        return quick_jit(jax.grad(lambda stacked: jnp.sum(jax.lax.scan(step, x, stacked)[0] ** 2)))(stacked)

    check_gradients(gradient(jax.checkpoint(step)), gradient(step), 1e-6)


def test_remat():
    config = CONFIGS["qwen3"]
    remat = jax.checkpoint(moe, static_argnums=3)
    check_gradients(gradients(remat, config, 7, 11), gradients(moe, config, 7, 11), 1e-6)
