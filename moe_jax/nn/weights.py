"""Between the weights of a layer as the library knows them and the parameters of a flax layer, which have one name each."""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Array

from moe_jax.types import ExpertWeights, MoELayerWeights, SharedExpertWeights


def named_weights(weights: MoELayerWeights) -> dict[str, Array]:
    """The parameters of a flax layer with these weights, from a checkpoint for instance, and its correction bias.

    Raises:
        TypeError: quantized experts.

    Example:
        >>> import jax.numpy as jnp
        >>> experts = ExpertWeights(w13=jnp.ones((2, 8, 4)), w2=jnp.ones((2, 4, 4)))
        >>> sorted(named_weights(MoELayerWeights(experts, router=jnp.ones((2, 4)))))
        ['router', 'w13', 'w2']
    """
    experts, shared = weights.experts, weights.shared
    named = {
        "router": weights.router,
        "router_bias": weights.router_bias,
        "correction_bias": weights.correction_bias,
        "w13": experts.w13,
        "w2": experts.w2,
        "w13_bias": experts.w13_bias,
        "w2_bias": experts.w2_bias,
        "shared_w13": None if shared is None else shared.w13,
        "shared_w2": None if shared is None else shared.w2,
        "shared_gate": None if shared is None else shared.gate,
    }
    for name in ("w13", "w2"):
        if hasattr(named[name], "scales"):
            raise TypeError(
                f"{name} is quantized, but a flax layer has floating-point parameters; use dequantize_experts"
            )
    return {name: array for name, array in named.items() if array is not None}


def weights_of_named(named: Mapping[str, Array]) -> MoELayerWeights:
    """The other way round.

    Example:
        >>> import jax.numpy as jnp
        >>> named = {"router": jnp.ones((2, 4)), "w13": jnp.ones((2, 8, 4)), "w2": jnp.ones((2, 4, 4))}
        >>> weights_of_named(named).experts.num_local_experts
        2
    """
    shared = None
    if "shared_w13" in named:
        shared = SharedExpertWeights(named["shared_w13"], named["shared_w2"], named.get("shared_gate"))
    experts = ExpertWeights(named["w13"], named["w2"], named.get("w13_bias"), named.get("w2_bias"))
    return MoELayerWeights(experts, named["router"], named.get("router_bias"), named.get("correction_bias"), shared)
