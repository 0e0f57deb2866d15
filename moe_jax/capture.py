"""Which experts the tokens of a step chose, in every layer: for replaying a rollout's routing in training, and for statistics."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from moe_jax.config import MoEConfig
from moe_jax.parallel.config import ParallelConfig

Gather = Callable[[Array], Array]


@dataclass(frozen=True)
class TokenShares:
    """How the tokens of a step are spread over the ranks, so that a rank finds its own among routed ones.

    Attributes:
        num_tokens_across_dp: tokens of each data-parallel rank; None without data parallelism, or where nothing is known.
        dp_rank: this rank of data parallelism. Inside `jax.shard_map` it may be an axis index, if all ranks have as many tokens.
        tp_size: ranks of tensor parallelism.
        shard_sizes: tokens of each (data, tensor) parallel rank, those of a data rank beside each other, where sequence
            parallelism spreads tokens over all of them and routing sees all; None otherwise.
        all_gather: joins the ``[n, k]`` arrays of all tensor-parallel ranks in order, ``[tp_size * n, k]``. None is
            `jax.lax.all_gather` over `tp_axis`.
        tp_axis: the mesh axis of tensor parallelism, inside `jax.shard_map`.

    Example:
        >>> TokenShares((2, 3), dp_rank=1).select(jnp.arange(5)[:, None])[:, 0].tolist()
        [2, 3, 4]
    """

    num_tokens_across_dp: Sequence[int] | None = None
    dp_rank: int | Int[Array, ""] = 0
    tp_size: int = 1
    shard_sizes: Sequence[int] | None = None
    all_gather: Gather | None = None
    tp_axis: str | tuple[str, ...] | None = None

    def select(self, routed: Array) -> Array:
        """The rows ``[t, k]`` of this rank's tokens, of what routing saw here ``[n, k]``.

        The cases, the first that fits the number of rows: nothing known of data parallelism, all rows; all tokens of all data
        ranks, those of this one; its own tokens; all shards of sequence parallelism, those of its data rank; one shard of
        sequence parallelism, gathered over the tensor ranks.

        Raises:
            AssertionError: another number of rows.
            ValueError: shard sizes that the data ranks do not divide, a traced rank of ranks that differ, no way to gather.
        """
        if self.num_tokens_across_dp is None:
            return routed
        counts, n = list(self.num_tokens_across_dp), routed.shape[0]
        own = self._own(counts)
        if n == sum(counts):
            return self._part(routed, counts, own)
        if n == own:
            return routed
        if self.shard_sizes is not None and n == sum(self.shard_sizes):
            sizes, ranks = list(self.shard_sizes), len(counts)
            if len(sizes) % ranks:
                raise ValueError(f"shard_sizes={sizes} must be as many for each of the {ranks} data-parallel ranks")
            per_rank = len(sizes) // ranks
            return self._part(routed, [sum(sizes[r * per_rank : (r + 1) * per_rank]) for r in range(ranks)], own)
        if self.tp_size > 1 and n == -(-own // self.tp_size):
            return self._gather(routed)[:own]
        raise AssertionError(
            f"unexpected shape {tuple(routed.shape)} of routed ids: its {n} rows are neither all {sum(counts)} tokens of "
            f"num_tokens_across_dp={counts}, nor the {own} of dp_rank={self.dp_rank}, nor a share of them for each of "
            f"tp_size={self.tp_size}, nor shard_sizes={self.shard_sizes}"
        )

    def _own(self, counts: list[int]) -> int:
        if not isinstance(self.dp_rank, jax.core.Tracer):
            if not 0 <= int(self.dp_rank) < len(counts):
                raise ValueError(
                    f"dp_rank={self.dp_rank} must lie in [0, {len(counts)}): num_tokens_across_dp={counts}"
                )
            return counts[int(self.dp_rank)]
        if len(set(counts)) > 1:
            raise ValueError(
                f"dp_rank is traced, but num_tokens_across_dp={counts} differ, and with them the shape of the result; inside "
                "shard_map all ranks have equal shards: give the size of the shards, padding included"
            )
        return counts[0]

    def _part(self, routed: Array, counts: list[int], own: int) -> Array:
        starts = jnp.asarray(np.cumsum([0, *counts[:-1]]), jnp.int32)
        return lax.dynamic_slice_in_dim(routed, starts[self.dp_rank], own)

    def _gather(self, routed: Array) -> Array:
        if self.all_gather is not None:
            return self.all_gather(routed)
        if self.tp_axis is None:
            raise ValueError(
                f"the {routed.shape[0]} rows are a share of the tokens for each of tp_size={self.tp_size} ranks, and nothing "
                "says how to gather them; give all_gather, or tp_axis inside jax.shard_map"
            )
        return lax.all_gather(routed, self.tp_axis, tiled=True)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RoutedExperts:
    """The choices of a step's tokens in all layers, a pytree that a jit carries from layer to layer.

    Attributes:
        ids: int32 ``[max_tokens, L, k]``, logical (global) expert ids; zeros where nothing was captured.
        weights: float32 ``[max_tokens, L, k]``, the router's; None where they are not kept.

    Example:
        >>> routed = RoutedExperts.empty(max_num_tokens=4, num_layers=2, top_k=1)
        >>> jax.jit(lambda routed, ids: routed.capture(1, ids))(routed, jnp.array([[5], [7]])).ids[:, 1, 0].tolist()
        [5, 7, 0, 0]
    """

    ids: Int[Array, "max_tokens L k"] | Any
    weights: Float[Array, "max_tokens L k"] | Any | None = None

    @classmethod
    def empty(cls, max_num_tokens: int, num_layers: int, top_k: int, *, keep_weights: bool = False) -> RoutedExperts:
        """Nothing captured yet. Dense layers count as layers, too: ids of layers are those of the model.

        Example:
            >>> RoutedExperts.empty(8, 3, 2, keep_weights=True).weights.shape
            (8, 3, 2)
        """
        shape = (max_num_tokens, num_layers, top_k)
        return cls(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32) if keep_weights else None)

    def capture(
        self,
        layer_id: int | Int[Array, ""],
        topk_ids: Int[Array, "n k"],
        topk_weights: Float[Array, "n k"] | None = None,
        *,
        shares: TokenShares | None = None,
        offset: int = 0,
    ) -> RoutedExperts:
        """With what one layer chose for the tokens of this rank; for any jit, scan or `jax.shard_map`.

        Args:
            layer_id: in ``[0, L)``. A traced one outside that range captures nothing.
            topk_ids: logical ids of the tokens that routing saw here.
            topk_weights: needed if weights are kept, not used otherwise.
            shares: which of them are this rank's, see `TokenShares.select`; all by default.
            offset: the first row to write, for a step in several micro-batches.

        Raises:
            IndexError: no such layer.
            AssertionError: arrays whose shapes do not fit the buffer or the shares.
            ValueError: weights are kept and not given; see `TokenShares.select`, too.

        Example:
            >>> routed = RoutedExperts.empty(max_num_tokens=4, num_layers=1, top_k=1)
            >>> shares = TokenShares(num_tokens_across_dp=(1, 2), dp_rank=1)
            >>> routed.capture(0, jnp.array([[3], [4], [5]]), shares=shares).ids[:, 0, 0].tolist()
            [4, 5, 0, 0]
        """
        max_tokens, num_layers, top_k = self.ids.shape
        if isinstance(layer_id, jax.core.Tracer):
            layer_id = jnp.where(layer_id < 0, num_layers, layer_id)  # a negative index would count from the end
        elif not 0 <= int(layer_id) < num_layers:
            raise IndexError(f"layer_id={layer_id} must lie in [0, {num_layers}), the layers of the buffer")
        if self.weights is not None and topk_weights is None:
            raise ValueError("weights are kept, but topk_weights is None; give them, or make the buffer without")
        assert topk_ids.ndim == 2 and topk_ids.shape[1] == top_k, (
            f"unexpected shape {tuple(topk_ids.shape)} of topk_ids, which must be [n, k] with k={top_k}"
        )
        select = (shares or TokenShares()).select
        ids = select(topk_ids)
        stop = offset + ids.shape[0]
        assert offset >= 0 and stop <= max_tokens, (
            f"unexpected shape {tuple(topk_ids.shape)} of topk_ids: rows [{offset}, {stop}) do not fit the buffer of "
            f"{max_tokens} tokens"
        )

        def put(buffer: Array, rows: Array) -> Array:
            return buffer.at[offset:stop, layer_id].set(rows.astype(buffer.dtype), mode="drop")

        if self.weights is None:
            return dataclasses.replace(self, ids=put(self.ids, ids))
        assert topk_weights.shape == topk_ids.shape, (
            f"topk_weights has shape {tuple(topk_weights.shape)}, but topk_ids {tuple(topk_ids.shape)}"
        )
        return RoutedExperts(put(self.ids, ids), put(self.weights, select(topk_weights)))


class RoutedExpertsCapturer:
    """A buffer of `RoutedExperts` that layers write to as they run, outside of any jit; inside one, carry a `RoutedExperts`.

    Args:
        max_num_batched_tokens: most tokens of a step.
        config: of the layers: gives k, and the dtype of snapshots by E.
        num_layers: all layers of the model, dense ones included.
        parallel: gives the number of tensor-parallel ranks.
        dp_rank: this rank of data parallelism.
        all_gather: see `TokenShares`.
        keep_weights: capture the router's weights, too.

    Attributes:
        num_tokens_across_dp: tokens of each data-parallel rank in this step; to be set before it. None: no data parallelism.
        shard_sizes: see `TokenShares`.

    Source: vLLM's ``RoutedExpertsCapturer``.

    Example:
        >>> config = MoEConfig(num_experts=8, top_k=2, hidden_size=16, intermediate_size=16)
        >>> capturer = RoutedExpertsCapturer(4, config, num_layers=3)
        >>> capturer.capture(layer_id=2, topk_ids=jnp.array([[1, 0], [7, 3]]))
        >>> capturer.snapshot(2)[:, 2].tolist()
        [[1, 0], [7, 3]]
    """

    def __init__(
        self,
        max_num_batched_tokens: int,
        config: MoEConfig,
        num_layers: int,
        *,
        parallel: ParallelConfig | None = None,
        dp_rank: int = 0,
        all_gather: Gather | None = None,
        keep_weights: bool = False,
    ) -> None:
        self.num_tokens_across_dp: Sequence[int] | None = None
        self.shard_sizes: Sequence[int] | None = None
        self._num_experts, self._dp_rank, self._all_gather = config.num_experts, dp_rank, all_gather
        self._tp_size = 1 if parallel is None else parallel.tp_size
        self._routed = RoutedExperts.empty(max_num_batched_tokens, num_layers, config.top_k, keep_weights=keep_weights)

    def capture(
        self, layer_id: int, topk_ids: Int[Array, "n k"], topk_weights: Float[Array, "n k"] | None = None
    ) -> None:
        """Keeps what a layer chose; if it raises, as `RoutedExperts.capture` does, the buffer is as it was."""
        shares = TokenShares(
            self.num_tokens_across_dp, self._dp_rank, self._tp_size, self.shard_sizes, self._all_gather
        )
        self._routed = self._routed.capture(layer_id, topk_ids, topk_weights, shares=shares)

    def clear_buffer(self) -> None:
        """Zeros everywhere, for the next step."""
        self._routed = jax.tree.map(jnp.zeros_like, self._routed)

    def get_device_buffer(self) -> RoutedExperts:
        """What was captured; later captures do not change it."""
        return self._routed

    def snapshot(self, num_tokens: int) -> np.ndarray:
        """The ids of the first tokens on the host, ``[num_tokens, L, k]``: uint8 up to 256 experts, uint16 above.

        An id of -1, no expert, becomes the largest value of the dtype.

        Raises:
            ValueError: more tokens than the buffer has; an id of -1 where the largest value is that of an expert.
        """
        max_tokens = self._routed.ids.shape[0]
        if not 0 <= num_tokens <= max_tokens:
            raise ValueError(f"num_tokens={num_tokens} must lie in [0, {max_tokens}], the tokens of the buffer")
        dtype = np.dtype(np.uint8 if self._num_experts <= 256 else np.uint16)
        ids, none = np.asarray(self._routed.ids)[:num_tokens], np.iinfo(dtype).max
        if self._num_experts > none and (ids == -1).any():
            raise ValueError(
                f"{dtype} cannot tell an id of -1 from expert {none} of num_experts={self._num_experts}; take "
                "get_device_buffer().ids"
            )
        return np.where(ids == -1, none, ids).astype(dtype)
