"""Four-bit weights that become FP8 on their way: bit for bit the kernels of FP8 weights, and lowered for CUDA."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from moe_jax import MoEConfig, _compat
from moe_jax.kernels.hopper import matmul_fp8, matmul_rows_first
from moe_jax.kernels.hopper.matmul_config import Config
from moe_jax.ops.grouped_matmul import grouped_matmul
from moe_jax.ops.matmul_and_quantize import matmul_and_quantize
from moe_jax.quantization import fp8_blocks, prepare, quant_format, quantize
from moe_jax.quantization.rows import QuantizedRows
from moe_jax.tuning.fit import config_misfit, misfit
from moe_jax.tuning.plan import LayerShape, default_plan
from tests.contracts import groups_with_sizes
from tests.kernels.test_matmul_fp8 import ACT, expected, transposed
from tests.layers import normal
from tests.lowering import assert_lowers_to_kernels, like, mosaic_code
from tests.util import assert_discriminates, check_close

FP8 = "float8_e4m3fn"
FEW = Config((8, 24), consumers=1, tile_k=256, stages=2, codes_stages=3)
MANY = Config((48, 96), tile_k=128, stages=2, codes_stages=2, overlap=False)
FIRST = Config((64, 128), tile_k=128, stages=2, codes_stages=3, overlap=False, rows_first=True)
CASES = {
    "nvfp4, K and rows that do not divide": ("nvfp4", (3, 0, 20), 320, 2 * 96, True, FEW),
    "mxfp4, one half": ("mxfp4", (3, 9), 256, 80, False, dataclasses.replace(FEW, halves=1)),
    "mxfp4, two consumers": ("mxfp4", (50, 5), 192, 2 * 192, True, MANY),
    "nvfp4, no gate, two consumers": ("nvfp4", (50,), 128, 320, False, MANY),
    "nvfp4, rows first": ("nvfp4", (72, 4), 128, 2 * 128, True, FIRST),
    "mxfp4, rows first, no gate": ("mxfp4", (72,), 192, 320, False, FIRST),
}


def problem(form, sizes, k, n, gated, tile_rows):
    """Rows, four-bit weights, and the rows' schedule."""
    groups = groups_with_sizes(1, sizes, tile_rows)
    x = quantize(normal(1, groups.num_rows, k, dtype="bfloat16"), quant_format("nvfp4_fp8").activations)
    weights = quantize(normal(2, len(sizes), n, k, scale=k**-0.5), quant_format(form).weights, halves=2 if gated else 1)
    return x, weights, groups


ONCE = ("mxfp4, one half", "nvfp4, no gate, two consumers")


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.once if case in ONCE else ()) for case in CASES])
def test_bits_of_the_kernels_of_fp8(case):
    form, sizes, k, n, gated, config = CASES[case]
    x, weights, groups = problem(form, sizes, k, n, gated, config.tile_rows)
    act, kernel = ACT if gated else None, matmul_rows_first if config.rows_first else matmul_fp8
    of_rows = x.values, transposed(x.scales, groups.num_rows)
    schedule = groups.tile_group, groups.tile_starts, groups.tile_sizes, groups.num_tiles
    prepared, blocks = prepare(weights, FP8), fp8_blocks(weights)
    assert matmul_fp8.supports(*of_rows, prepared, prepared.scales, act, "bfloat16") is None
    assert config_misfit(config, gated, "bfloat16", "float4_e2m1fn group") is None
    options = dict(config=config, out_dtype="bfloat16", interpret=_compat.interpret_params(), multiprocessors=2)
    out, same = (
        kernel.grouped_matmul(*of_rows, values, blocks.scales, *schedule, None, act, **options)
        for values in (prepared, blocks.values)
    )
    np.testing.assert_array_equal(np.asarray(out).view(np.uint16), np.asarray(same).view(np.uint16))
    right = expected(x, blocks, groups, None, gated)
    check_close(out, right, 6e-3)
    assert_discriminates(lambda y: check_close(y, right, 6e-3), out)


@pytest.mark.once
def test_rows_quantized_as_they_leave():
    """Codes and scales bit for bit those of a kernel that reads the rows again, with weights in either order."""
    x, weights, groups = problem("nvfp4", (72, 0, 12), 128, 256, True, 128)
    rows, groups = (
        QuantizedRows(x.values, transposed(x.scales, groups.num_rows), x.spec),
        dataclasses.replace(groups, row_multiple=4),
    )
    options = dict(activation=ACT, implementation="mosaic_interpret")
    found, right = (
        matmul_and_quantize(
            rows, given, groups, x.spec, config=dataclasses.replace(FIRST, quantizes=quantizes), **options
        )
        for given, quantizes in ((weights, True), (prepare(weights, FP8), False))
    )
    for mine, other in ((found.values, right.values), (found.scales, right.scales)):
        mine, other = (np.asarray(a)[..., : groups.num_rows].view(np.uint8) for a in (mine, other))
        np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize(("k", "tolerance"), [(128, 4e-3), pytest.param(80, 1e-2, marks=pytest.mark.once)])
