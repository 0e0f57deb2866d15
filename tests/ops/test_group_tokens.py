"""Grouping in its plain-JAX form, against a counting sort in plain Python."""

import dataclasses

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from moe_jax.ops.group_tokens import default_tile_rows, group_tokens, max_tiles, offset_map
from tests.grouping import check_groups, check_invariants, python_groups, token_of_rows
from tests.layers import quick_jit

STATIC = ("num_experts", "num_local_experts", "tile_rows", "row_multiple", "implementation")
compiled = quick_jit(group_tokens, static_argnames=STATIC)


def run(ids, num_experts, num_local=None, expert_map=None, tile_rows=8, **kwargs):
    found = compiled(
        jnp.asarray(ids, jnp.int32),
        num_experts=num_experts,
        num_local_experts=num_local,
        expert_map=None if expert_map is None else jnp.asarray(expert_map, jnp.int32),
        tile_rows=tile_rows,
        implementation="xla",
        **kwargs,
    )
    check_invariants(found, ids)
    return found


def random_ids(seed, num_tokens, top_k, num_experts, missing=0.1):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, num_experts, (num_tokens, top_k))
    return np.where(rng.random(ids.shape) < missing, -1, ids)


@pytest.mark.parametrize("shape", [(37, 2, 5), (1, 1, 1), (1, 4, 4), (64, 1, 3), (50, 8, 16), (3, 2, 100)])
@pytest.mark.parametrize("tile_rows", [1, 24])
def test_random_pairs(shape, tile_rows):
    num_tokens, top_k, num_experts = shape
    ids = random_ids(0, num_tokens, top_k, num_experts)
    check_groups(run(ids, num_experts, tile_rows=tile_rows), ids, num_experts)


@pytest.mark.parametrize("row_multiple", [2, 4, 8])
@pytest.mark.parametrize("num_tokens", [0, 1, 37])
def test_groups_begin_at_multiples(num_tokens, row_multiple):
    ids = random_ids(0, num_tokens, 2, 5)
    groups = run(ids, 5, row_multiple=row_multiple)
    check_groups(groups, ids, 5)
    assert not (np.asarray(groups.tile_starts) % row_multiple).any()
    assert groups.num_rows == ids.size + (row_multiple - 1) * min(5, ids.size)


def test_row_multiples_that_there_are_not():
    ids = jnp.zeros((3, 1), jnp.int32)
    with pytest.raises(ValueError, match=r"row_multiple=3 must be 1, 2, 4 or 8"):
        group_tokens(ids, num_experts=2, row_multiple=3)
    with pytest.raises(ValueError, match=r"row_multiple=4 is for rows that are written to memory"):
        group_tokens(ids, num_experts=2, row_multiple=4, row_tokens=True)


@pytest.mark.parametrize("expert", [0, 2, 4, -1])
def test_all_pairs_on_one_expert_or_none(expert):
    ids = np.full((37, 2), expert)
    check_groups(run(ids, 5), ids, 5)


def test_no_tokens():
    groups = run(np.zeros((0, 2)), 5)
    check_groups(groups, np.zeros((0, 2), np.int32), 5)
    assert groups.positions.shape == (0, 2) and int(groups.num_tiles[0]) == 0


def test_ids_out_of_range_get_no_row():
    ids = np.array([[0, 5], [-2, 1], [2**31 - 1, -(2**31)], [4, 4]])
    groups = run(ids, 5)
    check_groups(groups, ids, 5)
    assert groups.positions.tolist()[2] == [-1, -1]


