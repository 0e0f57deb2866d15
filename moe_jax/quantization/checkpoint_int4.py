"""Int4 weights as GPTQ, AWQ and compressed-tensors checkpoints pack them, to `QuantizedArray` and back.

All three hold eight codes in an int32 and mean ``(code - zero) * scale``; they differ in what is packed along which axis, in the
order of the nibbles, and in whether a zero point is stored less one. Codes are the same bits in all of them, nothing is
rounded. Leading axes (experts) pass through.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from moe_jax.quantization.array import QuantizedArray
from moe_jax.quantization.formats import Spec
from moe_jax.quantization.packing import IN_ORDER, pack_int4, pack_words, unpack_words

# AWQ: nibble n of a word holds column AWQ_ORDER[n] of its eight.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

_Words = Integer[Array | np.ndarray, "..."]
_Scales = Float[Array | np.ndarray, "..."]


def from_gptq(
    qweight: _Words,
    scales: _Scales,
    qzeros: _Words | None = None,
    *,
    group: int,
    columns: int | None = None,
    g_idx: _Words | None = None,
    zeros_less_one: bool = True,
) -> QuantizedArray:
    """GPTQ: ``qweight`` int32 ``[..., K / 8, N]``, ``scales`` ``[..., G, N]``, ``qzeros`` int32 ``[..., G, N / 8]``.

    Args:
        qweight: packed along K, the first in the low nibble.
        scales: any floating dtype; kept as float32.
        qzeros: packed along N. None for symmetric weights (``sym``), whose zero is 8.
        group: columns that share a scale; -1 for all.
        columns: K, where it is no multiple of 8.
        g_idx: ``[..., K]``, the group of each column, to be checked.
        zeros_less_one: zero points are stored less one, modulo 16; False for ``checkpoint_format="gptq_v2"``.

    Returns:
        `QuantizedArray` ``[..., N, K]``.

    Raises:
        ValueError: shapes that do not fit, or columns in another order than that of their groups (``desc_act``).

    Example:
        >>> w = from_gptq(jnp.full((8, 3), 0x99999999 - 2**32), jnp.ones((2, 3)), group=32)
        >>> w.shape, w.scales.shape, w.dequantize()[0, 0].item()
        ((3, 64), (3, 2), 1.0)
    """
    codes = jnp.swapaxes(unpack_words(qweight, -2, size=columns), -1, -2)
    group = codes.shape[-1] if group == -1 else group
    if g_idx is not None and (np.asarray(g_idx) != np.arange(codes.shape[-1]) // group).any():
        raise ValueError(
            f"g_idx puts columns into groups out of order, not {group} after {group} (desc_act=True); a QuantizedArray cannot "
            "hold that: export the checkpoint with desc_act=False, or dequantize it"
        )
    zeros = None
    if qzeros is not None:
        zeros = unpack_words(qzeros, -1, size=scales.shape[-1])
        zeros = jnp.swapaxes((zeros + int(zeros_less_one)) & 0xF, -1, -2)
    return _array(codes, jnp.swapaxes(jnp.asarray(scales), -1, -2), zeros, group)


def to_gptq(array: QuantizedArray, *, zeros_less_one: bool = True) -> dict[str, Array]:
    """``qweight``, ``scales`` (float32), ``qzeros`` and ``g_idx`` of an int4 array with groups; see `from_gptq`.

    Example:
        >>> from moe_jax.quantization import quantize
        >>> w = to_gptq(quantize(jnp.ones((16, 64)), Spec("int4", "group", 32)))
        >>> {name: part.shape for name, part in w.items()}
        {'qweight': (8, 16), 'scales': (2, 16), 'qzeros': (2, 2), 'g_idx': (64,)}
    """
    codes, zeros = _codes_and_zeros(array)
    zeros = (zeros - int(zeros_less_one)) & 0xF
    group = jnp.arange(array.shape[-1], dtype=jnp.int32) // array.spec.block[1]
    return {
        "qweight": pack_words(jnp.swapaxes(codes, -1, -2), -2),
        "scales": jnp.swapaxes(array.scales, -1, -2),
        "qzeros": pack_words(jnp.swapaxes(zeros, -1, -2), -1),
        "g_idx": jnp.broadcast_to(group, (*array.shape[:-2], array.shape[-1])),
    }


def from_awq(qweight: _Words, scales: _Scales, qzeros: _Words | None = None, *, group: int) -> QuantizedArray:
    """AWQ: ``qweight`` int32 ``[..., K, N / 8]``, ``scales`` ``[..., G, N]``, ``qzeros`` int32 ``[..., G, N / 8]``.

    Args:
        qweight: packed along N in AWQ's order of nibbles.
        scales: any floating dtype; kept as float32.
        qzeros: packed like qweight; None for a zero of 8.
        group: columns (K) that share a scale; -1 for all.

    Returns:
        `QuantizedArray` ``[..., N, K]``.

    Raises:
        ValueError: shapes that do not fit.

    Example:
        >>> w = from_awq(jnp.full((64, 1), 0x99999999 - 2**32), jnp.ones((2, 8)), group=32)
        >>> w.shape, w.dequantize()[0, 0].item()
        ((8, 64), 1.0)
    """
    rows = scales.shape[-1]
    codes = jnp.swapaxes(unpack_words(qweight, -1, AWQ_ORDER, size=rows), -1, -2)
    zeros = None if qzeros is None else jnp.swapaxes(unpack_words(qzeros, -1, AWQ_ORDER, size=rows), -1, -2)
    return _array(codes, jnp.swapaxes(jnp.asarray(scales), -1, -2), zeros, group)


def to_awq(array: QuantizedArray) -> dict[str, Array]:
    """``qweight``, ``scales`` (float32) and ``qzeros`` of an int4 array with groups; see `from_awq`.

    Example:
        >>> from moe_jax.quantization import quantize
        >>> w = to_awq(quantize(jnp.ones((16, 64)), Spec("int4", "group", 32)))
        >>> {name: part.shape for name, part in w.items()}
        {'qweight': (64, 2), 'scales': (2, 16), 'qzeros': (2, 2)}
    """
    codes, zeros = _codes_and_zeros(array)
    return {
        "qweight": pack_words(jnp.swapaxes(codes, -1, -2), -1, AWQ_ORDER),
        "scales": jnp.swapaxes(array.scales, -1, -2),
        "qzeros": pack_words(jnp.swapaxes(zeros, -1, -2), -1, AWQ_ORDER),
    }


def from_compressed_tensors(
    weight_packed: _Words,
    weight_scale: _Scales,
    weight_zero_point: _Words | None = None,
    *,
    group: int,
    columns: int | None = None,
) -> QuantizedArray:
    """compressed-tensors, ``pack-quantized``: ``weight_packed`` int32 ``[..., N, K / 8]``, ``weight_scale`` ``[..., N, G]``.

    Args:
        weight_packed: packed along K, the first in the low nibble.
        weight_scale: any floating dtype; kept as float32.
        weight_zero_point: int32 ``[..., N / 8, G]``, packed along N; None for symmetric weights.
        group: columns that share a scale; -1 for all.
        columns: K, the last entry of ``weight_shape``, where it is no multiple of 8.

    Returns:
        `QuantizedArray` ``[..., N, K]``.

    Raises:
        ValueError: shapes that do not fit.

    Example:
        >>> w = from_compressed_tensors(jnp.full((3, 8), 0x99999999 - 2**32), jnp.ones((3, 2)), group=32)
        >>> w.shape, w.dequantize()[0, 0].item()
        ((3, 64), 1.0)
    """
    zeros = weight_zero_point
    if zeros is not None:
        zeros = unpack_words(zeros, -2, size=weight_scale.shape[-2])
    return _array(unpack_words(weight_packed, -1, size=columns), jnp.asarray(weight_scale), zeros, group)


def to_compressed_tensors(array: QuantizedArray) -> dict[str, Array]:
    """``weight_packed``, ``weight_scale`` (float32), ``weight_shape``, and ``weight_zero_point`` if there are zero points.

    Example:
        >>> from moe_jax.quantization import quantize
        >>> w = to_compressed_tensors(quantize(jnp.ones((16, 64)), Spec("int4", "group", 32)))
        >>> w["weight_packed"].shape, w["weight_scale"].shape, w["weight_shape"].tolist()
        ((16, 8), (16, 2), [16, 64])
    """
    codes, zeros = _codes_and_zeros(array)
    parts = {
        "weight_packed": pack_words(codes, -1, IN_ORDER),
        "weight_scale": array.scales,
        "weight_shape": jnp.asarray(array.shape[-2:], jnp.int32),
    }
    if array.zero_points is not None:
        parts["weight_zero_point"] = pack_words(zeros, -2)
    return parts


def _array(codes: Array, scales: Array, zeros: Array | None, group: int) -> QuantizedArray:
    """The array ``[..., N, K]`` of codes, with scales and zeros ``[..., N, G]``."""
    columns = codes.shape[-1]
    spec = Spec("int4", "group", columns if group == -1 else group, asymmetric=zeros is not None)
    array = QuantizedArray(
        pack_int4(codes), scales.astype(jnp.float32), zeros, spec=spec, columns=columns if columns % 2 else None
    )
    return array.validate("the checkpoint's weight")


def _codes_and_zeros(array: QuantizedArray) -> tuple[Array, Array]:
    if array.spec.dtype != "int4" or array.spec.granularity != "group":
        raise ValueError(
            f"{array.spec} is not int4 with groups, which is all that these checkpoints hold; quantize it so"
        )
    zeros = array.zero_points
    return array.codes(), jnp.full(array.scales.shape, 8, jnp.uint8) if zeros is None else zeros