def test_the_op_and_its_plain_form(k, tolerance):
    """Natural order is prepared by the op; a size without a kernel is multiplied as what the weights are rounded to."""
    x, weights, groups = problem("nvfp4", (5, 9), k, 64, False, 24)
    rows = QuantizedRows(x.values, transposed(x.scales, groups.num_rows), x.spec)
    out, plain = (grouped_matmul(rows, weights, groups, implementation=how) for how in ("mosaic_interpret", "xla"))
    again = grouped_matmul(rows, prepare(weights, FP8), groups, implementation="xla")
    np.testing.assert_array_equal(np.asarray(plain).view(np.uint16), np.asarray(again).view(np.uint16))
    check_close(plain, expected(x, fp8_blocks(weights), groups, None, False), 4e-3)
    check_close(out, plain, tolerance)


@pytest.mark.parametrize(
    ("name", "tokens"), [("nvfp4_fp8", 1), ("mxfp4_fp8", 512), ("nvfp4_fp8", 2048), ("mxfp4_fp8", 8192)]
)
def test_plans_fit_and_lower_for_cuda(monkeypatch, name, tokens):
    monkeypatch.undo()
    experts, hidden, inner = (128, 2880, 2880) if name == "mxfp4_fp8" else (128, 2048, 768)
    layer = MoEConfig(experts, 4, hidden, inner, quantization=name)
    shape = LayerShape.of(layer, tokens)
    assert shape.codes == "float4_e2m1fn group"
    plan, spec = default_plan(shape), layer.quantization.activations
    assert misfit(shape, plan) is None
    for n, k, act, config in ((2 * inner, hidden, ACT, plan.up), (hidden, inner, None, plan.down)):
        weights = jax.eval_shape(
            functools.partial(quantize, spec=layer.quantization.weights, halves=2 if act else 1),
            like("bfloat16", experts, n, k),
        )
        weights = jax.eval_shape(functools.partial(prepare, dtype=FP8), weights)
        kernel = matmul_rows_first if config.rows_first else matmul_fp8
        of_rows = like(FP8, 4096, k), like("float32", -(-k // 128), 4096 + 192)

        def multiply(rows, scales, weights, *schedule, act=act, config=config, kernel=kernel):
            more = dict(config=config, out_dtype="bfloat16", quantize=spec if config.quantizes else None)
            return kernel.grouped_matmul(rows, scales, weights, weights.scales, *schedule, None, act, **more)

        assert_lowers_to_kernels(multiply, *of_rows, weights, *[like("int32", 64)] * 3, like("int32", 1))


def test_eight_weights_take_two_permutations(monkeypatch):
    monkeypatch.undo()
    weights = jax.eval_shape(
        lambda w: prepare(quantize(w, quant_format("nvfp4").weights), FP8), like("bfloat16", 2, 64, 128)
    )
    config = Config((8,), consumers=1, halves=1, tile_k=128, stages=2, codes_stages=2)

    def multiply(rows, scales, weights, *schedule):
        options = dict(config=config, out_dtype="bfloat16")
        return matmul_fp8.grouped_matmul(rows, scales, weights, weights.scales, *schedule, None, None, **options)

    schedule = *[like("int32", 8)] * 3, like("int32", 1)
    code = mosaic_code(multiply, like(FP8, 64, 128), like("float32", 1, 256), weights, *schedule)
    # Of the 64 weights of a thread: for each eight from a table, for each scale a table.
    assert code.count("0x77777777; prmt.b32 $0, $3, $4, m;") == code.count("prmt.b32 $1, $3, $4, m;") == 64 // 8
    assert code.count("prmt.b32 t, $2, $3,") == 64 // 16


def test_what_it_does_not_run():
    codes = "float4_e2m1fn group"
    assert "codes_stages=0" in config_misfit(dataclasses.replace(MANY, codes_stages=0), False, "bfloat16", codes)
    assert "columns=32" in config_misfit(dataclasses.replace(FEW, columns=32), False, "bfloat16", codes)
    assert "shared memory" in config_misfit(
        dataclasses.replace(MANY, stages=3, codes_stages=9), False, "bfloat16", codes
    )
    x, weights, groups = problem("nvfp4", (3,), 128, 64, False, 24)
    rows = QuantizedRows(x.values, transposed(x.scales, 3), x.spec)
    with pytest.raises(ValueError, match="use from_four_bits"):
        config = Config((8, 24), consumers=1, tile_k=128, stages=2)
        grouped_matmul(rows, weights, groups, config=config, implementation="mosaic_interpret")
    with pytest.raises(ValueError, match="prepared for rows of bfloat16 do not become FP8"):
        grouped_matmul(rows, prepare(weights), groups, implementation="xla")
