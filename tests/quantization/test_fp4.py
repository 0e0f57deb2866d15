"""Four bits: every code and every boundary, NVFP4's scales of scales, the tensor cores' layout, and what checkpoints hold."""

import dataclasses

import hypothesis
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moe_jax import quantization
from moe_jax.quantization import FORMATS, fake_quantize_activations, unpack_fp4
from moe_jax.quantization.fp4 import fp4_code
from moe_jax.quantization.rounding import fp4_power, scale_to_float32
from tests.quantization import oracle
from tests.quantization.cases import SPECS, normal, quantize, value
from tests.util import assert_discriminates, check_close, without_type_checks

NVFP4, MXFP4 = FORMATS["nvfp4"].weights, FORMATS["mxfp4"].weights
STATIC = dataclasses.replace(NVFP4, static=True)
unchecked = without_type_checks("moe_jax.quantization.checkpoint_fp4")
code_of = jax.jit(lambda x: fp4_code(jnp.asarray(x)))


def signed_zeros(x) -> np.ndarray:
    """Values and the signs of zeros, to be compared."""
    x = np.asarray(x, np.float64)
    return np.stack([x, np.signbit(x)])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn"])
def test_all_bytes(dtype):
    """Both nibbles of all 256, the low one first, both zeros told apart, in every dtype that holds them exactly."""
    packed = np.arange(256, dtype=np.uint8).reshape(16, 16)
    expected = np.stack([oracle.FP4_VALUES[packed & 15], oracle.FP4_VALUES[packed >> 4]], axis=-1).reshape(16, 32)
    found = unpack_fp4(packed, dtype)
    assert found.dtype == jnp.dtype(dtype) and found.shape == (16, 32)
    np.testing.assert_array_equal(signed_zeros(found), signed_zeros(expected))
    np.testing.assert_array_equal(
        code_of(expected.astype(np.float32)), np.stack([packed & 15, packed >> 4], -1).reshape(16, 32)
    )
    ours = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_array_equal(signed_zeros(oracle.FP4_VALUES), signed_zeros(ours))


def test_the_boundaries_of_codes():
    """The thresholds one by one: (value, code at it, code just above it)."""
    table = [(0.25, 0, 1), (0.75, 2, 2), (1.25, 2, 3), (1.75, 4, 4), (2.5, 4, 5), (3.5, 6, 6), (5.0, 6, 7)]
    for boundary, at, above in table:
        b = np.float32(boundary)
        below, up = np.nextafter(b, np.float32(0)), np.nextafter(b, np.float32(9))
        assert code_of(np.float32([below, b, up])).tolist() == [above - 1 if at == above else at, at, above]
        assert code_of(-np.float32([b, up])).tolist() == [at | 8, above | 8]
    assert code_of(np.float32([6, 7, 3e38, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-45])).tolist() == [
        7,
        7,
        7,
        7,
        15,
        0,
        8,
        0,
        8,
    ]


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(x=hnp.arrays(np.float32, (64,), elements=st.floats(-8, 8, width=32)))
def test_codes_are_the_nearest(x):
    np.testing.assert_array_equal(code_of(x), oracle.fp4_codes(x))


def test_powers_that_scale_four_bits():
    """From 7 on a block is scaled by the next power: 7 is as near to 8 as to 6, and ties go to the even code."""
    below = np.nextafter(np.float32(7), np.float32(0))
    amax, power = jnp.float32([3.5, 4, 6, below, 7, 7.99]), np.float32([1, 1, 1, 1, 2, 2])
    for size in np.float32([2.0**-60, 1, 2.0**60]):
        np.testing.assert_array_equal(fp4_power(amax * size), power * size)
    tiny = jnp.float32([0, 1e-45, 2.0**-125, 2.0**-124])
    assert fp4_power(tiny).tolist() == [0, 0, 0, 2.0**-126]


def test_the_global_scale_makes_the_largest_6_times_448():
    x = normal(0, 3, 8, 32) * np.float32([1e-3, 1, 1e5])[:, None, None]
    array = quantize(x, NVFP4)
    amax = np.abs(x).max((1, 2))
    np.testing.assert_allclose(array.global_scale, amax / 2688, rtol=1e-6)
    assert np.asarray(scale_to_float32(array.scales)).max((1, 2)).tolist() == [448] * 3
    np.testing.assert_allclose(np.abs(value(array)).max((1, 2)), amax, rtol=1e-6)


