"""Gather in its plain-JAX form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.gather import gather
from tests.contracts import check_gather, groups_of
from tests.grouping import occupied_rows, token_of_rows
from tests.layers import normal, quick_jit
from tests.util import check_close

run = quick_jit(lambda x, groups: gather(x, groups, implementation="xla"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("hidden", [1, 80, 1000])
def test_rows_are_copies_of_their_tokens(dtype, hidden):
    x, groups = normal(0, 37, hidden, dtype=dtype), groups_of(0, 37, 2, 5, 8)
    rows = run(x, groups)
    check_gather(rows, x, groups)
    for wrong in (jnp.zeros_like(rows), jnp.roll(rows, 1, axis=0), 1.5 * rows):
        with pytest.raises(AssertionError):
            check_gather(wrong, x, groups)


def test_values_are_copied_as_they_are():
    x = jnp.asarray([[np.inf, -np.inf, np.nan, -0.0]] * 3, jnp.float32)
    groups = groups_of(1, 3, 2, 2, 8, missing=0)
    rows = np.asarray(run(x, groups))[occupied_rows(groups)]
    np.testing.assert_array_equal(rows.view(np.int32), np.asarray(x).view(np.int32)[[0] * len(rows)])


@pytest.mark.parametrize("only", [[3], [0, 4]])
def test_experts_without_tokens(only):
    x, groups = normal(2, 21, 16), groups_of(2, 21, 2, 5, 8, only=only)
    check_gather(run(x, groups), x, groups)


def test_no_tokens_and_no_pairs():
    x, groups = normal(3, 0, 16), groups_of(3, 0, 2, 5, 8)
    assert run(x, groups).shape == (0, 16)
    x, groups = normal(3, 4, 16), groups_of(3, 4, 2, 5, 8, missing=1)
    check_gather(run(x, groups), x, groups)


def test_gradient():
    """A token collects from its rows; what lies in rows of no group, be it NaN, reaches nobody."""
    x, groups = normal(4, 21, 6), groups_of(4, 21, 2, 5, 8)
    cotangent = np.full((groups.num_rows, 6), np.nan, np.float32)
    where = occupied_rows(groups)
    cotangent[where] = np.random.default_rng(4).standard_normal((len(where), 6))
    expected = np.zeros((21, 6))
    np.add.at(expected, token_of_rows(groups)[where], cotangent[where])
    gradient = jax.vjp(lambda x: gather(x, groups, implementation="xla"), x)[1](jnp.asarray(cotangent))[0]
    check_close(gradient, expected, 1e-6)
