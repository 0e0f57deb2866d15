"""Back through an activation into codes: interpreted, against the same in plain JAX, and lowered for CUDA."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import _compat
from moe_jax.activations import get_activation
from moe_jax.kernels.hopper import activation_blocks as kernel
from moe_jax.kernels.hopper import quantize_blocks
from moe_jax.ops.input_grad import through_activation
from moe_jax.quantization.fp8_training import BLOCKS, ROWS, blocks_spec, rows_spec
from tests.kernels.test_quantize_blocks import bits
from tests.layers import normal
from tests.lowering import like, lower, operations
from tests.util import check_close

SPECS = {"row_spec": ROWS, "spec": BLOCKS, "activated_spec": BLOCKS}


# This one has no exponential: both round alike. The number of its operations is that of any other.
@pytest.mark.parametrize(("activation", "dtype"), [("relu2", "float8_e4m3fn"), ("relu2_no_mul", "float8_e5m2")])
def test_codes_are_those_of_the_derivatives(activation, dtype):
    """Of `dtype`, and of e4m3 those of the activations."""
    act, of_rows, of_columns = get_activation(activation), rows_spec(dtype), blocks_spec(dtype)
    specs = {"row_spec": of_rows, "spec": of_columns, "activated_spec": BLOCKS}
    starts, sizes, count = ([0, 3, 70, 0], [3, 64, 128, 0], 3)
    schedule = [jnp.asarray(a, jnp.int32) for a in (starts, sizes, [count])]
    d, h = normal(0, 198, 256, dtype="bfloat16"), normal(1, 198, 512 if act.is_gated else 256, dtype="bfloat16")
    s = normal(2, 198, dtype="float32")
    interpret = _compat.interpret_params()
    codes, scales, turned, turned_scales, a, a_scales, sums = kernel.activation_blocks(
        d, h, s, *schedule, act, **specs, interpret=interpret, multiprocessors=1
    )
    expected = through_activation(d, h, s, act)
    options = {"interpret": interpret, "multiprocessors": 1}
    of_h = quantize_blocks.quantize_rows_of_blocks(
        expected.pre_activation, *schedule, of_columns, row_spec=of_rows, **options
    )
    of_a = quantize_blocks.quantize_rows_of_blocks(expected.activated, *schedule, BLOCKS, **options)
    held = [start + i for start, size in zip(starts[:count], sizes, strict=False) for i in range(size)]
    np.testing.assert_array_equal(bits(codes)[held], bits(of_h[0])[held])
    np.testing.assert_array_equal(np.asarray(scales)[:, held], np.asarray(of_h[1])[:, held])
    for found, wanted in [((turned, turned_scales), of_h[2:]), ((a, a_scales), of_a)]:
        np.testing.assert_array_equal(bits(found[0])[:, : 128 * count], bits(wanted[0])[:, : 128 * count])
        np.testing.assert_array_equal(np.asarray(found[1])[:, :count], np.asarray(wanted[1])[:, :count])
    check_close(np.asarray(sums)[:, held].sum(0)[None], np.asarray(expected.row_weights)[None, held], 1e-5)


@pytest.mark.parametrize(
    "activation", ["silu", "swigluoai", "swiglustep", "gelu", "gelu_tanh", "relu2", "silu_no_mul", "gelu_no_mul"]
)
def test_it_lowers_for_cuda(activation):
    act = get_activation(activation)
    operands = [like(jnp.bfloat16, 1000, 256), like(jnp.bfloat16, 1000, 512 if act.is_gated else 256)]
    operands += [like(jnp.float32, 1000), *(like(jnp.int32, size) for size in (9, 9, 1))]
    found = operations(lower(lambda *a: kernel.activation_blocks(*a, act, **SPECS), *operands))
    assert sum(count for name, count in found.items() if name.startswith("mosaic_gpu")) == 1
