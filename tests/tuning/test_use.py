"""The layer runs under the plan that is there for it, and `explain` says which that is."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax import MoEConfig, RoutingConfig, _compat, apply_experts, explanation, moe
from moe_jax.explanation import explain, explain_plan
from moe_jax.kernels.hopper import matmul_bf16 as kernel
from moe_jax.kernels.hopper import matmul_config
from moe_jax.ops import implementation
from moe_jax.ops.group_tokens import group_tokens
from moe_jax.ops.grouped_matmul import grouped_matmul
from moe_jax.tuning import cache
from moe_jax.tuning.plan import LayerShape, default_plan, plan_for
from tests.layers import check_layer, experts_of, logits_of, reference_moe, topk_of, x_of
from tests.lowering import FEW_ROW_COUNTS, like, lower
from tests.tuning.plans import entry_of

CONFIG = MoEConfig(4, 2, 64, 48)
TOKENS = 24  # more than share one tile
SHAPE = LayerShape.of(CONFIG, TOKENS)


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(cache, "device_kind", lambda: "cpu")
    for name, counts in FEW_ROW_COUNTS.items():
        monkeypatch.setattr(matmul_config, name, counts)


@pytest.fixture
def used(monkeypatch):
    """The configurations that the kernel is called with."""
    configs = []
    inner = kernel.grouped_matmul

    def spy(*operands, config, **keywords):
        configs.append(config)
        return inner(*operands, config=config, **keywords)

    monkeypatch.setattr(kernel, "grouped_matmul", spy)
    return configs


@pytest.fixture
def tuned(folders):
    """A plan for the layer that nobody would choose otherwise."""
    entry = entry_of(SHAPE, band=3, tile_rows=128)
    cache.save(folders[0], entry)
    assert entry.plan.tile_rows != default_plan(SHAPE).tile_rows
    return entry.plan


def operands(config=CONFIG, tokens=TOKENS):
    return x_of(0, config, tokens), experts_of(0, config), logits_of(0, config, tokens)


def lowered(**keywords):
    """Lowers the layer for a GPU: what the kernels are called with is settled then."""
    lower(lambda *arrays: moe(*arrays, CONFIG, implementation="mosaic", **keywords), *operands())


def test_the_rule_without_a_tuned_plan(used):
    lowered()
    rule = default_plan(SHAPE)
    assert used == [rule.up, rule.down]


def test_the_tuned_plan_if_there_is_one(used, tuned):
    lowered()
    assert used == [tuned.up, tuned.down]


def test_a_plan_that_is_given_comes_first(used, tuned):
    mine = dataclasses.replace(tuned, down=dataclasses.replace(tuned.down, band=2))
    lowered(plan=mine)
    topk = topk_of(0, CONFIG, TOKENS)
    x, experts, _ = operands()
    lower(lambda *arrays: apply_experts(*arrays, CONFIG, plan=mine, implementation="mosaic"), x, experts, topk)
    assert used == [mine.up, mine.down] * 2


def test_plain_jax_asks_for_no_plan(monkeypatch, tuned):
    monkeypatch.setattr(cache, "find_tuned", lambda shape: pytest.fail("it has no use for a plan"))
    x, experts, logits = operands()
    moe(x, experts, logits, CONFIG, implementation="xla")


def test_a_rank_looks_for_its_share(used, folders):
    """Two of four experts: half of the pairs are expected."""
    shape = LayerShape.of(CONFIG, TOKENS, 2)
    assert shape.num_pairs == TOKENS
    cache.save(folders[0], entry_of(shape, band=3))
    x, experts, logits = operands()
    local = jax.tree.map(lambda w: w[:2], experts)
    expert_map = jnp.array([0, 1, -1, -1], jnp.int32)
    lower(lambda x, e, g, m: moe(x, e, g, CONFIG, expert_map=m, implementation="mosaic"), x, local, logits, expert_map)
    assert used[0].band == 3


def test_the_result_is_that_of_the_layer(monkeypatch, used, tuned):
    monkeypatch.setattr(_compat, "num_multiprocessors", lambda: 2)
    monkeypatch.setattr(_compat, "interpret_params", lambda: plgpu.InterpretGPUParams(detect_races=True))
    x, experts, logits = operands()
    out = moe(x, experts, logits, CONFIG, implementation="mosaic_interpret")
    assert used == [tuned.up, tuned.down]
    check_layer(out, reference_moe(x, experts, logits, CONFIG), CONFIG)


@pytest.mark.parametrize("tokens", [1, 9])
def test_few_tokens_run_under_any_tuned_plan(folders, tokens):
    """They may share tiles of fewer rows than the plan's."""
    shape = LayerShape.of(CONFIG, tokens)
    rule = default_plan(shape, 64)
    up = dataclasses.replace(rule.up, cluster=2, gather=False, tile_k=64, row_counts=(16, 32, 64))
    cache.save(folders[0], entry_of(shape)._replace(plan=dataclasses.replace(rule, up=up)))
    lower(lambda *arrays: moe(*arrays, CONFIG, implementation="mosaic"), *operands(tokens=tokens))
    softmax = dataclasses.replace(CONFIG, routing=RoutingConfig("hash"))
    topk = topk_of(0, softmax, tokens)
    x, experts, _ = operands(tokens=tokens)
    lower(lambda *arrays: apply_experts(*arrays, softmax, implementation="mosaic"), x, experts, topk)


