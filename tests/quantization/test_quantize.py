"""Codes, scales and zero points against the NumPy oracle, bit by bit, for every granularity, and at every edge."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moe_jax import quantization
from moe_jax.quantization import Spec, fake_quantize_activations, merge_half_scales
from moe_jax.quantization.rounding import scale_to_float32
from tests.quantization import oracle
from tests.quantization.cases import SPECS, dequantize, normal, quantize

INTEGERS = [name for name, spec in SPECS.items() if not spec.is_float]
FLOATS = [name for name in SPECS if name not in INTEGERS]


def check_bits(array, x, spec, **options) -> None:
    """One matrix against the oracle: every bit that is stored, and what it stands for."""
    codes, scales, zeros = oracle.quantize(np.asarray(x, np.float32), spec, **options)
    array.validate()
    assert array.shape == x.shape
    np.testing.assert_array_equal(scale_to_float32(array.scales), scales)
    np.testing.assert_array_equal(oracle.bits(array.codes()), codes)
    if spec.asymmetric:
        np.testing.assert_array_equal(array.zero_points, zeros)
    halves, unit = options.get("halves", 1), options.get("global_scale")
    if spec.has_global_scale:
        valid = options.get("valid", np.ones(len(x), bool))
        seen = np.where(valid[:, None], np.asarray(x, np.float32), np.float32(0))
        unit = oracle.global_scales(seen, halves) if unit is None else unit
        np.testing.assert_array_equal(array.global_scale, unit)
    with np.errstate(over="ignore", invalid="ignore"):  # what is infinite, and NaN
        expected = oracle.dequantize(codes, scales, zeros, spec, halves, unit).astype(np.float32)
    np.testing.assert_array_equal(dequantize(array), expected)


# What compiles is compiled once: most tests share a shape, which no block divides.
SHAPE = ROWS, COLUMNS = 13, 37
# A few of the specs, where all of them would show no more: each kind of code, of scale and of grid once.
SOME = ["fp8 tensor", "fp8 block ue8m0", "int8 channel", "int4 group zp", "nvfp4"]


def of_sizes(seed, *shape) -> np.ndarray:
    """Rows of several magnitudes."""
    return normal(seed, *shape) * np.exp2(np.random.default_rng(seed).integers(-6, 7, (shape[0], 1))).astype(np.float32)


@pytest.mark.parametrize("name", SPECS)
def test_every_bit(name):
    x = of_sizes(1, *SHAPE)
    check_bits(quantize(x, SPECS[name]), x, SPECS[name])


@pytest.mark.parametrize("name", ["fp8 block", "int4 group zp"])
def test_whole_blocks(name):
    x = of_sizes(2, 16, 32)
    check_bits(quantize(x, SPECS[name]), x, SPECS[name])


@pytest.mark.parametrize("name", [*SOME, "int8 block"])
def test_halves_share_no_scale(name):
    """Halves of 13 rows, which blocks of 8 do not divide: the second half begins with a block of its own."""
    x, spec = normal(3, 2 * ROWS, COLUMNS), SPECS[name]
    x[ROWS:] *= 100
    array = quantize(x, spec, halves=2)
    check_bits(array, x, spec, halves=2)
    gate, up = (quantize(half, spec) for half in np.split(x, 2))
    np.testing.assert_array_equal(
        oracle.bits(array.codes()), np.concatenate([oracle.bits(gate.codes()), oracle.bits(up.codes())])
    )


@pytest.mark.parametrize(("name", "dtype"), list(zip(SOME, [*2 * ["bfloat16", "float16"], "bfloat16"], strict=True)))
def test_stacks_and_other_dtypes(name, dtype):
    x = jnp.asarray(normal(4, 2, 3, 10, 18), dtype)
    array = quantize(x, SPECS[name])
    for i in range(2):
        for j in range(3):
            check_bits(jax.tree.map(lambda leaf: leaf[i, j], array), x[i, j], SPECS[name])


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("shape", [(0, 37), (13, 0)], ids=str)
def test_nothing_at_all(name, shape):
    spec = SPECS[name]
    array = quantize(np.zeros(shape, np.float32), spec).validate()
    assert array.shape == shape and dequantize(array).shape == shape
    assert np.isfinite(np.asarray(scale_to_float32(array.scales))).all()
    np.testing.assert_array_equal(scale_to_float32(array.scales), oracle.quantize(np.zeros(shape), spec)[1])


@pytest.mark.parametrize("name", SPECS)
def test_zero_blocks_and_tiny_values_give_zero(name):
    x = normal(5, *SHAPE)
    x[8:, 16:] = 0
    x[4] = 0
    x[5] = 1e-39
    x[6] = -1e-30
    check_bits(quantize(x, SPECS[name]), x, SPECS[name])
    for value in (0.0, -0.0, 1e-44, -1e-40):
        nothing = quantize(np.full(SHAPE, value, np.float32), SPECS[name])
        assert not np.asarray(dequantize(nothing)).any()


@pytest.mark.parametrize("name", SPECS)
def test_infinities_saturate(name):
    x = normal(6, *SHAPE)
    x[2, 3], x[12, 20] = np.inf, -np.inf  # in blocks of their own, except for a tensor
    array = quantize(x, SPECS[name])
    check_bits(array, x, SPECS[name])
    capped = quantize(np.clip(x, -oracle.F32_MAX, oracle.F32_MAX), SPECS[name])
    np.testing.assert_array_equal(scale_to_float32(array.scales), scale_to_float32(capped.scales))
    finite = np.isfinite(x)
    np.testing.assert_array_equal(oracle.bits(array.codes())[finite], oracle.bits(capped.codes())[finite])
    back = np.asarray(dequantize(array))
    assert not np.isnan(back).any() and back[2, 3] > 3e38 and back[12, 20] < -3e38


@pytest.mark.parametrize("name", FLOATS)
def test_a_nan_stays_alone_in_fp8(name):
    x = normal(7, *SHAPE)
    x[3, 5], x[9, 30] = np.nan, -np.nan
    array = quantize(x, SPECS[name])
    check_bits(array, x, SPECS[name])
    np.testing.assert_array_equal(np.isnan(dequantize(array)), np.isnan(x))
    without = quantize(np.nan_to_num(x, nan=0.0), SPECS[name])
    np.testing.assert_array_equal(scale_to_float32(array.scales), scale_to_float32(without.scales))


@pytest.mark.parametrize("name", INTEGERS)
def test_a_nan_spoils_what_shares_its_scale_in_integers(name):
    spec = SPECS[name]
    x = normal(8, *SHAPE)
    x[3, 5] = np.nan
    array = quantize(x, spec)
    check_bits(array, x, spec)
    spoiled = np.zeros(x.shape, bool)
    for _, rows, columns in oracle.pieces_of(spec, *x.shape):
        spoiled[rows, columns] = np.isnan(x[rows, columns]).any()
    np.testing.assert_array_equal(np.isnan(dequantize(array)), spoiled)


@pytest.mark.parametrize("name", [*SOME, "fp8 group", "int8 tensor"])
def test_invalid_rows_are_zero_and_seen_by_nobody(name):
    spec = SPECS[name]
    x = normal(9, *SHAPE)
    valid = np.random.default_rng(10).random(ROWS) > 0.4
    dirty = np.where(valid[:, None], x, np.float32(np.nan))
    dirty[~valid, ::2] = np.inf
    array = quantize(dirty, spec, valid=valid)
    check_bits(array, dirty, spec, valid=valid)
    clean = quantize(np.where(valid[:, None], x, np.float32(0)), spec)
    for leaf, expected in zip(jax.tree.leaves(array), jax.tree.leaves(clean), strict=True):
        np.testing.assert_array_equal(oracle.bits(leaf), oracle.bits(expected))
    back = np.asarray(dequantize(array))
    assert (back[~valid] == 0).all() and (back[valid] != 0).any()
    nobody = quantize(dirty, spec, valid=np.zeros(ROWS, bool))
    assert not np.asarray(dequantize(nobody)).any() and np.isfinite(np.asarray(scale_to_float32(nobody.scales))).all()


def test_rows_without_an_expert_do_not_change_a_tensor_scale():
    """Positions of -1 are rows of no expert: whatever lies there, the other rows have the scale that they have alone."""
    positions = np.array([0, -1, 2, 3, -1])
    rows = normal(11, 5, 8)
    alone = quantize(rows[positions >= 0], SPECS["fp8 tensor"])
    rows[positions < 0] = [[1e6], [np.nan]]
    array = quantize(rows, SPECS["fp8 tensor"], valid=positions >= 0)
    assert array.scales == alone.scales
    np.testing.assert_array_equal(oracle.bits(array.values)[positions >= 0], oracle.bits(alone.values))
    assert quantize(rows[:2], SPECS["fp8 tensor"]).scales != alone.scales, "the rows would have made a difference"


STATIC = {
    "fp8 tensor": 0.01,
    "fp8 token": np.float32(2.0) ** np.arange(-8, 8),
    "fp8 group ue8m0": np.full((16, 2), 0.02, np.float32),
    "int8 tensor": np.float32(0.02),
    "int8 block": np.full((2, 2), 0.3, np.float32),
    "int4 group": np.full((16, 2), 0.1, np.float32),
}


@pytest.mark.parametrize("name", STATIC)
def test_given_scales_are_used_and_saturate(name):
    spec = Spec(SPECS[name].dtype, SPECS[name].granularity, SPECS[name].block, SPECS[name].scale_dtype, static=True)
    x = 20 * normal(12, 16, 32)
    x[0, :3] = [np.inf, -np.inf, 0]
    array = quantize(x, spec, scales=STATIC[name])
    expected = np.asarray(STATIC[name], np.float32)
    check_bits(array, x, spec, scales=expected)
    assert np.isfinite(np.asarray(dequantize(array))).all()
    with pytest.raises(ValueError, match="static.*pass scales=, or use a spec with static=False"):
        quantize(x, spec)


@pytest.mark.parametrize("name", ["fp8 token", "int8 channel", "int4 channel"])
def test_given_scales_that_are_zero_or_too_small_give_zero(name):
    x = normal(13, 4, 6)
    x[:, 0] = np.inf
    scales = np.float32([0, 1e-39, 1, 1])
    array = quantize(x, SPECS[name], scales=scales)
    check_bits(array, x, SPECS[name], scales=np.where(scales < 1e-37, np.float32(0), scales))
    assert not np.asarray(dequantize(array))[:2].any()


def test_scales_that_are_given_wrongly():
    x = normal(14, 16, 32)
    with pytest.raises(ValueError, match=r"\(3,\), but must be \(16,\).*'token'"):
        quantization.quantize(x, SPECS["fp8 token"], scales=np.ones(3, np.float32))
    with pytest.raises(ValueError, match="zero points"):
        quantization.quantize(x, SPECS["int4 group zp"], scales=np.ones((16, 2), np.float32))
    with pytest.raises(ValueError, match="13 rows have no two equal halves"):
        quantization.quantize(x[:13], SPECS["fp8 tensor"], halves=2)
    with pytest.raises(ValueError, match="halves=3"):
        quantization.quantize(x, SPECS["fp8 tensor"], halves=3)


@pytest.mark.parametrize("name", ["fp8 token", "int8 channel"])
def test_elements_are_multiplied_by_the_reciprocal_not_divided(name):
    """Rows of an amax and an element beside a tie, where x * (1 / scale) and x / scale are rounded to different codes."""
    spec, random = SPECS[name], np.random.default_rng(20)
    amax = random.uniform(1, 2, 4000).astype(np.float32)
    scale = amax * (np.float32(1) / np.float32(spec.largest))
    tie = random.integers(8, 16, 4000) * 2 + 1 if spec.is_float else random.integers(0, 126, 4000) + 0.5
    x = (tie * scale).astype(np.float32)
    rows = np.stack([amax, x], axis=1)
    divided = x / scale
    divided = oracle.fp8_codes(divided) if spec.is_float else np.rint(divided).astype(np.int8)
    codes = oracle.quantize(rows, spec)[0][:, 1]
    assert (codes != divided).mean() > 0.05, "the rows do not tell the two apart"
    check_bits(quantize(rows, spec), rows, spec)


@pytest.mark.parametrize("name", ["fp8 block ue8m0", "int4 group zp"])
def test_alone_and_within_a_larger_function(name):
    """The same bits when XLA optimizes as it likes, and fuses what comes before and after."""
    x, spec = normal(15, *SHAPE), SPECS[name]
    check_bits(quantization.quantize(x, spec), x, spec)

    @jax.jit
    def around(x):
        array = quantization.quantize(x * 2.0, spec)
        return array, array.dequantize() * 0.5

    array, back = around(x)
    check_bits(array, 2 * x, spec)
    np.testing.assert_array_equal(back, 0.5 * np.asarray(array.dequantize()))


@pytest.mark.parametrize("name", SPECS)
@hypothesis.settings(max_examples=8, deadline=None)
@hypothesis.given(x=hnp.arrays(np.float32, SHAPE, elements=st.floats(width=32)))
def test_any_matrix(name, x):
    check_bits(quantize(x, SPECS[name]), x, SPECS[name])


@pytest.mark.parametrize("name", SPECS)
@hypothesis.settings(max_examples=8, deadline=None)
@hypothesis.given(x=hnp.arrays(np.float32, SHAPE, elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False)))
def test_no_element_is_further_off_than_half_a_step(name, x):
    """Half a code's distance, seen from the code; FP8 steps grow with the value."""
    spec = SPECS[name]
    array = quantize(x, spec)
    scale = np.zeros(x.shape)
    for index, rows, columns in oracle.pieces_of(spec, *x.shape):
        scale[rows, columns] = np.asarray(scale_to_float32(array.scales))[index]
    unit = 1.0 if array.global_scale is None else np.float64(array.global_scale)
    scale *= unit
    error = np.abs(np.asarray(dequantize(array), np.float64) - x)
    step = scale
    if spec.is_float:
        grid = jnp.finfo(spec.dtype)
        step = np.maximum(np.abs(x) * 2.0**-grid.nmant, scale * float(grid.smallest_subnormal))
    elif spec.dtype == "float4_e2m1fn":
        step = np.maximum(np.abs(x) / 2, scale / 2)
    # A scale that is not normal is zero, and so are its elements. Those of FP8 have a floor far above.
    lost = 0 if spec.is_float else (spec.largest - spec.smallest) * np.finfo(np.float32).tiny
    if spec.has_global_scale:  # a scale far below the largest is itself rounded to a step of e4m3, or to zero
        lost += 3 * 2.0**-9 * unit
    # A zero point is rounded too: another half step where the range ends.
    assert (error <= (1.0 if spec.asymmetric else 0.5) * step * (1 + 1e-5) + lost).all()


