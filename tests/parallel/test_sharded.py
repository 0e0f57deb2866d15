"""Layers over a mesh of eight CPU devices are the layers of one."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding

from moe_jax import MoEConfig, RoutingConfig
from moe_jax.parallel import ExpertPlacement, ParallelConfig
from moe_jax.parallel.gather_scatter import AllGatherReduceScatter
from moe_jax.parallel.no_exchange import NoExchange
from moe_jax.parallel.sharded import moe_sharded
from moe_jax.parallel.weights import expert_specs, place_experts
from tests.layers import check_layer, check_unit_rms, experts_of, logits_of, reference_moe, x_of
from tests.parallel.meshes import mesh_of, only_real, parallel_of, sharded
from tests.util import assert_discriminates

# No size divides another: 5 experts, and an intermediate size that 4 and 8 do not divide.
CONFIG = MoEConfig(5, 2, 16, 12, dtype="float32", has_bias=True)
SIZES = [sizes for sizes in itertools.product((1, 2, 4), repeat=3) if np.prod(sizes) <= 8]


def problem(config, num_tokens, seed=0):
    return x_of(seed, config, num_tokens), experts_of(seed, config), logits_of(seed, config, num_tokens)


def check(config, mesh, parallel, num_tokens=16, seed=0, **options):
    operands = problem(config, num_tokens, seed)
    expected = reference_moe(*operands, config)
    check_unit_rms(expected)
    out = sharded(mesh, parallel, config, **options)(*operands)
    check_layer(out, expected, config)
    return out, expected


@pytest.mark.parametrize("ep", [True, False], ids=["ep", "tp"])
@pytest.mark.parametrize("dp, pcp, tp", SIZES)
def test_every_size(dp, pcp, tp, ep):
    mesh = mesh_of(tp, dp, pcp)
    out, expected = check(CONFIG, mesh, parallel_of(mesh, ep))
    assert_discriminates(lambda y: check_layer(y.astype(CONFIG.dtype), expected, CONFIG), out)


@pytest.mark.parametrize("sizes", [(2, 1, 2), (1, 2, 4)])
def test_sequence_parallel(sizes):
    dp, pcp, tp = sizes
    mesh = mesh_of(tp, dp, pcp)
    check(CONFIG, mesh, parallel_of(mesh, ep=True, sp=True))


CONFIGS = {
    "bf16": MoEConfig(8, 3, 16, 24),
    "no gate": MoEConfig(6, 2, 16, 20, activation="gelu_no_mul", has_bias=True, dtype="float32"),
    "swigluoai": MoEConfig(6, 2, 16, 20, activation="swigluoai", has_bias=True, dtype="float32"),
    "llama4": MoEConfig(
        4, 1, 16, 12, routing=RoutingConfig("llama4"), apply_router_weight_on_input=True, dtype="float32"
    ),
}


@pytest.mark.parametrize("ep", [True, False], ids=["ep", "tp"])
@pytest.mark.parametrize("name", CONFIGS)
def test_configs(name, ep):
    mesh = mesh_of(tp=2, dp=2)
    check(CONFIGS[name], mesh, parallel_of(mesh, ep))


def test_round_robin_and_a_placement_of_ones_own():
    mesh = mesh_of(tp=2, dp=2)
    parallel = parallel_of(mesh, ep=True)
    check(CONFIG, mesh, parallel, placement=ExpertPlacement.make(5, 4, "round_robin"))
    homes = np.full((4, 5), -1)  # all experts on two ranks, in an order of their own
    homes[2, [4, 0, 1]], homes[1, [3, 2]] = [0, 1, 2], [0, 1]
    check(CONFIG, mesh, parallel, placement=ExpertPlacement.of_map(homes))


@pytest.mark.parametrize("ep", [True, False], ids=["ep", "tp"])
def test_ranks_with_fewer_tokens_and_none(ep):
    """Rows past the tokens may hold anything: their outputs are exactly zero, and nobody else's change."""
    mesh = mesh_of(tp=2, dp=4)
    layer = sharded(mesh, parallel_of(mesh, ep), CONFIG)
    x, experts, logits = problem(CONFIG, 12)
    counts = jnp.array([3, 0, 1, 2], jnp.int32)
    expected = only_real(reference_moe(x, experts, logits, CONFIG), counts, 4)
    padding = only_real(jnp.ones_like(x), counts, 4) == 0
    x = jnp.where(padding, jnp.nan, x)
    logits = jnp.where(padding[:, :1], jnp.inf, logits)
    out = layer(x, experts, logits, num_tokens=counts)
    check_layer(out, expected, CONFIG)
    assert not np.asarray(out)[np.asarray(padding)].any()


