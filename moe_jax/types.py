"""The values that flow through a layer: routing decisions and weights, as pytrees of arrays.

The fields of weights are also `Any`, because a pytree of them may hold other things in their places: quantized arrays, shapes,
partition specs, axes for vmap, optimizer states.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int


class TopK(NamedTuple):
    """Which experts each token visits, and with what weight.

    The slots of a token are sorted by descending weight. An id of -1 means "no expert": such slots come last, weigh
    exactly zero and contribute nothing to the output.

    Attributes:
        ids: int32 ``[T, k]``, global expert ids in ``[0, E)``, or -1.
        weights: float32 ``[T, k]``, always finite.

    Example:
        >>> import jax.numpy as jnp
        >>> topk = TopK(ids=jnp.array([[3, 0], [1, -1]]), weights=jnp.array([[0.7, 0.3], [1.0, 0.0]]))
        >>> topk.ids.shape
        (2, 2)
    """

    ids: Int[Array, "T k"]
    weights: Float[Array, "T k"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ExpertWeights:
    """The weights of the experts that live here, every matrix with its contracted axis last (K-major).

    A gated activation has the gate rows of ``w13`` first and the up rows second; an un-gated one has only ``I`` rows.

    ``w13`` and ``w2`` may be quantized: a `moe_jax.quantization.QuantizedArray` has the shape of what it stands for, and scales
    whose first axis is ``E_local`` too.

    Attributes:
        w13: ``[E_local, 2I, H]`` (gated) or ``[E_local, I, H]``, floating or quantized.
        w2: ``[E_local, H, I]``, floating or quantized.
        w13_bias: ``[E_local, 2I]`` or ``[E_local, I]``, added before the activation; None without biases.
        w2_bias: ``[E_local, H]``, added before the router weight is applied; None without biases.
        w13_input_scale: float32 ``[E_local]``, for a format whose activations have static scales: that of the rows that
            ``w13`` is multiplied with. A matmul with one scale for all rows uses the maximum over the experts, those of the other
            ranks included. Otherwise None.
        w2_input_scale: float32 ``[E_local]``, the same for the rows that ``w2`` is multiplied with.

    Example:
        >>> import jax.numpy as jnp
        >>> experts = ExpertWeights(w13=jnp.zeros((4, 2 * 32, 16)), w2=jnp.zeros((4, 16, 32)))
        >>> experts.num_local_experts
        4
    """

    w13: Float[Array, "E_local N H"] | Any
    w2: Float[Array, "E_local H I"] | Any
    w13_bias: Float[Array, "E_local N"] | Any | None = None
    w2_bias: Float[Array, "E_local H"] | Any | None = None
    w13_input_scale: Float[Array, " E_local"] | Any | None = None
    w2_input_scale: Float[Array, " E_local"] | Any | None = None

    @property
    def num_local_experts(self) -> int:
        """How many experts live here (``E_local``)."""
        return self.w13.shape[0]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SharedExpertWeights:
    """The expert that every token visits. Several shared experts are stored as one, their intermediate sizes added up.

    Attributes:
        w13: ``[2Is, H]`` (gated, gate rows first) or ``[Is, H]``.
        w2: ``[H, Is]``.
        gate: ``[1, H]``; the output is multiplied by ``sigmoid(x @ gate.T)`` (Qwen2-MoE). None: no gate.

    Example:
        >>> import jax.numpy as jnp
        >>> shared = SharedExpertWeights(w13=jnp.zeros((2 * 32, 16)), w2=jnp.zeros((16, 32)))
        >>> shared.gate is None
        True
    """

    w13: Float[Array, "N H"] | Any
    w2: Float[Array, "H Is"] | Any
    gate: Float[Array, "1 H"] | Any | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MoELayerWeights:
    """Everything that one Mixture-of-Experts layer of a checkpoint holds.

    Attributes:
        experts: the routed experts that live here.
        router: ``[E, H]``, the router projection over all global experts.
        router_bias: ``[E]``, added to the router logits (gpt-oss); None without one.
        correction_bias: float32 ``[E]``, added to the scores for the selection only (DeepSeek-V3); None without one.
        shared: the shared expert, or None.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> experts = ExpertWeights(w13=jnp.zeros((4, 64, 16)), w2=jnp.zeros((4, 16, 32)))
        >>> layer = MoELayerWeights(experts=experts, router=jnp.zeros((4, 16)))
        >>> len(jax.tree.leaves(layer))
        3
    """

    experts: ExpertWeights
    router: Float[Array, "E H"] | Any
    router_bias: Float[Array, " E"] | Any | None = None
    correction_bias: Float[Array, " E"] | Any | None = None
    shared: SharedExpertWeights | None = None
