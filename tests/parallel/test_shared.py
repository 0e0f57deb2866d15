"""The shared expert beside experts over a mesh: split or whole, added once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import MoEConfig, SharedExpertWeights, moe
from moe_jax.moe import shared_expert
from moe_jax.parallel.all_to_all import AllToAll
from moe_jax.parallel.gather_scatter import AllGatherReduceScatter
from moe_jax.parallel.weights import place_shared
from tests.layers import check_layer, experts_of, logits_of, normal, quick_jit, reference_moe, x_of
from tests.parallel.meshes import mesh_of, only_real, parallel_of, sharded
from tests.util import assert_discriminates, check_close

CONFIG = MoEConfig(
    5, 2, 16, 12, dtype="float32", num_shared_experts=1, shared_intermediate_size=10, shared_expert_gate=True
)

# dp, tp, expert parallel, sequence parallel, exchange; 10 has no 4 equal parts
CASES = {
    "tp": (1, 4, False, False, None),
    "ep": (1, 4, True, False, None),
    "dp": (4, 1, False, False, None),
    "all-gather": (2, 2, True, False, AllGatherReduceScatter()),
    "all-to-all": (2, 4, True, False, AllToAll()),
    "sequence": (2, 2, True, True, AllToAll()),
}


def problem(config=CONFIG):
    shared = SharedExpertWeights(
        w13=normal([0, 30], 20, 16, scale=0.25), w2=normal([0, 31], 16, 10, scale=0.6), gate=normal([0, 32], 1, 16)
    )
    return x_of(0, config, 16), experts_of(0, config), logits_of(0, config, 16), shared


def layer_of(name, **options):
    dp, tp, ep, sp, exchange = CASES[name]
    mesh = mesh_of(tp, dp)
    parallel = parallel_of(mesh, ep, sp)
    layer = sharded(mesh, parallel, CONFIG, exchange=exchange, compiled=False, **options)

    def run(x, experts, logits, shared, **arrays):
        return layer(x, experts, logits, shared=place_shared(shared, CONFIG, parallel), **arrays)

    return run


@pytest.mark.parametrize("name", CASES)
def test_layer(name):
    x, experts, logits, shared = problem()
    expected = reference_moe(x, experts, logits, CONFIG) + shared_expert(x, shared, CONFIG)
    out = quick_jit(layer_of(name))(x, experts, logits, shared)
    check_layer(out, expected, CONFIG)
    assert_discriminates(lambda y: check_close(y, expected, 1e-5), out)


def test_rows_that_are_no_tokens():
    x, experts, logits, shared = problem()
    counts = jnp.array([3, 8], jnp.int32)
    expected = reference_moe(x, experts, logits, CONFIG) + shared_expert(x, shared, CONFIG)
    out = quick_jit(layer_of("all-gather", chunks=2))(x, experts, logits, shared, num_tokens=counts)
    check_layer(out, only_real(expected, counts, 2), CONFIG)
    assert not np.asarray(out)[3:8].any()


@pytest.mark.parametrize("name", ["tp", "sequence"])
def test_gradients(name):
    x, experts, logits, shared = problem()
    cotangent = normal([0, 33], *x.shape)

    def gradients(layer):
        return quick_jit(jax.grad(lambda x, shared: jnp.sum(layer(x, shared) * cotangent), argnums=(0, 1)))(x, shared)

    def whole(x, shared):
        return moe(x, experts, logits, CONFIG, implementation="xla") + shared_expert(x, shared, CONFIG)

    wanted = gradients(whole)
    found = gradients(lambda x, shared: layer_of(name)(x, experts, logits, shared))
    jax.tree.map(lambda a, b: check_close(a, b, 1e-5), found, wanted)


def test_one_reduce_for_both():
    """Partial sums of the experts and of the shared one are added up together, unless an exchange has reduced the former."""
    for name, reduces in (("tp", 1), ("ep", 1), ("all-to-all", 2), ("sequence", 0)):
        text = str(jax.make_jaxpr(layer_of(name))(*problem()))
        assert text.count("= psum") == reduces, name
