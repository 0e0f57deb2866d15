"""The gradient of a grouped matmul's input in its plain-JAX form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.grouped_matmul import grouped_matmul
from moe_jax.ops.input_grad import input_grad
from tests.contracts import check_grouped_matmul, groups_of, rows_of
from tests.grouping import occupied_rows
from tests.layers import normal, quick_jit

compiled = quick_jit(input_grad, static_argnames="implementation")


def run(seed, groups, n, k, dtype="float32"):
    rows = rows_of(seed, groups, n, dtype)
    weights = normal([seed, 1], 5, n, k, dtype=dtype, scale=n**-0.5)
    out = compiled(rows, weights, groups, implementation="xla")
    check_grouped_matmul(out, rows, weights.swapaxes(1, 2), groups)
    return out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(dtype):
    run(0, groups_of(0, 37, 2, 5, 8), 48, 24, dtype)


@pytest.mark.parametrize("sizes", [(1, 1), (37, 19), (6, 1000)])
@pytest.mark.parametrize("tile_rows", [1, 16, 128])
def test_sizes_that_nothing_divides(sizes, tile_rows):
    run(1, groups_of(1, 21, 2, 5, tile_rows), *sizes)


def test_rows_of_no_group_are_zero():
    groups = groups_of(2, 21, 2, 5, 8, only=[1, 3])
    out = np.asarray(run(2, groups, 16, 24))
    others = np.setdiff1d(np.arange(len(out)), occupied_rows(groups))
    assert len(others) and not out[others].any()


def test_no_rows_at_all():
    for groups in (groups_of(3, 0, 2, 5, 8), groups_of(3, 7, 2, 5, 8, missing=1)):
        run(3, groups, 16, 24)


def test_a_kernel_that_cannot_run_says_why():
    groups = groups_of(4, 7, 2, 5, 8)
    rows, weights = rows_of(4, groups, 24, "bfloat16"), normal(4, 5, 24, 32, dtype="bfloat16")
    with pytest.raises(ValueError, match="the contracted size=24 must be a multiple of 16"):
        input_grad(rows, weights, groups, implementation="mosaic")
    with pytest.raises(ValueError, match="rows float32 and weights float32 must both be bfloat16 or both float16"):
        input_grad(rows.astype("float32"), weights.astype("float32"), groups, implementation="mosaic")


def test_it_is_the_derivative_of_the_matmul():
    groups = groups_of(5, 21, 2, 5, 8)
    x, cotangent = rows_of(5, groups, 24, "float32"), rows_of(6, groups, 16, "float32")
    weights = normal(5, 5, 16, 24)
    pull = jax.vjp(lambda x: grouped_matmul(x, weights, groups, implementation="xla"), x)[1]
    where = occupied_rows(groups)
    mine = compiled(cotangent, weights, groups, implementation="xla")
    np.testing.assert_allclose(np.asarray(mine)[where], np.asarray(pull(cotangent)[0])[where], rtol=1e-4, atol=1e-6)
    assert jnp.any(mine[where] != 0)