@pytest.mark.parametrize("name", [name for name, spec in SPECS.items() if not spec.asymmetric])
def test_quantizing_again_changes_nothing(name):
    """Except with zero points: one that clips an end of the range moves it."""
    array = quantize(normal(16, *SHAPE), SPECS[name])
    again = quantize(dequantize(array), SPECS[name])
    np.testing.assert_allclose(dequantize(again), dequantize(array), rtol=1e-6)


@pytest.mark.parametrize("name", ["fp8 tensor", "int8 tensor"])
def test_merged_halves_have_the_larger_scale(name):
    x = normal(17, 3, 16, 32)
    x[1, 8:] *= 7  # of one expert the up rows are larger, of the others gate rows are
    x[::2, :8] *= 3
    array = quantize(x, SPECS[name], halves=2)
    merged = merge_half_scales(array).validate()
    np.testing.assert_array_equal(merged.scales, np.max(array.scales, axis=1))
    assert merged.shape == x.shape and merged.halves == 1
    for expert, larger in enumerate([slice(0, 8), slice(8, 16), slice(0, 8)]):
        smaller = slice(8, 16) if larger.start == 0 else slice(0, 8)
        np.testing.assert_array_equal(
            oracle.bits(merged.values)[expert, larger], oracle.bits(array.values)[expert, larger]
        )
        codes = oracle.quantize(dequantize(array)[expert], SPECS[name], scales=merged.scales[expert])[0]
        np.testing.assert_array_equal(oracle.bits(merged.values)[expert, smaller], codes[smaller])
    assert merge_half_scales(merged) is merged
    with pytest.raises(ValueError, match="nothing to merge"):
        merge_half_scales(quantize(x, SPECS["fp8 channel"], halves=2))


