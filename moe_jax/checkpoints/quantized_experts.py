"""Quantized experts, one module a matrix, stacked into `QuantizedArray`; only those of this rank are read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.checkpoints.block import Block, check_nothing_unknown, check_tensors
from moe_jax.checkpoints.families import PerExpert
from moe_jax.checkpoints.quant_schemes import Quantization
from moe_jax.checkpoints.stored_matrix import StoredMatrix, check_format, quantization_of
from moe_jax.config import MoEConfig
from moe_jax.quantization.array import QuantizedArray
from moe_jax.quantization.blocks import Blocks
from moe_jax.quantization.formats import Spec
from moe_jax.types import ExpertWeights


def read_quantized_experts(block: Block, config: MoEConfig, here: list[int], evidence: str) -> ExpertWeights:
    """The experts ``here``; gate and up rows of ``w13`` share no scale (``halves=2``), as `quantize_experts` leaves them.

    Args:
        block: with one module for each matrix of an expert.
        config: gives the sizes.
        here: global ids of the local experts, in their order.
        evidence: a tensor of the block that shows that the experts are quantized.

    Raises:
        ValueError, NotImplementedError: as `moe_jax.checkpoints.load_layer`.
    """
    names = block.layout.experts
    quantization = _common(block, names, evidence)
    check_format(block, quantization, config)
    hidden, size = ("hidden_size", config.hidden_size), ("intermediate_size", config.intermediate_size)

    def matrices(expert: int) -> list[StoredMatrix]:
        return [
            StoredMatrix(block, _module(name, expert), rows, columns, quantization)
            for name, rows, columns in (
                (names.gate, size, hidden),
                (names.up, size, hidden),
                (names.down, hidden, size),
            )
        ]

    everything = [matrix for expert in range(config.num_experts) for matrix in matrices(expert)]
    stored = [name for name in block.names if name.startswith("experts.")]
    check_nothing_unknown(block, stored, {name for matrix in everything for name in matrix.needed()})
    local = [matrices(expert) for expert in here]
    check_tensors(
        block, {name: wanted for three in local for matrix in three for name, wanted in matrix.needed().items()}
    )

    spec, count = quantization.format.weights, len(local)
    w13 = (_read(gate, up) for gate, up, _ in local)
    w13 = stack_matrices(w13, spec, (count, 2 * size[1], hidden[1]), halves=2)
    w2 = stack_matrices((_read(down) for _, _, down in local), spec, (count, hidden[1], size[1]))
    w13_scale = w2_scale = None
    if everything[0].has_input_scale:
        w13_scale = _scales(np.maximum(gate.input_scale(), up.input_scale()) for gate, up, _ in local)
        w2_scale = _scales(down.input_scale() for _, _, down in local)
    return ExpertWeights(w13=w13, w2=w2, w13_input_scale=w13_scale, w2_input_scale=w2_scale)


def stack_matrices(
    matrices: Iterable[Sequence[QuantizedArray]], spec: Spec, shape: tuple[int, int, int], halves: int = 1
) -> QuantizedArray:
    """Matrices, or pairs of gate and up that share no scale, as one array; they are taken one at a time.

    Args:
        matrices: for each expert one matrix, or two if ``halves`` is 2.
        spec: of all of them.
        shape: ``[E_local, N, K]`` of the result.
        halves: of the result.

    Example:
        >>> from moe_jax.quantization import quantize
        >>> spec = Spec("float8_e4m3fn", "tensor")
        >>> one = quantize(jnp.ones((8, 16)), spec)
        >>> w13 = stack_matrices([(one, one), (one, one), (one, one)], spec, (3, 16, 16), halves=2)
        >>> w13.shape, w13.scales.shape
        ((3, 16, 16), (3, 2))
    """
    count, rows, columns = shape
    scales_shape = Blocks.of(spec, rows, columns, halves).scales_shape
    values = np.empty((count, rows, -(-columns // spec.codes_per_value)), spec.storage_dtype)
    scales = np.empty((count, *scales_shape), jnp.dtype(spec.scale_dtype))
    zeros = np.empty((count, *scales_shape), np.uint8) if spec.asymmetric else None
    whole_matrix = np.empty((count, 2) if halves == 2 else (count,), np.float32) if spec.has_global_scale else None
    for expert, parts in enumerate(matrices):
        for whole, leaves in (
            (values, [part.values for part in parts]),
            (scales, [part.scales for part in parts]),
            (zeros, [part.zero_points for part in parts]),
            (whole_matrix, [part.global_scale for part in parts]),
        ):
            if whole is not None:
                whole[expert] = _join([np.asarray(leaf) for leaf in leaves])
    columns_stored = values.shape[-1] * spec.codes_per_value
    stacked = QuantizedArray(
        values,
        scales,
        zeros,
        whole_matrix,
        spec=spec,
        halves=halves,
        columns=None if columns_stored == columns else columns,
    )
    return jax.tree.map(jnp.asarray, stacked).validate()


def _join(leaves: list[np.ndarray]) -> np.ndarray:
    """A leaf of gate and up one after the other; the scales of two tensors side by side."""
    if len(leaves) == 1:
        return leaves[0]
    return np.stack(leaves) if leaves[0].ndim == 0 else np.concatenate(leaves)


def _read(*matrices: StoredMatrix) -> list[QuantizedArray]:
    return [matrix.read() for matrix in matrices]


def _scales(scales: Iterable[np.ndarray]) -> jnp.ndarray:
    return jnp.asarray(np.array(list(scales), np.float32))


def _module(name: str, expert: int) -> str:
    return name.format(expert).removesuffix(".weight")


def _common(block: Block, names: PerExpert, evidence: str) -> Quantization:
    """How all matrices of an expert are stored; the first expert stands for all.

    Raises:
        NotImplementedError: gate, up and down differ.
    """
    found = {
        module: quantization_of(block, module, evidence)
        for module in (_module(name, 0) for name in (names.gate, names.up, names.down))
    }
    if len(set(found.values())) > 1:
        formats = ", ".join(f"{block.prefix}{module}: {how.format.name}" for module, how in found.items())
        raise NotImplementedError(
            f"the matrices of an expert in {block.checkpoint.path} are stored in different formats ({formats}): a layer has one; "
            "dequantize them to bfloat16 first and quantize them with moe_jax.quantization.quantize_experts"
        )
    return found.popitem()[1]
