"""FP8 training over a mesh: what is quantized on ranks is quantized as on one device, in both directions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import Fp8Training, MoEConfig, TopK, apply_experts, route
from moe_jax.parallel import AllGatherReduceScatter, AllToAll, Batched, ParallelConfig, place_experts
from moe_jax.parallel.peer import PeerExchange
from moe_jax.parallel.sharded import moe_sharded
from tests.layers import experts_of, logits_of, normal, quick_jit, x_of
from tests.parallel.meshes import mesh_of, only_real, parallel_of, sharded
from tests.util import assert_discriminates, check_close, relative_error

TOKENS, COUNTS = 256, (128, 95)  # of two shards, so that experts have several blocks of rows
CONFIG = MoEConfig(3, 2, 128, 256, fp8_training=Fp8Training())
TENSOR = MoEConfig(3, 2, 128, 256, fp8_training=Fp8Training(scaling="tensor"))
PLAIN = MoEConfig(3, 2, 128, 256)
PARTS = ("y", "x", "w13", "w2", "logits")

# tp, expert parallel, exchange
CASES = {
    "parts of every expert": (2, False, AllGatherReduceScatter()),  # two of four ranks have nothing but filling
    "all-gather": (2, True, AllGatherReduceScatter()),  # one of four ranks has no expert
    "all-to-all": (2, True, AllToAll()),
    "peer": (1, True, PeerExchange()),
    "batched": (1, True, Batched(AllToAll(), max_tokens=TOKENS)),
}


def found(layer, config):
    """The output and the gradients of a random projection of it, by name."""
    operands = x_of(3, config, TOKENS), experts_of(3, config), logits_of(3, config, TOKENS)
    g = only_real(normal([3, 20], TOKENS, config.hidden_size, dtype=config.dtype), COUNTS, 2)

    def both(x, experts, logits):
        y, pull = jax.vjp(layer, x, experts, logits)
        return y, *pull(g)

    y, x, experts, logits = quick_jit(both)(*operands)
    return dict(zip(PARTS, (y, x, experts.w13, experts.w2, logits), strict=True))


@functools.cache
def on_one_device(config):
    def layer(x, experts, logits):
        topk = route(logits, config, implementation="xla")
        ids = jnp.where(only_real(jnp.ones((TOKENS, 1)), COUNTS, 2) != 0, topk.ids, -1)
        return apply_experts(x, experts, TopK(ids, topk.weights), config, implementation="xla")

    return found(layer, config)


@functools.cache
def over_a_mesh(name, config=CONFIG):
    """Where rows that are no tokens hold NaN."""
    tp, ep, exchange = CASES[name]
    mesh, counts = mesh_of(tp, dp=2), jnp.asarray(COUNTS, jnp.int32)
    layer = sharded(mesh, parallel_of(mesh, ep), config, exchange=exchange, compiled=False)

    def run(x, experts, logits):
        real = only_real(jnp.ones((TOKENS, 1)), COUNTS, 2) != 0
        return layer(jnp.where(real, x, jnp.nan), experts, jnp.where(real, logits, jnp.nan), num_tokens=counts)

    return found(run, config)


@pytest.mark.parametrize("name", ["parts of every expert", "all-to-all", pytest.param("peer", marks=pytest.mark.once)])
def test_it_is_the_layer_of_one_device(name):
    """Weights' gradients are the same sums of the same codes. The others have sums over ranks, rounded on their way."""
    actual, expected = over_a_mesh(name), on_one_device(CONFIG)
    for part, tolerance in {"y": 5e-3, "x": 5e-3, "w13": 1e-5, "w2": 1e-5, "logits": 1e-5}.items():
        check_close(actual[part], expected[part], tolerance)
        assert relative_error(expected[part], on_one_device(PLAIN)[part]) > 1e-2, f"{part} is not quantized"
    assert_discriminates(lambda w2: check_close(w2, expected["w2"], 1e-5), actual["w2"])


@pytest.mark.parametrize(
    "name", ["parts of every expert", "all-gather", pytest.param("batched", marks=pytest.mark.once)]
)
def test_each_rank_has_a_scale_of_its_own(name):
    """Other codes than on one device, as near to what bfloat16 gives; rows that are no tokens, NaN here, have no part in it."""
    actual, expected = over_a_mesh(name, TENSOR), on_one_device(TENSOR)
    for part in PARTS:
        plain = on_one_device(PLAIN)[part]
        assert 1e-2 < relative_error(actual[part], plain) < 1.2 * relative_error(expected[part], plain), part
        check_close(actual[part], expected[part], 1e-1)
        flat = np.asarray(expected[part], np.float64).reshape(-1, expected[part].shape[-1])
        assert_discriminates(lambda a, flat=flat: check_close(a, flat, 1e-1), np.reshape(actual[part], flat.shape))
    assert (actual["w13"] != expected["w13"]).any()


@pytest.mark.once
def test_batched_rows_are_quantized_with_their_router_weights():
    """It multiplies cotangents by them, not activations: other codes, as near to those of bfloat16."""
    actual, expected = over_a_mesh("batched"), on_one_device(CONFIG)
    check_close(actual["y"], expected["y"], 5e-3)
    for part in PARTS:
        plain = on_one_device(PLAIN)[part]
        assert relative_error(actual[part], plain) < 1.2 * relative_error(expected[part], plain), part


def test_parts_of_experts_are_whole_blocks():
    """Three blocks over two ranks: the second has one, filled up with zeros."""
    config = MoEConfig(2, 1, 128, 384, fp8_training=Fp8Training())
    experts, parallel = experts_of(0, config), ParallelConfig(tp_size=2)
    placed = place_experts(experts, config, parallel)
    assert placed.w13.shape == (4, 512, 128) and placed.w2.shape == (4, 128, 256)
    assert (placed.w2[2:, :, :128] == experts.w2[:, :, 256:]).all() and not placed.w2[2:, :, 128:].any()


def test_parts_that_are_not_whole_blocks_are_refused():
    mesh = mesh_of(tp=2)
    config = MoEConfig(2, 1, 128, 128, fp8_training=Fp8Training())
    experts = place_experts(experts_of(0, config), MoEConfig(2, 1, 128, 128), ParallelConfig(tp_size=2))
    with pytest.raises(ValueError, match="intermediate_size that is a multiple of 128, .* got 64: .*place_experts"):
        moe_sharded(
            x_of(0, config, 8),
            experts,
            logits_of(0, config, 8),
            config,
            parallel=parallel_of(mesh, False),
            mesh=mesh,
            implementation="xla",
        )
