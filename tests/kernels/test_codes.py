"""Weights that are codes of a byte times 16-bit rows, interpreted and lowered for CUDA."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import MoEConfig, _compat
from moe_jax.kernels.hopper import matmul_bf16 as kernel
from moe_jax.kernels.hopper.decoding_config import Projection, four_bit, one_byte
from moe_jax.kernels.hopper.matmul_config import Config, default_config
from moe_jax.ops.grouped_matmul import grouped_matmul
from moe_jax.quantization import quant_format, quantize
from tests.contracts import groups_with_sizes
from tests.kernels.test_matmul_fp8 import expected, weight_scales
from tests.layers import normal
from tests.lowering import assert_lowers_to_kernels, like, mosaic_code
from tests.util import assert_discriminates, check_close

FEW = Config((8, 24), consumers=1, tile_k=128, stages=3)
MANY = Config((48, 128), consumers=2, tile_k=64, stages=3, overlap=False)
PAIR = Config((8, 64), consumers=2, halves=1, tile_k=128, stages=3, paired=True)
TWO_PAIRS = dataclasses.replace(PAIR, consumers=4, tile_k=64)
INTERLEAVED = Config((8, 24), consumers=1, halves=1, columns=32, interleaved=True, tile_k=128, stages=3)
ACT = MoEConfig(1, 1, 8, 8).act
CASES = {
    "channels": ("fp8_weight_channel", (3, 0, 20), 256, 96, {}),
    "channels, gated": ("fp8_weight_channel", (3, 30), 192, 96, dict(gated=True, bias="float32")),
    "channels, many rows": ("int8_weight", (130, 5), 128, 160, dict(gated=True, config=MANY)),
    "one scale a half": ("fp8_weight_tensor", (3, 9), 192, 96, dict(gated=True)),
    "one scale a matrix": ("fp8_weight_tensor", (3, 9), 64, 96, dict(dtype="float16")),
    "blocks": ("fp8_weight_block", (3, 20), 320, 384, dict(gated=True)),
    "blocks, not gated": ("fp8_weight_block", (20, 3), 256, 256, dict(config=MANY)),
    "channels, a pair": ("int8_weight", (3, 0, 40), 192, 2 * 80, dict(gated=True, bias="float32", config=PAIR)),
    "blocks, two pairs": ("fp8_weight_block", (3, 40), 320, 384, dict(gated=True, config=TWO_PAIRS)),
    "one scale a half, a pair": ("fp8_weight_tensor", (3, 9), 192, 96, dict(gated=True, config=PAIR)),
    "channels, four consumers": (
        "fp8_weight_channel",
        (20, 3),
        192,
        320,
        dict(config=Config((8, 32), consumers=4, halves=1, tile_k=64, stages=3)),
    ),
    "lines of 128 bytes": ("int8_weight", (3, 0, 40), 256, 2 * 80, dict(gated=True, bias="float32", config=PAIR)),
    "blocks in lines of 128 bytes": (
        "fp8_weight_block",
        (3, 20),
        384,
        256,
        dict(config=Config((8, 32), consumers=4, halves=1, tile_k=256, stages=2)),
    ),
    "channels, interleaved": (
        "int8_weight",
        (3, 0, 9),
        256,
        2 * 80,
        dict(gated=True, bias="float32", config=INTERLEAVED),
    ),
    "blocks, interleaved": ("fp8_weight_block", (3, 20), 320, 384, dict(gated=True, config=INTERLEAVED)),
    "one scale a half, interleaved": (
        "fp8_weight_tensor",
        (3, 9),
        192,
        2 * 96,
        dict(gated=True, dtype="float16", config=dataclasses.replace(INTERLEAVED, consumers=4, tile_k=64)),
    ),
    "narrow tiles": ("int8_weight", (3, 8), 512, 80, dict(config=Config((8,), 1, 1, tile_k=256, stages=2, columns=16))),
}


class Rows:
    """Rows that are not quantized, for `expected`."""

    def __init__(self, rows):
        self._rows = rows

    def dequantize(self):
        return self._rows.astype(jnp.float32)


def problem_of(form, sizes, k, n, more):
    """Groups, rows, quantized weights, a bias or None, whether there is a gate, and how the kernel is tiled."""
    gated, config, dtype = more.get("gated", False), more.get("config", FEW), more.get("dtype", "bfloat16")
    groups = groups_with_sizes(1, sizes, config.tile_rows)
    x = normal([1, 1], groups.num_rows, k, dtype=dtype)
    weights = normal([2, 1], len(sizes), n, k, scale=k**-0.5)
    weights = quantize(weights, quant_format(form).weights, halves=2 if gated else 1)
    bias = normal(3, len(sizes), n, dtype=more["bias"]) if "bias" in more else None
    return groups, x, weights, bias, gated, config


def multiply(name, config=None):
    """The problem's product, and what it should be."""
    groups, x, weights, bias, gated, given = problem_of(*CASES[name])
    act, scales, config = ACT if gated else None, weight_scales(weights), config or given
    assert kernel.supports(x, weights.values, bias, act, config.tile_rows, weight_scales=scales) is None
    schedule = groups.tile_group, groups.tile_starts, groups.tile_sizes, groups.num_tiles
    options = dict(config=config, weight_scales=scales, interpret=_compat.interpret_params())
    out = kernel.grouped_matmul(x, weights.values, *schedule, bias, act, **options)
    assert out.dtype == x.dtype
    return out, expected(Rows(x), weights, groups, bias, gated)


