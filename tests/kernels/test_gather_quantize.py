"""The kernels that quantize rows, interpreted and lowered for CUDA."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import _compat
from moe_jax.kernels.hopper import gather_quantize as kernel
from moe_jax.kernels.hopper.row_amax import row_amax
from moe_jax.ops.gather_quantize import gather_quantize
from moe_jax.quantization import FORMATS, Spec
from tests.layers import normal
from tests.lowering import assert_lowers_to_kernels, like, lower, num_kernels
from tests.quantized_rows import (
    KINDS,
    OF_ROWS,
    SPECS,
    check_discriminates,
    check_quantized_rows,
    hard_rows,
    places_of,
)


def check(x, positions, spec, **options):
    result = gather_quantize(x, positions, spec, implementation="mosaic_interpret", **options)
    check_quantized_rows(result, x, positions, spec, **options)
    return result


@pytest.mark.parametrize("name", OF_ROWS)
def test_every_bit(name):
    """1040 columns: a tile, and one that is nearly empty."""
    check(hard_rows(0, KINDS + 1, 1040, "bfloat16"), places_of(0, KINDS + 1, 2), SPECS[name])


@pytest.mark.parametrize("name", ["fp8 group", "int8 token"])
def test_the_check_can_fail(name):
    x, places = normal(1, 5, 144, dtype="bfloat16"), places_of(1, 5, 2)
    result = check(x, places, SPECS[name])
    check_discriminates(lambda found: check_quantized_rows(found, x, places, SPECS[name]), result)


@pytest.mark.parametrize(
    ("dtype", "name"), [("float32", "fp8 group"), ("float32", "int8 group"), ("float16", "fp8 group ue8m0")]
)
def test_dtypes_and_weights(dtype, name):
    x, places, weights = hard_rows(2, KINDS, 656, dtype), places_of(2, KINDS, 2), jnp.abs(normal(2, KINDS, 1))
    check(x, places, SPECS[name], weights=weights)


def test_a_weight_makes_float16_subnormal():
    check(normal(2, 3, 256, dtype="float16"), None, SPECS["fp8 group ue8m0"], weights=jnp.full((3, 1), 1e-5))


@pytest.mark.parametrize("hidden", [16, 80, 1024, 2880])
def test_widths(hidden):
    check(normal(3, 3, hidden, dtype="bfloat16"), places_of(3, 3, 2), SPECS["fp8 group"])


@pytest.mark.parametrize(("tokens", "top_k", "missing"), [(1, 1, 0), (1, 8, 0.3), (7, 1, 0.3), (3, 2, 1)])
def test_shapes(tokens, top_k, missing):
    check(normal(4, tokens, 80, dtype="bfloat16"), places_of(4, tokens, top_k, missing), SPECS["fp8 group"])


@pytest.mark.parametrize(("ahead", "leaving", "tiles"), [(1, 1, 1), (3, 2, 4)])
def test_rows_in_flight(ahead, leaving, tiles):
    """More rows of a CTA than there are buffers, and more tiles than are held at a time.

    Every token has a place: the interpreter does not count groups of copies that are empty, as the GPU does.
    """
    x, places, spec = normal(5, 17, 2064, dtype="bfloat16"), places_of(5, 17, 2, missing=0), SPECS["fp8 group"]
    config = kernel.Config(ahead=ahead, leaving=leaving, tiles=tiles, ctas_per_sm=1)
    interpret = _compat.interpret_params()
    result = kernel.gather_quantize(x, places, spec, config=config, interpret=interpret)
    check_quantized_rows(result, x, places, spec)


@pytest.mark.parametrize("num_rows", [None, 0, 4, 99])
def test_rows_that_stay(num_rows):
    count = None if num_rows is None else jnp.asarray([num_rows], jnp.int32)
    check(normal(6, 6, 144, dtype="bfloat16"), None, SPECS["fp8 group"], num_rows=count)


@pytest.mark.parametrize("name", ["fp8_tensor_static", "int8_channel_static"])
def test_given_scales(name):
    x, places = hard_rows(7, 12, 144, "bfloat16"), places_of(7, 12, 2)
    check(x, places, FORMATS[name].activations, scales=0.037)
    each = jnp.asarray([0.5, 0.0, np.nan, 2.0**-120, 1e-39, 2.0**127] * 2, jnp.float32)
    check(x, None, FORMATS[name].activations, scales=each)


def test_given_scales_become_powers_of_two():
    spec = Spec("float8_e4m3fn", "token", None, "float8_e8m0fnu", static=True)
    check(normal(8, 4, 48), None, spec, scales=jnp.asarray([0.7, 0.5, 3.0, 1e-9], jnp.float32))


@pytest.mark.parametrize("name", ["fp8 tensor", "int8 tensor"])
def test_one_scale_for_all_that_count(name):
    """NaN and infinity are in tokens without a place."""
    x, places = normal(9, 19, 144, dtype="bfloat16"), places_of(9, 19, 2, missing=0)
    check(x.at[4].set(jnp.inf).at[5].set(jnp.nan), places.at[4:6].set(-1).at[0, 0].set(-1), SPECS[name])


@pytest.mark.parametrize(
    ("name", "kinds"), [("fp8 tensor", [0, 4, 6]), ("int8 tensor", [0, 6]), ("int8 tensor", [0, 4])]
)
def test_one_scale_for_hard_rows(name, kinds):
    check(hard_rows(9, 5, 80, "bfloat16", kinds), None, SPECS[name])


def test_one_scale_of_the_first_rows():
    x, weights = normal(11, 12, 80).at[7:].set(jnp.inf), jnp.abs(normal(11, 12, 1))
    check(x, None, SPECS["fp8 tensor"], weights=weights, num_rows=jnp.asarray([7], jnp.int32))


def test_row_amax():
    x = normal(10, 21, 144).at[3, 5].set(-9.0)
    interpret = _compat.interpret_params()
    found = row_amax(x, None, SPECS["fp8 tensor"], interpret=interpret, multiprocessors=1)
    assert found.shape == (128,) and jnp.max(found) == 9.0
    nothing = row_amax(x, None, SPECS["fp8 tensor"], num_rows=jnp.asarray([0], jnp.int32), interpret=interpret)
    assert not np.asarray(nothing).any()


LOWERED = {
    "deepseek": (4096, 8, 7168, "bfloat16", "fp8 group"),
    "qwen3": (1000, 8, 2048, "bfloat16", "fp8 group ue8m0"),
    "qwen3, inner": (4096, None, 768, "bfloat16", "fp8 group"),
    "qwen3-coder, inner": (4096, None, 1536, "bfloat16", "int8 group"),
    "gpt-oss": (16, 4, 2880, "float16", "int8 token"),
    "mixtral": (33, 2, 4096, "bfloat16", "fp8 tensor"),
    "mixtral, inner": (128, None, 14336, "bfloat16", "fp8 token"),
    "one token": (1, 1, 4096, "float32", "fp8 group of 32"),
    "many slots": (9, 33, 1040, "float32", "fp8 group"),
    "narrow rows": (9, 2, 80, "bfloat16", "fp8 group"),
}


@pytest.mark.parametrize("name", LOWERED)
def test_lowers_for_cuda(name):
    tokens, top_k, hidden, dtype, spec = LOWERED[name]

    def call(x, positions, weights):
        return gather_quantize(x, positions, SPECS[spec], weights=weights, implementation="mosaic")

    positions = None if top_k is None else like("int32", tokens, top_k)
    operands = like(dtype, tokens, hidden), positions, like("float32", tokens, 1)
    assert num_kernels(lower(call, *operands)) == 1 + (spec == "fp8 tensor")


def test_lowers_with_given_scales():
    def call(x, positions, scale):
        return gather_quantize(
            x, positions, FORMATS["fp8_tensor_static"].activations, scales=scale, implementation="mosaic"
        )

    for shape in ((), (64,)):
        assert_lowers_to_kernels(call, like("bfloat16", 64, 2048), like("int32", 64, 8), like("float32", *shape))
