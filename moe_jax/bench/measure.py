"""One row of a result: the layer at one number of tokens, its error first, then its times."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.bench.compiling import Layer, layers_a_call, stack_logits
from moe_jax.bench.expected import Expected, finite, shared_scale, tolerance, wrong_output
from moe_jax.bench.inputs import expert_loads
from moe_jax.bench.roofline import Ceilings, bound_us, expert_bytes, floors, layer_flops
from moe_jax.bench.timing import call_time, kernel_times
from moe_jax.config import MoEConfig
from moe_jax.explain_table import chosen
from moe_jax.explanation import explain
from moe_jax.moe import moe
from moe_jax.types import ExpertWeights

# Of the floating-point operations and of the weights.
MATMUL_SHARES = {"grouped_matmul_up": 2 / 3, "grouped_matmul_down": 1 / 3, "down_combine": 1 / 3}
SMALL_BUFFERS = 2**20  # that routing may take beside the rows


def make_layer(config: MoEConfig, implementation: str) -> Layer:
    """The whole layer, router logits and hidden states in, output out, inside one jit: ``layer(x, weights, logits)``."""
    return Layer(functools.partial(moe, config=config, implementation=implementation))


def measure(
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
    seconds: float = 1.0,
) -> dict[str, Any]:
    """What a row of the result file says about our layer, beside its case.

    A wrong output is not timed. A row with the key ``failed`` says there what is wrong.

    Args:
        config: the layer's.
        layer: from `make_layer`.
        weights: from `make_weights` and `in_format`.
        operands: hidden states and logits, from `make_inputs`.
        expected: what comes out; None for no tokens.
        implementation: what was asked for.
        ceilings: of the device.
        checks: also run what must hold bit for bit: two runs, and a token alone.
        on_gpu: kernel times can be taken.
        seconds: about how long its time is taken.
    """
    x, logits = operands
    tokens = x.shape[0]
    row: dict[str, Any] = {"implementation": _implementations(config, tokens, implementation)}
    if expected is None:
        output = jax.block_until_ready(layer(x, weights, logits))
        row["shape"] = list(output.shape)
        if output.shape != x.shape:
            row["failed"] = f"wrong output: shape {row['shape']}, not {list(x.shape)}"
        return row
    stack, operands = layer.stack_at(tokens), (x, weights, stack_logits(logits))
    output, _ = jax.block_until_ready(stack(*operands))
    if output.shape != x.shape:
        return row | {"failed": f"wrong output: shape {list(output.shape)}, not {list(x.shape)}"}
    sample = output[expected.sample]
    error, unquantized = expected.error(sample), expected.error_unquantized(sample)
    row["error"] = finite(error)
    if unquantized is not None:
        row["error_unquantized"] = finite(unquantized)
    failed = wrong_output(error, tolerance(config))
    if failed:
        return row | {"failed": failed}
    with jax.transfer_guard("disallow"):
        again, _ = jax.block_until_ready(stack(*operands))
    if checks:
        row |= _bit_checks(config, layer, weights, x, logits, output, again) | _memory(config, layer, tokens)
    del output, again
    return row | _times(config, stack, operands, logits, ceilings, on_gpu, seconds)


def _implementations(config: MoEConfig, tokens: int, implementation: str) -> str:
    """What runs; with ``auto`` that may be more than one, by op."""
    if implementation != "auto":
        return implementation
    return " + ".join(sorted(set(chosen(explain(config, tokens)).values())))


def _bit_checks(config: MoEConfig, layer: Layer, weights: ExpertWeights, x, logits, output, again) -> dict[str, Any]:
    found: dict[str, Any] = {"two_runs_bit_equal": bool((again == output).all())}
    if shared_scale(config) is None:
        tokens = x.shape[0]
        picked = sorted({0, tokens // 3, tokens - 1})
        alone = [layer(x[t : t + 1], weights, logits[t : t + 1])[0] for t in picked]
        found["alone_bit_equal"] = all(bool((a == output[t]).all()) for a, t in zip(alone, picked, strict=True))
    broken = [name for name, holds in found.items() if not holds]
    if shared_scale(config) is not None:
        name = config.quantization.name
        found["alone_reason"] = f"not checked: {name} takes one scale from all rows of a batch, other tokens change it"
    return found | ({"failed": f"{' and '.join(broken)} does not hold"} if broken else {})


def _memory(config: MoEConfig, layer: Layer, tokens: int) -> dict[str, int]:
    """Temporary memory of the compiled layer beside what two buffers of rows need; nothing where the backend tells nothing."""
    analyse = getattr(layer.at(tokens), "memory_analysis", lambda: None)
    analysis = analyse()
    if analysis is None:
        return {}
    form = config.quantization
    codes = 0 if form is None or form.is_weight_only else 1  # bytes: rows of both widths are quantized too
    row_bytes = (config.intermediate_size + config.hidden_size) * (jnp.dtype(config.dtype).itemsize + codes)
    return {
        "temp_bytes": analysis.temp_size_in_bytes,
        "temp_bound_bytes": tokens * config.top_k * row_bytes + SMALL_BUFFERS,
    }


def _times(
    config: MoEConfig,
    stack: Any,
    operands: tuple[Any, ...],
    logits: jax.Array,
    ceilings: Ceilings,
    on_gpu: bool,
    seconds: float,
) -> dict[str, Any]:
    tokens = logits.shape[0]
    calls = layers_a_call(tokens)
    loads = expert_loads(config, np.asarray(logits))
    touched = int((loads > 0).sum())
    found: dict[str, Any] = {"touched_experts": touched, "rows_per_expert_max": int(loads.max())}
    least = floors(config, tokens, touched, ceilings)
    layer_us = call_time(lambda: stack(*operands), seconds=seconds) / calls
    if on_gpu:
        try:
            kernels = kernel_times(stack, *operands, layers=calls)
            found |= _rates(kernels, layer_flops(config, tokens), expert_bytes(config, touched), least.us)
        except RuntimeError as error:  # the profiler's; the layer can be timed without
            found["kernels_reason"] = str(error)[:300]
    found["layer_us"] = round(layer_us, 1)
    found["floor_memory_us"] = round(least.memory_us, 2)
    found["floor_compute_us"] = round(least.compute_us, 2)
    found["roofline"] = round(least.us / layer_us, 3)
    bound = bound_us(config, tokens, touched, ceilings)
    return found | ({} if bound is None else {"bound_us": round(bound, 1)})


def _rates(kernels: dict[str, float], flops: float, weight_bytes: int, floor_us: float) -> dict[str, Any]:
    shares = {name: share for name, share in MATMUL_SHARES.items() if name in kernels}
    total = sum(kernels.values())
    return {
        "kernel_us": {n: round(t, 2) for n, t in kernels.items()},
        "kernel_launches": len(kernels),
        "kernel_tflops": {n: round(flops * s / kernels[n] / 1e6, 1) for n, s in shares.items()},
        "weights_gb_per_s": {n: round(weight_bytes * s / kernels[n] / 1e3) for n, s in shares.items()},
        "kernels_total_us": round(total, 1),
        "layer_tflops": round(flops / total / 1e6, 1),
        "kernels_roofline": round(floor_us / total, 3),
    }