def test_given_global_scales():
    """Static: scales of groups are still taken from the values, and saturate where the global scale is too small."""
    x = normal(1, 5, 32)
    given = np.float32(np.abs(x).max() / 2688)
    for factor, saturates in ((4.0, False), (2.0**-6, True)):
        array = quantization.quantize(x, STATIC, global_scale=factor * given)
        codes, scales, _ = oracle.quantize(x, STATIC, global_scale=factor * given)
        np.testing.assert_array_equal(array.codes(), codes)
        np.testing.assert_array_equal(scale_to_float32(array.scales), scales)
        assert (scales == 448).any() == saturates
    both = quantization.quantize(x, NVFP4, scales=array.scales, global_scale=array.global_scale)
    np.testing.assert_array_equal(both.values, array.values)
    assert not np.asarray(quantization.quantize(x, STATIC, global_scale=0.0).dequantize()).any()


def test_what_is_given_wrongly():
    x = normal(2, 3, 4, 32)
    for spec, options, words in (
        (STATIC, {}, "is static.*pass global_scale="),
        (NVFP4, {"scales": np.ones((3, 4, 2), np.float32)}, "scales given.*pass global_scale="),
        (MXFP4, {"global_scale": 1.0}, "no global scale.*leave global_scale None"),
        (NVFP4, {"global_scale": np.ones(4, np.float32)}, r"\(4,\), but must be \(3,\)"),
    ):
        with pytest.raises(ValueError, match=words):
            quantization.quantize(x, spec, **options)
    array = quantize(x, NVFP4)
    for changes, error, words in (
        ({"global_scale": None}, ValueError, "no global_scale, but its scales are float8_e4m3fn"),
        ({"global_scale": array.global_scale[:2]}, ValueError, r"\(2,\), but must be \(3,\)"),
        ({"global_scale": array.global_scale.astype(jnp.bfloat16)}, TypeError, "bfloat16, but must be float32"),
        ({"halves": 2}, ValueError, r"must be \(3, 2\)"),
    ):
        with pytest.raises(error, match=words):
            dataclasses.replace(array, **changes).validate()
    with pytest.raises(ValueError, match="a global_scale, but its scales are float8_e8m0fnu"):
        dataclasses.replace(quantize(x, SPECS["mxfp4"]), global_scale=array.global_scale).validate()


def test_activations_have_a_global_scale_a_token():
    """So a token does not depend on its batch; with a static one neither."""
    x = jnp.asarray(normal(3, 7, 64) * np.exp2(np.arange(-30, 40, 10, dtype=np.float32))[:, None])
    seen = np.asarray(fake_quantize_activations(x, "nvfp4_w4a4"))
    alone = np.concatenate([np.asarray(fake_quantize_activations(row[None], "nvfp4_w4a4")) for row in x])
    np.testing.assert_array_equal(seen, alone)
    for row, found in zip(x, seen, strict=True):
        np.testing.assert_array_equal(found, value(quantize(row[None], NVFP4))[0])
        check_close(found, row, 0.13)
    valid = np.arange(7) != 2
    masked = np.asarray(fake_quantize_activations(jnp.where(valid[:, None], x, jnp.nan), "nvfp4_w4a4", valid=valid))
    np.testing.assert_array_equal(masked, np.where(valid[:, None], seen, 0))
    static = fake_quantize_activations(x[:2], "nvfp4_w4a4_static", scales=0.25)
    np.testing.assert_array_equal(static, quantization.quantize(x[:2], NVFP4, global_scale=0.25).dequantize())
    check_close(fake_quantize_activations(x, "mxfp4_w4a4"), value(quantize(x, MXFP4)), 1e-7)


