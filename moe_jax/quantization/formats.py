"""What a number format is: `Spec` says how one matrix is stored, `QuantFormat` how a layer's weights and activations are."""

from __future__ import annotations

import contextlib
import dataclasses
import operator
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

DTYPES = ("float8_e4m3fn", "float8_e5m2", "int8", "int4", "float4_e2m1fn")
SCALE_DTYPES = ("float32", "float8_e8m0fnu", "float8_e4m3fn")
# Whether a granularity needs a block, and of what form.
GRANULARITIES = {
    "tensor": "one scale a matrix",
    "channel": "one scale a row of weights",
    "token": "one scale a row of activations",
    "group": "one scale a (1, g) piece of a row",
    "block": "one scale a (bn, bk) piece of the matrix",
}
WEIGHT_GRANULARITIES = ("tensor", "channel", "group", "block")
ACTIVATION_GRANULARITIES = ("tensor", "token", "group")

# The largest and the smallest code, and the factor by which the largest magnitude becomes a scale. An int4 code is stored
# without a sign, 8 added; its symmetric scale is the smallest that clips nothing, so positive and negative sides differ.
_LARGEST = {"float8_e4m3fn": 448, "float8_e5m2": 57344, "int8": 127, "int4": 7, "float4_e2m1fn": 6}
_SMALLEST = {"float8_e4m3fn": -448, "float8_e5m2": -57344, "int8": -128, "int4": -8, "float4_e2m1fn": -6}
_FOUR_BITS = ("int4", "float4_e2m1fn")


def dtype_name(value: DTypeLike) -> object:
    """The name of a dtype; what is none is returned as it is."""
    if not isinstance(value, str):
        with contextlib.suppress(TypeError):
            return np.dtype(value).name
    return value


