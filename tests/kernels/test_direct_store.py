"""Rows that leave a tile from registers, interpreted; and lowered for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax import _compat
from moe_jax.kernels.hopper import direct_store, interleaved
from tests.lowering import assert_lowers_to_kernels, like

ROWS = 40  # of the output


def stored(tile, first_row, size, col, n_out, columns, marked, interpret=None):
    """An output in which nothing else is written."""
    halves = tile.shape[0] == interleaved.COLUMNS
    layout = interleaved.LAYOUT if halves else plgpu.Layout.WGMMA

    def body(tile_g, out_g):
        values = plgpu.load(tile_g, layout=layout, optimized=False)
        # The numbers of a tile are those of the GPU: none is known when the kernel is built.
        none = lax.axis_index("sm")
        numbers = (jnp.int32(number) + none for number in (first_row, size, col))
        options = dict(marked=marked, interpret=interpret is not None, layout=layout)
        direct_store.store(out_g, values, *numbers, columns, **options)

    return _compat.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((ROWS, n_out), tile.dtype),
        grid=(1,),
        grid_names=("sm",),
        num_threads=1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, lowering_semantics=_compat.LANE),
        interpret=interpret,
    )(tile)


@pytest.mark.parametrize(
    ("height", "count", "first_row", "size", "col", "n_out", "columns", "marked"),
    [
        (64, 8, 3, 5, 64, 128, 64, False),
        (64, 16, 0, 16, 0, 64, 64, False),
        (64, 24, 7, 0, 0, 64, 64, False),
        (64, 16, 2, 0b1000_0000_0010_0101, 0, 64, 64, True),
        (64, 16, 5, 0, 0, 64, 64, True),
        (64, 8, 1, 8, 64, 80, 64, False),  # an output that ends within the tile
        (64, 8, 1, 0b11, 32, 48, 32, True),  # of which columns are narrow
        (64, 8, 39, 1, 128, 64, 64, False),  # a tile past the end
        (32, 8, 4, 3, 32, 96, 32, False),
        (32, 16, 4, 0b1010, 64, 80, 32, True),
    ],
)
def test_rows_of_a_tile(height, count, first_row, size, col, n_out, columns, marked):
    tile = jax.random.normal(jax.random.key(1), (height, count)).astype(jnp.bfloat16)
    out = stored(tile, first_row, size, col, n_out, columns, marked, _compat.interpret_params())
    kept = [i for i in range(count) if (size >> i & 1 if marked else i < size)]
    right = np.full((ROWS, n_out), np.nan, np.float32)
    end = min(col + columns, n_out)
    for place, i in enumerate(kept):
        right[first_row + place, col:end] = np.asarray(tile, np.float32)[: max(0, end - col), i]
    np.testing.assert_array_equal(np.asarray(out, np.float32), right)


@pytest.mark.parametrize("height", [64, 32])
@pytest.mark.parametrize("marked", [False, True])
def test_lowers_for_cuda(height, marked):
    run = functools.partial(stored, first_row=1, size=5, col=64, n_out=128, columns=height, marked=marked)
    assert_lowers_to_kernels(run, like("bfloat16", height, 16))
