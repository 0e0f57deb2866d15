"""Rows quantized as they leave the grouped matmul, interpreted: the bits of quantizing them afterwards; and lowered for CUDA."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import _compat
from moe_jax.activations import get_activation
from moe_jax.kernels.hopper import matmul_fp8, quantized_store
from moe_jax.kernels.hopper.gather_quantize import scales_shape
from moe_jax.kernels.hopper.matmul_config import Config
from moe_jax.ops.gather_quantize import plain_gather_quantize
from moe_jax.quantization import quant_format, quantize
from tests.contracts import groups_with_sizes
from tests.grouping import occupied_rows
from tests.kernels.test_matmul_fp8 import transposed
from tests.layers import normal
from tests.lowering import like, lower, num_kernels
from tests.quantization import oracle

SILU = get_activation("silu")
SMALL = Config((32, 96), consumers=2, tile_k=128, stages=2)


def operands(name, groups, k, n_out):
    form = quant_format(name)
    x = quantize(normal(1, groups.num_rows, k, dtype="bfloat16"), form.activations)
    weights = quantize(normal(2, 2, 2 * n_out, k, scale=k**-0.5), form.weights, halves=2)
    weight_scales = weights.scales.astype(jnp.float32)
    schedule = groups.tile_group, groups.tile_starts, groups.tile_sizes, groups.num_tiles
    return x.values, transposed(x.scales, groups.num_rows), weights.values, weight_scales, *schedule


@pytest.mark.parametrize(
    ("name", "sizes", "bias"),
    [("fp8_block", (20, 81), True), ("fp8_block_ue8m0", (32, 3), False), ("int8_block", (90, 0), False)],
)
def test_the_bits_of_quantizing_afterwards(name, sizes, bias):
    spec, groups = quant_format(name).activations, groups_with_sizes(1, sizes, 96)
    call = functools.partial(
        matmul_fp8.grouped_matmul,
        *operands(name, groups, 128, 256),
        normal(3, 2, 512) if bias else None,
        SILU,
        config=SMALL,
        out_dtype="bfloat16",
        interpret=_compat.interpret_params(),
        multiprocessors=2,
    )
    values, scales = call(quantize=spec)
    right = plain_gather_quantize(call(), None, spec)
    rows = occupied_rows(groups)
    assert (values.dtype, scales.shape) == (spec.storage_dtype, scales_shape(groups.num_rows, 256, spec))
    np.testing.assert_array_equal(oracle.bits(values[rows]), oracle.bits(right.values[rows]))
    np.testing.assert_array_equal(np.asarray(scales)[:, rows], np.asarray(right.scales)[:, rows])
    assert len(np.unique(np.asarray(scales)[:, rows])) > 1
    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(oracle.bits(values[rows]), oracle.bits(np.roll(right.values[rows], 1, axis=1)))


@pytest.mark.parametrize("name", ["fp8_block", "fp8_block_ue8m0", "int8_block"])
def test_lowers_for_cuda(name):
    form, config = quant_format(name), Config((64, 96, 128), consumers=2, tile_k=128, stages=4)

    def call(rows, row_scales, weights, weight_scales, *schedule):
        return matmul_fp8.grouped_matmul(
            rows,
            row_scales,
            weights,
            weight_scales,
            *schedule,
            None,
            SILU,
            config=config,
            out_dtype="bfloat16",
            aligned=True,
            quantize=form.activations,
        )

    dtype, tiles = form.weights.dtype, like("int32", 320)
    codes, scales = (like(dtype, 8192, 2048), like("float32", 16, 8384)), like("float32", 128, 12, 16)
    text = lower(call, *codes, like(dtype, 128, 1536, 2048), scales, tiles, tiles, tiles, like("int32", 1))
    assert num_kernels(text) == 1


def test_what_it_cannot_do():
    spec, good = quant_format("fp8_block").activations, Config((64, 128), tile_k=128)
    supports = quantized_store.supports
    assert supports(spec, good, 768, True) is None
    assert "for each 128 columns" in supports(quant_format("fp8_channel").activations, good, 768, True)
    assert "consumers=1" in supports(spec, Config((64,), consumers=1), 768, True)
    assert "must have 2" in supports(spec, good, 768, False)
    assert "output size=704" in supports(spec, good, 704, True)
    assert "row_counts [16, 48]" in supports(spec, Config((16, 48, 64)), 768, True)
