"""Each operation's kernel on a GPU at real sizes, against plain Python or its plain-JAX form.

Nearly all of the time goes to compilation, which JAX does one kernel at a time in a process. ``-n 8 --dist loadgroup`` and
``XLA_PYTHON_CLIENT_PREALLOCATE=false`` run the tests in several processes that share the GPU.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import MoEConfig
from moe_jax.kernels.hopper.matmul_config import default_config
from moe_jax.ops.combine import combine
from moe_jax.ops.gather import gather, plain_gather
from moe_jax.ops.group_tokens import default_tile_rows, group_tokens
from moe_jax.ops.grouped_matmul import grouped_matmul
from moe_jax.ops.route_groups import route_groups
from moe_jax.ops.topk import topk
from tests.contracts import (
    check_combine,
    check_gather,
    check_grouped_matmul,
    check_topk,
    groups_of,
    groups_with_sizes,
    rows_of,
)
from tests.grouping import check_groups, check_invariants, check_shared_groups, occupied_rows
from tests.layers import normal
from tests.oracles import RULES, bias_of, config_of, python_route, special_logits

pytestmark = pytest.mark.gpu

route = jax.jit(topk, static_argnames=("top_k", "rule", "implementation"))
STATIC = ("num_experts", "num_local_experts", "tile_rows", "row_tokens", "implementation")
group = jax.jit(group_tokens, static_argnames=STATIC)
matmul = jax.jit(
    functools.partial(grouped_matmul, implementation="mosaic"), static_argnames=("activation", "group_offset")
)


# --- routing


def clear_choices(logits, config, bias):
    """The tokens whose experts a small change of the scores does not change: near ties may go either way."""
    if bias is None:
        return logits
    rng, (ids, _) = np.random.default_rng(0), python_route(logits, config, bias)
    keep = np.ones(len(logits), bool)
    for _ in range(4):
        nudged = bias + rng.uniform(-1e-5, 1e-5, bias.shape)
        keep &= (python_route(logits, config, nudged)[0] == ids).all(axis=1)
    assert keep.mean() > 0.8
    return logits[keep]


def run_topk(logits, config, bias):
    bias = None if bias is None else jnp.asarray(bias)
    rule = config.routing.rule
    return route(jnp.asarray(logits), config.top_k, rule, correction_bias=bias, implementation="mosaic")


@pytest.mark.parametrize("name", RULES)
def test_routing_rules(name):
    """Logits on a grid: ties are exact, and distinct scores are further apart than the kernel's rounding."""
    config = config_of(name, num_experts=128)
    special = np.tile(special_logits(), (1, 8))
    ordinary = np.round(np.random.default_rng(1).normal(0, 2, (323, 128)) * 64) / 64
    bias = bias_of(1, config)
    logits = clear_choices(np.concatenate([special[:10], ordinary.astype(np.float32)]), config, bias)
    check_topk(run_topk(logits, config, bias), logits, config, bias, tolerance=2e-5)


@pytest.mark.parametrize(("num_experts", "num_tokens", "dtype"), [(8, 1, "float32"), (384, 1000, "bfloat16")])
def test_routing_of_other_sizes(num_experts, num_tokens, dtype):
    config = config_of("renormalize", 2, num_experts)
    logits = jnp.asarray(np.random.default_rng(2).normal(0, 2, (num_tokens, num_experts)), dtype)
    check_topk(run_topk(logits, config, None), np.asarray(logits, np.float32), config, tolerance=2e-5)


def test_a_token_is_routed_alone_as_in_a_batch():
    config = config_of("deepseek_v3_grouped", num_experts=256)
    logits, bias = jnp.asarray(np.random.default_rng(3).normal(0, 2, (300, 256)), jnp.float32), bias_of(3, config)
    together = run_topk(logits, config, bias)
    for token in (0, 63, 64, 299):
        alone = run_topk(logits[token : token + 1], config, bias)
        np.testing.assert_array_equal(alone.ids[0], together.ids[token])
        np.testing.assert_array_equal(alone.weights[0], together.weights[token])


