"""Quantized layers over a mesh: weights split with their scales, tokens quantized before or after they travel."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import MoEConfig, moe, quantize_experts
from moe_jax.parallel import ParallelConfig
from moe_jax.parallel.all_to_all import AllToAll
from moe_jax.parallel.gather_scatter import AllGatherReduceScatter
from moe_jax.parallel.no_exchange import NoExchange
from moe_jax.parallel.weights import place_experts
from moe_jax.quantization import dequantize_experts
from tests.layers import experts_of, logits_of, quick_jit, x_of
from tests.parallel.meshes import mesh_of, parallel_of, sharded
from tests.util import check_close

SPLITS = [("fp8_block", 2), ("fp8_block", 4), ("fp8_block_ue8m0", 4), ("fp8_tensor", 2), ("fp8_channel", 4)]
SPLITS += [("int4_group32", 2), ("int4_group64_zp", 4), ("int8_weight", 2)]
SPLITS += [("nvfp4", 4), ("mxfp4", 2), ("nvfp4_fp8", 4)]

# 320 are two and a half blocks of 128.
CONFIG = MoEConfig(5, 2, 128, 320)


def problem(name, num_tokens=16):
    config = dataclasses.replace(CONFIG, quantization=name)
    experts = quantize_experts(experts_of(0, CONFIG), name)
    activations = config.quantization.activations
    if activations is not None and activations.static:
        scales = [0.02 + 0.002 * jnp.arange(5.0), 0.02 + 0.003 * jnp.arange(5.0)]
        experts = dataclasses.replace(experts, w13_input_scale=scales[0], w2_input_scale=scales[1])
    return config, (x_of(0, config, num_tokens), experts, logits_of(0, config, num_tokens))


@functools.cache
def expected(name):
    config, operands = problem(name)
    return np.asarray(quick_jit(functools.partial(moe, implementation="xla"), static_argnums=3)(*operands, config))


@pytest.mark.parametrize("name, parts", SPLITS)
def test_the_parts_of_an_expert_stand_for_what_it_stands_for(name, parts):
    config, (_, experts, _) = problem(name)
    place = functools.partial(place_experts, config=config, parallel=ParallelConfig(tp_size=parts))
    placed = quick_jit(place)(experts)
    whole = dequantize_experts(experts, "float32")
    share = placed.w2.shape[-1]
    for weights in (placed.w13, placed.w2):
        weights.validate()
    ranks = dequantize_experts(placed, "float32")
    gate, up = jnp.split(ranks.w13.reshape(parts, 5, 2, share, 128), 2, axis=2)
    for half, rows in zip((gate, up), jnp.split(whole.w13, 2, axis=1), strict=True):
        joined = half[:, :, 0].transpose(1, 0, 2, 3).reshape(5, -1, 128)
        np.testing.assert_array_equal(joined[:, :320], rows)
        assert not np.asarray(joined[:, 320:]).any()
    joined = ranks.w2.reshape(parts, 5, 128, share).transpose(1, 2, 0, 3).reshape(5, 128, -1)
    np.testing.assert_array_equal(joined[..., :320], whole.w2)
    assert not np.asarray(joined[..., 320:]).any()


# One scale for all rows, or for a whole row of the hidden layer, is another one where ranks see other rows or parts of rows.
LOOSE = {
    ("fp8_tensor", "ep"): 8e-2,
    ("fp8_tensor", "tp"): 8e-2,
    ("fp8_channel", "tp"): 5e-2,
    ("int8_channel", "tp"): 2e-2,
}


# Every pair of two of the three occurs.
@pytest.mark.parametrize(
    "name, before, ep",
    [
        (name, before, "ep" if before == (number % 2 == 0) else "tp")
        for number, name in enumerate(["fp8_block", "fp8_channel", "fp8_tensor", "fp8_tensor_static", "int8_channel"])
        for before in (False, True)
    ],
)
def test_quantized_before_and_after_all_gather(name, before, ep):
    config, operands = problem(name)
    mesh = mesh_of(tp=2, dp=2)
    parallel = parallel_of(mesh, ep == "ep")
    exchange = AllGatherReduceScatter(quantize_before=before)
    out = sharded(mesh, parallel, config, exchange=exchange)(*operands)
    check_close(out, expected(name), LOOSE.get((name, ep), 1e-2))


@pytest.mark.parametrize("name", ["fp8_block", "fp8_channel", "int8_channel", "fp8_block_ue8m0", "int8_channel_static"])
def test_quantized_before_all_to_all(name):
    config, operands = problem(name)
    mesh = mesh_of(tp=2, dp=2)
    out = sharded(mesh, parallel_of(mesh, True), config, exchange=AllToAll(quantize_before=True))(*operands)
    check_close(out, expected(name), 1e-2)


def test_ranks_without_experts_quantize_their_tokens_too():
    """Five experts on eight ranks; the scale of all is that of the experts, wherever they are."""
    config, operands = problem("fp8_tensor_static")
    mesh = mesh_of(dp=8)
    layer = sharded(mesh, parallel_of(mesh, True), config, exchange=AllToAll(quantize_before=True))
    check_close(layer(*operands), expected("fp8_tensor_static"), 1e-2)


@pytest.mark.parametrize("name", ["int4_group32_zp", "int8_weight", "fp8_weight_block", "nvfp4", "mxfp4", "nvfp4_fp8"])
def test_weights_alone(name):
    config, operands = problem(name)
    mesh = mesh_of(tp=4)
    check_close(sharded(mesh, parallel_of(mesh, False), config)(*operands), expected(name), 1e-2)


def test_quantizing_before_and_after_agree_bit_for_bit():
    """Codes and scales of a token do not depend on where it is quantized."""
    config, operands = problem("fp8_block")
    mesh = mesh_of(tp=1, dp=4)
    for exchange in (AllGatherReduceScatter, AllToAll):
        out = [
            sharded(mesh, parallel_of(mesh, True), config, exchange=exchange(quantize_before=b))(*operands)
            for b in (False, True)
        ]
        np.testing.assert_array_equal(*out)


def test_what_travels():
    """Codes as bytes and a scale a token; one scale for all stays where it is."""
    mesh = mesh_of(tp=1, dp=2)
    parallel = parallel_of(mesh, True)
    for name, scales in (("fp8_channel", True), ("fp8_tensor_static", False)):
        config, operands = problem(name)
        exchange = AllGatherReduceScatter(quantize_before=True)
        layer = sharded(mesh, parallel, config, exchange=exchange, compiled=False)
        gathers = re.findall(r":(\w+\[[\d,]+\]) = all_gather\[", str(jax.make_jaxpr(layer)(*operands)))
        assert sorted(gathers) == sorted(["u8[16,128]", "i32[16,2]", "f32[16,2]"] + ["f32[16,1]"] * scales)


def test_errors():
    mesh = mesh_of(tp=2)
    for name in (None, "int8_weight"):
        config, (x, experts, logits) = problem(name or "int8_weight")
        if name is None:
            config, experts = CONFIG, dequantize_experts(experts)
        with pytest.raises(ValueError, match="quantize_before=True needs a number format that quantizes activations"):
            sharded(mesh, parallel_of(mesh, True), config, exchange=NoExchange(quantize_before=True))(
                x, experts, logits
            )
