"""Combine in its plain-JAX form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.combine import combine
from tests.contracts import check_combine, groups_of, rows_of
from tests.layers import normal, quick_jit
from tests.util import assert_discriminates, check_close

run = quick_jit(lambda rows, positions, weights: combine(rows, positions, weights, implementation="xla"))


def problem(seed, num_tokens, top_k, hidden, dtype, **kwargs):
    """Rows (NaN where no token is), positions and weights (NaN where no row is)."""
    groups = groups_of(seed, num_tokens, top_k, 5, 8, **kwargs)
    weights = np.random.default_rng([seed, 41]).uniform(0.1, 1.0, groups.positions.shape)
    weights = np.where(np.asarray(groups.positions) < 0, np.nan, weights)
    return rows_of(seed, groups, hidden, dtype), groups.positions, jnp.asarray(weights, jnp.float32)


@pytest.mark.parametrize(("dtype", "top_k"), [("float32", 3), ("bfloat16", 1), ("bfloat16", 9), ("float16", 3)])
def test_weighted_sum(dtype, top_k):
    operands = problem(0, 23, top_k, 40, dtype)
    out = run(*operands)
    check_combine(out, *operands)
    assert_discriminates(lambda y: check_combine(jnp.asarray(y, dtype), *operands), out)
    with pytest.raises(AssertionError):
        check_combine(out, operands[0], jnp.roll(operands[1], 1, axis=0), operands[2])


def test_plain_sum():
    rows, positions, _ = problem(1, 23, 3, 40, "float32")
    check_combine(run(rows, positions, None), rows, positions, None)


def test_the_sum_is_in_float32_and_in_slot_order():
    """1 + 2**-9 - 1 is 2**-9 in float32, 0 in bfloat16; big + small - big is 0 in any other order than this."""
    rows = jnp.asarray([[1.0], [2.0**-9], [-1.0]], jnp.bfloat16)
    assert float(run(rows, jnp.asarray([[0, 1, 2]], jnp.int32), None)[0, 0]) == 2.0**-9
    rows = jnp.asarray([[2.0**30], [-(2.0**30)], [1.0]], jnp.float32)
    order = jnp.asarray([[0, 1, 2], [2, 0, 1]], jnp.int32)
    assert run(rows, order, None)[:, 0].tolist() == [1.0, 0.0]


def test_slots_without_a_row_add_nothing_whatever_lies_there():
    rows = jnp.asarray([[jnp.nan, jnp.inf], [1.0, 2.0]])
    positions = jnp.asarray([[-1, 1], [-1, -1]], jnp.int32)
    out = run(rows, positions, jnp.asarray([[jnp.nan, 2.0], [jnp.inf, jnp.nan]]))
    assert out.tolist() == [[2.0, 4.0], [0.0, 0.0]]


def test_no_tokens_and_no_rows():
    assert run(normal(0, 8, 6), jnp.zeros((0, 2), jnp.int32), jnp.zeros((0, 2))).shape == (0, 6)
    out = run(jnp.zeros((0, 6)), jnp.full((3, 2), -1, jnp.int32), jnp.full((3, 2), jnp.nan))
    assert out.tolist() == [[0.0] * 6] * 3


def test_gradient():
    rows, positions, weights = problem(2, 23, 3, 6, "float32", missing=0.3)
    cotangent = normal(3, 23, 6)
    pull = jax.vjp(lambda r, w: combine(r, positions, w, implementation="xla"), rows, weights)[1]
    d_rows, d_weights = pull(cotangent)
    g, at, present = np.asarray(cotangent, np.float64), np.asarray(positions), np.asarray(positions) >= 0
    clean = np.nan_to_num(np.asarray(rows, np.float64))
    expected_rows = np.zeros(rows.shape)
    token, slot = np.nonzero(present)
    np.add.at(expected_rows, at[present], np.asarray(weights)[token, slot][:, None] * g[token])
    expected_weights = np.where(present, np.sum(clean[np.where(present, at, 0)] * g[:, None], axis=-1), 0.0)
    check_close(d_rows, expected_rows, 1e-6)
    check_close(d_weights, expected_weights, 1e-6)
