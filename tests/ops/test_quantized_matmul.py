"""Which kernel multiplies 8-bit rows, and what a configuration that cannot run says, seen where there is no GPU."""

import dataclasses
import functools
import warnings

import jax
import pytest

from moe_jax import Fp8Training, MoEConfig, moe, quantize_experts
from moe_jax.activations import get_activation
from moe_jax.fp8_products import Fp8Products
from moe_jax.kernels.hopper import matmul_fp8, matmul_rows_first
from moe_jax.kernels.hopper.matmul_config import Config
from moe_jax.moe import layer_plan
from moe_jax.ops import implementation as impl
from moe_jax.ops import quantized_matmul
from moe_jax.ops.group_tokens import group_tokens
from moe_jax.ops.grouped_matmul import grouped_matmul
from moe_jax.ops.matmul_and_quantize import matmul_and_quantize
from moe_jax.quantization import QuantFormat, Spec, prepare, quant_format, quantize
from moe_jax.quantization.fp8_training import ROWS, TENSOR
from moe_jax.quantization.rows import QuantizedRows
from moe_jax.tuning.plan import LayerShape, default_plan
from tests.layers import experts_of
from tests.lowering import like, lower, num_kernels

EXPERTS, PAIRS, K, N = 4, 512, 256, 512
FIRST = Config((64, 128), tile_k=128, stages=4, overlap=False, rows_first=True)
BLOCKS = quant_format("fp8_block").weights
SMALL = dataclasses.replace(BLOCKS, block=(64, 128))


def weights_of(spec, halves=1):
    weights = jax.eval_shape(functools.partial(quantize, spec=spec, halves=halves), like("bfloat16", EXPERTS, N, K))
    return jax.eval_shape(lambda w: prepare(w, ROWS.dtype), weights) if spec.dtype == "float4_e2m1fn" else weights


