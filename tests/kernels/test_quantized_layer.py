"""Whole layers of quantized experts, their kernels one after the other in the interpreter, and lowered for CUDA."""

import dataclasses
import functools
import itertools

import jax
import pytest

from moe_jax import MoEConfig, moe, quantize_experts
from moe_jax.kernels.hopper import matmul_fp8, matmul_rows_first
from moe_jax.quantization import prepare_experts, reference
from moe_jax.routing import route
from moe_jax.tuning.plan import LayerShape, default_plan
from tests.layers import experts_of, logits_of, quick_jit, x_of
from tests.lowering import like, lower, num_kernels
from tests.tuning.plans import plan_of_blocks
from tests.util import assert_discriminates, check_close


@pytest.mark.parametrize(
    ("name", "num_tokens"),
    [
        ("fp8_block", 5),
        ("fp8_tensor", 19),
        ("int8_weight", 19),
        ("int4_group32", 5),
        ("nvfp4", 19),
        ("nvfp4_fp8", 5),
        ("mxfp4_fp8", 19),
    ],
)
def test_layer(name, num_tokens):
    """A few tokens are quantized where they are; one scale for all rows takes a kernel of its own; four bits are decoded."""
    config = MoEConfig(4, 2, 128, 64, quantization=name)
    x, logits = x_of(0, config, num_tokens), logits_of(0, config, num_tokens)
    experts = quantize_experts(experts_of(0, config), name)
    prepared = prepare_experts(experts, config.quantization.dtype_of_rows("bfloat16"))
    out = moe(x, prepared, logits, config, implementation="mosaic_interpret")
    oracle = quick_jit(lambda *a: reference.apply_experts(*a[:2], route(a[2], config), config, config.quantization))
    right = oracle(x, experts, logits)
    check_close(out, right, 1e-2)
    assert_discriminates(lambda y: check_close(y, right, 1e-2), out)


def test_a_plan_that_does_not_quantize_rows_as_they_leave_has_a_kernel_more(monkeypatch):
    """The bits of both: tests/kernels/test_quantized_store.py."""
    monkeypatch.undo()
    config = MoEConfig(8, 4, 256, 128, quantization="fp8_block")
    experts = jax.eval_shape(lambda: quantize_experts(experts_of(0, config), "fp8_block"))
    rule = default_plan(LayerShape.of(config, 1000))
    plan = dataclasses.replace(rule, up=dataclasses.replace(rule.up, quantizes=False))
    layer = functools.partial(moe, config=config, plan=plan, implementation="mosaic")
    assert num_kernels(lower(layer, like("bfloat16", 1000, 256), experts, like("float32", 1000, 8))) == 7


@pytest.mark.parametrize(("rows_first", "quantizes"), list(itertools.product([False, True], repeat=2)))
def test_all_plans_of_blocks_are_kernels_alone(monkeypatch, rows_first, quantizes):
    """Those of tests/gpu/test_quantized_layer.py, which compares their bits."""
    monkeypatch.undo()
    config = MoEConfig(32, 4, 2048, 768, quantization="fp8_block")
    experts = jax.eval_shape(lambda: quantize_experts(experts_of(0, config), "fp8_block"))
    plan, called = plan_of_blocks(LayerShape.of(config, 500), rows_first, quantizes), []
    for module in (matmul_fp8, matmul_rows_first):

        def spy(*operands, inner=module.grouped_matmul, module=module, **keywords):
            called.append((module, keywords["config"], keywords["quantize"] is not None))
            return inner(*operands, **keywords)

        monkeypatch.setattr(module, "grouped_matmul", spy)
    layer = functools.partial(moe, config=config, plan=plan, implementation="mosaic")
    assert num_kernels(lower(layer, like("bfloat16", 500, 2048), experts, like("float32", 500, 32))) == 7 - quantizes
    module = matmul_rows_first if rows_first else matmul_fp8
    assert called == [(module, plan.up, quantizes), (module, plan.down, False)]


@pytest.mark.parametrize(
    ("name", "kernels"),
    [("fp8_block", 6), ("int8_channel", 7), ("fp8_weight_channel", 5), ("nvfp4", 5), ("nvfp4_fp8", 6)],
)
def test_lowers_for_cuda_to_mosaic_alone(monkeypatch, name, kernels):
    """Routing, grouping, gather with quantizing, up, quantizing (of blocks up does it), down, combine; codes alone need none."""
    monkeypatch.undo()
    config = MoEConfig(8, 4, 256, 128, quantization=name)
    of_rows = config.quantization.dtype_of_rows("bfloat16")
    experts = jax.eval_shape(lambda: prepare_experts(quantize_experts(experts_of(0, config), name), of_rows))
    layer = functools.partial(moe, config=config, implementation="mosaic")
    text = lower(layer, like("bfloat16", 1000, 256), experts, like("float32", 1000, 8))
    assert num_kernels(text) == kernels
