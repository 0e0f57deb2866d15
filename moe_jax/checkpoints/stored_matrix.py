"""A linear layer of a block on disk: plain, or quantized as the checkpoint's config says."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from moe_jax.checkpoints.block import FLOAT_DTYPES, Block, Wanted
from moe_jax.checkpoints.families import QUANTIZED_SUFFIXES
from moe_jax.checkpoints.packings import PACKINGS, SCALES, Size
from moe_jax.checkpoints.quant_config import quantization_section, read_quantization, read_section, unquantized_by
from moe_jax.checkpoints.quant_schemes import Quantization
from moe_jax.config import MoEConfig
from moe_jax.quantization.array import QuantizedArray
from moe_jax.quantization.rounding import reciprocal

INPUT_SCALES = ("input_scale", "activation_scale")
INVERSE_INPUT_SCALE = "input_global_scale"  # of compressed-tensors' four-bit activations: what they are multiplied by


@dataclass(frozen=True)
class StoredMatrix:
    """The quantized matrix ``[N, K]`` of a module.

    Attributes:
        block: where it is.
        module: below the block, e.g. ``experts.3.up_proj``.
        rows: what N is called, and N.
        columns: what K is called, and K.
        quantization: how it is stored.
    """

    block: Block
    module: str
    rows: Size
    columns: Size
    quantization: Quantization

    def needed(self) -> dict[str, Wanted]:
        """The tensors that must be there, and those that may be and are, by their names in the block."""
        return {self._name(part): wanted for part, wanted in self._parts().items()}

    def read(self) -> QuantizedArray:
        """The matrix, bit for bit; its leaves are NumPy arrays or on the device.

        Raises:
            ValueError: contents that a `QuantizedArray` cannot hold, or that contradict the config.
        """
        parts = {part: self.block.read(self._name(part)) for part in self._parts() if part != "input_scale"}
        try:
            return self._packing.unpack(parts, self.quantization, self.rows[1], self.columns[1])
        except ValueError as error:
            raise ValueError(f"{self.block.prefix}{self.module} in {self.block.checkpoint.path}: {error}") from error

    def input_scale(self) -> np.ndarray:
        """The static scale of the rows that it is multiplied with, float32 ``[]``."""
        name = self._name("input_scale")
        stored = self.block.read(name).astype(np.float32).reshape(())
        return np.asarray(reciprocal(jnp.asarray(stored))) if name.endswith(INVERSE_INPUT_SCALE) else stored

    @property
    def has_input_scale(self) -> bool:
        """Whether its format has a static scale of activations."""
        activations = self.quantization.format.activations
        return activations is not None and activations.static

    @property
    def _packing(self) -> object:
        return PACKINGS[self.quantization.packing]

    def _parts(self) -> dict[str, Wanted]:
        arguments = self.quantization, self.rows, self.columns
        there = {
            part: wanted
            for part, wanted in self._packing.optional(*arguments).items()
            if self._name(part) in self.block.names
        }
        parts = self._packing.parts(*arguments) | there
        if self.has_input_scale:
            parts["input_scale"] = Wanted({}, FLOAT_DTYPES, ones_count=False)
        return parts

    def _name(self, part: str) -> str:
        spellings = {"scale": SCALES, "input_scale": INPUT_SCALES}.get(part, (part,))
        if part == "input_scale" and self.quantization.packing == "nvfp4-pack-quantized":
            spellings = (INVERSE_INPUT_SCALE,)
        default = self.quantization.scale if part == "scale" else spellings[0]
        return self.block.first(f"{self.module}.{word}" for word in spellings) or f"{self.module}.{default}"


def quantized_names(block: Block, modules: Iterable[str]) -> list[str]:
    """The tensors of the block, within ``modules``, that only a quantized layer has."""
    within = tuple(module + "." for module in modules)
    return sorted(name for name in block.names if name.startswith(within) and name.endswith(QUANTIZED_SUFFIXES))


def check_format(block: Block, quantization: Quantization, config: MoEConfig) -> None:
    """Checks that experts are stored as ``config.quantization`` says, if it says anything.

    Raises:
        ValueError: it says that they are of another number format.
    """
    wanted, found = config.quantization, quantization.format
    if wanted is not None and wanted.weights != found.weights:
        raise ValueError(
            f"{block.prefix}experts in {block.checkpoint.path} are stored as {found.name} ({found.weights}), but config has "
            f"quantization={wanted.name!r} ({wanted.weights}); use quantization=quant_format_from_hf(...) of the checkpoint's "
            "config, or dequantize the experts and quantize them again (moe_jax.quantization)"
        )


def quantization_of(block: Block, module: str, evidence: str) -> Quantization:
    """How the checkpoint's config says that ``module``, which is quantized as the tensor ``evidence`` shows, is stored.

    Raises:
        ValueError: there is no such config, or it says that the module is not quantized.
        NotImplementedError: a method, a packing or a number format that cannot be read.
    """
    where, folder = f"{block.prefix}{evidence} in {block.checkpoint.path}", block.checkpoint.folder
    given = block.quantization_config
    section = read_section(folder) if given is None else quantization_section(given)
    if section is None:
        said = f"there is no quantization_config in {folder} (config.json, hf_quant_config.json)"
        raise ValueError(
            f"{where} is part of a quantized weight, but {said if given is None else 'nothing in quantization_config='} "
            "that says how; download config.json again, or pass its quantization_config as quantization_config="
        )
    name = block.prefix + module
    reason = unquantized_by(section, name)
    found = None if reason else read_quantization(section, name)
    if found is None:
        raise ValueError(
            f"{where} is part of a quantized weight, but its quantization_config says that {name} is not quantized: "
            f"{reason or 'no config group targets it'}; correct the config, or pass quantization_config="
        )
    return found
