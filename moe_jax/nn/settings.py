"""What both flax layers are made of, beside the config: how they run, their parameters' shapes, axes and initialisers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from moe_jax.config import MoEConfig
from moe_jax.parallel.config import ParallelConfig
from moe_jax.parallel.exchange import Exchange
from moe_jax.router_training import DROP_POLICIES

# The axes of each parameter by name, for rules that say on which axis of a mesh they lie: the experts, H, and I or 2I.
LOGICAL_AXES: dict[str, tuple[str | None, ...]] = {
    "router": (None, "embed"),
    "router_bias": (None,),
    "correction_bias": (None,),
    "w13": ("expert", "mlp", "embed"),
    "w2": ("expert", "embed", "mlp"),
    "w13_bias": ("expert", "mlp"),
    "w2_bias": ("expert", "embed"),
    "shared_w13": ("mlp", "embed"),
    "shared_w2": ("embed", "mlp"),
    "shared_gate": (None, "embed"),
}

# Variance 1 / fan-in, which is the last axis; each expert is a matrix of its own, so the axis of experts adds to no fan.
dense_init = jax.nn.initializers.lecun_normal(in_axis=-1, out_axis=-2)
expert_init = jax.nn.initializers.lecun_normal(in_axis=-1, out_axis=-2, batch_axis=0)


@dataclass(frozen=True)
class Settings:
    """How a layer runs; hashable.

    Attributes:
        config: the layer; its `dtype` is that of the computation.
        jitter_eps: of `moe_jax.router_training.jitter`, used where a call is given a random key.
        capacity_factor: of `moe_jax.router_training.expert_capacity`; None: no expert refuses a token.
        keep: which pairs an expert keeps, see `moe_jax.router_training.drop_over_capacity`.
        parallel, mesh: run over the devices of a mesh, as `moe_jax.parallel.moe_sharded` does.
        exchange: how tokens reach their experts there; by default what `moe_jax.parallel.choose_exchange` takes.
        implementation: ``auto``, ``xla``, ``mosaic`` or ``mosaic_interpret``.

    Raises:
        ValueError: settings that contradict each other.

    Example:
        >>> Settings(MoEConfig(4, 2, 16, 32), capacity_factor=1.25).keep
        'order'
    """

    config: MoEConfig
    jitter_eps: float = 0.0
    capacity_factor: float | None = None
    keep: str = "order"
    parallel: ParallelConfig | None = None
    mesh: Mesh | AbstractMesh | None = None
    exchange: Exchange | None = None
    implementation: str = "auto"

    def __post_init__(self) -> None:
        if self.config.quantization is not None:
            raise ValueError(
                f"config.quantization={self.config.quantization.name!r}, but these layers hold floating-point parameters; "
                "leave it None, and quantize trained weights with moe_jax.quantize_experts"
            )
        if not 0 <= self.jitter_eps < 1:
            raise ValueError(f"jitter_eps={self.jitter_eps} must lie in [0, 1); 0 is no noise, 1e-2 is usual")
        if self.keep not in DROP_POLICIES:
            raise ValueError(f"keep={self.keep!r} must be one of {', '.join(DROP_POLICIES)}")
        if (self.parallel is None) != (self.mesh is None):
            raise ValueError(f"parallel={self.parallel} and mesh={self.mesh} belong together: give both, or neither")
        factor = self.capacity_factor
        if factor is None:
            return
        if not (math.isfinite(factor) and factor > 0):
            raise ValueError(f"capacity_factor={factor} must be positive and finite; None drops nothing")
        if self.mesh is not None:
            raise ValueError(
                f"capacity_factor={factor} is for one device; over a mesh the exchange limits what an expert takes: "
                'exchange=Batched(max_tokens=..., overflow="drop")'
            )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter that the layer has, and of its correction bias.

        Example:
            >>> Settings(MoEConfig(4, 2, 16, 32)).shapes()
            {'router': (4, 16), 'w13': (4, 64, 16), 'w2': (4, 16, 32)}
        """
        config = self.config
        experts, hidden, rows = config.num_experts, config.hidden_size, config.w13_rows
        shapes: dict[str, tuple[int, ...]] = {"router": (experts, hidden)}
        if config.has_router_bias:
            shapes["router_bias"] = (experts,)
        if config.has_correction_bias:
            shapes["correction_bias"] = (experts,)
        shapes |= {"w13": (experts, rows, hidden), "w2": (experts, hidden, config.intermediate_size)}
        if config.has_bias:
            shapes |= {"w13_bias": (experts, rows), "w2_bias": (experts, hidden)}
        if config.num_shared_experts:
            inner = config.shared_intermediate_size
            shapes |= {"shared_w13": (inner * (2 if config.is_gated else 1), hidden), "shared_w2": (hidden, inner)}
        if config.shared_expert_gate:
            shapes["shared_gate"] = (1, hidden)
        return shapes


def initialiser(name: str, expert: Any, router: Any) -> Any:
    """Of the parameter: biases are zero, the experts' and the router's are given, the shared expert's is `dense_init`."""
    if name.endswith("bias"):
        return jax.nn.initializers.zeros
    return {"router": router, "w13": expert, "w2": expert}.get(name, dense_init)
