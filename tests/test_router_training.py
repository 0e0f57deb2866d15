"""Routers in training: gradients through the weights of every routing method, jitter, and capacity."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from moe_jax import MoEConfig, RoutingConfig, RoutingMethod, TopK, apply_experts, reference, route
from moe_jax.router_training import drop_over_capacity, expert_capacity, jitter
from tests.layers import experts_of, quick_jit, topk_of, x_of
from tests.oracles import RULES, E, bias_of, logits_of, special_logits
from tests.util import assert_discriminates, check_close

# --- gradients through the weights

OTHERS = {
    "minimax2_not_renormalised": (RoutingConfig("minimax2", renormalize=False), 4),
    "deepseek_v4_not_renormalised": (RoutingConfig("deepseek_v4", renormalize=False), 4),
}
RANDOM, TIES, SPECIAL = slice(0, 16), slice(16, 23), slice(23, 33)


def mixed_logits():
    """Tokens with distinct scores, tokens all of whose scores are there twice or more, and tokens with NaN and infinities."""
    logits = logits_of(21)
    logits[TIES] = np.repeat(logits[TIES, : E // 2], 2, axis=1)
    logits[TIES][0] = 0.5
    special = special_logits()[:10]
    special[9, [2, 9]] = -30.0
    logits[SPECIAL] = np.where(special == np.inf, 30.0, special)  # at +inf a slope has no meaning
    return logits


def gradients(config, bias):
    """Of a random mix of the weights with respect to the logits: ours, and the reference's."""
    mix = np.random.default_rng(0).standard_normal((33, config.top_k)).astype(np.float32)

    def total(router, logits):
        return jnp.sum(router(logits, config, correction_bias=bias).weights * mix)

    both = quick_jit(jax.grad(lambda mine, right: total(route, mine) + total(reference.route, right), argnums=(0, 1)))
    return map(np.asarray, both(jnp.asarray(mixed_logits()), jnp.asarray(mixed_logits())))


def test_every_top_k_method_is_here():
    others = {"hash", "custom", "simulated_uniform", "simulated_normal"}
    assert {routing.method.value for routing, _ in RULES.values()} == {m.value for m in RoutingMethod} - others


@pytest.mark.parametrize("name", [*RULES, *OTHERS])
def test_gradients_are_those_of_the_reference(name):
    routing, top_k = (RULES | OTHERS)[name]
    config = MoEConfig(E, top_k, 8, 8, routing=routing)
    bias = None if bias_of(3, config) is None else jnp.asarray(bias_of(3, config))
    mine, right = gradients(config, bias)
    logits = mixed_logits()
    assert_discriminates(lambda out: check_close(out, right[RANDOM], 3e-6), mine[RANDOM])
    check_close(mine[TIES], right[TIES], 3e-6)
    whole = np.isfinite(logits).all(axis=1)
    assert 1 <= whole[SPECIAL].sum() < 10
    check_close(mine[whole], right[whole], 3e-6)
    assert np.all(np.isfinite(mine)) and not np.any(mine[~np.isfinite(logits)]) and not np.any(mine[SPECIAL][:2])
    if config.routing.renormalizes:  # weights sum to a constant, and so a common factor of all scores is worth nothing
        total = jax.grad(lambda x: jnp.sum(route(x, config, correction_bias=bias).weights))
        assert np.max(np.abs(total(jnp.asarray(logits[RANDOM])))) < 1e-5 * np.max(np.abs(mine[RANDOM]))


def finite_differences(function, logits, step):
    numeric = np.zeros(logits.shape)
    for index in np.ndindex(logits.shape):
        shift = np.zeros(logits.shape, np.float32)
        shift[index] = step
        numeric[index] = (function(logits + shift) - function(logits - shift)) / (2 * step)
    return numeric


