"""The layer on a CPU against the float32 reference: every kind of layer, every edge, splits, and the doors below `moe`."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import moe_jax
from moe_jax import MoEConfig, RoutingConfig, reference, route
from moe_jax.moe import shared_expert
from moe_jax.types import MoELayerWeights, SharedExpertWeights, TopK
from tests.layers import (
    TOLERANCE,
    check_layer,
    check_unit_rms,
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

moe, apply_experts = plain(moe_jax.moe), plain(moe_jax.apply_experts)
moe_block = quick_jit(functools.partial(moe_jax.moe_block, implementation="xla"), static_argnums=2)

f32 = functools.partial(MoEConfig, dtype="float32")
GROUPED = RoutingConfig("deepseek_v3", 4, 2, routed_scaling_factor=2.5)
INPUT_WEIGHT = {"routing": RoutingConfig("llama4"), "apply_router_weight_on_input": True}
CONFIGS = {
    "qwen3": f32(8, 2, 48, 40),
    "one expert a token": f32(6, 1, 32, 16, routing=RoutingConfig("sigmoid")),
    "every expert": f32(5, 5, 32, 16),
    "a single expert": f32(1, 1, 32, 16),
    "sizes that nothing divides": f32(3, 2, 37, 19),
    "1000": f32(3, 2, 1000, 8),
    "gpt-oss": f32(6, 3, 32, 48, activation="swigluoai", has_bias=True),
    "no gate": f32(6, 2, 32, 48, activation="relu2_no_mul", has_bias=True),
    "gelu": f32(4, 2, 32, 16, activation="gelu_tanh", routing=RoutingConfig("default")),
    "llama4": f32(4, 1, 32, 16, **INPUT_WEIGHT),
    "deepseek": f32(16, 3, 32, 16, routing=GROUPED, has_correction_bias=True),
    "bfloat16": MoEConfig(8, 2, 64, 48),
    "float16": MoEConfig(8, 2, 64, 48, dtype="float16"),
}


def run(seed, config, num_tokens, **kwargs):
    """(output, reference) of a random layer."""
    arguments = (x_of(seed, config, num_tokens), experts_of(seed, config), logits_of(seed, config, num_tokens), config)
    bias = correction_bias_of(seed, config)
    return moe(*arguments, correction_bias=bias, **kwargs), reference_moe(*arguments, correction_bias=bias)


# --- against the reference


@pytest.mark.parametrize("name", CONFIGS)
def test_layer(name):
    config = CONFIGS[name]
    out, expected = run(0, config, 37)
    check_layer(out, expected, config)
    check_unit_rms(expected)
    assert_discriminates(lambda y: check_layer(y.astype(config.dtype), expected, config), out)
    for seed in (1, 2):
        check_layer(*run(seed, config, 37), config)


@pytest.mark.parametrize("name", ["qwen3", "gpt-oss", "llama4"])
@pytest.mark.parametrize("num_tokens", [1, 70])
def test_any_number_of_tokens(name, num_tokens):
    check_layer(*run(3, CONFIGS[name], num_tokens), CONFIGS[name])


@pytest.mark.parametrize("name", CONFIGS)
def test_no_tokens(name):
    config = CONFIGS[name]
    out, _ = run(0, config, 0)
    assert out.shape == (0, config.hidden_size) and out.dtype == jnp.dtype(config.dtype)


def test_auto_is_the_default_and_runs_on_a_cpu():
    config = CONFIGS["qwen3"]
    operands = x_of(4, config, 5), experts_of(4, config), logits_of(4, config, 5), config
    expected = reference_moe(*operands)
    with jax.default_device(jax.devices("cpu")[0]):
        check_layer(moe_jax.moe(*operands), expected, config)  # also: outside of jit
        topk = route(*operands[2:])
        check_layer(moe_jax.apply_experts(*operands[:2], topk, config), expected, config)


def test_routing_that_is_no_top_k_rule():
    table = jnp.asarray([[0, 3], [2, 1], [-1, 3]], jnp.int32)
    config = f32(4, 2, 16, 16, routing=RoutingConfig("hash"))
    x, experts, logits = x_of(0, config, 5), experts_of(0, config), logits_of(0, config, 5)
    input_ids = jnp.asarray([0, 2, 1, 1, 0], jnp.int32)
    topk = route(logits, config, input_ids=input_ids, hash_indices_table=table)
    out = moe_jax.moe(x, experts, logits, config, input_ids=input_ids, hash_indices_table=table)
    check_layer(out, reference.apply_experts(x, experts, topk, config), config)

    config = f32(4, 2, 16, 16, routing=RoutingConfig("simulated_uniform"))
    topk = route(logits, config, key=jax.random.key(3))
    out = moe(x, experts, logits, config, key=jax.random.key(3))
    check_layer(out, reference.apply_experts(x, experts, topk, config), config)

    def first_two(hidden_states, router_logits, top_k, renormalize):
        weight = jax.nn.sigmoid(hidden_states[:, :top_k])  # the hidden states arrive
        return weight, jnp.broadcast_to(jnp.arange(top_k)[None], weight.shape)

    config = f32(4, 2, 16, 16, routing=RoutingConfig("custom", custom_function=first_two))
    ids = jnp.broadcast_to(jnp.arange(2)[None], (5, 2))
    topk = TopK(ids, jax.nn.sigmoid(x[:, :2]))
    check_layer(moe(x, experts, logits, config), reference.apply_experts(x, experts, topk, config), config)


def test_logits_that_are_not_finite():
    config = CONFIGS["qwen3"]
    logits = np.array(logits_of(0, config, 6))
    logits[0] = np.nan
    logits[1, :7] = np.nan
    logits[2, 3] = np.inf
    logits[3] = -np.inf
    x, experts = x_of(0, config, 6), experts_of(0, config)
    out = moe(x, experts, jnp.asarray(logits), config)
    check_layer(out, reference_moe(x, experts, jnp.asarray(logits), config), config)
    assert not np.any(np.asarray(out)[[0, 3]]), "a token without an expert has output 0"
    assert np.all(np.asarray(out)[[1, 2, 4, 5]])


# --- how tokens spread over experts


def test_all_tokens_on_one_expert():
    config = f32(8, 1, 24, 16)
    x, experts = x_of(0, config, 90), experts_of(0, config)
    for expert in (0, 3, 7):
        topk = TopK(jnp.full((90, 1), expert, jnp.int32), jnp.full((90, 1), 0.7, jnp.float32))
        check_layer(apply_experts(x, experts, topk, config), reference.apply_experts(x, experts, topk, config), config)


def test_a_token_may_visit_an_expert_twice():
    config = f32(4, 2, 24, 16)
    x, experts = x_of(0, config, 3), experts_of(0, config)
    topk = TopK(jnp.asarray([[1, 1], [0, 2], [3, 3]], jnp.int32), jnp.asarray([[0.5, 0.25]] * 3, jnp.float32))
    check_layer(apply_experts(x, experts, topk, config), reference.apply_experts(x, experts, topk, config), config)


@pytest.mark.parametrize("name", ["qwen3", "gpt-oss", "llama4"])
def test_slots_without_an_expert_add_exactly_zero(name):
    config = CONFIGS[name]
    x, experts, topk = x_of(0, config, 20), experts_of(0, config), topk_of(0, config, 20)
    empty = np.random.default_rng(0).random(topk.ids.shape) < 0.4
    empty[4] = True
    ids = jnp.where(empty, -1, topk.ids)
    zeros = apply_experts(x, experts, TopK(ids, jnp.where(empty, 0.0, topk.weights)), config)
    nans = apply_experts(x, experts, TopK(ids, jnp.where(empty, jnp.nan, topk.weights)), config)
    np.testing.assert_array_equal(nans, zeros)
    assert not np.any(np.asarray(zeros)[4])
    check_layer(zeros, reference.apply_experts(x, experts, TopK(ids, topk.weights), config), config)


@pytest.mark.parametrize("name", ["qwen3", "gpt-oss", "bfloat16"])
def test_a_token_does_not_see_the_others(name):
    """Values that are not finite stay in the tokens that have them."""
    config = CONFIGS[name]
    x, experts, topk = x_of(0, config, 30), experts_of(0, config), topk_of(0, config, 30)
    bad = np.arange(30) % 3 == 1
    out = apply_experts(jnp.where(bad[:, None], jnp.nan, x), experts, topk, config)
    assert np.isnan(np.asarray(out, np.float32)[bad]).all()
    clean = apply_experts(x, experts, topk, config)
    np.testing.assert_array_equal(out[~bad], clean[~bad])


def test_experts_that_nobody_chose_are_not_read():
    config = f32(6, 2, 24, 16)
    x, experts = x_of(0, config, 12), experts_of(0, config)
    ids = jnp.asarray(np.random.default_rng(0).choice([1, 4], (12, 2)), jnp.int32)
    topk = TopK(ids, jnp.full((12, 2), 0.5, jnp.float32))
    chosen = np.isin(np.arange(6), [1, 4])[:, None, None]
    poisoned = type(experts)(jnp.where(chosen, experts.w13, jnp.nan), jnp.where(chosen, experts.w2, jnp.nan))
    check_layer(apply_experts(x, poisoned, topk, config), reference.apply_experts(x, experts, topk, config), config)


def test_ids_out_of_range_are_dropped_in_a_compiled_function():
    config = CONFIGS["qwen3"]
    x, experts, topk = x_of(0, config, 10), experts_of(0, config), topk_of(0, config, 10)
    wrong = np.random.default_rng(0).random(topk.ids.shape) < 0.3
    for value in (config.num_experts, -2, 2**31 - 1, -(2**31)):
        out = apply_experts(x, experts, TopK(jnp.where(wrong, value, topk.ids), topk.weights), config)
        dropped = TopK(jnp.where(wrong, -1, topk.ids), topk.weights)
        check_layer(out, reference.apply_experts(x, experts, dropped, config), config)


def test_two_runs_give_the_same_bits():
    config = CONFIGS["qwen3"]
    np.testing.assert_array_equal(run(5, config, 40)[0], run(5, config, 40)[0])


def test_memory_grows_with_rows_not_with_experts_times_rows():
    config = f32(64, 2, 128, 64)
    operands = (x_of(0, config, 256), experts_of(0, config), logits_of(0, config, 256))
    compiled = jax.jit(functools.partial(moe_jax.moe, config=config, implementation="xla")).lower(*operands).compile()
    rows = 256 * config.top_k + config.num_experts * 8  # at most a nearly empty tile of 8 rows for every expert
    per_row = 4 * (2 * config.hidden_size + config.intermediate_size)
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * rows * per_row


# --- splits over ranks


@hypothesis.settings(max_examples=8)
@hypothesis.given(data=st.data())
def test_partial_sums_of_any_partition_add_up(data):
    config = f32(6, data.draw(st.sampled_from([1, 2, 6]), "k"), 16, 8, has_bias=True)
    num_tokens = data.draw(st.sampled_from([0, 1, 7]), "T")
    seed = data.draw(st.integers(0, 99), "seed")
    order = data.draw(st.permutations(range(6)), "order")  # local ids need not follow the global ones
    owner = data.draw(st.lists(st.integers(0, 2), min_size=6, max_size=6), "owner of each expert")
    x, experts, topk = x_of(seed, config, num_tokens), experts_of(seed, config), topk_of(seed, config, num_tokens)
    total = jnp.zeros(x.shape)
    for rank in range(3):  # one may own nothing
        expert_map, local = rank_of(experts, config, [e for e in order if owner[e] == rank])
        part = apply_experts(x, local, topk, config, expert_map=expert_map)
        check_close(part, reference.apply_experts(x, local, topk, config, expert_map=expert_map), 2e-6)
        total = total + part
    check_close(total, reference.apply_experts(x, experts, topk, config), 2e-6)


@pytest.mark.parametrize("name", ["qwen3", "llama4", "deepseek", "bfloat16"])
def test_a_split_layer_routes_like_the_whole(name):
    config = CONFIGS[name]
    x, experts, logits = x_of(0, config, 25), experts_of(0, config), logits_of(0, config, 25)
    bias = correction_bias_of(0, config)
    expected = reference_moe(x, experts, logits, config, correction_bias=bias)
    parts = []
    for first in (0, config.num_experts // 2):
        expert_map, local = rank_of(experts, config, range(first, first + config.num_experts // 2))
        parts.append(moe(x, local, logits, config, expert_map=expert_map, correction_bias=bias))
    assert all(np.any(np.asarray(part)) for part in parts)
    check_close(sum(part.astype(jnp.float32) for part in parts), expected, 1.5 * TOLERANCE[config.dtype])
    with pytest.raises(AssertionError):
        check_close(parts[0], expected, 0.1)


def test_a_map_of_nothing_gives_zero():
    config = CONFIGS["gpt-oss"]
    x, experts, logits = x_of(0, config, 9), experts_of(0, config), logits_of(0, config, 9)
    nothing = jnp.full(config.num_experts, -1, jnp.int32)
    assert not np.any(np.asarray(moe(x, experts, logits, config, expert_map=nothing)))


def test_one_compiled_layer_serves_every_rank():
    config = CONFIGS["qwen3"]
    x, experts, logits = x_of(0, config, 9), experts_of(0, config), logits_of(0, config, 9)
    rank = quick_jit(lambda local, m: moe_jax.moe(x, local, logits, config, expert_map=m, implementation="xla"))
    for chosen in ([5, 2, 0], [1, 3, 4], [7, 6, 5]):
        expert_map, local = rank_of(experts, config, chosen)
        expected = reference_moe(x, local, logits, config, expert_map=expert_map)
        check_layer(rank(local, expert_map), expected, config)
    assert rank._cache_size() == 1


# --- a whole block


def block_of(seed, config, gate=False):
    inner = config.shared_intermediate_size
    shared = SharedExpertWeights(
        w13=normal([seed, 11], 2 * inner, config.hidden_size, dtype=config.dtype, scale=config.hidden_size**-0.5),
        w2=normal([seed, 12], config.hidden_size, inner, dtype=config.dtype, scale=max(inner, 1) ** -0.5),
        gate=normal([seed, 13], 1, config.hidden_size, dtype=config.dtype, scale=0.3) if gate else None,
    )
    return MoELayerWeights(
        experts=experts_of(seed, config),
        router=normal([seed, 14], config.num_experts, config.hidden_size, scale=0.5),
        router_bias=normal([seed, 15], config.num_experts) if config.has_router_bias else None,
        correction_bias=correction_bias_of(seed, config),
        shared=shared if inner else None,
    )


BLOCKS = {
    "plain": f32(8, 2, 32, 24),
    "router bias": f32(8, 2, 32, 24, has_router_bias=True),
    "deepseek": f32(
        16, 3, 32, 24, routing=GROUPED, has_correction_bias=True, num_shared_experts=2, shared_intermediate_size=20
    ),
    "gated shared": f32(8, 2, 32, 24, num_shared_experts=1, shared_intermediate_size=12, shared_expert_gate=True),
    "bfloat16": MoEConfig(8, 2, 32, 24, num_shared_experts=1, shared_intermediate_size=12),
}


def block_reference(x, layer, config):
    with jax.default_matmul_precision("highest"):
        logits = x.astype(jnp.float32) @ layer.router.astype(jnp.float32).T
    logits = logits if layer.router_bias is None else logits + layer.router_bias[None]
    routed = reference_moe(x, layer.experts, logits, config, correction_bias=layer.correction_bias)
    return routed if layer.shared is None else routed + reference.shared_experts(x, layer.shared, config)


@pytest.mark.parametrize("name", BLOCKS)
def test_block(name):
    config = BLOCKS[name]
    x, layer = x_of(1, config, 19), block_of(1, config, gate=config.shared_expert_gate)
    expected = block_reference(x, layer, config)
    out = moe_block(x, layer, config)
    check_layer(out, expected, config)
    assert_discriminates(lambda y: check_layer(y.astype(config.dtype), expected, config), out)
    assert moe_block(x[:0], layer, config).shape == (0, config.hidden_size)


@pytest.mark.parametrize("name", ["deepseek", "gated shared"])
def test_ranks_of_a_block_add_the_shared_expert_once(name):
    config = BLOCKS[name]
    x, layer = x_of(2, config, 11), block_of(2, config, gate=config.shared_expert_gate)
    total = jnp.zeros(x.shape)
    for rank in range(4):
        expert_map, local = rank_of(layer.experts, config, range(rank, config.num_experts, 4))
        mine = MoELayerWeights(
            local, layer.router, layer.router_bias, layer.correction_bias, layer.shared if rank == 2 else None
        )
        total = total + moe_block(x, mine, config, expert_map=expert_map)
    check_close(total, block_reference(x, layer, config), 3e-6)


def test_shared_expert_is_that_of_the_reference():
    config = BLOCKS["gated shared"]
    x, layer = x_of(3, config, 7), block_of(3, config, gate=True)
    expected = reference.shared_experts(x, layer.shared, config)
    assert_discriminates(lambda y: check_close(y, expected, 2e-6), shared_expert(x, layer.shared, config))
