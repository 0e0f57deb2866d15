"""The grouped matmul with rows on the M side of wgmma: against float32, bit for bit that with weights there, lowered for CUDA."""

import dataclasses
import functools

import numpy as np
import pytest

from moe_jax import _compat
from moe_jax.kernels.hopper import matmul_fp8
from moe_jax.kernels.hopper import matmul_rows_first as kernel
from moe_jax.kernels.hopper.matmul_config import Config
from moe_jax.ops.matmul_and_quantize import matmul_and_quantize
from moe_jax.quantization import quant_format, quantize
from moe_jax.quantization.fp8_training import rows_spec
from moe_jax.quantization.rows import QuantizedRows
from tests.contracts import groups_with_sizes
from tests.kernels.test_matmul_fp8 import ACT, expected, transposed, weight_scales
from tests.layers import normal
from tests.lowering import assert_lowers_to_kernels, like
from tests.util import assert_discriminates, check_close

CONFIG = Config((64, 128), tile_k=128, stages=2, overlap=False, rows_first=True)
OTHER = Config((128,), tile_k=128, stages=2, overlap=False)


def operands_of(name, sizes, k, n, gated):
    """Rows, weights, and the rows' schedule."""
    form, groups = quant_format(name), groups_with_sizes(1, sizes, 128)
    x = quantize(normal(1, groups.num_rows, k, dtype="bfloat16"), form.activations)
    weights = quantize(normal(2, len(sizes), n, k, scale=k**-0.5), form.weights, halves=2 if gated else 1)
    return x, weights, groups


CASES = {
    "gated, no row and more than a tile": ("fp8_block", (132, 0, 5), 256, 256, True, "float32"),
    "K, columns and rows that do not divide": ("fp8_block", (68, 3), 320, 2 * 192, True, None),
    "no gate, one consumer at work": ("fp8_block", (4, 60), 256, 320, False, "bfloat16"),
    "int8": ("int8_block", (72,), 256, 128, False, None),
    "groups that begin anywhere": ("fp8_block", (5, 70), 128, 256, True, None),
}


