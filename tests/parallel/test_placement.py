"""Which rank holds which experts: exact maps, and a map and its inverse that agree."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.parallel import ExpertPlacement, determine_expert_map, determine_expert_placement_strategy

# (experts, ranks) -> the experts of each rank, as (first, one past the last), and how many experts each rank has.
LINEAR = {
    (9, 2): [(0, 5), (5, 9)],
    (17, 2): [(0, 9), (9, 17)],
    (18, 2): [(0, 9), (9, 18)],
    (33, 2): [(0, 17), (17, 33)],
    (9, 4): [(0, 3), (3, 5), (5, 7), (7, 9)],
    (17, 4): [(0, 5), (5, 9), (9, 13), (13, 17)],
    (18, 4): [(0, 5), (5, 10), (10, 14), (14, 18)],
    (33, 4): [(0, 9), (9, 17), (17, 25), (25, 33)],
    (3, 4): [(0, 1), (1, 2), (2, 3), (3, 3)],
}
ROUND_ROBIN = {
    (9, 2): [[0, 2, 4, 6, 8], [1, 3, 5, 7]],
    (9, 4): [[0, 4, 8], [1, 5], [2, 6], [3, 7]],
    (17, 4): [[0, 4, 8, 12, 16], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15]],
    (18, 4): [[0, 4, 8, 12, 16], [1, 5, 9, 13, 17], [2, 6, 10, 14], [3, 7, 11, 15]],
}
HELD = [
    (size, "linear", [list(range(a, b)) for a, b in runs]) for size, runs in LINEAR.items()
] + [(size, "round_robin", held) for size, held in ROUND_ROBIN.items()]  # fmt: skip


@pytest.mark.parametrize(("size", "strategy", "held"), HELD, ids=str)
def test_the_experts_of_each_rank(size, strategy, held):
    num_experts, ep_size = size
    for rank, experts in enumerate(held):
        count, expert_map = determine_expert_map(ep_size, rank, num_experts, strategy)
        assert (count, expert_map.dtype) == (len(experts), np.int32)
        expected = [experts.index(expert) if expert in experts else -1 for expert in range(num_experts)]
        assert expert_map.tolist() == expected
    placement = ExpertPlacement.make(num_experts, ep_size, strategy)
    assert [placement.get_local_expert_ids(rank) for rank in range(ep_size)] == held


def test_one_map_written_out():
    assert determine_expert_map(4, 0, 9)[1].tolist() == [0, 1, 2, -1, -1, -1, -1, -1, -1]
    assert determine_expert_map(4, 3, 9)[1].tolist() == [-1, -1, -1, -1, -1, -1, -1, 0, 1]
    assert determine_expert_map(4, 1, 9, "round_robin")[1].tolist() == [-1, 0, -1, -1, -1, 1, -1, -1, -1]
    assert determine_expert_map(1, 0, 9) == (9, None)


def test_refusals():
    with pytest.raises(AssertionError, match="ep_size=0 must be at least 1"):
        determine_expert_map(0, 0, 9)
    with pytest.raises(AssertionError, match="ep_rank=2 must lie in"):
        determine_expert_map(2, 2, 9)
    with pytest.raises(ValueError, match="strategy='zigzag' must be one of linear, round_robin"):
        determine_expert_map(2, 0, 9, "zigzag")
    with pytest.raises(ValueError, match="strategy='zigzag'"):
        determine_expert_map(1, 0, 9, "zigzag")


@hypothesis.given(st.integers(1, 70), st.integers(1, 12), st.sampled_from(["linear", "round_robin"]))
def test_slots_are_the_inverse_of_the_map(num_experts, ep_size, strategy):
    placement = ExpertPlacement.make(num_experts, ep_size, strategy)
    assert (placement.num_experts, placement.ep_size) == (num_experts, ep_size)
    assert placement.slots.shape == (ep_size, -(-num_experts // ep_size)) == (ep_size, placement.max_local_experts)
    check_inverse(placement)
    counts = (placement.slots >= 0).sum(axis=1)
    assert counts.max() - counts.min() <= 1 and (np.diff(counts) <= 0).all()


@hypothesis.given(st.lists(st.integers(0, 3), min_size=1, max_size=20), st.randoms())
def test_any_placement(homes, random):
    """Experts on ranks and in places by chance."""
    expert_map = np.full((4, len(homes)), -1)
    for rank in range(4):
        held = [expert for expert, home in enumerate(homes) if home == rank]
        random.shuffle(held)
        expert_map[rank, held] = np.arange(len(held))
    check_inverse(ExpertPlacement.of_map(expert_map))


def check_inverse(placement):
    found = []
    for rank in range(placement.ep_size):
        for local, expert in enumerate(placement.slots[rank]):
            if expert >= 0:
                assert placement.expert_map[rank, expert] == local
                found.append(expert)
    assert sorted(found) == list(range(placement.num_experts))
    assert (placement.expert_map >= 0).sum() == placement.num_experts


def test_lookups():
    placement = ExpertPlacement.make(9, 2, "round_robin")
    ids = jnp.array([[0, 1], [8, -1], [9, 7]])
    assert placement.map_global_to_local(ids, 0).tolist() == [[0, -1], [4, -1], [-1, -1]]
    assert placement.is_local_expert(ids, 1).tolist() == [[False, True], [False, False], [False, True]]
    assert placement.describe(1) == "0->1, 1->3, 2->5, 3->7"


def test_an_argument_of_a_jit():
    placement = ExpertPlacement.make(5, 2)
    local = jax.jit(lambda placement, ids, rank: placement.map_global_to_local(ids, rank))
    assert local(placement, jnp.arange(5), 1).tolist() == [-1, -1, -1, 0, 1]
    assert len(jax.tree.leaves(placement)) == 2


@pytest.mark.parametrize(
    ("expert_map", "message"),
    [
        ([[0, -1], [0, -1]], r"experts on \[2, 0\] ranks each"),
        ([[0, -2], [-1, 0]], "every expert must live on exactly one"),
        ([[0, 2], [-1, -1]], r"local ids of rank 0 are \[0, 2\]"),
        ([[-1, -1], [0, 0]], r"local ids of rank 1 are \[0, 0\]"),
    ],
)
def test_maps_that_place_nothing(expert_map, message):
    with pytest.raises(ValueError, match=message):
        ExpertPlacement.of_map(np.array(expert_map))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs num_expert_group > 1, got 1"),
        ({"num_expert_group": 4, "num_redundant_experts": 2}, "num_redundant_experts=2"),
        ({"num_expert_group": 4, "enable_eplb": True}, "enable_eplb=True"),
        ({"num_expert_group": 4, "any_placement": False}, "any_placement=False"),
    ],
    ids=str,
)
def test_round_robin_gives_way_with_a_warning(arguments, message):
    with pytest.warns(UserWarning, match=f"round_robin .*{message}.*using linear placement"):
        assert determine_expert_placement_strategy("round_robin", **arguments) == "linear"


def test_strategies_that_are_kept(recwarn):
    assert determine_expert_placement_strategy("round_robin", num_expert_group=4) == "round_robin"
    assert determine_expert_placement_strategy("linear", enable_eplb=True) == "linear"
    assert not recwarn.list
    with pytest.raises(ValueError, match="must be one of"):
        determine_expert_placement_strategy("zigzag")
