"""What the tensors of one quantized matrix ``[N, K]`` are, in each packing, and the `QuantizedArray` that they make.

A packing knows nothing of files: it says which parts it wants, by the last word of their names, and is given them as arrays.
Codes and scales come out bit for bit, scales as float32, or as powers of two where the format says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from moe_jax.checkpoints import packings_fp4
from moe_jax.checkpoints.block import FLOAT_DTYPES, Wanted
from moe_jax.checkpoints.quant_schemes import Quantization
from moe_jax.quantization.array import QuantizedArray
from moe_jax.quantization.blocks import Blocks
from moe_jax.quantization.checkpoint_int4 import from_awq, from_compressed_tensors, from_gptq
from moe_jax.quantization.formats import Spec
from moe_jax.quantization.packing import unpack_words

SCALES = ("weight_scale_inv", "weight_scale")  # spellings, of `values`
# The dtypes, as safetensors spells them, that hold codes one by one.
STORED = {"float8_e4m3fn": ("F8_E4M3",), "int8": ("I8",)}
POWERS = ("F8_E8M0", "U8", *FLOAT_DTYPES)  # that hold powers of two; bytes are their exponents
_WORDS, _INDICES = ("I32",), ("I32", "I64")
_E8M0 = jnp.dtype("float8_e8m0fnu")

Size = tuple[str, int]  # of an axis: what it is called in errors, and how long it is
Parts = Mapping[str, np.ndarray]


class Packing(NamedTuple):
    """One way to hold a quantized matrix in several tensors.

    Attributes:
        parts: quantization, rows, columns -> the tensors wanted, by the last word of their names.
        optional: the same, of those that are read only if they are there.
        unpack: the arrays of both, quantization, N, K -> the matrix; its leaves are NumPy arrays or on the device.
    """

    parts: Callable[[Quantization, Size, Size], dict[str, Wanted]]
    optional: Callable[[Quantization, Size, Size], dict[str, Wanted]]
    unpack: Callable[[Parts, Quantization, int, int], QuantizedArray]


def scale_array(stored: np.ndarray, spec: Spec, shape: tuple[int, ...]) -> np.ndarray:
    """Scales in the shape and dtype that a `QuantizedArray` wants.

    Raises:
        ValueError: a scale that is no power of two, where the format's are.

    Example:
        >>> scale_array(np.array([[0.5], [2.0]], np.float16), Spec("int8", "channel"), (2,))
        array([0.5, 2. ], dtype=float32)
    """
    scales = stored.reshape(shape)
    if spec.scale_dtype == "float8_e8m0fnu" and scales.dtype == np.uint8:
        scales = scales.view(_E8M0)
    if spec.scale_dtype == "float32" or scales.dtype == _E8M0:
        return scales.astype(spec.scale_dtype, copy=False)
    exact = scales.astype(np.float32)
    powers = exact.astype(_E8M0)
    wrong = exact[powers.astype(np.float32) != exact]
    if wrong.size:
        raise ValueError(
            f"{wrong.size} of {exact.size} scales are no powers of two, e.g. {wrong[0]!s}, but quantization_config says "
            "scale_fmt='ue8m0'; take that out of it to keep float32 scales"
        )
    return powers


def check_word_shape(shape: np.ndarray, rows: int, columns: int) -> None:
    """Raises if ``weight_shape`` is not that of the matrix."""
    if shape.tolist() != [rows, columns]:
        raise ValueError(f"weight_shape holds {shape.tolist()}, but the matrix is [{rows}, {columns}]")


def _values_parts(quantization: Quantization, rows: Size, columns: Size) -> dict[str, Wanted]:
    spec = quantization.format.weights
    dtypes = FLOAT_DTYPES if spec.scale_dtype == "float32" else POWERS
    return {
        "weight": Wanted(dict((rows, columns)), STORED[spec.dtype]),
        "scale": Wanted(scale_axes(spec, rows, columns), dtypes, ones_count=False),
    }


def scale_axes(spec: Spec, rows: Size, columns: Size) -> dict[str, int]:
    """The axes of the scales of a matrix, named so that an error explains them."""
    if spec.granularity == "tensor":
        return {}
    if spec.granularity == "channel":
        return dict((rows,))
    axes = ((size, count) for size, count in zip((rows, columns), spec.block, strict=True))
    return {name if count == 1 else f"ceil({name}/{count})": -(-size // count) for (name, size), count in axes}


def _unpack_values(parts: Parts, quantization: Quantization, rows: int, columns: int) -> QuantizedArray:
    spec = quantization.format.weights
    shape = Blocks.of(spec, rows, columns).scales_shape
    return QuantizedArray(parts["weight"], scale_array(parts["scale"], spec, shape), spec=spec)


def _groups(spec: Spec, columns: Size) -> dict[str, int]:
    """The axis of groups of columns: one for a channel."""
    name, size = columns
    if spec.granularity == "channel":
        return {"groups": 1}
    return {f"ceil({name}/{spec.block[1]})": -(-size // spec.block[1])}


def _packed(axis: Size, count: int) -> dict[str, int]:
    return {f"ceil({axis[0]}/{count})": -(-axis[1] // count)}


def _per_word(spec: Spec) -> int:
    return 8 if spec.dtype == "int4" else 4


def _words_parts(quantization: Quantization, rows: Size, columns: Size) -> dict[str, Wanted]:
    spec = quantization.format.weights
    parts = {
        "weight_packed": Wanted(dict((rows,)) | _packed(columns, _per_word(spec)), _WORDS),
        "weight_scale": Wanted(scale_axes(spec, rows, columns), FLOAT_DTYPES, ones_count=False),
    }
    if spec.asymmetric:
        parts["weight_zero_point"] = Wanted(_packed(rows, 8) | _groups(spec, columns), _WORDS)
    return parts


def _words_optional(quantization: Quantization, rows: Size, columns: Size) -> dict[str, Wanted]:
    return {
        "weight_shape": Wanted({"axes": 2}, _INDICES),
        "weight_g_idx": Wanted(dict((columns,)), _INDICES),
    }


def _unpack_words(parts: Parts, quantization: Quantization, rows: int, columns: int) -> QuantizedArray:
    spec = quantization.format.weights
    if "weight_shape" in parts:
        check_word_shape(parts["weight_shape"], rows, columns)
    group = spec.block[1] if spec.granularity == "group" else columns
    if "weight_g_idx" in parts:
        _check_order(parts["weight_g_idx"], "weight_g_idx", group)
    if spec.dtype == "int8":
        shape = Blocks.of(spec, rows, columns).scales_shape
        codes = _int8_of_words(parts["weight_packed"])[:, :columns]
        return QuantizedArray(codes, scale_array(parts["weight_scale"], spec, shape), spec=spec)
    scales = parts["weight_scale"].reshape(rows, -1)
    array = from_compressed_tensors(
        parts["weight_packed"], scales, parts.get("weight_zero_point"), group=group, columns=columns
    )
    return _as_channels(array, spec)


def _gptq_parts(quantization: Quantization, rows: Size, columns: Size) -> dict[str, Wanted]:
    spec = quantization.format.weights
    groups, count = _groups(spec, columns), _per_word(spec)
    return {
        "qweight": Wanted(_packed(columns, count) | dict((rows,)), _WORDS),
        "qzeros": Wanted(groups | _packed(rows, count), _WORDS),
        "scales": Wanted(groups | dict((rows,)), FLOAT_DTYPES),
    }


def _gptq_optional(quantization: Quantization, rows: Size, columns: Size) -> dict[str, Wanted]:
    return {"g_idx": Wanted(dict((columns,)), _INDICES), "bias": Wanted(dict((rows,)))}


def _unpack_gptq(parts: Parts, quantization: Quantization, rows: int, columns: int) -> QuantizedArray:
    spec = quantization.format.weights
    if parts.get("bias", np.zeros(1)).any():
        raise ValueError("bias is not zero, but experts have no biases in this layout; fold it in, or take it out")
    group = spec.block[1] if spec.granularity == "group" else columns
    if not spec.asymmetric:
        _check_middle(parts["qzeros"], spec, rows, int(quantization.zeros_less_one))
    if spec.dtype == "int8":
        if "g_idx" in parts:
            _check_order(parts["g_idx"], "g_idx", group)
        codes = _int8_of_words(parts["qweight"].T)[:, :columns]
        shape = Blocks.of(spec, rows, columns).scales_shape
        return QuantizedArray(codes, scale_array(parts["scales"].T, spec, shape), spec=spec)
    array = from_gptq(
        parts["qweight"],
        parts["scales"],
        parts["qzeros"] if spec.asymmetric else None,
        group=group,
        columns=columns,
        g_idx=parts.get("g_idx"),
        zeros_less_one=quantization.zeros_less_one,
    )
    return _as_channels(array, spec)


def _check_middle(qzeros: np.ndarray, spec: Spec, rows: int, less: int) -> None:
    """Checks that the zero points of GPTQ's symmetric weights are 8, or 128 of 8 bits."""
    if spec.dtype == "int8":
        zeros, middle = np.ascontiguousarray(qzeros).astype("<i4", copy=False).view(np.uint8)[:, :rows], 128
    else:
        zeros, middle = np.asarray(unpack_words(qzeros, -1, size=rows)), 8
    if (zeros != middle - less).any():
        raise ValueError(
            f"qzeros holds other zero points than {middle}, but quantization_config says sym=True; set sym=False there if they "
            "are meant"
        )


