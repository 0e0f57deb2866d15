"""Routing that is no top-k rule: hash tables, custom functions and simulated loads."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import MoEConfig, RoutingConfig
from moe_jax.routing import route
from tests.util import assert_discriminates, check_close, without_type_checks

E, K, VOCABULARY = 12, 3, 40
unchecked = without_type_checks("moe_jax.routing")


def config_of(method, top_k=K, **routing):
    return MoEConfig(E, top_k, 8, 8, routing=RoutingConfig(method, **routing))


def rng(seed):
    return np.random.default_rng(seed)


def logits_of(seed, num_tokens=29):
    return jnp.asarray(2.0 * rng(seed).standard_normal((num_tokens, E)).astype(np.float32))


def assert_sorted(topk):
    ids, weights = np.asarray(topk.ids), np.asarray(topk.weights)
    assert topk.ids.dtype == jnp.int32 and topk.weights.dtype == jnp.float32
    assert np.all(np.isfinite(weights))
    np.testing.assert_array_equal(weights[ids == -1], 0.0)
    key = np.where(ids == -1, -np.inf, weights)
    assert np.all(key[:, :-1] >= key[:, 1:])
    same = (key[:, :-1] == key[:, 1:]) & (ids[:, 1:] >= 0)
    assert np.all(ids[:, :-1][same] <= ids[:, 1:][same])


# --- hash


def table_of(seed, top_k=K):
    return jnp.asarray(
        np.stack([rng(seed).permutation(E)[:top_k] for seed in range(seed, seed + VOCABULARY)]), jnp.int32
    )


def python_hash(logits, input_ids, table, config):
    ids = np.full((len(logits), config.top_k), -1)
    weights = np.zeros(ids.shape)
    for token, word in enumerate(np.asarray(input_ids).tolist()):
        if not 0 <= word < len(table):
            continue
        slots = []
        for expert in np.asarray(table)[word].tolist():
            if 0 <= expert < E and not math.isnan(logits[token, expert]) and logits[token, expert] > -math.inf:
                x = float(logits[token, expert])
                slots.append((math.sqrt(max(x, 0.0) + math.log1p(math.exp(-abs(x)))), expert))
        total = sum(w for w, _ in slots) if config.routing.renormalizes else 1.0
        for slot, (weight, expert) in enumerate(sorted(slots, key=lambda s: (-s[0], s[1]))):
            ids[token, slot], weights[token, slot] = expert, weight / total * config.routing.routed_scaling_factor
    return ids, weights


@pytest.mark.parametrize("routing", [{}, {"renormalize": False}, {"routed_scaling_factor": 1.5}])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_hash(routing, seed):
    config = config_of("hash", **routing)
    logits, table = logits_of(seed), table_of(seed)
    input_ids = jnp.asarray(rng(seed).integers(0, VOCABULARY, 29))
    topk = jax.jit(lambda *a: route(a[0], config, input_ids=a[1], hash_indices_table=a[2]))(logits, input_ids, table)
    ids, weights = python_hash(logits, input_ids, table, config)
    np.testing.assert_array_equal(topk.ids, ids)
    assert_discriminates(lambda out: check_close(out, weights, 2e-6), topk.weights)
    assert_sorted(topk)


def test_hash_ids_do_not_depend_on_the_logits():
    config, table = config_of("hash"), table_of(3)
    input_ids = jnp.arange(29)
    one, other = (route(logits_of(seed), config, input_ids=input_ids, hash_indices_table=table) for seed in (0, 1))
    np.testing.assert_array_equal(np.sort(one.ids), np.sort(other.ids))
    np.testing.assert_array_equal(np.sort(one.ids), np.sort(np.asarray(table)[:29]))


def test_hash_ids_out_of_range_and_logits_not_finite():
    config, table = config_of("hash"), np.array(table_of(4))
    table[0] = [-1, 3, E]
    table[1] = [-1, -1, -1]
    table[2] = [2, 5, 7]
    table[3] = [6, 6, 1]
    logits = np.array(logits_of(5, 8))
    logits[2, [2, 5]] = math.nan, -math.inf
    logits[4, :] = math.nan
    logits[5, :] = -1e4
    input_ids = jnp.array([0, 1, 2, 3, 4, 5, -1, VOCABULARY])
    topk = route(jnp.asarray(logits), config, input_ids=input_ids, hash_indices_table=jnp.asarray(table))
    ids, weights = python_hash(logits[:5], input_ids[:5], table, config)
    np.testing.assert_array_equal(topk.ids[:5], ids)
    check_close(topk.weights[:5], weights, 2e-6)
    assert topk.ids[6:].tolist() == [[-1] * K] * 2
    assert topk.ids[0].tolist() == [3, -1, -1] and topk.ids[2].tolist() == [7, -1, -1]
    assert topk.ids[3].tolist().count(6) == 2
    assert topk.ids[4].tolist() == [-1] * K
    assert topk.weights[5].tolist() == [0.0] * K and sorted(topk.ids[5].tolist()) == sorted(table[5].tolist())
    assert_sorted(topk)


def test_hash_infinite_logit_counts_as_the_largest_number():
    topk = route(
        jnp.zeros((1, E)).at[0, 1].set(jnp.inf),
        config_of("hash"),
        input_ids=jnp.array([0]),
        hash_indices_table=jnp.array([[0, 1, 2]]),
    )
    assert topk.ids.tolist() == [[1, 0, 2]]
    assert topk.weights[0].tolist() == pytest.approx([1.0, 0.0, 0.0])


def test_hash_gradients_are_finite_where_scores_underflow():
    config, table = config_of("hash", renormalize=False), table_of(6)
    total = lambda x: route(x, config, input_ids=jnp.arange(2), hash_indices_table=table).weights.sum()  # noqa: E731
    gradient = jax.grad(total)(jnp.full((2, E), -200.0).at[1].set(1.0))
    assert np.all(np.isfinite(gradient)) and np.count_nonzero(gradient) == K


def test_hash_needs_its_arguments():
    config, logits, table = config_of("hash"), jnp.zeros((2, E)), table_of(0)
    with pytest.raises(ValueError, match="hash_indices_table is missing"):
        unchecked.route(logits, config, input_ids=jnp.zeros(2, int))
    with pytest.raises(ValueError, match=r"input_ids is missing.*integer \[2\]"):
        unchecked.route(logits, config, hash_indices_table=table)
    with pytest.raises(ValueError, match=r"hash_indices_table of shape \(40, 2\) must be \[any, 3\]"):
        unchecked.route(logits, config, input_ids=jnp.zeros(2, int), hash_indices_table=table[:, :2])
    with pytest.raises(ValueError, match=r"input_ids of shape \(3,\) must be \[2\]"):
        unchecked.route(logits, config, input_ids=jnp.zeros(3, int), hash_indices_table=table)
    with pytest.raises(TypeError, match="input_ids is float32; it must be integer"):
        unchecked.route(logits, config, input_ids=jnp.zeros(2), hash_indices_table=table)
    with pytest.raises(ValueError, match="correction_bias is not used by routing method 'hash'"):
        unchecked.route(
            logits, config, input_ids=jnp.zeros(2, int), hash_indices_table=table, correction_bias=jnp.zeros(E)
        )
    with pytest.raises(ValueError, match="hash_indices_table is not used by routing method 'default'"):
        unchecked.route(logits, config_of("default"), hash_indices_table=table)


# --- custom


def by_hidden_state(hidden_states, router_logits, top_k, renormalize):
    """The experts that follow the largest hidden channel; unsorted weights 1, 2, ..."""
    first = jnp.argmax(hidden_states, axis=-1)
    ids = (first[:, None] + jnp.arange(top_k)[None, :]) % router_logits.shape[-1]
    weights = jnp.broadcast_to(1.0 + jnp.arange(top_k)[None, :], ids.shape)
    return (weights / weights.sum(axis=-1, keepdims=True) if renormalize else weights).astype(jnp.bfloat16), ids


@pytest.mark.parametrize("renormalize", [None, False])
def test_custom(renormalize):
    config = config_of("custom", custom_function=by_hidden_state, renormalize=renormalize, routed_scaling_factor=2.0)
    hidden = jnp.asarray(rng(0).standard_normal((29, 8)), jnp.float32)
    topk = jax.jit(lambda logits, x: route(logits, config, hidden_states=x))(logits_of(0), hidden)
    first = np.argmax(np.asarray(hidden), axis=-1)
    np.testing.assert_array_equal(topk.ids, (first[:, None] + np.arange(K)[::-1]) % E)  # sorted: the last weighs most
    weights = np.array([3.0, 2.0, 1.0]) if renormalize is False else np.array([3.0, 2.0, 1.0]) / 6.0
    check_close(topk.weights, np.tile(2.0 * weights, (29, 1)), 4e-3)  # the function returns bfloat16
    assert_sorted(topk)


def test_custom_sees_rounded_logits_and_may_do_without_hidden_states():
    seen = []

    def function(hidden_states, router_logits, top_k, renormalize):
        seen.append((hidden_states, router_logits, top_k, renormalize))
        return jax.lax.top_k(router_logits, top_k)

    config = config_of("custom", custom_function=function, router_logits_dtype="bfloat16")
    logits = logits_of(1)
    topk = route(logits, config)
    hidden_states, router_logits, top_k, renormalize = seen[0]
    assert (hidden_states, top_k, renormalize) == (None, K, True)
    np.testing.assert_array_equal(router_logits, logits.astype(jnp.bfloat16))
    np.testing.assert_array_equal(topk.weights, jax.lax.top_k(logits.astype(jnp.bfloat16), K)[0].astype(jnp.float32))


def test_custom_results_out_of_range_or_not_finite_are_no_expert():
    def function(hidden_states, router_logits, top_k, renormalize):
        ids = jnp.array([[0, -1, E], [3, 4, 5], [1, 2, 3]])
        return jnp.array([[0.1, 0.9, 0.9], [jnp.nan, 0.2, jnp.inf], [-0.5, 0.0, 0.5]]), ids

    topk = route(jnp.zeros((3, E)), config_of("custom", custom_function=function))
    assert topk.ids.tolist() == [[0, -1, -1], [4, -1, -1], [3, 2, 1]]
    np.testing.assert_allclose(topk.weights, [[0.1, 0, 0], [0.2, 0, 0], [0.5, 0.0, -0.5]])


@pytest.mark.parametrize(
    ("result", "error", "match"),
    [
        (None, TypeError, r"must return \(weights, ids\), got NoneType"),
        ((jnp.zeros((2, K)),), TypeError, r"must return \(weights, ids\)"),
        ((jnp.zeros((2, K), int), jnp.zeros((2, K))), TypeError, r"result 0 .*the weights.* is int32"),
        ((jnp.zeros((2, K)), jnp.zeros((2, K))), TypeError, r"result 1 .*the ids.* is float32"),
        (
            (jnp.zeros((2, K + 1)), jnp.zeros((2, K), int)),
            ValueError,
            r"the weights.* of shape \(2, 4\) must be \[2, 3\]",
        ),
        ((jnp.zeros((2, K)), jnp.zeros((K, 2), int)), ValueError, r"the ids.* of shape \(3, 2\) must be \[2, 3\]"),
    ],
)
def test_custom_results_are_checked(result, error, match):
    config = config_of("custom", custom_function=lambda *_: result)
    with pytest.raises(error, match=match):
        unchecked.route(jnp.zeros((2, E)), config)


def test_custom_hidden_states_must_have_a_row_per_token():
    config = config_of("custom", custom_function=by_hidden_state)
    with pytest.raises(ValueError, match=r"hidden_states of shape \(3, 8\) must be \[2, any\]"):
        unchecked.route(jnp.zeros((2, E)), config, hidden_states=jnp.zeros((3, 8)))


# --- simulated


@pytest.mark.parametrize("top_k", [1, K, E])
def test_simulated_uniform(top_k):
    config = config_of("simulated_uniform", top_k, routed_scaling_factor=0.5)
    num_tokens = 2000
    topk = jax.jit(lambda key: route(jnp.zeros((num_tokens, E)), config, key=key))(jax.random.key(0))
    ids = np.asarray(topk.ids)
    assert all(len(set(row)) == top_k for row in ids.tolist())
    np.testing.assert_array_equal(topk.weights, 0.5)
    load = np.bincount(ids.ravel(), minlength=E)
    expected = num_tokens * top_k / E
    assert load.shape == (E,) and np.all(np.abs(load - expected) <= 5 * math.sqrt(expected))
    assert_sorted(topk)


def test_simulated_normal():
    config = config_of("simulated_normal", routed_scaling_factor=2.0)
    num_tokens = 4000
    topk = route(jnp.zeros((num_tokens, E)), config, key=jax.random.key(1))
    np.testing.assert_allclose(np.asarray(topk.weights).sum(axis=1), 2.0, rtol=1e-6)
    load = np.bincount(np.asarray(topk.ids).ravel(), minlength=E) / (num_tokens * K)
    edges = np.arange(1, E) / E
    below = np.array([0.5 * math.erfc(-math.log(p / (1 - p)) / math.sqrt(2)) for p in edges])  # P(sigmoid(N) < p)
    np.testing.assert_allclose(load, np.diff(np.concatenate([[0.0], below, [1.0]])), atol=0.015)
    assert load[E // 2] > 2 * load[0]
    assert_sorted(topk)


@pytest.mark.parametrize("method", ["simulated_uniform", "simulated_normal"])
def test_simulated_is_a_function_of_the_key(method):
    config, logits = config_of(method), jnp.zeros((64, E))
    first, again, other = (route(logits, config, key=jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.ids, again.ids)
    assert np.any(np.asarray(first.ids) != np.asarray(other.ids))
    old_style = route(logits, config, key=jax.random.PRNGKey(0))
    np.testing.assert_array_equal(old_style.ids, first.ids)
    with pytest.raises(ValueError, match=f"key is missing: routing method '{method}'"):
        unchecked.route(logits, config)


@pytest.mark.parametrize("method", ["hash", "custom", "simulated_uniform", "simulated_normal"])
@pytest.mark.parametrize("num_tokens", [0, 1])
def test_no_token_and_one_token(method, num_tokens):
    function = by_hidden_state if method == "custom" else None
    topk = route(
        jnp.zeros((num_tokens, E)),
        config_of(method, custom_function=function),
        hidden_states=jnp.ones((num_tokens, 8)),
        input_ids=jnp.zeros(num_tokens, jnp.int32),
        hash_indices_table=table_of(0) if method == "hash" else None,
        key=jax.random.key(0),
    )
    assert topk.ids.shape == topk.weights.shape == (num_tokens, K)
    assert_sorted(topk)
    assert np.all(np.asarray(topk.weights).sum(axis=-1) > 0)
