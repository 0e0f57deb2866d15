"""Four-bit weights times 16-bit rows, interpreted and lowered for CUDA."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from moe_jax import MoEConfig, _compat
from moe_jax.kernels.hopper import matmul_bf16 as kernel
from moe_jax.kernels.hopper.decoding_config import Projection, four_bit
from moe_jax.kernels.hopper.matmul_config import Config
from moe_jax.ops.gather import plain_gather
from moe_jax.ops.grouped_matmul import grouped_matmul
from moe_jax.quantization import prepare, quant_format, quantize
from moe_jax.tuning.plan import LayerShape, default_plan
from tests.contracts import groups_by_token
from tests.kernels.test_codes import ACT, MANY, Rows, problem_of
from tests.kernels.test_matmul_fp8 import expected
from tests.layers import normal
from tests.lowering import assert_lowers_to_kernels, like, mosaic_code
from tests.util import assert_discriminates, check_close

PAIRS = {
    "a pair": Config((8, 32), consumers=2, halves=1, tile_k=128, stages=3, paired=True),
    "two pairs": Config((16, 64), consumers=4, halves=1, tile_k=64, stages=3, paired=True),
}
INTERLEAVED = Config((8, 24), consumers=1, halves=1, columns=32, interleaved=True, tile_k=128, stages=3)
FOUR_STRIPS = Config((8, 16), consumers=4, halves=1, columns=32, interleaved=True, tile_k=64, stages=3, overlap=False)
TEAMS = Config((8, 64), consumers=2, halves=1, tile_k=64, stages=2, paired=True, teams=2)
CASES = {
    "nvfp4": ("nvfp4", (3, 0, 20), 320, 192, {}),
    "nvfp4, gated, ragged": ("nvfp4", (3, 30), 192, 160, dict(gated=True, bias="float32")),
    "nvfp4, many rows": ("nvfp4", (130, 5), 128, 288, dict(gated=True, config=MANY)),
    "mxfp4": ("mxfp4", (3, 20), 192, 256, dict(gated=True)),
    "mxfp4, float16": ("mxfp4", (9, 3), 128, 128, dict(dtype="float16")),
    "int4": ("int4_group128", (3, 9), 192, 128, dict(gated=True)),
    "nvfp4, a pair of consumers": (
        "nvfp4",
        (3, 0, 40, 7),
        320,
        2 * 80,
        dict(gated=True, bias="float32", config=PAIRS["a pair"]),
    ),
    "mxfp4, two pairs": ("mxfp4", (3, 40), 192, 2 * 288, dict(gated=True, config=PAIRS["two pairs"])),
    "four consumers": (
        "nvfp4",
        (9, 3, 50),
        192,
        320,
        dict(config=Config((16, 64), consumers=4, halves=1, tile_k=128, stages=3)),
    ),
    "two teams of a pair": (
        "nvfp4",
        (9, 0, 3, 50, 7),
        320,
        2 * 160,
        dict(gated=True, bias="float32", config=TEAMS),
    ),
    "two teams, one tile": ("nvfp4", (3,), 64, 2 * 64, dict(gated=True, config=TEAMS)),
    "interleaved": ("nvfp4", (3, 0, 20), 320, 2 * 176, dict(gated=True, bias="float32", config=INTERLEAVED)),
    "interleaved, four consumers": ("nvfp4", (3, 0, 12), 192, 2 * 160, dict(gated=True, config=FOUR_STRIPS)),
    "mxfp4, interleaved": ("mxfp4", (3, 20), 192, 2 * 160, dict(gated=True, bias="bfloat16", config=INTERLEAVED)),
    "int4, interleaved": ("int4_group128", (3, 9), 256, 2 * 96, dict(gated=True, config=INTERLEAVED)),
    "int4 with zero points, interleaved": (
        "int4_group32_zp",
        (3, 9),
        128,
        2 * 96,
        dict(gated=True, config=INTERLEAVED),
    ),
    "interleaved teams": (
        "nvfp4",
        (9, 0, 3, 16, 7),
        320,
        2 * 160,
        dict(gated=True, config=dataclasses.replace(FOUR_STRIPS, consumers=2, teams=2, tile_k=64, stages=2)),
    ),
    "mxfp4, two teams": ("mxfp4", (3, 40), 192, 576, dict(config=dataclasses.replace(TEAMS, paired=False))),
    "int4, zero points": ("int4_group32_zp", (20, 3), 128, 80, dict(config=MANY)),
}


@functools.cache
def problem(name):
    return problem_of(*CASES[name])


def run(name, weights, config=None):
    groups, x, _, bias, gated, given = problem(name)
    config = config or given
    act = ACT if gated else None
    assert kernel.supports(x, weights, bias, act, config.tile_rows) is None
    schedule = groups.tile_group, groups.tile_starts, groups.tile_sizes, groups.num_tiles
    interpret = _compat.interpret_params()
    return kernel.grouped_matmul(x, weights, *schedule, bias, act, config=config, interpret=interpret)


@pytest.mark.parametrize("name", CASES)
def test_four_bits(name):
    groups, x, weights, bias, gated, _ = problem(name)
    out = run(name, prepare(weights, x.dtype.name))
    right = expected(Rows(x), weights, groups, bias, gated)
    assert out.dtype == x.dtype
    check_close(out, right, 6e-3)
    assert_discriminates(lambda y: check_close(y, right, 6e-3), out)


@pytest.mark.parametrize(
    "name",
    [name for name in CASES if any(word in name for word in ("pair", "four consumers", "two teams", "interleaved"))],
)
def test_consumers_do_not_change_the_bits(name):
    _, x, weights, _, gated, config = problem(name)
    one = Config(config.row_counts, consumers=1, halves=2 if gated else 1, tile_k=128, stages=2)
    prepared = prepare(weights, x.dtype.name)
    out, again = (np.asarray(run(name, prepared, each)).view("u2") for each in (config, one))
    np.testing.assert_array_equal(out, again)


@pytest.mark.once
@pytest.mark.parametrize("name", ["mxfp4", "int4"])
def test_it_is_the_kernel_of_16_bits_on_what_they_stand_for(name):
    """Where nothing but the products is rounded: scales of a matrix are powers of two."""
    _, x, weights, *_ = problem(name)
    prepared = prepare(weights, x.dtype.name)
    assert np.array_equal(run(name, prepared), run(name, prepared.dequantize(x.dtype)))


@pytest.mark.parametrize(
    ("form", "config"),
    [
        ("nvfp4", Config((8, 64), consumers=1, tile_k=128, stages=3, gather=True)),
        ("int4_group32_zp", Config((48, 96), stages=3, gather=True)),
    ],
)
def test_rows_fetched_by_their_tokens(form, config):
    """A group of none, of a few rows and of two tiles; K ends within a stage of 128; the bits of rows gathered before."""
    groups = groups_by_token(15, config.tile_rows + 9, config.tile_rows)
    x = normal(15, config.tile_rows + 9, 192, dtype="bfloat16")
    weights = quantize(normal([15, 1], 4, 256, 192, scale=192**-0.5), quant_format(form).weights, halves=2)
    out, right = (
        grouped_matmul(
            rows,
            prepare(weights),
            groups,
            activation=ACT,
            tokens_as_rows=rows is x,
            config=config,
            implementation="mosaic_interpret",
        )
        for rows in (x, plain_gather(x, groups.positions))
    )
    total = int(groups.group_sizes.sum())
    np.testing.assert_array_equal(out[:total], right[:total])
    check_close(
        out[:total], expected(Rows(plain_gather(x, groups.positions)), weights, groups, None, True)[:total], 6e-3
    )


@pytest.mark.once
def test_natural_order_is_prepared_by_the_op():
    groups, x, weights, bias, gated, config = problem("nvfp4")
    out = grouped_matmul(x, weights, groups, config=config, implementation="mosaic_interpret")
    assert np.array_equal(out, run("nvfp4", prepare(weights)))
    plain = grouped_matmul(x, prepare(weights), groups, implementation="xla")
    check_close(plain, grouped_matmul(x, weights, groups, implementation="xla"), 1e-6)


@pytest.mark.parametrize(("form", "tokens"), [("nvfp4", 1), ("int4_group32_zp", 128), ("mxfp4", 4096)])
def test_lowers_for_cuda(monkeypatch, form, tokens):
    monkeypatch.undo()
    experts, hidden, inner = 128, 2880, 2880
    config = MoEConfig(experts, 4, hidden, inner, quantization=form)
    plan = default_plan(LayerShape.of(config, tokens))
    for n, k, act, tiles in ((2 * inner, hidden, ACT, plan.up), (hidden, inner, None, plan.down)):
        spec, halves = quant_format(form).weights, 2 if act else 1
        weights = jax.eval_shape(
            lambda w, spec=spec, halves=halves: prepare(quantize(w, spec, halves=halves)),
            like("bfloat16", experts, n, k),
        )
        rows = like("bfloat16", 4096, k)
        assert kernel.supports(rows, weights, None, act, tiles.tile_rows) is None

        def multiply(rows, weights, *schedule, act=act, tiles=tiles):
            return kernel.grouped_matmul(rows, weights, *schedule, None, act, config=tiles)

        assert_lowers_to_kernels(multiply, rows, weights, *[like("int32", 64)] * 3, like("int32", 1))


def test_a_pair_is_decoded_by_few_instructions(monkeypatch):
    monkeypatch.undo()
    weights = jax.eval_shape(
        lambda w: prepare(quantize(w, quant_format("nvfp4").weights)), like("bfloat16", 2, 64, 128)
    )
    config = Config((8,), consumers=1, halves=1, tile_k=64, stages=2)

    def multiply(rows, weights, *schedule):
        return kernel.grouped_matmul(rows, weights, *schedule, None, None, config=config)

    code = mosaic_code(multiply, like("bfloat16", 64, 128), weights, *[like("int32", 8)] * 3, like("int32", 1))
    assert code.count("mul.rn.bf16x2") == 16  # one for each pair of a thread
    assert code.count("and.b32") == 20 and code.count("mul.lo.u32") == 4  # of four pairs one takes two, and a product
    assert code.count("lop3.b32") == 4  # one for each two scales


def test_a_bias_is_not_merged_with_the_factor():
    """Compilers do so in some copies of a kernel: a row's bits would depend on its tile."""
    weights = jax.eval_shape(
        lambda w: prepare(quantize(w, quant_format("nvfp4").weights)), like("bfloat16", 2, 128, 128)
    )
    config = Config((8, 16), consumers=1, halves=2, tile_k=128, stages=4)

    def multiply(x, weights, *schedule):
        *schedule, bias = schedule
        return kernel.grouped_matmul(x, weights, *schedule, bias, None, config=config)

    schedule = [*[like("int32", 8)] * 3, like("int32", 1)]
    code = mosaic_code(multiply, like("bfloat16", 64, 128), weights, *schedule, like("float32", 2, 128))
    assert "add.rn.f32" in code and "arith.mulf" in code and "arith.addf" not in code


