"""Reading what the layers of a model have sown."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Path = tuple[str, ...]


def sown(intermediates: Any, name: str) -> dict[Path, Array]:
    """What the layers of a model sowed under a name: the path of each layer, and its value.

    A layer that was called several times has the sum. Stacked layers (of a scan) have one path, their values a first axis.

    Args:
        intermediates: what `nnx.capture` returned, or linen's collection ``intermediates``.
        name: ``load_balancing_loss``, ``sequence_balance_loss``, ``router_z_loss``, ``expert_loads`` or ``num_dropped``.

    Example:
        >>> sown({"layer_0": {"moe": {"expert_loads": (jnp.array([3, 1]), jnp.array([1, 1]))}}}, "expert_loads")
        {('layer_0', 'moe'): Array([4, 2], dtype=int32)}
    """
    found: dict[Path, Array] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(intermediates)[0]:
        keys = tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)
        if name in keys:
            layer = keys[: keys.index(name)]
            found[layer] = found[layer] + leaf if layer in found else leaf
    return found


def sown_sum(intermediates: Any, name: str) -> Float[Array, ""]:
    """The sum over all layers of what they sowed under a name.

    Raises:
        ValueError: there is none.

    Example:
        >>> intermediates = {"a": {"router_z_loss": (jnp.array(2.0),)}, "b": {"router_z_loss": (jnp.array(1.0),)}}
        >>> float(sown_sum(intermediates, "router_z_loss"))
        3.0
    """
    values = list(sown(intermediates, name).values())
    if not values:
        raise ValueError(
            f"nothing was sown as {name!r}; call the model through nnx.capture(model, nnx.Intermediate), or a linen model with "
            'mutable=["intermediates"]. sequence_balance_loss needs x of [B, S, H]'
        )
    return jnp.asarray(sum(jnp.sum(value) for value in values), jnp.float32)
