"""Balancing losses, bias and statistics: against formulas in plain Python, transformers, and finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from moe_jax import losses
from tests.layers import quick_jit
from tests.util import assert_discriminates, check_close, without_type_checks

T, E, K = 40, 6, 2
unchecked = without_type_checks("moe_jax.losses")


def value_and_grad(loss):
    """With respect to the logits; compiled, which is quicker than one operation after the other."""
    return quick_jit(jax.value_and_grad(loss))


def logits_of(seed, *shape):
    return (1.5 * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def ids_of(logits, k=K):
    return np.argsort(-logits, axis=-1, kind="stable")[..., :k].astype(np.int32)


def plain_probabilities(row, score):
    row = row.astype(np.float64)
    values = {
        "softmax": lambda: np.exp(row - row.max()),
        "sigmoid": lambda: 1 / (1 + np.exp(-row)),
        "sqrtsoftplus": lambda: np.sqrt(np.log1p(np.exp(row))),
    }[score]()
    return values / values.sum()


def plain_balance(logits, ids, score="softmax"):
    """Pair by pair, token by token, in float64."""
    experts = logits.shape[-1]
    counts, probabilities, tokens = np.zeros(experts), np.zeros(experts), 0
    for row, chosen in zip(logits, ids, strict=True):
        chosen = [expert for expert in chosen if expert >= 0]
        if chosen:
            tokens += 1
            probabilities += plain_probabilities(row, score)
            for expert in chosen:
                counts[expert] += 1
    return experts * np.sum(counts / counts.sum() * probabilities / tokens) if tokens else 0.0


def plain_z(logits):
    return np.mean(np.log(np.exp(logits.astype(np.float64)).sum(-1)) ** 2)


def finite_differences(function, logits, step=1e-5):
    gradient = np.zeros(logits.shape)
    for index in np.ndindex(logits.shape):
        shift = np.zeros(logits.shape)
        shift[index] = step
        gradient[index] = (function(logits + shift) - function(logits - shift)) / (2 * step)
    return gradient


# --- values and gradients


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("k", [1, 2, E])
def test_load_balancing(score, k):
    logits = logits_of(k, T, E)
    ids = ids_of(logits, k)
    ids[3] = -1  # padding
    ids[5, -1] = -1  # a slot without an expert
    loss = quick_jit(losses.load_balancing_loss, static_argnames="score")(
        jnp.asarray(logits), jnp.asarray(ids), score=score
    )
    check_close(loss, plain_balance(logits, ids, score), 1e-6)


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_gradient_of_load_balancing(score):
    logits = logits_of(7, 9, E)
    ids = ids_of(logits)
    ids[2] = -1
    loss = functools.partial(losses.load_balancing_loss, score=score)
    _, gradient = value_and_grad(loss)(jnp.asarray(logits), jnp.asarray(ids))
    numeric = finite_differences(lambda x: plain_balance(x, ids, score), logits)
    assert_discriminates(lambda out: check_close(out, numeric, 2e-5), gradient)
    assert not np.any(np.asarray(gradient)[2])


def test_it_is_one_when_balanced_and_as_many_as_experts_when_not():
    ids = np.arange(4 * E).reshape(-1, K) % E
    even = losses.load_balancing_loss(jnp.zeros((len(ids), E)), jnp.asarray(ids, jnp.int32))
    certain = jnp.asarray(np.eye(E, dtype=np.float32)[np.zeros(8, int)] * 90)
    worst = losses.load_balancing_loss(certain, jnp.zeros((8, 1), jnp.int32))
    check_close(jnp.stack([even, worst]), [1.0, E], 1e-6)


def test_load_balancing_is_that_of_transformers():
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    layers = [logits_of(seed, T, E) for seed in (1, 2)]
    stacked = np.concatenate(layers)  # transformers takes the loss over the tokens of all layers
    expected = modeling.load_balancing_loss_func(tuple(map(torch.tensor, layers)), E, K)
    loss = losses.load_balancing_loss(jnp.asarray(stacked), jnp.asarray(ids_of(stacked)))
    check_close(K * loss, float(expected), 1e-6)

    mask = np.ones((4, T // 4), np.int64)
    mask[1, 6:] = mask[3, 2:] = 0
    expected = modeling.load_balancing_loss_func(tuple(map(torch.tensor, layers)), E, K, torch.tensor(mask))
    ids = np.where(np.tile(mask.reshape(-1), 2)[:, None] == 1, ids_of(stacked), -1)
    check_close(K * losses.load_balancing_loss(jnp.asarray(stacked), jnp.asarray(ids)), float(expected), 1e-6)


def test_sequence_balance():
    logits = logits_of(11, 3, 10, E)
    ids = ids_of(logits)
    ids[0, 7:] = -1  # padding
    ids[2] = -1  # a sequence of nothing else
    wanted = np.mean([plain_balance(logits[b], ids[b], "sigmoid") for b in (0, 1)])
    loss, gradient = value_and_grad(losses.sequence_balance_loss)(jnp.asarray(logits), jnp.asarray(ids))
    check_close(loss, wanted, 1e-6)

    def mean(x):
        return np.mean([plain_balance(x[b], ids[b], "sigmoid") for b in (0, 1)])

    check_close(gradient, finite_differences(mean, logits), 2e-5)
    whole = losses.load_balancing_loss(
        jnp.asarray(logits.reshape(-1, E)), jnp.asarray(ids.reshape(-1, K)), score="sigmoid"
    )
    assert abs(float(whole) - float(loss)) > 1e-3  # balance of a sequence is not that of the batch


def test_router_z():
    logits = logits_of(13, 9, E)
    loss, gradient = value_and_grad(losses.router_z_loss)(jnp.asarray(logits))
    check_close(loss, plain_z(logits), 1e-6)
    assert_discriminates(lambda out: check_close(out, finite_differences(plain_z, logits), 1e-5), gradient)
    ids = ids_of(logits)
    ids[4] = -1
    check_close(losses.router_z_loss(jnp.asarray(logits), jnp.asarray(ids)), plain_z(np.delete(logits, 4, 0)), 1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_arithmetic_is_float32(dtype):
    logits = jnp.asarray(logits_of(14, T, E), dtype)
    exact = np.asarray(logits, np.float32)
    ids = ids_of(exact)
    check_close(losses.load_balancing_loss(logits, jnp.asarray(ids)), plain_balance(exact, ids), 1e-6)
    check_close(losses.router_z_loss(logits), plain_z(exact), 1e-6)
    assert losses.router_z_loss(logits).dtype == jnp.float32


# --- garbage and nothing


LOSSES = {
    "softmax": losses.load_balancing_loss,
    "sigmoid": functools.partial(losses.load_balancing_loss, score="sigmoid"),
    "sqrtsoftplus": functools.partial(losses.load_balancing_loss, score="sqrtsoftplus"),
    "sequence": lambda logits, ids: losses.sequence_balance_loss(logits[None], ids[None]),
    "z": losses.router_z_loss,
}


@pytest.mark.parametrize("name", LOSSES)
def test_garbage_of_padding_reaches_neither_loss_nor_gradient(name):
    logits = logits_of(15, 8, E)
    ids = ids_of(logits)
    clean = value_and_grad(LOSSES[name])(jnp.asarray(logits[:6]), jnp.asarray(ids[:6]))
    logits[6], logits[7] = np.nan, np.inf
    ids[6:] = -1
    loss, gradient = value_and_grad(LOSSES[name])(jnp.asarray(logits), jnp.asarray(ids))
    check_close(loss, clean[0], 1e-6)
    check_close(gradient[:6], clean[1], 1e-6)
    assert not np.any(np.asarray(gradient[6:]))


@pytest.mark.parametrize("name", LOSSES)
def test_an_expert_that_cannot_be_chosen_counts_as_probability_zero(name):
    logits = logits_of(16, 8, E)
    without = value_and_grad(LOSSES[name])(jnp.asarray(logits[:, 1:]), jnp.asarray(ids_of(logits[:, 1:])))
    logits[:, 0] = np.nan
    logits[3, 0] = -np.inf
    ids = ids_of(logits[:, 1:]) + 1
    loss, gradient = value_and_grad(LOSSES[name])(jnp.asarray(logits), jnp.asarray(ids, jnp.int32))
    scale = 1.0 if name == "z" else E / (E - 1)  # the number of experts is a factor
    check_close(loss, scale * without[0], 1e-6)
    check_close(gradient[:, 1:], scale * without[1], 1e-5)
    assert not np.any(np.asarray(gradient[:, 0]))


@pytest.mark.parametrize("tokens", [0, 3])
@pytest.mark.parametrize("name", LOSSES)
def test_no_token_has_no_loss(name, tokens):
    logits, ids = jnp.full((tokens, E), jnp.nan), jnp.full((tokens, K), -1)
    loss, gradient = value_and_grad(LOSSES[name])(logits, ids)
    assert float(loss) == 0.0 and not np.any(np.asarray(gradient))
    assert losses.expert_loads(ids, E).tolist() == [0] * E
    stats = losses.load_statistics(losses.expert_loads(ids, E))
    assert [float(value) for value in stats[1:]] == [0.0] * 4


# --- the global batch


@pytest.mark.parametrize("padded", [False, True], ids=["equal ranks", "ranks of different sizes"])
def test_the_mean_over_ranks_is_the_loss_of_the_global_batch(padded):
    logits = jnp.asarray(logits_of(17, T, E))
    ids = ids_of(np.asarray(logits))
    if padded:
        ids[: T // 4 - 2] = -1  # the first rank has two tokens
    ids = jnp.asarray(ids)
    mesh = jax.make_mesh((4,), ("dp",), axis_types=(AxisType.Auto,))

    def of_ranks(loss):
        def rank(logits, ids):
            value, gradient = jax.value_and_grad(loss)(logits, ids)
            # A rank's logits are in its own loss alone, of which the mean takes a quarter.
            return jax.lax.pmean(value, "dp"), gradient / 4

        return quick_jit(
            jax.shard_map(rank, mesh=mesh, in_specs=(P("dp"), P("dp")), out_specs=(P(), P("dp")), check_vma=False)
        )(logits, ids)

    expected, gradient = value_and_grad(losses.load_balancing_loss)(logits, ids)
    found, mine = of_ranks(functools.partial(losses.load_balancing_loss, axis_name="dp"))
    check_close(found, expected, 1e-6)
    check_close(mine, gradient, 1e-6)
    local, _ = of_ranks(losses.load_balancing_loss)
    assert abs(float(local) - float(expected)) > 1e-3  # balance of every rank is more than balance of all

    count = jax.shard_map(
        lambda ids: losses.expert_loads(ids, E, axis_name="dp"),
        mesh=mesh,
        in_specs=P("dp"),
        out_specs=P(),
        check_vma=False,
    )
    np.testing.assert_array_equal(quick_jit(count)(ids), losses.expert_loads(ids, E))


# --- bias and statistics


def test_the_bias_falls_for_overloaded_experts():
    bias = jnp.asarray([[0.1, 0.2, 0.3], [0.0, 0.0, 0.0]])
    loads = jnp.asarray([[5, 1, 3], [2, 2, 2]])
    check_close(losses.update_correction_bias(bias, loads, 0.01), [[0.09, 0.21, 0.3], [0.0, 0.0, 0.0]], 1e-6)


def test_statistics():
    stats = losses.load_statistics(jnp.asarray([6, 0, 2, 0]), num_dropped=jnp.asarray(2))
    share = np.array([0.75, 0.25])
    expected = [2.0, 1.0, -np.sum(share * np.log(share)) / np.log(4), 0.25]
    check_close(jnp.stack(stats[1:]), expected, 1e-6)
    alone = losses.load_statistics(jnp.asarray([5]))
    assert [float(value) for value in alone[1:]] == [0.0, 0.0, 1.0, 0.0]


def test_loads_ignore_what_is_no_expert():
    ids = jnp.asarray([[[0, -1], [E, 3]], [[3, -7], [3, 5]]])
    assert losses.expert_loads(ids, E).tolist() == [1, 0, 0, 3, 0, 1]


# --- errors


def test_errors():
    logits, ids = jnp.zeros((4, E)), jnp.zeros((4, K), jnp.int32)
    with pytest.raises(ValueError, match="score='tanh' must be one of softmax, sigmoid, sqrtsoftplus"):
        losses.load_balancing_loss(logits, ids, score="tanh")
    with pytest.raises(ValueError, match=r"\(4, 6\) and topk_ids \(3, 2\) must be of the same tokens"):
        unchecked.load_balancing_loss(logits, ids[:3])
    with pytest.raises(ValueError, match=r"must be \[B, S, E\] and \[B, S, k\]: keep the axis"):
        unchecked.sequence_balance_loss(logits, ids)
