"""The tensors of one matrix of four-bit floats: ModelOpt's and compressed-tensors' NVFP4, compressed-tensors' MXFP4."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moe_jax.checkpoints.block import FLOAT_DTYPES, Wanted
from moe_jax.checkpoints.quant_schemes import Quantization
from moe_jax.quantization.array import QuantizedArray
from moe_jax.quantization.checkpoint_fp4 import from_compressed_tensors_nvfp4, from_modelopt_nvfp4, scales_of_bytes
from moe_jax.quantization.formats import Spec

Size = tuple[str, int]
_BYTES, _E4M3, _POWERS = ("U8",), ("F8_E4M3", "U8"), ("F8_E8M0", "U8")
_ONE = Wanted({}, FLOAT_DTYPES, ones_count=False)  # a scale of the whole matrix


def modelopt_nvfp4(quantization: Quantization, rows: Size, columns: Size) -> dict[str, Wanted]:
    """``weight``, ``weight_scale`` and what both are multiplied by."""
    return {
        "weight": Wanted(dict((rows, _pieces(columns, 2))), _BYTES),
        "weight_scale": Wanted(dict((rows, _pieces(columns, 16))), _E4M3),
        "weight_scale_2": _ONE,
    }


def compressed_nvfp4(quantization: Quantization, rows: Size, columns: Size) -> dict[str, Wanted]:
    """``weight_packed``, ``weight_scale`` and what both are divided by."""
    return {
        "weight_packed": Wanted(dict((rows, _pieces(columns, 2))), _BYTES),
        "weight_scale": Wanted(dict((rows, _pieces(columns, 16))), _E4M3),
        "weight_global_scale": _ONE,
    }


def compressed_mxfp4(quantization: Quantization, rows: Size, columns: Size) -> dict[str, Wanted]:
    """``weight_packed`` and ``weight_scale``, exponents."""
    return {
        "weight_packed": Wanted(dict((rows, _pieces(columns, 2))), _BYTES),
        "weight_scale": Wanted(dict((rows, _pieces(columns, 32))), _POWERS),
    }


def unpack(parts: Mapping[str, np.ndarray], spec: Spec) -> QuantizedArray:
    """The matrix of any of these.

    Raises:
        ValueError: parts that do not fit together.
    """
    if "weight_scale_2" in parts:
        return from_modelopt_nvfp4(parts["weight"], parts["weight_scale"], parts["weight_scale_2"].reshape(()))
    if "weight_global_scale" in parts:
        given = parts["weight_global_scale"].reshape(())
        return from_compressed_tensors_nvfp4(parts["weight_packed"], parts["weight_scale"], given)
    return QuantizedArray(parts["weight_packed"], scales_of_bytes(parts["weight_scale"], spec.scale_dtype), spec=spec)


def _pieces(axis: Size, size: int) -> Size:
    return f"ceil({axis[0]}/{size})", -(-axis[1] // size)
