"""Layers of quantized experts in plain JAX and in the interpreter, against float32 on what the codes stand for."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import MoEConfig, RoutingConfig, apply_experts, moe, quantize_experts
from moe_jax.ops import implementation as impl
from moe_jax.parallel.tokens import quantize as quantize_tokens
from moe_jax.quantization import FORMATS, QuantFormat, Spec, dequantize_experts, reference
from moe_jax.routing import route
from moe_jax.types import TopK
from tests.layers import experts_of, logits_of, plain, quick_jit, rank_of, reference_moe, x_of
from tests.lowering import MOSAIC, lower, operations
from tests.util import assert_discriminates, check_close

CONFIG = MoEConfig(4, 2, 128, 64)


def problem(name, config=CONFIG, num_tokens=19, seed=0):
    """Config, hidden states, quantized weights, logits and, for a static format, the scales of activations."""
    config = dataclasses.replace(config, quantization=name)
    experts = quantize_experts(experts_of(seed, config), name)
    given = None
    if config.quantization.activations is not None and config.quantization.activations.static:
        reach = config.quantization.activations.reach
        given = jnp.float32(0.02 * 448 / reach), jnp.float32(0.01 * 448 / reach)
        of_experts = [jnp.full(config.num_experts, scale) for scale in given]
        experts = dataclasses.replace(experts, w13_input_scale=of_experts[0], w2_input_scale=of_experts[1])
    return config, x_of(seed, config, num_tokens), experts, logits_of(seed, config, num_tokens), given


layer = plain(moe)


@functools.partial(quick_jit, static_argnums=0)
def expected(config, x, experts, logits, given, expert_map=None):
    topk = route(logits, config)
    return reference.apply_experts(
        x, experts, topk, config, config.quantization, input_scales=given, expert_map=expert_map
    )


@pytest.mark.parametrize("name", FORMATS)
def test_every_format(name):
    config, x, experts, logits, given = problem(name)
    out = layer(x, experts, logits, config)
    right = expected(config, x, experts, logits, given)
    assert out.dtype == x.dtype
    check_close(out, right, 1e-2)
    assert_discriminates(lambda y: check_close(y, right, 1e-2), out)
    whole = reference_moe(x, experts_of(0, config), logits, dataclasses.replace(config, quantization=None))
    check_close(out, whole, 0.5 if "int4" in name or "fp4" in name or given else 0.08)


@pytest.mark.parametrize(
    "name", ["fp8_block", "fp8_tensor", "fp8_tensor_static", "int8_channel", "int4_group32_zp", "nvfp4_w4a4"]
)
def test_ranks_of_a_split_add_up(name):
    """NaN in tokens of other ranks reaches no scale."""
    config, x, experts, logits, given = problem(name)
    total = 0
    for chosen in ([3, 1], [0, 2]):
        expert_map, local = rank_of(experts, config, chosen)
        part = layer(x, local, logits, config, expert_map=expert_map)
        check_close(part, expected(config, x, local, logits, given, expert_map=expert_map), 1e-2)
        total = total + part.astype(jnp.float32)
    check_close(total, expected(config, x, experts, logits, given), 3e-2)


WEIGHTS_OF_FOUR_BITS = ["nvfp4", "mxfp4", "mxfp8_weight"]


@pytest.mark.parametrize("name", WEIGHTS_OF_FOUR_BITS)
def test_weights_alone_are_what_they_stand_for(name):
    """A layer of the dequantized weights in float32: what is left is the rounding of hidden rows. Sizes all differ."""
    config = MoEConfig(5, 2, 160, 96, activation="swigluoai", has_bias=True, quantization=name)
    experts, x, logits = quantize_experts(experts_of(1, config), name), x_of(1, config, 23), logits_of(1, config, 23)
    right = reference_moe(
        x, dequantize_experts(experts, "float32"), logits, dataclasses.replace(config, quantization=None)
    )
    out = layer(x, experts, logits, config)
    check_close(out, right, 6e-3)
    assert_discriminates(lambda y: check_close(y, right, 6e-3), out)
    for damage in (
        lambda w: dataclasses.replace(w, scales=jnp.roll(w.scales, 1, axis=2)),
        lambda w: dataclasses.replace(w, values=jnp.roll(w.values, 1, axis=2)),
        lambda w: dataclasses.replace(w, global_scale=w.global_scale[::-1]) if name == "nvfp4" else w[::-1],
    ):
        damaged = dataclasses.replace(experts, w13=damage(experts.w13))
        with pytest.raises(AssertionError):
            check_close(layer(x, damaged, logits, config), right, 6e-3)


A_SCALE_A_TOKEN = QuantFormat("nvfp4_fp8_token", FORMATS["nvfp4"].weights, Spec("float8_e4m3fn", "token"))


@pytest.mark.parametrize("name", [pytest.param(A_SCALE_A_TOKEN, id="nvfp4_fp8_token"), "mxfp8"])
def test_codes_times_fine_groups_run_around_the_kernels_too(name, monkeypatch):
    """Where kernels run, rows and weights are dequantized and multiplied by that of 16-bit floats, and it is said."""
    config, x, experts, logits, given = problem(name, MoEConfig(4, 2, 128, 128))
    said = []
    monkeypatch.setattr(impl, "platform_reason", lambda platform=None: None)
    monkeypatch.setattr(impl, "_warn_once", lambda op, reason: said.append(reason))
    calls = operations(lower(functools.partial(moe, config=config), x, experts, logits))
    assert any("rows are dequantized before" in reason for reason in said)
    assert sum(count for name, count in calls.items() if MOSAIC.fullmatch(name)) >= 4, calls


def test_emulated_activations_do_not_travel_as_codes():
    config, x, _, logits, _ = problem("mxfp4_w4a4")
    with pytest.raises(ValueError, match="'mxfp4_w4a4' emulates them.*leave it False"):
        quantize_tokens(x, route(logits, config), config, (), None, "xla")


def test_rows_of_no_expert_reach_no_scale():
    config, x, experts, logits, _ = problem("fp8_tensor")
    topk = route(logits, config)
    ids = topk.ids.at[4].set(-1)
    clean = apply_experts(x, experts, TopK(ids, topk.weights), config)
    for value in (jnp.nan, 1e4):
        out = apply_experts(x.at[4].set(value), experts, TopK(ids, topk.weights), config)
        np.testing.assert_array_equal(out, clean)
    assert not np.asarray(clean)[4].any()


def test_router_weight_on_the_input_is_applied_before_quantizing():
    config = MoEConfig(4, 1, 128, 128, routing=RoutingConfig("llama4"), apply_router_weight_on_input=True)
    config, x, experts, logits, given = problem("fp8_channel", config)
    check_close(layer(x, experts, logits, config), expected(config, x, experts, logits, given), 1e-2)


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_few_tokens(num_tokens):
    config, x, experts, logits, given = problem("fp8_block", num_tokens=num_tokens)
    out = layer(x, experts, logits, config)
    assert out.shape == (num_tokens, 128)
    if num_tokens:
        check_close(out, expected(config, x, experts, logits, given), 1e-2)


def test_sizes_that_the_block_does_not_divide():
    config = MoEConfig(4, 2, 192, 80, activation="swigluoai", has_bias=True)
    config, x, experts, logits, given = problem("fp8_block", config)
    check_close(layer(x, experts, logits, config), expected(config, x, experts, logits, given), 1e-2)


def test_it_is_a_pytree_that_jit_and_scan_take():
    config, x, experts, logits, _ = problem("int8_block")
    once = layer(x, experts, logits, config)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), experts)
    scan = quick_jit(lambda x: jax.lax.scan(lambda x, weights: (moe(x, weights, logits, config), None), x, stacked)[0])
    np.testing.assert_array_equal(scan(x), layer(once, experts, logits, config))


def test_format_and_weights_must_agree():
    config, x, experts, logits, _ = problem("fp8_block")
    with pytest.raises(TypeError, match="quantization"):
        moe(x, experts, logits, dataclasses.replace(config, quantization=None))
    with pytest.raises(TypeError, match="quantize_experts"):
        moe(x, experts_of(0, config), logits, config)
    with pytest.raises(TypeError, match="fp8_channel"):
        moe(x, experts, logits, dataclasses.replace(config, quantization="fp8_channel"))
    static, x, experts, logits, _ = problem("fp8_tensor_static")
    with pytest.raises(ValueError, match="w13_input_scale"):
        moe(x, dataclasses.replace(experts, w13_input_scale=None), logits, static)
