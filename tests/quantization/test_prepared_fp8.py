"""Four-bit floats as FP8: what is rounded and what is not, and the same bits from the order of a kernel."""

import dataclasses

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.quantization import (
    PreparedFp8,
    QuantizedArray,
    fp8_blocks,
    prepare,
    prepare_experts,
    quant_format,
    quantize,
    quantize_experts,
)
from moe_jax.quantization.fp4 import FP4_VALUES
from moe_jax.quantization.prepared_fp8 import prepare_fp8
from moe_jax.types import ExpertWeights
from tests.layers import normal
from tests.util import check_close

NVFP4, MXFP4 = (quant_format(name).weights for name in ("nvfp4", "mxfp4"))


def stored(spec, codes, scale_bytes, *, halves=1):
    """A matrix of these codes and bytes of scales, and a global scale of its own for each half."""
    packed = codes[..., ::2] | codes[..., 1::2] << 4
    scales = jnp.asarray(scale_bytes).view(spec.scale_dtype)
    shape = codes.shape[:-2] + (() if halves == 1 else (halves,))
    more = {"global_scale": jnp.full(shape, 0.375, jnp.float32)} if spec.has_global_scale else {}
    return QuantizedArray(jnp.asarray(packed), scales, spec=spec, halves=halves, **more).validate()


def bits(array):
    return np.asarray(array.values).view(np.uint8)


def assert_same(weights):
    """Both ways to FP8: by rounding, and by the bytes that a kernel adds up."""
    right, found = fp8_blocks(weights).validate(), fp8_blocks(prepare(weights, "float8_e4m3fn"))
    nan = np.isnan(np.asarray(right.values, np.float32))
    np.testing.assert_array_equal(np.isnan(np.asarray(found.values, np.float32)), nan)
    np.testing.assert_array_equal(np.where(nan, 0, bits(found)), np.where(nan, 0, bits(right)))
    np.testing.assert_array_equal(found.scales, right.scales)
    return right


def every_scale():
    """A row for each byte of an NVFP4 scale, each code in each of its groups; a block of positive ones, one of negative ones."""
    codes = np.tile(np.arange(16, dtype=np.uint8), (1, 256, 8))
    return stored(NVFP4, codes, np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 8, axis=2))


def test_products_have_four_significant_bits():
    weights = every_scale()
    found = np.asarray(assert_same(weights).dequantize())[0]
    scales = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)[:, None]
    exact = scales * np.tile(FP4_VALUES, 8)
    inside = (np.abs(scales) >= 2.0**-2) & np.isfinite(scales)  # 2**10 below that of the largest, 448
    nearest = (exact / 8).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * 8
    np.testing.assert_array_equal(found[inside[:, 0]], nearest[inside[:, 0]] * np.float32(0.375))
    assert np.isnan(found[[127, 255]]).all()
    below = ~inside[:, 0] & np.isfinite(scales[:, 0])
    assert (np.abs(found[below] / 0.375 - exact[below]) <= 2.0**-10 * 256).all() and not found[0].any()
    # The fraction of a scale says which products are rounded.
    off = np.abs(nearest / np.where(exact == 0, 1, exact) - 1).reshape(256, 8, 16)[96:104, 0, 1:8]
    assert (off[[0, 2, 4]] == 0).all() and (off[:, [0, 1, 3, 5]] == 0).all()
    assert (off[[1, 3, 5, 6, 7]][:, [2, 4, 6]] > 0).all() and off.max() < 0.05


def test_powers_of_two_are_exact_until_far_below_the_largest():
    codes = np.tile(np.arange(16, dtype=np.uint8), (1, 16, 8))
    exponents = np.arange(127, 111, -1, dtype=np.uint8)  # a row each, from 1 down
    weights = stored(MXFP4, codes, np.repeat(exponents[None, :, None], 4, axis=2))
    found, right = np.asarray(assert_same(weights).dequantize())[0], np.asarray(weights.dequantize())[0]
    np.testing.assert_array_equal(found[:11], right[:11])
    assert (found[11:] != right[11:]).any(axis=1).all()
    assert (np.abs(found[11:] - right[11:]) <= 2.0**-12).all()


