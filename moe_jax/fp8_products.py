"""The products of a layer and of its gradient with FP8 operands: which ones, and scaled how, says `moe_jax.Fp8Training`.

What lies between the products is that of any layer, in bfloat16 and float32. Weights are quantized once a step: the gradient of
an input takes the codes of the forward direction, transposed, so it is the derivative of the very product that was computed.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.config import MoEConfig
from moe_jax.ops.combine import combine
from moe_jax.ops.gather import gather
from moe_jax.ops.group_tokens import Groups
from moe_jax.ops.grouped_matmul import grouped_matmul
from moe_jax.ops.input_grad import ActivationGradients, input_grad, through_activation
from moe_jax.ops.quantize_both import quantize_both
from moe_jax.ops.quantize_rows import quantize_rows, quantize_tokens, shared_scale
from moe_jax.ops.quantize_transposed import quantize_rows_both, quantize_transposed
from moe_jax.ops.weight_grad import weight_grad
from moe_jax.products import Products
from moe_jax.quantization.array import QuantizedArray
from moe_jax.quantization.fp8_training import DTYPE, blocks_spec, rows_spec
from moe_jax.quantization.rows import QuantizedRows
from moe_jax.types import ExpertWeights


class Fp8Products(Products):
    """Those that `config.fp8_training` names in FP8, the others as `Products`."""

    def __init__(self, config: MoEConfig, implementation: str):
        super().__init__(config, implementation)
        self._scaling, self._gradient_dtype = config.fp8_training.scaling, config.fp8_training.gradient_dtype

    def weights(self, experts: ExpertWeights, *, backward: bool) -> tuple[ExpertWeights, ExpertWeights | None]:
        """Quantized where FP8 products take them: for the gradient transposed, ``w13`` ``[E, H, N]`` and ``w2`` ``[E, I, H]``."""
        fp8, here, later = self.config.fp8_training, experts, experts if backward else None
        transposed = backward and fp8.input_grad
        if not fp8.forward and not transposed:
            return here, later
        spec, options = blocks_spec(DTYPE, self._scaling), {"natural": fp8.forward, "transposed": transposed}
        found = {name: quantize_both(getattr(experts, name), spec, **options, **self.options) for name in ("w13", "w2")}
        if fp8.forward:
            here = dataclasses.replace(here, **{name: natural for name, (natural, _) in found.items()})
        if transposed:
            later = dataclasses.replace(later, **{name: other for name, (_, other) in found.items()})
        return here, later

    def up(self, x: Float[Array, "T H"], experts: ExpertWeights, groups: Groups) -> Float[Array, "R N"]:
        """The pre-activations of all rows."""
        if not self.config.fp8_training.forward:
            return super().up(x, experts, groups)
        rows, _ = self._quantize(x, groups, by_token=True, as_rows=True)
        return self._multiply(rows, experts.w13, groups, experts.w13_bias, tokens_as_rows=groups.tokens_as_rows)

    def down(
        self, h: Float[Array, "R N"], experts: ExpertWeights, groups: Groups, weights: Float[Array, "T k"] | None
    ) -> Float[Array, "T H"]:
        """From the pre-activations to the output of the layer."""
        if not self.config.fp8_training.forward:
            return super().down(h, experts, groups, weights)
        hidden, _ = self._quantize(self.config.act(h), groups, as_rows=True)
        rows = self._multiply(hidden, experts.w2, groups, experts.w2_bias)
        return combine(rows, groups.positions, weights, **self.options)

    def cotangents(self, g: Float[Array, "T H"], groups: Groups) -> tuple[Any, Any]:
        """By row, once for the product that contracts H and once for the one that contracts rows."""
        fp8 = self.config.fp8_training
        rows, columns = self._quantize(
            g, groups, self._gradient_dtype, by_token=True, as_rows=fp8.input_grad, as_columns=fp8.weight_grad
        )
        if rows is None or columns is None:
            gathered = gather(g, groups, **self.options)
            rows, columns = (gathered if quantized is None else quantized for quantized in (rows, columns))
        return rows, columns

    def back_to_pre_activation(
        self,
        rows: tuple[Any, Any],
        experts: ExpertWeights,
        groups: Groups,
        h: Float[Array, "R N"],
        row_weights: Float[Array, " R"],
    ) -> ActivationGradients:
        """`activation_input_grad` of `cotangents`."""
        if not self.config.fp8_training.input_grad:
            return super().back_to_pre_activation(rows[0], experts, groups, h, row_weights)
        product = self._multiply(rows[0], experts.w2, groups)
        return through_activation(product, h, row_weights, self.config.act, **self.options)

    def back_through_up(
        self, dh: Float[Array, "R N"], x: Float[Array, "T H"], experts: ExpertWeights, groups: Groups
    ) -> tuple[Float[Array, "R H"], Float[Array, "E N H"]]:
        """The cotangents of the rows that the up-projection took, and the gradient of ``w13``."""
        fp8 = self.config.fp8_training
        rows, columns = self._quantize(
            dh, groups, self._gradient_dtype, as_rows=fp8.input_grad, as_columns=fp8.weight_grad
        )
        back = self._multiply if fp8.input_grad else functools.partial(input_grad, **self.options)
        if fp8.weight_grad:
            _, gathered = self._quantize(x, groups, by_token=True, as_columns=True)
        else:
            gathered = gather(x, groups, **self.options)
        rows, columns = (dh if quantized is None else quantized for quantized in (rows, columns))
        return back(rows, experts.w13, groups), self._contract_rows(columns, gathered, groups)

    def of_w2(self, rows: tuple[Any, Any], activated: Float[Array, "R I"], groups: Groups) -> Float[Array, "E H I"]:
        """The gradient of ``w2``, of `cotangents` and the activations times router weights."""
        if not self.config.fp8_training.weight_grad:
            return super().of_w2(rows[1], activated, groups)
        _, columns = self._quantize(activated, groups, as_columns=True)
        return self._contract_rows(rows[1], columns, groups)

    def _quantize(
        self,
        rows: Float[Array, "R_or_T M"],
        groups: Groups,
        dtype: str = DTYPE,
        *,
        by_token: bool = False,
        as_rows: bool = False,
        as_columns: bool = False,
    ) -> tuple[QuantizedRows | None, QuantizedArray | None]:
        """For a product that contracts columns and for one that contracts rows, None where that is not asked for."""
        if not as_rows and not as_columns:
            return None, None
        spec, scale = rows_spec(dtype, self._scaling), None
        if self._scaling == "tensor":
            scale = shared_scale(rows, spec, groups, by_token=by_token)
        both = {"dtype": dtype, "by_token": by_token, "scale": scale, **self.options}
        if as_rows and as_columns:
            return quantize_rows_both(rows, groups, **both)
        if as_columns:
            return None, quantize_transposed(rows, groups, **both)
        alone = quantize_tokens if by_token else quantize_rows
        return alone(rows, spec, groups=groups, scales=scale, **self.options), None

    def _contract_rows(self, left: Any, right: Any, groups: Groups) -> Float[Array, "E M N"]:
        return weight_grad(left, right, groups, out_dtype=self.config.dtype, **self.options)

    def _multiply(
        self,
        rows: QuantizedRows,
        weights: QuantizedArray,
        groups: Groups,
        bias: Float[Array, "E N"] | None = None,
        *,
        tokens_as_rows: bool = False,
    ) -> Float[Array, "R N"]:
        return grouped_matmul(
            rows,
            weights,
            groups,
            bias=bias,
            tokens_as_rows=tokens_as_rows,
            out_dtype=jnp.dtype(self.config.dtype),
            **self.options,
        )
