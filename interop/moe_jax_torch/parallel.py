"""Which part of a layer a rank holds."""

from __future__ import annotations

from typing import NamedTuple

from moe_jax.parallel import ParallelConfig


class Ranks(NamedTuple):
    """How many ranks share the experts out (ep), and each expert (tp), and which one this is.

    Example:
        >>> Ranks(ep_size=4, ep_rank=1).tp_size
        1
    """

    ep_size: int = 1
    ep_rank: int = 0
    tp_size: int = 1
    tp_rank: int = 0

    @classmethod
    def of(
        cls,
        *,
        tp_size: int = 1,
        tp_rank: int = 0,
        ep_size: int = 1,
        ep_rank: int = 0,
        dp_size: int = 1,
        dp_rank: int = 0,
        enable_expert_parallel: bool = False,
    ) -> Ranks:
        """From the sizes of a model: the ranks of data and tensor parallelism together hold one layer.

        With `enable_expert_parallel` they share out the experts, otherwise each expert: tensor parallelism spans the ranks of
        data parallelism too. `ep_size` says it directly, beside `tp_size`.

        Raises:
            ValueError: a rank outside its size; `ep_size` together with the arguments that it follows from.

        Source: vLLM's ``FusedMoEParallelConfig.make``.

        Example:
            >>> Ranks.of(tp_size=2, tp_rank=1, dp_size=2, dp_rank=1)
            Ranks(ep_size=1, ep_rank=0, tp_size=4, tp_rank=3)
            >>> Ranks.of(tp_size=2, tp_rank=1, dp_size=2, dp_rank=0, enable_expert_parallel=True)
            Ranks(ep_size=4, ep_rank=1, tp_size=1, tp_rank=0)
        """
        if ep_size < 1 or not 0 <= ep_rank < ep_size:
            raise ValueError(f"ep_rank={ep_rank} must lie in [0, ep_size={ep_size}), and the size be at least 1")
        if ep_size > 1 and (dp_size > 1 or enable_expert_parallel):
            raise ValueError(
                f"ep_size={ep_size} is given, but follows from dp_size={dp_size}, tp_size={tp_size} and "
                f"enable_expert_parallel={enable_expert_parallel}; leave it 1, or give it with tp_size alone"
            )
        parallel = ParallelConfig(tp_size=tp_size, dp_size=dp_size, enable_expert_parallel=enable_expert_parallel)
        rank = parallel.rank_of(dp_rank=dp_rank, tp_rank=tp_rank)
        if parallel.use_ep:
            return cls(ep_size=parallel.ep_size, ep_rank=rank)
        return cls(ep_size, ep_rank, parallel.experts_tp_size, rank)


def checked_map(expert_map: list[int], num_experts: int) -> list[int]:
    """The map, if it has each local id once.

    Raises:
        ValueError: it has not.

    Example:
        >>> checked_map([1, -1, 0], 3)
        [1, -1, 0]
    """
    local = sorted(value for value in expert_map if value != -1)
    if len(expert_map) != num_experts or local != list(range(len(local))):
        raise ValueError(
            f"expert_map={expert_map} must have an entry for each of num_experts={num_experts}: -1, or the local ids "
            "0, 1, ... once each"
        )
    return expert_map
