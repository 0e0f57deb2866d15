"""Activations between the two expert matmuls, written with the few elementwise operations that GPU kernels also have.

The same `Activation` runs in plain JAX and inside the kernels, on float32 registers, so it only uses exponentials,
tanh, erf, minima, maxima and arithmetic. Gate and up are the first and the second half of a row of ``w13``; checkpoints
that interleave them (gpt-oss) are put in this order when they are loaded.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

ACTIVATIONS: tuple[str, ...] = (
    "silu",
    "gelu",
    "gelu_tanh",
    "relu2",
    "swigluoai",
    "swiglustep",
    "silu_no_mul",
    "gelu_no_mul",
    "gelu_tanh_no_mul",
    "relu2_no_mul",
)
ALIASES = {"swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}

Divide = Callable[[Array, Array], Array]

_PARAMETERS = {
    "silu": ("alpha", "beta", "limit"),
    "swigluoai": ("alpha", "beta", "limit"),
    "swiglustep": ("limit",),
}
_DEFAULTS = {
    "swigluoai": {"alpha": 1.702, "beta": 1.0, "limit": 7.0},
    "swiglustep": {"limit": 7.0},
}

# exp(88) is about the last power that float32 holds: without this bound exp(-x) overflows to inf for x < -88 and the
# gradient of x / (1 + exp(-x)) becomes 0 * inf.
_MAX_EXPONENT = 88.0


def _sigmoid_denominator(x: Array, scale: float = 1.0) -> Array:
    """``1 + exp(-scale * x)``: ``x`` divided by it is ``x * sigmoid(scale * x)``."""
    return 1.0 + jnp.exp(jnp.minimum(-scale * x, _MAX_EXPONENT))


def _silu(x: Array, divide: Divide = jnp.divide) -> Array:
    return divide(x, _sigmoid_denominator(x))


def _gelu(x: Array, divide: Divide = jnp.divide) -> Array:
    del divide
    return 0.5 * x * (1.0 + lax.erf(x * math.sqrt(0.5)))


def _gelu_tanh(x: Array, divide: Divide = jnp.divide) -> Array:
    del divide
    return 0.5 * x * (1.0 + jnp.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x)))


def _relu2(x: Array, divide: Divide = jnp.divide) -> Array:
    del divide
    r = jnp.maximum(x, 0.0)
    return r * r


_POINTWISE = {"silu": _silu, "gelu": _gelu, "gelu_tanh": _gelu_tanh, "relu2": _relu2}


def _silu_slope(x: Array, scale: float = 1.0) -> tuple[Array, Array]:
    sigmoid = 1 / _sigmoid_denominator(x, scale)
    value = x * sigmoid
    return value, sigmoid + scale * value * (1.0 - sigmoid)


def _gelu_slope(x: Array) -> tuple[Array, Array]:
    below = 0.5 * (1.0 + lax.erf(x * math.sqrt(0.5)))
    return x * below, below + x * (jnp.exp(-0.5 * x * x) * math.sqrt(0.5 / math.pi))


def _gelu_tanh_slope(x: Array) -> tuple[Array, Array]:
    inner, cube = math.sqrt(2.0 / math.pi), 0.044715
    t = jnp.tanh(inner * (x + cube * x * x * x))
    half = 0.5 * (1.0 + t)
    return x * half, half + x * half * (1.0 - t) * inner * (1.0 + 3.0 * cube * x * x)


def _relu2_slope(x: Array) -> tuple[Array, Array]:
    r = jnp.maximum(x, 0.0)
    return r * r, 2.0 * r


# The value and the slope.
_SLOPES = {"silu": _silu_slope, "gelu": _gelu_slope, "gelu_tanh": _gelu_tanh_slope, "relu2": _relu2_slope}


def _clamp(x: Array, limit: float | None) -> Array:
    return x if limit is None else jnp.minimum(jnp.maximum(x, -limit), limit)


def _where_below(x: Array, limit: float | None, slope: Array) -> Array:
    """The slope of a function of ``minimum(x, limit)``: half of it where both are equal, as in JAX."""
    if limit is None:
        return slope
    return jnp.where(x < limit, slope, jnp.where(x > limit, 0.0, 0.5) * slope)


def _where_within(x: Array, limit: float | None, slope: Array) -> Array:
    """The slope of a function of ``_clamp(x, limit)``."""
    return slope if limit is None else _where_below(-x, limit, _where_below(x, limit, slope))


def canonical_name(name: str) -> str:
    """The name under which `ACTIVATIONS` lists an activation; aliases of Hugging Face configs are resolved.

    Raises:
        ValueError: the name is not known; the message lists those that are.

    Example:
        >>> canonical_name("gelu_pytorch_tanh")
        'gelu_tanh'
    """
    resolved = ALIASES.get(name, name)
    if resolved not in ACTIVATIONS:
        raise ValueError(f"activation={name!r} is not one of {', '.join(ACTIVATIONS)} (or {', '.join(ALIASES)})")
    return resolved


@dataclass(frozen=True)
class Activation:
    """An activation with its parameters resolved; hashable, so that kernels can be specialised on it.

    Make one with `get_activation` or take `MoEConfig.act`.

    Attributes:
        name: one of `ACTIVATIONS`.
        alpha: factor inside the sigmoid, ``g * sigmoid(alpha * g)``; None is 1.
        beta: added to up; None is 0.
        limit: the clamp of gate (from above) and up (from both sides); None is no clamp.

    Example:
        >>> import jax.numpy as jnp
        >>> act = Activation("relu2_no_mul")
        >>> act(jnp.array([[-1.0, 3.0]])).tolist()
        [[0.0, 9.0]]
    """

    name: str
    alpha: float | None = None
    beta: float | None = None
    limit: float | None = None

    @property
    def is_gated(self) -> bool:
        """Whether a row of the up-projection holds gate and up (2I wide) or only one half (I wide)."""
        return not self.name.endswith("_no_mul")

    def apply_gated(
        self, gate: Float[Array, "*B"], up: Float[Array, "*B"], divide: Divide = jnp.divide
    ) -> Float[Array, "*B"]:
        """The gated activation of two halves, in their own dtype (kernels pass float32, and a division as fast as theirs).

        Raises:
            ValueError: the activation is un-gated.

        Example:
            >>> import jax.numpy as jnp
            >>> get_activation("relu2").apply_gated(jnp.array([2.0, -1.0]), jnp.array([10.0, 10.0])).tolist()
            [40.0, 0.0]
        """
        if not self.is_gated:
            raise ValueError(f"activation {self.name!r} has no gate; use apply(x)")
        if self.name in ("silu", "swigluoai"):
            if self.limit is not None:
                gate = jnp.minimum(gate, self.limit)
            up = _clamp(up, self.limit)
            if self.beta is not None:
                up = up + self.beta
            return divide(gate, _sigmoid_denominator(gate, 1.0 if self.alpha is None else self.alpha)) * up
        if self.name == "swiglustep":
            gate = _silu(gate, divide)
            return (gate if self.limit is None else jnp.minimum(gate, self.limit)) * _clamp(up, self.limit)
        return _POINTWISE[self.name](gate, divide) * up

    def apply(self, x: Float[Array, "*B"], divide: Divide = jnp.divide) -> Float[Array, "*B"]:
        """The un-gated activation, in the dtype of ``x`` (kernels pass float32, and a division as fast as theirs).

        Raises:
            ValueError: the activation is gated.

        Example:
            >>> import jax.numpy as jnp
            >>> get_activation("relu2_no_mul").apply(jnp.array([2.0, -1.0])).tolist()
            [4.0, 0.0]
        """
        if self.is_gated:
            raise ValueError(f"activation {self.name!r} is gated; use apply_gated(gate, up)")
        return _POINTWISE[self.name.removesuffix("_no_mul")](x, divide)

    def slopes_gated(
        self, gate: Float[Array, "*B"], up: Float[Array, "*B"]
    ) -> tuple[Float[Array, "*B"], Float[Array, "*B"], Float[Array, "*B"]]:
        """`apply_gated`, and its derivatives with respect to gate and up.

        Raises:
            ValueError: the activation is un-gated.

        Example:
            >>> import jax.numpy as jnp
            >>> [float(x) for x in get_activation("relu2").slopes_gated(jnp.float32(2.0), jnp.float32(10.0))]
            [40.0, 40.0, 4.0]
        """
        if not self.is_gated:
            raise ValueError(f"activation {self.name!r} has no gate; use slope(x)")
        limit = self.limit
        if self.name in ("silu", "swigluoai"):
            cut = gate if limit is None else jnp.minimum(gate, limit)
            value, slope = _silu_slope(cut, 1.0 if self.alpha is None else self.alpha)
            factor = _clamp(up, limit) if self.beta is None else _clamp(up, limit) + self.beta
            return value * factor, _where_below(gate, limit, slope * factor), _where_within(up, limit, value)
        if self.name == "swiglustep":
            value, slope = _silu_slope(gate)
            cut, factor = value if limit is None else jnp.minimum(value, limit), _clamp(up, limit)
            return cut * factor, _where_below(value, limit, slope * factor), _where_within(up, limit, cut)
        value, slope = _SLOPES[self.name](gate)
        return value * up, slope * up, value

    def slope(self, x: Float[Array, "*B"]) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
        """`apply`, and its derivative.

        Raises:
            ValueError: the activation is gated.

        Example:
            >>> import jax.numpy as jnp
            >>> [float(x) for x in get_activation("relu2_no_mul").slope(jnp.float32(2.0))]
            [4.0, 4.0]
        """
        if self.is_gated:
            raise ValueError(f"activation {self.name!r} is gated; use slopes_gated(gate, up)")
        return _SLOPES[self.name.removesuffix("_no_mul")](x)

    def __call__(self, h: Float[Array, "*B N"]) -> Float[Array, "*B I"]:
        """Applies to whole rows of the up-projection, in float32, and returns the dtype of ``h``.

        Args:
            h: ``[..., 2I]`` with gate first and up second when gated, ``[..., I]`` when not.

        Raises:
            ValueError: a gated activation was given rows of odd width.

        Example:
            >>> import jax.numpy as jnp
            >>> get_activation("relu2")(jnp.array([[1.0, 2.0, 5.0, 6.0]])).tolist()
            [[5.0, 24.0]]
        """
        x = h.astype(jnp.float32)
        if not self.is_gated:
            return self.apply(x).astype(h.dtype)
        if h.shape[-1] % 2:
            raise ValueError(f"activation {self.name!r} needs rows of gate and up, of even width; got shape {h.shape}")
        gate, up = jnp.split(x, 2, axis=-1)
        return self.apply_gated(gate, up).astype(h.dtype)


def get_activation(
    name: str, alpha: float | int | None = None, beta: float | int | None = None, limit: float | int | None = None
) -> Activation:
    """An activation by name, with its own defaults where a parameter is None.

    With gate ``g`` and up ``u``:

    ========================  ==========================================================================================
    ``silu``                  ``silu(g) * u``; with limit L ``g`` is cut at L and ``u`` at +-L (DeepSeek-V4); with alpha
                              and beta ``g * sigmoid(alpha * g) * (u + beta)``
    ``gelu``, ``gelu_tanh``   ``gelu(g) * u`` with erf, or its tanh approximation
    ``relu2``                 ``max(g, 0)**2 * u``
    ``swigluoai``             as silu with alpha 1.702, beta 1 and limit 7 unless given (gpt-oss)
    ``swiglustep``            ``min(silu(g), L) * clip(u, -L, L)`` with L = 7 unless given (Step-3.5)
    ``*_no_mul``              the same function of one half, without up
    ========================  ==========================================================================================

    Args:
        name: one of `ACTIVATIONS` or `ALIASES`.
        alpha, beta, limit: parameters of the swiglu family; ``limit=inf`` turns a default clamp off.

    Raises:
        ValueError: an unknown name, a parameter that the activation does not have, or one that is not a usable number.

    Example:
        >>> get_activation("swigluoai").limit
        7.0
        >>> get_activation("silu").is_gated
        True
    """
    name = canonical_name(name)
    given = {"alpha": alpha, "beta": beta, "limit": limit}
    allowed = _PARAMETERS.get(name, ())
    resolved = dict(_DEFAULTS.get(name, {}))
    for parameter, value in given.items():
        if value is None:
            continue
        if parameter not in allowed:
            takers = [other for other, names in _PARAMETERS.items() if parameter in names]
            raise ValueError(
                f"swiglu_{parameter}={value} has no meaning for activation={name!r}; leave it None, or use one of "
                f"{', '.join(takers)}"
            )
        value = float(value)
        if math.isnan(value) or (parameter != "limit" and math.isinf(value)):
            raise ValueError(f"swiglu_{parameter}={value} must be a finite number")
        if parameter == "limit" and value <= 0:
            raise ValueError(f"swiglu_limit={value} must be positive; use None or inf for no clamp")
        resolved[parameter] = value
    if resolved.get("limit") == math.inf:
        resolved["limit"] = None
    return Activation(name, **resolved)