def multiplied(multiply, tile_rows, weights, spec=ROWS, multiple=4):
    """A function of arrays that multiplies rows of groups, and these."""
    num_rows = PAIRS + (multiple - 1) * EXPERTS
    lines = -(-K // spec.block[1]) if spec.granularity == "group" else 1
    arrays = like(spec.storage_dtype, num_rows, K), like("float32", lines, num_rows + 192), like("int32", PAIRS, 1)

    def run(values, scales, ids, weights):
        options = dict(num_experts=EXPERTS, tile_rows=tile_rows, row_multiple=multiple, implementation="mosaic")
        return multiply(QuantizedRows(values, scales, spec), weights, group_tokens(ids, **options))

    return run, *arrays, weights


@pytest.fixture
def used(monkeypatch):
    """The kernels that are called: which, its configuration, and whether it takes groups for aligned ones."""
    found = []
    for module in (matmul_fp8, matmul_rows_first):

        def spy(*operands, inner=module.grouped_matmul, module=module, **keywords):
            found.append((module, keywords["config"], keywords["aligned"]))
            return inner(*operands, **keywords)

        monkeypatch.setattr(module, "grouped_matmul", spy)
    return found


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("name", ["fp8_block", "fp8_block_ue8m0", "int8_block", "nvfp4_fp8"])
def test_tiles_of_128_rows_stand_first(name, multiple, used):
    """Without a configuration; groups begin anywhere, or at multiples of 4 rows."""
    form = quant_format(name)
    for act, halves in ((None, 1), (get_activation("silu"), 2)):
        multiply = functools.partial(grouped_matmul, activation=act, implementation="mosaic")
        weights = weights_of(form.weights, halves)
        lower(*multiplied(multiply, 128, weights, form.activations, multiple))
    rule = FIRST if name != "nvfp4_fp8" else dataclasses.replace(FIRST, stages=3, codes_stages=2)
    assert used == [(matmul_rows_first, rule, multiple == 4)] * 2


@pytest.mark.parametrize("tile_rows", [16, 128, 144])
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_products_of_fp8_training_with_one_scale(tile_rows, dtype, used):
    """Rows on the N side of wgmma, whatever the tile."""
    products = Fp8Products(MoEConfig(EXPERTS, 1, K, N // 2, fp8_training=Fp8Training(scaling="tensor")), "mosaic")
    lower(*multiplied(products._multiply, tile_rows, weights_of(TENSOR), Spec(dtype, "tensor"), 1))
    ((used_module, config, aligned),) = used
    assert used_module is matmul_fp8 and config.tile_rows == tile_rows and not aligned


@pytest.mark.parametrize(("tile_rows", "module"), [(96, matmul_fp8), (128, matmul_rows_first)])
def test_products_of_fp8_training(tile_rows, module, used):
    products = Fp8Products(MoEConfig(EXPERTS, 1, K, N // 2, fp8_training=Fp8Training()), "mosaic")
    lower(*multiplied(products._multiply, tile_rows, weights_of(BLOCKS)))
    ((used_module, config, aligned),) = used
    assert used_module is module and config.rows_first == (tile_rows == 128) and aligned
    assert config == FIRST or tile_rows == 96


@pytest.mark.parametrize(
    ("tile_rows", "spec", "reason"),
    [
        (160, BLOCKS, "tile_rows=160 must be at most 96, or 128 with rows on the M side of wgmma"),
        (128, SMALL, r"tile_rows=128 must be at most 96, .*\(blocks of 64 weight rows must have a multiple of 128"),
    ],
)
def test_tiles_that_no_kernel_takes(tile_rows, spec, reason):
    with pytest.raises(ValueError, match=reason):
        jax.eval_shape(
            *multiplied(functools.partial(grouped_matmul, implementation="mosaic"), tile_rows, weights_of(spec))
        )


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("block", "rows", "columns"),
    [((96, 128), 192, 256), ((384, 128), 768, 256), ((192, 128), 384, 256), ((128, 96), 256, 192)],
)
def test_blocks_that_would_be_taken_for_others(block, rows, columns, gated):
    """Two blocks of 96 rows are as many as of 128: kernels know blocks by their number, and would take the wrong scales."""
    act, halves = (get_activation("silu"), 2) if gated else (None, 1)

    def reasons(block):
        spec = dataclasses.replace(BLOCKS, block=block)
        like_weights = like("bfloat16", 2, halves * rows, columns)
        weights = jax.eval_shape(functools.partial(quantize, spec=spec, halves=halves), like_weights)
        scales = like("float32", -(-columns // 128), 64 + 96)
        quantized = QuantizedRows(like("float8_e4m3fn", 64, columns), scales, ROWS)
        return (
            quantized_matmul.reason_against(quantized, weights, act, 64, "bfloat16"),
            quantized_matmul.reason_against_codes(like("bfloat16", 64, columns), weights, None, act, 64, False),
        )

    assert reasons((64, 128)) == reasons((128, 128)) == (None, None)
    of_both, of_weights = reasons(block)
    words = f"blocks of {block[0]} x {block[1]} weights: several of them must have 64, 128, 256 or 512"
    assert words in of_weights and (words in of_both or block[1] != 128 and "must both have 128 columns" in of_both)
    one = dataclasses.replace(BLOCKS, block=(rows, 128))
    weights = jax.eval_shape(functools.partial(quantize, spec=one), like("bfloat16", 2, rows, 128))
    assert quantized_matmul.reason_against_codes(like("bfloat16", 64, 128), weights, None, None, 64, False) is None


REFUSED = {
    "weights first": ({"rows_first": False}, BLOCKS, "tile_rows=128 must be at most 96 for float8_e4m3fn block"),
    "too few rows": ({"row_counts": (96,)}, BLOCKS, "rows_first=True needs tile_rows=128, not 96"),
    "small blocks": ({}, SMALL, "blocks of 64 weight rows must have a multiple of 128"),
    "channels": ({}, Spec("float8_e4m3fn", "channel"), "rows_first=True needs weights with granularity='block'"),
    "too much memory": ({"stages": 8}, BLOCKS, "bytes of shared memory are more than a block's"),
}


@pytest.mark.parametrize(
    "multiply", [grouped_matmul, functools.partial(matmul_and_quantize, spec=ROWS)], ids=["rows", "codes"]
)
@pytest.mark.parametrize("case", REFUSED)
def test_a_configuration_that_cannot_run_is_refused(case, multiply, monkeypatch):
    """On a GPU, where ``auto`` would otherwise take the plain form; that has no use for one."""
    change, spec, reason = REFUSED[case]
    config = dataclasses.replace(FIRST, quantizes=True, **change)
    of_rows = ROWS if spec.granularity == "block" else Spec("float8_e4m3fn", "token")
    multiply = functools.partial(multiply, activation=get_activation("silu"), config=config)
    given = config.tile_rows, weights_of(spec, 2), of_rows
    jax.eval_shape(*multiplied(multiply, *given))
    monkeypatch.setattr(impl, "platform_reason", lambda platform=None: None)
    with pytest.raises(ValueError, match=f"cannot run: .*{reason}.*leave config None for the default"):
        jax.eval_shape(*multiplied(multiply, *given))


def test_a_plan_with_rows_first_and_quantized_as_they_leave(used):
    run = functools.partial(matmul_and_quantize, spec=ROWS, activation=get_activation("silu"), implementation="mosaic")
    config = dataclasses.replace(FIRST, quantizes=True, stages=3)
    lower(*multiplied(functools.partial(run, config=config), 128, weights_of(BLOCKS, 2)))
    assert used == [(matmul_rows_first, config, True)]


def test_a_layer_of_smaller_blocks_takes_tiles_that_it_can_have(used):
    """The plan that is found for its shape has rows first."""
    form = QuantFormat("small", SMALL, ROWS)
    config = MoEConfig(EXPERTS, 1, K, N // 2, quantization=form)
    experts = jax.eval_shape(lambda: quantize_experts(experts_of(0, config), form))
    tokens = 2048
    assert default_plan(LayerShape.of(config, tokens)).tile_rows == 128
    assert layer_plan(tokens, experts, config, "mosaic").tile_rows == 96
    layer = functools.partial(moe, config=config, implementation="mosaic")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = lower(layer, like("bfloat16", tokens, K), experts, like("float32", tokens, EXPERTS))
    assert num_kernels(text) == 6 and {module for module, *_ in used} == {matmul_fp8}
