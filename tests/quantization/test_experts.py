"""Whole experts: one at a time, from NumPy, in a jit; and the float32 oracle of a quantized layer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import reference
from moe_jax.config import MoEConfig
from moe_jax.quantization import (
    QuantizedArray,
    dequantize_experts,
    fake_quantize_activations,
    merge_half_scales,
    quant_format,
    quantize_experts,
)
from moe_jax.quantization import experts as experts_module
from moe_jax.quantization.reference import apply_experts
from moe_jax.types import ExpertWeights, TopK
from tests.layers import check_unit_rms, experts_of, rank_of, topk_of, x_of
from tests.quantization import oracle
from tests.quantization.cases import quantize
from tests.util import assert_discriminates, check_close, relative_error

CONFIG = MoEConfig(num_experts=6, top_k=2, hidden_size=40, intermediate_size=24, has_bias=True)
UNGATED = MoEConfig(num_experts=6, top_k=2, hidden_size=40, intermediate_size=24, activation="relu2_no_mul")
EXPERTS = experts_of(0, CONFIG)


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("name", ["int4_group32_zp"])
def test_one_at_a_time_is_all_at_once(name):
    spec = quant_format(name).weights
    quantized = quantize_experts(EXPERTS, name)
    assert quantized.w13_bias is EXPERTS.w13_bias and quantized.w2_bias is EXPERTS.w2_bias
    assert_same(quantized.w13, quantize(EXPERTS.w13, spec, halves=2))
    assert_same(quantized.w2, quantize(EXPERTS.w2, spec))
    assert_same(jax.jit(functools.partial(quantize_experts, format=name))(EXPERTS), quantized)
    back = dequantize_experts(quantized)
    assert back.w13.dtype == back.w2.dtype == jnp.bfloat16
    assert_same(back.w13, quantized.w13.dequantize("bfloat16"))
    assert_same(dequantize_experts(quantized, "float32").w2, quantized.w2.dequantize())


def test_weights_in_files_come_one_expert_at_a_time(tmp_path, monkeypatch):
    path = tmp_path / "w13.npy"
    np.save(path, np.asarray(EXPERTS.w13, np.float32))
    w13 = np.load(path, mmap_mode="r")
    seen = []
    store = experts_module._store_quantized
    monkeypatch.setattr(
        experts_module, "_store_quantized", lambda r, e, w, **k: (seen.append(w.shape), store(r, e, w, **k))[1]
    )
    quantized = quantize_experts(ExpertWeights(w13, np.asarray(EXPERTS.w2, np.float32)), "fp8_block")
    assert_same(quantized.w13, quantize(w13, quant_format("fp8_block").weights, halves=2))
    on_device = [shape for shape in seen if shape in (EXPERTS.w13.shape, EXPERTS.w2.shape)]
    assert len(on_device) == 2, "whole stacks are seen by eval_shape alone"
    assert seen.count(EXPERTS.w13.shape[1:]) == seen.count(EXPERTS.w2.shape[1:]) == 6


def test_ungated_experts_have_one_half():
    assert quantize_experts(experts_of(1, UNGATED), "fp8_tensor").w13.scales.shape == (6,)
    gated = quantize_experts(EXPERTS, "fp8_tensor").w13
    assert gated.scales.shape == (6, 2) and merge_half_scales(gated).scales.shape == (6,)


def test_input_scales_stay_until_nothing_is_quantized():
    scale = jnp.arange(6, dtype=jnp.float32)
    scaled = dataclasses.replace(EXPERTS, w13_input_scale=scale, w2_input_scale=2 * scale)
    quantized = quantize_experts(scaled, "fp8_tensor")
    assert quantized.w13_input_scale is scale and quantized.w2_input_scale is scaled.w2_input_scale
    back = dequantize_experts(quantized)
    assert back.w13_input_scale is None and back.w2_input_scale is None


def test_no_experts_at_all():
    none = jax.tree.map(lambda leaf: leaf[:0], EXPERTS)
    quantized = quantize_experts(none, "int4_group32")
    assert quantized.w13.shape == (0, 48, 40) and dequantize_experts(quantized).w2.shape == (0, 40, 24)


def test_progress(capsys):
    quantize_experts(EXPERTS, "fp8_tensor", progress=True)
    out, err = capsys.readouterr()
    assert out == "" and "quantizing experts" in err and "100%" in err


def test_refused():
    quantized = quantize_experts(EXPERTS, "fp8_tensor")
    with pytest.raises(TypeError, match="w13 is quantized already.*dequantize_experts"):
        quantize_experts(quantized, "fp8_block")
    with pytest.raises(ValueError, match="47 rows for 24 columns"):
        quantize_experts(ExpertWeights(EXPERTS.w13[:, :47], EXPERTS.w2), "fp8_block")
    with pytest.raises(ValueError, match="'fp4' is not one of"):
        quantize_experts(EXPERTS, "fp4")


X, TOPK = x_of(2, CONFIG, 17), topk_of(3, CONFIG, 17)
PLAIN = reference.apply_experts(X, EXPERTS, TOPK, CONFIG)
# Relative error of a layer with weights and activations quantized: about sqrt(number of roundings) times that of one.
LAYER_ERRORS = {"fp8_tensor": 0.07, "int8_channel": 0.02}


def test_a_layer_that_is_not_quantized_is_the_reference():
    check_unit_rms(PLAIN)
    check_close(apply_experts(X, EXPERTS, TOPK, CONFIG), PLAIN, 3e-3)  # hidden rows are rounded to bfloat16


@pytest.mark.parametrize("name", LAYER_ERRORS)
def test_the_error_of_a_layer(name):
    quantized = quantize_experts(EXPERTS, name)
    out = apply_experts(X, quantized, TOPK, CONFIG, name)
    error = relative_error(out, PLAIN)
    assert 0.4 * LAYER_ERRORS[name] < error < LAYER_ERRORS[name], error
    assert_discriminates(lambda y: check_close(y, PLAIN, LAYER_ERRORS[name]), out)


def test_static_scales_that_are_those_of_the_rows():
    quantized = quantize_experts(EXPERTS, "fp8_tensor")
    dynamic = apply_experts(X, quantized, TOPK, CONFIG, "fp8_tensor")
    scale = float(np.abs(np.asarray(X, np.float32)).max()) / 448
    static = apply_experts(X, quantized, TOPK, CONFIG, "fp8_tensor_static", input_scales=(scale, 0.02))
    assert 0 < relative_error(static, dynamic) < 0.04
    coarse = apply_experts(X, quantized, TOPK, CONFIG, "fp8_tensor_static", input_scales=(1e-3 * scale, 0.02))
    assert relative_error(coarse, dynamic) > 0.5, "scales that saturate are used as they are"


def test_pairs_without_an_expert_are_in_no_scale():
    """Tokens that visit no local expert may hold anything: not a bit of the others' output changes."""
    ids = np.array(TOPK.ids)
    ids[[2, 5]] = -1
    topk = TopK(jnp.asarray(ids), TOPK.weights)
    quantized = quantize_experts(EXPERTS, "fp8_tensor")
    clean = apply_experts(X, quantized, topk, CONFIG, "fp8_tensor")
    dirty = apply_experts(X.at[2].set(1e4).at[5].set(jnp.nan), quantized, topk, CONFIG, "fp8_tensor")
    np.testing.assert_array_equal(dirty, clean)
    assert not np.asarray(clean)[[2, 5]].any()