def matmul(config, tile_rows=64, chosen="mosaic", gated=False, dtype="bfloat16"):
    def run(ids, weights):
        groups = group_tokens(ids, num_experts=2, tile_rows=tile_rows, implementation=chosen)
        rows = jnp.zeros((groups.num_rows, 64), dtype)
        activation = CONFIG.act if gated else None
        return grouped_matmul(rows, weights, groups, activation=activation, config=config, implementation=chosen)

    return jax.eval_shape(run, like("int32", 4, 1), like(dtype, 2, 64, 64))


@pytest.mark.parametrize("chosen", ["xla", "mosaic"])
def test_a_config_for_another_row_tile_is_refused(chosen):
    config = default_plan(SHAPE, 128).down
    assert matmul(config, 128, chosen).shape[1] == 64
    with pytest.raises(ValueError, match=r"config.tile_rows=128 must be groups.tile_rows=64.*tile_rows=128.*None"):
        matmul(config, 64, chosen)


def test_a_config_that_cannot_run_is_refused_where_the_kernel_runs():
    config = dataclasses.replace(default_plan(SHAPE, 128).down, stages=9)
    with pytest.raises(ValueError, match="stages=9.*shared memory.*leave config None"):
        matmul(config, 128)
    matmul(config, 128, "xla")
    lone = dataclasses.replace(default_plan(SHAPE, 128).up, halves=1)
    matmul(lone, 128)
    with pytest.raises(ValueError, match="halves=1 must be 2"):
        matmul(lone, 128, gated=True)


def test_explain_says_where_the_plan_comes_from(monkeypatch, folders):
    assert "none" in explain_plan(CONFIG, TOKENS, "cpu")
    elsewhere = explain_plan(CONFIG, TOKENS, "gpu")
    assert "the default rule, tile_rows=64" in elsewhere and "there is none here" in elsewhere
    monkeypatch.setattr(explanation, "platform_reason", lambda platform=None: None)
    monkeypatch.setattr(explanation, "device_kind", lambda: "NVIDIA H200")
    here = explain_plan(CONFIG, TOKENS)
    for word in ("the default rule", "nothing is tuned", f"{SHAPE.num_pairs} pairs", "NVIDIA H200", "moe-jax tune"):
        assert word in here
    path = cache.save(folders[0], entry_of(SHAPE, tile_rows=128))
    there = explain_plan(CONFIG, TOKENS + 3)
    for word in ("tuned", f"{SHAPE.num_pairs} pairs", "tile_rows=128", str(path)):
        assert word in there
    assert "default" not in there


def test_explain_judges_the_kernels_under_the_plan(monkeypatch, tuned):
    seen = []
    inner = kernel.supports
    monkeypatch.setattr(kernel, "supports", lambda *a: seen.append(a[-1]) or inner(*a))
    explain(CONFIG, TOKENS, "gpu")
    assert set(seen) == {tuned.tile_rows}


def test_the_platform_of_the_process_is_asked_once_per_call(monkeypatch):
    monkeypatch.setattr(implementation, "platform_reason", lambda platform=None: "not Hopper")
    assert plan_for(SHAPE) == default_plan(SHAPE)
