"""Hugging Face checkpoint -> the weights of one MoE layer, with only the experts that live on this rank."""

import operator
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from moe_jax.checkpoints.block import Block, check_nothing_unknown, check_tensors, find_block
from moe_jax.checkpoints.experts import cast, read_experts, resolve_dtype
from moe_jax.checkpoints.reader import Checkpoint
from moe_jax.config import MoEConfig
from moe_jax.types import ExpertWeights, MoELayerWeights, SharedExpertWeights

_SHARED_PARTS = ("gate_proj", "up_proj", "down_proj")


def load_layer(
    path: str | Path,
    layer: int,
    config: MoEConfig,
    expert_map: Integer[Array | np.ndarray, " E"] | None = None,
    dtype: str | None = None,
) -> MoELayerWeights:
    """Loads the MoE block of one decoder layer from a Hugging Face safetensors checkpoint.

    The layout is recognised by the tensor names: Mixtral, Phi-MoE and MiniMax-M2; Qwen2/3-MoE, DeepSeek, OLMoE and
    GLM-4-MoE; Llama 4; gpt-oss in bfloat16 or float32; and the fused names that transformers 5 writes with
    ``save_original_format=False``. Only the experts placed here are read, from memory-mapped files; at most about one
    layer's local weights are held.

    Args:
        path: a directory with ``model.safetensors``, or with ``model.safetensors.index.json`` and its shards; or one
            ``.safetensors`` file.
        layer: the decoder layer, from 0 (see `moe_jax.checkpoints.sparse_layers`).
        config: what the layer must look like.
        expert_map: int32 ``[E]``, global expert id -> local id or -1; None loads every expert.
        dtype: of the expert and shared expert weights, ``bfloat16``, ``float16`` or ``float32``; None is
            ``config.dtype``.

    Returns:
        `MoELayerWeights`. ``router`` ``[E, H]`` and ``router_bias`` ``[E]`` stay in the dtype they are stored in;
        ``correction_bias`` ``[E]`` is float32. Router and shared expert are loaded whole on every rank: in an
        expert-parallel split all ranks but one drop ``shared`` before they add up their results.

    Raises:
        FileNotFoundError: the path or a shard does not exist.
        IndexError: the checkpoint has no such layer.
        ValueError: a file is truncated; tensors are missing, have other shapes than ``config`` asks for, or are not
            accounted for by it; the layer is dense; ``expert_map`` is not a placement; a value overflows float16.
        NotImplementedError: the checkpoint is quantized.

    Example:
        >>> import tempfile
        >>> from safetensors.numpy import save_file
        >>> prefix, folder = "model.layers.0.block_sparse_moe.", tempfile.mkdtemp()
        >>> tensors = {f"{prefix}experts.{e}.{name}.weight": np.ones(shape, np.float32) for e in range(4)
        ...            for name, shape in (("w1", (2, 3)), ("w3", (2, 3)), ("w2", (3, 2)))}
        >>> save_file(tensors | {prefix + "gate.weight": np.ones((4, 3), np.float32)}, folder + "/model.safetensors")
        >>> config = MoEConfig(num_experts=4, top_k=2, hidden_size=3, intermediate_size=2)
        >>> weights = load_layer(folder, 0, config, expert_map=jnp.array([0, 1, -1, -1]))
        >>> weights.experts.w13.shape, weights.experts.w13.dtype.name, weights.router.shape
        ((2, 4, 3), 'bfloat16', (4, 3))
    """
    with Checkpoint(path) as checkpoint:
        block = find_block(checkpoint, operator.index(layer))
        names = _names(block, config)
        shapes = names.shapes(config)
        check_tensors(block, shapes)
        others = [name for name in block.names if not name.startswith("experts.")]  # read_experts checks the experts
        check_nothing_unknown(block, others, shapes)
        experts = read_experts(block, config, expert_map, dtype)
        target = resolve_dtype(dtype, config)
        return MoELayerWeights(
            experts=experts,
            router=jnp.asarray(block.read(names.router)),
            router_bias=jnp.asarray(block.read(names.router_bias)) if names.router_bias else None,
            correction_bias=_read(block, names.correction_bias, np.dtype(np.float32))
            if names.correction_bias
            else None,
            shared=_read_shared(block, names, target) if names.shared else None,
        )


