"""Grouped matmul in its plain-JAX form: ragged groups, biases, activations, offsets, and its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.activations import ACTIVATIONS
from moe_jax.config import MoEConfig
from moe_jax.ops.grouped_matmul import grouped_matmul
from tests.contracts import check_grouped_matmul, expected_matmul, groups_of, rows_of
from tests.grouping import group_of_rows, occupied_rows
from tests.layers import normal, quick_jit
from tests.oracles import python_activation
from tests.util import check_close

compiled = quick_jit(grouped_matmul, static_argnames=("activation", "group_offset", "implementation"))


def config_with(activation):
    return MoEConfig(1, 1, 8, 8, activation=activation)


def problem(seed, groups, k, n, dtype="float32", num_experts=5):
    rows = rows_of(seed, groups, k, dtype)
    return rows, normal([seed, 1], num_experts, n, k, dtype=dtype, scale=k**-0.5), groups


def run(*operands, bias=None, activation=None, group_offset=0):
    config = None if activation is None else config_with(activation)
    act = None if config is None else config.act
    out = compiled(*operands, bias=bias, activation=act, group_offset=group_offset, implementation="xla")
    check_grouped_matmul(out, *operands, bias, config, group_offset)
    return out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(dtype):
    run(*problem(0, groups_of(0, 37, 2, 5, 8), 48, 24, dtype))


@pytest.mark.parametrize("sizes", [(1, 1), (37, 19), (1000, 6), (6, 1000)])
def test_sizes_that_nothing_divides(sizes):
    run(*problem(1, groups_of(1, 21, 2, 5, 8), *sizes))


@pytest.mark.parametrize("tile_rows", [1, 16, 128])
def test_tiles(tile_rows):
    run(*problem(2, groups_of(2, 37, 2, 5, tile_rows), 16, 24))


@pytest.mark.parametrize("only", [[0], [4], [1, 3]])
def test_experts_without_rows(only):
    groups = groups_of(3, 37, 2, 5, 8, only=only)
    rows, weights, _ = problem(3, groups, 16, 24)
    unused = np.setdiff1d(np.arange(5), only)
    run(rows, weights.at[unused].set(jnp.nan), groups)


def test_no_rows_at_all():
    for groups in (groups_of(4, 0, 2, 5, 8), groups_of(4, 7, 2, 5, 8, missing=1)):
        run(*problem(4, groups, 16, 24))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_in_the_epilogue(activation):
    bias = normal(5, 5, 24)
    run(*problem(5, groups_of(5, 21, 2, 5, 8), 16, 24), activation=activation, bias=bias)


@pytest.mark.parametrize("bias_dtype", ["float32", "bfloat16"])
def test_bias_is_added_in_float32(bias_dtype):
    run(*problem(6, groups_of(6, 21, 2, 5, 8), 16, 24, "bfloat16"), bias=normal(6, 5, 24, dtype=bias_dtype))


def test_group_offset():
    groups = groups_of(7, 21, 2, 3, 8)  # three groups, eight experts' weights
    operands = problem(7, groups, 16, 24, num_experts=8)
    bias = normal(7, 8, 24)
    outputs = [run(*operands, bias=bias, group_offset=offset) for offset in (0, 2, 5)]
    traced = jax.jit(lambda o: grouped_matmul(*operands, bias=bias, group_offset=o, implementation="xla"))(jnp.int32(5))
    check_grouped_matmul(traced, *operands, bias, None, 5)
    assert not np.array_equal(outputs[0], outputs[1])


def test_a_row_that_is_not_finite_stays_alone():
    groups = groups_of(8, 21, 2, 5, 8)
    rows, weights, _ = problem(8, groups, 16, 24)
    poisoned = int(occupied_rows(groups)[3])
    out = compiled(rows.at[poisoned].set(jnp.inf), weights, groups, implementation="xla")
    clean = run(rows, weights, groups)
    others = [row for row in range(rows.shape[0]) if row != poisoned]
    np.testing.assert_array_equal(np.asarray(out)[others], np.asarray(clean)[others])
    assert not np.isfinite(np.asarray(out)[poisoned]).any()


@pytest.mark.parametrize("activation", [None, "silu", "swigluoai", "relu2_no_mul"])
def test_gradient(activation):
    """Against the same formulas in NumPy, where the slope of the activation is a difference quotient in float64."""
    groups = groups_of(9, 21, 2, 5, 8)
    rows, weights, _ = problem(9, groups, 16, 24)
    bias = normal(9, 5, 24)
    config = None if activation is None else config_with(activation)
    where, expected = expected_matmul(rows, weights, groups, bias, config)
    cotangent = np.full((rows.shape[0], expected.shape[1]), np.nan, np.float32)  # padding rows have no meaning
    cotangent[where] = np.random.default_rng(9).standard_normal(expected.shape)

    def plain(rows, weights, bias):
        act = None if config is None else config.act
        return grouped_matmul(rows, weights, groups, bias=bias, activation=act, implementation="xla")

    pull = quick_jit(lambda rows, weights, bias, g: jax.vjp(plain, rows, weights, bias)[1](g))
    d_rows, d_weights, d_bias = (np.asarray(d, np.float64) for d in pull(rows, weights, bias, jnp.asarray(cotangent)))

    group = group_of_rows(groups)[where]
    x, w = np.asarray(rows, np.float64)[where], np.asarray(weights, np.float64)
    h = np.einsum("rk,rnk->rn", x, w[group]) + np.asarray(bias, np.float64)[group]
    g, step = cotangent[where].astype(np.float64), 1e-6
    d_h = np.zeros(h.shape)
    for column in range(h.shape[1]):  # central differences of the activation in float64: right to about 1e-9
        nudge = step * (np.arange(h.shape[1]) == column)
        apply = (lambda h: h) if config is None else (lambda h: python_activation(h, config))
        d_h[:, column] = np.sum(g * (apply(h + nudge) - apply(h - nudge)), axis=1) / (2 * step)
    check_close(d_rows[where], np.einsum("rn,rnk->rk", d_h, w[group]), 5e-6)
    expected_weights, expected_bias = np.zeros(w.shape), np.zeros(bias.shape)
    np.add.at(expected_weights, group, d_h[:, :, None] * x[:, None, :])
    np.add.at(expected_bias, group, d_h)
    check_close(d_weights, expected_weights, 5e-6)
    check_close(d_bias, expected_bias, 5e-6)
