"""Gather and quantize in its plain-JAX form."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.gather_quantize import gather_quantize, supports
from moe_jax.quantization import FORMATS, Spec
from moe_jax.quantization.rows import QuantizedRows
from tests.layers import normal, quick_jit
from tests.quantized_rows import SPECS, check_discriminates, check_quantized_rows, hard_rows, places_of
from tests.util import without_type_checks

_run = quick_jit(functools.partial(gather_quantize, implementation="xla"), static_argnums=2)


def check(x, positions, spec, **options):
    result = _run(x, positions, spec, **options)
    assert isinstance(result, QuantizedRows)
    check_quantized_rows(result, x, positions, spec, **options)
    return result


@pytest.mark.parametrize("name", SPECS)
def test_every_bit(name):
    x, places = hard_rows(0, 21, 144, "bfloat16"), places_of(0, 21, 3)
    check(x, places, SPECS[name])


@pytest.mark.parametrize("name", ["fp8 group", "int8 token"])
def test_the_check_can_fail(name):
    x, places = normal(1, 9, 144), places_of(1, 9, 2)
    result = _run(x, places, SPECS[name])
    check_discriminates(lambda found: check_quantized_rows(found, x, places, SPECS[name]), result)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_dtypes_and_weights(dtype):
    x, places, weights = hard_rows(2, 12, 40, dtype), places_of(2, 12, 2), jnp.abs(normal(2, 12, 1))
    check(x, places, SPECS["fp8 token"], weights=weights)


def test_a_weight_makes_float16_subnormal():
    check(normal(6, 8, 256, dtype="float16"), None, SPECS["fp8 group ue8m0"], weights=jnp.full((8, 1), 1e-5))


@pytest.mark.parametrize("name", ["fp8 group", "fp8 tensor"])
def test_rows_that_stay(name):
    x = normal(3, 11, 80)
    check(x, None, SPECS[name])
    check(x.at[6:].set(jnp.inf), None, SPECS[name], num_rows=jnp.asarray([6], jnp.int32))


def test_given_scales():
    x, places = hard_rows(4, 12, 48, "bfloat16"), places_of(4, 12, 2)
    for name in ("fp8_tensor_static", "int8_channel_static"):
        spec = FORMATS[name].activations
        check(x, places, spec, scales=0.037)
        check(x, None, spec, scales=jnp.asarray([0.5, 0.0, np.nan, 2.0**-120] * 3, jnp.float32))


def test_what_has_no_place_has_no_part_in_a_scale():
    x, places = normal(5, 8, 32), places_of(5, 8, 2, missing=0).at[::2].set(-1)
    results = [_run(x.at[::2].set(bad), places, SPECS["int8 tensor"]) for bad in (0.0, jnp.nan, jnp.inf)]
    scale = results[0].scales[0, places[1, 0]]
    assert scale == jnp.max(jnp.abs(x[1::2])) * (np.float32(1) / np.float32(127))
    for result in results:
        assert result.scales[0, places[1, 0]] == scale


@pytest.mark.parametrize(("tokens", "top_k"), [(0, 2), (3, 0)])
def test_nothing(tokens, top_k):
    result = gather_quantize(jnp.zeros((tokens, 160)), jnp.zeros((tokens, top_k), jnp.int32), SPECS["fp8 group"])
    assert result.values.shape == (0, 160) and result.scales.shape == (2, 192)


WRONG = {
    "none of activations": (Spec("int4", "group", 32), {}, "QuantFormat.activations"),
    "static": (Spec("int8", "tensor", static=True), {}, "pass scales="),
    "scales of groups": (SPECS["fp8 group"], dict(scales=1.0), "which cannot be given"),
    "shape of scales": (SPECS["fp8 token"], dict(scales=jnp.ones(3)), r"one a token, \(4,\)"),
    "rows and places": (SPECS["fp8 token"], dict(num_rows=jnp.ones(1, jnp.int32)), "num_rows=None, or positions=None"),
    "no such kernel": (SPECS["fp8 token"], dict(implementation="mosaic"), "multiple of 16"),
    "no such implementation": (SPECS["fp8 token"], dict(implementation="triton"), "must be one of auto"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors(name):
    spec, options, message = WRONG[name]
    unchecked = without_type_checks("moe_jax.ops.gather_quantize")
    with pytest.raises(ValueError, match=message):
        unchecked.gather_quantize(jnp.ones((4, 40)), jnp.zeros((4, 1), jnp.int32), spec, **options)


def test_what_the_kernel_supports():
    token = SPECS["fp8 token"]
    assert supports(jnp.zeros((4, 2880), jnp.bfloat16), SPECS["fp8 group"], 8) is None
    assert "dtype" in supports(jnp.zeros((4, 32), jnp.int32), token)
    assert "block=(1, 96)" in supports(jnp.zeros((4, 96)), Spec("int8", "group", 96))
    assert "shared memory" in supports(jnp.zeros((4, 1 << 16)), token)
    assert "top_k=65" in supports(jnp.zeros((4, 32)), token, 65)
    assert "empty" in supports(jnp.zeros((0, 32)), token)
