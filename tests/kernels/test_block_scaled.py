"""The block-scaled grouped matmul of Blackwell, interpreted against float32 on the dequantized operands, and lowered for CUDA.

No such GPU has run it. The interpreter multiplies what is dequantized (`moe_jax.kernels.blackwell.emulation`).
"""

import dataclasses
import functools
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import MoEConfig, _compat
from moe_jax.kernels.blackwell import scales as order
from moe_jax.ops import implementation as impl
from moe_jax.ops.block_scaled_matmul import block_scaled_matmul, reason_against
from moe_jax.ops.grouped_matmul import grouped_matmul
from moe_jax.ops.quantize_rows import quantize_block_scaled
from moe_jax.parallel.batched import batch_groups
from moe_jax.quantization import prepare, quant_format, quantize
from moe_jax.quantization.scale_layout import deswizzle_scales
from tests.contracts import groups_with_sizes
from tests.layers import normal
from tests.lowering import mosaic_code, num_kernels, operations
from tests.util import assert_discriminates, check_close

ACT = MoEConfig(1, 1, 8, 8).act
FORMATS = {"NVFP4": "nvfp4_w4a4", "MXFP4": "mxfp4_w4a4", "MXFP8": "mxfp8"}


def operands(name, num_rows, experts, k, n, gated=False, one_scale=False):
    """Rows and weights; global scales of matrices and rows differ widely."""
    form = quant_format(FORMATS[name])
    sizes = jnp.exp2(jnp.arange(num_rows, dtype=jnp.float32) % 5 - 2)[:, None]
    x = normal(1, num_rows, k) * sizes
    scale = jnp.max(jnp.abs(x)) / form.activations.reach if one_scale else None
    w = normal(2, experts, n, k, scale=k**-0.5) * jnp.exp2(jnp.arange(experts, dtype=jnp.float32) % 3)[:, None, None]
    w = w.at[:, n // 2 :].multiply(4.0)
    return quantize_block_scaled(x, form.activations, global_scale=scale), quantize(
        w, form.weights, halves=2 if gated else 1
    )


def expected(x, w, groups, bias=None, activation=None):
    """Rows that hold a token, and what they become."""
    rows, weights = np.asarray(x.dequantize()), np.asarray(w.dequantize())
    where, found = [], []
    for tile in range(int(groups.num_tiles[0])):
        expert, start, size = (int(a[tile]) for a in (groups.tile_group, groups.tile_starts, groups.tile_sizes))
        h = rows[start : start + size] @ weights[expert].T
        h = h if bias is None else h + np.asarray(bias[expert], np.float32)
        where.append(np.arange(start, start + size))
        found.append(h if activation is None else np.asarray(activation(jnp.asarray(h))))
    return np.concatenate(where), np.concatenate(found)


def run(x, w, groups, **options):
    return block_scaled_matmul(x, w, groups, groups.tile_group, interpret=_compat.interpret_params(), **options)


def check(x, w, groups, *, dtype="bfloat16", tolerance=3e-3, bias=None, activation=None):
    out = run(x, w, groups, dtype=dtype, bias=bias, activation=activation)
    where, right = expected(x, w, groups, bias, activation)
    assert out.dtype == jnp.dtype(dtype)
    out = np.asarray(out, np.float32)
    check_close(out[where], right, tolerance)
    assert_discriminates(lambda y: check_close(y, right, tolerance), out[where])
    untouched = np.delete(out, where, axis=0)
    assert np.isnan(untouched).all(), (
        "a row of no group was written: memory that nobody wrote is NaN in the interpreter"
    )


CASES = {  # format, rows of each expert, K, N, gated, with a bias
    "NVFP4": ("NVFP4", (3, 0, 141, 20), 512, 192, False, False),
    "NVFP4, gated, halves that do not fill a block, a bias": ("NVFP4", (5, 0, 17), 256, 384, True, True),
    "NVFP4, all rows on one expert": ("NVFP4", (0, 0, 130), 256, 64, False, True),
    "MXFP4": ("MXFP4", (1, 8, 0), 768, 128, False, False),
    "MXFP8, gated": ("MXFP8", (9, 128, 0, 2), 384, 256, True, False),
}


@pytest.mark.parametrize("case", CASES)
def test_groups_of_the_standard_format(case):
    name, sizes, k, n, gated, with_bias = CASES[case]
    groups = groups_with_sizes(1, sizes, 128)
    x, w = operands(name, groups.num_rows, len(sizes), k, n, gated)
    bias = normal(3, len(sizes), n, dtype="bfloat16") if with_bias else None
    check(x, w, groups, bias=bias, activation=ACT if gated else None)


@pytest.mark.once
def test_float16_and_one_scale_for_all_rows():
    groups = groups_with_sizes(1, (4, 13), 64)
    x, w = operands("NVFP4", groups.num_rows, 2, 256, 128, one_scale=True)
    assert x.global_scale.ndim == 0
    check(x, w, groups, dtype="float16", tolerance=5e-4)


@pytest.mark.parametrize("name, k", [("NVFP4", 256), ("MXFP8", 1152)])  # of MXFP8 more steps than stages
def test_batches_with_counts_and_garbage_past_them(name, k):
    """Nothing past a count is written, and nothing that stands there, NaN or infinite, comes into what is."""
    counts, room, n = jnp.array([0, 136, 5, 1]), 136, 192
    groups = batch_groups(counts, room, 128)
    x, w = operands(name, 4 * room, 4, k, n)
    past = np.arange(4 * room) % room >= np.repeat(counts, room)
    garbage = 0x7F if name == "MXFP8" else 0xFF  # NaN; four bits have none: minus six
    bytes_ = np.where(past[:, None], np.uint8(garbage), np.asarray(x.values).view(np.uint8))
    values = jnp.asarray(bytes_.view(x.values.dtype))
    scale = None if x.global_scale is None else jnp.where(past, jnp.nan, x.global_scale)
    x = dataclasses.replace(x, values=values, scales=jnp.where(past, jnp.nan, x.scales), global_scale=scale)
    check(x, w, groups)


@pytest.mark.once
def test_a_nan_stays_in_its_row():
    groups = groups_with_sizes(1, (6, 3), 128)
    x, w = operands("MXFP8", 9, 2, 128, 64)
    x = dataclasses.replace(x, scales=x.scales.at[0, 2].set(jnp.nan))
    out = np.asarray(run(x, w, groups), np.float32)
    assert np.flatnonzero(np.isnan(out).any(axis=1)).tolist() == [2] and np.isnan(out[2]).all()


def test_the_order_of_scales():
    """A tile's scales, taken back out of the order of the tensor cores, are those of its rows; the rest is byte 0."""
    scales = jax.lax.bitcast_convert_type(
        jnp.asarray(np.random.default_rng(3).integers(1, 127, (150, 6), np.uint8)), jnp.float8_e4m3fn
    )
    found = order.of_tiles(scales, jnp.array([140, 3]), jnp.array([10, 128]))
    assert found.shape == (2, 2, 32, 16) and found.dtype == scales.dtype
    for tile, (start, size) in zip(found, ((140, 10), (3, 128)), strict=True):
        rows = np.asarray(deswizzle_scales(tile.reshape(128, 8), 128, 6)).view(np.uint8)
        np.testing.assert_array_equal(rows[:size], np.asarray(scales)[start : start + size].view(np.uint8))
        assert not rows[size:].any()
    of_weights = order.of_weights(scales[None, :148], halves=2)
    second = np.asarray(deswizzle_scales(of_weights[0, 1].reshape(128, 8), 74, 6)).view(np.uint8)
    np.testing.assert_array_equal(second, np.asarray(scales)[74:148].view(np.uint8))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("gated", [True, False])
def test_it_lowers_for_cuda_with_scales_in_tensor_memory(name, gated):
    groups = groups_with_sizes(1, (30, 0, 40), 128)
    x, w = operands(name, groups.num_rows, 3, 512, 256, gated)
    function = functools.partial(block_scaled_matmul, activation=ACT if gated else None)
    code = mosaic_code(lambda x, w, groups: function(x, w, groups, groups.tile_group), x, w, groups)
    kind = {"NVFP4": "mxf4nvf4.block_scale.scale_vec::4X", "MXFP4": "mxf4nvf4.block_scale.scale_vec::2X"}
    assert f"kind::{kind.get(name, 'mxf8f6f4.block_scale.scale_vec::1X')}" in code
    assert "tcgen05.cp" in code and "wgmma" not in code


REASONS = {
    "other formats": (dict(rows="MXFP8"), "must both be"),
    "K": (dict(k=320), "size=320 must be a multiple of 256"),
    "N": (dict(n=96), "size=96 must be a multiple of 64"),
    "tile": (dict(tile_rows=160), "tile_rows=160"),
    "output": (dict(dtype="float32"), "bfloat16 or float16"),
    "tokens": (dict(tokens_as_rows=True), "tokens_as_rows"),
    "halves": (dict(gated=True, activation=None), "halves=1"),
}


@pytest.mark.parametrize("name", REASONS)
def test_what_it_cannot_do_is_said(name):
    changes, wanted = REASONS[name]
    options = dict(k=256, n=128, tile_rows=128, dtype="bfloat16", gated=False, activation=None, rows="NVFP4") | changes
    _, w = operands("NVFP4", 4, 2, options["k"], options["n"], options["gated"])
    x, _ = operands(options["rows"], 4, 2, options["k"], options["n"])
    how = {name: options[name] for name in ("tokens_as_rows",) if name in options}
    found = reason_against(x, w, options["activation"], options["tile_rows"], options["dtype"], **how)
    assert found is not None and wanted in found


def test_weights_in_the_order_of_hopper_are_refused():
    x, w = operands("NVFP4", 4, 2, 256, 128)
    assert reason_against(x, w, None, 64, "bfloat16") is None
    groups = groups_with_sizes(1, (2, 2), 128)
    with pytest.raises(ValueError, match="as quantize"):
        run(x, prepare(w), groups)


@pytest.fixture
def device(monkeypatch):
    def pretend(capability):
        gpu = types.SimpleNamespace(platform="gpu", compute_capability=capability)
        monkeypatch.setattr(_compat, "default_device", lambda: gpu)

    impl._warn_once.cache_clear()
    return pretend


def matmul(x, w, groups):
    return grouped_matmul(x, w, groups, implementation="auto")


@pytest.mark.parametrize("name", FORMATS)
def test_a_blackwell_gpu_takes_it_and_no_other(name, device):
    groups = groups_with_sizes(1, (5, 6), 64)
    x, w = operands(name, 11, 2, 256, 128)

    def program():
        return str(
            jax.make_jaxpr(lambda *given: matmul(*given))(x, w, groups)
        )  # a new function: JAX keeps what it traced

    for capability, taken in (("10.0", True), ("10.3", True), ("9.0", False), ("12.0", False), ("8.0", False)):
        device(capability)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", impl.SlowPathWarning)
            assert ("block_scaled_matmul" in program()) == taken, capability
    device("10.0")
    lowered = jax.jit(matmul).trace(x, w, groups).lower(lowering_platforms=("cuda",)).as_text()
    assert any(name.startswith("mosaic") for name in operations(lowered))
    with pytest.raises(AssertionError):  # scales are ordered by XLA
        num_kernels(lowered)


def test_a_blackwell_gpu_says_why_not(device):
    groups = groups_with_sizes(1, (5, 6), 64)
    x, w = operands("NVFP4", 11, 2, 320, 128)
    device("10.0")
    with pytest.warns(impl.SlowPathWarning, match="size=320 must be a multiple of 256"):
        out = matmul(x, w, groups)
    where, right = expected(x, w, groups)
    check_close(np.asarray(out, np.float32)[where], right, 3e-3)
