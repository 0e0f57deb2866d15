"""`QuantizedArray`: quantized values and their scales, a pytree that goes where an array goes."""

from __future__ import annotations

import functools
import math
import operator
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from moe_jax.quantization.blocks import Blocks
from moe_jax.quantization.formats import Spec
from moe_jax.quantization.fp4 import fp4_value
from moe_jax.quantization.packing import unpack_int4
from moe_jax.quantization.rounding import scale_to_float32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedArray:
    """A matrix, or a stack of them, as codes and scales: what it stands for is ``(values - zero_points) * scales``,
    times ``global_scale`` where there is one.

    Its leaves are arrays, of which every leading axis (experts) is the same, so `jax.tree.map`, jit, vmap over experts,
    shard_map over experts, checkpointing libraries and pickle need to know nothing. The fields may also hold shapes, axes or
    partition specs in the places of arrays. Rows and columns are split with `moe_jax.quantization.split_rows` and
    `split_columns`, which know blocks and packing.

    Attributes:
        values: ``[..., N, K]`` of the spec's dtype; int4 and float4_e2m1fn are uint8 ``[..., N, ceil(K / 2)]``, the even column
            in the low nibble. An int4 code has no sign: minus 8 (symmetric), or minus its zero point.
        scales: float32, float8_e8m0fnu or float8_e4m3fn. Of a tensor ``[...]``, or ``[..., 2]`` with two halves; of channels and
            tokens ``[..., N]``; of groups and blocks ``[..., ceil(N / bn), ceil(K / bk)]``, with two halves
            ``[..., 2 * ceil(N / 2 / bn), ceil(K / bk)]``.
        zero_points: uint8, one a scale, 0 to 15, for an asymmetric spec; None otherwise.
        global_scale: float32, by which every scale of a matrix is multiplied, for float8_e4m3fn scales: ``[...]``, or
            ``[..., 2]`` with two halves; None otherwise.
        spec: the number format (static).
        halves: 2 where the rows are two matrices, gate and up, that share no scale; otherwise 1 (static).
        columns: K, where more columns are stored than the matrix has; None where all of them count (static).

    Example:
        >>> from moe_jax.quantization import quantize
        >>> w = quantize(jnp.ones((4, 64, 256)), Spec("float8_e4m3fn", "block", (128, 128)))
        >>> w.shape, w.scales.shape, w[1].shape, w.dtype.name
        ((4, 64, 256), (4, 1, 2), (64, 256), 'float8_e4m3fn')
    """

    values: Shaped[Array, "*B N stored"] | Any
    scales: Shaped[Array, "..."] | Any
    zero_points: Shaped[Array, "..."] | Any | None = None
    global_scale: Float[Array, "..."] | Any | None = None
    spec: Spec = field(kw_only=True, metadata={"static": True})
    halves: int = field(default=1, kw_only=True, metadata={"static": True})
    columns: int | None = field(default=None, kw_only=True, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix that it stands for, packing and filling left out of account."""
        stored = self.values.shape[-1] * self.spec.codes_per_value
        return (*self.values.shape[:-1], stored if self.columns is None else self.columns)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.values.shape)

    @property
    def size(self) -> int:
        """Number of elements of the matrix that it stands for."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> np.dtype:
        """The quantized dtype: ``float8_e4m3fn``, ``int8``, ``int4`` or ``float4_e2m1fn``."""
        return jnp.dtype(self.spec.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of values, scales, zero points and global scales together."""
        return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(self))

    @property
    def blocks(self) -> Blocks:
        """Which elements share a scale."""
        return Blocks.of(self.spec, *self.shape[-2:], self.halves)

    def __len__(self) -> int:
        return self.values.shape[0]

    def __getitem__(self, index: Any) -> QuantizedArray:
        """Experts with their scales: an integer, a slice or an array of integers, for the first axis."""
        if self.ndim < 3:
            raise IndexError(
                f"a QuantizedArray of shape {self.shape} is one matrix, whose scales cannot be indexed with its rows; "
                "use slice_rows or slice_columns of moe_jax.quantization"
            )
        if isinstance(index, tuple) or index is None or index is Ellipsis:
            raise IndexError(
                f"index {index!r} must be for the first axis alone: an integer, a slice, or an array of integers"
            )
        if not isinstance(index, slice) and getattr(index, "ndim", 0) == 0 and not isinstance(index, jax.core.Tracer):
            index = operator.index(index)
            if not -len(self) <= index < len(self):  # jax.numpy would clamp it
                raise IndexError(f"index {index} is out of range for {len(self)} experts")
        return jax.tree.map(lambda leaf: leaf[index], self)

    def dequantize(self, dtype: DTypeLike = "float32") -> Float[Array, "*B N K"]:
        """What it stands for: ``(values - zero_points) * scales``, multiplied in float32 and rounded once, to `dtype`.

        A NaN code or scale gives NaN. With a global scale: the product of code and scale is exact, and is then multiplied by it.

        Example:
            >>> from moe_jax.quantization import quantize
            >>> quantize(jnp.array([[1.0, -2.0]]), Spec("int8", "channel")).dequantize().tolist()
            [[1.0078740119934082, -2.0]]
        """
        return _dequantize(self, jnp.dtype(dtype).name)

    def validate(self, name: str = "QuantizedArray") -> QuantizedArray:
        """Itself, if its parts fit together.

        Args:
            name: what the message calls it.

        Raises:
            ValueError: shapes that do not fit, zero points that are missing or superfluous.
            TypeError: dtypes that are not the spec's.
        """
        spec = self.spec
        if self.ndim < 2:
            raise ValueError(f"{name}.values has shape {self.values.shape}, but must be [..., N, K]; add an axis")
        if jnp.dtype(self.values.dtype) != spec.storage_dtype:
            raise TypeError(
                f"{name}.values is {self.values.dtype}, but {spec.dtype} is stored as {spec.storage_dtype.name}; use quantize()"
            )
        if jnp.dtype(self.scales.dtype) != jnp.dtype(spec.scale_dtype):
            raise TypeError(
                f"{name}.scales is {self.scales.dtype}, but the spec says {spec.scale_dtype}; convert one of them"
            )
        stored = self.values.shape[-1] * spec.codes_per_value
        if self.columns is not None and not 0 <= self.columns <= stored:
            raise ValueError(f"{name}.columns={self.columns} must lie in [0, {stored}], the columns that are stored")
        expected = (*self.shape[:-2], *self.blocks.scales_shape)
        parts = {"scales": self.scales} | ({} if self.zero_points is None else {"zero_points": self.zero_points})
        for part, array in parts.items():
            if tuple(array.shape) != expected:
                raise ValueError(
                    f"{name}.{part} has shape {tuple(array.shape)}, but must be {expected}: granularity={spec.granularity!r}, "
                    f"block={spec.block} of shape {self.shape}, halves={self.halves}"
                )
        if (self.zero_points is not None) != spec.asymmetric:
            has = "no zero_points" if self.zero_points is None else "zero_points"
            raise ValueError(f"{name} has {has}, but the spec says asymmetric={spec.asymmetric}; make them agree")
        if self.zero_points is not None and jnp.dtype(self.zero_points.dtype) != jnp.uint8:
            raise TypeError(f"{name}.zero_points is {self.zero_points.dtype}, but must be uint8, 0 to 15; cast it")
        self._check_global_scale(name)
        return self

    def _check_global_scale(self, name: str) -> None:
        given = self.global_scale
        if (given is not None) != self.spec.has_global_scale:
            has = "no global_scale" if given is None else "a global_scale"
            raise ValueError(
                f"{name} has {has}, but its scales are {self.spec.scale_dtype}; float8_e4m3fn scales have one, no others do"
            )
        if given is None:
            return
        shape = self.shape[:-2] if self.halves == 1 else (*self.shape[:-2], 2)
        if tuple(given.shape) != shape:
            raise ValueError(
                f"{name}.global_scale has shape {tuple(given.shape)}, but must be {shape}: one a matrix, halves={self.halves}"
            )
        if jnp.dtype(given.dtype) != jnp.float32:
            raise TypeError(f"{name}.global_scale is {given.dtype}, but must be float32; cast it")

    def codes(self) -> Shaped[Array, "*B N K"]:
        """The values one by one, unpacked, without filling: for int4 and float4_e2m1fn uint8, 0 to 15."""
        if self.spec.codes_per_value == 2:
            return unpack_int4(self.values, self.shape[-1])
        return self.values[..., : self.shape[-1]]


@functools.partial(jax.jit, static_argnames="dtype")
def _dequantize(array: QuantizedArray, dtype: str) -> Array:
    blocks, batch = array.blocks, array.shape[:-2]
    codes = array.codes()
    codes = blocks.cut(fp4_value(codes) if array.spec.dtype == "float4_e2m1fn" else codes.astype(jnp.float32))
    if array.zero_points is not None:
        codes = codes - blocks.per_block(array.zero_points, batch).astype(jnp.float32)
    elif array.spec.dtype == "int4":
        codes = codes - 8.0
    product = codes * blocks.per_block(scale_to_float32(array.scales), batch)
    if array.global_scale is not None:
        product = product * blocks.per_half(scale_to_float32(array.global_scale), batch)
    return blocks.join(product).astype(dtype)