@pytest.mark.parametrize("name", CASES)
def test_codes(name):
    out, right = multiply(name)
    check_close(out, right, 6e-3)
    assert_discriminates(lambda y: check_close(y, right, 6e-3), out)


@pytest.mark.parametrize("name", [name for name in CASES if "pair" in name or "interleaved" in name])
def test_consumers_do_not_change_the_bits(name):
    config = CASES[name][-1]["config"]
    one = dataclasses.replace(config, consumers=1, halves=2, paired=False, interleaved=False, columns=64)
    out, again = (np.asarray(multiply(name, each)[0]).view("u2") for each in (config, one))
    np.testing.assert_array_equal(out, again)


@pytest.mark.parametrize("gated", [True, False])
def test_the_rule_keeps_the_row_tile(gated):
    """Groups are cut by it: rows beyond would be left out."""
    for rows, mean_rows in itertools.product(range(8, 193, 8), (1.0, 8.0, 300.0)):
        config, projection = default_config(rows, gated, 768, 128), Projection(gated, 768, 128, mean_rows)
        found = [
            four_bit(config, projection),
            *(one_byte(config, projection, in_blocks) for in_blocks in (True, False)),
        ]
        assert {each.tile_rows for each in found} == {rows}


@pytest.mark.parametrize(
    ("rows", "n_out", "mean_rows", "in_blocks", "tiles"),
    [
        (16, 2048, 1.0, False, (4, 256, 2)),
        (16, 2048, 0.5, False, (2, 256, 5)),  # few tiles: half as wide
        (16, 2048, 0.5, True, (4, 256, 2)),
        (48, 2880, 32.0, True, (2, 256, 5)),  # four consumers' columns do not divide the output
        (64, 2048, 40.0, False, (4, 128, 3)),  # two stages of 256 do not fit
        (64, 2880, 40.0, False, (2, 128, 4)),
    ],
)
def test_tiles_of_few_rows(rows, n_out, mean_rows, in_blocks, tiles):
    config = Config((rows,), consumers=1, tile_k=128, stages=4)
    for gated in (True, False):
        found = one_byte(config, Projection(gated, n_out, 128, mean_rows), in_blocks)
        assert (found.consumers, found.tile_k, found.stages) == tiles
        assert found.paired == gated and found.halves == 1 and found.tile_rows == rows and not found.overlap


