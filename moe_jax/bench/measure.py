"""One row of a result: the layer at one number of tokens, its error first, then its times."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import reference
from moe_jax.bench.cases import Case
from moe_jax.bench.roofline import Ceilings, expert_bytes, floors, layer_flops
from moe_jax.bench.timing import call_time, kernel_times
from moe_jax.config import MoEConfig
from moe_jax.explain_table import chosen
from moe_jax.explanation import explain
from moe_jax.moe import moe
from moe_jax.types import ExpertWeights

REFERENCE_TOKENS = 48  # compared with the reference, which is slow
# Largest relative error that is rounding: inputs, hidden rows and outputs are rounded once each.
TOLERANCE = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-5}
# Of the floating-point operations and of the weights.
MATMUL_SHARES = {"grouped_matmul_up": 2 / 3, "grouped_matmul_down": 1 / 3}

Layer = Callable[..., Any]


def make_layer(config: MoEConfig, implementation: str) -> Layer:
    """The whole layer, router logits and hidden states in, output out, inside one jit: ``layer(x, weights, logits)``."""
    return jax.jit(functools.partial(moe, config=config, implementation=implementation))


@functools.partial(jax.jit, static_argnums=0)
def make_weights(config: MoEConfig, key: jax.Array) -> ExpertWeights:
    """Random weights, made on the device, that keep the RMS of what passes through them near that of the input."""
    k1, k2 = jax.random.split(key)
    hidden, intermediate, dtype = config.hidden_size, config.intermediate_size, config.dtype
    w13 = jax.random.normal(k1, (config.num_experts, config.w13_rows, hidden), dtype) * hidden**-0.5
    w2 = jax.random.normal(k2, (config.num_experts, hidden, intermediate), dtype) * intermediate**-0.5
    return ExpertWeights(w13.astype(dtype), w2.astype(dtype))


def make_inputs(config: MoEConfig, tokens: int) -> tuple[jax.Array, jax.Array]:
    """Random hidden states and router logits: each token's experts are drawn uniformly."""
    kx, kl = jax.random.split(jax.random.key(tokens + 1))
    x = jax.random.normal(kx, (tokens, config.hidden_size), config.dtype)
    return x, jax.random.normal(kl, (tokens, config.num_experts), jnp.float32)


class Expected:
    """What the float32 reference makes of a sample of the tokens; computed once, compared with every implementation."""

    def __init__(self, config: MoEConfig, weights: ExpertWeights, x: jax.Array, logits: jax.Array):
        self.sample = np.unique(np.linspace(0, x.shape[0] - 1, min(REFERENCE_TOKENS, x.shape[0])).astype(int))
        self.output = reference.moe(x[self.sample], weights, logits[self.sample], config)

    def error(self, output: Any) -> float:
        """Relative Frobenius error of the sample."""
        got = output[self.sample].astype(jnp.float32)
        return float(jnp.linalg.norm(got - self.output) / jnp.linalg.norm(self.output))


def wrong_output(error: float, dtype: str) -> str | None:
    """Why an output with this error cannot be counted, or None.

    Example:
        >>> wrong_output(0.003, "bfloat16"), wrong_output(0.5, "bfloat16")
        (None, 'wrong output: relative error 0.5 is more than 0.01')
    """
    if error <= TOLERANCE[dtype]:
        return None
    return f"wrong output: relative error {error:.2g} is more than {TOLERANCE[dtype]:g}"


def compile_all(layer: Layer, config: MoEConfig, weights: ExpertWeights, tokens: Sequence[int]) -> None:
    """Compiles the layer for all numbers of tokens side by side: most of a kernel's compilation runs outside of Python."""

    def compile_one(count: int) -> None:
        x, logits = make_inputs(config, count)
        with contextlib.suppress(Exception):  # it comes again, and is reported, when the layer is measured
            jax.block_until_ready(layer(x, weights, logits))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(compile_one, tokens))


