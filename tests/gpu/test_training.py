"""Gradients on a GPU at real sizes: their kernels beside the plain-JAX form, and the layer beside itself in float32."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import MoEConfig, RoutingConfig
from moe_jax.moe import moe
from moe_jax.ops.input_grad import activation_input_grad, input_grad
from moe_jax.types import ExpertWeights
from tests.contracts import check_activation_input_grad, check_grouped_matmul, groups_of, groups_with_sizes, rows_of
from tests.layers import experts_of, logits_of, normal, x_of
from tests.util import check_close

pytestmark = pytest.mark.gpu

run_input_grad = jax.jit(functools.partial(input_grad, implementation="mosaic"))
run_through_activation = jax.jit(
    functools.partial(activation_input_grad, implementation="mosaic"), static_argnames="activation"
)

SIZES = {
    "qwen3": (8, 2048, 768),
    "gpt-oss": (4, 2880, 2880),
    "swizzles of 64 bytes": (4, 1056, 544),
    "swizzles of 32 bytes": (4, 1040, 528),
}
GROUPS = {
    192: (500, 0, 1, 193, 1000, 192, 37, 64),
    160: (161, 0, 300, 160, 17, 0, 8, 15),
    128: (129, 3, 96, 0, 128, 1, 1, 1),
    64: (65, 3, 40, 0, 64, 1, 9, 1),
    8: (1, 3, 8, 0, 20, 1, 9, 1),
}


def groups_at(tile_rows, experts):
    return groups_with_sizes(tile_rows, GROUPS[tile_rows][:experts], tile_rows)


@pytest.mark.parametrize("tile_rows", GROUPS)
@pytest.mark.parametrize("name", SIZES)
def test_input_grad(name, tile_rows):
    experts, n, k = SIZES[name]
    groups = groups_at(tile_rows, experts)
    rows, weights = rows_of(0, groups, n, "bfloat16"), normal(1, experts, n, k, dtype="bfloat16", scale=n**-0.5)
    check_grouped_matmul(run_input_grad(rows, weights, groups), rows, weights.swapaxes(1, 2), groups)


def test_input_grad_in_float16():
    groups = groups_at(160, 8)
    rows, weights = rows_of(0, groups, 512, "float16"), normal(1, 8, 512, 320, dtype="float16", scale=512**-0.5)
    check_grouped_matmul(run_input_grad(rows, weights, groups), rows, weights.swapaxes(1, 2), groups)


@pytest.mark.parametrize(
    ("tile_rows", "name", "activation"),
    [
        (192, "qwen3", "silu"),
        (160, "qwen3", "silu"),
        (192, "gpt-oss", "swigluoai"),
        (128, "gpt-oss", "gelu"),
        (64, "qwen3", "relu2_no_mul"),
        (8, "qwen3", "gelu_tanh"),
    ],
)
def test_back_through_the_activation(tile_rows, name, activation):
    experts, hidden, inner = SIZES[name]
    layer, groups = MoEConfig(1, 1, 8, 8, activation=activation), groups_at(tile_rows, experts)
    rows = rows_of(2, groups, hidden, "bfloat16")
    h = rows_of(3, groups, (2 if layer.act.is_gated else 1) * inner, "bfloat16")
    weights = normal(4, experts, hidden, inner, dtype="bfloat16", scale=hidden**-0.5)
    operands = rows, weights, groups, h, jnp.abs(rows_of(5, groups, 1, "float32")[:, 0])
    found = run_through_activation(*operands, activation=layer.act)
    check_activation_input_grad(found, *operands, layer, of_sums=4e-3)
    again = run_through_activation(*operands, activation=layer.act)
    where = np.asarray(groups.positions).reshape(-1)
    where = where[where >= 0]
    for one, other in zip(found, again, strict=True):
        np.testing.assert_array_equal(np.asarray(one, np.float32)[where], np.asarray(other, np.float32)[where])


def test_groups_of_random_pairs():
    groups = groups_of(6, 700, 2, 8, 160, missing=0.3)
    rows, weights = rows_of(6, groups, 2048, "bfloat16"), normal(6, 8, 2048, 768, dtype="bfloat16", scale=2048**-0.5)
    check_grouped_matmul(run_input_grad(rows, weights, groups), rows, weights.swapaxes(1, 2), groups)


LAYERS = {
    "qwen3": (MoEConfig(32, 8, 2048, 768), 3000),
    "few rows an expert": (MoEConfig(64, 2, 1024, 512), 300),
    "few tokens": (MoEConfig(16, 4, 1024, 512), 7),
    "wide tiles": (MoEConfig(8, 2, 1024, 1408), 4096),
    "gpt-oss": (MoEConfig(16, 4, 2880, 2880, activation="swigluoai", has_bias=True), 1000),
    "odd sizes": (MoEConfig(8, 2, 1040, 528, dtype="float16"), 500),
    "on input": (
        MoEConfig(8, 1, 1024, 512, routing=RoutingConfig("llama4"), apply_router_weight_on_input=True),
        500,
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name):
    config, num_tokens = LAYERS[name]
    x, experts, logits = x_of(7, config, num_tokens), experts_of(7, config), logits_of(7, config, num_tokens)
    cotangent = normal(8, num_tokens, config.hidden_size)

    def gradient(config, implementation):
        def loss(x, experts, logits):
            y = moe(x, experts, logits, config, implementation=implementation)
            return jnp.sum(y.astype(jnp.float32) * cotangent)

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))

    found = gradient(config, "mosaic")(x, experts, logits)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (x, experts))
    exact = dataclasses.replace(config, dtype="float32")
    expected = gradient(exact, "xla")(*wide, logits)
    assert isinstance(found[1], ExpertWeights) and found[1].w13.dtype == experts.w13.dtype
    for mine, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        check_close(mine, right, 1.5e-2)
    for one, other in zip(
        jax.tree.leaves(found), jax.tree.leaves(gradient(config, "mosaic")(x, experts, logits)), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))
