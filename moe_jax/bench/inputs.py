"""Random weights, hidden states and router logits, and how unevenly the logits load the experts."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import MoEConfig
from moe_jax.quantization import quantize_experts
from moe_jax.quantization.experts import prepare_where_possible
from moe_jax.types import ExpertWeights

ROUTINGS = ("uniform", "zipf", "half", "eight")
# What static scales allow for in hidden states and in hidden rows, both made of normal numbers: hardly one is larger.
LARGEST = (8.0, 16.0)


def parse_routings(text: str) -> tuple[str, ...]:
    """Names of routings, in the order given.

    Raises:
        ValueError: no such routing, or none at all.

    Example:
        >>> parse_routings("uniform,half")
        ('uniform', 'half')
    """
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    unknown = [name for name in names if name not in ROUTINGS]
    if unknown:
        raise ValueError(f"--routing {text}: {unknown[0]!r} is none of {', '.join(ROUTINGS)}")
    return names


@functools.partial(jax.jit, static_argnums=0)
def make_weights(config: MoEConfig, key: jax.Array) -> ExpertWeights:
    """Random weights of the compute dtype, made on the device, that keep the RMS of what passes through them near the input's."""
    k1, k2 = jax.random.split(key)
    hidden, intermediate, dtype = config.hidden_size, config.intermediate_size, config.dtype
    w13 = jax.random.normal(k1, (config.num_experts, config.w13_rows, hidden), dtype) * hidden**-0.5
    w2 = jax.random.normal(k2, (config.num_experts, hidden, intermediate), dtype) * intermediate**-0.5
    return ExpertWeights(w13.astype(dtype), w2.astype(dtype))


def in_format(weights: ExpertWeights, config: MoEConfig) -> ExpertWeights:
    """The weights as the layer takes them: in the number format of the config, quantized one expert at a time, and prepared
    for the kernels where they are of four bits.

    Without a format they are the weights given. A format with static scales of activations gets those that `LARGEST` needs.

    Example:
        >>> config = MoEConfig(2, 1, 16, 16, quantization="int8_channel_static")
        >>> weights = in_format(make_weights(config, jax.random.key(0)), config)
        >>> weights.w13.dtype.name, weights.w13_input_scale.shape
        ('int8', (2,))
    """
    form = config.quantization
    if form is None:
        return weights
    weights = prepare_where_possible(quantize_experts(weights, form), form.dtype_of_rows(config.dtype))
    if form.activations is None or not form.activations.static:
        return weights
    scales = (jnp.full(config.num_experts, largest / form.activations.reach, jnp.float32) for largest in LARGEST)
    return dataclasses.replace(weights, **dict(zip(("w13_input_scale", "w2_input_scale"), scales, strict=True)))


def weights_shape(config: MoEConfig) -> ExpertWeights:
    """Shapes and dtypes of what `in_format` makes; nothing is computed."""
    return jax.eval_shape(lambda: in_format(make_weights(config, jax.random.key(0)), config))


def make_inputs(config: MoEConfig, tokens: int, routing: str = "uniform") -> tuple[jax.Array, jax.Array]:
    """Random hidden states ``[T, H]`` and router logits ``[T, E]``, always the same for the same arguments."""
    x = jax.random.normal(jax.random.key(tokens + 1), (tokens, config.hidden_size), config.dtype)
    return x, jnp.asarray(make_logits(config, tokens, routing))


def make_logits(config: MoEConfig, tokens: int, routing: str = "uniform") -> np.ndarray:
    """Router logits, float32 ``[T, E]``, that load the experts as the routing's name says.

    Made on the host: nothing to compile for each number of tokens.

    Args:
        config: the layer.
        tokens: T.
        routing: ``uniform``: every expert is as likely as any other. ``zipf``: the n-th most likely one is drawn with a
            probability in proportion to 1/n. ``half``: one expert gets half of the rows, or as many as it can: a token
            chooses it once, so that it gets 1/k of the rows for k > 2. ``eight``: 8 experts (k if that is more) are
            chosen uniformly, all others never.

    Example:
        >>> config = MoEConfig(num_experts=16, top_k=2, hidden_size=16, intermediate_size=16)
        >>> loads = [expert_loads(config, make_logits(config, 64, routing)) for routing in ("half", "eight")]
        >>> int(loads[0].max()), int((loads[1] > 0).sum())
        (64, 8)
    """
    experts, top_k = config.num_experts, config.top_k
    random = np.random.default_rng([tokens, ROUTINGS.index(routing)])
    order = random.permutation(experts)  # the loaded experts lie anywhere
    logits = random.standard_normal((tokens, experts))
    if routing == "zipf":
        # The k largest of log(p) + Gumbel noise are k draws with probabilities p without putting back.
        logits[:, order] = random.gumbel(size=(tokens, experts)) - np.log(1 + np.arange(experts))
    elif routing == "half":
        # Just above or below a token's other logits: the weights of the experts chosen beside it stay large.
        hot, share = order[0], min(tokens, -(-tokens * top_k // 2))
        logits[:share, hot] = logits[:share].max(axis=1) + 0.1
        logits[share:, hot] = logits[share:].min(axis=1) - 0.1
    elif routing == "eight":
        logits[:, order[max(8, top_k) :]] -= 30.0
    return logits.astype(np.float32)


def expert_loads(config: MoEConfig, logits: np.ndarray) -> np.ndarray:
    """Rows of each expert, int ``[E]``."""
    chosen = np.argpartition(-logits, config.top_k - 1, axis=1)[:, : config.top_k]
    return np.bincount(chosen.ravel(), minlength=config.num_experts)
