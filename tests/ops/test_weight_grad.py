"""The gradient of grouped weights in its plain-JAX form: ragged groups, sums that are added to, what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.weight_grad import group_starts, weight_grad
from moe_jax.parallel.batched import batch_groups
from tests.contracts import groups_of, rows_of, tolerance_of
from tests.grouping import group_of_rows
from tests.layers import normal, quick_jit
from tests.util import assert_discriminates, check_close

compiled = quick_jit(weight_grad, static_argnames=("out_dtype", "implementation"))


def run(seed, groups, m, n, dtype="float32", **options):
    """The gradient, compared with float64; rows of no group are NaN."""
    left, right = rows_of(2 * seed, groups, m, dtype), rows_of(2 * seed + 1, groups, n, dtype)
    out = compiled(left, right, groups, implementation="xla", **options)
    a, b, group = np.asarray(left, np.float64), np.asarray(right, np.float64), group_of_rows(groups)
    expected = np.stack([a[group == e].T @ b[group == e] for e in range(groups.group_sizes.shape[0])])
    if options.get("accumulate") is not None:
        expected = expected + np.asarray(options["accumulate"], np.float64)
    assert out.dtype == options.get("out_dtype", dtype if "accumulate" not in options else "float32")
    check_close(out, expected, tolerance_of(out))
    if expected.any():
        assert_discriminates(lambda y: check_close(y, expected, tolerance_of(out)), out)
    if "accumulate" not in options:
        assert not np.asarray(out, np.float32)[np.asarray(groups.group_sizes) == 0].any()
    return out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(dtype):
    run(0, groups_of(0, 37, 2, 5, 8), 24, 17, dtype)


@pytest.mark.parametrize("only", [[0], [4], [1, 3]])
@pytest.mark.parametrize("tile_rows", [1, 64])
def test_experts_without_rows(only, tile_rows):
    run(1, groups_of(1, 37, 2, 5, tile_rows, only=only), 8, 3)


def test_sums_are_added_to_in_float32():
    run(2, groups_of(2, 37, 2, 5, 8), 8, 16, "bfloat16", accumulate=normal(3, 5, 8, 16))
    run(2, groups_of(2, 37, 2, 5, 8), 8, 16, "bfloat16", out_dtype="float32")


def test_no_rows_at_all():
    groups = groups_of(3, 0, 2, 5, 8)
    empty = jnp.zeros((0, 8))
    assert not weight_grad(empty, empty, groups).any()
    before = normal(4, 5, 8, 8)
    np.testing.assert_array_equal(weight_grad(empty, empty, groups, accumulate=before), before)
    run(3, groups_of(3, 4, 2, 5, 8, missing=1), 8, 8)


def test_where_groups_begin():
    groups = groups_of(4, 37, 2, 5, 8, only=[0, 2, 4])
    sizes, starts = np.asarray(groups.group_sizes), np.asarray(group_starts(groups))
    np.testing.assert_array_equal(starts[sizes > 0], (np.cumsum(sizes) - sizes)[sizes > 0])
    batch = batch_groups(jnp.asarray([3, 0, 9], jnp.int32), max_tokens=16, tile_rows=8)
    assert group_starts(batch).tolist() == [0, 48, 32]
    run(5, batch, 8, 8)


def test_what_it_refuses():
    groups = groups_of(6, 8, 1, 1, 8, missing=0)
    ones = jnp.ones((8, 64))
    for options in ({"accumulate": jnp.ones((1, 64, 64), jnp.bfloat16)}, {"out_dtype": "bfloat16"}):
        options = {"accumulate": jnp.ones((1, 64, 64))} | options
        with pytest.raises(TypeError, match="both must be float32"):
            weight_grad(ones, ones, groups, **options)
    with pytest.raises(NotImplementedError, match="weight_grad is part of a gradient"):
        jax.grad(lambda x: weight_grad(x, ones, groups).sum())(ones)