def load_experts(
    path: str | Path,
    layer: int,
    config: MoEConfig,
    expert_map: Integer[Array | np.ndarray, " E"] | None = None,
    dtype: str | None = None,
) -> ExpertWeights:
    """Loads only the routed experts of one decoder layer; arguments and errors are those of `load_layer`.

    Returns:
        `ExpertWeights`: ``w13`` ``[E_local, 2I, H]`` (gate rows first), ``w2`` ``[E_local, H, I]``, and the biases
        where ``config.has_bias``.

    Example:
        >>> import tempfile
        >>> from safetensors.numpy import save_file
        >>> prefix, folder = "model.layers.0.mlp.experts.", tempfile.mkdtemp()
        >>> tensors = {f"{prefix}{e}.{name}.weight": np.full(shape, e, np.float32) for e in range(4)
        ...            for name, shape in (("gate_proj", (2, 3)), ("up_proj", (2, 3)), ("down_proj", (3, 2)))}
        >>> save_file(tensors, folder + "/model.safetensors")
        >>> config = MoEConfig(num_experts=4, top_k=1, hidden_size=3, intermediate_size=2, dtype="float32")
        >>> experts = load_experts(folder, 0, config, expert_map=jnp.array([-1, 0, -1, 1]))
        >>> experts.w13.shape, experts.w13[:, 0, 0].tolist()
        ((2, 4, 3), [1.0, 3.0])
    """
    with Checkpoint(path) as checkpoint:
        return read_experts(find_block(checkpoint, operator.index(layer)), config, expert_map, dtype)


class _Names(NamedTuple):
    """What the tensors of a block that belong to no expert are called; None for those that the config does without."""

    router: str
    router_bias: str | None
    correction_bias: str | None
    shared: tuple[str, str, str] | None  # gate, up, down
    shared_gate: str | None

    def shapes(self, config: MoEConfig) -> dict[str, dict[str, int]]:
        """The axes of each tensor."""
        count, hidden = {"num_experts": config.num_experts}, {"hidden_size": config.hidden_size}
        axes = {self.router: count | hidden, self.router_bias: count, self.correction_bias: count}
        if self.shared:
            size = {"shared_intermediate_size": config.shared_intermediate_size}
            axes |= dict(zip(self.shared, (size | hidden, size | hidden, hidden | size), strict=True))
        axes[self.shared_gate] = {"gates": 1} | hidden
        return {name: shape for name, shape in axes.items() if name is not None}


def _names(block: Block, config: MoEConfig) -> _Names:
    layout = block.layout

    def spelled(flag: str, wanted: bool, spellings: tuple[str, ...]) -> str | None:
        if not wanted:
            return None
        if not spellings:
            raise ValueError(
                f"config has {flag}, but the layout of {layout.name} ({block.prefix}*) has no such tensor; "
                "make the config from this checkpoint's config.json (MoEConfig.from_hf)"
            )
        return block.first(spellings) or spellings[0]

    has_shared = config.num_shared_experts > 0
    modules = tuple(f"{module}.gate_proj.weight" for module in layout.shared)
    shared = spelled(f"num_shared_experts={config.num_shared_experts}", has_shared, modules)
    optional = (layout.router_bias,) if layout.router_bias else ()
    gate = (layout.shared_gate,) if layout.shared_gate else ()
    return _Names(
        router=spelled("a router", True, layout.router),
        router_bias=spelled("has_router_bias=True", config.has_router_bias, optional),
        correction_bias=spelled("has_correction_bias=True", config.has_correction_bias, layout.correction_bias),
        shared=tuple(shared.replace("gate_proj", part) for part in _SHARED_PARTS) if shared else None,
        shared_gate=spelled("shared_expert_gate=True", config.shared_expert_gate, gate),
    )


def _read(block: Block, name: str, dtype: np.dtype) -> Float[Array, "..."]:
    return jnp.asarray(cast(block.read(name), dtype, block.prefix + name))


def _read_shared(block: Block, names: _Names, dtype: np.dtype) -> SharedExpertWeights:
    gate, up, down = (_read(block, name, dtype) for name in names.shared)
    return SharedExpertWeights(
        w13=jnp.concatenate([gate, up]),
        w2=down,
        gate=_read(block, names.shared_gate, dtype) if names.shared_gate else None,
    )