def test_the_checks_can_fail():
    ids = random_ids(1, 37, 2, 5)
    groups = run(ids, 5)
    for other in (random_ids(2, 37, 2, 5), np.roll(ids, 1, axis=0), np.where(ids == 1, -1, ids)):
        with pytest.raises(AssertionError):
            check_groups(groups, other, 5)
    first = int(np.flatnonzero(np.diff(token_of_rows(groups)[: int(groups.group_sizes[0])]))[0])  # two tokens
    swapped = [groups.positions == first, groups.positions == first + 1]
    broken = {
        "two pairs in one row": dict(positions=groups.positions.at[3, 0].set(groups.positions[5, 0])),
        "a gap between the rows": dict(positions=groups.positions + (groups.positions >= 0)),
        "a tile of another expert": dict(tile_group=groups.tile_group.at[0].set(1)),
        "a tile in the rows of another": dict(tile_starts=groups.tile_starts.at[1].add(1)),
        "a tile in the span of another": dict(tile_spans=groups.tile_spans.at[1].add(1)),
        "a tile too many": dict(num_tiles=groups.num_tiles + 1),
        "a row too many": dict(group_sizes=groups.group_sizes.at[0].add(1)),
        "tokens out of order": dict(positions=jnp.select(swapped, [first + 1, first], groups.positions)),
    }
    for name, fields in broken.items():
        for check in (lambda g: check_groups(g, ids, 5), lambda g: check_invariants(g, ids)):
            with pytest.raises(AssertionError):
                check(dataclasses.replace(groups, **fields))
                pytest.fail(f"accepts {name}", pytrace=False)


SHAPES = [(9, 2, 4, 4), (9, 2, 4, 3), (16, 3, 6, 1), (5, 1, 3, 0)]


@hypothesis.settings(max_examples=60)
@hypothesis.given(data=st.data())
def test_any_pairs_and_any_map(data):
    num_tokens, top_k, num_experts, num_local = data.draw(st.sampled_from(SHAPES))
    tile_rows = data.draw(st.sampled_from([1, 4]))
    slot = st.integers(-1, num_experts)  # one id is out of range
    ids = data.draw(st.lists(slot, min_size=num_tokens * top_k, max_size=num_tokens * top_k))
    ids = np.asarray(ids, np.int32).reshape(num_tokens, top_k)
    local = st.integers(-1, num_local)  # one local id is out of range, several experts may share one
    expert_map = data.draw(st.lists(local, min_size=num_experts, max_size=num_experts))
    groups = compiled(
        jnp.asarray(ids),
        num_experts=num_experts,
        num_local_experts=num_local,
        expert_map=jnp.asarray(expert_map, jnp.int32),
        tile_rows=tile_rows,
        implementation="xla",
    )
    check_groups(groups, ids, num_experts, num_local, expert_map)


@pytest.mark.parametrize("offset", [0, 2, 4])
def test_neighbouring_experts_by_offset(offset):
    ids = random_ids(3, 30, 2, 6)
    expert_map = np.asarray(offset_map(6, 2, offset))
    assert [int(e) for e in np.flatnonzero(expert_map >= 0)] == [offset, offset + 1]
    expected = python_groups(ids, 6, 2, expert_map, 8)["positions"]
    for given in (offset, jnp.int32(offset)):  # on the GPU, or known
        if isinstance(given, int):
            groups = group_tokens(
                jnp.asarray(ids, jnp.int32),
                num_experts=6,
                num_local_experts=2,
                group_offset=given,
                tile_rows=8,
                implementation="xla",
            )
        else:
            groups = run(ids, 6, 2, group_offset=given)
        np.testing.assert_array_equal(groups.positions, expected)


@hypothesis.given(
    num_pairs=st.integers(0, 300),
    num_local=st.integers(0, 20),
    tile_rows=st.sampled_from([1, 8, 64]),
    seed=st.integers(0),
)
def test_the_schedule_has_room_for_any_routing_and_not_for_more(num_pairs, num_local, tile_rows, seed):
    def needed(sizes):
        return sum(-(-int(size) // tile_rows) for size in sizes)

    room = max_tiles(num_pairs, num_local, tile_rows)
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.full(num_local + 1, 0.3))
    assert needed(rng.multinomial(num_pairs, shares)[:num_local]) <= room
    visited = min(num_pairs, num_local)  # the worst: a single row for each expert, the rest to one of them
    worst = [1] * (visited - 1) + [num_pairs - visited + 1] if visited else []
    assert needed(worst) == room or not visited


def test_the_tile_follows_from_shapes():
    for chosen in ("xla", "mosaic"):
        tiles = [default_tile_rows(pairs, 16, chosen) for pairs in (0, 1, 16, 100, 1000, 10_000, 100_000)]
        assert tiles == sorted(tiles) and all(tile % 8 == 0 for tile in tiles)
        assert tiles[-1] == {"xla": 128, "mosaic": 192}[chosen]
    assert default_tile_rows(10, 0, "xla") >= 8
