"""Which implementation of an operation runs: asked for by name, or the first without a reason against it.

Names: ``xla`` (plain JAX, any device), ``mosaic`` (our Pallas kernels for Hopper GPUs), ``mosaic_interpret`` (the same kernels
interpreted on a CPU: slow, for tests), ``auto`` (``mosaic`` on a Hopper GPU where the kernel supports the problem, else ``xla``).
On a Blackwell GPU ``auto`` and ``mosaic`` also take the kernels for those, see `blackwell_reason`.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax

from moe_jax import _compat

NAMES = ("auto", "xla", "mosaic", "mosaic_interpret")


class SlowPathWarning(UserWarning):
    """A GPU runs the plain-JAX form of an operation because its kernel does not support the problem."""


def check_name(implementation: str) -> None:
    """Raises ValueError for an implementation that does not exist."""
    if implementation not in NAMES:
        raise ValueError(f"implementation={implementation!r} must be one of {', '.join(NAMES)}")


def platform_reason(platform: str | None = None) -> str | None:
    """Why our kernels cannot run on the device that a jit call runs on (or on `platform`); None if they can.

    Example:
        >>> platform_reason("cpu")
        'platform cpu has no Mosaic GPU kernels'
    """
    if platform is None:
        device = _compat.default_device()
        if device.platform in ("gpu", "cuda"):
            capability = str(getattr(device, "compute_capability", "unknown"))
            return None if capability.startswith("9.") else f"compute capability {capability} is not Hopper's 9.0"
        platform = device.platform
    return None if platform in ("gpu", "cuda", "hopper") else f"platform {platform} has no Mosaic GPU kernels"


def blackwell_reason(platform: str | None = None) -> str | None:
    """Why the kernels for Blackwell GPUs cannot run on the device of a jit call (or on `platform`); None if they can.

    ``auto`` and ``mosaic`` take these where an operation has one and `platform_reason` gives a reason against those for Hopper.

    Example:
        >>> blackwell_reason("cpu"), blackwell_reason("blackwell")
        ('platform cpu is no Blackwell GPU', None)
    """
    if platform is None:
        device = _compat.default_device()
        if device.platform in ("gpu", "cuda"):
            capability = str(getattr(device, "compute_capability", "unknown"))
            return None if capability.startswith("10.") else f"compute capability {capability} is not Blackwell's 10.x"
        platform = device.platform
    if platform in ("gpu", "cuda"):
        return f"platform {platform} is taken for a Hopper GPU, compute capability 9.0, not Blackwell's 10.x"
    return None if platform == "blackwell" else f"platform {platform} is no Blackwell GPU"


@functools.cache
def _warn_once(op: str, reason: str) -> None:
    message = f"{op} runs its plain-JAX form on this GPU, which is slow: {reason}"
    warnings.warn(message, SlowPathWarning, stacklevel=4)


def warn_once(op: str, reason: str) -> None:
    """Warns, once for each reason, that a GPU runs the plain-JAX form of an operation."""
    _warn_once(op, reason)


def choose(op: str, implementation: str, reason: str | None) -> str:
    """``xla``, ``mosaic`` or ``mosaic_interpret``.

    Args:
        op: the operation, for messages.
        implementation: what was asked for.
        reason: why the kernel does not support the problem, None if it does.

    Raises:
        ValueError: an unknown name, or a kernel asked for by name that does not support the problem.
    """
    check_name(implementation)
    if implementation == "xla":
        return "xla"
    if implementation in ("mosaic", "mosaic_interpret"):
        if reason is not None:
            raise ValueError(f"implementation={implementation!r} cannot run {op}: {reason}")
        return implementation
    if platform_reason() is not None:
        return "xla"
    if reason is not None:
        _warn_once(op, reason)
        return "xla"
    return "mosaic"


def interpret_params(chosen: str) -> Any:
    """What a kernel's `interpret` argument must be for the chosen implementation."""
    return _compat.interpret_params() if chosen == "mosaic_interpret" else None


def with_plain_gradient(kernel: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel`, whose derivative is that of the plain-JAX form of the same operation.

    Both take the same positional arrays. Only reverse mode is defined; forward mode raises in JAX.
    """

    @jax.custom_vjp
    def run(*args: Any) -> Any:
        return kernel(*args)

    def forward(*args: Any) -> Any:
        return kernel(*args), args

    def backward(args: Any, cotangent: Any) -> Any:
        return jax.vjp(plain, *args)[1](cotangent)

    run.defvjp(forward, backward)
    return run


def without_gradient(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of arrays, part of a gradient, which has no derivative itself: asked for one it says so.

    Example:
        >>> jax.grad(without_gradient("input_grad", lambda x: x))(1.0)
        Traceback (most recent call last):
        NotImplementedError: input_grad is part of a gradient and has no derivative of its own: kernels are written for the ...
    """

    @jax.custom_jvp
    def run(*args: Any) -> Any:
        return function(*args)

    @run.defjvp
    def derivative(primals: Any, tangents: Any) -> Any:
        del primals, tangents
        raise NotImplementedError(
            f"{name} is part of a gradient and has no derivative of its own: kernels are written for the first derivatives of a "
            "layer only; use moe_jax.reference, which is plain JAX and slow, where second derivatives are needed"
        )

    return run
