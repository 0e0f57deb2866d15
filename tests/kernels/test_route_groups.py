"""Routing and grouping in one pass, interpreted: the groups are those of the experts chosen; and lowered for CUDA."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import _compat
from moe_jax.kernels.hopper import group_tokens, topk
from moe_jax.ops.group_tokens import Groups, max_tiles
from moe_jax.ops.group_tokens import group_tokens as ops_group_tokens
from moe_jax.ops.route_groups import route_groups
from tests.contracts import check_topk
from tests.grouping import check_groups, check_invariants, check_shared_groups
from tests.lowering import like, lower, mosaic_code, num_kernels
from tests.oracles import config_of, logits_of

MAP = [1, -1, 0, 7, 2, -1, 2, 1]  # two experts share a local one, another's is out of range


def run(logits, config, expert_map=None, num_local=None, **kwargs):
    found, groups = route_groups(
        jnp.asarray(logits),
        config.top_k,
        config.routing.rule,
        expert_map=None if expert_map is None else jnp.asarray(expert_map, jnp.int32),
        num_local_experts=num_local,
        implementation="mosaic_interpret",
        **kwargs,
    )
    check_topk(found, logits, config, None)
    return np.asarray(found.ids), groups


def of_other_tokens(groups):
    """Rows of another token than theirs."""
    return dataclasses.replace(groups, row_tokens=jnp.roll(groups.row_tokens, 1))


def with_holes(logits):
    """A token without an expert, and one with a single one."""
    logits = np.array(logits)
    logits[0], logits[-1, 1:] = np.nan, -np.inf
    return logits


def test_groups_begin_at_multiples():
    logits = with_holes(logits_of(0, 33, 8))
    ids, groups = run(logits, config_of("renormalize", 3, 8), tile_rows=8, row_multiple=4)
    check_groups(groups, ids, 8)
    assert groups.row_multiple == 4 and not (np.asarray(groups.tile_starts) % 4).any()


@pytest.mark.parametrize(
    ("num_tokens", "top_k", "expert_map"), [(21, 3, None), (33, 2, MAP), (5, 1, None), (16, 8, MAP)]
)
def test_groups_of_the_experts_chosen(num_tokens, top_k, expert_map):
    config, num_local = config_of("renormalize", top_k, 8), None if expert_map is None else 3
    logits = with_holes(logits_of(0, num_tokens, 8))
    ids, groups = run(logits, config, expert_map, num_local, tile_rows=8, row_tokens=True)
    check_groups(groups, ids, 8, num_local, expert_map)
    if expert_map is None:
        check_invariants(groups, ids)
    with pytest.raises(AssertionError):
        check_groups(groups, np.roll(ids, 1, axis=0), 8, num_local, expert_map)
    with pytest.raises(AssertionError):
        check_groups(of_other_tokens(groups), ids, 8, num_local, expert_map)


@pytest.mark.parametrize(("num_tokens", "top_k", "expert_map"), [(1, 1, None), (8, 3, MAP), (9, 2, None), (16, 8, MAP)])
def test_few_tokens_share_the_tiles(num_tokens, top_k, expert_map):
    config, num_local = config_of("renormalize", top_k, 8), None if expert_map is None else 3
    logits = logits_of(1, num_tokens, 8)
    logits = logits if num_tokens == 1 else with_holes(logits)
    ids, groups = run(logits, config, expert_map, num_local, share_rows=True)
    assert groups.tile_tokens is not None and groups.tile_rows == (8 if num_tokens <= 8 else 16)
    check_shared_groups(groups, ids, 8, num_local, expert_map)
    with pytest.raises(AssertionError):
        check_shared_groups(groups, np.where(ids < 0, 0, -1), 8, num_local, expert_map)


def test_more_local_experts_than_threads():
    config = config_of("renormalize", 4, 160)
    ids, groups = run(logits_of(2, 17, 160), config)
    check_groups(groups, ids, 160)
    ids, groups = run(logits_of(2, 7, 160), config, share_rows=True)
    check_shared_groups(groups, ids, 160)


@pytest.mark.parametrize(("many", "num_tokens", "warpgroups"), [(1024, 85, 1), (0, 140, 4)])
def test_several_tiles_of_a_block(monkeypatch, many, num_tokens, warpgroups):
    """Two blocks of several tiles of tokens, the last one not full: counts travel between tiles, warpgroups and blocks."""
    monkeypatch.setattr(topk, "MANY_TOKENS", many)
    config, logits = config_of("renormalize", 2, 8), logits_of(3, num_tokens, 8)
    interpret = _compat.interpret_params()
    wanted = topk.Count(8, max_blocks=2)
    assert wanted.warpgroups(num_tokens, 8) == warpgroups
    ids, weights, *counted = topk.topk(
        jnp.asarray(logits), 2, config.routing.rule, grouping=wanted, interpret=interpret
    )
    tiles = max_tiles(2 * num_tokens, 8, 8)
    assert counted[1].shape[0] == 2
    positions, *rest = group_tokens.place_pairs(
        *counted,
        8,
        8,
        tiles,
        tile_tokens=topk.ROWS * warpgroups,
        config=group_tokens.Config(warpgroups=2),
        interpret=interpret,
    )
    groups = Groups.of((positions.reshape(num_tokens, 2), *rest), 8)
    check_groups(groups, ids, 8)
    check_invariants(groups, ids)


@pytest.mark.parametrize(("num_tokens", "top_k"), [(0, 2), (3, 2), (19, 2)])
def test_gradient_of_the_weights(num_tokens, top_k):
    config, logits = config_of("renormalize", top_k, 8), jnp.asarray(logits_of(4, num_tokens, 8))

    def weights(logits, implementation):
        rule = config.routing.rule
        found, _ = route_groups(logits, top_k, rule, share_rows=True, implementation=implementation)
        return jnp.sum(found.weights * jnp.arange(1.0, 1 + top_k)[None, :])

    mine, plain = (jax.grad(weights)(logits, name) for name in ("mosaic_interpret", "xla"))
    np.testing.assert_allclose(mine, plain, atol=1e-6)
    assert num_tokens == 0 or np.any(np.asarray(plain))


def test_local_experts_need_a_map():
    with pytest.raises(ValueError, match="expert_map"):
        route_groups(jnp.zeros((3, 8)), 2, config_of("renormalize", 2, 8).routing.rule, num_local_experts=4)


#             T      k  E    E_local
LOWERED = [(1, 1, 8, 8), (16, 8, 128, 16), (17, 1, 32, 32), (100, 5, 60, 60), (1024, 8, 256, 32), (131072, 8, 512, 512)]


@pytest.mark.parametrize("shape", LOWERED, ids=str)
def test_lowers_for_cuda(shape):
    num_tokens, top_k, num_experts, num_local = shape
    rule = config_of("renormalize", top_k, num_experts).routing.rule
    call = functools.partial(
        route_groups, top_k=top_k, rule=rule, num_local_experts=num_local, share_rows=True, implementation="mosaic"
    )

    def schedule(logits, expert_map):
        found, groups = call(logits, expert_map=expert_map)
        return found, groups.positions, groups.tile_group, groups.tile_starts, groups.tile_sizes, groups.num_tiles

    text = lower(schedule, like("float32", num_tokens, num_experts), like("int32", num_experts))
    assert num_kernels(text) == (1 if num_tokens <= 16 else 2)


@pytest.mark.parametrize("num_tokens", [16, 100])
def test_integers_keep_their_sign(num_tokens):
    """-1 is a number below 0. Mosaic takes some selections for unsigned, which no interpreter shows."""

    def schedule(logits, ids, expert_map):
        rule = config_of("renormalize", 2, 8).routing.rule
        where = dict(num_local_experts=4, expert_map=expert_map, implementation="mosaic")
        _, groups = route_groups(logits, 2, rule, share_rows=True, **where)
        return groups, ops_group_tokens(ids, num_experts=8, **where)

    code = mosaic_code(schedule, like("float32", num_tokens, 8), like("int32", num_tokens, 2), like("int32", 8))
    assert "arith.cmpi slt" in code
    assert not re.findall(r"arith\.(?:cmpi u\w+|maxui|minui)", code)
