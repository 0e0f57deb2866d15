"""Inputs and weights of a run: different tokens, and a different number of them, in every shard."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from moe_jax.layer_test.chunks import rank_chunk
from moe_jax.layer_test.config import MoETestConfig
from moe_jax.layer_test.quick import quick
from moe_jax.parallel import ExpertPlacement
from moe_jax.quantization import QuantFormat, quantize_experts
from moe_jax.types import ExpertWeights, SharedExpertWeights

SEED = 7


@dataclass(frozen=True)
class MoETestData:
    """Everything that a run puts into the layer, whole.

    Attributes:
        x: ``[shards * m, k]``, NaN in the rows that are no tokens.
        num_tokens: int32 ``[shards]``.
        logits: float32 ``[shards * m, E]``, those of the other rows choose experts, too; None where the layer computes them.
        gate: float32 ``[E, H]``, the router's projection; None where logits are given.
        experts: all of them, quantized if the config says so.
        placement: which rank has which experts, by chance; None without expert parallelism.
        shared: the shared expert, or None.
        transform: ``[k, H]`` and ``[H, k]``, before and after the routed experts; None without.
    """

    x: Array
    num_tokens: Array
    logits: Array | None
    gate: Array | None
    experts: ExpertWeights
    placement: ExpertPlacement | None
    shared: SharedExpertWeights | None
    transform: tuple[Array, Array] | None

    @property
    def is_token(self) -> np.ndarray:
        """Bool ``[shards * m]``: which rows are tokens."""
        return rows_of_tokens(np.asarray(self.num_tokens), self.x.shape[0] // len(self.num_tokens))


def setup_moe_test_data(config: MoETestConfig) -> MoETestData:
    """Random values, the same for the same config, with outputs of the size of the inputs."""
    shards, hidden = config.parallel.num_token_shards, config.routed_hidden_size
    counts = token_counts(config.m, shards)

    def of_shards(kind: int, width: int, scale: float, dtype: str) -> np.ndarray:
        """Rows of every shard, from a seed of its own."""
        rows = [
            np.random.default_rng([SEED, kind, shard]).standard_normal((config.m, width)) for shard in range(shards)
        ]
        return (scale * np.concatenate(rows)).astype(dtype)

    def weights(kind: int, *shape: int, scale: float = 1.0, dtype: str = config.in_dtype) -> Array:
        values = np.random.default_rng([SEED, kind]).standard_normal(shape)
        return jnp.asarray(values * scale * shape[-1] ** -0.5, dtype)

    x = of_shards(0, config.k, 1.0, "float32")
    x[~rows_of_tokens(np.array(counts), config.m)] = np.nan
    transform = None
    if config.use_routed_input_transform:
        transform = weights(4, hidden, config.k).T, weights(5, config.k, hidden).T
    return MoETestData(
        x=jnp.asarray(x, config.in_dtype),
        num_tokens=jnp.asarray(counts, jnp.int32),
        logits=None if config.use_gate else jnp.asarray(of_shards(1, config.num_experts, 2.0, "float32")),
        gate=weights(6, config.num_experts, hidden, scale=2.0, dtype="float32") if config.use_gate else None,
        experts=_experts(config, weights(2, config.num_experts, 2 * config.n, hidden), weights),
        placement=random_placement(config.num_experts, config.ep_size) if config.ep_size > 1 else None,
        shared=SharedExpertWeights(weights(7, 2 * config.n, config.k), weights(8, config.k, config.n, scale=2.0))
        if config.use_shared_experts
        else None,
        transform=transform,
    )


def rows_of_tokens(counts: np.ndarray, m: int) -> np.ndarray:
    """Bool ``[shards * m]``: the first rows of each shard.

    Example:
        >>> rows_of_tokens(np.array([2, 0]), 2).tolist()
        [True, True, False, False]
    """
    return (np.arange(m)[None] < counts[:, None]).reshape(-1)


def token_counts(m: int, shards: int) -> list[int]:
    """Tokens of each shard: all m on the first, fewer on each that follows, none on the last of several.

    Example:
        >>> token_counts(32, 1), token_counts(32, 2), token_counts(32, 4), token_counts(1, 2)
        ([32], [32, 19], [32, 28, 24, 0], [1, 0])
    """
    if shards == 1:
        return [m]
    counts = [m - m * 2 * shard // (5 * (shards - 1)) for shard in range(shards)]
    return [*counts[:-1], 0] if shards > 2 or m == 1 else [counts[0], max(1, m * 3 // 5)]


def random_placement(num_experts: int, ep_size: int) -> ExpertPlacement:
    """Experts on ranks by chance, the first ranks with one more if need be."""
    order = np.random.default_rng([SEED, 9]).permutation(num_experts)
    expert_map = np.full((ep_size, num_experts), -1, np.int32)
    start = 0
    for rank in range(ep_size):
        held = order[start : start + rank_chunk(num_experts, rank, ep_size)]
        expert_map[rank, held] = np.arange(len(held))
        start += len(held)
    return ExpertPlacement.of_map(expert_map)


def _experts(config: MoETestConfig, w13: Array, weights) -> ExpertWeights:
    experts = ExpertWeights(w13, weights(3, config.num_experts, w13.shape[2], config.n, scale=2.0))
    form = config.moe_config.quantization
    if form is None:
        return experts
    experts = _quantized(experts, form)
    if form.activations is None or not form.activations.static:
        return experts
    # About the largest of hidden states, and of what comes out of the activation; larger ones saturate.
    scales = [jnp.full(config.num_experts, largest / form.activations.reach, jnp.float32) for largest in (5.0, 12.0)]
    return dataclasses.replace(experts, w13_input_scale=scales[0], w2_input_scale=scales[1])


@quick(static_argnums=1)
def _quantized(experts: ExpertWeights, form: QuantFormat) -> ExpertWeights:
    return quantize_experts(experts, form)