def _awq_parts(quantization: Quantization, rows: Size, columns: Size) -> dict[str, Wanted]:
    groups = _groups(quantization.format.weights, columns)
    return {
        "qweight": Wanted(dict((columns,)) | _packed(rows, 8), _WORDS),
        "qzeros": Wanted(groups | _packed(rows, 8), _WORDS),
        "scales": Wanted(groups | dict((rows,)), FLOAT_DTYPES),
    }


def _unpack_awq(parts: Parts, quantization: Quantization, rows: int, columns: int) -> QuantizedArray:
    spec = quantization.format.weights
    group = spec.block[1] if spec.granularity == "group" else columns
    return _as_channels(from_awq(parts["qweight"], parts["scales"], parts["qzeros"], group=group), spec)


def _as_channels(array: QuantizedArray, spec: Spec) -> QuantizedArray:
    """An int4 array, whose one group a row is that of a channel where the format says so."""
    if spec.granularity != "channel":
        return array
    zeros = None if array.zero_points is None else array.zero_points[..., 0]
    return dataclasses.replace(array, scales=array.scales[..., 0], zero_points=zeros, spec=spec)


def _int8_of_words(words: np.ndarray) -> np.ndarray:
    """int8 codes of int32 words, four in each along the last axis, the first in the low byte, with 128 added."""
    little = np.ascontiguousarray(words).astype("<i4", copy=False)
    return (little.view(np.uint8) ^ 0x80).view(np.int8)


