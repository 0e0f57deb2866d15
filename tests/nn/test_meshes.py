"""The flax layers over virtual devices: logical axes, the same numbers, and checkpoints that change the mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import linen, nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax import Fp8Training, MoEConfig, ParallelConfig, RoutingConfig
from moe_jax.nn import MoE, balance, sown, sown_sum
from moe_jax.nn import linen as moe_linen
from moe_jax.parallel import Batched
from tests.layers import normal, quick_jit
from tests.util import check_close

CONFIG = MoEConfig(
    8, 2, 16, 32, routing=RoutingConfig("deepseek_v3"), has_correction_bias=True, dtype="float32",
    num_shared_experts=1, shared_intermediate_size=16,
)  # fmt: skip
EXPERTS = (("expert", "dp"), ("embed", None), ("mlp", None))  # expert parallelism
ROWS = (("expert", None), ("embed", "dp"), ("mlp", "tp"))  # weights in parts, FSDP and TP


def mesh_of(*shape, axes=("dp", "tp")):
    return jax.make_mesh(shape, axes[: len(shape)], axis_types=(AxisType.Auto,) * len(shape))


def make(config, **settings):
    return nnx.jit(lambda: MoE(config, rngs=nnx.Rngs(0), **settings))()


def sharded_layer(mesh, rules, config=CONFIG, **options):
    """Its parameters are made where the rules say, and its tokens go to their experts over the mesh."""
    with jax.set_mesh(mesh), nnx.logical_axis_rules(rules):
        return make(config, parallel=ParallelConfig.of_mesh(mesh, **options), mesh=mesh)


def loss(layer, x):
    y, intermediates = nnx.capture(layer, nnx.Intermediate)(x)
    value = jnp.mean(y**2) + 0.1 * sown_sum(intermediates, "load_balancing_loss")
    return value + 1e-3 * sown_sum(intermediates, "router_z_loss"), (y, intermediates)


def value_and_gradient(layer, x, loss=loss):
    graph, parameters, rest = nnx.split(layer, nnx.Param, ...)

    def of_parameters(parameters, rest, x):
        return loss(nnx.merge(graph, parameters, rest), x)

    return quick_jit(jax.value_and_grad(of_parameters, has_aux=True))(parameters, rest, x)


@pytest.fixture(scope="module")
def alone():
    """On one device: the layer, its input, and what comes of it."""
    layer, x = make(CONFIG), normal(1, 4, 8, 16)
    return layer, x, value_and_gradient(layer, x)


@pytest.mark.parametrize(
    ("shape", "rules", "options"),
    [
        ((4,), EXPERTS, {"enable_expert_parallel": True}),
        ((2, 2), EXPERTS, {"enable_expert_parallel": True}),
        ((2, 2), ROWS, {}),
    ],
    ids=["EP", "EP over dp and tp", "parts of every expert"],
)
def test_a_mesh_gives_the_numbers_of_one_device(alone, shape, rules, options):
    reference, x, ((value, (y, intermediates)), gradient) = alone
    mesh = mesh_of(*shape)
    layer = sharded_layer(mesh, rules, **options)
    for name in ("w13", "router", "shared_w2"):
        np.testing.assert_array_equal(getattr(layer, name)[...], getattr(reference, name)[...])
    wanted = P("dp", None, None) if rules is EXPERTS else P(None, "tp", "dp")
    assert layer.w13[...].sharding.is_equivalent_to(NamedSharding(mesh, wanted), 3)
    x = jax.device_put(x, NamedSharding(mesh, P("dp")))
    (mine, (out, sowed)), slope = value_and_gradient(layer, x)
    check_close(mine, value, 1e-6)
    check_close(out, y, 1e-6)
    np.testing.assert_array_equal(sown(sowed, "expert_loads")[()], sown(intermediates, "expert_loads")[()])
    for name in ("router", "w13", "w2", "shared_w13", "shared_w2"):
        check_close(slope[name].get_value(), gradient[name].get_value(), 2e-5)


@pytest.mark.once
def test_fp8_with_parameters_in_parts():
    """FSDP over the hidden size, beside expert parallelism: weights are quantized after they are gathered."""
    config = MoEConfig(4, 2, 128, 128, fp8_training=Fp8Training())
    x, mesh = normal(1, 64, 128), mesh_of(2, 2)
    rules = (("expert", "dp"), ("embed", "tp"), ("mlp", None))
    g = normal(2, 64, 128)

    def projected(layer, x):
        return jnp.sum(layer(x).astype(jnp.float32) * g), None

    layer = sharded_layer(mesh, rules, config, enable_expert_parallel=True)
    assert layer.w13[...].sharding.is_equivalent_to(NamedSharding(mesh, P("dp", None, "tp")), 3)
    (_, slope), (_, expected) = (
        value_and_gradient(one, at, projected)
        for one, at in ((layer, jax.device_put(x, NamedSharding(mesh, P("dp")))), (make(config), x))
    )
    for name in ("router", "w13", "w2"):
        check_close(slope[name].get_value(), expected[name].get_value(), 1e-4)


def test_experts_that_do_not_divide_find_their_ranks():
    config = dataclasses.replace(CONFIG, num_experts=6)
    x, mesh = normal(2, 16, 16), mesh_of(4)
    parallel = ParallelConfig.of_mesh(mesh, enable_expert_parallel=True)
    outputs = []
    for settings in ({}, {"parallel": parallel, "mesh": mesh}):
        graph, state = nnx.split(make(config, **settings))
        outputs.append(quick_jit(lambda state, x: nnx.merge(graph, state)(x))(state, x))
    check_close(outputs[1], outputs[0], 1e-6)


def test_an_exchange_that_drops_says_how_many():
    x, mesh = normal(2, 128, 16), mesh_of(2)
    parallel = ParallelConfig.of_mesh(mesh, enable_expert_parallel=True)
    exchange = Batched(max_tokens=8, overflow="drop")
    layer = make(CONFIG, parallel=parallel, mesh=mesh, exchange=exchange)
    (_, (_, intermediates)), _ = value_and_gradient(layer, x)
    loads = sown(intermediates, "expert_loads")[()]
    assert int(loads.sum()) == 256 and int(sown_sum(intermediates, "num_dropped")) >= 256 - 2 * 8 * 8


def test_linen_parameters_are_sharded_by_rules():
    mesh, x = mesh_of(2, 2), normal(1, 8, 16)
    module = moe_linen.MoE(CONFIG)
    boxed = jax.eval_shape(module.init, jax.random.key(0), x)
    shardings = linen.logical_to_mesh_sharding(linen.get_partition_spec(boxed), mesh, ROWS)
    assert shardings["params"]["w13"].spec == P(None, "tp", "dp")
    variables = jax.jit(lambda key, x: linen.unbox(module.init(key, x)), out_shardings=shardings)(jax.random.key(0), x)
    apart = quick_jit(module.apply)(variables, x)
    together = quick_jit(module.apply)(jax.device_get(variables), x)
    check_close(apart, together, 1e-6)


def test_a_checkpoint_goes_onto_another_mesh(tmp_path, alone):
    _, x, (_, _) = alone
    mesh = mesh_of(4)
    layer = sharded_layer(mesh, EXPERTS, enable_expert_parallel=True)
    balance(layer, value_and_gradient(layer, x)[0][1][1], 0.25)
    state = nnx.state(layer)
    assert state["w13"].get_value().sharding.num_devices == 4
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", nnx.to_pure_dict(state))

    other = mesh_of(2, 2)
    with jax.set_mesh(other), nnx.logical_axis_rules(ROWS):
        model = nnx.eval_shape(lambda: MoE(CONFIG, rngs=nnx.Rngs(1)))
        abstract = nnx.state(model)
        shardings = nnx.get_named_sharding(abstract, other)
    wanted = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nnx.to_pure_dict(abstract),
        nnx.to_pure_dict(shardings),
    )
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "step", wanted)
    assert restored["w13"].sharding.spec == P(None, "tp", "dp") and restored["w13"].sharding.mesh == other
    for name, array in nnx.to_pure_dict(state).items():
        np.testing.assert_array_equal(restored[name], array)
    assert np.any(np.asarray(restored["correction_bias"]))
    nnx.update(model, restored)
    graph, restored_state = nnx.split(model)
    out = quick_jit(lambda state, x: nnx.merge(graph, state)(x))(restored_state, x)
    check_close(out, value_and_gradient(layer, x)[0][1][0], 1e-6)
