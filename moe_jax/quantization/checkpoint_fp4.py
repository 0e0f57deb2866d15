"""NVFP4 and MXFP4 weights as checkpoints hold them, to `QuantizedArray` and back.

Codes and scales are the same bits everywhere. What differs is the global scale of NVFP4: ModelOpt stores what scales are
multiplied by (``weight_scale_2``), compressed-tensors its reciprocal (``weight_global_scale``); and gpt-oss stores MXFP4 in
blocks of 16 bytes. Leading axes (experts) pass through.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped, UInt8

from moe_jax.quantization.array import QuantizedArray
from moe_jax.quantization.formats import FORMATS
from moe_jax.quantization.rounding import reciprocal

NVFP4, MXFP4 = FORMATS["nvfp4"].weights, FORMATS["mxfp4"].weights

_Bytes = UInt8[Array | np.ndarray, "..."]
_Scales = Shaped[Array | np.ndarray, "..."]
_Floats = Float[Array | np.ndarray, "..."]


def from_modelopt_nvfp4(weight: _Bytes, weight_scale: _Scales, weight_scale_2: _Floats) -> QuantizedArray:
    """ModelOpt: ``weight`` uint8 ``[..., N, K / 2]``, ``weight_scale`` e4m3 ``[..., N, K / 16]``, ``weight_scale_2`` float32.

    Args:
        weight: the even column in the low nibble.
        weight_scale: float8_e4m3fn, or its bytes.
        weight_scale_2: ``[...]``; or ``[..., 2]``, of gate and up rows: two halves, which keep their own.

    Returns:
        `QuantizedArray` ``[..., N, K]``.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit.

    Example:
        >>> parts = to_modelopt_nvfp4(_example())
        >>> {name: (part.shape, part.dtype.name) for name, part in parts.items()}
        {'weight': ((8, 16), 'uint8'), 'weight_scale': ((8, 2), 'float8_e4m3fn'), 'weight_scale_2': ((), 'float32')}
        >>> from_modelopt_nvfp4(**parts).shape
        (8, 32)
    """
    weight, global_scale = jnp.asarray(weight), jnp.asarray(weight_scale_2).astype(jnp.float32)
    halves = 2 if global_scale.ndim == weight.ndim - 1 else 1
    scales = scales_of_bytes(weight_scale, NVFP4.scale_dtype)
    return QuantizedArray(weight, scales, None, global_scale, spec=NVFP4, halves=halves).validate("weight")


def to_modelopt_nvfp4(array: QuantizedArray) -> dict[str, Array]:
    """``weight``, ``weight_scale`` and ``weight_scale_2``; see `from_modelopt_nvfp4`."""
    return {"weight": array.values, "weight_scale": array.scales, "weight_scale_2": array.global_scale}


def from_compressed_tensors_nvfp4(
    weight_packed: _Bytes, weight_scale: _Scales, weight_global_scale: _Floats
) -> QuantizedArray:
    """compressed-tensors: as `from_modelopt_nvfp4`, with the reciprocal of the global scale.

    The reciprocal is rounded to float32; for one and the same global scale both ways of storing it differ by that.

    Example:
        >>> array = from_compressed_tensors_nvfp4(**to_compressed_tensors_nvfp4(_example()))
        >>> array.dequantize()[0, :3].tolist()
        [0.0, 1.0, 2.0]
    """
    given = jnp.asarray(weight_global_scale).astype(jnp.float32)
    return from_modelopt_nvfp4(weight_packed, weight_scale, reciprocal(given))


def to_compressed_tensors_nvfp4(array: QuantizedArray) -> dict[str, Array]:
    """``weight_packed``, ``weight_scale`` and ``weight_global_scale``; see `from_compressed_tensors_nvfp4`."""
    return {
        "weight_packed": array.values,
        "weight_scale": array.scales,
        "weight_global_scale": reciprocal(array.global_scale),
    }


def from_gpt_oss(blocks: _Bytes, scales: _Scales) -> QuantizedArray:
    """gpt-oss: ``blocks`` uint8 ``[..., N, K / 32, 16]`` and ``scales`` uint8 ``[..., N, K / 32]``, exponents less 127.

    Rows stay as they are stored: those of ``gate_up_proj`` alternate, gate and up.

    Args:
        blocks: the even column in the low nibble.
        scales: bytes, or float8_e8m0fnu.

    Returns:
        MXFP4 `QuantizedArray` ``[..., N, K]``.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit.

    Example:
        >>> from_gpt_oss(jnp.full((8, 2, 16), 0x22, jnp.uint8), jnp.full((8, 2), 128, jnp.uint8)).dequantize()[0, :2].tolist()
        [2.0, 2.0]
    """
    blocks = jnp.asarray(blocks)
    if blocks.ndim < 3 or blocks.shape[-1] != 16:
        raise ValueError(
            f"blocks have shape {blocks.shape}, but must be [..., N, K / 32, 16]: 32 codes of four bits a block"
        )
    values = blocks.reshape(*blocks.shape[:-2], -1)
    return QuantizedArray(values, scales_of_bytes(scales, MXFP4.scale_dtype), spec=MXFP4).validate("blocks")


def to_gpt_oss(array: QuantizedArray) -> dict[str, Array]:
    """``blocks`` and ``scales``, both uint8; see `from_gpt_oss`.

    Raises:
        ValueError: K is no multiple of 32: blocks are whole.
    """
    columns = array.shape[-1]
    if columns % 32:
        raise ValueError(
            f"K={columns} must be a multiple of 32: gpt-oss stores whole blocks; pad the weights before quantizing"
        )
    values = array.values
    return {
        "blocks": values.reshape(*values.shape[:-1], columns // 32, 16),
        "scales": lax.bitcast_convert_type(array.scales, jnp.uint8),
    }


def gemm_alphas(weights: QuantizedArray, input_scale: ArrayLike) -> Float[Array, "..."]:
    """What a matmul of NVFP4 codes with their scales is still to be multiplied by: ``global_scale * input_scale``, per expert.

    Args:
        weights: NVFP4, ``[E, N, K]``.
        input_scale: float32 ``[]`` or ``[E]``, the global scale of activations: what theirs are multiplied by.

    Returns:
        float32 ``[E]``, or ``[E, 2]`` of gate and up.

    Raises:
        ValueError: weights without a global scale.

    Example:
        >>> float(gemm_alphas(_example(), 0.5)) == 0.5 * float(_example().global_scale)
        True
    """
    if weights.global_scale is None:
        raise ValueError(f"weights of {weights.spec} have no global scale, as NVFP4 has; there is nothing to fold")
    scale = jnp.asarray(input_scale, jnp.float32)
    extra = weights.global_scale.ndim - (weights.ndim - 2)
    return weights.global_scale * (scale if scale.ndim == 0 or not extra else scale[..., None])


def scales_of_bytes(scales: _Scales, dtype: str) -> Array:
    """Scales of eight bits, which a checkpoint or a tensor may hold as uint8."""
    scales = jnp.asarray(scales)
    return lax.bitcast_convert_type(scales, jnp.dtype(dtype)) if scales.dtype == jnp.uint8 else scales


def _example() -> QuantizedArray:
    from moe_jax.quantization.quantize import quantize

    return quantize(jnp.tile(jnp.arange(4.0), (8, 8)), NVFP4)
