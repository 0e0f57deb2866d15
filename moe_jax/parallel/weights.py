"""Weights as the ranks hold them: whole experts each, or a part of every expert."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from moe_jax.config import MoEConfig
from moe_jax.parallel.config import ParallelConfig
from moe_jax.parallel.exchange import late_axes
from moe_jax.parallel.placement import ExpertPlacement
from moe_jax.quantization.array import QuantizedArray
from moe_jax.quantization.fp8_training import ROWS
from moe_jax.quantization.slicing import pad_columns, with_codes
from moe_jax.types import ExpertWeights, SharedExpertWeights


def place_experts(
    experts: ExpertWeights, config: MoEConfig, parallel: ParallelConfig, placement: ExpertPlacement | None = None
) -> ExpertWeights:
    """The weights of all experts in the order of ranks: one sharding of the first axis gives each rank its own, see `specs`.

    With expert parallelism each rank has room for as many experts as the fullest has, zeros where it has fewer. Otherwise each
    has its part of every expert's intermediate size I, of gate rows and of up rows each; if a part were not whole blocks of a
    number format or of FP8 training, or I has no equal parts, I is filled up with zeros.

    Args:
        experts: of all ranks, ``E_local`` = E, floating or quantized.
        config: the layer.
        parallel: the ranks.
        placement: which rank has which experts; neighbours by default. For expert parallelism only.

    Returns:
        The same fields, with first axes of ``ranks * E_local``.

    Raises:
        ValueError: not all experts, or a placement of others or for other ranks.

    Example:
        >>> config = MoEConfig(num_experts=3, top_k=2, hidden_size=16, intermediate_size=32)
        >>> experts = ExpertWeights(w13=jnp.ones((3, 64, 16)), w2=jnp.ones((3, 16, 32)))
        >>> place_experts(experts, config, ParallelConfig(tp_size=2, enable_expert_parallel=True)).w2.shape
        (4, 16, 32)
        >>> place_experts(experts, config, ParallelConfig(tp_size=2)).w13.shape
        (6, 32, 16)
    """
    if experts.num_local_experts != config.num_experts:
        raise ValueError(
            f"w13 holds {experts.num_local_experts} experts of num_experts={config.num_experts}; place_experts takes those of "
            "all ranks"
        )
    placement = checked_placement(placement, config, parallel)
    if placement is None:
        placed = _split(experts, config, parallel.experts_tp_size)
    else:
        slots = jnp.asarray(placement.slots).reshape(-1)
        placed = jax.tree.map(lambda leaf: _of_slots(leaf, slots), experts)
    # A rank needs the largest scale, wherever that expert lives: its tokens are quantized with it, also where it has no expert.
    scales = {name: getattr(experts, name) for name in ("w13_input_scale", "w2_input_scale")}
    everywhere = {
        name: jnp.full(placed.w2.shape[:1], jnp.max(scale)) for name, scale in scales.items() if scale is not None
    }
    return dataclasses.replace(placed, **everywhere)


def checked_placement(
    placement: ExpertPlacement | None, config: MoEConfig, parallel: ParallelConfig
) -> ExpertPlacement | None:
    """The placement, or that of neighbours; None where no rank has whole experts of its own.

    Raises:
        ValueError: it is for other experts or other ranks, or for none.
    """
    if placement is None and not parallel.use_ep:
        return None
    if not parallel.enable_expert_parallel:
        raise ValueError(
            "a placement is for expert parallelism, but every rank has a part of every expert; leave it None, or set "
            "enable_expert_parallel=True"
        )
    if placement is None:
        return ExpertPlacement.make(config.num_experts, parallel.ep_size)
    found, wanted = (placement.ep_size, placement.num_experts), (parallel.ep_size, config.num_experts)
    if found != wanted:
        raise ValueError(
            f"the placement is for ep_size={found[0]} and num_experts={found[1]}, but there are ep_size={wanted[0]} and "
            f"num_experts={wanted[1]}; make one with ExpertPlacement.make({wanted[1]}, {wanted[0]})"
        )
    return placement


def check_room(
    experts: ExpertWeights, config: MoEConfig, parallel: ParallelConfig, placement: ExpertPlacement | None, ranks: int
) -> None:
    """Refuses weights that are not those of so many ranks, as `place_experts` gives them.

    Raises:
        ValueError: says what they hold and what there should be.
    """
    room = config.num_experts if placement is None else placement.max_local_experts
    parts, columns = parallel.experts_tp_size, experts.w2.shape[-1]
    if experts.num_local_experts != ranks * room or columns * parts < config.intermediate_size:
        raise ValueError(
            f"the weights of {ranks} ranks hold {experts.num_local_experts} experts, with {columns} columns of w2, but each has "
            f"room for {room} of num_experts={config.num_experts}, and {parts} ranks share intermediate_size="
            f"{config.intermediate_size}; bring them into the order of ranks with place_experts(experts, config, parallel)"
        )


def place_shared(shared: SharedExpertWeights, config: MoEConfig, parallel: ParallelConfig) -> SharedExpertWeights:
    """The shared expert in the order of ranks: split over those that hold the same tokens, otherwise the same for all.

    Args:
        shared: whole.
        config: the layer.
        parallel: the ranks.

    Returns:
        ``w13`` ``[tp * 2Is', H]``, ``w2`` ``[tp * H, Is']``, the gate repeated; tp is 1 with sequence parallelism.

    Example:
        >>> config = MoEConfig(2, 1, 8, 8, num_shared_experts=1, shared_intermediate_size=4)
        >>> shared = SharedExpertWeights(jnp.ones((8, 8)), jnp.ones((8, 4)))
        >>> place_shared(shared, config, ParallelConfig(tp_size=2)).w2.shape
        (16, 2)
    """
    parts = parallel.tp_size if late_axes(parallel) else 1
    halves = 2 if config.is_gated else 1
    share = -(-shared.w2.shape[-1] // parts)
    w13 = _rows(shared.w13[None], halves, parts, share)
    w2 = _columns(shared.w2[None], parts, share)
    gate = None if shared.gate is None else jnp.tile(shared.gate, (parts, 1))
    return SharedExpertWeights(w13.reshape(-1, w13.shape[-1]), w2.reshape(-1, share), gate)


def expert_specs(experts: ExpertWeights, parallel: ParallelConfig) -> ExpertWeights:
    """How placed weights lie on the mesh: a `PartitionSpec` for each leaf.

    Example:
        >>> experts = ExpertWeights(w13=jnp.ones((2, 8, 4)), w2=jnp.ones((2, 4, 4)))
        >>> expert_specs(experts, ParallelConfig(tp_size=2)).w2 == PartitionSpec("tp")
        True
    """
    return jax.tree.map(lambda leaf: spec_of(parallel.expert_axes), experts)


def shared_specs(shared: SharedExpertWeights, parallel: ParallelConfig) -> SharedExpertWeights:
    """How a placed shared expert lies on the mesh."""
    return jax.tree.map(lambda leaf: spec_of(late_axes(parallel)), shared)


def spec_of(axes: tuple[str, ...]) -> PartitionSpec:
    """The first axis of an array over these axes of the mesh.

    Example:
        >>> spec_of(("dp", "tp")) == PartitionSpec(("dp", "tp")), spec_of(()) == PartitionSpec()
        (True, True)
    """
    return PartitionSpec(axes if len(axes) > 1 else axes[0]) if axes else PartitionSpec()


def _of_slots(leaf: Array, slots: Array) -> Array:
    there = (slots >= 0).reshape(-1, *[1] * (leaf.ndim - 1))
    return jnp.where(there, leaf[jnp.maximum(slots, 0)], _nothing(leaf))


def _nothing(leaf: Array) -> Array:
    """What fills up: zero, or a scale of one where scales have no zero, beside codes of zero."""
    return jnp.full((), 1 if leaf.dtype == jnp.float8_e8m0fnu else 0, leaf.dtype)


def _split(experts: ExpertWeights, config: MoEConfig, parts: int) -> ExpertWeights:
    halves = 2 if config.is_gated else 1
    block = 1
    for weights, axis in ((experts.w13, 0), (experts.w2, 1)):
        if isinstance(weights, QuantizedArray) and weights.spec.block is not None:
            block = math.lcm(block, weights.spec.block[axis])
    activations = None if config.quantization is None else config.quantization.activations
    if config.fp8_training is not None and config.fp8_training.anything:
        activations = ROWS
    if (
        activations is not None and activations.granularity == "group"
    ):  # so that a rank's groups are those of the whole row
        block = math.lcm(block, activations.block[1])
    if isinstance(experts.w2, QuantizedArray):
        block = math.lcm(block, experts.w2.spec.codes_per_value)
    share = -(-config.intermediate_size // (parts * block)) * block

    def each(array: Array | None) -> Array | None:  # the same on all ranks
        return None if array is None else jnp.tile(array, (parts,) + (1,) * (array.ndim - 1))

    bias = experts.w13_bias
    return ExpertWeights(
        w13=_quantized_rows(experts.w13, parts, share, each)
        if isinstance(experts.w13, QuantizedArray)
        else _rows(experts.w13, halves, parts, share),
        w2=_quantized_columns(experts.w2, parts, share, each)
        if isinstance(experts.w2, QuantizedArray)
        else _columns(experts.w2, parts, share),
        w13_bias=None if bias is None else _rows(bias[..., None], halves, parts, share)[..., 0],
        w2_bias=each(experts.w2_bias),
    )


def _rows(array: Array, halves: int, parts: int, share: int) -> Array:
    """``[E, halves * n, K]`` to ``[parts * E, halves * share, K]``, each half filled up with zeros and split."""
    experts, rows, columns = array.shape
    array = array.reshape(experts, halves, rows // halves, columns)
    array = jnp.pad(
        array, ((0, 0), (0, 0), (0, parts * share - rows // halves), (0, 0)), constant_values=_nothing(array)
    )
    array = array.reshape(experts, halves, parts, share, columns).transpose(2, 0, 1, 3, 4)
    return array.reshape(parts * experts, halves * share, columns)


def _columns(array: Array, parts: int, share: int) -> Array:
    """``[E, N, n]`` to ``[parts * E, N, share]``, filled up with zeros and split."""
    experts, rows, columns = array.shape
    array = jnp.pad(array, ((0, 0), (0, 0), (0, parts * share - columns)), constant_values=_nothing(array))
    return array.reshape(experts, rows, parts, share).transpose(2, 0, 1, 3).reshape(parts * experts, rows, share)


def _quantized_rows(array: QuantizedArray, parts: int, share: int, each) -> QuantizedArray:
    spec = array.spec

    def scales(leaf: Array | None) -> Array | None:
        if leaf is None or spec.granularity == "tensor":
            return each(leaf)
        if spec.block is None:
            return _rows(leaf[..., None], array.halves, parts, share)[..., 0]
        return _rows(leaf, array.halves, parts, share // spec.block[0])

    return _parts(array, _rows(array.values, array.halves, parts, share), scales, each)


def _quantized_columns(array: QuantizedArray, parts: int, share: int, each) -> QuantizedArray:
    spec = array.spec
    array = with_codes(array, array.codes(), array.scales, array.zero_points)  # without filling of other origin
    array = pad_columns(array, parts * share)  # codes of zero

    def scales(leaf: Array | None) -> Array | None:
        if leaf is None or spec.block is None:
            return each(leaf)
        return _columns(leaf, parts, share // spec.block[1])

    values = _columns(array.values, parts, share // spec.codes_per_value)
    return dataclasses.replace(_parts(array, values, scales, each), columns=None)


def _parts(array: QuantizedArray, values: Array, scales, each) -> QuantizedArray:
    """The array with other values, its scales and zero points cut by `scales`; every part has the scale of the whole matrix."""
    cut = {"scales": scales(array.scales), "zero_points": scales(array.zero_points)}
    return dataclasses.replace(array, values=values, global_scale=each(array.global_scale), **cut)
