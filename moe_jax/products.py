"""The products of a layer and of its gradient, five in all: what they take decides how fast they are.

`moe_jax.expert_gradient` says what is multiplied with what and in which order. Here all operands are of the layer's dtype;
`moe_jax.fp8_products` has those of FP8.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float

from moe_jax.config import MoEConfig
from moe_jax.ops.down_combine import down_combine
from moe_jax.ops.gather import gather
from moe_jax.ops.group_tokens import Groups
from moe_jax.ops.grouped_matmul import grouped_matmul
from moe_jax.ops.input_grad import ActivationGradients, activation_input_grad, input_grad
from moe_jax.ops.weight_grad import weight_grad
from moe_jax.types import ExpertWeights


class Products:
    """In the dtype of the layer.

    Args:
        config: the layer.
        implementation: ``auto``, ``xla``, ``mosaic`` or ``mosaic_interpret``.
    """

    def __init__(self, config: MoEConfig, implementation: str):
        self.config = config
        self.options: dict[str, Any] = {"implementation": implementation}

    def weights(self, experts: ExpertWeights, *, backward: bool) -> tuple[ExpertWeights, ExpertWeights | None]:
        """What the products of the forward direction take, and what is kept for those of the gradient, if there is one."""
        return experts, experts if backward else None

    def up(self, x: Float[Array, "T H"], experts: ExpertWeights, groups: Groups) -> Float[Array, "R N"]:
        """The pre-activations of all rows."""
        rows, by_token = gather(x, groups, **self.options), groups.tokens_as_rows
        return grouped_matmul(rows, experts.w13, groups, bias=experts.w13_bias, tokens_as_rows=by_token, **self.options)

    def down(
        self, h: Float[Array, "R N"], experts: ExpertWeights, groups: Groups, weights: Float[Array, "T k"] | None
    ) -> Float[Array, "T H"]:
        """From the pre-activations to the output of the layer."""
        return down_combine(self.config.act(h), experts.w2, groups, weights, bias=experts.w2_bias, **self.options)

    def cotangents(self, g: Float[Array, "T H"], groups: Groups) -> Any:
        """Those of all rows, as the two products of the down-projection's gradient take them."""
        return gather(g, groups, **self.options)

    def back_to_pre_activation(
        self,
        rows: Any,
        experts: ExpertWeights,
        groups: Groups,
        h: Float[Array, "R N"],
        row_weights: Float[Array, " R"],
    ) -> ActivationGradients:
        """`activation_input_grad` of `cotangents`."""
        act = self.config.act
        return activation_input_grad(rows, experts.w2, groups, h, row_weights, act, **self.options)

    def back_through_up(
        self, dh: Float[Array, "R N"], x: Float[Array, "T H"], experts: ExpertWeights, groups: Groups
    ) -> tuple[Float[Array, "R H"], Float[Array, "E N H"]]:
        """The cotangents of the rows that the up-projection took, and the gradient of ``w13``."""
        rows = input_grad(dh, experts.w13, groups, **self.options)
        return rows, weight_grad(dh, gather(x, groups, **self.options), groups, **self.options)

    def of_w2(self, rows: Any, activated: Float[Array, "R I"], groups: Groups) -> Float[Array, "E H I"]:
        """The gradient of ``w2``, of `cotangents` and the activations times router weights."""
        return weight_grad(rows, activated, groups, **self.options)
