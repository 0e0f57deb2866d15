"""Compiling what runs once."""

from collections.abc import Callable
from typing import Any

import jax


def quick_jit(function: Callable, *, platform: str | None = None, **options: Any) -> Callable:
    """`jax.jit` that on a CPU compiles in half the time, to slower code.

    Example:
        >>> int(quick_jit(lambda x: x + 1)(1))
        2
    """
    quick = {"xla_backend_optimization_level": 0} if (platform or jax.default_backend()) == "cpu" else None
    return jax.jit(function, compiler_options=quick, **options)
