"""How times are taken: kernels by CUPTI, calls by the clock with many of them queued."""

from __future__ import annotations

import collections
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

from moe_jax import _compat

ROUNDS = 5
ROUND_SECONDS = 0.15
BUDGET_SECONDS = 3.0
ITERATIONS = 11  # under CUPTI


def kernel_times(
    layer: Callable[..., Any], *operands: Any, layers: int = 1, iterations: int = ITERATIONS
) -> dict[str, float]:
    """Median microseconds of each kernel of a layer, by name; a name that comes twice gets a number. Needs a GPU.

    Args:
        layer: jitted or compiled.
        operands: of the layer.
        layers: that a call runs one after the other, with the same kernels.
        iterations: calls measured, after one that is not; at least 2.

    Raises:
        RuntimeError: CUPTI saw no kernel, or not the same ones in every layer.
    """
    columns: dict[str, list[float]] = {}
    for run in _compat.measure_kernels(layer, *operands, iterations=max(2, iterations)):
        total, seen = collections.Counter(name for name, _ in run), collections.Counter()
        if any(number % layers for number in total.values()):
            raise RuntimeError(f"CUPTI saw {dict(total)} in a call of {layers} layers, not the same kernels in each")
        for name, milliseconds in run:
            # By name: the routing of a layer waits for no other layer, and may run before those.
            nth = seen[name] % (total[name] // layers) + 1
            seen[name] += 1
            key = name.removesuffix("_mosaic_gpu_kernel") + (f"#{nth}" if nth > 1 else "")
            columns.setdefault(key, []).append(milliseconds * 1e3)
    if not columns:
        raise RuntimeError(
            "CUPTI saw no kernel of this call; it serves one profiler at a time, so run without any other"
        )
    return {name: statistics.median(times) for name, times in columns.items()}


def call_time(
    call: Callable[[], Any], wait: Callable[[Any], Any] = jax.block_until_ready, seconds: float = BUDGET_SECONDS
) -> float:
    """Microseconds a call, calls queued one behind the other: what a caller of a jitted layer sees. Median of 5 rounds.

    Args:
        call: starts the work; need not wait for it.
        wait: given what the last call returned, returns when its work is done.
        seconds: about what the measurement may take. When the rounds take longer fewer of them count, and where one call
            takes half of it, that call alone: two calls are always made, the first to warm up.

    Example:
        >>> call_time(lambda: None) >= 0
        True
    """
    wait(call())
    start = time.perf_counter()
    wait(call())
    once = time.perf_counter() - start
    if once > seconds / 2:
        return once * 1e6
    calls = int(min(200, max(1, min(ROUND_SECONDS, seconds / ROUNDS) / once)))
    rounds: list[float] = []
    while len(rounds) < ROUNDS and sum(rounds) * calls < seconds * 1e6:
        start = time.perf_counter()
        for _ in range(calls):
            out = call()
        wait(out)
        rounds.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(rounds)
