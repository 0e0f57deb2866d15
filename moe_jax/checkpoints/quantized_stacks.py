"""Quantized experts stacked in 3-D tensors, with FP8 or int8 values and their scales beside them; only this rank's are read."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.checkpoints.block import FLOAT_DTYPES, Block, Wanted, check_nothing_unknown, check_tensors
from moe_jax.checkpoints.mxfp4_stacks import read_mxfp4_stacks
from moe_jax.checkpoints.packings import POWERS, STORED, Size, scale_array, scale_axes
from moe_jax.checkpoints.quant_schemes import Quantization
from moe_jax.checkpoints.stored_matrix import check_format, quantization_of
from moe_jax.config import MoEConfig
from moe_jax.quantization.array import QuantizedArray
from moe_jax.quantization.blocks import Blocks
from moe_jax.types import ExpertWeights

_SCALES = ("_scale_inv", "_scale", "_weight_scale")
_INPUT_SCALES = ("_input_scale", "_activation_scale")


def read_quantized_stacks(block: Block, config: MoEConfig, here: list[int], evidence: str) -> ExpertWeights:
    """The experts ``here``, without biases.

    The scales of ``experts.gate_up_proj`` are ``experts.gate_up_proj_scale_inv``, ``_scale`` or ``_weight_scale``, their axes in
    the order of the weight's: per tensor ``[E]``, ``[E, 2]`` (gate and up) or one for all; per channel ``[E, 2I]``; per block
    ``[E, ceil(2I / bn), ceil(H / bk)]``, of which gate and up share none.

    Args:
        block: with its experts stacked.
        config: gives the sizes.
        here: global ids of the local experts, in their order.
        evidence: a tensor of the block that shows that the experts are quantized.

    Raises:
        ValueError, NotImplementedError: as `moe_jax.checkpoints.load_layer`.
    """
    names = block.layout.experts
    quantization = quantization_of(block, names.down, evidence)
    check_format(block, quantization, config)
    if quantization.packing == "mxfp4-blocks":
        return read_mxfp4_stacks(block, config, here)
    hidden = ("hidden_size", config.hidden_size)
    both, size = ("2*intermediate_size", 2 * config.intermediate_size), ("intermediate_size", config.intermediate_size)
    gate_up = _Stack(block, config, quantization, names.gate_up, both, hidden, halves=2)
    down = _Stack(block, config, quantization, names.down, hidden, size, halves=1)
    needed = gate_up.needed() | down.needed()
    biases = {names.gate_up_bias, names.down_bias} if config.has_bias else set()
    check_nothing_unknown(block, [name for name in block.names if name.startswith("experts.")], {*needed, *biases})
    check_tensors(block, needed)
    return ExpertWeights(
        w13=gate_up.read(here),
        w2=down.read(here),
        w13_input_scale=gate_up.input_scales(here),
        w2_input_scale=down.input_scales(here),
    )


class _Stack:
    """One stacked tensor ``[E, N, K]`` and what belongs to it."""

    def __init__(
        self,
        block: Block,
        config: MoEConfig,
        quantization: Quantization,
        name: str,
        rows: Size,
        columns: Size,
        halves: int,
    ):
        self._block, self._name, self._halves = block, name, halves
        self._count = ("num_experts", config.num_experts)
        self._rows, self._columns = rows, columns
        self._spec = quantization.format.weights
        self._transposed, self._interleaved = block.layout.experts.transposed, block.layout.experts.interleaved
        activations = quantization.format.activations
        self._scale = self._called(_SCALES)
        self._input_scale = self._called(_INPUT_SCALES) if activations is not None and activations.static else None
        self._check(quantization)

    def needed(self) -> dict[str, Wanted]:
        count = dict((self._count,))
        dtypes = FLOAT_DTYPES if self._spec.scale_dtype == "float32" else POWERS
        wanted = {
            self._name: Wanted(count | self._ordered(dict((self._rows, self._columns))), STORED[self._spec.dtype]),
            self._scale: Wanted(self._scale_axes(), dtypes, ones_count=False),
        }
        if self._input_scale is not None:
            axes = {} if self._is_one(self._input_scale) else count
            wanted[self._input_scale] = Wanted(axes, FLOAT_DTYPES, ones_count=False)
        return wanted

    def read(self, here: list[int]) -> QuantizedArray:
        """The experts ``here``; two halves, gate and up, unless one scale is that of both."""
        halves = 1 if self._spec.granularity == "tensor" and "halves" not in self._scale_axes() else self._halves
        rows, columns = self._rows[1], self._columns[1]
        shape = Blocks.of(self._spec, rows, columns, halves).scales_shape
        values = np.empty((len(here), rows, columns), self._spec.storage_dtype)
        scales = np.empty((len(here), *shape), jnp.dtype(self._spec.scale_dtype))
        for local, expert in enumerate(here):
            values[local] = self._gate_first(self._upright(self._block.read(self._name, expert)))
            scales[local] = self._scales_of(expert, shape)
        return jax.tree.map(jnp.asarray, QuantizedArray(values, scales, spec=self._spec, halves=halves)).validate()

    def input_scales(self, here: list[int]) -> jnp.ndarray | None:
        """Float32 ``[E_local]``, or None without static scales."""
        if self._input_scale is None:
            return None
        stored = self._block.read(self._input_scale).astype(np.float32).reshape(-1)
        return jnp.asarray(np.broadcast_to(stored, self._count[1])[here])

    def _scales_of(self, expert: int, shape: tuple[int, ...]) -> np.ndarray:
        is_one = not self._scale_axes()
        stored = self._block.read(self._scale, None if is_one else expert)
        if self._spec.block is not None:
            stored = self._upright(
                stored.reshape(tuple(self._ordered(scale_axes(self._spec, self._rows, self._columns)).values()))
            )
        if self._spec.granularity == "channel":
            stored = self._gate_first(stored.reshape(-1))
        try:
            return scale_array(stored, self._spec, shape)
        except ValueError as error:
            where = f"{self._block.prefix}{self._scale} in {self._block.checkpoint.path}"
            raise ValueError(f"{where}, expert {expert}: {error}") from error

    def _scale_axes(self) -> dict[str, int]:
        count = dict((self._count,))
        if self._spec.granularity != "tensor":
            return count | self._ordered(scale_axes(self._spec, self._rows, self._columns))
        if self._is_one(self._scale):
            return {}
        pairs = count | {"halves": 2}
        if (
            self._halves == 2
            and self._scale in self._block.names
            and Wanted(pairs, ones_count=False).fits(self._shape(self._scale))
        ):
            return pairs
        return count

    def _ordered(self, axes: dict[str, int]) -> dict[str, int]:
        return dict(reversed(axes.items())) if self._transposed else axes

    def _upright(self, matrix: np.ndarray) -> np.ndarray:
        return matrix.T if self._transposed else matrix

    def _gate_first(self, rows: np.ndarray) -> np.ndarray:
        if self._halves == 2 and self._interleaved:
            return np.concatenate([rows[0::2], rows[1::2]])
        return rows

    def _called(self, endings: tuple[str, ...]) -> str:
        return self._block.first(self._name + ending for ending in endings) or self._name + endings[0]

    def _shape(self, name: str) -> tuple[int, ...]:
        return self._block.checkpoint.info(self._block.prefix + name).shape

    def _is_one(self, name: str) -> bool:
        """Whether a tensor has one element, for all experts of several."""
        return name in self._block.names and self._count[1] > 1 and math.prod(self._shape(name)) == 1

    def _check(self, quantization: Quantization) -> None:
        where, spec = f"{self._block.prefix}{self._name} in {self._block.checkpoint.path}", self._spec
        way_out = "use a checkpoint with one module for each expert"
        if quantization.packing != "values" or spec.granularity == "group":
            raise NotImplementedError(
                f"{where} is stacked and quantized as {quantization.format.name}, packed as {quantization.packing}: of stacked "
                f"experts only values with a scale a tensor, channel or block can be read; {way_out}"
            )
        if self._halves == 2 and spec.block is not None and (self._interleaved or self._rows[1] // 2 % spec.block[0]):
            raise NotImplementedError(
                f"{where}: gate and up rows share blocks, block={spec.block} of intermediate_size={self._rows[1] // 2} rows each"
                f"{', which alternate' if self._interleaved else ''}; {way_out}"
            )