def test_no_tokens_at_all():
    mesh = mesh_of(dp=2)
    assert sharded(mesh, parallel_of(mesh, True), CONFIG)(*problem(CONFIG, 0)).shape == (0, 16)


def test_explicit_axes():
    mesh = mesh_of(tp=2, dp=2, explicit=True)
    parallel = parallel_of(mesh, ep=True)
    x, experts, logits = problem(CONFIG, 8)
    placed = place_experts(experts, CONFIG, parallel)
    out = moe_sharded(x, placed, logits, CONFIG, parallel=parallel, mesh=mesh, implementation="xla")
    expected = reference_moe(x, experts, logits, CONFIG)
    check_layer(out, expected, CONFIG)
    assert out.sharding.spec[0] == "dp"

    with jax.set_mesh(mesh):
        layer = jax.jit(
            lambda *operands: moe_sharded(*operands, CONFIG, parallel=parallel, mesh=mesh, implementation="xla")
        )
        check_layer(layer(x, placed, logits), expected, CONFIG)


def test_explicit_and_automatic_axes():
    types = (AxisType.Explicit, AxisType.Auto)
    mesh = jax.make_mesh((2, 2), ("dp", "tp"), devices=jax.devices("cpu")[:4], axis_types=types)
    parallel = parallel_of(mesh, ep=True)
    x, experts, logits = problem(CONFIG, 8)
    placed = place_experts(experts, CONFIG, parallel)
    out = moe_sharded(x, placed, logits, CONFIG, parallel=parallel, mesh=mesh, implementation="xla")
    check_layer(out, reference_moe(x, experts, logits, CONFIG), CONFIG)


def test_other_axes_of_a_mesh_and_several_for_one_kind():
    """Experts over two axes of a mesh, tokens over one of them, and an axis that is nobody's."""
    types = (AxisType.Auto,) * 3
    mesh = jax.make_mesh((2, 2, 2), ("other", "data", "model"), devices=jax.devices("cpu")[:8], axis_types=types)
    for axes in ({"dp_axis": "data", "tp_axis": "model"}, {"dp_axis": ("data", "model")}):
        parallel = ParallelConfig.of_mesh(mesh, enable_expert_parallel=True, **axes)
        assert parallel.expert_axes == ("data", "model")
        check(CONFIG, mesh, parallel, num_tokens=8)


def test_each_rank_holds_its_own_weights():
    mesh = mesh_of(tp=2, dp=2)
    parallel = parallel_of(mesh, ep=True)
    experts = place_experts(problem(CONFIG, 1)[1], CONFIG, parallel)
    specs = expert_specs(experts, parallel)
    placed = jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), experts, specs)
    shapes = {shard.data.shape for shard in placed.w13.addressable_shards}
    assert shapes == {(2, 24, 16)}  # two of five experts, or one and room for another


def test_reasons():
    parallel = ParallelConfig(dp_size=2)
    assert "split over the axes ('dp',)" in NoExchange().reason_against(parallel)
    assert AllGatherReduceScatter().reason_against(parallel) is None
    mesh = mesh_of(dp=2)
    with pytest.raises(ValueError, match="NoExchange cannot be used here: tokens are split"):
        sharded(mesh, parallel, CONFIG, exchange=NoExchange())(*problem(CONFIG, 4))
    with pytest.raises(ValueError, match="5 tokens, which 2 shards"):
        sharded(mesh, parallel, CONFIG)(*problem(CONFIG, 5))
    with pytest.raises(ValueError, match="a placement is for expert parallelism"):
        sharded(mesh, parallel, CONFIG, placement=ExpertPlacement.make(5, 2))(*problem(CONFIG, 4))
    with pytest.raises(ValueError, match="for ep_size=4 and num_experts=5, but there are ep_size=2"):
        sharded(mesh, parallel_of(mesh, True), CONFIG, placement=ExpertPlacement.make(5, 4))(*problem(CONFIG, 4))
    with pytest.raises(ValueError, match="takes those of all ranks"):
        place_experts(jax.tree.map(lambda leaf: leaf[:4], problem(CONFIG, 1)[1]), CONFIG, parallel)
    x, experts, logits = problem(CONFIG, 4)
    for ep in (True, False):
        with pytest.raises(ValueError, match="weights of 2 ranks hold 5 experts, with 12 columns of w2"):
            moe_sharded(x, experts, logits, CONFIG, parallel=parallel_of(mesh, ep), mesh=mesh)
