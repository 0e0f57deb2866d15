"""A small layer that was trained on text, and the hidden states that text not seen before sends through it.

The text is the Python language reference that every Python brings along (`pydoc_data.topics`); the model predicts the next byte
from the eight before it: embedding, one projection, RMS norm, experts, output. It is trained on the spot, in float32 on a CPU,
in a few minutes: not a language model, but weights and activations that gradients and language have shaped, not a random
generator.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moe_jax import ExpertWeights, MoEConfig, TopK

CONFIG = MoEConfig(num_experts=4, top_k=2, hidden_size=256, intermediate_size=512)
CONTEXT, EMBEDDING, BATCH, STEPS = 8, 64, 256, 300


class TextLayer(NamedTuple):
    """A layer, what flows into it, and the bits a byte that the model needs on text that it has not seen."""

    config: MoEConfig
    x: jax.Array
    experts: ExpertWeights
    topk: TopK
    bits_a_byte: float


def text() -> np.ndarray:
    """The bytes of the language reference, about half a million."""
    from pydoc_data.topics import topics

    return np.frombuffer("\n".join(topics[name] for name in sorted(topics)).encode(), np.uint8)


def train(config: MoEConfig = CONFIG, steps: int = STEPS, tokens: int = 256) -> TextLayer:
    """The layer after so many steps, in the config's dtype, with the hidden states of `tokens` bytes of the last tenth."""
    data = text()
    split = len(data) * 9 // 10
    params = _init(config)
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
    state, random = optimizer.init(params), np.random.default_rng(0)

    @jax.jit
    def step(params, state, context, target):
        loss, grads = jax.value_and_grad(_loss)(params, context, target, config)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    for _ in range(steps):
        params, state, _ = step(params, state, *_batch(data[:split], random.integers(0, split - CONTEXT - 1, BATCH)))
    held_out = _batch(data[split:], np.random.default_rng(1).integers(0, len(data) - split - CONTEXT - 1, tokens))
    x, topk = _hidden(params, held_out[0], config)[1:]
    bits = float(_loss(params, *held_out, config)) / np.log(2)
    experts = ExpertWeights(params["w13"].astype(config.dtype), params["w2"].astype(config.dtype))
    return TextLayer(config, x.astype(config.dtype), experts, topk, bits)


def _init(config: MoEConfig) -> dict[str, jax.Array]:
    hidden, inner, experts = config.hidden_size, config.intermediate_size, config.num_experts
    shapes = {
        "embedding": (256, EMBEDDING),
        "project": (hidden, CONTEXT * EMBEDDING),
        "norm": (hidden,),
        "router": (experts, hidden),
        "w13": (experts, 2 * inner, hidden),
        "w2": (experts, hidden, inner),
        "head": (256, hidden),
    }
    keys = jax.random.split(jax.random.key(0), len(shapes))
    params = {
        name: jax.random.normal(key, s) * s[-1] ** -0.5 for key, (name, s) in zip(keys, shapes.items(), strict=True)
    }
    return params | {"norm": jnp.ones(hidden), "embedding": params["embedding"] * EMBEDDING**0.5}


def _batch(data: np.ndarray, starts: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """(contexts, the bytes that follow them)."""
    windows = data[starts[:, None] + np.arange(CONTEXT + 1)]
    return jnp.asarray(windows[:, :-1]), jnp.asarray(windows[:, -1])


def _rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale[None, :]


def _hidden(params: dict[str, jax.Array], context: jax.Array, config: MoEConfig) -> tuple[jax.Array, jax.Array, TopK]:
    """(the residual stream, what enters the experts, which experts)."""
    stream = params["embedding"][context].reshape(len(context), -1) @ params["project"].T
    x = _rms_norm(stream, params["norm"])
    logits, ids = jax.lax.top_k(x @ params["router"].T, config.top_k)
    return stream, x, TopK(ids.astype(jnp.int32), jax.nn.softmax(logits, axis=-1))


@functools.partial(jax.jit, static_argnames="config")
def _loss(params: dict[str, jax.Array], context: jax.Array, target: jax.Array, config: MoEConfig) -> jax.Array:
    stream, x, topk = _hidden(params, context, config)
    # Every expert of every token: there are few, and the gradient is that of the layer.
    share = jnp.zeros((len(x), config.num_experts)).at[jnp.arange(len(x))[:, None], topk.ids].add(topk.weights)
    inner = config.act(jnp.einsum("th,enh->etn", x, params["w13"]))
    y = stream + jnp.einsum("eti,ehi,te->th", inner, params["w2"], share)
    logits = _rms_norm(y, jnp.ones(config.hidden_size)) @ params["head"].T
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), target[:, None].astype(jnp.int32), axis=1))
