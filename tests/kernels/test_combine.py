"""The combine kernel, interpreted and lowered for CUDA."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.combine import combine
from tests.contracts import check_combine, groups_of, rows_of
from tests.lowering import assert_lowers_to_kernels, like
from tests.util import assert_discriminates


def problem(seed, num_tokens, top_k, hidden, dtype="bfloat16", **kwargs):
    """Rows (NaN where no token is), positions and weights (NaN where no row is)."""
    groups = groups_of(seed, num_tokens, top_k, 3, 64, **kwargs)
    weights = np.random.default_rng([seed, 41]).uniform(0.1, 1.0, groups.positions.shape)
    weights = np.where(np.asarray(groups.positions) < 0, np.nan, weights)
    return rows_of(seed, groups, hidden, dtype), groups.positions, jnp.asarray(weights, jnp.float32)


def run(rows, positions, weights):
    out = combine(rows, positions, weights, implementation="mosaic_interpret")
    check_combine(out, rows, positions, weights)
    return out


@pytest.mark.parametrize(("dtype", "hidden"), [("bfloat16", h) for h in (16, 80, 256, 272, 1536)] + [("float16", 144)])
def test_weighted_sum(dtype, hidden):
    operands = problem(0, 7, 2, hidden, dtype)
    out = run(*operands)
    assert_discriminates(lambda y: check_combine(jnp.asarray(y, dtype), *operands), out)


@pytest.mark.parametrize("top_k", [1, 3, 9])
def test_any_number_of_slots(top_k):
    run(*problem(1, 3, top_k, 80))


def test_plain_sum():
    rows, positions, _ = problem(2, 7, 2, 80)
    run(rows, positions, None)


def test_one_token():
    run(*problem(3, 1, 2, 80))


def test_the_sum_is_in_float32_and_in_slot_order():
    rows = jnp.zeros((64, 16), jnp.bfloat16)
    for row, value in enumerate((1.0, 2.0**-9, -1.0, 2.0**30, -(2.0**30), 1.0)):
        rows = rows.at[row].set(value)
    positions = jnp.asarray([[0, 1, 2], [3, 4, 5], [5, 3, 4]], jnp.int32)
    assert run(rows[:], positions[:1], None)[0, 0] == 2.0**-9
    out = combine(rows, positions[1:], None, implementation="mosaic_interpret")
    assert out[:, 0].tolist() == [1.0, 0.0]


def test_slots_without_a_row_add_nothing_whatever_lies_there():
    rows = jnp.full((64, 16), jnp.nan, jnp.bfloat16).at[1].set(1.5)
    positions = jnp.asarray([[-1, 1], [-1, -1]], jnp.int32)
    weights = jnp.asarray([[jnp.nan, 2.0], [jnp.inf, jnp.nan]], jnp.float32)
    out = run(rows, positions, weights)
    np.testing.assert_array_equal(out, [[3.0] * 16, [0.0] * 16])


LOWERED = {
    "mixtral": (1, 2, 4096, "bfloat16"),
    "qwen3": (1000, 8, 2048, "bfloat16"),
    "gpt-oss": (16, 4, 2880, "float16"),
    "no multiple of 64": (128, 4, 1040, "bfloat16"),
    "many slots": (33, 20, 7168, "bfloat16"),
}


@pytest.mark.parametrize("name", LOWERED)
def test_lowers_for_cuda(name):
    num_tokens, top_k, hidden, dtype = LOWERED[name]
    call = functools.partial(combine, implementation="mosaic")
    rows, positions = like(dtype, 64 * top_k, hidden), like("int32", num_tokens, top_k)
    assert_lowers_to_kernels(call, rows, positions, like("float32", num_tokens, top_k))
    assert_lowers_to_kernels(lambda rows, positions: call(rows, positions, None), rows, positions)
