"""Derivatives through exchanges are those of the layer on one device."""

import functools

import jax
import jax.numpy as jnp
import pytest

from moe_jax import MoEConfig, RoutingConfig, SharedExpertWeights, moe
from moe_jax.moe import shared_expert
from moe_jax.parallel.all_to_all import AllToAll
from moe_jax.parallel.batched import Batched
from moe_jax.parallel.gather_scatter import AllGatherReduceScatter
from moe_jax.parallel.peer import PeerExchange
from moe_jax.parallel.sharded import moe_sharded
from moe_jax.parallel.weights import place_experts, place_shared
from tests.layers import experts_of, logits_of, normal, quick_jit, x_of
from tests.parallel.meshes import mesh_of, only_real, parallel_of, sharded
from tests.util import assert_discriminates, check_close

CONFIG = MoEConfig(5, 2, 16, 12, dtype="float32", has_bias=True)
LLAMA = MoEConfig(4, 1, 16, 12, routing=RoutingConfig("llama4"), apply_router_weight_on_input=True, dtype="float32")

# dp, tp, expert parallel, sequence parallel, exchange
CASES = {
    "tp": (1, 4, False, False, None),
    "ep": (1, 4, True, False, None),
    "dp": (2, 2, False, False, None),
    "all-gather": (2, 2, True, False, AllGatherReduceScatter()),
    "all-to-all": (2, 2, True, False, AllToAll()),
    "all-to-all sp": (2, 2, True, True, AllToAll()),
    "peer": (2, 2, True, False, PeerExchange()),
}


def gradients(layer, config, num_tokens=8):
    """Of a random projection of the output: for hidden states, weights and logits."""
    cotangent = normal([3, 20], num_tokens, config.hidden_size)

    def loss(*operands):
        return jnp.sum(layer(*operands).astype(jnp.float32) * cotangent)

    operands = x_of(3, config, num_tokens), experts_of(3, config), logits_of(3, config, num_tokens)
    return quick_jit(jax.grad(loss, argnums=(0, 1, 2)))(*operands)


@functools.cache
def expected(config):
    return gradients(lambda *operands: moe(*operands, config, implementation="xla"), config)


def check(found, config, tolerance):
    leaves = [jax.tree.leaves_with_path(tree) for tree in (found, expected(config))]
    for (path, actual), (_, wanted) in zip(*leaves, strict=True):
        try:
            check_close(actual, wanted, tolerance)
        except AssertionError as error:
            raise AssertionError(f"{jax.tree_util.keystr(path)}: {error}") from None


FORMATS = {"float32": (CONFIG, 1e-5), "bfloat16": (MoEConfig(5, 2, 16, 12), 1e-2), "llama4": (LLAMA, 1e-5)}
OF_CASES = [(case, form) for case in CASES for form in ("float32", "bfloat16")]
OF_CASES += [(case, "llama4") for case in ("tp", "all-gather", "all-to-all")]


@pytest.mark.parametrize("name, form", OF_CASES)
def test_gradients(name, form):
    config, tolerance = FORMATS[form]
    dp, tp, ep, sp, exchange = CASES[name]
    mesh = mesh_of(tp, dp)
    found = gradients(sharded(mesh, parallel_of(mesh, ep, sp), config, exchange=exchange, compiled=False), config)
    check(found, config, tolerance)
    assert_discriminates(lambda x: check((x, *found[1:]), config, tolerance), found[0])


@pytest.mark.parametrize(
    "config, exchange",
    [(CONFIG, AllGatherReduceScatter()), (LLAMA, AllToAll()), (CONFIG, Batched(AllToAll(), max_tokens=8))],
)
def test_rows_that_are_no_tokens_have_no_part(config, exchange):
    """They may hold NaN: their own derivatives are zero, those of weights are finite."""
    mesh = mesh_of(dp=2)
    counts = jnp.array([3, 0], jnp.int32)
    layer = sharded(mesh, parallel_of(mesh, True), config, exchange=exchange, compiled=False)
    shared = SharedExpertWeights(normal([3, 30], 8, 16), normal([3, 31], 16, 4), gate=normal([3, 32], 1, 16))
    real = only_real(jnp.ones((8, 1)), counts, 2) != 0

    def loss(x, experts, logits, shared):
        parallel = parallel_of(mesh, True)
        return jnp.sum(layer(x, experts, logits, shared=place_shared(shared, config, parallel), num_tokens=counts) ** 2)

    def whole(x, experts, logits, shared):
        y = moe(x, experts, logits, config, implementation="xla") + shared_expert(x, shared, config)
        return jnp.sum(jnp.where(real, y, 0) ** 2)

    def gradients(loss, x, logits):
        return quick_jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(x, experts_of(3, config), logits, shared)

    x, logits = x_of(3, config, 8), logits_of(3, config, 8)
    found = gradients(loss, *(jnp.where(real, array, jnp.nan) for array in (x, logits)))
    wanted = gradients(whole, x, logits)
    jax.tree.map(lambda a, b: check_close(a, b, 1e-5), found, wanted)


@pytest.mark.parametrize("exchange", [AllGatherReduceScatter(), AllToAll()], ids=["all-gather", "all-to-all"])
def test_scan_and_remat(exchange):
    """Two layers in a scan, each computed again for its derivative, are two layers one after the other."""
    mesh = mesh_of(tp=1, dp=2)
    parallel = parallel_of(mesh, True)
    layers = [experts_of(seed, CONFIG) for seed in (0, 1)]
    x, logits = x_of(0, CONFIG, 8), logits_of(0, CONFIG, 8)

    def one(x, experts):
        experts = place_experts(experts, CONFIG, parallel)
        options = {"parallel": parallel, "mesh": mesh, "exchange": exchange, "implementation": "xla"}
        return x + moe_sharded(x, experts, logits, CONFIG, **options)

    def scanned(x, stacked):
        step = jax.checkpoint(lambda x, experts: (one(x, experts), None))
        return jnp.sum(jax.lax.scan(step, x, stacked)[0] ** 2)

    def unrolled(x, stacked):
        for i in range(2):
            experts = jax.tree.map(lambda leaf: leaf[i], stacked)
            x = x + moe(x, experts, logits, CONFIG, implementation="xla")
        return jnp.sum(x**2)

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    found, wanted = (quick_jit(jax.grad(loss, argnums=(0, 1)))(x, stacked) for loss in (scanned, unrolled))
    jax.tree.map(lambda a, b: check_close(a, b, 1e-5), found, wanted)
