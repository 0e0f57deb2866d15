"""`explain` tells what will run and why the rest does not, and means the same as asking for a kernel by name."""

import dataclasses
import functools
import types

import jax
import pytest

import moe_jax
from moe_jax import Explanation, Fp8Training, MoEConfig, RoutingConfig, _compat, explain
from moe_jax.explanation import explain_plan
from moe_jax.tuning.plan import LayerShape, default_plan
from tests.layers import experts_of, logits_of, x_of
from tests.lowering import like, lower, num_kernels

GOOD = MoEConfig(8, 2, 128, 64)
OPS = {"topk", "group_tokens", "gather", "grouped_matmul (up)", "grouped_matmul (down)", "combine"}


def kernel_reasons(config, num_tokens=16, platform="gpu", **kwargs):
    """op: why its kernel cannot run."""
    return {
        item.op: item.reason
        for item in explain(config, num_tokens, platform, **kwargs)
        if item.implementation == "mosaic"
    }


def chosen(items):
    """op: the implementation that `auto` takes, the first without a reason."""
    found = {}
    for item in items:
        if item.reason is None:
            found.setdefault(item.op, item.implementation)
    return found


def test_every_operation_has_its_implementations_in_the_order_of_preference():
    items = explain(GOOD, 16, "gpu")
    assert all(isinstance(item, Explanation) for item in items)
    assert {item.op for item in items} == OPS
    for op in OPS:
        assert [item.implementation for item in items if item.op == op] == ["mosaic", "xla"]


def test_a_hopper_gpu_runs_kernels_alone():
    assert chosen(explain(GOOD, 16, "gpu")) == dict.fromkeys(OPS, "mosaic")
    assert set(kernel_reasons(GOOD).values()) == {None}


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_other_platforms_run_plain_jax(platform):
    assert chosen(explain(GOOD, 16, platform)) == dict.fromkeys(OPS, "xla")
    for reason in kernel_reasons(GOOD, platform=platform).values():
        assert platform in reason


def test_the_platform_is_that_of_the_default_device():
    with jax.default_device(jax.devices("cpu")[0]):
        assert explain(GOOD, 16) == explain(GOOD, 16, "cpu")


