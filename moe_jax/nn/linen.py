"""The layer for flax linen."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from moe_jax.config import MoEConfig
from moe_jax.losses import update_correction_bias
from moe_jax.nn.run import run_layer
from moe_jax.nn.settings import LOGICAL_AXES, Settings, dense_init, expert_init, initialiser
from moe_jax.nn.sown import sown
from moe_jax.nn.weights import weights_of_named
from moe_jax.parallel.config import ParallelConfig
from moe_jax.parallel.exchange import Exchange


class MoE(nn.Module):
    """A Mixture-of-Experts layer: router, routed experts, and shared experts if the config has them.

    Parameters have names, shapes and logical axes of `moe_jax.nn.MoE` (`nn.with_logical_partitioning`), and with the same ones
    both layers give the same numbers. A correction bias is in the collection ``router_state``. With ``mutable=["intermediates"]``
    a call sows what the nnx layer sows. Fields are those of `moe_jax.nn.MoE`; the noise of the router takes `key`, or the random
    stream ``jitter`` if there is one.

    Example:
        >>> layer = MoE(MoEConfig(num_experts=4, top_k=2, hidden_size=16, intermediate_size=32))
        >>> x = jnp.ones((2, 5, 16))
        >>> variables = nn.unbox(layer.init(jax.random.key(0), x))
        >>> y, state = layer.apply({"params": variables["params"]}, x, mutable=["intermediates"])
        >>> y.shape, int(state["intermediates"]["expert_loads"][0].sum())
        ((2, 5, 16), 20)
    """

    config: MoEConfig
    param_dtype: DTypeLike = jnp.float32
    expert_init: Any = expert_init
    router_init: Any = dense_init
    jitter_eps: float = 0.0
    capacity_factor: float | None = None
    keep: str = "order"
    parallel: ParallelConfig | None = None
    mesh: Mesh | AbstractMesh | None = None
    exchange: Exchange | None = None
    implementation: str = "auto"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*B H"],
        *,
        key: Array | None = None,
        input_ids: Array | None = None,
        hash_indices_table: Array | None = None,
    ) -> Float[Array, "*B H"]:
        """As `moe_jax.nn.MoE.__call__`."""
        fields = ("jitter_eps", "capacity_factor", "keep", "parallel", "mesh", "exchange", "implementation")
        settings = Settings(self.config, **{name: getattr(self, name) for name in fields})
        named = {name: self._array(name, shape) for name, shape in settings.shapes().items()}
        if key is None and self.has_rng("jitter"):
            key = self.make_rng("jitter")
        routing = {"key": key, "input_ids": input_ids, "hash_indices_table": hash_indices_table}
        y, values = run_layer(x, weights_of_named(named), settings, **routing)
        if not self.is_initializing():
            for name, value in values.items():
                self.sow("intermediates", name, value)
        return y

    def _array(self, name: str, shape: tuple[int, ...]) -> Array:
        init = initialiser(name, self.expert_init, self.router_init)
        init = nn.with_logical_partitioning(init, LOGICAL_AXES[name])
        if name == "correction_bias":
            return self.variable("router_state", name, init, None, shape, jnp.float32).value
        return self.param(name, init, shape, self.param_dtype)


def balance(router_state: Any, intermediates: Any, rate: float | Array = 1e-3) -> Any:
    """The collection ``router_state`` after a step of balancing: every correction bias moved by the loads of its layer.

    Args:
        router_state: the collection, of a whole model.
        intermediates: the collection that the same step sowed.
        rate: the size of the step.

    Raises:
        ValueError: no loads of such a layer among the intermediates.

    Example:
        >>> state = {"layer": {"correction_bias": jnp.zeros(2)}}
        >>> balance(state, {"layer": {"expert_loads": (jnp.array([3, 1]),)}}, 0.5)
        {'layer': {'correction_bias': Array([-0.5,  0.5], dtype=float32)}}
    """
    loads = sown(intermediates, "expert_loads")

    def move(path: Any, bias: Array) -> Array:
        keys = tuple(str(getattr(key, "key", getattr(key, "name", key))) for key in path)
        layer = keys[: keys.index("correction_bias")]
        if layer not in loads:
            raise ValueError(
                f"no expert_loads of the layer {'/'.join(layer)!r} among the intermediates; take them from a call with "
                'mutable=["intermediates"]'
            )
        return update_correction_bias(bias, loads[layer], rate)

    return jax.tree_util.tree_map_with_path(move, router_state)
