"""Four-bit weights in the order of a kernel: what they stand for, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.quantization import (
    QuantizedArray,
    Spec,
    prepare,
    prepare_experts,
    quant_format,
    quantize,
    quantize_experts,
)
from moe_jax.quantization.prepared_layout import Layout, unprepared
from moe_jax.types import ExpertWeights
from tests.layers import normal
from tests.util import check_close

NVFP4, MXFP4 = (quant_format(name).weights for name in ("nvfp4", "mxfp4"))
DTYPES = ("bfloat16", "float16")
LAYOUTS = [Layout(spec, dtype) for spec in (NVFP4, Spec("int4", "group", 32)) for dtype in DTYPES]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.spec.dtype} {layout.dtype}")
def test_every_bit_of_a_word_has_one_place(layout):
    taken = 0
    for term in (term for terms in layout.places for term in terms):
        both = term.mask * 0x10001
        stored = (both >> term.left | both << (32 - term.left)) & 0xFFFFFFFF
        assert taken & stored == 0
        taken |= stored
    assert taken == 0xFFFFFFFF


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_nothing_is_lost(name, halves, dtype):
    weights = quantize(normal(1, 3, 96, 320, scale=0.02), quant_format(name).weights, halves=halves)
    prepared = prepare(weights, dtype)
    assert prepared.shape == weights.shape and prepared.ndim == 3 and len(prepared) == 3
    assert np.array_equal(prepared.dequantize(), weights.dequantize())
    assert np.array_equal(prepared[1].dequantize(), weights[1].dequantize())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["int4_group32", "int4_group64_zp", "int4_group128", "int4_group32_zp"])
def test_int4_scales_are_rounded(name, dtype):
    weights = quantize(normal(1, 2, 64, 320, scale=0.02), quant_format(name).weights)
    rounded = QuantizedArray(
        weights.values,
        weights.scales.astype(dtype).astype(jnp.float32),
        weights.zero_points,
        spec=weights.spec,
    )
    assert np.array_equal(prepare(weights, dtype).dequantize(), rounded.dequantize())
    check_close(prepare(weights, dtype).dequantize(), weights.dequantize(), 2.5e-3)


def every_scale(spec):
    """Weights of one row a scale, with each of 256 bytes as its scale; all codes in each row."""
    size = spec.block[1]
    codes = np.tile(np.arange(16, dtype=np.uint8), (256, 64 // 16))
    values = jnp.asarray(codes[:, 0::2] | codes[:, 1::2] << 4)[None]
    scales = jnp.repeat(jnp.arange(256, dtype=jnp.uint8)[:, None], 64 // size, axis=1)
    more = dict(global_scale=jnp.float32([0.5])) if spec.has_global_scale else {}
    return QuantizedArray(values, scales.view(jnp.dtype(spec.scale_dtype))[None], spec=spec, **more)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_nvfp4_scale(dtype):
    weights = every_scale(NVFP4)
    found, right = np.asarray(prepare(weights, dtype).dequantize()), np.asarray(weights.dequantize())
    assert np.array_equal(found, right, equal_nan=True)
    assert np.isnan(right).any(axis=(0, 2)).sum() == 2


@pytest.mark.parametrize(("dtype", "kept"), [("bfloat16", 126), ("float16", 24)])
def test_mxfp4_scales_are_relative_to_the_largest(dtype, kept):
    weights = every_scale(MXFP4)
    scales = weights.scales.view(jnp.uint8)
    low = QuantizedArray(weights.values[:, :200], weights.scales[:, :200], spec=MXFP4)  # the largest is 2**72
    found, right = np.asarray(prepare(low, dtype).dequantize()), np.array(low.dequantize())
    right[:, : 200 - kept] = 0.0
    assert int(scales[0, 199, 0]) == 199
    assert np.array_equal(found, right)


def test_experts_one_by_one():
    experts = ExpertWeights(normal(1, 3, 64, 64), normal(2, 3, 64, 32))
    quantized = quantize_experts(experts, "nvfp4")
    prepared = prepare_experts(quantized)
    assert np.array_equal(prepared.w13.values, prepare(quantized.w13).values)
    assert np.array_equal(prepared.w2.dequantize(), quantized.w2.dequantize())
    assert prepare(prepared.w2) is not None
    whole = jax.jit(prepare_experts)(quantized)
    assert np.array_equal(whole.w13.values, prepared.w13.values)
    plain = prepare_experts(quantize_experts(experts, "fp8_tensor"))
    assert plain.w13.dtype.name == "float8_e4m3fn"


def test_errors():
    assert "in groups" in unprepared(Spec("int8", "channel"), "bfloat16")
    assert "float32" in unprepared(NVFP4, "float32")
    assert "(1, 96)" in unprepared(Spec("int4", "group", 96), "bfloat16")
    assert "16 columns" in unprepared(Spec("float4_e2m1fn", "group", 32, "float8_e4m3fn"), "bfloat16")
    weights = quantize(jnp.ones((1, 64, 64)), NVFP4)
    prepared = prepare(weights)
    with pytest.raises(ValueError, match="original ones"):
        prepare(prepared, "float16")
    with pytest.raises(ValueError, match="before prepare"):
        _ = prepared.blocks
    with pytest.raises(ValueError, match="dequantize"):
        prepared.codes()
    with pytest.raises(ValueError, match="in groups"):
        prepare(quantize(jnp.ones((1, 64, 64)), Spec("int8", "channel")))
