"""Rows and weights quantized for the other direction, and what contracts them, in their plain-JAX forms."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.gather import gather
from moe_jax.ops.quantize_both import quantize_both
from moe_jax.ops.quantize_rows import quantize_rows, quantize_tokens, shared_scale
from moe_jax.ops.quantize_transposed import column_blocks, quantize_rows_both, quantize_transposed
from moe_jax.ops.weight_grad import weight_grad
from moe_jax.parallel.batched import batch_groups
from moe_jax.quantization.formats import Spec
from moe_jax.quantization.fp8_training import BLOCKS, TENSOR, rows_spec
from moe_jax.quantization.quantize import quantize
from tests.contracts import groups_of, rows_of
from tests.grouping import group_of_rows
from tests.layers import normal, quick_jit
from tests.util import assert_discriminates, check_close

transposed = quick_jit(quantize_transposed, static_argnames="implementation")


def standing(blocks, rows):
    """The row of each column, -1 for none."""
    found = np.full((len(blocks.starts), 128), -1)
    for block, (start, size) in enumerate(zip(blocks.starts.tolist(), blocks.sizes.tolist(), strict=True)):
        found[block, :size] = np.arange(start, start + size)
    return found.reshape(-1)


@pytest.mark.parametrize("tile_rows", [16, 128])
def test_every_row_is_a_column_of_its_experts_blocks(tile_rows):
    groups = groups_of(0, 300, 2, 3, tile_rows, only=[0, 2])
    rows = rows_of(0, groups, 128, "bfloat16")
    found, blocks = transposed(rows, groups, implementation="xla"), column_blocks(groups)
    place, of_rows = standing(blocks, rows), group_of_rows(groups)
    wide = np.asarray(found.dequantize())
    held = place >= 0
    assert sorted(place[held]) == np.flatnonzero(of_rows >= 0).tolist() and not wide[:, ~held].any()
    np.testing.assert_array_equal(of_rows[place[held]], np.repeat(np.asarray(blocks.group), 128)[held])
    check_close(wide[:, held], np.asarray(rows, np.float64)[place[held]].T, 4e-2)
    assert_discriminates(lambda a: check_close(a, np.asarray(rows, np.float64)[place[held]].T, 4e-2), wide[:, held])


@pytest.mark.parametrize("tile_rows", [16, 128])
def test_gradients_of_weights(tile_rows):
    groups = groups_of(1, 200, 2, 4, tile_rows, missing=0.1)
    left, right = rows_of(1, groups, 128, "bfloat16"), rows_of(2, groups, 256, "bfloat16")
    run = quick_jit(lambda a, b: weight_grad(a, b, groups, out_dtype="float32", implementation="xla"))
    exact = run(left, right)
    found = run(*(transposed(rows, groups, implementation="xla") for rows in (left, right)))
    check_close(found, exact, 5e-2)
    flat = np.asarray(exact).reshape(-1, 256)
    assert_discriminates(lambda a: check_close(a, flat, 5e-2), np.asarray(found).reshape(flat.shape))


def test_gradients_are_added_to_earlier_ones():
    groups = groups_of(1, 20, 2, 4, 16, only=[0, 2])
    codes = [transposed(rows_of(seed, groups, 128, "bfloat16"), groups, implementation="xla") for seed in (1, 2)]
    before = normal(3, 4, 128, 128)
    added = weight_grad(*codes, groups, accumulate=before, implementation="xla")
    alone = weight_grad(*codes, groups, out_dtype="float32", implementation="xla")
    assert added.dtype == jnp.float32
    check_close(added, np.asarray(before, np.float64) + np.asarray(alone), 1e-6)
    np.testing.assert_array_equal(added[1], before[1])
    with pytest.raises(TypeError, match="accumulate is float32 and out_dtype=bfloat16, but both must be float32"):
        weight_grad(*codes, groups, accumulate=before, out_dtype="bfloat16", implementation="xla")


@pytest.mark.parametrize("tile_rows", [16, 128])
def test_rows_of_tokens_are_those_that_were_gathered(tile_rows):
    """Both orders, the same bits; tokens without a row, and rows without a token, count nowhere."""
    groups, x = groups_of(7, 150, 2, 4, tile_rows, missing=0.2), normal(7, 150, 256, dtype="bfloat16")
    options = {"implementation": "xla"}
    rows = gather(x, groups, **options)
    held = group_of_rows(groups) >= 0
    assert not held.all()
    for found, expected in [
        (quantize_rows_both(x, groups, by_token=True, **options), quantize_rows_both(rows, groups, **options)),
        ((None, quantize_transposed(x, groups, by_token=True, **options)), (None, transposed(rows, groups, **options))),
    ]:
        np.testing.assert_array_equal(found[1].dequantize(), expected[1].dequantize())
        if found[0] is not None:
            np.testing.assert_array_equal(*(np.asarray(of.values, np.float32)[held] for of in (found[0], expected[0])))
            num_rows = len(held)
            np.testing.assert_array_equal(*(of.scales[:, :num_rows][:, held] for of in (found[0], expected[0])))


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("tile_rows", [16, 144])
def test_one_scale_for_both_orders(tile_rows, dtype):
    """The same codes; the largest of the rows that count becomes the largest code, and no other row is seen."""
    groups, spec = groups_of(8, 150, 2, 4, tile_rows, missing=0.2), rows_spec(dtype, "tensor")
    rows = rows_of(8, groups, 256, "bfloat16")
    held = group_of_rows(groups) >= 0
    assert np.isnan(np.asarray(rows, np.float32)[~held]).all() and not held.all()
    scale = quick_jit(lambda rows: shared_scale(rows, spec, groups))(rows)
    largest = np.abs(np.asarray(rows, np.float32)[held]).max()
    assert scale == np.float32(largest) * (np.float32(1) / np.float32(spec.largest))
    options = {"scale": scale, "dtype": dtype, "implementation": "xla"}
    own, columns = quantize_rows_both(rows, groups, **options)
    assert own.spec == columns.spec == spec and columns.scales == scale and (own.scales[:, : len(held)] == scale).all()
    place = standing(column_blocks(groups), rows)
    codes = np.asarray(columns.values, np.float32).T

    def same_codes(codes):
        np.testing.assert_array_equal(np.asarray(own.values, np.float32)[place[place >= 0]], codes[place >= 0])

    same_codes(codes)
    for wrong in (np.roll(codes, 1, axis=0), codes / 2):
        with pytest.raises(AssertionError):
            same_codes(wrong)
    assert np.abs(codes).max() == spec.largest and not codes[place < 0].any()
    alone = quantize_rows(rows, spec, groups=groups, scales=scale, implementation="xla")
    np.testing.assert_array_equal(*(np.asarray(of.values, np.float32)[held] for of in (alone, own)))
    np.testing.assert_array_equal(quantize_transposed(rows, groups, **options).dequantize(), columns.dequantize())


@pytest.mark.parametrize("tile_rows", [16, 144])
def test_one_scale_of_tokens(tile_rows):
    """That of their rows, with the same codes; a token without an expert has no part in it."""
    groups, x = groups_of(9, 60, 2, 4, tile_rows, missing=0.6), normal(9, 60, 128, dtype="bfloat16")
    unused = np.asarray((groups.positions < 0).all(axis=1))
    assert unused.any()
    x = jnp.where(unused[:, None], jnp.inf, x)
    options = {"implementation": "xla"}
    rows, held = gather(x, groups, **options), group_of_rows(groups) >= 0
    scale = shared_scale(x, TENSOR, groups, by_token=True)
    assert scale == shared_scale(rows, TENSOR, groups) != shared_scale(rows * 2, TENSOR, groups)
    by_token = quantize_rows_both(x, groups, by_token=True, scale=scale, **options)
    gathered = quantize_rows_both(rows, groups, scale=scale, **options)
    alone = quantize_tokens(x, TENSOR, groups, scales=scale, **options)
    np.testing.assert_array_equal(by_token[1].dequantize(), gathered[1].dequantize())
    for found in (by_token[0], alone):
        np.testing.assert_array_equal(*(np.asarray(of.values, np.float32)[held] for of in (found, gathered[0])))


def test_one_scale_of_groups_with_gaps():
    """Rows between the groups, as `Batched` has them, are not seen."""
    groups = batch_groups(jnp.array([3, 0, 8], jnp.int32), max_tokens=8, tile_rows=8)
    rows = jnp.full((24, 128), jnp.nan).at[:3].set(2.0).at[16:].set(-7.0).astype(jnp.bfloat16)
    scale = shared_scale(rows, TENSOR, groups)
    assert scale == np.float32(7) * (np.float32(1) / np.float32(448))
    codes = quantize_rows(rows, TENSOR, groups=groups, scales=scale, implementation="xla").values
    assert (codes[:3] == 128).all() and (codes[16:] == -448).all()
    with pytest.raises(ValueError, match="row_multiple=8: .* or give the scale"):
        quantize_rows(rows, TENSOR, groups=groups, implementation="xla")


def test_one_scale_of_nothing_but_zeros_and_of_what_is_not_finite():
    """The rules of `quantize`: a floor, the largest float32, NaN passed over."""
    groups = groups_of(5, 7, 1, 2, 8)
    zero, x = jnp.zeros((7, 128), jnp.bfloat16), rows_of(5, groups, 128, "bfloat16")
    floor = np.float32(1e-10) * (np.float32(1) / np.float32(448))
    assert shared_scale(zero, TENSOR, groups) == floor == shared_scale(zero[:0], TENSOR, groups_of(3, 0, 1, 2, 8))
    own, columns = quantize_rows_both(zero, groups, scale=jnp.asarray(floor))
    assert not own.dequantize().any() and not columns.dequantize().any()
    assert shared_scale(x.at[0, 0].set(jnp.nan), TENSOR, groups) == shared_scale(x.at[0, 0].set(0), TENSOR, groups)
    infinite = shared_scale(x.at[0, 0].set(-jnp.inf), TENSOR, groups)
    assert infinite == np.finfo(np.float32).max * (np.float32(1) / np.float32(448))


@pytest.mark.parametrize("tile_rows", [16, 144])
def test_gradients_of_weights_with_one_scale(tile_rows):
    groups = groups_of(1, 200, 2, 4, tile_rows, missing=0.1)
    left, right = rows_of(1, groups, 128, "bfloat16"), rows_of(2, groups, 256, "bfloat16")
    run = quick_jit(lambda a, b: weight_grad(a, b, groups, out_dtype="float32", implementation="xla"))
    exact = np.asarray(run(left, right))
    options = {"implementation": "xla"}
    codes = [transposed(rows, groups, scale=shared_scale(rows, TENSOR, groups), **options) for rows in (left, right)]
    found = run(*codes)
    check_close(found, exact, 5e-2)
    flat = exact.reshape(-1, 256)
    assert_discriminates(lambda a: check_close(a, flat, 5e-2), np.asarray(found).reshape(flat.shape))
    doubled = dataclasses.replace(codes[0], scales=2 * codes[0].scales)
    check_close(run(doubled, codes[1]), 2 * np.asarray(found, np.float64), 1e-6)


def test_no_rows_at_all():
    groups = groups_of(3, 0, 2, 5, 8)
    found = quantize_transposed(jnp.zeros((0, 128), jnp.bfloat16), groups)
    assert found.shape == (128, 0)
    assert not weight_grad(found, found, groups).any()


def test_weights_have_the_same_codes_both_ways():
    w = normal(4, 2, 256, 128, dtype="bfloat16")
    natural, other = quantize_both(w, implementation="xla")
    np.testing.assert_array_equal(natural.dequantize(), quantize(w, BLOCKS).dequantize())
    np.testing.assert_array_equal(natural.dequantize().swapaxes(1, 2), other.validate().dequantize())
    assert quantize_both(w, natural=False)[0] is None and quantize_both(w, transposed=False)[1] is None


def test_weights_with_one_scale_have_the_same_codes_both_ways():
    w = normal(4, 2, 256, 128, dtype="bfloat16") * jnp.asarray([1, 64], jnp.bfloat16)[:, None, None]
    natural, other = quantize_both(w, TENSOR, implementation="xla")
    assert natural.scales.shape == (2,) and natural.scales[1] > 32 * natural.scales[0]
    np.testing.assert_array_equal(natural.scales, other.scales)
    np.testing.assert_array_equal(natural.dequantize(), quantize(w, TENSOR).dequantize())
    np.testing.assert_array_equal(natural.dequantize().swapaxes(1, 2), other.validate().dequantize())
    assert (natural.dequantize().swapaxes(1, 2) != jnp.roll(other.dequantize(), 1, axis=2)).any()
    with pytest.raises(ValueError, match="must be .* which are the same both ways"):
        quantize_both(w, Spec("float8_e4m3fn", "channel"))


def test_what_cannot_be_done():
    groups = groups_of(5, 7, 2, 5, 8)
    rows = rows_of(5, groups, 128, "bfloat16")
    codes = quantize_transposed(rows, groups)
    with pytest.raises(ValueError, match="96 columns must be a multiple of 128"):
        quantize_transposed(rows[:, :96], groups)
    with pytest.raises(ValueError, match="must have multiples of 128 rows and columns"):
        quantize_both(normal(6, 2, 96, 128))
    with pytest.raises(TypeError, match="quantize both, or neither"):
        weight_grad(codes, rows, groups)
    with pytest.raises(ValueError, match="dtype float32 must be bfloat16 or float16"):
        quantize_transposed(rows.astype("float32"), groups, implementation="mosaic")
    with pytest.raises(NotImplementedError, match="no derivative of its own"):
        jax.jvp(lambda w: quantize_both(w)[0].scales, *[(normal(7, 2, 128, 128),)] * 2)