def measure(
    case: Case,
    config: MoEConfig,
    layer: Layer,
    weights: ExpertWeights,
    operands: tuple[jax.Array, jax.Array],
    expected: Expected | None,
    *,
    implementation: str,
    ceilings: Ceilings,
    checks: bool,
    on_gpu: bool,
) -> dict[str, Any]:
    """The row of one case and number of tokens, as it goes into the result file.

    A wrong output is not timed. A row with the key ``failed`` says there what is wrong.

    Args:
        case: names the row.
        config: the layer's.
        layer: from `make_layer`.
        weights: from `make_weights`.
        operands: hidden states and logits, from `make_inputs`.
        expected: what comes out; None for no tokens.
        implementation: what was asked for.
        ceilings: of the device.
        checks: also run what must hold bit for bit: two runs, and a token alone.
        on_gpu: kernel times can be taken.
    """
    x, logits = operands
    tokens = x.shape[0]
    row = {"case": case.name, "tokens": tokens, "dtype": config.dtype}
    row["implementation"] = _implementations(config, tokens, implementation)
    output = jax.block_until_ready(layer(x, weights, logits))
    if output.shape != x.shape:
        return row | {"failed": f"wrong output: shape {list(output.shape)}, not {list(x.shape)}"}
    if expected is None:
        return row | {"shape": list(output.shape)}
    error = expected.error(output)
    row["error"] = error if math.isfinite(error) else None
    failed = wrong_output(error, config.dtype)
    if failed:
        return row | {"failed": failed}
    with jax.transfer_guard("disallow"):
        again = jax.block_until_ready(layer(x, weights, logits))
    if checks:
        row |= _bit_checks(layer, weights, x, logits, output, again)
    return row | _times(config, layer, weights, x, logits, ceilings, on_gpu)


def _implementations(config: MoEConfig, tokens: int, implementation: str) -> str:
    """What runs; with ``auto`` that may be more than one, by op."""
    if implementation != "auto":
        return implementation
    return " + ".join(sorted(set(chosen(explain(config, tokens)).values())))


def _bit_checks(layer: Layer, weights: ExpertWeights, x, logits, output, again) -> dict[str, Any]:
    tokens = x.shape[0]
    picked = sorted({0, tokens // 3, tokens - 1})
    alone = [layer(x[t : t + 1], weights, logits[t : t + 1])[0] for t in picked]
    found: dict[str, Any] = {
        "two_runs_bit_equal": bool((again == output).all()),
        "alone_bit_equal": all(bool((a == output[t]).all()) for a, t in zip(alone, picked, strict=True)),
    }
    broken = [name for name, holds in found.items() if not holds]
    return found | ({"failed": f"{' and '.join(broken)} does not hold"} if broken else {})


def _times(
    config: MoEConfig, layer: Layer, weights: ExpertWeights, x, logits, ceilings: Ceilings, on_gpu: bool
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    flops = layer_flops(config, x.shape[0])
    visited = len(np.unique(jax.lax.top_k(logits, config.top_k)[1]))
    least = floors(config, x.shape[0], visited, ceilings)
    if on_gpu:
        kernels = kernel_times(layer, x, weights, logits)
        shares = {name: share for name, share in MATMUL_SHARES.items() if name in kernels}
        moved = expert_bytes(config, visited)
        total = sum(kernels.values())
        found["kernel_us"] = {n: round(t, 2) for n, t in kernels.items()}
        found["kernel_tflops"] = {n: round(flops * s / kernels[n] / 1e6, 1) for n, s in shares.items()}
        found["weights_gb_per_s"] = {n: round(moved * s / kernels[n] / 1e3) for n, s in shares.items()}
        found["kernels_total_us"] = round(total, 1)
        found["layer_tflops"] = round(flops / total / 1e6, 1)
        found["kernels_roofline"] = round(least.us / total, 3)
    layer_us = call_time(lambda: layer(x, weights, logits))
    found["layer_us"] = round(layer_us, 1)
    found["floor_memory_us"] = round(least.memory_us, 2)
    found["floor_compute_us"] = round(least.compute_us, 2)
    found["roofline"] = round(least.us / layer_us, 3)
    return found
