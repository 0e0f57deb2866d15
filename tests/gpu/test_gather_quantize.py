"""Quantized rows on a GPU: what the interpreter replaces (conversions, reciprocals, the storing of scales), at real sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.gather_quantize import gather_quantize
from moe_jax.quantization import FORMATS
from tests.layers import normal
from tests.quantization import oracle
from tests.quantized_rows import SPECS, check_quantized_rows, hard_rows, places_of

pytestmark = pytest.mark.gpu

kernel = jax.jit(functools.partial(gather_quantize, implementation="mosaic"), static_argnums=2)
plain = jax.jit(functools.partial(gather_quantize, implementation="xla"), static_argnums=2)

SMALL = {
    "fp8 group": (40, 8, 2880, "bfloat16"),
    "fp8 group ue8m0": (40, 3, 1040, "float16"),
    "fp8 group of 32": (33, 33, 656, "float32"),
    "fp8 token": (1, 1, 4096, "bfloat16"),
    "int8 group": (40, 8, 768, "bfloat16"),
    "int8 token": (40, 2, 1536, "float32"),
}


@pytest.mark.parametrize("name", SMALL)
def test_hard_rows(name):
    tokens, top_k, hidden, dtype = SMALL[name]
    x, places = hard_rows(0, tokens, hidden, dtype), places_of(0, tokens, top_k, missing=0.2 if tokens > 1 else 0)
    check_quantized_rows(kernel(x, places, SPECS[name]), x, places, SPECS[name])
    weights = jnp.abs(normal(0, tokens, 1))
    check_quantized_rows(kernel(x, None, SPECS[name], weights=weights), x, None, SPECS[name], weights=weights)


def test_every_reciprocal():
    """Scales whose reciprocals are hard to round, as groups of one magnitude have them."""
    x = (normal(1, 4096, 1) * jnp.ones((1, 2048))).at[:, ::128].multiply(jnp.linspace(0.5, 2, 16))
    check_quantized_rows(kernel(x, None, SPECS["fp8 group"]), x, None, SPECS["fp8 group"])


@pytest.mark.parametrize("name", ["fp8 tensor", "int8 tensor"])
def test_one_scale_for_all_that_count(name):
    x, places = normal(2, 3000, 2048, dtype="bfloat16"), places_of(2, 3000, 4)
    x = jnp.where((places >= 0).any(axis=1)[:, None], x, jnp.inf)
    check_quantized_rows(kernel(x, places, SPECS[name]), x, places, SPECS[name])


@pytest.mark.parametrize("name", ["fp8_tensor_static", "int8_channel_static"])
def test_given_scales(name):
    x, spec = hard_rows(3, 60, 2048, "bfloat16"), FORMATS[name].activations
    each = jnp.asarray([0.5, 0.0, np.nan, 2.0**-120, 1e-39, 2.0**127] * 10, jnp.float32)
    check_quantized_rows(kernel(x, None, spec, scales=each), x, None, spec, scales=each)
    places = places_of(3, 60, 8)
    check_quantized_rows(kernel(x, places, spec, scales=0.037), x, places, spec, scales=0.037)


LARGE = {
    "deepseek": (16384, None, 7168, "fp8 group"),
    "deepseek, gathered": (4096, 8, 7168, "fp8 group ue8m0"),
    "qwen3": (4096, 8, 2048, "fp8 token"),
    "qwen3, inner": (32768, None, 768, "int8 group"),
    "mixtral, inner": (4096, None, 14336, "int8 token"),
}


@pytest.mark.parametrize("name", LARGE)
def test_many_rows(name):
    tokens, top_k, hidden, spec = LARGE[name]
    x = normal(4, tokens, hidden, dtype="bfloat16")
    places = None if top_k is None else places_of(4, tokens, top_k)
    found, expected, again = (run(x, places, SPECS[spec]) for run in (kernel, plain, kernel))
    rows = np.arange(tokens) if places is None else np.asarray(places)[np.asarray(places) >= 0]
    for other in (expected, again):
        np.testing.assert_array_equal(oracle.bits(found.values[rows]), oracle.bits(other.values[rows]))
        np.testing.assert_array_equal(found.scales[:, rows], other.scales[:, rows])
