"""What a search tries: plans that fit, not too many, and the memory that they are said to take."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import _compat
from moe_jax.activations import get_activation
from moe_jax.kernels.hopper import matmul_bf16 as kernel
from moe_jax.kernels.hopper import matmul_fp8, matmul_rows_first
from moe_jax.kernels.hopper.matmul_config import Config
from moe_jax.quantization import Spec, prepare, quant_format, quantize
from moe_jax.tuning.candidates import candidates
from moe_jax.tuning.fit import SHARED_MEMORY, config_misfit, misfit, shared_memory_bytes
from moe_jax.tuning.plan import Codes, LayerPlan, LayerShape, default_plan

SHAPES = [
    LayerShape(experts, pairs, hidden, inner, gated, dtype)
    for experts, hidden, inner, dtype in ((128, 2048, 768, "bfloat16"), (16, 1040, 528, "float16"))
    for pairs in (1, experts, 40 * experts, 90 * experts, 500 * experts)
    for gated in (True, False)
]

QUANTIZED = [
    LayerShape(128, pairs, 2048, 768, gated, "bfloat16", codes)
    for codes in (
        "float8_e4m3fn block",
        "float8_e4m3fn channel",
        "int8 tensor",
        "weights int8 channel",
        "weights int4 group",
    )
    for pairs, gated in ((1, True), (128, False), (5120, True), (64000, True))
]


@pytest.mark.parametrize("shape", SHAPES + QUANTIZED, ids=str)
def test_candidates(shape):
    found = candidates(shape)
    assert found[0] == default_plan(shape)
    assert 6 <= len(found) <= 28, "enough to find something, few enough to compile"
    assert len(set(found)) == len(found)
    for plan in found:
        assert misfit(shape, plan) is None
        for config, gated in ((plan.up, shape.gated), (plan.down, False)):
            assert config_misfit(config, gated, shape.dtype, shape.codes) is None
            assert shared_memory_bytes(config, shape.dtype, shape.codes) <= SHARED_MEMORY
            if Codes.of(shape.codes).both:
                assert (config.cluster, config.gather, config.tile_k % 128) == (1, False, 0)
                assert config.tile_rows <= (128 if "block" in shape.codes else 160)
    for name in ("up", "down"):
        assert len({getattr(plan, name) for plan in found}) >= 5


@pytest.fixture
def asked(monkeypatch):
    """What a kernel asks for when it is built."""
    found = {}

    def no_kernel(body, *, out_type, **keywords):
        found.update(keywords)
        return lambda *operands: jax.tree.map(lambda out: jnp.zeros(out.shape, out.dtype), out_type)

    monkeypatch.setattr(_compat, "kernel", no_kernel)
    return found


def bytes_of(asked, aligned=1) -> int:
    """Of its shared memory; each buffer begins at a multiple of `aligned`."""
    total = 0
    for scratch in jax.tree.leaves(asked["scratch_types"], is_leaf=lambda x: not isinstance(x, list)):
        if hasattr(scratch, "num_barriers"):
            total += 8 * int(np.prod(scratch.num_barriers))
        else:
            size = math.prod(scratch.shape) * jnp.dtype(scratch.dtype).itemsize
            total += math.ceil(size / aligned) * aligned
    return total


def scratch_bytes(config: Config, gated: bool, bias: bool, asked) -> int:
    """The shared memory that the kernel of 16-bit floats asks for."""
    tile_rows, like = config.tile_rows, jnp.zeros
    jax.eval_shape(
        lambda: kernel.grouped_matmul(
            like((2 * tile_rows, 256), jnp.bfloat16),
            like((2, 512, 256), jnp.bfloat16),
            *(like(2, jnp.int32) for _ in range(3)),
            like(1, jnp.int32),
            like((2, 512), jnp.float32) if bias else None,
            get_activation("silu") if gated else None,
            config=config,
        )
    )
    return bytes_of(asked)


def quantized_bytes(shape: LayerShape, config: Config, gated: bool, bias: bool, asked) -> int:
    """The same for quantized weights, by the kernel of `shape`; filled up as the compiler does."""
    of, like, tile_rows = Codes.of(shape.codes), jnp.zeros, config.tile_rows
    scales = {"channel": (2, 512), "tensor": (2, 1), "block": (2, 4, 2)}[of.granularity]
    rows = like((2 * tile_rows, 256), of.dtype if of.both else shape.dtype)
    row_scales = like((2 if of.granularity == "block" else 1, 3 * tile_rows), jnp.float32)
    weights, scales = like((2, 512, 256), of.dtype), like(scales, jnp.float32)
    rest = (
        *(like(2, jnp.int32) for _ in range(3)),
        like(1, jnp.int32),
        like((2, 512), jnp.float32) if bias else None,
        get_activation("silu") if gated else None,
    )
    if of.both:
        keywords = dict(config=config, out_dtype=jnp.dtype(shape.dtype))
        if config.quantizes:
            keywords["quantize"] = Spec(of.dtype, "group", 128)
        matmul = (matmul_rows_first if config.rows_first else matmul_fp8).grouped_matmul
        run = functools.partial(matmul, rows, row_scales, weights, scales, *rest, **keywords)
    else:
        run = lambda: kernel.grouped_matmul(rows, weights, *rest, config=config, weight_scales=scales)  # noqa: E731
    jax.eval_shape(run)
    return bytes_of(asked, aligned=1024)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("index", range(0, len(SHAPES), 4))
def test_the_memory_is_what_the_kernel_asks_for(index, gated, asked):
    for plan in candidates(dataclasses.replace(SHAPES[index], gated=gated, dtype="bfloat16")):
        config = plan.up if gated else plan.down
        estimate = shared_memory_bytes(config, "bfloat16")
        with_bias = scratch_bytes(config, gated, True, asked)
        assert with_bias <= estimate < with_bias + 3 * 1024  # buffers begin at whole KiB
        assert scratch_bytes(config, gated, False, asked) <= estimate


@pytest.mark.parametrize("shape", [shape for shape in QUANTIZED if "int4" not in shape.codes], ids=str)
def test_the_memory_of_codes_and_scales(shape, asked):
    """Each with the kernel of 8-bit operands or the one that decodes weights."""
    found = candidates(shape)
    special = [plan for plan in found if plan.up.quantizes or plan.up.rows_first]
    kinds = {5120: {(True, False)}, 64000: {(True, False), (False, True), (True, True)}}
    expected = kinds.get(shape.num_pairs, set()) if shape.codes.endswith("n block") else set()
    assert {(plan.up.quantizes, plan.up.rows_first) for plan in special} == expected
    for plan in (default_plan(shape), *found[-4:], *special):
        for config, gated in ((plan.up, shape.gated), (plan.down, False)):
            estimate = shared_memory_bytes(config, shape.dtype, shape.codes)
            assert quantized_bytes(shape, config, gated, False, asked) <= estimate
            with_bias = quantized_bytes(shape, config, gated, True, asked)
            assert with_bias <= estimate <= with_bias + 2 * 1024


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("name", "pairs"), [("nvfp4", 1), ("nvfp4", 128), ("nvfp4", 5120), ("int4_group32_zp", 1024)])
def test_the_memory_of_four_bits(name, pairs, gated, asked):
    """Of the most scales that codes may have: those of the formats here."""
    spec = quant_format(name).weights
    shape = LayerShape(128, pairs, 2048, 768, gated, "bfloat16", f"weights {spec.dtype} group")
    like = jax.ShapeDtypeStruct
    weights = like((2, 512, 256), jnp.bfloat16)
    weights = jax.eval_shape(lambda w: prepare(quantize(w, spec, halves=2 if gated else 1)), weights)
    paired = set()
    for plan in candidates(shape):
        config, act = (plan.up, get_activation("silu")) if gated else (plan.down, None)
        rows, vector = like((2 * config.tile_rows, 256), jnp.bfloat16), like((2,), jnp.int32)
        schedule, bias = [vector] * 3 + [like((1,), jnp.int32)], like((2, 512), jnp.float32)
        multiply = functools.partial(kernel.grouped_matmul, config=config)
        jax.eval_shape(lambda *given, run=multiply, act=act: run(*given, act), rows, weights, *schedule, bias)
        with_bias, estimate = bytes_of(asked, aligned=1024), shared_memory_bytes(config, "bfloat16", shape.codes)
        assert with_bias <= estimate <= with_bias + 4 * 1024
        paired.add((config.paired, config.consumers))
        paired |= {"interleaved"} if config.interleaved else set()
    few = {(True, 2), (True, 4), "interleaved"} if gated else {(False, 1), (False, 4)}
    assert few <= paired or default_plan(shape).tile_rows > 64


GOOD = Config(stages=2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stages": 8}, "shared memory"),
        ({"stages": 1}, "stages=1"),
        ({"consumers": 3}, "consumers=3"),
        ({"halves": 1}, "halves=1"),
        ({"tile_k": 96}, "tile_k=96"),
        ({"band": 0}, "band=0"),
        ({"row_counts": (16, 12)}, "row_counts=(16, 12)"),
        ({"row_counts": (32, 16)}, "row_counts=(32, 16)"),
        ({"cluster": 2, "row_counts": (16, 24)}, "cluster=2"),
        ({"cluster": 16, "row_counts": (128,)}, "cluster=16"),
    ],
    ids=str,
)
def test_what_does_not_fit_says_why(change, words):
    assert config_misfit(GOOD, True, "bfloat16") is None
    assert words in config_misfit(dataclasses.replace(GOOD, **change), True, "bfloat16")


@pytest.mark.parametrize(
    ("codes", "change", "words"),
    [
        ("float8_e4m3fn block", {"cluster": 2}, "cluster=2"),
        ("int8 channel", {"gather": True, "stages": 3}, "gather=True"),
        ("int8 channel", {"tile_k": 64}, "multiple of 128"),
        ("float8_e4m3fn block", {"row_counts": (128,)}, "at most 96"),
        ("float8_e4m3fn block", {"row_counts": (160,), "rows_first": True}, "at most 128"),
        ("int8 channel", {"row_counts": (136,)}, "multiple of 16"),
        ("float8_e4m3fn channel", {"stages": 8}, "shared memory"),
        ("float8_e4m3fn block", {"quantizes": True, "stages": 6}, "shared memory"),
    ],
    ids=str,
)
def test_what_does_not_fit_8_bit_rows_says_why(codes, change, words):
    good = Config(row_counts=(96,), tile_k=128, stages=2)
    assert config_misfit(good, True, "bfloat16", codes) is None
    assert words in config_misfit(dataclasses.replace(good, **change), True, "bfloat16", codes)


@pytest.mark.parametrize(
    ("change", "gated", "words"),
    [
        ({"paired": False}, True, "halves=1 must be 2"),
        ({"paired": True}, False, "paired=True is for the gate and up"),
        ({"consumers": 3}, True, "consumers=3 even"),
        ({"consumers": 5, "paired": False}, False, "consumers=5"),
        ({"row_counts": (96,)}, True, "at most 64 rows"),
        ({"halves": 2, "paired": False}, True, "4 and 1 where weights alone are codes"),
        ({"columns": 32, "row_counts": (8,)}, True, "columns=32 must be 64"),
        ({"interleaved": True, "paired": False}, True, "interleaved=True is for"),
        ({"interleaved": True, "columns": 32}, True, "paired=True False"),
        ({"interleaved": True, "columns": 32, "paired": False}, False, "interleaved=True is for"),
        ({"stages": 8, "row_counts": (64,)}, True, "shared memory"),
        ({"teams": 2}, True, "teams=2 of consumers=4"),
        ({"consumers": 2, "teams": 2, "stages": 3, "gather": True}, True, "gather=True"),
        ({"consumers": 2, "teams": 2, "cluster": 2}, True, "cluster=2"),
    ],
    ids=str,
)
def test_what_does_not_fit_four_bits_says_why(change, gated, words):
    codes = "weights float4_e2m1fn group"
    good = Config(row_counts=(8, 16), consumers=4, halves=1, paired=True, tile_k=128, stages=2)
    assert config_misfit(good, True, "bfloat16", codes) is None
    assert "at most 2" in config_misfit(good, True, "bfloat16")
    assert "paired=True is for" in config_misfit(dataclasses.replace(good, consumers=2), True, "bfloat16")
    assert words in config_misfit(dataclasses.replace(good, **change), gated, "bfloat16", codes)


@pytest.mark.parametrize(
    ("codes", "inner", "side", "words"),
    [
        ("float8_e4m3fn block", 768, "down", "is for an up-projection"),
        ("float8_e4m3fn channel", 768, "up", "not for float8_e4m3fn channel"),
        ("", 768, "up", "not for bfloat16"),
        ("float8_e4m3fn block", 704, "up", "output size=704"),
    ],
)
def test_where_rows_cannot_be_quantized_as_they_leave(codes, inner, side, words):
    shape = LayerShape(128, 64000, 2048, inner, True, "bfloat16", codes)
    plan = default_plan(shape)
    config = dataclasses.replace(getattr(plan, side), quantizes=True)
    assert misfit(shape, plan) is None
    assert words in misfit(shape, dataclasses.replace(plan, **{side: config}))


@pytest.mark.parametrize(
    ("codes", "change", "words"),
    [
        ("float8_e4m3fn block", {}, None),
        ("float8_e4m3fn block", {"consumers": 1}, "consumers=2, not 1"),
        ("float8_e4m3fn block", {"row_counts": (64, 96)}, "tile_rows=128, not 96"),
        ("float8_e4m3fn block", {"quantizes": True}, "is for an up-projection"),
        ("int8 channel", {}, "not for int8 channel"),
        ("", {}, "not for bfloat16"),
    ],
    ids=str,
)
def test_where_rows_cannot_come_first(codes, change, words):
    shape = LayerShape(128, 64000, 2048, 768, True, "bfloat16", codes)
    change = {"rows_first": True} | change
    rows = change.get("row_counts", (128,))[-1]
    base = default_plan(shape, rows)
    plan = LayerPlan(rows, base.up, dataclasses.replace(base.down, **change))
    reason = misfit(shape, plan)
    assert reason is None if words is None else words in reason
