"""Routers for `RoutingConfig(method="custom")`, against their definition in plain Python."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import MoEConfig, RoutingConfig
from moe_jax.routers import SparseMixer
from moe_jax.routing import route


def layer(num_experts: int, eps: float, top_k: int = 2) -> MoEConfig:
    routing = RoutingConfig("custom", renormalize=False, custom_function=SparseMixer(eps))
    return MoEConfig(num_experts, top_k, 64, 32, routing=routing)


def sparsemixer(scores: np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """Sparsemixer at inference, token by token, in plain Python."""
    ids, weights = [], []
    for row in scores.astype(np.float64):
        chosen, kept = [], []
        for _ in range(2):
            rest = [e for e in range(len(row)) if e not in chosen]
            best = max(rest, key=lambda e: row[e])
            near = [e for e in rest if (row[best] - row[e]) / max(abs(row[e]), row[best]) <= 2 * eps]
            kept.append(1 / sum(np.exp(row[e] - row[best]) for e in near))
            chosen.append(best)
        order = sorted(range(2), key=lambda slot: (-kept[slot], chosen[slot]))
        ids.append([chosen[slot] for slot in order])
        weights.append([kept[slot] for slot in order])
    return np.array(ids), np.array(weights)


@pytest.mark.parametrize("eps", [0.01, 0.2, 0.9])
def test_sparsemixer(eps):
    config = layer(16, eps)
    logits = np.random.default_rng(0).normal(size=(200, 16)).astype(np.float32)
    topk = route(jnp.asarray(logits), config)
    ids, weights = sparsemixer(logits, eps)
    np.testing.assert_array_equal(topk.ids, ids)
    np.testing.assert_allclose(topk.weights, weights, rtol=1e-6)


def test_sparsemixer_never_selects_nan_or_minus_infinity():
    config = layer(3, 0.01)
    logits = [[np.nan, 1, 2], [-np.inf, np.nan, 5], [np.nan] * 3, [np.inf, 0, -np.inf], [0, 0, 0]]
    topk = route(jnp.array(logits, jnp.float32), config)
    assert topk.ids.tolist() == [[1, 2], [2, -1], [-1, -1], [0, 1], [1, 0]]
    np.testing.assert_allclose(topk.weights, [[1, 1], [1, 0], [0, 0], [1, 1], [1 / 2, 1 / 3]])


def test_sparsemixer_errors():
    with pytest.raises(ValueError, match="top_k=4 must be 2 for sparsemixer"):
        route(jnp.zeros((1, 16)), layer(16, 0.01, top_k=4))
    with pytest.raises(ValueError, match="jitter_eps=-1.0 must be finite and not negative"):
        SparseMixer(-1.0)


def test_sparsemixer_renormalises_when_told():
    weights, _ = SparseMixer(0.4)(None, jnp.array([[1.0, 0.9, 0.5, -3.0]]), 2, renormalize=True)
    plain, _ = SparseMixer(0.4)(None, jnp.array([[1.0, 0.9, 0.5, -3.0]]), 2, renormalize=False)
    assert abs(float(weights.sum()) - 1) < 1e-6 < abs(float(plain.sum()) - 1)
    np.testing.assert_allclose(weights, plain / plain.sum(), rtol=1e-6)
    nothing, ids = SparseMixer()(None, jnp.full((1, 4), jnp.nan), 2, renormalize=True)
    assert nothing.tolist() == [[0, 0]] and ids.tolist() == [[-1, -1]]
