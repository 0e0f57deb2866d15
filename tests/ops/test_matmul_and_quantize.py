"""Rows that a grouped matmul hands over quantized, in plain JAX: what two operations one after the other give."""

import numpy as np
import pytest

from moe_jax.activations import get_activation
from moe_jax.kernels.hopper.matmul_config import Config
from moe_jax.ops.grouped_matmul import grouped_matmul
from moe_jax.ops.matmul_and_quantize import matmul_and_quantize
from moe_jax.ops.quantize_rows import quantize_rows, quantize_tokens
from moe_jax.quantization import quant_format, quantize
from tests.contracts import groups_with_sizes
from tests.grouping import occupied_rows
from tests.layers import normal
from tests.quantization import oracle


@pytest.mark.parametrize("name", ["fp8_block", "fp8_channel", "fp8_tensor", "int8_block"])
def test_the_same_as_one_after_the_other(name):
    form, groups = quant_format(name), groups_with_sizes(0, (5, 0, 20), 32)
    rows = quantize_tokens(normal(0, groups.positions.shape[0], 128), form.activations, groups)
    weights = quantize(normal(1, 3, 256, 128, scale=0.1), form.weights, halves=2)
    options = dict(activation=get_activation("silu"), implementation="xla")
    config = Config((32,), tile_k=128, quantizes=True)
    found = matmul_and_quantize(rows, weights, groups, form.activations, config=config, **options)
    hidden = grouped_matmul(rows, weights, groups, out_dtype="bfloat16", **options)
    right = quantize_rows(hidden, form.activations, groups=groups, implementation="xla")
    index = occupied_rows(groups)
    np.testing.assert_array_equal(oracle.bits(found.values[index]), oracle.bits(right.values[index]))
    np.testing.assert_array_equal(np.asarray(found.scales)[:, index], np.asarray(right.scales)[:, index])
    assert found.spec == form.activations and np.asarray(found.values[index], np.float32).any()
