"""The model: a decoder of bytes whose MLPs are Mixture-of-Experts layers."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import Fp8Training, MoEConfig, RoutingConfig
from moe_jax.nn import MoE

VOCABULARY = 256  # bytes
PRECISIONS = {  # the dtype of the model, and what of the experts' products is FP8 beside it
    "float32": ("float32", None),
    "bfloat16": ("bfloat16", None),
    "fp8": ("bfloat16", Fp8Training()),
    "fp8-e5m2": ("bfloat16", Fp8Training(gradient_dtype="float8_e5m2")),
    "fp8-tensor": ("bfloat16", Fp8Training(scaling="tensor")),
}


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a model; `SIZES` has three."""

    num_layers: int = 2
    hidden_size: int = 64
    num_heads: int = 4
    num_experts: int = 8
    top_k: int = 2
    intermediate_size: int = 64
    seq_len: int = 128
    batch_size: int = 16
    dtype: str = "float32"
    fp8: Fp8Training | None = None

    def __post_init__(self) -> None:
        _ = self.moe  # raises for sizes and dtypes that FP8 does not take

    def with_precision(self, precision: str | None) -> "ModelConfig":
        """The same sizes in one of `PRECISIONS`; None leaves it."""
        if precision is None:
            return self
        if precision not in PRECISIONS:
            raise ValueError(f"precision={precision!r} must be one of {', '.join(PRECISIONS)}")
        dtype, fp8 = PRECISIONS[precision]
        return dataclasses.replace(self, dtype=dtype, fp8=fp8)

    @property
    def moe(self) -> MoEConfig:
        """The MoE layer: DeepSeek-V3's routing, which can be balanced by a loss or by a bias."""
        return MoEConfig(
            self.num_experts,
            self.top_k,
            self.hidden_size,
            self.intermediate_size,
            routing=RoutingConfig("deepseek_v3"),
            has_correction_bias=True,
            dtype=self.dtype,
            fp8_training=self.fp8,
        )


SIZES = {
    "toy": ModelConfig(),
    "small": ModelConfig(2, 128, 4, 8, 2, 128, seq_len=64, batch_size=8, dtype="bfloat16"),
    "gpu": ModelConfig(12, 1024, 16, 64, 8, 512, seq_len=2048, batch_size=16, dtype="bfloat16"),
}


class Attention(nnx.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        hidden, options = config.hidden_size, {"use_bias": False, "dtype": jnp.dtype(config.dtype), "rngs": rngs}
        self.num_heads = config.num_heads
        self.qkv = nnx.Linear(hidden, 3 * hidden, **options)
        self.out = nnx.Linear(hidden, hidden, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """``[B, S, H]`` to the same."""
        batch, length, hidden = x.shape
        q, k, v = jnp.split(self.qkv(x).reshape(batch, length, 3 * self.num_heads, -1), 3, axis=2)
        y = jax.nn.dot_product_attention(_rotate(q), _rotate(k), v, is_causal=True)
        return self.out(y.reshape(batch, length, hidden))


def _rotate(x: jax.Array) -> jax.Array:
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None] * (1e-4 ** (jnp.arange(half) / half))[None, :]
    cos, sin = jnp.cos(angles)[None, :, None, :], jnp.sin(angles)[None, :, None, :]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)


class Block(nnx.Module):
    """Attention, then experts, each on normalised inputs and added to them."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, **moe: Any):
        options = {"dtype": jnp.dtype(config.dtype), "rngs": rngs}
        self.norm_attention = nnx.RMSNorm(config.hidden_size, **options)
        self.attention = Attention(config, rngs=rngs)
        self.norm_moe = nnx.RMSNorm(config.hidden_size, **options)
        self.moe = MoE(config.moe, rngs=rngs, **moe)

    def __call__(self, x: jax.Array) -> jax.Array:
        """``[B, S, H]`` to the same."""
        x = x + self.attention(self.norm_attention(x))
        return x + self.moe(self.norm_moe(x))


class ByteLM(nnx.Module):
    """Logits of the next byte, float32.

    Args:
        config: its sizes.
        rngs: for the initial parameters.
        **moe: settings of the MoE layers, e.g. `parallel` and `mesh`.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, **moe: Any):
        dtype = jnp.dtype(config.dtype)
        scale = nnx.initializers.normal(1.0)
        self.embed = nnx.Embed(VOCABULARY, config.hidden_size, embedding_init=scale, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs=rngs, **moe) for _ in range(config.num_layers)])
        self.norm = nnx.RMSNorm(config.hidden_size, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(config.hidden_size, VOCABULARY, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """``[B, S]`` bytes to ``[B, S, 256]``."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = nnx.remat(lambda block, x: block(x))(block, x)
        return self.head(self.norm(x)).astype(jnp.float32)
