"""Rows and weights quantized for the other direction, and what contracts them, in their plain-JAX forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.gather import gather
from moe_jax.ops.quantize_both import quantize_both
from moe_jax.ops.quantize_transposed import column_blocks, quantize_rows_both, quantize_transposed
from moe_jax.ops.weight_grad import weight_grad
from moe_jax.quantization.fp8_training import BLOCKS
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