@pytest.mark.parametrize("case", CASES)
def test_products_and_bits(case):
    """Where the other kernel is run too, it makes the same bits."""
    name, sizes, k, n, gated, bias = CASES[case]
    x, weights, groups = operands_of(name, sizes, k, n, gated)
    bias = None if bias is None else normal(3, len(sizes), n, dtype=bias)
    operands = x.values, transposed(x.scales, groups.num_rows), weights.values, weight_scales(weights)
    schedule = groups.tile_group, groups.tile_starts, groups.tile_sizes, groups.num_tiles
    act = ACT if gated else None
    assert kernel.supports(n // (2 if gated else 1), weights.scales.shape[1], gated, CONFIG) is None
    aligned = not np.any(np.asarray(groups.tile_starts) % 4)
    assert aligned == (case != "groups that begin anywhere")
    options = dict(out_dtype="bfloat16", interpret=_compat.interpret_params(), multiprocessors=2, aligned=aligned)
    out = kernel.grouped_matmul(*operands, *schedule, bias, act, config=CONFIG, **options)
    right = expected(x, weights, groups, bias, gated)
    check_close(out, right, 6e-3)
    assert_discriminates(lambda y: check_close(y, right, 6e-3), out)
    if k % 128 or not gated and name == "fp8_block":
        return
    same = matmul_fp8.grouped_matmul(*operands, *schedule, bias, act, config=OTHER, **options)
    np.testing.assert_array_equal(np.asarray(out).view(np.uint16), np.asarray(same).view(np.uint16))


def test_gradients_in_e5m2():
    """With both kernels, beside weights in e4m3."""
    x, weights, groups = operands_of("fp8_block", (68, 3), 256, 256, False)
    x = quantize(x.dequantize(), rows_spec("float8_e5m2"))
    operands = x.values, transposed(x.scales, groups.num_rows), weights.values, weight_scales(weights)
    schedule = groups.tile_group, groups.tile_starts, groups.tile_sizes, groups.num_tiles
    options = dict(out_dtype="bfloat16", interpret=_compat.interpret_params(), multiprocessors=2, aligned=True)
    assert matmul_fp8.supports(*operands, None, "bfloat16") is None
    out, same = (
        module.grouped_matmul(*operands, *schedule, None, None, config=config, **options)
        for module, config in ((kernel, CONFIG), (matmul_fp8, OTHER))
    )
    check_close(out, expected(x, weights, groups, None, False), 6e-3)
    np.testing.assert_array_equal(np.asarray(out).view(np.uint16), np.asarray(same).view(np.uint16))
    turned = weights.values[0], operands[1], x.values[None], operands[3]
    assert "rows also float8_e5m2" in matmul_fp8.supports(*turned, None, "bfloat16")


@pytest.mark.parametrize(
    ("name", "sizes", "multiple"),
    [("fp8_block", (72, 0, 11), 4), pytest.param("int8_block", (5, 70), 1, marks=pytest.mark.once)],
)
def test_rows_quantized_as_they_leave(name, sizes, multiple):
    """Through the op: codes and scales of rows bit for bit those of a kernel that reads the rows again."""
    x, weights, groups = operands_of(name, sizes, 128, 256, True)
    rows = QuantizedRows(x.values, transposed(x.scales, groups.num_rows), x.spec)
    spec = quant_format(name).activations
    groups = dataclasses.replace(groups, row_multiple=multiple)
    found, right = (
        matmul_and_quantize(
            rows, weights, groups, spec, activation=ACT, config=config, implementation="mosaic_interpret"
        )
        for config in (dataclasses.replace(CONFIG, quantizes=True), CONFIG)
    )
    for mine, other in ((found.values, right.values), (found.scales, right.scales)):
        mine, other = (np.asarray(a)[..., : groups.num_rows].view(np.uint8) for a in (mine, other))
        np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize(("quantizes", "aligned"), [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("shape", [(128, 2048, 768), (32, 7168, 2048), (8, 4096, 14336)], ids=str)
def test_lowers_for_cuda(monkeypatch, shape, quantizes, aligned):
    monkeypatch.undo()
    experts, hidden, inner = shape
    rows, spec = 4096, quant_format("fp8_block").activations
    for n, k, act in ((2 * inner, hidden, ACT), (hidden, inner, None)):
        blocks = 2 * (inner // 128) if act else n // 128
        codes = like("float8_e4m3fn", rows, k), like("float32", k // 128, rows + 192)
        operands = *codes, like("float8_e4m3fn", experts, n, k), like("float32", experts, blocks, k // 128)
        schedule = [like("int32", 64)] * 3 + [like("int32", 1)]
        quantize = spec if quantizes and act else None
        options = dict(config=CONFIG, out_dtype="bfloat16", quantize=quantize, aligned=aligned)
        matmul = functools.partial(kernel.grouped_matmul, **options)
        assert_lowers_to_kernels(lambda *a, matmul=matmul, act=act: matmul(*a, None, act), *operands, *schedule)


def test_what_it_does_not_run():
    def reason(n_out=768, blocks=12, gated=True, quantize=False, **change):
        return kernel.supports(n_out, blocks, gated, dataclasses.replace(CONFIG, **change), quantize=quantize)

    assert reason() is None
    assert "consumers=2" in reason(consumers=1)
    assert "halves=2" in reason(halves=1)
    assert "columns=64" in reason(columns=32)
    assert "tile_rows=128" in reason(row_counts=(64,))
    assert "blocks of 64" in reason(blocks=24)
    assert "size=800" in reason(n_out=800, blocks=14)
    assert "multiple of 128" in reason(n_out=704, blocks=12, quantize=True)
    assert "gated" in reason(n_out=768, blocks=6, gated=False, quantize=True)
