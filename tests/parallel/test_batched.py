"""The batched format: rows of each expert with room for all, counts, and a room that is too small."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import MoEConfig, apply_experts, moe, quantize_experts
from moe_jax.ops.grouped_matmul import grouped_matmul
from moe_jax.parallel import ParallelConfig
from moe_jax.parallel.all_to_all import AllToAll
from moe_jax.parallel.batched import Batched, batch_groups, batched_experts
from moe_jax.parallel.gather_scatter import AllGatherReduceScatter
from moe_jax.parallel.no_exchange import NoExchange
from moe_jax.types import TopK
from tests.layers import check_layer, experts_of, logits_of, quick_jit, reference_moe, topk_of, x_of
from tests.parallel.meshes import mesh_of, parallel_of, sharded
from tests.util import check_close

FOUR_BITS = ("nvfp4", "nvfp4_fp8", "nvfp4_w4a4", "nvfp4_w4a4_static", "mxfp4_w4a4", "mxfp8")
# Each format, and each kind of codes (of a block, of a row, one scale for all) before its rows travel.
AFTER = ("fp8_block", "fp8_tensor_static", "int4_group32", "nvfp4", "nvfp4_w4a4", "nvfp4_w4a4_static", "mxfp4_w4a4")
BEFORE = ("fp8_block", "int8_channel", "fp8_tensor_static", "nvfp4_fp8", "mxfp8")
CONFIG = MoEConfig(5, 2, 16, 12, dtype="float32", has_bias=True)


def problem(config, num_tokens, seed=0):
    return x_of(seed, config, num_tokens), experts_of(seed, config), logits_of(seed, config, num_tokens)


@pytest.mark.parametrize(
    "inner, ep", [(AllToAll(), True), (AllGatherReduceScatter(), True), (AllGatherReduceScatter(), False)]
)
def test_layer(inner, ep):
    mesh = mesh_of(tp=2, dp=2)
    operands = problem(CONFIG, 16)
    layer = sharded(mesh, parallel_of(mesh, ep), CONFIG, exchange=Batched(inner, max_tokens=16), return_dropped=True)
    out, dropped = layer(*operands)
    check_layer(out, reference_moe(*operands, CONFIG), CONFIG)
    assert int(dropped) == 0


@functools.cache
def on_one_device(config):
    return quick_jit(functools.partial(moe, config=config, implementation="xla"))


@pytest.mark.parametrize("name, before", [(name, False) for name in AFTER] + [(name, True) for name in BEFORE])
def test_quantized(name, before):
    config = MoEConfig(4, 2, 128, 96 if name in FOUR_BITS else 128, quantization=name)
    x, experts, logits = problem(dataclasses.replace(config, quantization=None), 16)
    experts = quantize_experts(experts, name)
    if "static" in name:
        scales = (
            jnp.full(4, 8 / config.quantization.activations.reach),
            jnp.full(4, 12 / config.quantization.activations.reach),
        )
        experts = dataclasses.replace(experts, w13_input_scale=scales[0], w2_input_scale=scales[1])
    mesh = mesh_of(dp=2)
    exchange = Batched(AllToAll(quantize_before=before), max_tokens=16)
    out = sharded(mesh, parallel_of(mesh, True), config, exchange=exchange)(x, experts, logits)
    check_close(out, on_one_device(config)(x, experts, logits), 1e-2)


def test_rows_past_the_count_are_not_read():
    counts = jnp.array([3, 0, 8], jnp.int32)
    groups = batch_groups(counts, max_tokens=8, tile_rows=8)
    rows = x_of(0, CONFIG, 24)
    held = (jnp.arange(24) % 8 < jnp.repeat(counts, 8))[:, None]
    weights = experts_of(0, CONFIG).w13[:3]
    out = grouped_matmul(jnp.where(held, rows, jnp.nan), weights, groups, implementation="xla")
    expected = jnp.einsum("eth,enh->etn", rows.reshape(3, 8, -1), weights).reshape(24, -1)
    check_close(jnp.where(held, out, 0), jnp.where(held, expected, 0), 1e-6)


def test_later_tokens_without_room_are_dropped():
    """Exactly those: the layer is that of a routing without them."""
    config = dataclasses.replace(CONFIG, has_bias=False)
    x, experts, topk = x_of(0, config, 24), experts_of(0, config), topk_of(0, config, 24)
    ids = topk.ids.at[:, 0].set(jnp.where(topk.ids[:, 1] == 2, 1, 2))  # most tokens go to expert 2
    exchange, parallel = Batched(NoExchange(), max_tokens=8, overflow="drop"), ParallelConfig()

    @functools.partial(quick_jit)
    def run(x, experts, topk):
        prepared = exchange.prepare(x, topk, config, parallel, None, implementation="xla")
        return exchange.finalize(batched_experts(prepared, experts, config, implementation="xla"), prepared), prepared

    out, prepared = run(x, experts, TopK(ids, topk.weights))
    kept, room = np.array(ids), dict.fromkeys(range(5), 8)
    for t in range(24):
        for slot in range(2):
            expert = int(ids[t, slot])
            kept[t, slot] = expert if room[expert] > 0 else -1
            room[expert] -= 1
    assert int(prepared.dropped) == (kept == -1).sum() > 0
    assert prepared.counts.max() == 8 and prepared.rows.shape == (5, 8, 16)
    same = apply_experts(x, experts, TopK(jnp.asarray(kept), topk.weights), config, implementation="xla")
    check_close(out, same, 1e-6)


def test_dropped_of_all_ranks():
    x, experts, logits = problem(CONFIG, 32)
    logits = logits.at[:, 3].set(30.0)  # every token visits expert 3
    for ep in (True, False):
        mesh = mesh_of(tp=2, dp=2)
        exchange = Batched(AllGatherReduceScatter(), max_tokens=24, overflow="drop")
        layer = sharded(mesh, parallel_of(mesh, ep), CONFIG, exchange=exchange, return_dropped=True)
        assert int(layer(x, experts, logits)[1]) == 8


def test_gradients():
    mesh = mesh_of(dp=2)
    operands = problem(CONFIG, 8)
    layer = sharded(mesh, parallel_of(mesh, True), CONFIG, exchange=Batched(AllToAll(), max_tokens=8), compiled=False)

    def gradients(layer):
        return quick_jit(jax.grad(lambda *operands: jnp.sum(jnp.sin(layer(*operands))), argnums=(0, 1, 2)))(*operands)

    wanted = gradients(lambda *operands: moe(*operands, CONFIG, implementation="xla"))
    jax.tree.map(lambda a, b: check_close(a, b, 1e-5), gradients(layer), wanted)


def test_errors():
    with pytest.raises(ValueError, match="max_tokens=12 must be a positive multiple of 8"):
        Batched(max_tokens=12)
    with pytest.raises(ValueError, match="overflow='spill' must be one of error, drop"):
        Batched(overflow="spill")
    with pytest.raises(ValueError, match="belongs to the exchange inside"):
        Batched(quantize_before=True)
    mesh = mesh_of(dp=2)
    with pytest.raises(ValueError, match="max_tokens=8 is too small .* all 16 tokens, 16 rows"):
        sharded(mesh, parallel_of(mesh, True), CONFIG, exchange=Batched(AllToAll(), max_tokens=8))(*problem(CONFIG, 16))
    config = MoEConfig(4, 2, 16, 16, quantization="fp8_tensor")
    x, experts, logits = problem(dataclasses.replace(config, quantization=None), 8)
    layer = sharded(mesh, parallel_of(mesh, True), config, exchange=Batched(AllToAll(), max_tokens=8))
    with pytest.raises(ValueError, match="takes one scale from all rows"):
        layer(x, quantize_experts(experts, "fp8_tensor"), logits)
