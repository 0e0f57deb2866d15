"""Gradients of grouped weights of FP8 operands: the kernel in the interpreter against float64, and lowered for CUDA."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import _compat
from moe_jax.kernels.hopper import weight_grad_fp8 as kernel
from moe_jax.quantization.fp8_training import BLOCKS, GROUP, blocks_spec
from moe_jax.quantization.quantize import quantize
from tests.layers import normal
from tests.lowering import like, lower, operations
from tests.util import assert_discriminates, check_close

# Blocks of each expert, blocks of nobody, rows of both operands.
CASES = {
    "experts of several blocks": ([2, 0, 1], 1, 128, 256),
    "two tiles a side, the last half filled": ([1, 3], 0, 256, 384),
    "more steps than stages": ([6], 0, 128, 128),
    "none": ([0, 0], 1, 128, 128),
}


def problem(counts, rest, m, n, left="float8_e4m3fn"):
    """Operands of which the blocks of nobody are NaN, their blocks, and the product in float64."""
    columns = GROUP * (sum(counts) + rest)
    operands = [
        quantize(normal(seed, size, columns, scale=2.0**seed), spec)
        for seed, size, spec in ((0, m, blocks_spec(left)), (1, n, BLOCKS))
    ]
    firsts = np.cumsum(counts) - counts
    wide = [np.asarray(operand.dequantize(), np.float64) for operand in operands]
    spans = [slice(GROUP * first, GROUP * (first + count)) for first, count in zip(firsts, counts, strict=True)]
    expected = np.stack([wide[0][:, span] @ wide[1][:, span].T for span in spans])
    given = []
    for operand in operands:
        values = operand.values.at[:, GROUP * sum(counts) :].set(jnp.nan)
        given += [values, operand.scales.at[:, sum(counts) :].set(jnp.nan)]
    return (*given, jnp.asarray(firsts, jnp.int32), jnp.asarray(counts, jnp.int32)), expected


def run(operands, accumulate=None, out_dtype="float32", multiprocessors=2, **changes):
    options = {
        "out_dtype": jnp.dtype(out_dtype),
        "config": kernel.Config(**changes),
        "multiprocessors": multiprocessors,
    }
    return np.asarray(kernel.weight_grad(*operands, accumulate, interpret=_compat.interpret_params(), **options))


@pytest.mark.parametrize("name", CASES)
def test_products_of_the_blocks_of_each_expert(name):
    operands, expected = problem(*CASES[name])
    out = run(operands)
    if expected.any():
        check_close(out, expected, 1e-6)
        flat = expected.reshape(-1, expected.shape[2])
        assert_discriminates(lambda y: check_close(y, flat, 1e-6), out.reshape(flat.shape))
    assert not out[np.asarray(operands[-1]) == 0].any()


def test_bfloat16_out_and_another_ring():
    operands, expected = problem([3, 1], 0, 128, 256)
    check_close(run(operands, out_dtype="bfloat16", stages=2, band=1).astype(np.float64), expected, 3e-3)


def test_gradients_in_e5m2():
    """Beside activations in e4m3."""
    operands, expected = problem([2, 1], 0, 128, 256, left="float8_e5m2")
    assert [codes.dtype.name for codes in operands[:4:2]] == ["float8_e5m2", "float8_e4m3fn"]
    check_close(run(operands), expected, 1e-6)


def test_sums_are_added_to():
    """Of all experts, those without rows among them, through fewer buffers than blocks and more than one tile a worker."""
    operands, expected = problem([1, 0, 2], 0, 128, 384)
    before = normal(7, *expected.shape, scale=20.0)
    out = run(operands, before, multiprocessors=1)
    check_close(out, expected + np.asarray(before, np.float64), 1e-6)
    np.testing.assert_array_equal(out[1], before[1])


@pytest.mark.parametrize("accumulates", [False, True])
@pytest.mark.parametrize("left", ["float8_e4m3fn", "float8_e5m2"])
def test_it_lowers_for_cuda(left, accumulates):
    operands = []
    for size, dtype in ((1536, left), (2048, "float8_e4m3fn")):
        operands += [like(dtype, size, 1024), like(jnp.float32, size // GROUP, 8)]
    operands += [like(jnp.int32, 4)] * 2
    operands += [like(jnp.float32, 4, 1536, 2048)] if accumulates else []
    out_dtype = "float32" if accumulates else "bfloat16"
    text = lower(lambda *given: kernel.weight_grad(*given, out_dtype=out_dtype), *operands)
    assert sum(operations(text).values()) == 1