def _check_order(indices: np.ndarray, name: str, group: int) -> None:
    if (indices != np.arange(len(indices)) // group).any():
        raise ValueError(
            f"{name} puts columns into groups out of order, not {group} after {group}; a QuantizedArray cannot hold that: "
            "export the checkpoint without activation reordering (desc_act=False, actorder='weight'), or dequantize it"
        )


def _nothing(quantization: Quantization, rows: Size, columns: Size) -> dict[str, Wanted]:
    return {}


def _fp4_unpack(parts: Parts, quantization: Quantization, rows: int, columns: int) -> QuantizedArray:
    return packings_fp4.unpack(parts, quantization.format.weights)


PACKINGS = {
    "values": Packing(_values_parts, _nothing, _unpack_values),
    "compressed-tensors": Packing(_words_parts, _words_optional, _unpack_words),
    "gptq": Packing(_gptq_parts, _gptq_optional, _unpack_gptq),
    "awq": Packing(_awq_parts, _nothing, _unpack_awq),
    "modelopt-nvfp4": Packing(packings_fp4.modelopt_nvfp4, _nothing, _fp4_unpack),
    "nvfp4-pack-quantized": Packing(packings_fp4.compressed_nvfp4, _nothing, _fp4_unpack),
    "mxfp4-pack-quantized": Packing(packings_fp4.compressed_mxfp4, _nothing, _fp4_unpack),
}