@pytest.mark.parametrize("name", ["hash", "custom"])
def test_gradients_of_methods_that_are_no_top_k_rule(name):
    logits = logits_of(24, 4, 8)
    if name == "hash":
        config = MoEConfig(8, 2, 8, 8, routing=RoutingConfig("hash"))
        more = {"input_ids": jnp.arange(4), "hash_indices_table": jnp.asarray([[0, 3], [5, 2], [7, -1], [1, 4]])}
    else:
        routing = RoutingConfig(
            "custom", custom_function=lambda _, logits, k, renormalize: jax.lax.top_k(jnp.tanh(logits), k)
        )
        config = MoEConfig(8, 2, 8, 8, routing=routing)
        more = {}
    mix = np.random.default_rng(1).standard_normal((4, 2)).astype(np.float32)

    def total(logits):
        return jnp.sum(route(logits, config, **more).weights * mix)

    forward = quick_jit(total)
    numeric = finite_differences(lambda x: float(forward(jnp.asarray(x))), logits, 1e-2)
    assert_discriminates(lambda out: check_close(out, numeric, 5e-3), quick_jit(jax.grad(total))(jnp.asarray(logits)))


@pytest.mark.parametrize("method", ["simulated_uniform", "simulated_normal"])
def test_simulated_routing_has_no_gradient(method):
    config = MoEConfig(8, 2, 8, 8, routing=RoutingConfig(method))
    run = jax.grad(lambda x: jnp.sum(route(x, config, key=jax.random.key(0)).weights ** 2))
    assert not np.any(np.asarray(run(jnp.ones((3, 8)))))


# --- jitter


def test_jitter_is_uniform_around_one_and_repeats():
    x = jnp.full((64, 64), 2.0)
    noisy = jitter(x, jax.random.key(1), 0.25) / 2
    assert 0.75 <= float(noisy.min()) < 0.76 and 1.24 < float(noisy.max()) <= 1.25
    assert abs(float(noisy.mean()) - 1) < 0.01 and abs(float(noisy.std()) - 0.25 / 3**0.5) < 0.005
    np.testing.assert_array_equal(jitter(x, jax.random.key(1), 0.25), 2 * noisy)
    assert np.any(np.asarray(jitter(x, jax.random.key(2), 0.25)) != np.asarray(2 * noisy))
    gradient = jax.grad(lambda x: jnp.sum(jitter(x, jax.random.key(1), 0.25)))(x)
    check_close(gradient, noisy, 1e-6)


def test_jitter_keeps_the_dtype_and_may_be_nothing():
    x = jnp.ones((2, 5), jnp.bfloat16)
    assert jitter(x, jax.random.key(0), 0.1).dtype == jnp.bfloat16
    assert jitter(x, jax.random.key(0), 0.0) is x
    with pytest.raises(ValueError, match=r"eps=1.0 must lie in \[0, 1\)"):
        jitter(x, jax.random.key(0), 1.0)


# --- capacity


def python_drop(ids, weights, num_experts, capacity, keep):
    """Pair by pair."""
    pairs = [(t, j) for t in range(ids.shape[0]) for j in range(ids.shape[1])]
    if keep == "weight":
        pairs.sort(key=lambda pair: -weights[pair])  # stable
    taken, kept = [0] * num_experts, set()
    for pair in pairs:
        expert = ids[pair]
        if 0 <= expert < num_experts and taken[expert] < capacity:
            taken[expert] += 1
            kept.add(pair)
    new_ids, new_weights = np.full(ids.shape, -1, np.int32), np.zeros(ids.shape, np.float32)
    for t in range(ids.shape[0]):
        for slot, j in enumerate(j for j in range(ids.shape[1]) if (t, j) in kept):
            new_ids[t, slot], new_weights[t, slot] = ids[t, j], weights[t, j]
    return new_ids, new_weights, int(np.sum((ids >= 0) & (ids < num_experts))) - len(kept)


