"""The grouped matmul of 8-bit numbers, interpreted against float32 on the dequantized operands, and lowered for CUDA."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import MoEConfig, _compat
from moe_jax.kernels.hopper import matmul_fp8 as kernel
from moe_jax.kernels.hopper.codes import block_rows
from moe_jax.kernels.hopper.matmul_config import Config
from moe_jax.ops.grouped_matmul import grouped_matmul
from moe_jax.ops.route_groups import route_groups
from moe_jax.quantization import QuantizedArray, quant_format, quantize
from moe_jax.quantization.rows import QuantizedRows
from tests.contracts import groups_with_sizes
from tests.layers import normal
from tests.lowering import assert_lowers_to_kernels, like
from tests.oracles import config_of, logits_of
from tests.util import assert_discriminates, check_close

FEW = Config((8, 24, 64), consumers=1, tile_k=128, stages=3)
DEEP = Config((8, 64), consumers=1, tile_k=256, stages=2)
MANY = Config((48, 128), consumers=2, tile_k=128, stages=2)
ACT = MoEConfig(1, 1, 8, 8).act


def transposed(scales, rows):
    """Scales of rows as the kernel wants them: a line for each group of columns, NaN where no row is."""
    scales = np.asarray(scales, np.float32)
    scales = np.broadcast_to(scales, (rows,)) if scales.ndim == 0 else scales
    scales = scales[None] if scales.ndim == 1 else scales.T
    return jnp.asarray(np.pad(scales, ((0, 0), (0, 192 + -rows % 4)), constant_values=np.nan))


def weight_scales(weights: QuantizedArray):
    scales = weights.scales.astype(jnp.float32)
    return scales[:, None] if scales.ndim == 1 else scales


def expected(x: QuantizedArray, w: QuantizedArray, groups, bias, gated):
    rows, weights = np.asarray(x.dequantize()), np.asarray(w.dequantize())
    out = np.zeros((groups.num_rows, weights.shape[1] // (2 if gated else 1)), np.float32)
    for tile in range(int(groups.num_tiles[0])):
        expert, start, size = (int(a[tile]) for a in (groups.tile_group, groups.tile_starts, groups.tile_sizes))
        h = rows[start : start + size] @ weights[expert].T + (
            0 if bias is None else np.asarray(bias[expert], np.float32)
        )
        out[start : start + size] = np.asarray(ACT(jnp.asarray(h))) if gated else h
    return out


def run(name, sizes, k, n, *, gated=False, config=FEW, bias=None, dtype="bfloat16", offset=0):
    """The kernel on rows of groups of these sizes; checked."""
    form, groups = quant_format(name), groups_with_sizes(1, sizes, config.tile_rows)
    x = quantize(normal([1, offset], groups.num_rows, k, dtype="bfloat16"), form.activations)
    weights = normal([2, offset], len(sizes), n, k, scale=k**-0.5)
    weights = quantize(weights, form.weights, halves=2 if gated else 1)
    bias = None if bias is None else normal(3, len(sizes), n, dtype=bias)
    operands = x.values, transposed(x.scales, groups.num_rows), weights.values, weight_scales(weights)
    act = ACT if gated else None
    assert kernel.supports(*operands, act, dtype) is None
    schedule = groups.tile_group, groups.tile_starts, groups.tile_sizes, groups.num_tiles
    out = kernel.grouped_matmul(
        *operands, *schedule, bias, act, config=config, out_dtype=dtype, interpret=_compat.interpret_params()
    )
    right = expected(x, weights, groups, bias, gated)
    assert out.dtype == jnp.dtype(dtype)
    check_close(out, right, 6e-3)
    assert_discriminates(lambda y: check_close(y, right, 6e-3), out)
    return np.asarray(out, np.float32)


CASES = {
    "blocks": ("fp8_block", (3, 0, 20), 256, 256),
    "blocks, gated, K and rows that do not divide": (
        "fp8_block",
        (3, 70, 0),
        320,
        384,
        dict(gated=True, bias="float32"),
    ),
    "blocks, many rows": ("fp8_block", (130, 20), 384, 512, dict(gated=True, config=MANY)),
    "blocks, deep stages": ("fp8_block", (5, 9), 576, 160, dict(config=DEEP, dtype="float16")),
    "blocks, powers of two": ("fp8_block_ue8m0", (3, 20), 256, 128),
    "channels": ("fp8_channel", (3, 0, 20), 256, 256, dict(bias="bfloat16")),
    "channels, many rows": ("fp8_channel", (130, 5), 320, 160, dict(gated=True, config=MANY)),
    "one scale a half": ("fp8_tensor", (3, 9), 192, 96, dict(gated=True)),
    "one scale a matrix": ("fp8_tensor", (3, 9), 192, 96),
    "int8": ("int8_channel", (3, 20), 256, 128, dict(gated=True)),
    "int8 blocks": ("int8_block", (3, 20), 256, 128),
}


@pytest.mark.parametrize("name", CASES)
def test_scales(name):
    *operands, more = CASES[name] if isinstance(CASES[name][-1], dict) else (*CASES[name], {})
    run(*operands, **more)


@pytest.mark.once
@pytest.mark.parametrize("columns", [16, 32])
def test_narrow_tiles(columns):
    """Stages with several pieces of K side by side; columns past the last."""
    config = Config((8,), 1, tile_k=128 * 64 // columns, stages=2, columns=columns)
    run("fp8_block", (3, 8), 640, 2 * 176, gated=True, config=config)


@pytest.mark.once
def test_a_row_has_the_same_bits_in_any_tile():
    few = run("fp8_block", (3, 20), 320, 128)
    many = run("fp8_block", (3, 20), 320, 128, config=MANY)
    deep = run("fp8_block", (3, 20), 320, 128, config=DEEP)
    np.testing.assert_array_equal(few, many)
    np.testing.assert_array_equal(few, deep)


@pytest.mark.parametrize("name", ["fp8_block", "fp8_channel"])
def test_few_tokens_are_the_rows_of_all_tiles(name):
    form, rule = quant_format(name), config_of("renormalize", 2, 4).routing.rule
    _, groups = route_groups(
        jnp.asarray(logits_of(5, 11, 4)), 2, rule, share_rows=True, implementation="mosaic_interpret"
    )
    x = quantize(normal(6, 11, 128, dtype="bfloat16"), form.activations)
    weights = quantize(normal(7, 4, 128, 128, scale=128**-0.5), form.weights)
    out = kernel.grouped_matmul(
        x.values,
        transposed(x.scales, 11),
        weights.values,
        weight_scales(weights),
        groups.tile_group,
        groups.tile_starts,
        groups.tile_sizes,
        groups.num_tiles,
        None,
        None,
        config=Config((8, 16), consumers=1, tile_k=128, stages=2),
        out_dtype="bfloat16",
        tile_tokens=groups.tile_tokens,
        total_rows=groups.num_rows,
        interpret=_compat.interpret_params(),
    )
    rows, matrices = np.asarray(x.dequantize()), np.asarray(weights.dequantize())
    right = np.zeros((groups.num_rows, 128), np.float32)
    for tile in range(int(groups.num_tiles[0])):
        tokens = [t for t in range(11) if int(groups.tile_tokens[tile]) >> t & 1]
        start = int(groups.tile_starts[tile])
        right[start : start + len(tokens)] = rows[tokens] @ matrices[int(groups.tile_group[tile])].T
    check_close(out, right, 6e-3)


SHAPES = {  # E, H, I
    "qwen3-30b-a3b": (128, 2048, 768),
    "dsv3": (32, 7168, 2048),
    "gpt-oss-120b": (128, 2880, 2880),
    "mixtral-8x7b": (8, 4096, 14336),
}


# Scales of blocks depend on the shape; those of channels are one a row: a K of whole stages and one that ends within.
FORMS_AND_SHAPES = [
    *(("fp8_block", name) for name in SHAPES),
    ("fp8_channel", "dsv3"),
    ("fp8_channel", "gpt-oss-120b"),
    ("int8_channel", "gpt-oss-120b"),
]


@pytest.mark.parametrize(("form", "name"), FORMS_AND_SHAPES)
def test_lowers_for_cuda(monkeypatch, form, name):
    monkeypatch.undo()
    experts, hidden, inner = SHAPES[name]
    spec, activations = quant_format(form).weights, quant_format(form).activations
    rows, dtype = 4096, jnp.dtype(spec.dtype)
    for n, k, act in ((2 * inner, hidden, ACT), (hidden, inner, None)):
        groups, blocks = -(-k // 128), 2 * -(-inner // 128) if act else -(-n // 128)
        by_block = activations.granularity == "group"
        of_rows = like("float32", groups if by_block else 1, rows + 192)
        of_weights = like("float32", experts, blocks, groups) if by_block else like("float32", experts, n)
        operands = like(dtype, rows, k), of_rows, like(dtype, experts, n, k), of_weights
        assert kernel.supports(*operands, act, "bfloat16") is None
        schedule = [like("int32", 64)] * 3 + [like("int32", 1)]
        matmul = functools.partial(kernel.grouped_matmul, config=Config((32, 128), tile_k=128, stages=3))
        assert_lowers_to_kernels(
            lambda *a, matmul=matmul, act=act: matmul(*a, None, act, out_dtype="bfloat16"), *operands, *schedule
        )


def test_what_it_does_not_run():
    def reason(rows="float8_e4m3fn", k=256, n=256, scales=(2, 2, 2), groups=2, out="bfloat16", act=None):
        operands = (
            like(rows, 64, k),
            like("float32", groups, 256),
            like("float8_e4m3fn", 2, n, k),
            like("float32", *scales),
        )
        return kernel.supports(*operands, act, out)

    assert reason() is None
    assert "int8" in reason(rows="int8")
    assert "float32" in reason(out="float32")
    assert "size=96" in reason(k=96)
    assert "size=200" in reason(n=200)
    assert "one for each 128" in reason(groups=1)
    assert "multiple of 64" in reason(scales=(2, 8, 2))
    assert "empty" in reason(n=0)


def test_rows_of_a_block():
    for n_out, blocks, gated, rows in (
        (768, 6, False, 128),
        (768, 12, True, 128),
        (192, 2, False, 128),
        (96, 2, True, 128),
    ):
        assert block_rows(n_out, blocks, gated) == rows


def test_the_largest_tiles_leave_room_for_scales(monkeypatch):
    """An operation that is given no configuration, for rows cut into the largest tiles."""
    monkeypatch.undo()  # row counts as they are
    form = quant_format("fp8_channel")

    groups = groups_with_sizes(1, (500, 300), 160)

    def call(values, scales, weights, weight_scales):
        rows = QuantizedRows(values, scales, form.activations)
        experts = QuantizedArray(weights, weight_scales, spec=form.weights, halves=2)
        return grouped_matmul(rows, experts, groups, activation=ACT, implementation="mosaic")

    codes = like("float8_e4m3fn", 800, 256), like("float32", 1, 992)
    assert_lowers_to_kernels(call, *codes, like("float8_e4m3fn", 2, 512, 256), like("float32", 2, 512))
