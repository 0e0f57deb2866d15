"""How times are taken: kernels by CUPTI, calls by the clock with many of them queued."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

from moe_jax import _compat

ROUNDS = 5
ROUND_SECONDS = 0.15
BUDGET_SECONDS = 3.0  # when a call is so slow that the rounds take longer, fewer of them count


def kernel_times(layer: Callable[..., Any], *operands: Any) -> dict[str, float]:
    """Median microseconds of each kernel of a call, by name; a name that comes twice gets a number. Needs a GPU.

    Raises:
        RuntimeError: CUPTI saw no kernel.
    """
    columns: dict[str, list[float]] = {}
    for run in _compat.measure_kernels(layer, *operands):
        seen: dict[str, int] = {}
        for name, milliseconds in run:
            seen[name] = seen.get(name, 0) + 1
            key = name.removesuffix("_mosaic_gpu_kernel") + (f"#{seen[name]}" if seen[name] > 1 else "")
            columns.setdefault(key, []).append(milliseconds * 1e3)
    if not columns:
        raise RuntimeError(
            "CUPTI saw no kernel of this call; it serves one profiler at a time, so run without any other"
        )
    return {name: statistics.median(times) for name, times in columns.items()}


def call_time(call: Callable[[], Any], wait: Callable[[Any], Any] = jax.block_until_ready) -> float:
    """Microseconds a call, calls queued one behind the other: what a caller of a jitted layer sees. Median of 5 rounds.

    One of them at least, however slow the call is.

    Args:
        call: starts the work; need not wait for it.
        wait: given what the last call returned, returns when its work is done.

    Example:
        >>> call_time(lambda: None) >= 0
        True
    """
    wait(call())
    start = time.perf_counter()
    wait(call())
    seconds = time.perf_counter() - start
    calls = int(min(200, max(5 if seconds < BUDGET_SECONDS / 25 else 1, ROUND_SECONDS / seconds)))
    rounds: list[float] = []
    while len(rounds) < ROUNDS and sum(rounds) * calls < BUDGET_SECONDS * 1e6:
        start = time.perf_counter()
        for _ in range(calls):
            out = call()
        wait(out)
        rounds.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(rounds)
