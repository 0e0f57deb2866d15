"""All experts of a layer to a number format and back, one expert at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from moe_jax.quantization.array import QuantizedArray
from moe_jax.quantization.formats import QuantFormat, Spec, quant_format
from moe_jax.quantization.prepared import prepare
from moe_jax.quantization.prepared_layout import unprepared
from moe_jax.quantization.quantize import dequantize, quantize
from moe_jax.types import ExpertWeights


def quantize_experts(experts: ExpertWeights, format: QuantFormat | str, *, progress: bool = False) -> ExpertWeights:
    """The weights in a number format; biases and input scales stay as they are.

    Beside the weights given and the result only one expert is held in memory, and weights may be NumPy arrays, mapped from a file
    if need be, that never are on the device as a whole. Inside a jit the weights are there anyway, and taken as a whole.

    Gate and up rows of a gated activation share no scale (``halves=2``): a ``w13`` with twice as many rows as ``w2`` has columns.

    Args:
        experts: ``w13`` ``[E_local, 2I or I, H]`` and ``w2`` ``[E_local, H, I]``, floating.
        format: a `QuantFormat` or the name of one, see `quant_format`.
        progress: shows a progress bar on the terminal's stderr.

    Returns:
        `ExpertWeights` with a `QuantizedArray` for ``w13`` and one for ``w2``.

    Raises:
        ValueError: no such format; weights whose shapes do not fit each other.
        TypeError: weights that are quantized already.

    Example:
        >>> experts = ExpertWeights(w13=jnp.ones((4, 2 * 32, 16)), w2=jnp.ones((4, 16, 32)))
        >>> quantized = quantize_experts(experts, "fp8_tensor")
        >>> quantized.w13.scales.shape, quantized.w2.scales.shape, quantized.w13.nbytes
        ((4, 2), (4,), 4128)
    """
    spec = quant_format(format).weights
    for name in ("w13", "w2"):
        if isinstance(getattr(experts, name), QuantizedArray):
            raise TypeError(
                f"{name} is quantized already, as {getattr(experts, name).spec}; dequantize_experts() first"
            )
    halves = _halves(experts)
    with _bar(progress, "quantizing experts", 2 * experts.num_local_experts) as advance:
        w13 = _each(functools.partial(_store_quantized, spec=spec, halves=halves), experts.w13, advance)
        w2 = _each(functools.partial(_store_quantized, spec=spec, halves=1), experts.w2, advance)
    return dataclasses.replace(experts, w13=w13, w2=w2)


def dequantize_experts(
    experts: ExpertWeights, dtype: DTypeLike = "bfloat16", *, progress: bool = False
) -> ExpertWeights:
    """What quantized weights stand for, as plain arrays; one expert at a time, like `quantize_experts`.

    Args:
        experts: weights that are not quantized are cast; biases stay as they are; input scales, which then scale nothing, are
            dropped.
        dtype: of the result.
        progress: shows a progress bar on the terminal's stderr.

    Example:
        >>> experts = ExpertWeights(w13=jnp.ones((4, 2 * 32, 16)), w2=jnp.ones((4, 16, 32)))
        >>> dequantize_experts(quantize_experts(experts, "fp8_tensor")).w13.dtype.name
        'bfloat16'
    """
    store = functools.partial(_store_dequantized, dtype=jnp.dtype(dtype).name)
    with _bar(progress, "dequantizing experts", 2 * experts.num_local_experts) as advance:
        w13, w2 = (_each(store, weights, advance) for weights in (experts.w13, experts.w2))
    return ExpertWeights(w13, w2, experts.w13_bias, experts.w2_bias)


def prepare_experts(experts: ExpertWeights, dtype: DTypeLike = "bfloat16", *, progress: bool = False) -> ExpertWeights:
    """Weights of four bits in the order in which the kernels of Hopper GPUs decode them, see `moe_jax.quantization.prepared`.

    Without it a layer puts them into that order in every call. One expert at a time, like `quantize_experts`; the result takes
    the memory of the weights, rows filled up to a multiple of 64. Do it last: after experts are placed and matrices are split.

    Args:
        experts: weights that are not of four bits stay as they are.
        dtype: of the rows that they are multiplied with (`QuantFormat.dtype_of_rows`): that of the layer, bfloat16 or float16,
            but float8_e4m3fn for ``nvfp4_fp8`` and ``mxfp4_fp8``.
        progress: shows a progress bar on the terminal's stderr.

    Example:
        >>> experts = ExpertWeights(w13=jnp.ones((4, 2 * 64, 64)), w2=jnp.ones((4, 64, 64)))
        >>> prepare_experts(quantize_experts(experts, "nvfp4")).w13.values.shape
        (4, 2, 1, 18, 32)
    """
    store = functools.partial(_store_prepared, dtype=jnp.dtype(dtype).name)
    with _bar(progress, "preparing experts", 2 * experts.num_local_experts) as advance:
        w13, w2 = (
            _each(store, weights, advance)
            if isinstance(weights, QuantizedArray) and weights.spec.codes_per_value == 2
            else weights
            for weights in (experts.w13, experts.w2)
        )
    return dataclasses.replace(experts, w13=w13, w2=w2)


def prepare_where_possible(experts: ExpertWeights, dtype: DTypeLike) -> ExpertWeights:
    """`prepare_experts`, but weights in formats that have no such order for rows of `dtype` stay as they are.

    Example:
        >>> experts = ExpertWeights(w13=jnp.ones((4, 2 * 64, 64)), w2=jnp.ones((4, 64, 64)))
        >>> prepare_where_possible(quantize_experts(experts, "nvfp4"), "float32").w13.values.dtype.name
        'uint8'
    """
    matrices = (experts.w13, experts.w2)
    possible = all(isinstance(w, QuantizedArray) and unprepared(w.spec, dtype) is None for w in matrices)
    return prepare_experts(experts, dtype) if possible else experts


def _halves(experts: ExpertWeights) -> int:
    rows, intermediate = experts.w13.shape[-2], experts.w2.shape[-1]
    if rows not in (intermediate, 2 * intermediate):
        raise ValueError(
            f"w13 has shape {tuple(experts.w13.shape)} and w2 {tuple(experts.w2.shape)}, but must be [E, 2I or I, H] and "
            f"[E, H, I]: {rows} rows for {intermediate} columns"
        )
    return 2 if rows == 2 * intermediate else 1


def _each(store: Callable, weights: Any, advance: Callable[[], None]) -> Any:
    """``store(None, weights)`` for all experts at once in a jit, otherwise for one after the other into one result."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(weights)):
        return store(None, None, weights)
    count = weights.shape[0]
    shapes = jax.eval_shape(functools.partial(store, None, None), _shapes(weights))
    result = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    for expert in range(count):
        one = jax.tree.map(jnp.asarray, weights[expert])
        result = store(result, jnp.int32(expert), one)
        advance()
    return result