def test_fake_quantized_activations():
    x = jnp.asarray(normal(18, 6, 256), "bfloat16")
    seen = fake_quantize_activations(x, "fp8_block")
    assert seen.dtype == x.dtype
    expected = quantize(x, Spec("float8_e4m3fn", "group", 128)).dequantize("bfloat16")
    np.testing.assert_array_equal(np.asarray(seen, np.float32), np.asarray(expected, np.float32))
    assert (seen != x).any()
    valid = np.array([True, False, True, True, True, True])
    assert fake_quantize_activations(x, "int4_group32") is x
    assert not fake_quantize_activations(x, "int4_group32", valid=valid)[1].any()
    assert not fake_quantize_activations(x, "fp8_tensor", valid=valid)[1].any()
    static = fake_quantize_activations(x, "fp8_tensor_static", scales=2.0**-4)
    np.testing.assert_array_equal(np.asarray(static, np.float32)[0, 0], np.float32(quantize_one(x[0, 0])))


def quantize_one(value) -> float:
    return oracle.FP8_VALUES[oracle.fp8_codes(np.float32([value]) * 16)][0] / 16


def test_dequantize_takes_plain_arrays_too():
    x = normal(19, 3, 4)
    assert quantization.dequantize(x, "bfloat16").dtype == jnp.bfloat16
    np.testing.assert_array_equal(quantization.dequantize(x), x)
