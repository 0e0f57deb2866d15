"""What the hardware allows: rates measured in the same run, and the least time of a layer at those rates."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.bench.timing import call_time, kernel_times
from moe_jax.config import MoEConfig

MATRICES = 3  # of a gated expert, each H x I: gate, up, down


class Ceilings(NamedTuple):
    """Rates that a simple program reaches on this device.

    Attributes:
        matmul_tflops: of one large dense matmul in the compute dtype.
        copy_gb_per_s: of an elementwise operation on a large array, bytes read and bytes written both counted.
        read_gb_per_s: of the sum of a large array.
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


def measure_ceilings(dtype: str, on_gpu: bool) -> Ceilings:
    """Measures the rates: on a GPU by kernel time and at sizes that fill it, else by the clock and smaller."""
    size, elements = (8192, 2**28) if on_gpu else (1024, 2**24)
    precision = lax.Precision.HIGHEST if dtype == "float32" else None
    matmul = jax.jit(functools.partial(jnp.matmul, precision=precision))
    operand = jax.random.normal(jax.random.key(0), (size, size), dtype)
    matmul_us = _microseconds(matmul, operand, operand, on_gpu=on_gpu)
    array = jnp.ones(elements, jnp.float32)
    copy_us = _microseconds(jax.jit(lambda a: a + 1), array, on_gpu=on_gpu)
    read_us = _microseconds(jax.jit(jnp.sum), array, on_gpu=on_gpu)
    return Ceilings(
        matmul_tflops=2.0 * size**3 / matmul_us / 1e6,
        copy_gb_per_s=2 * array.nbytes / copy_us / 1e3,
        read_gb_per_s=array.nbytes / read_us / 1e3,
    )


def _microseconds(function, *operands: jax.Array, on_gpu: bool) -> float:
    if on_gpu:
        return sum(kernel_times(function, *operands).values())
    return call_time(lambda: function(*operands))