@pytest.mark.parametrize("keep", ["order", "weight"])
@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=20)
def test_dropping(keep, data):
    tokens, num_experts, k = data.draw(st.sampled_from([(0, 4, 2), (1, 3, 2), (13, 5, 3), (32, 2, 1)]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    ids = np.argsort(rng.random((tokens, num_experts)) * rng.random(num_experts), axis=1)[:, :k].astype(np.int32)
    weights = -np.sort(-rng.choice([0.1, 0.2, 0.5, 0.7], ids.shape), axis=1).astype(np.float32)  # with ties
    empty = rng.random(ids.shape) < 0.2
    ids, weights = np.where(empty, -1, ids), np.where(empty, 0, weights).astype(np.float32)
    capacity = data.draw(st.integers(0, max(tokens, 1)))
    kept, dropped = drop_over_capacity(TopK(jnp.asarray(ids), jnp.asarray(weights)), num_experts, capacity, keep=keep)
    new_ids, new_weights, count = python_drop(ids, weights, num_experts, capacity, keep)
    np.testing.assert_array_equal(kept.ids, new_ids)
    np.testing.assert_array_equal(kept.weights, new_weights)
    assert int(dropped) == count and kept.ids.dtype == jnp.int32


def test_dropped_pairs_add_exactly_nothing_and_get_no_gradient():
    config = MoEConfig(4, 2, 16, 8, dtype="float32")
    topk = topk_of(0, config, 12)
    topk = topk._replace(ids=topk.ids.at[:, 0].set(jnp.where(topk.ids[:, 1] == 0, 1, 0)))  # most want expert 0
    x, experts = x_of(0, config, 12), experts_of(0, config)

    def loss(weights, drops):
        chosen = topk._replace(weights=weights)
        if drops:
            chosen, _ = drop_over_capacity(chosen, 4, 3)
        y = apply_experts(x, experts, chosen, config, implementation="xla")
        return jnp.sum(y**2), y

    run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    (_, out), gradient = run(topk.weights, True)
    ids, weights, count = python_drop(np.asarray(topk.ids), np.asarray(topk.weights), 4, 3, "order")
    assert 0 < count < 24
    expected = reference.apply_experts(x, experts, TopK(jnp.asarray(ids), jnp.asarray(weights)), config)
    check_close(out, expected, 2e-6)
    alone = np.all(ids < 0, axis=1)
    assert alone.any() and not np.any(np.asarray(out)[alone])
    kept = np.array([[expert in ids[t] for expert in row] for t, row in enumerate(np.asarray(topk.ids))])
    np.testing.assert_array_equal(np.asarray(gradient) != 0, kept)
    (_, whole), _ = run(topk.weights, False)
    assert np.any(np.asarray(whole)[alone])  # they had something to lose


def test_capacity():
    config = MoEConfig(8, 2, 8, 8)
    assert [expert_capacity(t, config, 1.25) for t in (0, 1, 16, 100)] == [0, 1, 5, 32]
    assert expert_capacity(10, config, 1e6) == 10  # no expert can get more pairs than there are tokens
    for factor in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="must be positive and finite; 1.25 is usual"):
            expert_capacity(10, config, factor)


def test_a_capacity_of_everything_drops_nothing():
    config = MoEConfig(4, 2, 8, 8)
    topk = topk_of(1, config, 9)
    for keep in ("order", "weight"):
        kept, dropped = drop_over_capacity(topk, 4, 9, keep=keep)
        np.testing.assert_array_equal(kept.ids, topk.ids)
        np.testing.assert_array_equal(kept.weights, topk.weights)
        assert int(dropped) == 0


def test_errors():
    topk = topk_of(1, MoEConfig(4, 2, 8, 8), 9)
    with pytest.raises(ValueError, match="keep='first' must be one of order, weight"):
        drop_over_capacity(topk, 4, 3, keep="first")
    with pytest.raises(ValueError, match="capacity=-1 must not be negative"):
        drop_over_capacity(topk, 4, -1)
