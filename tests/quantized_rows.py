"""What gathering and quantizing promises, as a check against the NumPy oracle of quantization; and hard rows."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from moe_jax.quantization import Spec
from moe_jax.quantization.rows import QuantizedRows
from tests.quantization import oracle

SPECS = {
    "fp8 group": Spec("float8_e4m3fn", "group", 128),
    "fp8 group ue8m0": Spec("float8_e4m3fn", "group", 128, "float8_e8m0fnu"),
    "fp8 group of 32": Spec("float8_e4m3fn", "group", 32),
    "fp8 token": Spec("float8_e4m3fn", "token"),
    "fp8 tensor": Spec("float8_e4m3fn", "tensor"),
    "int8 group": Spec("int8", "group", 64),
    "int8 token": Spec("int8", "token"),
    "int8 tensor": Spec("int8", "tensor"),
}
OF_ROWS = [name for name, spec in SPECS.items() if spec.granularity != "tensor"]
KINDS = 10  # of rows


def hard_rows(seed, num_tokens, hidden, dtype, kinds=range(KINDS)):
    """Rows of one kind after the other: normal, heavy-tailed, of many magnitudes, zero, with NaN, infinite, subnormal, large."""
    rng = np.random.default_rng([seed, 41])
    x = rng.standard_normal((num_tokens, hidden)).astype(np.float32)
    largest = float(jnp.finfo(dtype).max)
    for row, kind in zip(x, (kinds[i % len(kinds)] for i in range(num_tokens)), strict=True):
        here = rng.integers(0, hidden, 3)
        if kind == 1:
            row[:] = np.clip(rng.standard_t(1.5, hidden), -largest, largest)
        elif kind == 2:
            row *= np.exp2(rng.integers(-40, 12, hidden)).astype(np.float32)
        elif kind == 3:
            row[:] = np.copysign(0.0, row)
        elif kind == 4:
            row[here] = np.nan, -np.nan, np.nan
        elif kind == 5:
            row[:] = np.nan
        elif kind == 6:
            row[here] = np.inf, -np.inf, 1.0
        elif kind == 7:
            row[here] = np.nan, np.inf, -np.inf
        elif kind == 8:
            row *= 2.0**-133
        elif kind == 9:
            row[:] = largest * np.sign(row)
    return jnp.asarray(x, dtype)


def places_of(seed, num_tokens, top_k, missing=0.2):
    """A row for each slot of each token, some without one."""
    rng = np.random.default_rng([seed, 42])
    places = rng.permutation(num_tokens * top_k).reshape(num_tokens, top_k)
    return jnp.asarray(np.where(rng.random(places.shape) < missing, -1, places), jnp.int32)


def check_quantized_rows(result, x, positions, spec: Spec, *, scales=None, weights=None, num_rows=None) -> None:
    """The rows that hold a token, bit by bit."""
    values, found = (result.values, result.scales) if isinstance(result, QuantizedRows) else result
    x32, tokens = np.asarray(x).astype(np.float32), len(x)
    if weights is not None:
        with np.errstate(all="ignore"):
            x32 = (x32 * np.asarray(weights)).astype(x.dtype).astype(np.float32)
    if positions is None:
        row = np.arange(tokens)
        positions = np.where(row < (tokens if num_rows is None else int(num_rows[0])), row, -1)[:, None]
    positions = np.asarray(positions)
    if scales is not None:
        spec = dataclasses.replace(spec, granularity="token")
        scales = np.broadcast_to(np.asarray(scales, np.float32), tokens)
        scales = np.where(np.abs(scales) < oracle.TINY, np.float32(0), scales)
    codes, expected, _ = oracle.quantize(x32, spec, scales=scales, valid=(positions >= 0).any(axis=1))
    expected = np.broadcast_to(expected, (tokens,)) if expected.ndim == 0 else expected
    expected = expected.reshape(tokens, -1)

    assert values.dtype == spec.storage_dtype and values.shape == (positions.size, x.shape[1])
    assert found.dtype == jnp.float32 and found.shape[0] == expected.shape[1]
    assert found.shape[1] % 4 == 0 and 192 <= found.shape[1] - positions.size < 196
    token, slot = np.nonzero(positions >= 0)
    rows = positions[token, slot]
    np.testing.assert_array_equal(np.asarray(found).T[rows], expected[token])
    np.testing.assert_array_equal(oracle.bits(np.asarray(values)[rows]), codes[token])


def check_discriminates(check, result) -> None:
    """`check` passes the result, and neither zeros nor rows that moved nor scales that are off."""
    check(result)
    values, scales = result.values, result.scales
    for wrong in (
        (jnp.zeros_like(values), scales),
        (jnp.roll(values, 1, axis=0), jnp.roll(scales, 1, axis=1)),
        (values, 1.5 * scales),
    ):
        try:
            check(wrong)
        except AssertionError:
            continue
        raise RuntimeError("the check accepts a wrong result")