@pytest.mark.parametrize("byte", [0, 254, 255])
def test_the_ends_of_powers_of_two(byte):
    """The least counts as zero, as everywhere; the largest has a factor that is a float; NaN makes NaN."""
    scales = np.full((1, 2, 4), 100, np.uint8)
    scales[0, 1] = byte
    weights = stored(MXFP4, np.full((1, 2, 128), 3, np.uint8), scales)
    found = np.asarray(assert_same(weights).dequantize())[0, :, 0]
    if byte == 254:
        np.testing.assert_array_equal(found, [0.0, 1.5 * 2.0**127])
    else:
        np.testing.assert_array_equal(found, [1.5 * 2.0**-27, {0: 0.0, 255: np.nan}[byte]])


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**32 - 1), st.sampled_from([NVFP4, MXFP4]), st.integers(0, 64))
def test_any_codes_and_scales(seed, spec, spread):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, (2, 140, 160), np.uint8)
    at = rng.integers(0, 255 - spread)
    scales = rng.integers(at, at + spread + 1, (2, 140, 160 // spec.block[1])).astype(np.uint8)
    assert_same(stored(spec, codes, scales, halves=2))


@pytest.mark.parametrize(("name", "error"), [("nvfp4", 0.0225), ("mxfp4", 0.0)])
def test_what_rounding_costs(name, error):
    weights = quantize(normal(1, 2, 256, 320, scale=0.02), quant_format(name).weights, halves=2)
    found, right = (np.asarray(array.dequantize(), np.float64) for array in (assert_same(weights), weights))
    assert np.linalg.norm(found - right) / np.linalg.norm(right) == pytest.approx(error, abs=1e-3)


def test_experts_are_prepared_for_their_format():
    experts = ExpertWeights(w13=normal(1, 3, 2 * 96, 128), w2=normal(2, 3, 128, 96))
    quantized = quantize_experts(experts, "nvfp4_fp8")
    prepared = prepare_experts(quantized, quant_format("nvfp4_fp8").dtype_of_rows("bfloat16"))
    assert isinstance(prepared.w13, PreparedFp8) and prepared.w13.shape == (3, 192, 128)
    for mine, given_ in ((prepared.w13, quantized.w13), (prepared.w2, quantized.w2)):
        np.testing.assert_array_equal(bits(fp8_blocks(mine)), bits(fp8_blocks(given_)))
        np.testing.assert_array_equal(mine[1].dequantize("bfloat16"), fp8_blocks(given_[1]).dequantize("bfloat16"))
    assert prepare_fp8(prepared.w2) is not None and prepare(prepared.w2, "float8_e4m3fn").shape == (3, 128, 96)
    check_close(prepared.w13.dequantize(), quantized.w13.dequantize(), 0.03)


def test_what_does_not_become_fp8():
    int4 = quantize(jnp.ones((1, 64, 128)), quant_format("int4_group128").weights)
    with pytest.raises(ValueError, match="int4.*do not become FP8"):
        fp8_blocks(int4)
    nvfp4 = quantize(jnp.ones((1, 64, 128)), NVFP4)
    for other in (lambda w: prepare(w, "float8_e4m3fn"), fp8_blocks):
        with pytest.raises(ValueError, match="prepared for rows of bfloat16 do not become FP8"):
            other(prepare(nvfp4))
    with pytest.raises(ValueError, match="prepared for rows of float8_e4m3fn, not bfloat16"):
        prepare(prepare(nvfp4, "float8_e4m3fn"))
    with pytest.raises(ValueError, match="cannot be split"):
        _ = dataclasses.replace(prepare(nvfp4, "float8_e4m3fn")).blocks
