"""Which rank holds which experts, and in which order: `expert_map` and its inverse."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

STRATEGIES = ("linear", "round_robin")


def _check_strategy(strategy: str) -> None:
    if strategy not in STRATEGIES:
        raise ValueError(f"expert placement strategy={strategy!r} must be one of {', '.join(STRATEGIES)}")


def determine_expert_map(
    ep_size: int, ep_rank: int, num_experts: int, strategy: str = "linear"
) -> tuple[int, Int[np.ndarray, " E"] | None]:
    """The experts of one rank of expert parallelism. If `ep_size` does not divide them the first ranks hold one more.

    Args:
        ep_size: ranks that share the experts out.
        ep_rank: which of them.
        num_experts: E.
        strategy: ``linear``, a run of neighbouring experts a rank, or ``round_robin``, every `ep_size`-th expert.

    Returns:
        How many experts the rank holds, and int32 ``[E]``, global id to local id or -1; None where there is one rank alone.

    Raises:
        AssertionError: `ep_size` below 1, or a rank outside it.
        ValueError: another strategy.

    Source: vLLM's ``determine_expert_map``.

    Example:
        >>> determine_expert_map(2, 1, 5)
        (2, array([-1, -1, -1,  0,  1], dtype=int32))
        >>> determine_expert_map(2, 0, 5, "round_robin")
        (3, array([ 0, -1,  1, -1,  2], dtype=int32))
    """
    assert ep_size >= 1, f"ep_size={ep_size} must be at least 1"
    assert 0 <= ep_rank < ep_size, f"ep_rank={ep_rank} must lie in [0, ep_size={ep_size})"
    _check_strategy(strategy)
    if ep_size == 1:
        return num_experts, None
    base, more = divmod(num_experts, ep_size)
    count = base + (ep_rank < more)
    if strategy == "linear":
        start = ep_rank * base + min(ep_rank, more)
        held = np.arange(start, start + count)
    else:
        held = np.arange(ep_rank, num_experts, ep_size)
    expert_map = np.full(num_experts, -1, np.int32)
    expert_map[held] = np.arange(count, dtype=np.int32)
    return count, expert_map


def determine_expert_placement_strategy(
    strategy: str,
    *,
    num_expert_group: int = 1,
    num_redundant_experts: int = 0,
    enable_eplb: bool = False,
    any_placement: bool = True,
) -> str:
    """The strategy to use: ``round_robin`` where it serves a purpose and can be had, else ``linear``, with a warning.

    Args:
        strategy: what was asked for.
        num_expert_group: neighbouring experts that are chosen together; spreading them over ranks balances the load. Without
            groups there is nothing to spread.
        num_redundant_experts: copies of experts, which have a placement of their own.
        enable_eplb: load balancing, which makes its own placement.
        any_placement: whether the exchange can send tokens to experts in any order; those of `moe_jax.parallel` can.

    Raises:
        ValueError: another strategy.

    Source: vLLM's ``determine_expert_placement_strategy``.

    Example:
        >>> determine_expert_placement_strategy("round_robin", num_expert_group=4)
        'round_robin'
    """
    _check_strategy(strategy)
    if strategy == "linear":
        return strategy
    reasons = {
        f"needs num_expert_group > 1, got {num_expert_group}": num_expert_group <= 1,
        f"does not go with num_redundant_experts={num_redundant_experts}": num_redundant_experts > 0,
        "does not go with enable_eplb=True": enable_eplb,
        "is not what the exchange can send to (any_placement=False)": not any_placement,
    }
    hindrances = [reason for reason, holds in reasons.items() if holds]
    if not hindrances:
        return strategy
    warnings.warn(f"{strategy} placement {'; '.join(hindrances)}: using linear placement", stacklevel=2)
    return "linear"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ExpertPlacement:
    """Where each expert lives, for all ranks of expert parallelism: each expert on exactly one of them.

    The tables are NumPy arrays when it is made, constants to a jit that closes over it; it may also be an argument of one.

    Attributes:
        expert_map: int32 ``[ep, E]``, global id to local id on each rank, or -1. Row r is the `expert_map` of rank r.
        slots: int32 ``[ep, E_local_max]``, the inverse: the global id in each local place of a rank, or -1 past its last one.

    Example:
        >>> placement = ExpertPlacement.make(5, ep_size=2)
        >>> placement.expert_map.tolist()
        [[0, 1, 2, -1, -1], [-1, -1, -1, 0, 1]]
        >>> placement.slots.tolist()
        [[0, 1, 2], [3, 4, -1]]
    """

    expert_map: Int[Array | np.ndarray, "ep E"] | Any
    slots: Int[Array | np.ndarray, "ep E_local_max"] | Any

    @classmethod
    def make(cls, num_experts: int, ep_size: int, strategy: str = "linear") -> ExpertPlacement:
        """By a strategy of `determine_expert_map`.

        Raises:
            AssertionError, ValueError: as `determine_expert_map` does.

        Example:
            >>> ExpertPlacement.make(4, ep_size=2, strategy="round_robin").slots.tolist()
            [[0, 2], [1, 3]]
        """
        maps = [determine_expert_map(ep_size, rank, num_experts, strategy)[1] for rank in range(ep_size)]
        return cls.of_map(np.stack([np.arange(num_experts) if one is None else one for one in maps]))

    @classmethod
    def of_map(cls, expert_map: Int[np.ndarray, "ep E"]) -> ExpertPlacement:
        """A placement of your own.

        Args:
            expert_map: ``[ep, E]``, global id to local id on each rank, or -1.

        Raises:
            ValueError: an expert on no rank or on several, or a rank whose local ids are not 0, 1, ... once each.

        Example:
            >>> ExpertPlacement.of_map(np.array([[1, -1, 0], [-1, 0, -1]])).slots.tolist()
            [[2, 0], [1, -1]]
        """
        expert_map = np.asarray(expert_map, np.int32)
        homes = (expert_map >= 0).sum(axis=0)
        if (expert_map < -1).any() or (homes != 1).any():
            raise ValueError(
                f"expert_map has experts on {homes.tolist()} ranks each, but every expert must live on exactly one: a "
                "local id there, -1 on the others"
            )
        counts = (expert_map >= 0).sum(axis=1)
        slots = np.full((len(expert_map), max(1, counts.max(initial=0))), -1, np.int32)
        for rank, row in enumerate(expert_map):
            local = np.sort(row[row >= 0])
            if not np.array_equal(local, np.arange(counts[rank])):
                raise ValueError(
                    f"the local ids of rank {rank} are {local.tolist()}, but must be 0, 1, ... {counts[rank] - 1} once each"
                )
            held = np.flatnonzero(row >= 0)
            slots[rank, row[held]] = held
        return cls(expert_map, slots)

    @property
    def num_experts(self) -> int:
        """E, over all ranks."""
        return self.expert_map.shape[1]

    @property
    def ep_size(self) -> int:
        """Ranks that share the experts out."""
        return self.expert_map.shape[0]

    @property
    def max_local_experts(self) -> int:
        """Experts of the rank that has the most: what every rank has room for, since the shards of an array are equal."""
        return self.slots.shape[1]

    def map_global_to_local(self, ids: Int[Array, "*B"], rank: int | Int[Array, ""]) -> Int[Array, "*B"]:
        """Local ids on a rank; -1 for experts that live elsewhere and for ids outside ``[0, E)``.

        Example:
            >>> ExpertPlacement.make(5, ep_size=2).map_global_to_local(jnp.array([4, 0, -1]), 1).tolist()
            [1, -1, -1]
        """
        local = jnp.asarray(self.expert_map)[rank, jnp.clip(ids, 0, self.num_experts - 1)]
        return jnp.where((ids >= 0) & (ids < self.num_experts), local, -1)

    def is_local_expert(self, ids: Int[Array, "*B"], rank: int | Int[Array, ""]) -> Bool[Array, "*B"]:
        """Whether each expert lives on a rank.

        Example:
            >>> ExpertPlacement.make(5, ep_size=2).is_local_expert(jnp.array([4, 0, -1]), 1).tolist()
            [True, False, False]
        """
        return self.map_global_to_local(ids, rank) >= 0

    def get_local_expert_ids(self, rank: int) -> list[int]:
        """Global ids of the experts of a rank, in their local order. Not inside a jit that has the placement as argument.

        Example:
            >>> ExpertPlacement.make(5, ep_size=2).get_local_expert_ids(1)
            [3, 4]
        """
        return [int(expert) for expert in np.asarray(self.slots)[rank] if expert >= 0]

    def describe(self, rank: int) -> str:
        """The experts of a rank, for a log: ``local->global``.

        Example:
            >>> ExpertPlacement.make(5, ep_size=2).describe(1)
            '0->3, 1->4'
        """
        return ", ".join(f"{local}->{expert}" for local, expert in enumerate(self.get_local_expert_ids(rank)))