def test_grouped_quantize_of_valid_rows():
    """Rows of experts [E, m, k] of which each has its count, and a global scale an expert: others are not even looked at."""
    x, counts = normal(4, 3, 8, 48), np.array([5, 0, 8])
    valid = np.arange(8) < counts[:, None]
    dirty = np.where(valid[..., None], x, np.float32(np.inf))
    given = np.float32([1e-3, 1, 2e-3])
    array = quantization.quantize(dirty, NVFP4, global_scale=given, valid=valid)
    for expert, count in enumerate(counts):
        alone = quantization.quantize(x[expert, :count], NVFP4, global_scale=given[expert])
        np.testing.assert_array_equal(array.values[expert, :count], alone.values)
        np.testing.assert_array_equal(oracle.bits(array.scales)[expert, :count], oracle.bits(alone.scales))
        assert not np.asarray(array.values)[expert, count:].any()
    dynamic = quantization.quantize(dirty, NVFP4, valid=valid)
    np.testing.assert_array_equal(dynamic.global_scale[0], oracle.global_scales(x[0, :5]))
    assert float(dynamic.global_scale[1]) == 0


def test_halves_keep_their_own():
    x = normal(5, 2, 12, 32)
    x[:, 6:] *= 50
    array = quantize(x, NVFP4, halves=2)
    assert array.global_scale.shape == (2, 2)
    halves = [quantize(x[:, :6], NVFP4), quantize(x[:, 6:], NVFP4)]
    joined = quantization.join_halves(*halves).validate()
    np.testing.assert_array_equal(joined.global_scale, array.global_scale)
    np.testing.assert_array_equal(joined.dequantize(), array.dequantize())
    assert float(quantize(x, NVFP4).global_scale[0]) == array.global_scale[0].max()