def test_tiles_of_more_rows_than_the_rule_has():
    groups, x, weights, *_ = problem_of("int8_weight", (180, 5), 64, 64, dict(config=Config((192,))))
    out = grouped_matmul(x, weights, groups, implementation="mosaic_interpret")
    right = expected(Rows(x), weights, groups, None, False)
    check_close(out, right, 6e-3)
    assert_discriminates(lambda y: check_close(y, right, 6e-3), out)


@pytest.mark.parametrize(("rows", "greater"), [("bfloat16", 64), ("float16", 512)])
def test_sums_of_int8_are_scaled_back(monkeypatch, rows, greater):
    """What is decoded of int8 is so much smaller; the interpreter decodes in another way and has no such factor."""
    monkeypatch.undo()
    config = Config((8,), consumers=1, halves=1, tile_k=128, stages=2)

    def multiply(x, weights, scales, *schedule):
        return kernel.grouped_matmul(x, weights, *schedule, None, None, config=config, weight_scales=scales)

    def factors(of):
        schedule = [*[like("int32", 8)] * 3, like("int32", 1)]
        code = mosaic_code(multiply, like(rows, 64, 128), like(of, 2, 128, 128), like("float32", 2, 128), *schedule)
        return code.count(f"{greater:e}")

    assert factors("int8") == 1 and factors("float8_e4m3fn") == 0


@pytest.mark.parametrize(
    ("form", "shape", "gather"),
    [
        ("fp8_weight_channel", (128, 2048, 768), True),
        ("fp8_weight_block", (128, 2880, 2880), False),
        ("int8_weight", (128, 2880, 2880), False),
        ("int8_weight", (128, 2048, 768), True),
    ],
)
def test_lowers_for_cuda(monkeypatch, form, shape, gather):
    monkeypatch.undo()
    experts, hidden, inner = shape
    spec = quant_format(form).weights
    for n, k, act in ((2 * inner, hidden, ACT), (hidden, inner, None)):
        fetched = gather and act is not None
        blocks = 2 * -(-inner // 128) if act else -(-n // 128)
        scales = (experts, blocks, -(-k // 128)) if spec.granularity == "block" else (experts, n)
        operands = like("bfloat16", 4096, k), like(spec.dtype, experts, n, k)
        schedule = [like("int32", 64)] * 3 + [like("int32", 1)]
        config = Config((32, 64, 128), stages=4, overlap=False, gather=fetched)
        assert kernel.supports(*operands, None, act, 128, fetched, like("float32", *scales)) is None

        def run(rows, weights, scales, tokens, *schedule, act=act, config=config, fetched=fetched):
            more = dict(row_tokens=tokens, total_rows=8192) if fetched else {}
            return kernel.grouped_matmul(
                rows, weights, *schedule, None, act, config=config, weight_scales=scales, **more
            )

        tokens = like("int32", 8192 + 128)
        assert_lowers_to_kernels(run, *operands, like("float32", *scales), tokens, *schedule)


def test_what_it_does_not_run():
    def reason(codes="int8", k=256, n=256, scales=(2, 256)):
        return kernel.supports(
            like("bfloat16", 64, k), like(codes, 2, n, k), None, None, 64, weight_scales=like("float32", *scales)
        )

    assert reason() is None and reason(scales=(2, 2, 2)) is None
    assert "uint8" in reason(codes="uint8")
    assert "size=96" in reason(k=96)
    assert "multiple of 64 rows" in reason(scales=(2, 8, 2))
    assert "multiple of 64 columns" in reason(scales=(2, 2, 8))


def test_16_bit_weights_need_no_scales():
    assert "both be" in kernel.supports(like("bfloat16", 64, 64), like("int8", 2, 64, 64), None, None, 64)
    assert kernel.supports(like("bfloat16", 64, 64), like("bfloat16", 2, 64, 64), None, None, 64) is None
