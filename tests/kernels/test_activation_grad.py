"""Back through an activation: interpreted, against the same in plain JAX, and lowered for CUDA."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import _compat
from moe_jax.activations import get_activation
from moe_jax.kernels.hopper import activation_grad as kernel
from moe_jax.ops.input_grad import through_activation
from tests.layers import normal
from tests.lowering import like, lower, operations
from tests.util import assert_discriminates, check_close

ACTIVATIONS = ["silu", "swigluoai", "swiglustep", "gelu", "gelu_tanh", "relu2", "silu_no_mul", "gelu_no_mul"]


@pytest.mark.parametrize(
    ("activation", "rows", "columns", "dtype"),
    [("silu", 333, 192, "bfloat16"), ("gelu_tanh_no_mul", 128, 64, "float16"), ("swigluoai", 202, 64, "bfloat16")],
)
def test_as_in_plain_jax(activation, rows, columns, dtype):
    act = get_activation(activation)
    d, h = normal(0, rows, columns, dtype=dtype), normal(1, rows, columns * (2 if act.is_gated else 1), dtype=dtype)
    s = normal(2, rows, dtype="float32")
    back, a, sums = kernel.activation_grad(d, h, s, act, interpret=_compat.interpret_params(), multiprocessors=1)
    right = through_activation(d, h, s, act, implementation="xla")
    for found, wanted in ((back, right.pre_activation), (a, right.activated)):
        assert found.dtype == wanted.dtype
        check_close(found, wanted.astype(jnp.float32), 1e-3)
        assert_discriminates(lambda out, wanted=wanted: check_close(out, wanted.astype(jnp.float32), 1e-3), found)
    check_close(np.asarray(sums)[None], np.asarray(right.row_weights)[None], 1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_lowers_for_cuda(activation):
    act = get_activation(activation)
    operands = [like(jnp.bfloat16, 1000, 256), like(jnp.bfloat16, 1000, 512 if act.is_gated else 256)]
    found = operations(lower(lambda *a: kernel.activation_grad(*a, act), *operands, like(jnp.float32, 1000)))
    assert sum(count for name, count in found.items() if name.startswith("mosaic_gpu")) == 1


def test_what_it_does_not_support():
    rows = like(jnp.bfloat16, 128, 64)
    assert kernel.supports(rows, like(jnp.bfloat16, 128, 128)) is None
    assert "multiple of the 64" in kernel.supports(like(jnp.bfloat16, 128, 80), like(jnp.bfloat16, 128, 160))
    assert "at least the 128" in kernel.supports(like(jnp.bfloat16, 127, 64), like(jnp.bfloat16, 127, 64))
    assert "float32" in kernel.supports(like(jnp.float32, 128, 64), like(jnp.float32, 128, 64))