ROUTE_AND_GROUP = [
    (1, 8, 128, None),
    (16, 4, 60, 20),
    (17, 1, 32, None),
    (1000, 8, 256, 32),
    (5000, 1, 64, None),
    (16384, 8, 128, None),
    (3001, 6, 384, 48),
]


@pytest.mark.parametrize("shape", ROUTE_AND_GROUP, ids=str)
def test_groups_counted_while_routing(shape):
    """The groups are those of the experts chosen, and the experts those of the routing alone."""
    num_tokens, top_k, num_experts, num_local = shape
    config = config_of("renormalize", top_k, num_experts)
    logits = np.random.default_rng(4).normal(0, 2, (num_tokens, num_experts)).astype(np.float32)
    if num_tokens > 1:
        logits[num_tokens // 2] = np.nan
    expert_map = None
    if num_local is not None:
        expert_map = np.full(num_experts, -1, np.int32)
        expert_map[np.random.default_rng(5).permutation(num_experts)[:num_local]] = np.arange(num_local)
    run = jax.jit(
        functools.partial(
            route_groups,
            top_k=top_k,
            rule=config.routing.rule,
            num_local_experts=num_local,
            share_rows=True,
            row_tokens=True,
            implementation="mosaic",
        )
    )
    topk, groups = run(jnp.asarray(logits), expert_map=None if expert_map is None else jnp.asarray(expert_map))
    check_topk(topk, logits, config, None, tolerance=2e-5)
    if groups.tile_tokens is not None:
        check_shared_groups(groups, topk.ids, num_experts, num_local, expert_map)
    else:
        check_groups(groups, topk.ids, num_experts, num_local, expert_map)


# --- grouping

#              T      k  E     E_local
GROUPINGS = [
    (1, 1, 8, 8),
    (16, 8, 128, 128),
    (333, 3, 60, 60),
    (1000, 6, 160, 20),
    (16384, 8, 128, 128),
    (131072, 1, 1024, 1024),
]


def routings(num_tokens, top_k, num_experts):
    """name: ids. Spread out, skewed, with holes, all on one expert, on none."""
    rng, shape = np.random.default_rng(num_tokens), (num_tokens, top_k)
    spread = rng.integers(0, num_experts, shape)
    yield "spread out", spread
    yield "skewed", np.minimum(rng.geometric(0.1, shape) - 1, num_experts - 1)
    yield "with holes", np.where(rng.random(shape) < 0.5, rng.choice([-1, -9, num_experts, 2**31 - 1], shape), spread)
    yield "on the first", np.zeros(shape)
    yield "on the last", np.full(shape, num_experts - 1)
    yield "on none", np.full(shape, -1)


@pytest.mark.parametrize("shape", GROUPINGS, ids=str)
def test_grouping(shape):
    """Bit by bit the plain-JAX form, and for few pairs plain Python too."""
    num_tokens, top_k, num_experts, num_local = shape
    expert_map = None
    if num_local != num_experts:
        expert_map = np.full(num_experts, -1, np.int32)
        chosen = np.random.default_rng(4).permutation(num_experts)[:num_local]
        expert_map[chosen] = np.arange(num_local)
    tile_rows = default_tile_rows(num_tokens * top_k, num_local, "mosaic")
    for name, ids in routings(num_tokens, top_k, num_experts):
        ids = ids.astype(np.int32)
        run = functools.partial(
            group,
            jnp.asarray(ids),
            num_experts=num_experts,
            num_local_experts=num_local,
            expert_map=None if expert_map is None else jnp.asarray(expert_map),
            tile_rows=tile_rows,
        )
        kernel, plain = run(implementation="mosaic"), run(implementation="xla")
        for field in ("positions", "tile_group", "tile_starts", "tile_sizes", "group_sizes", "num_tiles", "tile_spans"):
            np.testing.assert_array_equal(getattr(kernel, field), getattr(plain, field), err_msg=f"{name}: {field}")
        again = run(implementation="mosaic")
        np.testing.assert_array_equal(again.positions, kernel.positions)
        if ids.size <= 8000:
            check_groups(kernel, ids, num_experts, num_local, expert_map)
            check_invariants(kernel, np.where((ids < 0) | (ids >= num_experts), -1, ids))


# --- rows

#             T     k  E    H      dtype
ROW_COPIES = [
    (1, 1, 8, 4096, "bfloat16"),
    (1000, 8, 128, 2048, "bfloat16"),
    (129, 4, 32, 2880, "float16"),
    (33, 3, 8, 1040, "bfloat16"),
    (500, 8, 256, 7168, "bfloat16"),
    (100, 2, 8, 1028, "float32"),
    (64, 20, 64, 512, "bfloat16"),
    (50, 4, 16, 768, "bfloat16"),
    (50, 4, 16, 1536, "float16"),
]


@pytest.mark.parametrize("problem", ROW_COPIES, ids=str)
def test_gather(problem):
    num_tokens, top_k, num_experts, hidden, dtype = problem
    x = normal(5, num_tokens, hidden, dtype=dtype)
    for missing in (0.0, 0.3):
        groups = groups_of(5, num_tokens, top_k, num_experts, 64, missing=missing)
        check_gather(jax.jit(functools.partial(gather, implementation="mosaic"))(x, groups), x, groups)


@pytest.mark.parametrize("problem", [p for p in ROW_COPIES if p[-1] != "float32"], ids=str)
def test_combine(problem):
    num_tokens, top_k, num_experts, hidden, dtype = problem
    groups = groups_of(6, num_tokens, top_k, num_experts, 64, missing=0.2)
    rows = rows_of(6, groups, hidden, dtype)
    weights = np.random.default_rng(6).uniform(0.1, 1.0, groups.positions.shape)
    weights = jnp.asarray(np.where(np.asarray(groups.positions) < 0, np.nan, weights), jnp.float32)
    run = jax.jit(functools.partial(combine, implementation="mosaic"))
    check_combine(run(rows, groups.positions, weights), rows, groups.positions, weights)
    check_combine(run(rows, groups.positions, None), rows, groups.positions, None)


# --- matmuls

SIZES = (0, 1, 8, 9, 31, 33, 64, 65, 100, 128, 129, 160, 161, 500)
MATMULS = {
    #        tile  K     N     activation        bias   dtype
    "up 64": (64, 2048, 1536, "silu", False, "bfloat16"),
    "up 160": (160, 2048, 1536, "silu", False, "bfloat16"),
    "up 192": (192, 2048, 1536, "silu", False, "bfloat16"),
    "down 64": (64, 768, 2048, None, False, "bfloat16"),
    "down 160": (160, 768, 2048, None, True, "float16"),
    "gpt-oss": (128, 2880, 5760, "swigluoai", True, "bfloat16"),
    "odd": (160, 1040, 1056, "gelu", True, "bfloat16"),
    "small and odd": (64, 16, 48, "relu2_no_mul", True, "float16"),
}


@pytest.mark.parametrize("name", MATMULS)
def test_grouped_matmul(name):
    tile_rows, k, n, activation, with_bias, dtype = MATMULS[name]
    groups = groups_with_sizes(7, SIZES, tile_rows)
    rows = rows_of(7, groups, k, dtype)
    weights = normal(8, len(SIZES) + 1, n, k, dtype=dtype, scale=k**-0.5)
    weights = weights.at[0].set(jnp.nan)  # an expert without rows, once the offset is added another one
    bias = normal(9, len(SIZES) + 1, n, dtype=dtype) if with_bias else None
    config = None if activation is None else MoEConfig(1, 1, 8, 8, activation=activation)
    act = None if config is None else config.act
    for offset in (0, 1) if name == "down 160" else (0,):
        out = matmul(rows, weights, groups, bias=bias, activation=act, group_offset=offset)
        check_grouped_matmul(out, rows, weights, groups, bias, config, offset)


@pytest.mark.parametrize("name", ["up 64", "down 160", "up 192"])
def test_neighbours_fetch_their_rows_together(name):
    tile_rows, k, n, activation, with_bias, dtype = MATMULS[name]
    groups = groups_with_sizes(7, SIZES, tile_rows)
    rows = rows_of(7, groups, k, dtype)
    weights = normal(8, len(SIZES), n, k, dtype=dtype, scale=k**-0.5)
    act = None if activation is None else MoEConfig(1, 1, 8, 8, activation=activation).act
    rule = default_config(tile_rows, act is not None, n // 2 if act else n, len(SIZES))
    pairs = dataclasses.replace(rule, cluster=2, row_counts=tuple(c for c in rule.row_counts if c % 16 == 0))
    alone = dataclasses.replace(rule, cluster=1)
    bits = [
        np.asarray(jax.jit(functools.partial(grouped_matmul, activation=act, config=c))(rows, weights, groups))
        for c in (pairs, alone)
    ]
    where = occupied_rows(groups)
    assert np.asarray(bits[0][where], np.float32).any()
    np.testing.assert_array_equal(*(b[where].view(np.int16) for b in bits))


@pytest.mark.parametrize(
    ("tile_rows", "k", "n", "activation", "dtype"),
    [
        (160, 2048, 1536, "silu", "bfloat16"),
        (128, 4096, 3072, "swigluoai", "float16"),
        (64, 2880, 5760, "silu", "bfloat16"),
        (64, 320, 1056, None, "bfloat16"),
    ],
    ids=str,
)
def test_rows_fetched_by_their_tokens(tile_rows, k, n, activation, dtype):
    """The same bits as after a gather, whatever lies in rows of no group; memory behind the last row is never read."""
    rng = np.random.default_rng(13)
    ids = np.stack([rng.permutation(16)[:4] for _ in range(777)])
    ids[:, 3] = np.where(rng.random(777) < 0.5, -1, ids[:, 3])
    groups = group(
        jnp.asarray(ids, jnp.int32), num_experts=16, tile_rows=tile_rows, row_tokens=True, implementation="mosaic"
    )
    x = normal(13, 777, k, dtype=dtype).at[5].set(jnp.nan)
    weights, bias = normal(14, 16, n, k, dtype=dtype, scale=k**-0.5), normal(15, 16, n)
    act = None if activation is None else MoEConfig(1, 1, 8, 8, activation=activation).act
    config = default_config(tile_rows, activation is not None, n // 2 if act else n, 16)
    config = dataclasses.replace(config, gather=True)
    run = functools.partial(grouped_matmul, groups=groups, bias=bias, activation=act, config=config)
    fetched = jax.jit(functools.partial(run, tokens_as_rows=True))(x, weights)
    before = jax.jit(run)(plain_gather(x, groups.positions), weights)
    where = occupied_rows(groups)
    bits = [np.asarray(out[where]) for out in (fetched, before)]
    assert np.isfinite(bits[0].astype(np.float32)).any(axis=1).sum() == len(where) - (ids[5] >= 0).sum()
    np.testing.assert_array_equal(bits[0].view(np.int16), bits[1].view(np.int16))


def test_the_bits_of_a_row_do_not_depend_on_the_tile():
    sizes, k, n = (3, 70, 200, 0, 129), 1040, 1056
    weights, act = normal(10, 5, n, k, dtype="bfloat16", scale=k**-0.5), MoEConfig(1, 1, 8, 8).act
    x = normal(11, sum(sizes), k, dtype="bfloat16")
    outputs = []
    for tile_rows in (64, 96, 128, 160, 192):
        groups = groups_with_sizes(12, sizes, tile_rows)
        rows = gather(x, groups, implementation="xla")
        out = matmul(rows, weights, groups, activation=act)
        outputs.append(np.asarray(out[groups.positions[:, 0]]).view(np.int16))
    assert len(np.unique(outputs[0])) > 1000
    for other in outputs[1:]:
        np.testing.assert_array_equal(other, outputs[0])
