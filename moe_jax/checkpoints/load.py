"""Hugging Face checkpoint -> the weights of one MoE layer, with only the experts that live on this rank."""

import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from moe_jax.checkpoints.block import Block, Wanted, check_nothing_unknown, check_tensors, find_block
from moe_jax.checkpoints.experts import cast, read_experts, resolve_dtype
from moe_jax.checkpoints.reader import Checkpoint
from moe_jax.checkpoints.stored_matrix import StoredMatrix, quantization_of, quantized_names
from moe_jax.config import MoEConfig
from moe_jax.quantization.experts import prepare_where_possible
from moe_jax.types import ExpertWeights, MoELayerWeights, SharedExpertWeights

_SHARED_PARTS = ("gate_proj", "up_proj", "down_proj")


def load_layer(
    path: str | Path,
    layer: int,
    config: MoEConfig,
    expert_map: Integer[Array | np.ndarray, " E"] | None = None,
    dtype: str | None = None,
    quantization_config: Mapping[str, Any] | None = None,
    *,
    prepare: bool = False,
) -> MoELayerWeights:
    """Loads the MoE block of one decoder layer from a Hugging Face safetensors checkpoint.

    The layout is recognised by the tensor names: Mixtral, Phi-MoE and MiniMax-M2; Qwen2/3-MoE, DeepSeek, OLMoE and
    GLM-4-MoE; Llama 4; gpt-oss in bfloat16, float32 or MXFP4; and the fused names that transformers 5 writes with
    ``save_original_format=False``. Only the experts placed here are read, from memory-mapped files; at most about one
    layer's local weights are held.

    Quantized experts stay as they are, codes and scales bit for bit, as `moe_jax.quantization.QuantizedArray`: FP8 in blocks
    (DeepSeek-V3, Qwen3, MiniMax-M2), per tensor or per channel (compressed-tensors, ModelOpt); int8; int4 of GPTQ, AWQ and
    compressed-tensors; NVFP4 of ModelOpt and compressed-tensors; MXFP4 of gpt-oss and compressed-tensors; MXFP8. How they are
    stored is read from the checkpoint's ``quantization_config``; the format to run them in is ``quant_format_from_hf`` of it,
    as in ``MoEConfig.from_hf(hf, quantization=quant_format_from_hf(hf))``, or another with the same weights. Gate and up
    keep scales of their own (``halves=2``; `moe_jax.quantization.merge_half_scales` makes them one). Static scales of
    activations go to ``w13_input_scale`` (the larger of gate's and up's) and ``w2_input_scale``. Experts
    that are stored in a plain dtype are plain arrays, whatever the config says.

    A quantized shared expert is dequantized to ``dtype``, and its static input scale is not used: it is a dense MLP that runs
    unquantized here, a little more accurate than the checkpoint's own arithmetic, and takes twice the memory.

    Args:
        path: a directory with ``model.safetensors``, or with ``model.safetensors.index.json`` and its shards; or one
            ``.safetensors`` file.
        layer: the decoder layer, from 0 (see `moe_jax.checkpoints.sparse_layers`).
        config: what the layer must look like.
        expert_map: int32 ``[E]``, global expert id -> local id or -1; None loads every expert.
        dtype: of the expert and shared expert weights that are not quantized, ``bfloat16``, ``float16`` or ``float32``; None is
            ``config.dtype``.
        quantization_config: what to read instead of the ``config.json`` or ``hf_quant_config.json`` beside the checkpoint.
        prepare: puts experts of four bits into the order in which the kernels of Hopper GPUs decode them, for rows of
            ``config.dtype`` or of FP8, as the number format has them (`moe_jax.quantization.prepare_experts`): say so where those
            will run. Without it a layer does that in every call, with a warning. What has no such order (other formats, float32
            rows) stays as it is. Prepared matrices cannot be split or saved as a checkpoint.

    Returns:
        `MoELayerWeights`. ``router`` ``[E, H]`` and ``router_bias`` ``[E]`` stay in the dtype they are stored in;
        ``correction_bias`` ``[E]`` is float32. Router and shared expert are loaded whole on every rank: in an
        expert-parallel split all ranks but one drop ``shared`` before they add up their results.

    Raises:
        FileNotFoundError: the path or a shard does not exist.
        IndexError: the checkpoint has no such layer.
        ValueError: a file is truncated; tensors are missing, have other shapes than ``config`` asks for, or are not
            accounted for by it; the layer is dense; ``expert_map`` is not a placement; a value overflows float16; a quantized
            checkpoint whose ``quantization_config`` is missing or contradicts its tensors or ``config.quantization``.
        NotImplementedError: the checkpoint is quantized in a way that cannot be read, or its router is.

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
        block = find_block(checkpoint, operator.index(layer), quantization_config)
        names = _names(block, config)
        wanted = names.wanted(config)
        _check_router(block, names)
        check_tensors(block, wanted)
        others = [name for name in block.names if not name.startswith("experts.")]  # read_experts checks the experts
        check_nothing_unknown(block, others, wanted)
        experts = _read_experts(block, config, expert_map, dtype, prepare)
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
    quantization_config: Mapping[str, Any] | None = None,
    *,
    prepare: bool = False,
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
        block = find_block(checkpoint, operator.index(layer), quantization_config)
        return _read_experts(block, config, expert_map, dtype, prepare)


def _read_experts(
    block: Block, config: MoEConfig, expert_map: object, dtype: str | None, prepare: bool
) -> ExpertWeights:
    experts = read_experts(block, config, expert_map, dtype)
    form = config.quantization
    of_rows = config.dtype if form is None else form.dtype_of_rows(config.dtype)
    return prepare_where_possible(experts, of_rows) if prepare else experts


class _Names(NamedTuple):
    """What the tensors of a block that belong to no expert are called; None for those that the config does without."""

    router: str
    router_bias: str | None
    correction_bias: str | None
    shared: tuple["_Linear", "_Linear", "_Linear"] | None  # gate, up, down
    shared_gate: str | None

    def wanted(self, config: MoEConfig) -> dict[str, Wanted]:
        """What each tensor must be."""
        count, hidden = {"num_experts": config.num_experts}, {"hidden_size": config.hidden_size}
        axes = {self.router: count | hidden, self.router_bias: count, self.correction_bias: count}
        axes[self.shared_gate] = {"gates": 1} | hidden
        wanted = {name: Wanted(shape) for name, shape in axes.items() if name is not None}
        for linear in self.shared or ():
            wanted |= linear.wanted()
        return wanted


class _Linear(NamedTuple):
    """A matrix of the shared expert: where it is plain, and how it is stored where it is quantized."""

    block: Block
    name: str
    axes: dict[str, int]
    quantized: StoredMatrix | None

    @classmethod
    def of(cls, block: Block, module: str, axes: dict[str, int]) -> "_Linear":
        """The matrix of ``module``."""
        evidence = quantized_names(block, [module])
        if not evidence:
            return cls(block, module + ".weight", axes, None)
        rows, columns = axes.items()
        found = quantization_of(block, module, evidence[0])
        return cls(block, module + ".weight", axes, StoredMatrix(block, module, rows, columns, found))

    def wanted(self) -> dict[str, Wanted]:
        """The tensors that it is made of."""
        return self.quantized.needed() if self.quantized else {self.name: Wanted(self.axes)}

    def read(self, dtype: np.dtype) -> Float[Array, "N K"]:
        """The matrix, dequantized if need be."""
        if self.quantized is None:
            return _read(self.block, self.name, dtype)
        matrix = np.asarray(self.quantized.read().dequantize())
        return jnp.asarray(cast(matrix, dtype, self.block.prefix + self.quantized.module))


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
    there = tuple(module for module in layout.shared if any(name.startswith(module + ".") for name in block.names))
    flag = f"num_shared_experts={config.num_shared_experts}"
    shared = spelled(flag, has_shared, there or layout.shared)
    optional = (layout.router_bias,) if layout.router_bias else ()
    gate = (layout.shared_gate,) if layout.shared_gate else ()
    return _Names(
        router=spelled("a router", True, layout.router),
        router_bias=spelled("has_router_bias=True", config.has_router_bias, optional),
        correction_bias=spelled("has_correction_bias=True", config.has_correction_bias, layout.correction_bias),
        shared=_shared(block, there[0] if there else shared, config) if shared else None,
        shared_gate=spelled("shared_expert_gate=True", config.shared_expert_gate, gate),
    )


def _shared(block: Block, module: str, config: MoEConfig) -> tuple[_Linear, ...]:
    hidden = {"hidden_size": config.hidden_size}
    size = {"shared_intermediate_size": config.shared_intermediate_size}
    axes = (size | hidden, size | hidden, hidden | size)
    return tuple(_Linear.of(block, f"{module}.{part}", shape) for part, shape in zip(_SHARED_PARTS, axes, strict=True))


def _check_router(block: Block, names: _Names) -> None:
    """Refuses a router, or a gate of the shared expert, that is quantized."""
    modules = [name.removesuffix(".weight") for name in (names.router, names.shared_gate) if name]
    quantized = quantized_names(block, modules)
    if quantized:
        raise NotImplementedError(
            f"{block.prefix}{quantized[0]} in {block.checkpoint.path}: the router, or the gate of the shared expert, is "
            "quantized, but routing is float32 arithmetic on plain weights; export the checkpoint with these modules left "
            "out (ignore, modules_to_not_convert), or dequantize them"
        )


def _read(block: Block, name: str, dtype: np.dtype) -> Float[Array, "..."]:
    return jnp.asarray(cast(block.read(name), dtype, block.prefix + name))


def _read_shared(block: Block, names: _Names, dtype: np.dtype) -> SharedExpertWeights:
    gate, up, down = (linear.read(dtype) for linear in names.shared)
    return SharedExpertWeights(
        w13=jnp.concatenate([gate, up]),
        w2=down,
        gate=_read(block, names.shared_gate, dtype) if names.shared_gate else None,
    )