def _shapes(weights: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), weights)


@functools.partial(jax.jit, static_argnames=("spec", "halves"), donate_argnums=0)
def _store_quantized(result: Any, expert: Array | None, weights: Any, *, spec: Spec, halves: int) -> Any:
    return _store(result, expert, quantize(weights, spec, halves=halves))


@functools.partial(jax.jit, static_argnames="dtype", donate_argnums=0)
def _store_dequantized(result: Any, expert: Array | None, weights: Any, *, dtype: str) -> Any:
    return _store(result, expert, dequantize(weights, dtype))


@functools.partial(jax.jit, static_argnames="dtype", donate_argnums=0)
def _store_prepared(result: Any, expert: Array | None, weights: Any, *, dtype: str) -> Any:
    return _store(result, expert, prepare(weights, dtype))


def _store(result: Any, expert: Array | None, new: Any) -> Any:
    """`new` in the place of one expert of `result`, which is donated: nothing is copied."""
    if result is None:
        return new
    return jax.tree.map(lambda whole, part: whole.at[expert].set(part), result, new)


@contextlib.contextmanager
def _bar(shown: bool, what: str, steps: int) -> Iterator[Callable[[], None]]:
    """A function to call after each step."""
    if not shown:
        yield lambda: None
        return
    from rich.progress import Progress

    from moe_jax.console import console

    with Progress(console=console(stderr=True)) as progress:
        task = progress.add_task(what, total=steps)
        yield lambda: progress.advance(task)
