"""Reads the routed experts of a block, those of this rank only, into the layout that the kernels take."""

import dataclasses
import re
from collections.abc import Collection

import jax.numpy as jnp
import numpy as np

from moe_jax.checkpoints.block import Block, Wanted, check_nothing_unknown, check_tensors
from moe_jax.checkpoints.families import PerExpert, Stacked
from moe_jax.checkpoints.quantized_experts import read_quantized_experts
from moe_jax.checkpoints.quantized_stacks import read_quantized_stacks
from moe_jax.checkpoints.stored_matrix import quantized_names
from moe_jax.config import DTYPES, MoEConfig
from moe_jax.types import ExpertWeights


def read_experts(block: Block, config: MoEConfig, expert_map: object, dtype: str | None) -> ExpertWeights:
    """The experts of ``block`` that ``expert_map`` places here, checked first and then read one matrix at a time.

    Nothing but the result is held: ``w13`` goes to the device before ``w2`` is read. Quantized experts stay quantized; ``dtype``
    is then that of biases.

    Raises:
        ValueError, NotImplementedError: as `moe_jax.load_layer`.
    """
    here = local_experts(expert_map, config.num_experts)
    target = resolve_dtype(dtype, config)
    _check_family(block, config)
    per_expert = isinstance(block.layout.experts, PerExpert)
    if per_expert:
        _check_count(block, config)
    quantized = quantized_names(block, ["experts"])
    if quantized:
        read = read_quantized_experts if per_expert else read_quantized_stacks
        experts = read(block, config, here, quantized[0])
        return experts if per_expert else _with_biases(experts, block, config, here, target)
    stored = [name for name in block.names if name.startswith("experts.")]
    check_nothing_unknown(block, stored, _names(block, config, range(config.num_experts)))
    check_tensors(block, _names(block, config, here))
    reader = _read_per_expert if per_expert else _read_stacked
    return reader(block, config, here, target)


def local_experts(expert_map: object, num_experts: int) -> list[int]:
    """The global ids of the experts that live here, in the order of their local ids.

    Args:
        expert_map: integers ``[E]``, global id -> local id or -1; None places every expert here.
        num_experts: ``E``.

    Raises:
        TypeError: the map is not made of integers.
        ValueError: its length is not ``E``, or its local ids are not 0, 1, 2 ... once each.

    Example:
        >>> local_experts([-1, 1, 0, -1], num_experts=4)
        [2, 1]
    """
    if expert_map is None:
        return list(range(num_experts))
    local = np.asarray(expert_map)
    if not np.issubdtype(local.dtype, np.integer):
        raise TypeError(f"expert_map has dtype {local.dtype}, it must hold integers: a local id or -1 for each expert")
    if local.shape != (num_experts,):
        raise ValueError(f"expert_map has shape {list(local.shape)}, it must be [num_experts={num_experts}]")
    here = np.flatnonzero(local != -1)
    if sorted(local[here].tolist()) != list(range(len(here))):
        raise ValueError(
            f"expert_map places {len(here)} experts here, as local ids {sorted(local[here].tolist())}; they must be "
            f"0 to {len(here) - 1}, each once, and every other entry -1"
        )
    return here[np.argsort(local[here])].tolist()


def resolve_dtype(dtype: object, config: MoEConfig) -> np.dtype:
    """``dtype``, or ``config.dtype`` where it is None, as a NumPy dtype.

    Raises:
        ValueError: it is none of bfloat16, float16 and float32.
    """
    name = jnp.dtype(config.dtype if dtype is None else dtype).name
    if name not in DTYPES:
        raise ValueError(f"dtype={name} must be one of {', '.join(DTYPES)}")
    return jnp.dtype(name)


