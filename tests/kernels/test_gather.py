"""The gather kernel, interpreted and lowered for CUDA."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.gather import gather
from moe_jax.ops.group_tokens import group_tokens
from tests.contracts import check_gather, groups_of
from tests.grouping import occupied_rows
from tests.layers import normal
from tests.lowering import assert_lowers_to_kernels, like


def run(x, groups):
    rows = gather(x, groups, implementation="mosaic_interpret")
    check_gather(rows, x, groups)
    return rows


SIZES = [("bfloat16", h) for h in (16, 80, 256, 272, 768)] + [("float16", 144), ("float32", 80), ("float32", 128)]


@pytest.mark.parametrize(("dtype", "hidden"), SIZES)
def test_rows_are_copies_of_their_tokens(dtype, hidden):
    x, groups = normal(0, 9, hidden, dtype=dtype), groups_of(0, 9, 2, 3, 64)
    rows = run(x, groups)
    for wrong in (jnp.zeros_like(rows), jnp.roll(rows, 1, axis=0), 1.5 * rows):
        with pytest.raises(AssertionError):
            check_gather(wrong, x, groups)


def test_values_are_copied_as_they_are():
    x = jnp.tile(jnp.asarray([[jnp.inf, -jnp.inf, jnp.nan, -0.0]], jnp.float32), (3, 4))
    groups = groups_of(1, 3, 2, 2, 64, missing=0)
    rows = np.asarray(run(x, groups))[occupied_rows(groups)]
    np.testing.assert_array_equal(rows.view(np.int32), np.asarray(x).view(np.int32)[[0] * len(rows)])


@pytest.mark.parametrize(
    "problem",
    [dict(num_tokens=1, top_k=1), dict(num_tokens=11, top_k=1), dict(num_tokens=3, top_k=8)],
    ids=["one row", "k = 1", "many slots"],
)
def test_shapes(problem):
    groups = groups_of(2, num_experts=4, tile_rows=64, missing=0, **problem)
    run(normal(2, problem["num_tokens"], 80, dtype="bfloat16"), groups)


@pytest.mark.parametrize("kwargs", [dict(only=[2]), dict(only=[0, 3]), dict(missing=1)])
def test_experts_without_tokens(kwargs):
    run(normal(3, 9, 80, dtype="bfloat16"), groups_of(3, 9, 2, 4, 64, **kwargs))


LOWERED = {
    "one token": (1, 1, 4096, "bfloat16"),
    "qwen3": (1000, 8, 2048, "bfloat16"),
    "deepseek": (4096, 8, 7168, "bfloat16"),
    "gpt-oss": (16, 4, 2880, "float16"),
    "no multiple of 64": (128, 4, 1040, "bfloat16"),
    "float32": (33, 2, 1028, "float32"),
}


@pytest.mark.parametrize("name", LOWERED)
def test_lowers_for_cuda(name):
    num_tokens, top_k, hidden, dtype = LOWERED[name]

    def call(x, ids):
        groups = group_tokens(ids, num_experts=64, implementation="mosaic")
        return gather(x, groups, implementation="mosaic")

    assert_lowers_to_kernels(call, like(dtype, num_tokens, hidden), like("int32", num_tokens, top_k))
