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

MATRICES = 3  # of a gated expert, each H x I: gate, up, down
BOUND_TOKENS = 128


class Ceilings(NamedTuple):
    """Rates that a simple program reaches on this device.

    Attributes:
        matmul_tflops: of one large dense matmul in the compute dtype.
        copy_gb_per_s: of an elementwise operation on a large array, bytes read and bytes written both counted.
        read_gb_per_s: of sums of a large array.
    """

    matmul_tflops: float
    copy_gb_per_s: float
    read_gb_per_s: float

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
    """Bytes of the weights of `visited` experts."""
    return visited * MATRICES * config.hidden_size * config.intermediate_size * jnp.dtype(config.dtype).itemsize


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


def measure_ceilings(dtype: str, on_gpu: bool) -> Ceilings:
    """Measures the rates by the clock, calls queued as those of a layer are, so that the clock rate is a sustained one.

    Of two ways to write a program the faster counts: the second operand of the matmul as it is or transposed, the sum of all
    elements or of each row. On a GPU a call takes an eighth of a millisecond or more, so that its launch hides behind the one
    before; larger arrays would leave this process with more of the memory that it shares, for the outputs of queued calls.
    """
    size, rows = (8192, 2**16) if on_gpu else (512, 2**12)
    precision = lax.Precision.HIGHEST if dtype == "float32" else None
    a, b = (jax.random.normal(key, (size, size), dtype) for key in jax.random.split(jax.random.key(0)))
    array = jnp.ones((rows, 2048), jnp.float32)
    matmul_us = min(
        _microseconds(functools.partial(jnp.matmul, precision=precision), a, b),
        _microseconds(lambda a, b: jnp.matmul(a, b.T, precision=precision), a, b),
    )
    copy_us = _microseconds(lambda array: array + 1, array)
    read_us = min(_microseconds(jnp.sum, array), _microseconds(lambda array: array.sum(1), array))
    return Ceilings(
        matmul_tflops=2.0 * size**3 / matmul_us / 1e6,
        copy_gb_per_s=2 * array.nbytes / copy_us / 1e3,
        read_gb_per_s=array.nbytes / read_us / 1e3,
    )


def _microseconds(function: Callable[..., jax.Array], *operands: jax.Array) -> float:
    jitted = jax.jit(function)
    return call_time(lambda: jitted(*operands), seconds=1.0)
