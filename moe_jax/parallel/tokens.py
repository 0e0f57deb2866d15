"""Tokens that travel as codes and scales."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

from moe_jax.config import MoEConfig
from moe_jax.ops.gather_quantize import gather_quantize
from moe_jax.quantization.formats import Spec
from moe_jax.quantization.quantize import quantize as quantize_array
from moe_jax.quantization.rounding import scale_to_float32
from moe_jax.types import TopK


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedTokens:
    """Hidden states as codes, each token with its scales beside it.

    Attributes:
        values: ``[T, H]`` of the spec's dtype.
        scales: float32 ``[T, G]``, one for each group of columns, or one alone; ``[]`` where all tokens of all ranks share one,
            which then has no need to travel.
        spec: the number format (static): ``tensor``, ``token`` or ``group``.
    """

    values: Shaped[Array, "T H"] | Any
    scales: Float[Array, "..."] | Any
    spec: Spec = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        """``(T, H)``."""
        return tuple(self.values.shape)


def quantize(
    x: Float[Array, "T H"],
    topk: TopK,
    config: MoEConfig,
    axes: tuple[str, ...],
    scale: Float[Array, ""] | None,
    implementation: str,
) -> QuantizedTokens:
    """The hidden states as codes. One scale for all is that of the tokens of all ranks that visit an expert.

    Args:
        x: ``[T, H]``.
        topk: of the tokens.
        config: gives the number format.
        axes: of the mesh, over which tokens are split.
        scale: of a static format.
        implementation: ``auto``, ``xla``, ``mosaic`` or ``mosaic_interpret``.

    Raises:
        ValueError: the layer does not quantize activations.
    """
    form = config.quantization
    if form is None or form.row_spec is None:
        how = "emulates them: they stay in the layer's dtype" if form is not None and form.emulates else "does not"
        raise ValueError(
            f"quantize_before=True needs a number format that quantizes activations, but config.quantization="
            f"{None if form is None else form.name!r} {how}; leave it False"
        )
    spec = form.row_spec
    if spec.granularity == "tensor":
        if scale is None and not spec.static:
            scale = scale_to_float32(quantize_array(x, spec, valid=(topk.ids >= 0).any(axis=1)).scales)
            scale = lax.pmax(scale, axes) if axes else scale
        rows = gather_quantize(x, None, spec, scales=scale, implementation=implementation)
        return QuantizedTokens(rows.values, jnp.float32(scale), spec)
    rows = gather_quantize(x, None, spec, implementation=implementation)
    return QuantizedTokens(rows.values, rows.scales[:, : x.shape[0]].T, spec)


def travel(move: Callable[[Array], Array], tokens: Any) -> Any:
    """`move` for every array that has a row a token; what all tokens share stays. Codes travel as bytes.

    Example:
        >>> tokens = QuantizedTokens(jnp.ones((2, 4), jnp.float8_e4m3fn), jnp.float32(0.5), Spec("float8_e4m3fn", "tensor"))
        >>> moved = travel(lambda array: jnp.concatenate([array, array]), tokens)
        >>> moved.values.dtype.name, moved.shape, moved.scales.shape
        ('float8_e4m3fn', (4, 4), ())
    """

    def one(array: Array) -> Array:
        if array.ndim == 0:
            return array
        if array.dtype.itemsize == 1 and jnp.issubdtype(array.dtype, jnp.floating):
            return lax.bitcast_convert_type(move(lax.bitcast_convert_type(array, jnp.uint8)), array.dtype)
        return move(array)

    return jax.tree.map(one, tokens)
