"""Routers that are no top-k rule, as functions for `RoutingConfig(method="custom", custom_function=...)`."""

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_LARGEST = float(jnp.finfo(jnp.float32).max)


@dataclass(frozen=True)
class SparseMixer:
    """The router of Phi-3.5-MoE at inference: the two best experts, one after the other.

    The first expert is the one with the largest logit. Its weight is its share in a softmax over the experts whose
    logits lie within a relative distance ``2 * jitter_eps`` of it: ``(best - s) / max(|s|, best) <= 2 * jitter_eps``.
    The second expert is found and weighted in the same way among the others. The two weights do not sum to one, and
    with a small ``jitter_eps`` both are mostly exactly 1.

    An expert whose logit is NaN or -inf is never selected, +inf counts as the largest finite float32. Where no expert
    is left the id is -1 and the weight 0.

    Attributes:
        jitter_eps: half the relative width of the window (``router_jitter_noise`` of the Hugging Face config).

    Raises:
        ValueError: ``jitter_eps`` is negative or not finite; called with a ``top_k`` other than 2.

    Source: Liu et al., "GRIN: GRadient-INformed MoE", 2024 (https://arxiv.org/abs/2409.12136).

    Example:
        >>> weights, ids = SparseMixer(jitter_eps=0.01)(None, jnp.array([[1.0, 3.0, 2.0]]), top_k=2, renormalize=False)
        >>> ids.tolist(), weights.tolist()
        ([[1, 2]], [[1.0, 1.0]])
    """

    jitter_eps: float = 0.01

    def __post_init__(self) -> None:
        if not (math.isfinite(self.jitter_eps) and self.jitter_eps >= 0):
            raise ValueError(f"jitter_eps={self.jitter_eps} must be finite and not negative; Phi-3.5-MoE has 0.01")

    def __call__(
        self,
        hidden_states: Float[Array, "T H"] | None,
        router_logits: Float[Array, "T E"],
        top_k: int,
        renormalize: bool,
    ) -> tuple[Float[Array, "T 2"], Int[Array, "T 2"]]:
        """Weights float32 and ids int32, in the order of selection; ``hidden_states`` is not used."""
        if top_k != 2:
            raise ValueError(f"top_k={top_k} must be 2 for sparsemixer routing: it chooses a first and a second expert")
        scores = router_logits.astype(jnp.float32)
        scores = jnp.where(jnp.isnan(scores), -jnp.inf, jnp.minimum(scores, _LARGEST))
        first_weight, first = self._select(scores, scores)
        others = jnp.where(jnp.arange(scores.shape[-1])[None] == first[:, None], -jnp.inf, scores)
        second_weight, second = self._select(others, scores)
        weights = jnp.stack([first_weight, second_weight], axis=-1)
        if renormalize:
            weights = weights / jnp.maximum(weights.sum(axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
        return weights, jnp.stack([first, second], axis=-1)

    def _select(
        self, candidates: Float[Array, "T E"], scores: Float[Array, "T E"]
    ) -> tuple[Float[Array, " T"], Int[Array, " T"]]:
        """The best candidate of each token and its weight among the candidates near it."""
        best = candidates.max(axis=-1, keepdims=True)
        # The distance is relative to the larger of |s| and the best; an all-zero row gives 0 / 0, which is no distance.
        distance = (best - scores) / jnp.maximum(jnp.abs(scores), best)
        near = ~(distance > 2 * self.jitter_eps) & jnp.isfinite(candidates)
        total = jnp.where(near, jnp.exp(jnp.where(near, candidates - best, 0.0)), 0.0).sum(axis=-1)
        found = jnp.isfinite(best[:, 0])
        ids = jnp.where(found, jnp.argmax(candidates, axis=-1), -1).astype(jnp.int32)
        return jnp.where(found, 1.0 / jnp.where(found, total, 1.0), 0.0), ids
