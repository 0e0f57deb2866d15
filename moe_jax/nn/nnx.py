"""The layer for flax nnx."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.core.spmd import get_logical_axis_rules
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from moe_jax.config import MoEConfig
from moe_jax.losses import update_correction_bias
from moe_jax.nn.run import run_layer
from moe_jax.nn.settings import LOGICAL_AXES, Settings, dense_init, expert_init, initialiser
from moe_jax.nn.sown import sown
from moe_jax.nn.weights import named_weights, weights_of_named
from moe_jax.types import MoELayerWeights


class CorrectionBias(nnx.Variable):
    """The bias of the selection of experts: not a parameter, an optimizer never sees it; `balance` moves it."""


class MoE(nnx.Module):
    """A Mixture-of-Experts layer: router, routed experts, and shared experts if the config has them.

    Its parameters have the names and shapes of `Settings.shapes`, and logical axes (`LOGICAL_AXES`: ``expert``, ``embed``,
    ``mlp``) as sharding metadata. Made under a mesh and `nnx.logical_axis_rules` for all three they are sharded at once;
    otherwise use `nnx.get_named_sharding` or `nnx.get_partition_spec`. ``has_correction_bias`` adds a `CorrectionBias`.

    Inside `nnx.capture(model, nnx.Intermediate)` a call sows ``load_balancing_loss``, ``sequence_balance_loss`` (for x of
    ``[B, S, H]``), ``router_z_loss``, ``expert_loads`` and ``num_dropped``; read them with `sown_sum` and `sown`.

    Args:
        config: the layer. Its `dtype` is that of the computation and of the result; the router is float32 always.
        param_dtype: of the parameters.
        expert_init: initialiser of ``w13`` and ``w2``, whose first axis is that of experts; variance 1 / fan-in by default.
        router_init: initialiser of the router, ``[E, H]``.
        rngs: `nnx.Rngs`.
        **settings: other fields of `Settings`: ``jitter_eps``, ``capacity_factor``, ``keep``, ``parallel`` and ``mesh``,
            ``exchange``, ``implementation``.

    Example:
        >>> layer = MoE(MoEConfig(num_experts=4, top_k=2, hidden_size=16, intermediate_size=32), rngs=nnx.Rngs(0))
        >>> y, intermediates = nnx.capture(layer, nnx.Intermediate)(jnp.ones((2, 5, 16)))
        >>> y.shape, y.dtype.name, layer.w13.dtype.name
        ((2, 5, 16), 'bfloat16', 'float32')
        >>> intermediates["expert_loads"].get_value()[0].sum().item()
        20
    """

    def __init__(
        self,
        config: MoEConfig,
        *,
        param_dtype: DTypeLike = jnp.float32,
        expert_init: Any = expert_init,
        router_init: Any = dense_init,
        rngs: nnx.Rngs,
        **settings: Any,
    ):
        self.settings = Settings(config, **settings)
        # flax shards a new variable at once, and refuses to without a mesh: only where it is told which axes are meant.
        eager = bool(get_logical_axis_rules())
        shapes = self.settings.shapes()
        for name in LOGICAL_AXES.keys() - shapes.keys():
            setattr(self, name, None)
        for name, shape in shapes.items():
            kind, dtype = (CorrectionBias, jnp.float32) if name == "correction_bias" else (nnx.Param, param_dtype)
            value = initialiser(name, expert_init, router_init)(rngs.params(), shape, dtype)
            setattr(self, name, kind(value, out_sharding=LOGICAL_AXES[name], eager_sharding=eager))

    def __call__(
        self,
        x: Float[Array, "*B H"],
        *,
        key: Array | None = None,
        input_ids: Array | None = None,
        hash_indices_table: Array | None = None,
    ) -> Float[Array, "*B H"]:
        """The layer for ``[..., H]`` hidden states, in `config.dtype`.

        Args:
            x: ``[T, H]`` or ``[B, S, H]``, any floating dtype.
            key: random key of this step, for jitter (training alone has it) and simulated routing.
            input_ids, hash_indices_table: for hash routing, see `moe_jax.route`.
        """
        routing = {"key": key, "input_ids": input_ids, "hash_indices_table": hash_indices_table}
        y, values = run_layer(x, self.weights, self.settings, **routing)
        for name, value in values.items():
            self.sow(nnx.Intermediate, name, value, capture_noop=True)
        return y

    @property
    def weights(self) -> MoELayerWeights:
        """The parameters as the rest of the library takes them, in `param_dtype`."""
        return weights_of_named({name: getattr(self, name)[...] for name in self.settings.shapes()})

    def set_weights(self, weights: MoELayerWeights) -> None:
        """Takes over weights, those of a checkpoint for instance; each is cast to the dtype of its parameter.

        Raises:
            ValueError: weights that are not those of the config.
        """
        named, shapes = named_weights(weights), self.settings.shapes()
        found = {name: tuple(array.shape) for name, array in named.items()}
        if found != shapes:
            raise ValueError(f"the weights have shapes {found}, but the config has {shapes}; make them agree")
        for name, array in named.items():
            variable = getattr(self, name)
            variable.set_value(jnp.asarray(array, variable.dtype))


def balance(model: nnx.Module, intermediates: Any, rate: float | Array = 1e-3) -> None:
    """Moves the correction bias of every `MoE` layer of a model by `moe_jax.losses.update_correction_bias`, in place.

    Args:
        model: with layers whose config has ``has_correction_bias``; the others are left alone.
        intermediates: what `nnx.capture(model, nnx.Intermediate)` returned for the batch of this step.
        rate: the size of the step.

    Raises:
        ValueError: no loads of such a layer among the intermediates.

    Example:
        >>> from moe_jax.config import RoutingConfig
        >>> config = MoEConfig(4, 1, 16, 32, routing=RoutingConfig("minimax2"), has_correction_bias=True)
        >>> layer = MoE(config, rngs=nnx.Rngs(0))
        >>> _, intermediates = nnx.capture(layer, nnx.Intermediate)(jnp.ones((3, 16)))
        >>> balance(layer, intermediates, rate=0.5)
        >>> sorted(layer.correction_bias[...].tolist())
        [-0.5, 0.5, 0.5, 0.5]
    """
    loads = sown(intermediates, "expert_loads")
    for path, module in nnx.iter_modules(model):
        if not isinstance(module, MoE) or module.correction_bias is None:
            continue
        path = tuple(str(key) for key in path)
        if path not in loads:
            raise ValueError(
                f"no expert_loads of the layer {'/'.join(path)!r} among the intermediates; take them from "
                "nnx.capture(model, nnx.Intermediate) of this model"
            )
        bias = module.correction_bias
        bias.set_value(update_correction_bias(bias.get_value(), loads[path], rate))
