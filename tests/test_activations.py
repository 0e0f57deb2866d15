"""Activations against formulas in float64, their gradients, and where float32 overflows."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.activations import ACTIVATIONS, ALIASES, Activation, canonical_name, get_activation
from tests.oracles import gated, pointwise, sigmoid
from tests.util import assert_discriminates, check_close

GATED = [name for name in ACTIVATIONS if not name.endswith("_no_mul")]
UNGATED = [name for name in ACTIVATIONS if name.endswith("_no_mul")]


def rows(seed, shape=(37, 64), spread=4.0):
    return (spread * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gated(name, seed):
    h = rows(seed)
    gate, up = np.split(h.astype(np.float64), 2, axis=-1)
    expected = gated(name, gate, up)
    assert_discriminates(lambda out: check_close(out, expected, 1e-6), get_activation(name)(jnp.asarray(h)))


@pytest.mark.parametrize("name", UNGATED)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ungated(name, seed):
    h = rows(seed)
    expected = pointwise(name.removesuffix("_no_mul"), h.astype(np.float64))
    assert_discriminates(lambda out: check_close(out, expected, 1e-6), get_activation(name)(jnp.asarray(h)))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("silu", {"limit": 2.0}),
        ("silu", {"alpha": 1.5}),
        ("silu", {"beta": 0.5}),
        ("silu", {"alpha": 1.702, "beta": 1.0, "limit": 7.0}),
        ("swigluoai", {"limit": 3.0}),
        ("swigluoai", {"alpha": 1.0, "beta": 0.25}),
        ("swiglustep", {"limit": 2.0}),
    ],
)
def test_parameters_count(name, parameters):
    h = rows(3)
    gate, up = np.split(h.astype(np.float64), 2, axis=-1)
    expected = gated(name, gate, up, **parameters)
    assert_discriminates(
        lambda out: check_close(out, expected, 1e-6), get_activation(name, **parameters)(jnp.asarray(h))
    )
    with pytest.raises(AssertionError):
        check_close(get_activation(name)(jnp.asarray(h)), expected, 1e-2)


def test_swigluoai_is_silu_with_its_parameters():
    assert get_activation("swigluoai") == Activation("swigluoai", alpha=1.702, beta=1.0, limit=7.0)
    h = jnp.asarray(rows(4))
    spelled_out = get_activation("silu", alpha=1.702, beta=1.0, limit=7.0)
    np.testing.assert_array_equal(get_activation("swigluoai")(h), spelled_out(h))


def test_an_infinite_limit_is_no_clamp():
    act = get_activation("swigluoai", limit=math.inf)
    assert act.limit is None
    assert float(act.apply_gated(jnp.float32(20.0), jnp.float32(30.0))) == pytest.approx(20.0 * 31.0)


def test_gate_is_clamped_from_above_only():
    act = get_activation("silu", limit=1.0)
    low = act.apply_gated(jnp.float32(-3.0), jnp.float32(5.0))
    assert float(low) == pytest.approx(float(-3.0 * sigmoid(np.float64(-3.0))), rel=1e-6)


def test_gate_is_the_first_half():
    h = jnp.array([[-5.0, 3.0]])
    assert get_activation("relu2")(h).tolist() == [[0.0]]
    assert get_activation("relu2")(h[:, ::-1]).tolist() == [[-45.0]]


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_rows_keep_their_dtype_and_are_computed_in_float32(name, dtype):
    h = jnp.asarray(rows(5, spread=1.0)).astype(dtype)
    act = get_activation(name)
    out = act(h)
    assert out.dtype == dtype
    np.testing.assert_array_equal(out, act(h.astype(jnp.float32)).astype(dtype))


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(0, 8), (1, 8), (3, 0), (2, 3, 8), (8,)])
def test_any_leading_shape(name, shape):
    act = get_activation(name)
    out = act(jnp.ones(shape))
    assert out.shape == (*shape[:-1], shape[-1] // 2 if act.is_gated else shape[-1])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_large_values_stay_finite_with_finite_gradients(name):
    act = get_activation(name)
    values = np.array([-1e4, -200.0, -104.0, -89.0, -88.0, -87.0, -20.0, 0.0, 20.0, 89.0, 200.0, 1e4], np.float32)
    # Half gate, half up; un-gated activations see the same numbers.
    h = jnp.asarray(np.stack([np.concatenate([values, values]), np.concatenate([values, values[::-1]])]))
    value, gradient = jax.value_and_grad(lambda h: jnp.sum(act(h)))(h)
    assert np.isfinite(value) and np.all(np.isfinite(gradient))
    far_left = (
        act.apply(jnp.float32(-200.0)) if not act.is_gated else act.apply_gated(jnp.float32(-200.0), jnp.float32(1))
    )
    assert abs(float(far_left)) < 1e-30


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradient(name):
    act = get_activation(name)
    h = rows(6, (5, 16), spread=1.5)
    analytic = jax.grad(lambda h: jnp.sum(act(h)))(jnp.asarray(h))

    def total(h64):
        if not act.is_gated:
            return pointwise(name.removesuffix("_no_mul"), h64).sum()
        gate, up = np.split(h64, 2, axis=-1)
        return gated(name, gate, up).sum()

    numeric = np.zeros(h.shape)
    step = 1e-5
    for index in np.ndindex(h.shape):
        shift = np.zeros(h.shape)
        shift[index] = step
        h64 = h.astype(np.float64)
        numeric[index] = (total(h64 + shift) - total(h64 - shift)) / (2 * step)
    assert_discriminates(lambda out: check_close(out, numeric, 1e-5), analytic)


@pytest.mark.parametrize("name", GATED)
def test_odd_in_up_without_a_shift(name):
    act = get_activation(name, beta=0.0) if name == "swigluoai" else get_activation(name)
    gate, up = jnp.asarray(rows(7, spread=20.0)), jnp.asarray(rows(8, spread=20.0))
    np.testing.assert_array_equal(act.apply_gated(gate, -up), -act.apply_gated(gate, up))


def test_nan_goes_through():
    for name in GATED:
        assert np.isnan(get_activation(name).apply_gated(jnp.float32(np.nan), jnp.float32(1.0)))


def test_aliases():
    for alias, name in ALIASES.items():
        assert canonical_name(alias) == name
        assert get_activation(alias) == get_activation(name)


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="'softmax' is not one of silu, .*relu2_no_mul"):
        get_activation("softmax")


def test_gated_and_ungated_do_not_mix():
    with pytest.raises(ValueError, match="use apply"):
        get_activation("silu_no_mul").apply_gated(jnp.ones(2), jnp.ones(2))
    with pytest.raises(ValueError, match="use apply_gated"):
        get_activation("silu").apply(jnp.ones(2))


def test_odd_rows_are_refused():
    with pytest.raises(ValueError, match=r"even width; got shape \(2, 7\)"):
        get_activation("silu")(jnp.ones((2, 7)))


def test_parameters_that_do_not_belong_are_refused():
    with pytest.raises(ValueError, match="swiglu_beta=1.0 has no meaning for activation='relu2'"):
        get_activation("relu2", beta=1.0)
    with pytest.raises(ValueError, match="swiglu_limit=0.0 must be positive"):
        get_activation("silu", limit=0.0)
    with pytest.raises(ValueError, match="swiglu_limit=nan"):
        get_activation("silu", limit=math.nan)


LIMITED = [
    ("silu", {}),
    ("silu", {"limit": 2.0, "alpha": 1.5, "beta": 0.5}),
    ("swigluoai", {}),
    ("swiglustep", {"limit": 2.0}),
]


@pytest.mark.parametrize(
    ("name", "parameters"), LIMITED + [(name, {}) for name in GATED if "gelu" in name or "relu" in name]
)
def test_slopes_of_gate_and_up(name, parameters):
    """Those that JAX finds, where the clamps meet their limits too."""
    act = get_activation(name, **parameters)
    special = np.array([0.0, -2.0, 2.0, 7.0, -7.0, 60.0, -60.0, 1e-3], np.float32)
    gate, up = (jnp.asarray(np.concatenate([rows(seed, (500,)), special])) for seed in (1, 2))
    up = up.at[-8:].set(up[-8:][::-1])
    value, *slopes = act.slopes_gated(gate, up)
    check_close(value, act.apply_gated(gate, up), 1e-6)
    expected = jax.vmap(jax.grad(act.apply_gated, argnums=(0, 1)))(gate, up)
    for mine, right in zip(slopes, expected, strict=True):
        assert_discriminates(lambda out, right=right: check_close(out, right, 1e-6), mine)


@pytest.mark.parametrize("name", UNGATED)
def test_slope(name):
    act, x = get_activation(name), jnp.asarray(np.concatenate([rows(3, (500,)), [0.0, 60.0, -60.0]]), jnp.float32)
    value, slope = act.slope(x)
    check_close(value, act.apply(x), 1e-6)
    expected = jax.vmap(jax.grad(act.apply))(x)
    assert_discriminates(lambda out: check_close(out, expected, 1e-6), slope)


def test_slopes_are_of_the_right_kind():
    with pytest.raises(ValueError, match="is gated; use slopes_gated"):
        get_activation("silu").slope(jnp.float32(1.0))
    with pytest.raises(ValueError, match="has no gate; use slope"):
        get_activation("silu_no_mul").slopes_gated(jnp.float32(1.0), jnp.float32(1.0))