CHANGES = {
    "float32": (dict(dtype="float32"), {"grouped_matmul (up)", "grouped_matmul (down)", "combine"}, ["float32"]),
    "I = 1000": (dict(intermediate_size=1000), {"grouped_matmul (up)", "grouped_matmul (down)"}, ["1000", "16"]),
    "H = 72": (dict(hidden_size=72), {"grouped_matmul (up)", "grouped_matmul (down)"}, ["72", "16"]),
    "H = 33": (dict(hidden_size=33), OPS - {"topk", "group_tokens"}, ["33"]),
    "E = 6": (dict(num_experts=6), {"topk"}, ["num_experts=6", "16 bytes"]),
    "E = 2048": (dict(num_experts=2048), {"topk", "group_tokens"}, ["num_experts=2048", "at most"]),
    "k = 40": (dict(num_experts=64, top_k=40), {"topk"}, ["top_k=40", "at most"]),
    "hash": (dict(routing=RoutingConfig("hash")), {"topk"}, ["hash", "top-k"]),
    "bfloat16 logits of E = 12": (
        dict(num_experts=12, routing=RoutingConfig(router_logits_dtype="bfloat16")),
        {"topk"},
        ["num_experts=12", "bfloat16"],
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_reasons_name_the_values(name):
    fields, ops, words = CHANGES[name]
    reasons = kernel_reasons(dataclasses.replace(GOOD, **fields))
    assert {op for op, reason in reasons.items() if reason} == ops
    for op in ops:
        assert [word for word in words if word not in reasons[op]] == [], reasons[op]
    assert chosen(explain(dataclasses.replace(GOOD, **fields), 16, "gpu")) == {
        op: "xla" if op in ops else "mosaic" for op in OPS
    }


def test_no_tokens_need_no_kernel():
    assert all("empty" in reason for reason in kernel_reasons(GOOD, 0).values())


def test_a_rank_has_fewer_experts():
    many = MoEConfig(4096, 2, 128, 64)
    assert kernel_reasons(many, num_local_experts=8)["group_tokens"] is not None  # the map is read for all of them
    assert kernel_reasons(GOOD, num_local_experts=4) == kernel_reasons(GOOD)


LAYERS = {
    "good": {},
    "float16": dict(dtype="float16"),
    "odd sizes": dict(hidden_size=1040, intermediate_size=528),
    "bias": dict(has_bias=True, activation="swigluoai"),
    "no gate": dict(activation="relu2_no_mul"),
    "grouped": dict(num_experts=16, routing=RoutingConfig("deepseek_v3", 4, 2)),
    **{name: fields for name, (fields, _, _) in CHANGES.items() if name not in ("hash", "k = 40", "E = 2048")},
}


@pytest.mark.parametrize("name", LAYERS)
def test_what_it_says_is_what_happens(name):
    """Without a reason the layer lowers to kernels alone; with one, asking for kernels raises an error that gives it."""
    config = dataclasses.replace(GOOD, **LAYERS[name])
    x, experts, logits = jax.eval_shape(lambda: (x_of(0, config, 17), experts_of(0, config), logits_of(0, config, 17)))
    layer = functools.partial(moe_jax.moe, config=config, implementation="mosaic")
    if config.routing.router_logits_dtype:
        logits = like(config.routing.router_logits_dtype, *logits.shape)
    reasons = [reason for reason in kernel_reasons(config).values() if reason]
    if not reasons:
        fetched = default_plan(LayerShape.of(config, 17)).up.gather  # then nothing is gathered before
        assert num_kernels(lower(layer, x, experts, logits)) >= len(OPS) - fetched
        return
    with pytest.raises(ValueError, match="implementation='mosaic' cannot run") as caught:
        lower(layer, x, experts, logits)
    assert any(reason in str(caught.value) for reason in reasons)


def test_number_formats():
    """Rows are quantized twice where activations are; FP8 with scales of groups is dequantized before, and that is said."""
    quantized = {*OPS, "gather_quantize (up)", "gather_quantize (down)"} - {"gather"}
    alone = [(name, OPS) for name in ("fp8_weight_block", "int4_group64", "nvfp4", "mxfp4")]
    for name, ops in (("fp8_block", quantized), ("int8_channel", quantized), *alone):
        config = dataclasses.replace(GOOD, quantization=name)
        assert chosen(explain(config, 16, "gpu")) == dict.fromkeys(ops, "mosaic")
    reasons = kernel_reasons(dataclasses.replace(GOOD, quantization="mxfp8_weight"))
    assert "dequantized before" in reasons["decode (up)"] and reasons["grouped_matmul (up)"] is None
    odd = kernel_reasons(MoEConfig(8, 2, 80, 48, quantization="fp8_channel"))
    assert "size=80" in odd["grouped_matmul (up)"] and "size=48" in odd["grouped_matmul (down)"]


def test_formats_with_blocks_of_other_sizes():
    """Tiles with rows first need whole blocks of 128; blocks that kernels would take for others are dequantized."""
    big = MoEConfig(128, 8, 2048, 768, quantization="fp8_block")
    for rows, tile_rows in ((128, 128), (64, 96)):
        weights = dataclasses.replace(big.quantization.weights, block=(rows, 128))
        config = dataclasses.replace(big, quantization=dataclasses.replace(big.quantization, weights=weights))
        assert f"the default rule, tile_rows={tile_rows}" in explain_plan(config, 16384, "gpu")
        found = [e for e in explain(config, 16384, "gpu") if e.op.startswith("grouped_matmul (")]
        assert [e.reason for e in found if e.implementation == "mosaic"] == [None, None]
    weights = dataclasses.replace(big.quantization.weights, block=(384, 128))
    config = dataclasses.replace(big, quantization=dataclasses.replace(big.quantization, weights=weights))
    assert "blocks of 384 x 128 weights" in kernel_reasons(config)["grouped_matmul (up)"]


def test_fp8_training():
    config = MoEConfig(128, 8, 2048, 768, fp8_training=Fp8Training())
    ops = {e.op for e in explain(config, 16384, "gpu") if e.implementation == "mosaic" and e.reason is None}
    assert {"gather_quantize (up)", "gather_quantize (down)", "grouped_matmul (up)"} <= ops
    assert "that of FP8 training, tile_rows=128" in explain_plan(config, 16384, "gpu")
    tensor = dataclasses.replace(config, fp8_training=Fp8Training(scaling="tensor"))
    assert ops == {e.op for e in explain(tensor, 16384, "gpu") if e.implementation == "mosaic" and e.reason is None}
    assert "that of FP8 training, tile_rows=144" in explain_plan(tensor, 16384, "gpu")
    only = dataclasses.replace(config, fp8_training=Fp8Training(False, False, True))
    assert "gather" in {e.op for e in explain(only, 16384, "gpu")} and "FP8" not in explain_plan(only, 16384, "gpu")


def test_block_scaled_products_have_a_kernel_for_blackwell_gpus(monkeypatch):
    """On such a GPU it is taken where sizes allow; the layer's other operations, and those of a Hopper GPU, stay as they are."""
    matmuls = {"grouped_matmul (up)", "grouped_matmul (down)"}

    def on_blackwell(name, platform=None, **sizes):
        config = dataclasses.replace(GOOD, quantization=name, **sizes)
        items = explain(config, 16, platform)
        return chosen(items), {i.op: i.reason for i in items if i.implementation == "mosaic_blackwell"}

    _, reasons = on_blackwell("mxfp8", "gpu")
    assert reasons.keys() == matmuls and all("Hopper" in reason for reason in reasons.values())
    device = types.SimpleNamespace(platform="gpu", compute_capability="10.0", device_kind="Blackwell")
    monkeypatch.setattr(_compat, "default_device", lambda: device)
    taken, _ = on_blackwell("mxfp8", intermediate_size=128)
    assert {op for op, name in taken.items() if name == "mosaic_blackwell"} == matmuls
    assert set(taken.values()) == {"mosaic_blackwell", "xla"}
    _, reasons = on_blackwell("mxfp8", intermediate_size=192)
    assert reasons["grouped_matmul (up)"] is None and "size=192" in reasons["grouped_matmul (down)"]
    _, reasons = on_blackwell("nvfp4_w4a4", hidden_size=256, intermediate_size=256)
    assert all("emulates" in reason for reason in reasons.values())
    assert on_blackwell("fp8_block")[1] == on_blackwell("nvfp4")[1] == {}
