"""Compiling what runs once."""

import functools
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


def quick(**options: Any) -> Callable[[Callable], Callable]:
    """A decorator of functions: `quick_jit`, made at the first call, since importing a module must not start JAX.

    Example:
        >>> @quick(static_argnums=1)
        ... def power(x, exponent):
        ...     return x**exponent
        >>> int(power(3, 2))
        9
    """

    def decorate(function: Callable) -> Callable:
        compiled = functools.cache(lambda: quick_jit(function, **options))

        @functools.wraps(function)
        def call(*arguments: Any) -> Any:
            return compiled()(*arguments)

        return call

    return decorate
