"""Layers compiled before anything is measured, those of a case side by side: most of that work runs outside of Python."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.bench.environment import has_gpu
from moe_jax.config import MoEConfig

THREADS = 16
FEW_TOKENS = 16


def layers_a_call(tokens: int) -> int:
    """Layers one behind the other, in one jit or in one CUDA graph, as those of a model are.

    So many that a GPU is busy for longer than the host needs to start a jitted function.
    """
    return 16 if tokens <= FEW_TOKENS and has_gpu() else 4


class Layer:
    """A layer ``(x, weights, logits) -> output`` under jit, with its compiled forms by number of tokens.

    Example:
        >>> layer = Layer(lambda x, weights, logits: x @ weights)
        >>> config = MoEConfig(num_experts=2, top_k=1, hidden_size=16, intermediate_size=16, dtype="float32")
        >>> compile_all([Job(layer, config, jax.ShapeDtypeStruct((16, 16), "float32"), 3)])
        >>> list(layer.compiled), list(layer.compiled_stacks)
        ([], [3])
    """

    def __init__(self, function: Callable[..., Any]):
        self.jitted = jax.jit(function)
        self.stacked = jax.jit(self._stack)
        self.compiled: dict[int, jax.stages.Compiled] = {}
        self.compiled_stacks: dict[int, jax.stages.Compiled] = {}

    def _stack(self, x: jax.Array, weights: Any, logits: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        outputs = []
        for each in logits:
            x = self.jitted(x, weights, each)
            outputs.append(x)
        return outputs[0], outputs[-1]

    def at(self, tokens: int) -> Callable[..., Any]:
        """The compiled form for this number of tokens; where there is none the jitted function, which compiles when called."""
        return self.compiled.get(tokens, self.jitted)

    def stack_at(self, tokens: int) -> Callable[..., Any]:
        """`layers_a_call` layers in one jit, each on the output of the last: ``(x, weights, logits) -> (first, last output)``.

        XLA computes what is the same in all of them once: each gets its logits as an argument of its own (`stack_logits`).
        """
        return self.compiled_stacks.get(tokens, self.stacked)

    def __call__(self, x: jax.Array, weights: Any, logits: jax.Array) -> Any:
        """Runs the layer."""
        return self.at(x.shape[0])(x, weights, logits)


def stack_logits(logits: Any) -> tuple[Any, ...]:
    """The logits as a stack takes them."""
    return (logits,) * layers_a_call(logits.shape[0])


class Job(NamedTuple):
    """One compilation.

    Attributes:
        layer: gets the compiled form.
        config: gives the shapes of hidden states and logits.
        weights: the shapes of the weights, as the layer takes them.
        tokens: T.
        stack: of the stack, not of a layer alone.
    """

    layer: Layer
    config: MoEConfig
    weights: Any
    tokens: int
    stack: bool = True


def compile_all(jobs: Iterable[Job]) -> None:
    """Compiles everything from shapes alone, on 16 threads."""
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(_compile, jobs))


def _compile(job: Job) -> None:
    config, layer = job.config, job.layer
    x = jax.ShapeDtypeStruct((job.tokens, config.hidden_size), config.dtype)
    logits = jax.ShapeDtypeStruct((job.tokens, config.num_experts), jnp.float32)
    with contextlib.suppress(Exception):  # it comes again, and is reported, when the layer is measured
        if job.stack:
            layer.compiled_stacks[job.tokens] = layer.stacked.lower(x, job.weights, stack_logits(logits)).compile()
        else:
            layer.compiled[job.tokens] = layer.jitted.lower(x, job.weights, logits).compile()