def test_what_it_does_not_run():
    def reason(k=256, dtype="bfloat16", tile_rows=64):
        weights = jax.eval_shape(
            lambda w: prepare(quantize(w, quant_format("nvfp4").weights)), like("bfloat16", 2, 64, k)
        )
        return kernel.supports(like(dtype, 64, k), weights, None, None, tile_rows)

    assert reason() is None
    assert "size=96" in reason(k=96)
    assert "float16" in reason(dtype="float16")
    weights = prepare(problem("nvfp4")[2])
    with pytest.raises(ValueError, match=r"columns=32 must be 64"):
        groups, x, *_ = problem("nvfp4")
        schedule = groups.tile_group, groups.tile_starts, groups.tile_sizes, groups.num_tiles
        kernel.grouped_matmul(x, weights, *schedule, None, None, config=Config((8, 24), consumers=1, columns=32))


def test_tiles(monkeypatch):
    """On 132 multiprocessors: what `_one_token` takes, and how many consumers decode."""
    monkeypatch.setattr(_compat, "num_multiprocessors", lambda: 132)
    one = Config((8,), consumers=1, columns=16, tile_k=512, stages=4)

    def tiled(gated, n_out, tiles, config=one, mean_rows=1.0):
        found = four_bit(config, Projection(gated, n_out, tiles, mean_rows))
        assert found.cluster == 1 and found.interleaved == (found.columns == 32)
        assert found.paired == (gated and found.halves == 1 and not found.interleaved)
        return found.consumers, found.columns, found.tile_k

    assert tiled(True, 2048, 1) == (1, 32, 256)  # 64 tiles, a consumer each
    assert tiled(True, 1536, 8) == (3, 32, 256)  # 128 tiles of three
    assert tiled(True, 768, 8) == (2, 64, 256)  # 96
    assert tiled(True, 14336, 2) == (4, 64, 256)  # two rounds of tiles of 128 columns
    assert tiled(False, 7168, 1) == (1, 64, 256)
    assert tiled(False, 2048, 8) == (2, 64, 256)
    assert tiled(False, 4096, 8) == (4, 64, 256)
    few = [Config((rows,), consumers=1, tile_k=128, stages=4) for rows in (16, 24, 32, 48, 64)]
    for gated in (True, False):
        found = [tiled(gated, 2048, 128, config, 8.0) for config in few]
        both = (2, 64, 128) if gated else (2, 64, 256)  # halves of a consumer
        assert found == [(2, 64, 256), both] + [(4, 64, 256)] * 2 + [(4, 64, 128)]
        teams = [four_bit(config, Projection(gated, 2048, 128, 8.0)).teams for config in few]
        assert teams == [2, 2, 1, 1, 1]
    many = four_bit(Config((128, 160), cluster=2, gather=True), Projection(True, 768, 128, 256.0))
    assert (many.cluster, many.gather, many.tile_rows) == (1, True, 160)
