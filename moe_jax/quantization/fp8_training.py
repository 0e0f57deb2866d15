"""What of a layer's training runs in FP8: a switch for each direction.

Scales are those of the step itself (current scaling): nothing is kept from one step to the next, and the weights that are
trained stay as they are, in the layer's dtype or in float32. What is quantized, and how:

- Rows of activations and of gradients, on their way into a product that contracts their columns: a scale for each 128 columns of
  a row, so that no token depends on another.
- Weights: a scale for each block of 128 x 128. The gradient of a product's input contracts the other axis of the same weights;
  square blocks have the same codes and scales in both orders (`moe_jax.ops.quantize_both`).
- Both operands of a weight gradient, which contracts rows: a scale for each block of 128 rows of one expert x 128 columns
  (`moe_jax.ops.quantize_transposed`).

These are the granularities of DeepSeek-V3 (arXiv 2412.19437, section 3.3), up to the last, which there is a row of 128 too. All
sums are float32: tensor cores add up 128 products, which are then scaled and added to float32 registers.

``scaling="tensor"`` has one scale instead: of the weights of an expert, and of all rows that a product takes. It comes from the
largest magnitude among the rows of tokens with a local expert, in a pass of its own, and both orders of an operand have the same
codes. What a token becomes then depends on the others of its batch: one that is far larger than they takes precision from all,
and what is small beside the largest becomes zero. Sums of a product with rows and weights stay in the tensor cores over all of
the contracted axis, scaled once at its end; those of weight gradients are promoted as above. Not yet run on a GPU.

Over a mesh the same rows and weights have the same codes as on one device. A rank has all rows of its experts in the order of
tokens, and a part of an expert is whole blocks (`moe_jax.parallel.place_experts`). What differs is where sums are rounded to the
layer's dtype: those over the experts of a token, and with parts of experts those over I, are added up over ranks. Tokens taken in
chunks have blocks of rows of their own; `moe_jax.parallel.Batched` rows have cotangents that their router weights are in already.
Tokens and their cotangents travel in the layer's dtype. With one scale each rank takes that of its own rows and of its experts
or parts of experts, and each chunk that of its own tokens: other codes than on one device, with errors of the same size.
"""

from __future__ import annotations

from dataclasses import dataclass

from jax.typing import DTypeLike

from moe_jax.fields import check_bool, set_field
from moe_jax.quantization.formats import Spec, dtype_name

GROUP = 128  # elements of a contracted axis that share a scale
DTYPE = "float8_e4m3fn"  # of weights and activations
GRADIENT_DTYPES = ("float8_e4m3fn", "float8_e5m2")
SCALINGS = ("block", "tensor")


def rows_spec(dtype: DTypeLike, scaling: str = "block") -> Spec:
    """Of rows whose columns are contracted."""
    return Spec(dtype, "group", GROUP) if scaling == "block" else Spec(dtype, scaling)


def blocks_spec(dtype: DTypeLike, scaling: str = "block") -> Spec:
    """Of weights, and of what contracts rows."""
    return Spec(dtype, "block", (GROUP, GROUP)) if scaling == "block" else Spec(dtype, scaling)


ROWS, BLOCKS = rows_spec(DTYPE), blocks_spec(DTYPE)
TENSOR = blocks_spec(DTYPE, "tensor")


@dataclass(frozen=True)
class Fp8Training:
    """Which products of a layer take FP8 operands; the others keep those of the layer's dtype.

    Weights and activations are float8_e4m3fn. Activation functions, their derivatives, the router and the sums over a token's
    experts are not quantized.

    Attributes:
        forward: both projections.
        input_grad: the gradients of their inputs.
        weight_grad: the gradients of their weights.
        gradient_dtype: of the gradients that come into these products: ``float8_e4m3fn``, or ``float8_e5m2``, which rounds
            them twice as coarsely but reaches further below the largest of those that share a scale: to 2^-32 of it, not 2^-18.
        scaling: what shares a scale: a ``block``, 128 columns of a row or 128 x 128, or the whole ``tensor``, all rows of a
            product or all weights of an expert. With that a token's result depends on the other tokens of its batch.

    Raises:
        TypeError: a switch that is not a bool.
        ValueError: another dtype or scaling.

    Example:
        >>> Fp8Training(weight_grad=False).weight_grad
        False
        >>> Fp8Training(False, False, False).anything
        False
    """

    forward: bool = True
    input_grad: bool = True
    weight_grad: bool = True
    gradient_dtype: DTypeLike = DTYPE
    scaling: str = "block"

    def __post_init__(self) -> None:
        for name in ("forward", "input_grad", "weight_grad"):
            check_bool(self, name)
        set_field(self, "gradient_dtype", dtype_name(self.gradient_dtype))
        if self.gradient_dtype not in GRADIENT_DTYPES:
            raise ValueError(f"gradient_dtype={self.gradient_dtype!r} must be one of {', '.join(GRADIENT_DTYPES)}")
        if self.scaling not in SCALINGS:
            raise ValueError(
                f"scaling={self.scaling!r} must be one of {', '.join(SCALINGS)}; a scale a token or a channel cannot serve both "
                "orders of an operand, take 'block'"
            )

    @property
    def anything(self) -> bool:
        """Whether anything is quantized."""
        return self.forward or self.input_grad or self.weight_grad

    @property
    def contracts_columns(self) -> bool:
        """Whether a grouped matmul takes quantized rows."""
        return self.forward or self.input_grad

    def check(self, hidden_size: int, intermediate_size: int, dtype: str) -> None:
        """Whether a layer can be trained so.

        Raises:
            ValueError: sizes that 128 does not divide, or a dtype that tensor cores do not give.
        """
        if not self.anything:
            return
        for name, size in (("hidden_size", hidden_size), ("intermediate_size", intermediate_size)):
            if size % GROUP:
                raise ValueError(
                    f"fp8_training needs a {name} that is a multiple of {GROUP}, whole blocks of its kernels; got {size}: "
                    "pad the layer (`moe_jax.parallel.place_experts` does it for the parts of ranks), or leave fp8_training None"
                )
        if dtype == "float32":
            raise ValueError(
                "fp8_training with dtype='float32': the products are bfloat16 or float16; use dtype='bfloat16', parameters may "
                "be float32 all the same (param_dtype of the flax layers)"
            )
