"""Activations as a quantized matmul would see them, where no kernel takes their codes: quantized, dequantized, rounded."""

from __future__ import annotations

from jaxtyping import Array, Bool, Float

from moe_jax.ops import implementation as impl
from moe_jax.quantization.formats import Spec
from moe_jax.quantization.quantize import fake_quantize_activations


def emulate_rows(
    rows: Float[Array, "R K"],
    spec: Spec,
    *,
    scale: Float[Array, ""] | None = None,
    valid: Bool[Array, " R"] | None = None,
    implementation: str = "auto",
) -> Float[Array, "R K"]:
    """Rows quantized and dequantized, in the dtype they came in; each by itself, so rows of no group change none.

    Plain JAX on every device: this is for the study of accuracy, and a GPU is told so.

    Args:
        rows: ``[R, K]``, of tokens or of groups.
        spec: of four-bit activations.
        scale: the global scale of a static spec.
        valid: rows that count; the others become zero. All of them by default.
        implementation: ``auto``, ``xla``, ``mosaic`` or ``mosaic_interpret``; kernels then run around it.

    Example:
        >>> import jax.numpy as jnp
        >>> emulate_rows(jnp.array([[6.0, 2.4, -0.2]]), Spec("float4_e2m1fn", "group", 32, "float8_e8m0fnu")).tolist()
        [[6.0, 2.0, -0.0]]
    """
    impl.check_name(implementation)
    if implementation != "xla":
        impl.choose(
            "emulate_rows", "auto", f"{spec.dtype} activations have no kernel on Hopper GPUs; they are emulated"
        )
    return fake_quantize_activations(rows, spec, scales=scale, valid=valid)