def cast(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """``array`` in ``dtype``; what float16 cannot hold is an error, not an infinity.

    Raises:
        ValueError: a finite value overflows ``dtype``.
    """
    with np.errstate(over="ignore"):
        result = array.astype(dtype, copy=False)
    if dtype == np.float16 and array.dtype != np.float16 and not np.isfinite(result).all():
        largest = float(np.max(np.abs(array.astype(np.float32)), initial=0.0, where=np.isfinite(array)))
        if largest > float(np.finfo(np.float16).max):
            raise ValueError(
                f"{name} holds {largest:.6g}, too large for float16 (65504); load it with dtype='bfloat16'"
            )
    return result


def _check_family(block: Block, config: MoEConfig) -> None:
    if not config.is_gated:
        raise ValueError(
            f"activation={config.activation!r} has no gate, but {block.layout.name} stores gate and up; use a gated one"
        )
    has_names = isinstance(block.layout.experts, Stacked) and block.layout.experts.gate_up_bias is not None
    if config.has_bias and not has_names:
        raise ValueError(
            f"has_bias=True, but the layout of {block.layout.name} ({block.prefix}*) has no expert biases; use "
            "has_bias=False"
        )


def _check_count(block: Block, config: MoEConfig) -> None:
    ids = {int(match[1]) for name in block.names if (match := re.match(r"experts\.(\d+)\.", name))}
    if max(ids, default=-1) + 1 != config.num_experts:
        raise ValueError(
            f"{block.prefix}experts in {block.checkpoint.path} are numbered 0 to {max(ids, default=-1)}, but config "
            f"has num_experts={config.num_experts}; make the config from this checkpoint's config.json "
            "(MoEConfig.from_hf)"
        )


def _names(block: Block, config: MoEConfig, here: Collection[int]) -> dict[str, Wanted]:
    """The tensors that hold the experts ``here``, none of them quantized."""
    experts = block.layout.experts
    count = {"num_experts": config.num_experts}
    hidden, size = {"hidden_size": config.hidden_size}, {"intermediate_size": config.intermediate_size}
    both = {"2*intermediate_size": 2 * config.intermediate_size}
    if isinstance(experts, PerExpert):
        shapes = {experts.gate: size | hidden, experts.up: size | hidden, experts.down: hidden | size}
        return {name.format(expert): Wanted(axes) for expert in here for name, axes in shapes.items()}
    names = {
        experts.gate_up: Wanted(count | (hidden | both if experts.transposed else both | hidden)),
        experts.down: Wanted(count | (size | hidden if experts.transposed else hidden | size)),
    }
    return names | _bias_names(experts, config)


def _bias_names(experts: Stacked, config: MoEConfig) -> dict[str, Wanted]:
    if not config.has_bias:
        return {}
    count, hidden = {"num_experts": config.num_experts}, {"hidden_size": config.hidden_size}
    both = {"2*intermediate_size": 2 * config.intermediate_size}
    return {experts.gate_up_bias: Wanted(count | both), experts.down_bias: Wanted(count | hidden)}


def _read_per_expert(block: Block, config: MoEConfig, here: list[int], dtype: np.dtype) -> ExpertWeights:
    names = block.layout.experts

    def matrix(name: str, expert: int) -> np.ndarray:
        return cast(block.read(name.format(expert)), dtype, block.prefix + name.format(expert))

    size = config.intermediate_size
    w13 = np.empty((len(here), 2 * size, config.hidden_size), dtype)
    for local, expert in enumerate(here):
        w13[local, :size] = matrix(names.gate, expert)
        w13[local, size:] = matrix(names.up, expert)
    w13 = jnp.asarray(w13)
    w2 = np.empty((len(here), config.hidden_size, size), dtype)
    for local, expert in enumerate(here):
        w2[local] = matrix(names.down, expert)
    return ExpertWeights(w13=w13, w2=jnp.asarray(w2))


def _read_stacked(block: Block, config: MoEConfig, here: list[int], dtype: np.dtype) -> ExpertWeights:
    names, hidden, size = block.layout.experts, config.hidden_size, config.intermediate_size
    experts = ExpertWeights(
        w13=_gather(block, names.gate_up, here, (2 * size, hidden), dtype, rows_are_gate_and_up=True),
        w2=_gather(block, names.down, here, (hidden, size), dtype, rows_are_gate_and_up=False),
    )
    return _with_biases(experts, block, config, here, dtype)


def _with_biases(
    experts: ExpertWeights, block: Block, config: MoEConfig, here: list[int], dtype: np.dtype
) -> ExpertWeights:
    """The stacked experts with their biases, if the config has them."""
    names = block.layout.experts
    check_tensors(block, _bias_names(names, config))
    if not config.has_bias:
        return experts
    rows, hidden = 2 * config.intermediate_size, config.hidden_size
    return dataclasses.replace(
        experts,
        w13_bias=_gather(block, names.gate_up_bias, here, (rows,), dtype, rows_are_gate_and_up=True),
        w2_bias=_gather(block, names.down_bias, here, (hidden,), dtype, rows_are_gate_and_up=False),
    )


def _gather(
    block: Block, name: str, here: list[int], shape: tuple[int, ...], dtype: np.dtype, *, rows_are_gate_and_up: bool
) -> jnp.ndarray:
    """The entries of the experts here, stacked: matrices as ``[rows, contracted]``, biases as ``[rows]``."""
    layout = block.layout.experts
    stacked = np.empty((len(here), *shape), dtype)
    for local, expert in enumerate(here):
        entry = cast(block.read(name, expert), dtype, block.prefix + name)
        if layout.transposed:
            entry = entry.T  # leaves a bias as it is
        if rows_are_gate_and_up and layout.interleaved:
            half = len(entry) // 2
            stacked[local, :half], stacked[local, half:] = entry[0::2], entry[1::2]
        else:
            stacked[local] = entry
    return jnp.asarray(stacked)
