"""Peers that run under JAX: a layer around a ragged matmul, and the plain-JAX form of ours."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.config import MoEConfig
from moe_jax.moe import moe
from moe_jax.types import ExpertWeights


class JaxLayer(NamedTuple):
    """A layer to be jitted.

    Attributes:
        function: ``(x, weights, logits) -> output``.
        to_weights: makes the weights that it takes of ours; not timed.
        what: how it runs.
        ahead: to be compiled ahead, with many others: it takes long and needs no device. XLA's own matmuls compile fast, and
            try their variants on the device, with operands as large as the layer's.
    """

    function: Callable[..., jax.Array]
    to_weights: Callable[[ExpertWeights], Any]
    what: str
    ahead: bool = False


def xla(config: MoEConfig) -> JaxLayer:
    """Our own layer in plain JAX."""
    layer = functools.partial(moe, config=config, implementation="xla")
    return JaxLayer(layer, lambda weights: weights, "moe_jax in plain JAX")


def ragged_dot(config: MoEConfig) -> JaxLayer:
    """Around JAX's own ragged matmul."""
    precision = lax.Precision.HIGHEST if config.dtype == "float32" else None
    return _around(functools.partial(lax.ragged_dot, precision=precision), config, "jax.lax.ragged_dot")


def tokamax(config: MoEConfig) -> JaxLayer:
    """Around tokamax's ragged matmul, in the implementation that it picks itself.

    Raises:
        ImportError: it is not installed.
    """
    import tokamax

    return _around(tokamax.ragged_dot, config, "tokamax.ragged_dot")._replace(ahead=True)


def _around(dot: Callable[..., Any], config: MoEConfig, what: str) -> JaxLayer:
    """A layer around a ragged matmul ``dot(rows [R, K], weights [E, K, N], group_sizes [E])``."""
    top_k, num_experts = config.top_k, config.num_experts

    def layer(x, weights, logits):
        w13, w2 = weights
        chosen, ids = lax.top_k(logits, top_k)
        order = jnp.argsort(ids.reshape(-1), stable=True)
        group_sizes = jnp.bincount(ids.reshape(-1), length=num_experts).astype(jnp.int32)
        gate, up = jnp.split(dot(x[order // top_k], w13, group_sizes), 2, axis=-1)
        rows = dot((jax.nn.silu(gate) * up).astype(x.dtype), w2, group_sizes)
        pairs = rows[jnp.argsort(order)].reshape(x.shape[0], top_k, -1).astype(jnp.float32)
        return (pairs * jax.nn.softmax(chosen)[:, :, None]).sum(1).astype(x.dtype)

    def transposed(weights):
        return tuple(jnp.swapaxes(w, 1, 2) for w in (weights.w13, weights.w2))

    return JaxLayer(layer, jax.jit(transposed), what)


JAX_LAYERS: dict[str, Callable[[MoEConfig], JaxLayer]] = {"tokamax": tokamax, "ragged_dot": ragged_dot, "xla": xla}