@pytest.mark.parametrize("shape", [(128, 4), (256, 12), (1, 1), (130, 5), (2, 200, 9), (3, 2, 64, 7)], ids=str)
def test_the_swizzled_layout(shape):
    scales = np.random.default_rng(6).integers(1, 255, shape).astype(np.uint8)
    swizzled = np.asarray(quantization.swizzle_scales(scales))
    rows, columns = -(-shape[-2] // 128) * 128, -(-shape[-1] // 4) * 4
    assert swizzled.shape == (*shape[:-2], rows, columns)
    flat = swizzled.reshape(*shape[:-2], -1)
    for m in {0, 1, 31, 32, 63, 127, 129, 140, 255, shape[-2] - 1}:
        for c in {0, 3, 4, 5, 8, shape[-1] - 1}:
            tile = m // 128 * (columns // 4) + c // 4
            where = tile * 512 + m % 32 * 16 + m // 32 % 4 * 4 + c % 4
            if m < shape[-2] and c < shape[-1]:
                np.testing.assert_array_equal(flat[..., where], scales[..., m, c])
            elif m < rows and c < columns:
                assert not flat[..., where].any()
    np.testing.assert_array_equal(quantization.deswizzle_scales(swizzled, *shape[-2:]), scales)
    # As other libraries write it down.
    padded = np.pad(scales.reshape(-1, *shape[-2:]), ((0, 0), (0, rows - shape[-2]), (0, columns - shape[-1])))
    theirs = padded.reshape(-1, rows // 128, 4, 32, columns // 4, 4).transpose(0, 1, 4, 3, 2, 5)
    np.testing.assert_array_equal(theirs.reshape(-1), swizzled.reshape(-1))


def test_swizzled_scales_of_a_matrix():
    """Scales of both dtypes pass, and a matrix whose scales went there and back is the same."""
    for spec in (NVFP4, MXFP4):
        array = quantize(normal(7, 2, 130, 96), spec)
        there = quantization.swizzle_scales(array.scales)
        assert there.dtype == array.scales.dtype
        back = dataclasses.replace(array, scales=quantization.deswizzle_scales(there, *array.scales.shape[-2:]))
        np.testing.assert_array_equal(back.dequantize(), array.dequantize())
        unswizzled = dataclasses.replace(array, scales=there[:, :130, : array.scales.shape[-1]])
        with pytest.raises(AssertionError):
            check_close(value(unswizzled), value(array), 0.1)
    with pytest.raises(ValueError, match=r"\(2, 256, 4\), but those of 300 rows"):
        quantization.deswizzle_scales(np.zeros((2, 256, 4), np.uint8), 300, 4)


def test_modelopt_and_compressed_tensors():
    array = quantize(normal(8, 3, 12, 32), NVFP4, halves=2)
    stored = quantization.to_modelopt_nvfp4(array)
    assert {name: (part.shape, part.dtype.name) for name, part in stored.items()} == {
        "weight": ((3, 12, 16), "uint8"),
        "weight_scale": ((3, 12, 2), "float8_e4m3fn"),
        "weight_scale_2": ((3, 2), "float32"),
    }
    back = quantization.from_modelopt_nvfp4(**stored)
    assert jax.tree.structure(back) == jax.tree.structure(array)
    np.testing.assert_array_equal(back.dequantize(), array.dequantize())
    as_bytes = stored | {"weight_scale": oracle.bits(stored["weight_scale"])}
    np.testing.assert_array_equal(quantization.from_modelopt_nvfp4(**as_bytes).dequantize(), array.dequantize())

    reciprocals = quantization.to_compressed_tensors_nvfp4(array)
    np.testing.assert_allclose(
        np.float64(reciprocals["weight_global_scale"]) * np.float64(array.global_scale), 1, rtol=1e-7
    )
    other = quantization.from_compressed_tensors_nvfp4(**reciprocals)
    check_close(other.dequantize(), value(array), 2e-7)
    with pytest.raises(AssertionError):  # the two conventions are not each other's
        check_close(value(quantization.from_modelopt_nvfp4(*reciprocals.values())), value(array), 0.5)
    with pytest.raises(ValueError, match="scales has shape"):
        quantization.from_modelopt_nvfp4(stored["weight"], stored["weight_scale"][..., :1], stored["weight_scale_2"])
    with pytest.raises(TypeError, match="weight.values is int8"):
        unchecked.from_modelopt_nvfp4(
            stored["weight"].astype(jnp.int8), stored["weight_scale"], stored["weight_scale_2"]
        )


def test_gpt_oss_blocks():
    array = quantize(normal(9, 2, 6, 96), MXFP4)
    stored = quantization.to_gpt_oss(array)
    assert stored["blocks"].shape == (2, 6, 3, 16) and stored["scales"].shape == (2, 6, 3)
    assert stored["blocks"].dtype == stored["scales"].dtype == jnp.uint8
    np.testing.assert_array_equal(quantization.from_gpt_oss(**stored).dequantize(), array.dequantize())
    by_hand = oracle.FP4_VALUES[np.asarray(stored["blocks"])[1, 2, 1] & 15] * 2.0 ** (
        int(stored["scales"][1, 2, 1]) - 127
    )
    np.testing.assert_array_equal(value(array)[1, 2, 32:64:2], by_hand)
    with pytest.raises(ValueError, match="16"):
        quantization.from_gpt_oss(stored["blocks"][..., :8], stored["scales"])
    with pytest.raises(ValueError, match="K=100 must be a multiple of 32"):
        quantization.to_gpt_oss(quantize(normal(9, 6, 100), MXFP4))


def test_alphas():
    one, two = quantize(normal(10, 3, 8, 16), NVFP4), quantize(normal(10, 3, 8, 16), NVFP4, halves=2)
    scale = np.float32([0.5, 2, 3])
    np.testing.assert_array_equal(quantization.gemm_alphas(one, scale), np.asarray(one.global_scale) * scale)
    np.testing.assert_array_equal(quantization.gemm_alphas(two, scale), np.asarray(two.global_scale) * scale[:, None])
    np.testing.assert_array_equal(quantization.gemm_alphas(two, 0.5), np.asarray(two.global_scale) / 2)
    with pytest.raises(ValueError, match="no global scale"):
        quantization.gemm_alphas(quantize(normal(10, 3, 8, 32), MXFP4), 1.0)


@pytest.mark.parametrize("damage", ["nibbles", "scales", "global"])
@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_damage_is_seen(name, damage):
    """Nibbles the other way round, scales moved by one group, the global scale of another expert."""
    x = normal(11, 2, 16, 96) * np.float32([1, 1.5])[:, None, None]
    array, bound = quantize(x, FORMATS[name].weights), {"nvfp4": 0.1, "mxfp4": 0.12}[name]
    assert_discriminates(lambda out: check_close(out, x, bound), value(array))
    if damage == "global" and array.global_scale is None:
        pytest.skip("MXFP4 has none")
    damaged = {
        "nibbles": lambda: dataclasses.replace(array, values=array.values >> 4 | array.values << 4),
        "scales": lambda: dataclasses.replace(array, scales=jnp.roll(array.scales, 1, axis=-1)),
        "global": lambda: dataclasses.replace(array, global_scale=array.global_scale[::-1]),
    }[damage]()
    with pytest.raises(AssertionError):
        check_close(value(damaged), x, bound)
