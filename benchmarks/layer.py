"""Measures the layer on one GPU: time of every kernel (CUPTI) and of the whole layer inside one jit, with its error beside it.

    python benchmarks/layer.py --out benchmarks/results/NAME.json --commit HASH [--cases A,B] [--tokens 1,16,...] [--checks]

Inputs are random with unit-RMS outputs, routing is what random logits give. The error is the relative Frobenius error of a
sample of tokens against the float32 reference. --checks adds what must hold bit for bit: two runs, and a token alone.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import profiler

from moe_jax import ExpertWeights, MoEConfig, moe, reference

#        name              E    k    H     I
CASES = {
    "mixtral-8x7b": (8, 2, 4096, 14336),
    "qwen3-30b-a3b": (128, 8, 2048, 768),
    "qwen3-235b": (128, 8, 4096, 1536),
    "dsv3-ep8": (
        32,
        1,
        7168,
        2048,
    ),  # one of 8 expert-parallel ranks of DeepSeek-V3: one local expert a token on average
    "gpt-oss-120b": (128, 4, 2880, 2880),
    "odd-sizes": (16, 4, 1040, 528),  # multiples of 16 only
}
REFERENCE_TOKENS = 48


@functools.partial(jax.jit, static_argnums=0)
def make_weights(config: MoEConfig, key: jax.Array) -> ExpertWeights:
    k1, k2 = jax.random.split(key)
    hidden, intermediate, dtype = config.hidden_size, config.intermediate_size, config.dtype
    w13 = jax.random.normal(k1, (config.num_experts, config.w13_rows, hidden), dtype) * hidden**-0.5
    w2 = jax.random.normal(k2, (config.num_experts, hidden, intermediate), dtype) * intermediate**-0.5
    return ExpertWeights(w13.astype(dtype), w2.astype(dtype))


def error(config, weights, x, logits, output) -> float:
    """Relative Frobenius error of a sample of tokens; the weights are taken to float32 an expert at a time."""
    sample = np.unique(np.linspace(0, x.shape[0] - 1, min(REFERENCE_TOKENS, x.shape[0])).astype(int))
    expected = reference.moe(x[sample], weights, logits[sample], config)
    got = output[sample].astype(jnp.float32)
    return float(jnp.linalg.norm(got - expected) / jnp.linalg.norm(expected))


def kernel_times(layer, *operands) -> dict[str, float]:
    """Median microseconds of each kernel of a call, by name; a name that comes twice gets a number."""
    _, runs = profiler.measure(layer, iterations=11, aggregate=False)(*operands)
    columns: dict[str, list[float]] = {}
    for run in runs:
        seen: dict[str, int] = {}
        for name, milliseconds in run:
            seen[name] = seen.get(name, 0) + 1
            key = name.removesuffix("_mosaic_gpu_kernel") + (f"#{seen[name]}" if seen[name] > 1 else "")
            columns.setdefault(key, []).append(milliseconds * 1e3)
    return {name: statistics.median(times) for name, times in columns.items()}


def layer_time(layer, *operands, target: float = 0.15) -> float:
    """Microseconds a call, calls queued one behind the other: what a caller of the jitted layer sees. Median of 5 rounds."""
    jax.block_until_ready(layer(*operands))
    start = time.perf_counter()
    jax.block_until_ready(layer(*operands))
    calls = int(min(200, max(5, target / (time.perf_counter() - start))))
    rounds = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(calls):
            out = layer(*operands)
        jax.block_until_ready(out)
        rounds.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(rounds)


def inputs(config: MoEConfig, tokens: int) -> tuple[jax.Array, jax.Array]:
    kx, kl = jax.random.split(jax.random.key(tokens + 1))
    x = jax.random.normal(kx, (tokens, config.hidden_size), config.dtype)
    return x, jax.random.normal(kl, (tokens, config.num_experts), jnp.float32)


def measure(name: str, tokens: int, config: MoEConfig, layer, weights: ExpertWeights, checks: bool) -> dict:
    top_k, hidden, intermediate, dtype = config.top_k, config.hidden_size, config.intermediate_size, config.dtype
    x, logits = inputs(config, tokens)
    row = {"case": name, "tokens": tokens, "dtype": dtype}
    output = jax.block_until_ready(layer(x, weights, logits))
    if tokens == 0:
        return row | {"shape": list(output.shape)}
    row["error"] = error(config, weights, x, logits, output)
    with jax.transfer_guard("disallow"):
        again = jax.block_until_ready(layer(x, weights, logits))
    if checks:
        row["two_runs_bit_equal"] = bool((again == output).all())
        chosen = sorted({0, tokens // 3, tokens - 1})
        alone = [layer(x[t : t + 1], weights, logits[t : t + 1])[0] for t in chosen]
        row["alone_bit_equal"] = all(bool((a == output[t]).all()) for a, t in zip(alone, chosen, strict=True))
    kernels = kernel_times(layer, x, weights, logits)
    flops = 2.0 * tokens * top_k * 3 * hidden * intermediate
    shares = {"grouped_matmul_up": 2 / 3, "grouped_matmul_down": 1 / 3}  # of the floating-point operations
    visited = len(np.unique(jax.lax.top_k(logits, top_k)[1]))
    weight_bytes = visited * 3 * hidden * intermediate * jnp.dtype(dtype).itemsize
    total = sum(kernels.values())
    return row | {
        "kernel_us": {n: round(t, 2) for n, t in kernels.items()},
        "kernel_tflops": {n: round(flops * s / kernels[n] / 1e6, 1) for n, s in shares.items() if n in kernels},
        "weights_gb_per_s": {n: round(weight_bytes * s / kernels[n] / 1e3) for n, s in shares.items() if n in kernels},
        "kernels_total_us": round(total, 1),
        "layer_us": round(layer_time(layer, x, weights, logits), 1),
        "layer_tflops": round(flops / total / 1e6, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--tokens", default="0,1,16,128,1000,4096")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--checks", action="store_true")
    args = parser.parse_args()
    device = jax.devices()[0]
    result = {
        "device": device.device_kind,
        "jax": jax.__version__,
        "commit": args.commit,
        "date": time.strftime("%Y-%m-%d"),
        "rows": [],
    }
    for name in args.cases.split(","):
        experts, top_k, hidden, intermediate = CASES[name]
        config = MoEConfig(experts, top_k, hidden, intermediate, dtype=args.dtype)
        weights = jax.block_until_ready(make_weights(config, jax.random.key(0)))
        layer = jax.jit(functools.partial(moe, config=config))
        all_tokens = sorted(map(int, args.tokens.split(",")))

        def compile_layer(tokens, layer=layer, weights=weights, config=config):
            x, logits = inputs(config, tokens)
            with contextlib.suppress(Exception):  # it comes again, and is reported, when the layer is measured
                jax.block_until_ready(layer(x, weights, logits))

        with ThreadPoolExecutor(8) as pool:  # most of a kernel's compilation runs outside of Python
            list(pool.map(compile_layer, all_tokens))
        for tokens in all_tokens:
            try:
                row = measure(name, tokens, config, layer, weights, args.checks)
            except Exception as failure:  # one case must not take the others with it
                row = {"case": name, "tokens": tokens, "failed": f"{type(failure).__name__}: {failure}"[:2000]}
            print(json.dumps(row), flush=True)
            result["rows"].append(row)
            args.out.write_text(json.dumps(result, indent=1))
        del weights


if __name__ == "__main__":
    main()
