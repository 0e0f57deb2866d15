"""Every bit of the steps that devices are free to round differently."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from moe_jax.quantization import rounding
from tests.quantization import oracle
from tests.quantization.cases import normal

reciprocal = jax.jit(rounding.reciprocal)
to_fp8 = jax.jit(rounding.to_fp8)
round_trip = jax.jit(lambda x: rounding.to_fp8(x).astype(jnp.float32))


def f32_bits(array) -> np.ndarray:
    return np.asarray(array, np.float32).view(np.uint32)


def any_floats(seed, count) -> np.ndarray:
    """Uniform over bit patterns: every exponent, NaN, infinities, subnormals."""
    return np.random.default_rng(seed).integers(0, 2**32, count, np.uint32).view(np.float32)


def test_reciprocals_are_correctly_rounded():
    powers = np.ldexp(np.float32(1), np.arange(-126, 127))
    special = np.float32([0.0, -0.0, np.inf, -np.inf, 2.0**126, 2.0**127, 1e-45, 1e-38])
    x = np.concatenate([any_floats(0, 400_000), special, powers, np.nextafter(powers[1:], np.float32(0))])
    expected, actual = oracle.reciprocal(x), np.asarray(reciprocal(x))
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(actual), nan)
    expected = np.where(expected == 0, 0, expected)  # zeros have no sign here
    np.testing.assert_array_equal(f32_bits(np.where(nan, 0, actual)), f32_bits(np.where(nan, 0, expected)))


@pytest.mark.once
def test_reciprocals_of_all_mantissas():
    """The answer for a mantissa does not depend on the exponent."""
    for first in range(0, 2**23, 2**21):
        x = (np.arange(first, first + 2**21, dtype=np.uint32) + 0x3F800000).view(np.float32)
        np.testing.assert_array_equal(f32_bits(reciprocal(x)), f32_bits(oracle.reciprocal(x)))


def test_an_inexact_division_is_corrected(monkeypatch):
    """On devices whose division is off by some units in the last place the reciprocal is not."""
    x = np.abs(any_floats(1, 50_000))
    x = x[(x > 1e-37) & (x < 1e37)]
    exact = rounding._from_bits

    for ulps in (-3, 3):
        # The approximation is 1 / mantissa as a float in [1, 2): spoil that operand of the division alone.
        def spoiled(bits, ulps=ulps):
            value = exact(bits)
            return jnp.where((value >= 1) & (value < 2), value * np.float32(1 + ulps * 2.0**-23), value)

        monkeypatch.setattr(rounding, "_from_bits", spoiled)
        divided = 1.0 / np.asarray(spoiled(jnp.asarray([0x3FABCDEF], jnp.int32)))
        assert divided != 1.0 / np.asarray(exact(jnp.asarray([0x3FABCDEF], jnp.int32))), "nothing was spoiled"
        actual = np.asarray(rounding.reciprocal(jnp.asarray(x)))
        outside = ~((actual >= 1) & (actual < 2))  # results in [1, 2) went through the spoiled function too
        np.testing.assert_array_equal(f32_bits(actual)[outside], f32_bits(oracle.reciprocal(x))[outside])


def test_all_codes_of_fp8_are_kept():
    codes = np.arange(256, dtype=np.uint8)
    values = oracle.FP8_VALUES.astype(np.float32)
    np.testing.assert_array_equal(values, codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32))
    kept = np.where(np.isnan(values), 0x7F, codes)
    np.testing.assert_array_equal(oracle.bits(to_fp8(values)), kept)


def test_ties_neighbours_and_saturation_of_fp8():
    positive = oracle.FP8_VALUES[:127]
    ties = ((positive[1:] + positive[:-1]) / 2).astype(np.float32)
    x = np.concatenate([ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(1e9))])
    x = np.concatenate([x, [448, 463, 464, 465, 480, 1e30, np.inf, np.nan, 0, 2.0**-10, 2.0**-11]]).astype(np.float32)
    x = np.concatenate([x, -x])
    np.testing.assert_array_equal(oracle.bits(to_fp8(x)), oracle.fp8_codes(x))


def test_any_float_as_fp8_and_agreement_with_ml_dtypes():
    x = np.concatenate([any_floats(2, 100_000), 50 * normal(3, 100_000)])
    codes = oracle.bits(to_fp8(x))
    np.testing.assert_array_equal(codes, oracle.fp8_codes(x))
    inside = np.abs(x) <= 448
    np.testing.assert_array_equal(codes[inside], oracle.bits(x[inside].astype(ml_dtypes.float8_e4m3fn)))


def test_a_round_trip_in_one_jit_rounds():
    """A compiler that may keep excess precision does not get to leave the conversions out."""
    x = normal(4, 1000)
    np.testing.assert_array_equal(round_trip(x), oracle.FP8_VALUES[oracle.fp8_codes(x)].astype(np.float32))


def test_powers_of_two_are_rounded_up():
    powers = (2.0 ** np.arange(-126, 127)).astype(np.float32)
    for x, expected in (
        (powers, powers),
        (np.nextafter(powers, np.float32(np.inf)), 2 * powers),
        (np.nextafter(powers[1:], np.float32(0)), powers[1:]),
    ):
        stored = rounding.to_e8m0(jnp.asarray(x))
        assert stored.dtype == jnp.float8_e8m0fnu
        np.testing.assert_array_equal(rounding.scale_to_float32(stored), expected)


def test_special_scales():
    x = jnp.asarray([np.nan, np.inf, 3.4e38, 0.0], jnp.float32)
    stored = rounding.to_e8m0(x)
    np.testing.assert_array_equal(np.asarray(stored).view(np.uint8), [0xFF, 0xFF, 0xFF, 0])
    np.testing.assert_array_equal(rounding.scale_to_float32(stored), np.float32([np.nan, np.nan, np.nan, 0]))
    subnormal = jnp.asarray([1e-40, -1e-40, 1e-37], jnp.float32)
    np.testing.assert_array_equal(rounding.scale_to_float32(subnormal), np.float32([0, 0, 1e-37]))


def test_all_codes_of_e8m0():
    codes = np.arange(256, dtype=np.uint8)
    expected = np.ldexp(np.float64(1), codes.astype(int) - 127)
    expected[0], expected[255] = 0, np.nan  # 2^-127 is no normal float32
    stored = jax.lax.bitcast_convert_type(jnp.asarray(codes), jnp.float8_e8m0fnu)
    np.testing.assert_array_equal(rounding.scale_to_float32(stored), expected.astype(np.float32))


@pytest.mark.parametrize("k", [-20, 0, 20])
def test_the_largest_fp8_value_gives_a_power_of_two(k):
    """amax = 448 * 2^k must give the scale 2^k, not the next power after it."""
    scale = np.float32(448 * 2.0**k) * (np.float32(1) / np.float32(448))
    assert scale == 2.0**k
