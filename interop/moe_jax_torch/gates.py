"""Which of our activations an experts module of transformers has: found by what its own gate computes, not by its class."""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import torch
from transformers import activations

from moe_jax.activations import get_activation
from moe_jax_torch.calls import TORCH_ACTIVATIONS

# What an experts module calls its activation, by its type or the function itself. Of each only one kind of object can be made.
_ACTIVATIONS: dict[Any, str] = {
    activations.SiLUActivation: "silu",
    torch.nn.SiLU: "silu",
    torch.nn.functional.silu: "silu",
    activations.GELUActivation: "gelu",
    activations.GELUTanh: "gelu_tanh",
    activations.NewGELUActivation: "gelu_tanh",
    activations.ReLUSquaredActivation: "relu2",
}

# Attributes from which gates take their numbers, whatever the model.
_LIMITS = ("limit", "swiglu_limit")
_ALPHAS = ("alpha", "swiglu_alpha")
_OTHERS = ("gate_softcap", "up_softcap")

_TOLERANCE = 1e-5  # relative, of the same formula in float32 computed by torch and by JAX


class Gate(NamedTuple):
    """An activation as `moe_jax_torch.fused_experts` takes it.

    Attributes:
        activation: its name.
        swiglu_alpha, swiglu_limit: its parameters, None where it has none.

    Example:
        >>> Gate("gelu").swiglu_limit is None
        True
    """

    activation: str
    swiglu_alpha: float | None = None
    swiglu_limit: float | None = None


def recognise(experts: torch.nn.Module) -> Gate | None:
    """The gate of a transformers experts module, or None if none of ours computes the same.

    The class's own ``_apply_gate`` runs on made-up rows, with the activation and the numbers of the module, and what it gives
    is compared with our activations. So a gate that a model changed is never taken for another one. One whose rows of gate and up
    alternate (gpt-oss) is none of ours: the rows of the weights would have to be put in order at every call, and they are many
    more than those of the tokens.

    Example:
        >>> from transformers import MixtralConfig
        >>> from transformers.models.mixtral.modeling_mixtral import MixtralExperts
        >>> config = MixtralConfig(hidden_size=8, intermediate_size=4, hidden_act="gelu")
        >>> recognise(MixtralExperts(config))
        Gate(activation='gelu', swiglu_alpha=None, swiglu_limit=None)
    """
    act = getattr(experts, "act_fn", None)
    kind = type(act) if isinstance(act, torch.nn.Module) else act
    if not getattr(experts, "has_gate", True):
        return Gate(f"{_ACTIVATIONS[kind]}_no_mul") if kind in _ACTIVATIONS else None
    if "_apply_gate" in experts.__dict__:  # this very module's, not its class's
        return None
    numbers = []
    for name in (*_LIMITS, *_ALPHAS, *_OTHERS):
        value = getattr(experts, name, ())
        if value is None or isinstance(value, float | int):
            numbers.append((name, value))
    return _recognise(type(experts), kind if kind in _ACTIVATIONS else None, tuple(numbers))


# torch's compiler takes the answer for a constant: all arguments are, and it need not look into the search.
@torch.compiler.assume_constant_result
def _recognise(experts: type, kind: Any, numbers: tuple[tuple[str, Any], ...]) -> Gate | None:
    return _search(experts._apply_gate, kind, numbers)


@functools.cache
def _search(apply_gate: Callable, kind: Any, numbers: tuple[tuple[str, Any], ...]) -> Gate | None:
    # In a thread of its own none of the caller's modes is on: autocast, vmap, a fake mode, another default device.
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(_matching, apply_gate, kind, dict(numbers)).result()


def _matching(apply_gate: Callable, kind: Any, numbers: dict[str, Any]) -> Gate | None:
    limits = [value for name in _LIMITS if (value := numbers.get(name))]
    reach = 2 * max((4.0, *limits))  # values on both sides of every limit
    rows = np.random.default_rng(0).uniform(-reach, reach, (64, 16)).astype(np.float32)
    stand_in = types.SimpleNamespace(**numbers)
    if kind is not None:
        stand_in.act_fn = kind() if isinstance(kind, type) else kind
    try:
        with torch.no_grad():
            wanted = apply_gate(stand_in, torch.tensor(rows, device="cpu")).numpy()
    except Exception:  # the model's code may need anything of the real module: then it is not one of the gates we know
        return None
    for gate in _candidates(kind, numbers, limits):
        name, _ = TORCH_ACTIVATIONS.get(gate.activation, (gate.activation, False))
        act = get_activation(name, gate.swiglu_alpha, None, gate.swiglu_limit)
        found = np.asarray(act(jnp.asarray(rows)))
        if found.shape == wanted.shape and np.linalg.norm(found - wanted) <= _TOLERANCE * np.linalg.norm(wanted):
            return gate
    return None


def _candidates(kind: Any, numbers: dict[str, Any], limits: list[float]) -> Iterator[Gate]:
    """Gates that a module with these objects may have, its rows of gate first."""
    if kind is not None:
        yield Gate(_ACTIVATIONS[kind])
    for limit in limits:
        yield Gate("silu", None, limit)
    alphas = [value for name in _ALPHAS if (value := numbers.get(name))]
    for alpha, limit in itertools.product(alphas, limits):
        yield Gate("swigluoai_uninterleave", alpha, limit)