def test_partial_sums_over_ranks_are_the_whole():
    """With scales that rows do not share, the experts of a rank see the rows that they see in the whole layer."""
    name = "int8_channel"
    whole = apply_experts(X, quantize_experts(EXPERTS, name), TOPK, CONFIG, name)
    total = 0
    for mine in ([4, 1], [0, 2], [3, 5]):
        expert_map, local = rank_of(EXPERTS, CONFIG, mine)
        total += apply_experts(X, quantize_experts(local, name), TOPK, CONFIG, name, expert_map=expert_map)
    check_close(total, whole, 1e-6)


def test_router_weights_on_the_input_come_before_quantizing():
    config = MoEConfig(6, 1, 40, 24, activation="relu2_no_mul", apply_router_weight_on_input=True, dtype="float32")
    experts, x, topk = experts_of(4, config), x_of(5, config, 7), topk_of(6, config, 7)
    quantized = quantize_experts(experts, "fp8_tensor")
    weighted = fake_quantize_activations(x * topk.weights, "fp8_tensor")
    rows = []
    for row, expert in zip(np.asarray(weighted), np.asarray(topk.ids)[:, 0], strict=True):
        rows.append(np.maximum(row @ np.asarray(quantized.w13[expert].dequantize()).T, 0) ** 2)
    hidden = np.asarray(fake_quantize_activations(jnp.asarray(np.stack(rows)), "fp8_tensor"))
    w2 = np.asarray(quantized.w2.dequantize())
    expected = np.stack([w2[e] @ row for row, e in zip(hidden, np.asarray(topk.ids)[:, 0], strict=True)])
    check_close(apply_experts(x, quantized, topk, config, "fp8_tensor"), expected, 1e-5)


def test_no_tokens():
    none = TopK(jnp.zeros((0, 2), jnp.int32), jnp.zeros((0, 2)))
    out = apply_experts(X[:0], quantize_experts(EXPERTS, "fp8_tensor"), none, CONFIG, "fp8_tensor")
    assert out.shape == (0, 40)


def test_quantized_weights_are_a_pytree_of_experts():
    quantized = quantize_experts(EXPERTS, "fp8_block")
    mine = jax.tree.map(lambda leaf: leaf[2:4], quantized)
    assert isinstance(mine.w13, QuantizedArray) and mine.num_local_experts == 2
    np.testing.assert_array_equal(oracle.bits(mine.w13.values), oracle.bits(quantized.w13[2:4].values))
