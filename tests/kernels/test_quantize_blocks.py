"""Blocks quantized and transposed: the kernel in the interpreter against `quantize`, bit for bit, and lowered for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import _compat
from moe_jax.kernels.hopper import quantize_blocks as kernel
from moe_jax.ops.gather_quantize import plain_gather_quantize
from moe_jax.ops.quantize_transposed import ColumnBlocks, plain_quantize_transposed
from moe_jax.quantization.formats import Spec
from moe_jax.quantization.fp8_training import BLOCKS, ROWS, TENSOR, blocks_spec, rows_spec
from moe_jax.quantization.quantize import quantize
from tests.layers import normal
from tests.lowering import like, lower, operations

# The first row and the rows of each block, blocks that count, rows and columns.
CASES = {
    "groups that begin anywhere": ([0, 3, 70], [3, 64, 128], 3, 198, 256),
    "the last rows, and a block that is none": ([0, 100, 0], [100, 5, 0], 2, 105, 128),
    "none": ([0, 0], [0, 0], 0, 4, 128),
}
OPTIONS = {"multiprocessors": 1, "config": kernel.Config(2, 1)}


def bits(codes):
    return np.asarray(jax.lax.bitcast_convert_type(codes, jnp.uint8))


def rows_of_all_sizes(rows, columns, dtype):
    """Magnitudes that differ by block, zeros, an infinity and a NaN among them."""
    x = np.array(normal(0, rows, columns)) * 2.0 ** np.arange(columns)[None, :].clip(0, 13)
    x[rows // 2], x[0, 0], x[1 % rows, columns - 1] = 0, np.inf, np.nan
    return jnp.asarray(x, dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", CASES)
def test_rows_become_columns(name, dtype):
    starts, sizes, count, rows, columns = CASES[name]
    x = rows_of_all_sizes(rows, columns, dtype)
    starts, sizes, count = (jnp.asarray(a, jnp.int32) for a in (starts, sizes, [count]))
    codes, scales = kernel.quantize_rows_of_blocks(
        x, starts, sizes, count, BLOCKS, interpret=_compat.interpret_params(), **OPTIONS
    )
    expected = plain_quantize_transposed(x, ColumnBlocks(starts, starts, sizes, count), BLOCKS)
    n = int(count[0])
    np.testing.assert_array_equal(bits(codes)[:, : 128 * n], bits(expected.values)[:, : 128 * n])
    np.testing.assert_array_equal(np.asarray(scales)[:, :n], np.asarray(expected.scales)[:, :n])
    assert codes.shape == expected.values.shape and scales.shape == expected.scales.shape


@pytest.mark.parametrize("name", CASES)
def test_rows_become_columns_and_stay_rows(name):
    starts, sizes, count, rows, columns = CASES[name]
    dtype = "float8_e5m2" if "last rows" in name else "float8_e4m3fn"
    x = rows_of_all_sizes(rows, columns, "bfloat16")
    schedule = [jnp.asarray(a, jnp.int32) for a in (starts, sizes, [count])]
    spec, row_spec = blocks_spec(dtype), rows_spec(dtype)
    codes, scales, *other = kernel.quantize_rows_of_blocks(
        x, *schedule, spec, row_spec=row_spec, interpret=_compat.interpret_params(), **OPTIONS
    )
    expected = plain_gather_quantize(x, None, row_spec)
    held = [start + i for start, size in zip(starts[:count], sizes, strict=False) for i in range(size)]
    np.testing.assert_array_equal(bits(codes)[held], bits(expected.values)[held])
    np.testing.assert_array_equal(np.asarray(scales)[:, held], np.asarray(expected.scales)[:, held])
    turned = plain_quantize_transposed(x, ColumnBlocks(schedule[0], *schedule), spec)
    np.testing.assert_array_equal(bits(other[0])[:, : 128 * count], bits(turned.values)[:, : 128 * count])
    np.testing.assert_array_equal(np.asarray(other[1])[:, :count], np.asarray(turned.scales)[:, :count])


@pytest.mark.parametrize("row_spec", [None, ROWS])
@pytest.mark.parametrize("name", ["groups that begin anywhere", "none"])
def test_rows_fetched_by_token(name, row_spec):
    """The same bits as of rows that were gathered before, where these are of a group."""
    starts, sizes, count, rows, columns = CASES[name]
    x = rows_of_all_sizes(50, columns, "bfloat16")
    tokens = np.full(rows + 128, -1, np.int32)
    held = [start + i for start, size in zip(starts[:count], sizes, strict=False) for i in range(size)]
    tokens[held] = np.random.default_rng(3).integers(0, 50, len(held))
    schedule = [jnp.asarray(a, jnp.int32) for a in (starts, sizes, [count])]
    options = {"row_spec": row_spec, "interpret": _compat.interpret_params(), **OPTIONS}
    *own, codes, scales = kernel.quantize_rows_of_blocks(
        x, *schedule, BLOCKS, row_tokens=jnp.asarray(tokens), **options
    )
    *own_gathered, codes_gathered, scales_gathered = kernel.quantize_rows_of_blocks(
        x[tokens[:rows]], *schedule, BLOCKS, **options
    )
    assert codes.shape == codes_gathered.shape and len(own) == len(own_gathered)
    np.testing.assert_array_equal(bits(codes)[:, : 128 * count], bits(codes_gathered)[:, : 128 * count])
    np.testing.assert_array_equal(np.asarray(scales)[:, :count], np.asarray(scales_gathered)[:, :count])
    if row_spec is not None:
        np.testing.assert_array_equal(bits(own[0])[held], bits(own_gathered[0])[held])
        np.testing.assert_array_equal(np.asarray(own[1])[:, held], np.asarray(own_gathered[1])[:, held])


def broken(codes):
    """What a check must refuse: the codes of twice the scale, and columns that are one further."""
    wide = np.asarray(codes, np.float32)
    return [jnp.asarray(wide / 2, codes.dtype), jnp.roll(codes, 1, axis=-1)]


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("name", CASES)
def test_rows_with_a_scale_that_is_given(name, dtype, by_token):
    """Both orders, codes alone: those of `quantize` with one scale for the rows that count; NaN in the others is not seen."""
    starts, sizes, count, rows, columns = CASES[name]
    held = [start + i for start, size in zip(starts[:count], sizes, strict=False) for i in range(size)]
    spec = Spec(dtype, "tensor")
    x, valid = rows_of_all_sizes(rows, columns, "bfloat16"), np.isin(np.arange(rows), held)
    x = jnp.where(valid[:, None], x.at[0, 0].set(3.0), jnp.nan)  # an infinity would leave the other codes zero
    expected = quantize(x, spec, valid=valid)
    schedule = [jnp.asarray(a, jnp.int32) for a in (starts, sizes, [count])]
    options = {"interpret": _compat.interpret_params(), "scale": expected.scales.reshape(1), **OPTIONS}
    given = x
    if by_token:  # each row from another place
        place = np.random.default_rng(5).permutation(rows)
        given = jnp.zeros_like(x).at[place].set(x)
        tokens = np.full(rows + 128, -1, np.int32)
        tokens[held] = place[held]
        options["row_tokens"] = jnp.asarray(tokens)
    own, codes = kernel.quantize_rows_of_blocks(given, *schedule, spec, row_spec=spec, **options)
    (alone,) = kernel.quantize_rows_of_blocks(given, *schedule, spec, **options)
    turned = plain_quantize_transposed(x, ColumnBlocks(schedule[0], *schedule), spec, expected.scales)
    np.testing.assert_array_equal(bits(own)[held], bits(expected.values)[held])
    for found in (codes, alone):
        np.testing.assert_array_equal(bits(found)[:, : 128 * count], bits(turned.values)[:, : 128 * count])
    if count:
        assert np.abs(np.nan_to_num(np.asarray(own, np.float32)[held])).max() == spec.largest
        for wrong in broken(codes):
            assert (bits(wrong)[:, : 128 * count] != bits(turned.values)[:, : 128 * count]).any()


@pytest.mark.parametrize("natural", [True, False])
def test_weights_with_scales_that_are_given(natural):
    """One for each matrix, of quite different sizes; one matrix is zero."""
    w = rows_of_all_sizes(3 * 256, 128, "bfloat16").reshape(3, 256, 128).at[0, 0, 0].set(0.5)
    w = (w * jnp.asarray([1.0, 0.0, 64.0])[:, None, None].astype(w.dtype)).at[0, 3, 7].set(jnp.inf)
    expected = quantize(w, TENSOR)
    options = {"natural": natural, "scales": expected.scales, "interpret": _compat.interpret_params(), **OPTIONS}
    *own, codes = kernel.quantize_both(w, TENSOR, **options)
    np.testing.assert_array_equal(bits(codes), bits(expected.values).swapaxes(1, 2))
    assert len(own) == natural
    for found in own:
        np.testing.assert_array_equal(bits(found), bits(expected.values))
    other = kernel.quantize_both(w, TENSOR, **options | {"scales": jnp.roll(expected.scales, 1)})[-1]
    assert (bits(other) != bits(codes)).any(), "each matrix takes its own scale"


@pytest.mark.parametrize("natural", [True, False])
def test_weights_in_both_orders(natural):
    w = rows_of_all_sizes(3 * 256, 128, "bfloat16").reshape(3, 256, 128)
    *own, codes, scales = kernel.quantize_both(
        w, BLOCKS, natural=natural, interpret=_compat.interpret_params(), **OPTIONS
    )
    expected = quantize(w, BLOCKS)
    np.testing.assert_array_equal(bits(codes), bits(expected.values).swapaxes(1, 2))
    np.testing.assert_array_equal(np.asarray(scales), np.asarray(expected.scales).swapaxes(1, 2))
    assert len(own) == (2 if natural else 0)
    if natural:
        np.testing.assert_array_equal(bits(own[0]), bits(expected.values))
        np.testing.assert_array_equal(np.asarray(own[1]), np.asarray(expected.scales))


def test_they_lower_for_cuda():
    w = like(jnp.bfloat16, 4, 256, 384)
    for natural in (True, False):
        text = lower(lambda w, natural=natural: kernel.quantize_both(w, BLOCKS, natural=natural), w)
        assert sum(count for name, count in operations(text).items() if name != "reshape") == 1
        text = lower(
            lambda w, scales, natural=natural: kernel.quantize_both(w, TENSOR, natural=natural, scales=scales),
            w,
            like(jnp.float32, 4),
        )
        assert sum(count for name, count in operations(text).items() if name != "reshape") == 1
    blocks = [like(jnp.int32, size) for size in (9, 9, 1)]
    for row_spec in (None, ROWS):

        def run(x, starts, sizes, count, row_tokens=None, scale=None, row_spec=row_spec):
            row_spec = row_spec if scale is None or row_spec is None else TENSOR
            options = {"row_spec": row_spec, "row_tokens": row_tokens, "scale": scale}
            spec = BLOCKS if scale is None else TENSOR
            return kernel.quantize_rows_of_blocks(x, starts, sizes, count, spec, **options)

        x, tokens, scale = like(jnp.bfloat16, 1000, 384), like(jnp.int32, 2128), like(jnp.float32, 1)
        assert sum(operations(lower(run, x, *blocks)).values()) == 1
        assert sum(operations(lower(run, x, *blocks, tokens)).values()) == 1
        assert sum(operations(lower(run, x, *blocks, None, scale)).values()) == 1
        assert sum(operations(lower(run, x, *blocks, tokens, scale)).values()) == 1
