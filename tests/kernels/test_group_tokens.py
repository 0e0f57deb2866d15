"""The grouping kernels, interpreted, against a counting sort in plain Python; and lowered for CUDA."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from moe_jax import _compat
from moe_jax.kernels.hopper import group_tokens as kernel
from moe_jax.ops.group_tokens import Groups, group_tokens, max_tiles
from tests.grouping import check_groups, check_invariants
from tests.lowering import assert_lowers_to_kernels, like

# Interpreting a kernel is compiling it, for the most part: tests that need no shape of their own share one.
SHAPE = 13, 3


@functools.cache
def compiled(**options):
    return jax.jit(functools.partial(group_tokens, implementation="mosaic_interpret", **options))


def run(ids, num_experts, num_local=None, expert_map=None, tile_rows=64, **kwargs):
    group = compiled(num_experts=num_experts, num_local_experts=num_local, tile_rows=tile_rows, **kwargs)
    expert_map = None if expert_map is None else jnp.asarray(expert_map, jnp.int32)
    return group(jnp.asarray(ids, jnp.int32), expert_map=expert_map)


def random_ids(seed, num_tokens, top_k, num_experts, missing=0.2):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, num_experts, (num_tokens, top_k))
    return np.where(rng.random(ids.shape) < missing, -1, ids)


@pytest.mark.parametrize("shape", [(*SHAPE, 5), (1, 1, 1), (1, 4, 8)])
def test_random_pairs(shape):
    num_tokens, top_k, num_experts = shape
    ids = random_ids(0, num_tokens, top_k, num_experts)
    groups = run(ids, num_experts)
    check_groups(groups, ids, num_experts)
    check_invariants(groups, ids)
    with pytest.raises(AssertionError):
        check_groups(groups, np.where(ids < 0, 0, -1), num_experts)


@pytest.mark.once
@pytest.mark.parametrize("row_multiple", [4, 8])
def test_groups_begin_at_multiples(row_multiple):
    ids = random_ids(0, 41, 3, 5)
    groups = run(ids, 5, tile_rows=16, row_multiple=row_multiple)
    check_groups(groups, ids, 5)
    check_invariants(groups, ids)
    assert not (np.asarray(groups.tile_starts) % row_multiple).any()


@pytest.mark.once
@pytest.mark.parametrize("expert", [4, -1])
def test_all_pairs_on_one_expert_or_none(expert):
    ids = np.full(SHAPE, expert)
    check_groups(run(ids, 5), ids, 5)


@pytest.mark.once
def test_ids_out_of_range_get_no_row():
    ids = np.resize([0, 5, -2, 1, 2**31 - 1, -(2**31), 4, 4], SHAPE)
    check_groups(run(ids, 5), ids, 5)


@pytest.mark.once
@pytest.mark.parametrize("tile_rows", [1, 8, 24])
def test_tiles(tile_rows):
    """Groups of several tiles, spread evenly over them."""
    ids = random_ids(1, 33, 1, 2)
    check_groups(run(ids, 3, tile_rows=tile_rows), ids, 3)


@pytest.mark.once
def test_more_local_experts_than_threads():
    ids = random_ids(2, 6, 4, 150)
    check_groups(run(ids, 150), ids, 150)


@pytest.mark.once
def test_offset_instead_of_a_map():
    ids = random_ids(3, 10, 2, 6)
    check_groups(run(ids, 6, 2, group_offset=3), ids, 6, 2, [-1, -1, -1, 0, 1, -1])


@hypothesis.settings(max_examples=2, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(
    ids=st.lists(st.integers(-1, 5), min_size=18, max_size=18),
    expert_map=st.lists(st.integers(-1, 3), min_size=5, max_size=5),
)
def test_any_pairs_and_any_map(ids, expert_map):
    """An id and a local id are out of range; several experts may share a local one."""
    ids = np.asarray(ids).reshape(9, 2)
    check_groups(run(ids, 5, 3, expert_map), ids, 5, 3, expert_map)


@pytest.mark.parametrize("expert_map", [None, [1, -1, 0, 2, -1]])
def test_many_blocks(expert_map):
    """Two blocks of several tiles, the last one not full: counts travel between tiles and blocks."""
    ids = random_ids(4, 101, 3, 5)
    ids[3:9] = 3  # a run that straddles warps
    num_local = 5 if expert_map is None else 3
    config = kernel.Config(warpgroups=2, max_blocks=2)
    found = kernel.group_tokens(
        jnp.asarray(ids, jnp.int32),
        None if expert_map is None else jnp.asarray(expert_map, jnp.int32),
        num_experts=5,
        num_local_experts=num_local,
        tile_rows=4,
        max_tiles=max_tiles(ids.size, num_local, 4),
        row_tokens=True,
        config=config,
        interpret=_compat.interpret_params(),
    )
    groups = Groups.of(found, 4)
    assert groups.row_tokens is not None
    check_groups(groups, ids, 5, num_local, expert_map)
    check_invariants(groups, ids)


LOWERED = [(1, 1, 8, 8), (16, 8, 128, 128), (1000, 8, 256, 32), (16384, 8, 128, 128)]


@pytest.mark.parametrize("shape", LOWERED)
def test_lowers_for_cuda(shape):
    num_tokens, top_k, num_experts, num_local = shape
    call = functools.partial(
        group_tokens, num_experts=num_experts, num_local_experts=num_local, implementation="mosaic"
    )
    ids, expert_map = like("int32", num_tokens, top_k), like("int32", num_experts)
    assert_lowers_to_kernels(lambda ids, expert_map: call(ids, expert_map=expert_map), ids, expert_map)
    if num_local == num_experts:
        assert_lowers_to_kernels(call, ids)
