"""The kernel of a grouped matmul's input gradient, interpreted and lowered for CUDA."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import MoEConfig
from moe_jax.ops.group_tokens import default_tile_rows, group_tokens, max_tiles
from moe_jax.ops.input_grad import activation_input_grad, input_grad
from tests.contracts import check_activation_input_grad, check_grouped_matmul, groups_of, groups_with_sizes, rows_of
from tests.layers import normal
from tests.lowering import assert_lowers_to_kernels, like


def run(seed, groups, n, k, dtype="bfloat16", num_experts=3):
    rows = rows_of(seed, groups, n, dtype)
    weights = normal([seed, 1], num_experts, n, k, dtype=dtype, scale=n**-0.5)
    out = input_grad(rows, weights, groups, implementation="mosaic_interpret")
    check_grouped_matmul(out, rows, weights.swapaxes(1, 2), groups)


@pytest.mark.parametrize(
    ("tile_rows", "sizes"),
    [(8, (64, 64)), (64, (64, 64)), (128, (16, 16)), (64, (80, 144)), (160, (144, 80)), (192, (272, 528))],
)
def test_sizes(tile_rows, sizes):
    """Contracted and output sizes below, at and above those of a tile; more steps than stages; narrow swizzles."""
    run(0, groups_of(0, 9, 2, 3, tile_rows), *sizes)


@pytest.mark.once
def test_float16():
    run(1, groups_of(1, 9, 2, 3, 64), 80, 96, "float16")


@pytest.mark.once
@pytest.mark.parametrize("tile_rows", [64, 160])
def test_group_sizes(tile_rows):
    """Empty groups, groups of one row, of a tile and of several."""
    run(2, groups_with_sizes(2, (1, 0, 24, tile_rows, tile_rows + 9), tile_rows), 128, 192, num_experts=5)


@pytest.mark.once
def test_experts_without_rows_are_not_read():
    groups = groups_of(3, 9, 2, 3, 64, only=[1])
    rows, weights = rows_of(3, groups, 80, "bfloat16"), normal(3, 3, 80, 96, dtype="bfloat16")
    weights = weights.at[np.array([0, 2])].set(jnp.nan)
    out = input_grad(rows, weights, groups, implementation="mosaic_interpret")
    check_grouped_matmul(out, rows, jnp.nan_to_num(weights).swapaxes(1, 2), groups)


LOWERED = {
    "qwen3, of w2": (4096, 8, 128, 2048, 768, "bfloat16"),
    "qwen3, of w13": (16384, 8, 128, 1536, 2048, "bfloat16"),
    "gpt-oss, of w13": (1000, 4, 32, 5760, 2880, "float16"),
    "no multiple of 64": (128, 4, 16, 1040, 1056, "bfloat16"),
    "one token": (1, 1, 8, 528, 1040, "bfloat16"),
}


@pytest.mark.parametrize("name", LOWERED)
def test_lowers_for_cuda(name):
    num_tokens, top_k, num_experts, n, k, dtype = LOWERED[name]

    def call(rows, weights, ids):
        groups = group_tokens(ids, num_experts=num_experts, implementation="mosaic")
        return input_grad(rows, weights, groups, implementation="mosaic")

    tile_rows = default_tile_rows(num_tokens * top_k, num_experts, "mosaic")
    rows = like(dtype, max_tiles(num_tokens * top_k, num_experts, tile_rows) * tile_rows, n)
    assert_lowers_to_kernels(call, rows, like(dtype, num_experts, n, k), like("int32", num_tokens, top_k))


def through_activation(seed, groups, hidden, intermediate, activation, dtype="bfloat16", num_experts=3, **tolerance):
    layer = MoEConfig(1, 1, 8, 8, activation=activation)
    rows = rows_of(seed, groups, hidden, dtype)
    h = rows_of([seed, 1], groups, (2 if layer.act.is_gated else 1) * intermediate, dtype)
    weights = normal([seed, 2], num_experts, hidden, intermediate, dtype=dtype, scale=hidden**-0.5)
    row_weights = jnp.abs(rows_of([seed, 3], groups, 1, "float32")[:, 0])
    operands = rows, weights, groups, h, row_weights
    found = activation_input_grad(*operands, layer.act, implementation="mosaic_interpret")
    check_activation_input_grad(found, *operands, layer, **tolerance)


@pytest.mark.parametrize(("sizes", "activation"), [((80, 64), "silu"), ((64, 80), "gelu_tanh_no_mul")])
def test_back_through_the_activation(sizes, activation):
    through_activation(4, groups_of(4, 9, 2, 3, 64), *sizes, activation, of_sums=4e-3)