@dataclass(frozen=True)
class Spec:
    """How one matrix is quantized: the last two axes of an array are its rows and its columns (the contracted axis).

    Attributes:
        dtype: ``float8_e4m3fn``, ``float8_e5m2`` (of gradients: more range, one bit less of precision), ``int8``, ``int4`` or
            ``float4_e2m1fn`` (the last two: two codes a byte, the even column in the low nibble).
        granularity: what shares a scale: ``tensor`` (a matrix), ``channel`` or ``token`` (a row), ``group`` (part of a row) or
            ``block``.
        block: ``(1, g)`` or just g for ``group``, ``(rows, columns)`` for ``block``, None for the others.
        scale_dtype: ``float32``; ``float8_e8m0fnu``: powers of two, rounded up so that no float8_e4m3fn saturates, see
            `moe_jax.quantization.rounding`; ``float8_e4m3fn``, of float4_e2m1fn alone: each multiplied by a float32 global
            scale of the whole matrix (NVFP4).
        static: scales are given, not taken from the values that are quantized. Where there is a global scale, that one.
        asymmetric: int4 with a zero point beside each scale; a value is ``(code - zero point) * scale``.

    Raises:
        ValueError, TypeError: values that do not go together; the message names the rule, the values and the way out.

    Example:
        >>> Spec("int4", "group", 128).block
        (1, 128)
        >>> Spec("float8_e4m3fn", "tensor").largest
        448
    """

    dtype: DTypeLike
    granularity: str
    block: tuple[int, ...] | list[int] | int | None = None
    scale_dtype: DTypeLike = "float32"
    static: bool = False
    asymmetric: bool = False

    def __post_init__(self) -> None:
        set_field = object.__setattr__  # the dataclass is frozen
        set_field(self, "dtype", dtype_name(self.dtype))
        set_field(self, "scale_dtype", dtype_name(self.scale_dtype))
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} must be one of {', '.join(DTYPES)}")
        if self.granularity not in GRANULARITIES:
            raise ValueError(f"granularity={self.granularity!r} must be one of {', '.join(GRANULARITIES)}")
        if self.scale_dtype not in SCALE_DTYPES:
            raise ValueError(f"scale_dtype={self.scale_dtype!r} must be one of {', '.join(SCALE_DTYPES)}")
        for name in ("static", "asymmetric"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}={getattr(self, name)!r} must be True or False")
        set_field(self, "block", self._checked_block())
        if self.asymmetric and self.dtype != "int4":
            raise ValueError(f"asymmetric=True has no meaning for dtype={self.dtype!r}; only int4 has zero points")
        if self.asymmetric and self.static:
            raise ValueError(
                "asymmetric=True and static=True exclude each other: zero points are taken from the values"
            )
        self._check_scale_dtype()

    def _check_scale_dtype(self) -> None:
        if self.dtype == "float4_e2m1fn":
            if self.granularity != "group" or self.scale_dtype == "float32":
                raise ValueError(
                    f"dtype='float4_e2m1fn' needs granularity='group' and scales of eight bits, got {self.granularity!r} and "
                    f"{self.scale_dtype!r}; use Spec('float4_e2m1fn', 'group', 16, 'float8_e4m3fn') for NVFP4, or "
                    "Spec('float4_e2m1fn', 'group', 32, 'float8_e8m0fnu') for MXFP4"
                )
        elif self.scale_dtype == "float8_e4m3fn":
            raise ValueError(
                f"scale_dtype='float8_e4m3fn' is for float4_e2m1fn, not for dtype={self.dtype!r}; use float32 or float8_e8m0fnu"
            )
        elif self.scale_dtype == "float8_e8m0fnu" and self.dtype != "float8_e4m3fn":
            raise ValueError(
                f"scale_dtype='float8_e8m0fnu' is for float8_e4m3fn and float4_e2m1fn, not for dtype={self.dtype!r}: it has no "
                "zero, which the scale of a block of integers can be; use float32"
            )

    def _checked_block(self) -> tuple[int, int] | None:
        wanted = f"granularity={self.granularity!r} ({GRANULARITIES[self.granularity]})"
        if self.granularity not in ("group", "block"):
            if self.block is not None:
                raise ValueError(f"{wanted} takes no block, got block={self.block!r}; leave it None")
            return None
        block = self.block
        try:
            sizes = (
                (1, operator.index(block)) if not isinstance(block, tuple | list) else tuple(map(operator.index, block))
            )
        except TypeError:
            raise TypeError(
                f"{wanted} needs a block of integers, got block={block!r}; e.g. (1, 128) or (128, 128)"
            ) from None
        if len(sizes) != 2 or min(sizes) < 1 or (self.granularity == "group" and sizes[0] != 1):
            form = "(1, g)" if self.granularity == "group" else "(rows, columns)"
            raise ValueError(f"{wanted} needs block={form} of positive sizes, got block={block!r}")
        return sizes

    @property
    def largest(self) -> int:
        """The largest value that a code stands for, before it is scaled."""
        return _LARGEST[self.dtype]

    @property
    def smallest(self) -> int:
        """The smallest value that a code stands for, before it is scaled."""
        return _SMALLEST[self.dtype]

    @property
    def reach(self) -> int:
        """The largest value that a matrix whose one scale is 1, the global one where there is one, can hold.

        Example:
            >>> Spec("float4_e2m1fn", "group", 16, "float8_e4m3fn").reach
            2688
        """
        return self.largest * (_LARGEST["float8_e4m3fn"] if self.has_global_scale else 1)

    @property
    def is_float(self) -> bool:
        """Whether codes are floats, with a NaN of their own."""
        return self.dtype in ("float8_e4m3fn", "float8_e5m2")

    @property
    def has_global_scale(self) -> bool:
        """Whether the scales are themselves scaled, by one float32 a matrix (NVFP4)."""
        return self.scale_dtype == "float8_e4m3fn"

    @property
    def storage_dtype(self) -> np.dtype:
        """The dtype of the array that holds the codes."""
        return jnp.dtype("uint8" if self.dtype in _FOUR_BITS else self.dtype)

    @property
    def codes_per_value(self) -> int:
        """How many columns share one element of the stored array."""
        return 2 if self.dtype in _FOUR_BITS else 1


