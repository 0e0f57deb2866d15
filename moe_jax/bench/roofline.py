"""What the hardware allows: rates measured in the same run, and the least time of a layer at those rates."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.bench.timing import call_time
from moe_jax.config import MoEConfig
from moe_jax.quantization import QuantFormat, quantize_experts
from moe_jax.types import ExpertWeights

MATRICES = 3  # of a gated expert, each H x I: gate, up, down
BOUND_TOKENS = 128


class Ceilings(NamedTuple):
    """Rates that a simple program reaches on this device.

    Attributes:
        matmul_tflops: of one large dense matmul of what the layer multiplies.
        copy_gb_per_s: of an elementwise operation on a large array, bytes read and bytes written both counted.
        read_gb_per_s: of sums of a large array.
        matmul: dtype of the operands of that matmul; empty if it was not measured.
        matmul_reason: why they are not those of the layer; None if they are.
    """

    matmul_tflops: float
    copy_gb_per_s: float
    read_gb_per_s: float
    matmul: str = ""
    matmul_reason: str | None = None

    @property
    def memory_gb_per_s(self) -> float:
        """The faster of reading and copying."""
        return max(self.copy_gb_per_s, self.read_gb_per_s)


class Floors(NamedTuple):
    """Least microseconds of a layer, by what bounds it."""

    memory_us: float
    compute_us: float

    @property
    def us(self) -> float:
        """No layer is faster than this."""
        return max(self.memory_us, self.compute_us)


def layer_flops(config: MoEConfig, tokens: int) -> float:
    """Floating-point operations of the expert matmuls; nothing for padding."""
    return 2.0 * tokens * config.top_k * MATRICES * config.hidden_size * config.intermediate_size


def expert_bytes(config: MoEConfig, visited: int) -> int:
    """Bytes of the weights of `visited` experts: of their codes and scales, if they are quantized.

    Example:
        >>> expert_bytes(MoEConfig(4, 1, 128, 128), 2), expert_bytes(MoEConfig(4, 1, 128, 128, quantization="fp8_block"), 2)
        (196608, 98328)
    """
    return visited * _bytes_of_one(config)


@functools.cache
def _bytes_of_one(config: MoEConfig) -> int:
    def like(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(config.dtype))

    hidden, intermediate = config.hidden_size, config.intermediate_size
    one = ExpertWeights(like(1, config.w13_rows, hidden), like(1, hidden, intermediate))
    if config.quantization is not None:
        one = jax.eval_shape(functools.partial(quantize_experts, format=config.quantization), one)
    return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(one))


def floors(config: MoEConfig, tokens: int, visited: int, ceilings: Ceilings) -> Floors:
    """The least time: the weights of the visited experts, the hidden states and the logits once through memory; the flops.

    Args:
        config: the layer.
        tokens: T.
        visited: experts that at least one token chose.
        ceilings: from `measure_ceilings`.

    Example:
        >>> config = MoEConfig(2, 1, 1000, 500, dtype="bfloat16")
        >>> floors(config, 100, 2, Ceilings(matmul_tflops=1.0, copy_gb_per_s=100.0, read_gb_per_s=50.0)).compute_us
        300.0
    """
    hidden_states = 2 * tokens * config.hidden_size * jnp.dtype(config.dtype).itemsize  # in and out
    moved = expert_bytes(config, visited) + hidden_states + 4 * tokens * config.num_experts
    return Floors(
        memory_us=moved / ceilings.memory_gb_per_s / 1e3,
        compute_us=layer_flops(config, tokens) / ceilings.matmul_tflops / 1e6,
    )


def bound_us(config: MoEConfig, tokens: int, visited: int, ceilings: Ceilings) -> float | None:
    """What a layer of few tokens may take: 1.10 x (reading the weights of the visited experts + 10 microseconds).

    None for more than 128 tokens, where reading the weights is not all there is.

    Example:
        >>> config = MoEConfig(2, 1, 1000, 500, dtype="bfloat16")
        >>> round(bound_us(config, 1, 1, Ceilings(matmul_tflops=1.0, copy_gb_per_s=9.0, read_gb_per_s=100.0)), 6)
        44.0
    """
    if tokens > BOUND_TOKENS:
        return None
    return 1.10 * (expert_bytes(config, visited) / ceilings.read_gb_per_s / 1e3 + 10.0)


def measure_ceilings(dtype: str, on_gpu: bool, form: QuantFormat | None = None) -> Ceilings:
    """Measures the rates by the clock, calls queued as those of a layer are, so that the clock rate is a sustained one.

    Of two ways to write a program the faster counts: the second operand of the matmul as it is or transposed, the sum of all
    elements or of each row. On a GPU a call takes an eighth of a millisecond or more, so that its launch hides behind the one
    before; larger arrays would leave this process with more of the memory that it shares, for the outputs of queued calls.

    Args:
        dtype: the compute dtype.
        on_gpu: measure at a size for one.
        form: of the experts; what is multiplied are codes, if rows are.
    """
    size, rows = (8192, 2**16) if on_gpu else (512, 2**12)
    matmul_us, matmul, reason = _matmul(size, dtype, on_gpu, form)
    array = jnp.ones((rows, 2048), jnp.float32)
    copy_us = _microseconds(lambda array: array + 1, array)
    read_us = min(_microseconds(jnp.sum, array), _microseconds(lambda array: array.sum(1), array))
    return Ceilings(
        matmul_tflops=2.0 * size**3 / matmul_us / 1e6,
        copy_gb_per_s=2 * array.nbytes / copy_us / 1e3,
        read_gb_per_s=array.nbytes / read_us / 1e3,
        matmul=matmul,
        matmul_reason=reason,
    )


def _matmul(size: int, dtype: str, on_gpu: bool, form: QuantFormat | None) -> tuple[float, str, str | None]:
    """Microseconds of a large matmul, the dtype of its operands, and why that is not the format's."""
    reason = None
    if form is not None and form.row_spec is not None:
        codes = form.row_spec.dtype  # four-bit weights are decoded to that of the rows
        if not on_gpu:
            reason = f"no GPU here, whose {codes} rate would count; the rate is that of {dtype}"
        else:
            try:
                return _fastest_matmul(size, codes), codes, None
            except Exception as failure:  # the layer can be measured without
                what = f"{type(failure).__name__}: {failure}"[:200]
                reason = f"a matmul of {codes} failed ({what}); the rate is that of {dtype}"
    return _fastest_matmul(size, dtype), dtype, reason


def _fastest_matmul(size: int, dtype: str) -> float:
    keys = jax.random.split(jax.random.key(0))
    if dtype == "int8":
        a, b = (jax.random.randint(key, (size, size), -127, 128, "int8") for key in keys)
    else:
        made = "bfloat16" if dtype == "float8_e4m3fn" else dtype
        a, b = (jax.random.normal(key, (size, size), made).astype(dtype) for key in keys)
    out = {"int8": jnp.int32, "float8_e4m3fn": jnp.bfloat16}.get(dtype)
    precision = lax.Precision.HIGHEST if dtype == "float32" else None
    matmul = functools.partial(jnp.matmul, precision=precision, preferred_element_type=out)
    return min(_microseconds(matmul, a, b), _microseconds(lambda a, b: matmul(a, b.T), a, b))


def _microseconds(function: Callable[..., jax.Array], *operands: jax.Array) -> float:
    jitted = jax.jit(function)
    return call_time(lambda: jitted(*operands), seconds=1.0)
