"""`QuantizedRows`: rows of activations as codes and scales, laid out as grouped matmuls read them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from moe_jax.quantization.formats import Spec
from moe_jax.quantization.fp4 import fp4_value
from moe_jax.quantization.packing import unpack_int4


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedRows:
    """Rows as codes, and their scales on the side, those of neighbouring rows next to each other.

    Attributes:
        values: ``[R, K]`` of the spec's dtype; float4_e2m1fn are uint8 ``[R, K / 2]``, the even column in the low nibble.
        scales: float32 ``[G, R and more]``, one line for each group of columns, or one alone: a kernel reads a tile of rows that
            begins with any of them. Undefined past R. Powers of two, if the format has only these, are float32 too, and so are
            float8_e4m3fn.
        spec: the number format (static): ``tensor``, ``token`` or ``group``.
        global_scale: float32, by which scales that are float8_e4m3fn are multiplied: one a row ``[R]``, or for all ``[]``; None
            otherwise.

    Example:
        >>> rows = QuantizedRows(jnp.ones((2, 4), jnp.int8), jnp.array([[2.0, 3.0, 0.0]]), Spec("int8", "token"))
        >>> rows.dequantize()[:, 0].tolist()
        [2.0, 3.0]
    """

    values: Shaped[Array, "R K"] | Any
    scales: Float[Array, "G padded"] | Any
    spec: Spec = field(metadata={"static": True})
    global_scale: Float[Array, "..."] | Any | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """``(R, K)``."""
        rows, stored = self.values.shape
        return rows, stored * self.spec.codes_per_value

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.values.size

    def dequantize(self) -> Float[Array, "R K"]:
        """What they stand for, in float32."""
        rows, columns = self.shape
        group = self.spec.block[1] if self.spec.granularity == "group" else columns
        scales = jnp.repeat(self.scales[:, :rows].T, max(1, group), axis=1)[:, :columns]
        packed = self.spec.dtype == "float4_e2m1fn"
        codes = fp4_value(unpack_int4(self.values, columns)) if packed else self.values.astype(jnp.float32)
        if self.global_scale is None:
            return codes * scales
        of_rows = jnp.broadcast_to(self.global_scale, (rows,))
        return codes * scales * of_rows[:, None]
