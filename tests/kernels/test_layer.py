"""The whole layer: its kernels one after the other in the interpreter, and lowered for CUDA to Mosaic calls and nothing else."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import MoEConfig, RoutingConfig, apply_experts, moe, reference
from moe_jax.types import ExpertWeights, TopK
from tests.layers import (
    check_layer,
    check_unit_rms,
    correction_bias_of,
    experts_of,
    logits_of,
    rank_of,
    reference_moe,
    topk_of,
    x_of,
)
from tests.lowering import MOSAIC, assert_is_not_mosaic_alone, like, lower, num_kernels, operations
from tests.util import assert_discriminates, check_close

interpreted = functools.partial(moe, implementation="mosaic_interpret")
GROUPED = RoutingConfig("deepseek_v3", 4, 2, routed_scaling_factor=2.5)
LLAMA4 = RoutingConfig("llama4")
CONFIGS = {
    "qwen3": MoEConfig(8, 2, 80, 48),
    "gpt-oss": MoEConfig(4, 4, 48, 80, activation="swigluoai", has_bias=True, dtype="float16"),  # every expert
    "llama4": MoEConfig(4, 1, 144, 16, "relu2_no_mul", routing=LLAMA4, apply_router_weight_on_input=True),
    "deepseek": MoEConfig(8, 3, 64, 64, routing=GROUPED, has_correction_bias=True),
}


@pytest.mark.parametrize(("name", "num_tokens"), [("qwen3", 19), ("deepseek", 19), ("gpt-oss", 11), ("llama4", 11)])
def test_layer(name, num_tokens):
    """Up to 16 tokens every tile holds all of them; 19 are gathered, or fetched where H is a multiple of 64."""
    config = CONFIGS[name]
    operands = x_of(0, config, num_tokens), experts_of(0, config), logits_of(0, config, num_tokens), config
    bias = correction_bias_of(0, config)
    expected = reference_moe(*operands, correction_bias=bias)
    out = interpreted(*operands, correction_bias=bias)
    check_layer(out, expected, config)
    check_unit_rms(expected)
    assert_discriminates(lambda y: check_layer(y.astype(config.dtype), expected, config), out)


def test_no_tokens():
    config = CONFIGS["qwen3"]
    out = interpreted(x_of(0, config, 0), experts_of(0, config), logits_of(0, config, 0), config)
    assert out.shape == (0, 80) and out.dtype == jnp.bfloat16


@pytest.mark.once
def test_ranks_of_a_split():
    """Two ranks, one of which owns the experts in another order; logits that are not finite; jit."""
    config = CONFIGS["qwen3"]
    x, experts = x_of(1, config, 9), experts_of(1, config)
    logits = np.array(logits_of(1, config, 9))
    logits[2], logits[5, :7], logits[6, 1] = np.nan, -np.inf, np.inf
    logits = jnp.asarray(logits)
    expected, total = reference_moe(x, experts, logits, config), 0
    rank = jax.jit(interpreted, static_argnums=3)
    for chosen in ([6, 1, 3, 4], [0, 2, 5, 7]):
        expert_map, local = rank_of(experts, config, chosen)
        part = rank(x, local, logits, config, expert_map=expert_map)
        check_layer(part, reference_moe(x, local, logits, config, expert_map=expert_map), config)
        total = total + part.astype(jnp.float32)
    check_close(total, expected, 6e-3)
    assert not np.asarray(total)[2].any()


@pytest.mark.once
def test_slots_without_an_expert_and_tokens_that_are_not_finite():
    config = CONFIGS["qwen3"]
    experts, topk = experts_of(2, config), topk_of(2, config, 9)
    bad = np.arange(9) == 4
    x = jnp.where(bad[:, None], jnp.nan, x_of(2, config, 9))
    empty = np.zeros((9, 2), bool)
    empty[0], empty[3, 1] = True, True
    ids = jnp.where(empty, -1, topk.ids)
    nan_there = TopK(ids, jnp.where(empty, jnp.nan, topk.weights))
    out = apply_experts(x, experts, nan_there, config, implementation="mosaic_interpret")
    expected = reference.apply_experts(x_of(2, config, 9), experts, TopK(ids, topk.weights), config)
    assert np.isnan(np.asarray(out, np.float32)[bad]).all()
    assert not np.asarray(out, np.float32)[0].any()
    check_close(np.asarray(out)[~bad], np.asarray(expected)[~bad], 6e-3)


@pytest.mark.once
def test_two_runs_give_the_same_bits_and_so_does_a_token_alone():
    config = dataclasses.replace(CONFIGS["qwen3"], num_experts=4)
    x, experts, logits = x_of(3, config, 18), experts_of(3, config), logits_of(3, config, 18)
    layer = jax.jit(interpreted, static_argnums=3)
    first = layer(x, experts, logits, config)
    np.testing.assert_array_equal(layer(x, experts, logits, config), first)
    np.testing.assert_array_equal(layer(x[17:], experts, logits[17:], config)[0], first[17])


#           E    k    H     I
SHAPES = {
    "mixtral-8x7b": (8, 2, 4096, 14336),
    "qwen3-30b-a3b": (128, 8, 2048, 768),
    "qwen3-235b": (128, 8, 4096, 1536),
    "dsv3": (256, 8, 7168, 2048),
    "gpt-oss-120b": (128, 4, 2880, 2880),
    "odd-sizes": (16, 4, 1040, 528),
    "one expert a token": (32, 1, 1024, 512),
    "fetched with a bias": (4, 2, 256, 128),
}
FIELDS = {
    "dsv3": dict(routing=RoutingConfig("deepseek_v3", 8, 4, routed_scaling_factor=2.5), has_correction_bias=True),
    "gpt-oss-120b": dict(activation="swigluoai", has_bias=True),
    "fetched with a bias": dict(has_bias=True),  # all the shared memory that there is
}


def abstract_layer(config, num_tokens, num_local=None):
    local, dtype = num_local or config.num_experts, config.dtype
    hidden, inner, rows = config.hidden_size, config.intermediate_size, config.w13_rows
    experts = ExpertWeights(
        w13=like(dtype, local, rows, hidden),
        w2=like(dtype, local, hidden, inner),
        w13_bias=like(dtype, local, rows) if config.has_bias else None,
        w2_bias=like(dtype, local, hidden) if config.has_bias else None,
    )
    return like(dtype, num_tokens, hidden), experts, like("float32", num_tokens, config.num_experts)


TOKENS = {
    "qwen3-30b-a3b": (1, 16384),
    "qwen3-235b": (128,),
    "gpt-oss-120b": (1, 1000),
    "odd-sizes": (9, 16),
    "fetched with a bias": (200,),
}


@pytest.mark.parametrize(
    ("name", "num_tokens"), [(name, tokens) for name in SHAPES for tokens in TOKENS.get(name, (1000,))]
)
def test_lowers_for_cuda_to_mosaic_alone(name, num_tokens):
    config = MoEConfig(*SHAPES[name], **FIELDS.get(name, {}))
    layer = functools.partial(moe, config=config, implementation="mosaic")
    if config.has_correction_bias:  # a rank of 8
        operands = abstract_layer(config, num_tokens, config.num_experts // 8)
        maps = like("int32", config.num_experts), like("float32", config.num_experts)
        text = lower(lambda x, e, g, m, b: layer(x, e, g, expert_map=m, correction_bias=b), *operands, *maps)
    else:
        text = lower(layer, *abstract_layer(config, num_tokens))
    # Routing, grouping, gather, up, down, combine. Up-projections of small experts fetch their rows themselves. A few tokens
    # are all in every tile: no gather, and no grouping either; the last two are one for a token that spreads well.
    gathers = name not in ("qwen3-30b-a3b", "qwen3-235b", "fetched with a bias")
    together = num_tokens == 1 and name != "gpt-oss-120b"
    assert num_kernels(text) == (4 - together if num_tokens <= 16 else 5 + gathers)


def test_layers_of_one_shape_are_lowered_once():
    """All but their routing, two kernels: a model of many layers would else be lowered for minutes."""
    config = MoEConfig(*SHAPES["one expert a token"])
    operands, layer = abstract_layer(config, 100), functools.partial(moe, config=config, implementation="mosaic")

    def kernels(function):
        found = operations(lower(function, *operands))
        return sum(count for name, count in found.items() if MOSAIC.fullmatch(name))

    def loss(layers, x, experts, logits):
        for _ in range(layers):
            x = layer(x, experts, logits)
        return jnp.sum(x.astype(jnp.float32))

    one, three = (functools.partial(loss, layers) for layers in (1, 3))
    assert kernels(one) == 5 and kernels(three) == 5 + 2 * 2
    of_one, of_three = (kernels(jax.grad(function, (0, 1, 2))) for function in (one, three))
    assert of_one > 5 and of_three - of_one < of_one


def test_the_router_weight_on_the_input_is_one_more_kernel():
    config = MoEConfig(16, 1, 512, 256, routing=RoutingConfig("llama4"), apply_router_weight_on_input=True)
    layer = functools.partial(moe, config=config, implementation="mosaic")
    assert num_kernels(lower(layer, *abstract_layer(config, 100))) == 6


def test_the_check_for_mosaic_alone_can_fail():
    config = MoEConfig(8, 2, 64, 32)
    operands = abstract_layer(config, 16)
    layer = functools.partial(moe, config=config, implementation="mosaic")
    assert_is_not_mosaic_alone(functools.partial(moe, config=config, implementation="xla"), *operands)
    assert_is_not_mosaic_alone(lambda x, e, g: layer(x, e, g) + x, *operands)
    assert_is_not_mosaic_alone(lambda x, e, g: layer(x, e, jnp.broadcast_to(g[:1], g.shape)), *operands)
