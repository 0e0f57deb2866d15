"""Gradients of grouped weights: the kernel in the interpreter against float64, and lowered for CUDA."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import _compat
from moe_jax.kernels.hopper import weight_grad as kernel
from moe_jax.ops.group_tokens import group_tokens
from moe_jax.ops.weight_grad import weight_grad
from tests.layers import normal
from tests.lowering import like, lower, operations
from tests.util import assert_discriminates, check_close

# Rows of each group, rows of no group, columns of both operands.
CASES = {
    "groups that begin anywhere": ([3, 0, 70, 64, 5], 10, 64, 128),
    "whole steps": ([64, 128], 0, 128, 64),
    "two tiles a side, the last half filled": ([20, 44], 8, 192, 320),
    "columns that no tile of 128 bytes divides": ([70, 9], 1, 80, 144),
    "one row": ([0, 1, 0], 7, 64, 64),
    "none": ([0, 0], 8, 64, 64),
}


def problem(sizes, rest, m, n, dtype="bfloat16"):
    """Rows of which those of no group are NaN, where groups begin, and the product in float64."""
    starts, total = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int32), sum(sizes)
    left, right = (np.array(normal(seed, total + rest, size, dtype=dtype)) for seed, size in ((0, m), (1, n)))
    left[total:], right[total:] = np.nan, np.nan
    pairs = [(left[s : s + size], right[s : s + size]) for s, size in zip(starts, sizes, strict=True)]
    expected = np.stack([a.astype(np.float64).T @ b.astype(np.float64) for a, b in pairs])
    return (jnp.asarray(left), jnp.asarray(right), jnp.asarray(starts), jnp.asarray(sizes, jnp.int32)), expected


def run(operands, accumulate=None, out_dtype="float32", multiprocessors=2, **changes):
    left, right = (jnp.pad(rows, ((0, -rows.shape[0] % 8), (0, 0))) for rows in operands[:2])
    config = dataclasses.replace(kernel.default_config(left.shape[1], right.shape[1]), **changes)
    options = {"out_dtype": jnp.dtype(out_dtype), "config": config, "multiprocessors": multiprocessors}
    interpret = _compat.interpret_params()
    return np.asarray(kernel.weight_grad(left, right, *operands[2:], accumulate, interpret=interpret, **options))


@pytest.mark.parametrize("name", CASES)
def test_products_of_the_rows_of_each_group(name):
    operands, expected = problem(*CASES[name])
    out = run(operands)
    if expected.any():
        check_close(out, expected, 1e-6)
        assert_discriminates(lambda y: check_close(y, expected, 1e-6), out)
    assert not out[np.asarray(operands[3]) == 0].any()


CONFIGS = {
    "one block of columns, experts in their order": {"blocks": 1, "tile_n": 64, "largest_first": False},
    "three, and all products waited for": {"blocks": 1, "tile_n": 192, "overlap": False},
    "two blocks a consumer, fewer buffers": {"blocks": 2, "tile_n": 128, "buffers": 2, "stages": 4},
    "two blocks of rows a step": {"blocks": 1, "tile_n": 256, "step_rows": 128, "stages": 2, "buffers": 2},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations(name):
    operands, expected = problem([9, 100, 0, 3], 0, 128, 192, "float16")
    out = run(operands, out_dtype="float16", **CONFIGS[name])
    check_close(out.astype(np.float64), expected, 4e-4)


@pytest.mark.parametrize("columns, buffers", [((80, 272), 5), ((64, 128), 2)])
def test_sums_are_added_to(columns, buffers):
    operands, expected = problem([70, 0, 3], 7, *columns)
    before = normal(2, *expected.shape)
    out = run(operands, before, buffers=buffers)
    check_close(out, expected + np.asarray(before, np.float64), 1e-6)
    np.testing.assert_array_equal(out[1], before[1])


def test_the_operation_runs_the_kernel():
    ids = jnp.asarray([[0, 2], [2, -1], [2, 0], [1, 2], [5, 2]], jnp.int32)
    groups = group_tokens(ids, num_experts=6, tile_rows=8)
    left, right = normal(0, 10, 64, dtype="bfloat16"), normal(1, 10, 64, dtype="bfloat16")
    plain, out = (
        weight_grad(left, right, groups, out_dtype="float32", implementation=i) for i in ("xla", "mosaic_interpret")
    )
    check_close(out, plain, 1e-6)
    assert not out[jnp.asarray([3, 4])].any()


def test_what_the_kernel_cannot_run():
    half, single = like("bfloat16", 8, 64), like("float32", 8, 64)
    assert "must both be bfloat16" in kernel.supports(single, single, "float32")
    assert "multiple of 16" in kernel.supports(like("bfloat16", 8, 72), half, "float32")
    assert "out_dtype=int8" in kernel.supports(half, half, "int8")
    assert "no rows" in kernel.supports(like("bfloat16", 0, 64), half, "float32")
    assert kernel.supports(half, half, "bfloat16") is None
    groups = group_tokens(jnp.zeros((8, 1), jnp.int32), num_experts=1, tile_rows=8)
    ones = jnp.ones((8, 64))
    with pytest.raises(ValueError, match="cannot run weight_grad: operands float32"):
        weight_grad(ones, ones, groups, implementation="mosaic")


def test_configurations_that_no_kernel_can_have():
    wrong = {
        "tile_n=96 must be": {"tile_n": 96},
        "blocks=2 x tile_n=256 must be at most 256": {"blocks": 2},
        "blocks=0": {"blocks": 0},
        "step_rows=32": {"step_rows": 32},
        "must be at least 2, band=16": {"stages": 1},
        "262144 bytes of shared memory": {"stages": 4, "buffers": 4},
    }
    operands, _ = problem([8], 0, 64, 64)
    for reason, changes in wrong.items():
        assert reason in kernel.config_misfit(kernel.Config(**changes)), changes
        with pytest.raises(ValueError, match=reason):
            run(operands, **{"blocks": 1, "tile_n": 256} | changes)


@pytest.mark.parametrize("m, n", [(1536, 2048), (2048, 768), (2880, 2880), (1040, 528)])
@pytest.mark.parametrize("out_dtype", ["bfloat16", "float32"])
def test_lowers_for_cuda(monkeypatch, m, n, out_dtype):
    monkeypatch.undo()

    def gradient(left, right, starts, sizes, *sums):
        config = kernel.default_config(left.shape[1], right.shape[1])
        return kernel.weight_grad(
            left, right, starts, sizes, *(sums or (None,)), out_dtype=jnp.dtype(out_dtype), config=config
        )

    sums = [like("float32", 128, m, n)] if out_dtype == "float32" else []
    rows = like("bfloat16", 131072, m), like("bfloat16", 131072, n)
    text = lower(gradient, *rows, like("int32", 128), like("int32", 128), *sums)
    assert operations(text)["mosaic_gpu_v2"] == 1


@pytest.mark.gpu
@pytest.mark.parametrize("out_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("experts, m, n", [(128, 1536, 2048), (8, 4096, 14336), (32, 2880, 2880), (16, 1040, 528)])
def test_on_a_gpu(experts, m, n, out_dtype):
    ids = jax.random.randint(jax.random.key(0), (5000, 4), -1, experts - 1)  # the last has none
    groups = jax.jit(lambda ids: group_tokens(ids, num_experts=experts, tile_rows=128, implementation="xla"))(ids)
    left, right = (jax.random.normal(jax.random.key(i), (20000, size), jnp.bfloat16) for i, size in ((1, m), (2, n)))
    outside = (jnp.arange(20000) >= groups.group_sizes.sum())[:, None]
    left, right = jnp.where(outside, jnp.nan, left), jnp.where(outside, jnp.nan, right)
    before = jax.random.normal(jax.random.key(3), (experts, m, n)) if out_dtype == "float32" else None

    def gradient(left, right, before, implementation):
        options = {"accumulate": before, "out_dtype": out_dtype, "implementation": implementation}
        return weight_grad(left, right, groups, **options)

    gradient = jax.jit(gradient, static_argnames="implementation")
    outs = [gradient(left, right, before, i) for i in ("mosaic", "xla", "mosaic")]
    check_close(outs[0], outs[1], 3e-3 if out_dtype == "bfloat16" else 1e-5)
    assert (outs[0] == outs[2]).all()
    assert (outs[0][-1] == (0 if before is None else before[-1])).all()


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_on_a_gpu(name):
    operands, expected = problem([900, 1, 0, 333, 64, 8], 11, 384, 640)
    left, right = (jnp.pad(rows, ((0, -rows.shape[0] % 8), (0, 0))) for rows in operands[:2])
    outs = [
        kernel.weight_grad(left, right, *operands[2:], None, out_dtype="float32", config=config)
        for config in (kernel.Config(**CONFIGS[name]), kernel.Config())
    ]
    check_close(outs[0], expected, 1e-5)
    assert (outs[0] == outs[1]).all()
