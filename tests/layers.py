"""Random layers to test with: weights whose outputs have RMS near 1, inputs, routing, and the ranks of a split layer."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import reference
from moe_jax.config import MoEConfig
from moe_jax.types import ExpertWeights, TopK
from tests.util import check_close

# What a compute dtype may cost against the float32 reference, as a relative Frobenius error.
TOLERANCE = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 6e-3}


def quick_jit(function: Callable, **options) -> Callable:
    """`jax.jit` that on a CPU compiles in half the time, to slower code: tests run what they compile once or twice."""
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(function, compiler_options=quick, **options)


def plain(function: Callable) -> Callable:
    """A door of the layer in its plain-JAX form, compiled; `config` is its fourth argument, as in all of them."""
    return quick_jit(functools.partial(function, implementation="xla"), static_argnums=3)


_reference_route = quick_jit(reference.route, static_argnums=1)


def reference_moe(x, experts, logits, config, *, expert_map=None, correction_bias=None):
    """`reference.moe`, with its routing compiled as one."""
    topk = _reference_route(logits, config, correction_bias=correction_bias)
    return reference.apply_experts(x, experts, topk, config, expert_map=expert_map)


def normal(seed, *shape, dtype="float32", scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).standard_normal(shape), dtype)


def experts_of(seed, config: MoEConfig) -> ExpertWeights:
    num, rows, hidden, inner = config.num_experts, config.w13_rows, config.hidden_size, config.intermediate_size
    bias = config.has_bias
    return ExpertWeights(
        w13=normal([seed, 1], num, rows, hidden, dtype=config.dtype, scale=hidden**-0.5),
        w2=normal([seed, 2], num, hidden, inner, dtype=config.dtype, scale=2 * inner**-0.5),
        w13_bias=normal([seed, 3], num, rows, dtype=config.dtype, scale=0.5) if bias else None,
        w2_bias=normal([seed, 4], num, hidden, dtype=config.dtype, scale=0.5) if bias else None,
    )


def x_of(seed, config, num_tokens):
    return normal([seed, 5], num_tokens, config.hidden_size, dtype=config.dtype)


def logits_of(seed, config, num_tokens):
    return normal([seed, 6], num_tokens, config.num_experts, scale=2.0)


def correction_bias_of(seed, config):
    if not config.has_correction_bias:
        return None
    return normal([seed, 7], config.num_experts, scale=0.3)


def topk_of(seed, config, num_tokens) -> TopK:
    """Different experts for the slots of a token, with weights that sum to about one."""
    rng = np.random.default_rng([seed, 8])
    ids = np.argsort(rng.random((num_tokens, config.num_experts)), axis=1)[:, : config.top_k]
    weights = -np.sort(-rng.uniform(0.1, 1.9, ids.shape)) / config.top_k
    return TopK(jnp.asarray(ids, jnp.int32), jnp.asarray(weights, jnp.float32))


def take(experts: ExpertWeights, chosen: Sequence[int]) -> ExpertWeights:
    """The weights of some experts, in the given order."""
    index = np.asarray(chosen, np.int32)
    return jax.tree.map(lambda leaf: leaf[index], experts)


def rank_of(experts: ExpertWeights, config: MoEConfig, chosen: Sequence[int]):
    """(expert_map, weights) of a rank that owns the experts ``chosen``, in this order."""
    expert_map = np.full(config.num_experts, -1, np.int32)
    expert_map[np.asarray(chosen, np.int32)] = np.arange(len(chosen))
    return jnp.asarray(expert_map), take(experts, chosen)


def check_layer(out, expected, config: MoEConfig) -> None:
    """The output of a layer against the float32 reference."""
    assert out.dtype == jnp.dtype(config.dtype)
    check_close(out, expected, TOLERANCE[config.dtype])


def check_unit_rms(expected) -> None:
    """The comparison means something: the reference output is of the size that a layer's output has."""
    rms = float(np.sqrt(np.mean(np.square(np.asarray(expected, np.float64)))))
    assert 0.3 < rms < 3.0, f"{rms=}"