# Weights and activations whose products are exact in what a tensor core adds up.
_MULTIPLIED = (
    ("float8_e4m3fn", "float8_e4m3fn"),
    ("int8", "int8"),
    ("float4_e2m1fn", "float4_e2m1fn"),
    ("float4_e2m1fn", "float8_e4m3fn"),
)


@dataclass(frozen=True)
class QuantFormat:
    """The number format of a layer: that of its weights, and that of the rows they are multiplied with.

    Attributes:
        name: what `quant_format` finds it by.
        weights: of ``w13`` and ``w2``.
        activations: of the rows of both matmuls; None leaves them in the layer's dtype (a weight-only format). Four-bit
            activations are emulated: quantized, dequantized and rounded to the layer's dtype, whatever the device. Their global
            scale, where they have one that is not static, is one a token.

    Raises:
        ValueError: a granularity that weights or activations cannot have, dtypes that cannot be multiplied.

    Example:
        >>> quant_format("fp8_block").activations.block
        (1, 128)
        >>> quant_format("int4_group128").is_weight_only
        True
    """

    name: str
    weights: Spec
    activations: Spec | None = None

    def __post_init__(self) -> None:
        for what, spec, allowed in (
            ("weights", self.weights, WEIGHT_GRANULARITIES),
            ("activations", self.activations, ACTIVATION_GRANULARITIES),
        ):
            if spec is not None and spec.granularity not in allowed:
                raise ValueError(
                    f"format {self.name!r}: {what} have granularity={spec.granularity!r}, but must have one of "
                    f"{', '.join(allowed)}"
                )
        if self.weights.dtype == "float8_e5m2":
            raise ValueError(
                f"format {self.name!r}: weights are float8_e5m2, which is for gradients (Fp8Training.gradient_dtype); use "
                "float8_e4m3fn"
            )
        if self.weights.static:
            raise ValueError(
                f"format {self.name!r}: weights have static=True; only scales of activations can be static"
            )
        if self.activations is None:
            return
        if (self.weights.dtype, self.activations.dtype) not in _MULTIPLIED:
            raise ValueError(
                f"format {self.name!r}: {self.activations.dtype} activations cannot be multiplied with {self.weights.dtype} "
                "weights; give both float8_e4m3fn or both int8, float4_e2m1fn weights and activations of that or float8_e4m3fn, "
                "or activations=None"
            )

    @property
    def is_weight_only(self) -> bool:
        """Whether activations stay as they are."""
        return self.activations is None

    @property
    def emulates(self) -> bool:
        """Whether activations are quantized and dequantized, and multiplied in the layer's dtype."""
        return self.activations is not None and self.activations.dtype == "float4_e2m1fn"

    @property
    def row_spec(self) -> Spec | None:
        """How the codes are stored that rows are when a matmul takes them; None where rows are in the layer's dtype."""
        return None if self.emulates else self.activations

    @property
    def multiplies_codes(self) -> bool:
        """Whether kernels multiply codes with codes; where FP8 weights change their scale along a row, rows are dequantized."""
        return self.row_spec is not None and (self.weights.granularity != "group" or self.becomes_fp8)

    @property
    def becomes_fp8(self) -> bool:
        """Whether weights are four-bit floats that become FP8, and are rounded to it: see `moe_jax.quantization.fp8_blocks`."""
        return self.weights.dtype == "float4_e2m1fn" and self.row_spec is not None

    def dtype_of_rows(self, dtype: DTypeLike) -> str:
        """That of the rows that weights are multiplied with, in a layer of `dtype`: what `prepare_experts` wants to know.

        Example:
            >>> quant_format("nvfp4_fp8").dtype_of_rows("bfloat16"), quant_format("nvfp4").dtype_of_rows("bfloat16")
            ('float8_e4m3fn', 'bfloat16')
        """
        return self.row_spec.dtype if self.row_spec is not None else jnp.dtype(dtype).name


