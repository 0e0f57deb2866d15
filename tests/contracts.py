"""What each operation promises, as checks of one call against NumPy in float64: for any implementation, on any device.

A check takes the operation's result and its operands. What the contract leaves undefined (rows of no group) is not looked
at; operands carry NaN there, so that a leak is seen.
"""

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import MoEConfig
from moe_jax.ops.group_tokens import Groups, group_tokens
from tests.grouping import group_of_rows, occupied_rows, token_of_rows
from tests.layers import quick_jit
from tests.oracles import F32_MAX, python_activation, python_route
from tests.util import assert_discriminates, check_close

# Relative Frobenius errors: the rounding of the output, and little more.
TOLERANCE = {"float32": 1e-6, "float16": 3.5e-4, "bfloat16": 2.5e-3}


_group = quick_jit(group_tokens, static_argnames=("num_experts", "tile_rows", "implementation"))


def tolerance_of(array) -> float:
    return TOLERANCE[jnp.dtype(array.dtype).name]


def check_topk(topk, logits, config: MoEConfig, bias=None, tolerance=5e-6) -> None:
    """Ids exactly, weights row by row: rows may differ by many orders of magnitude."""
    ids, weights = python_route(logits, config, bias)
    weights = np.clip(weights, -F32_MAX, F32_MAX)
    assert topk.ids.dtype == jnp.int32 and topk.weights.dtype == jnp.float32
    np.testing.assert_array_equal(topk.ids, ids)
    actual = np.asarray(topk.weights, np.float64)
    assert np.isfinite(actual).all() and not actual[ids < 0].any()
    size = np.linalg.norm(weights / F32_MAX, axis=1)  # weights of F32_MAX have no finite norm
    error = np.linalg.norm((actual - weights) / F32_MAX, axis=1)
    assert (error <= tolerance * size).all(), f"relative error {np.max(error / np.maximum(size, 1e-300)):.2e}"


def discriminate_topk(topk, *operands) -> None:
    assert_discriminates(lambda w: check_topk(topk._replace(weights=jnp.asarray(w)), *operands), topk.weights)


def check_gather(rows, x, groups: Groups) -> None:
    """The rows that hold a token are copies of it, bit for bit."""
    assert rows.dtype == x.dtype and rows.shape == (groups.num_rows, x.shape[1])
    where = occupied_rows(groups)
    np.testing.assert_array_equal(np.asarray(rows)[where], np.asarray(x)[token_of_rows(groups)[where]])


def check_combine(out, rows, positions, weights) -> None:
    positions = np.asarray(positions)
    present = positions >= 0
    picked = np.asarray(rows).astype(np.float64)[np.where(present, positions, 0)]
    picked = np.where(present[..., None], picked, 0.0)
    factor = np.ones(positions.shape) if weights is None else np.asarray(weights, np.float64)
    expected = np.sum(picked * np.where(present, factor, 0.0)[..., None], axis=1)
    assert out.dtype == rows.dtype
    check_close(out, expected, tolerance_of(rows))
    assert not np.asarray(out, np.float32)[~present.any(axis=1)].any(), "a token without rows is exactly zero"


def expected_matmul(rows, weights, groups: Groups, bias=None, activation_config=None, group_offset=0):
    """(indices of the rows that hold a token, what they must be)."""
    where = occupied_rows(groups)
    group = group_of_rows(groups)[where] + group_offset
    x, w = np.asarray(rows).astype(np.float64)[where], np.asarray(weights).astype(np.float64)
    h = np.zeros((len(where), w.shape[1]))
    for g in np.unique(group):
        mine = group == g
        h[mine] = x[mine] @ w[g].T
    if bias is not None:
        h = h + np.asarray(bias).astype(np.float64)[group]
    return where, h if activation_config is None else python_activation(h, activation_config)


def check_grouped_matmul(out, rows, weights, groups, bias=None, activation_config=None, group_offset=0) -> None:
    """`activation_config` is a `MoEConfig`, whose activation was applied; None for none."""
    where, expected = expected_matmul(rows, weights, groups, bias, activation_config, group_offset)
    assert out.dtype == rows.dtype and out.shape == (rows.shape[0], expected.shape[1])
    actual = np.asarray(out)[where]
    check_close(actual, expected, tolerance_of(rows))
    if len(where) > 1:
        assert_discriminates(lambda y: check_close(y, expected, tolerance_of(rows)), actual)


def check_activation_input_grad(
    found, rows, weights, groups, pre_activation, row_weights, config: MoEConfig, of_sums=2e-5
) -> None:
    """The three results for the rows that hold a token, the slopes of the activation being those that JAX finds.

    Sums, within `of_sums`, meet the rounding of the product to the dtype of the rows.
    """
    where, product = expected_matmul(rows, np.swapaxes(np.asarray(weights), 1, 2), groups)
    s = np.asarray(row_weights, np.float64)[where]
    with jax.enable_x64(True):
        h = jnp.asarray(np.asarray(pre_activation).astype(np.float64)[where])

        def apply(h):
            return config.act.apply_gated(*jnp.split(h, 2, axis=1)) if config.act.is_gated else config.act.apply(h)

        value, pull = jax.vjp(apply, h)
        back = np.asarray(pull(jnp.asarray(product * s[:, None]))[0])
        value = np.asarray(value)
    expected = back, value * s[:, None], np.sum(product * value, axis=1)
    for name, right in zip(found._fields, expected, strict=True):
        leaf = getattr(found, name)
        assert leaf.dtype == (jnp.float32 if name == "row_weights" else rows.dtype)
        tolerance = of_sums if name == "row_weights" else 1.5 * tolerance_of(rows)
        assert_discriminates(
            lambda y, right=right, limit=tolerance: check_close(y, right, limit), np.asarray(leaf)[where]
        )


def groups_of(seed, num_tokens, top_k, num_experts, tile_rows, *, only=None, missing=0.2) -> Groups:
    """Groups of random pairs, made by the plain-JAX form; `only` these experts are chosen, some slots have none."""
    rng = np.random.default_rng([seed, 31])
    ids = rng.choice(np.arange(num_experts) if only is None else only, (num_tokens, top_k))
    ids = np.where(rng.random(ids.shape) < missing, -1, ids)
    return _group(jnp.asarray(ids, jnp.int32), num_experts=num_experts, tile_rows=tile_rows, implementation="xla")


def groups_by_token(seed, num_tokens, tile_rows):
    """Groups that say the token of each row: all tokens, none, some and some others."""
    others = np.random.default_rng(seed).choice([-1, 2, 3], num_tokens)
    ids = jnp.asarray(np.stack([np.zeros_like(others), others], axis=1), jnp.int32)
    return group_tokens(ids, num_experts=4, tile_rows=tile_rows, row_tokens=True, implementation="mosaic_interpret")


def groups_with_sizes(seed, sizes, tile_rows) -> Groups:
    """Groups of these sizes, a pair a token."""
    ids = np.random.default_rng([seed, 33]).permutation(np.repeat(np.arange(len(sizes)), sizes))[:, None]
    return _group(jnp.asarray(ids, jnp.int32), num_experts=len(sizes), tile_rows=tile_rows, implementation="xla")


def rows_of(seed, groups: Groups, width, dtype):
    """Random rows for these groups, NaN where no token is."""
    rows = np.full((groups.num_rows, width), np.nan, np.float32)
    where = occupied_rows(groups)
    rows[where] = np.random.default_rng(np.hstack([seed, 32])).standard_normal((len(where), width))
    return jnp.asarray(rows, dtype)