def _formats() -> dict[str, QuantFormat]:
    def fp8(granularity: str, block: object = None, scales: str = "float32", static: bool = False) -> Spec:
        return Spec("float8_e4m3fn", granularity, block, scales, static)

    def int8(granularity: str, block: object = None, static: bool = False) -> Spec:
        return Spec("int8", granularity, block, static=static)

    square, ue8m0 = (128, 128), "float8_e8m0fnu"
    table: dict[str, tuple[Spec, Spec | None]] = {
        "fp8_tensor": (fp8("tensor"), fp8("tensor")),
        "fp8_tensor_static": (fp8("tensor"), fp8("tensor", static=True)),
        "fp8_channel": (fp8("channel"), fp8("token")),
        "fp8_block": (fp8("block", square), fp8("group", 128)),
        "fp8_block_ue8m0": (fp8("block", square, ue8m0), fp8("group", 128, ue8m0)),
        "fp8_weight_tensor": (fp8("tensor"), None),
        "fp8_weight_channel": (fp8("channel"), None),
        "fp8_weight_block": (fp8("block", square), None),
        "int8_channel": (int8("channel"), int8("token")),
        "int8_channel_static": (int8("channel"), int8("tensor", static=True)),
        "int8_block": (int8("block", square), int8("group", 128)),
        "int8_weight": (int8("channel"), None),
    }
    nvfp4, mxfp4 = Spec("float4_e2m1fn", "group", 16, "float8_e4m3fn"), Spec("float4_e2m1fn", "group", 32, ue8m0)
    table |= {
        "nvfp4": (nvfp4, None),
        "nvfp4_fp8": (nvfp4, fp8("group", 128)),
        "nvfp4_w4a4": (nvfp4, nvfp4),
        "nvfp4_w4a4_static": (nvfp4, dataclasses.replace(nvfp4, static=True)),
        "mxfp4": (mxfp4, None),
        "mxfp4_fp8": (mxfp4, fp8("group", 128)),
        "mxfp4_w4a4": (mxfp4, mxfp4),
        "mxfp8": (fp8("group", 32, ue8m0), fp8("group", 32, ue8m0)),
        "mxfp8_weight": (fp8("group", 32, ue8m0), None),
    }
    for size in (32, 64, 128):
        table[f"int4_group{size}"] = (Spec("int4", "group", size), None)
        table[f"int4_group{size}_zp"] = (Spec("int4", "group", size, asymmetric=True), None)
    return {name: QuantFormat(name, *specs) for name, specs in table.items()}


FORMATS: dict[str, QuantFormat] = _formats()


def quant_format(name: str | QuantFormat) -> QuantFormat:
    """The format of that name; a `QuantFormat` is returned as it is.

    ``fp8_tensor`` and ``fp8_tensor_static`` (scales of activations computed or given), ``fp8_channel`` (a scale a channel and
    a token), ``fp8_block`` and ``fp8_block_ue8m0`` (128x128 weights, 128 columns of a token), ``int8_channel``,
    ``int8_channel_static``, ``int8_block``; weight-only: ``fp8_weight_tensor | _channel | _block``, ``int8_weight``, and
    ``int4_group32 | 64 | 128``, with ``_zp`` for zero points.

    Four bits, float4_e2m1fn: ``nvfp4`` (16 columns share a float8_e4m3fn scale, the matrix a float32 one) and ``mxfp4`` (32
    columns share a power of two) are weight-only; with ``_fp8`` activations are float8_e4m3fn, a scale for 128 columns of a
    token, and so are weights when they are multiplied, rounded with their scales (`moe_jax.quantization.fp8_blocks`). With
    ``_w4a4`` activations are of the weights' format, emulated on any device, see `QuantFormat.activations`
    (``nvfp4_w4a4_static``: with a given global scale). ``mxfp8``: float8_e4m3fn, 32 columns share a power of two, both
    operands; ``mxfp8_weight``: the weights alone.

    Raises:
        ValueError: no such format; the message lists them.

    Example:
        >>> quant_format("int8_channel").weights
        Spec(dtype='int8', granularity='channel', block=None, scale_dtype='float32', static=False, asymmetric=False)
    """
    if isinstance(name, QuantFormat):
        return name
    if name not in FORMATS:
        raise ValueError(
            f"format {name!r} is not one of {', '.join(FORMATS)}; make your own with QuantFormat(name, Spec(...))"
        )
    return FORMATS[name]
