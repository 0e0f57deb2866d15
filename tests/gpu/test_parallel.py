"""Layers over several GPUs: every exchange, before and after quantizing, and derivatives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import MoEConfig, ParallelConfig, moe, quantize_experts
from moe_jax.parallel import (
    AllGatherReduceScatter,
    AllToAll,
    Batched,
    PeerExchange,
    choose_exchange,
    moe_sharded,
    place_experts,
)
from tests.gpu.test_layer import inputs, make_weights
from tests.util import assert_discriminates, check_close

# An odd number of experts, so that two ranks have unlike shares, is none that the kernel of the routing takes.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:topk runs its plain-JAX form")]
TOKENS = 64


@pytest.fixture(scope="module")
def mesh():
    devices = jax.devices("cuda")
    if len(devices) < 2:
        pytest.skip(f"needs 2 GPUs, there are {len(devices)}")
    return jax.make_mesh((len(devices),), ("dp",), devices=devices, axis_types=(jax.sharding.AxisType.Auto,))


def layer_of(mesh, config, exchange, ep=True):
    parallel = ParallelConfig.of_mesh(mesh, enable_expert_parallel=ep)

    def layer(x, experts, logits):
        placed = place_experts(experts, config, parallel)
        return moe_sharded(x, placed, logits, config, parallel=parallel, mesh=mesh, exchange=exchange)

    return layer


EXCHANGES = {
    "all-gather": AllGatherReduceScatter,
    "all-to-all": AllToAll,
    "peer": PeerExchange,
    "batched": lambda **options: Batched(AllToAll(**options), max_tokens=TOKENS * 8),
}


@pytest.mark.parametrize("kind", EXCHANGES)
@pytest.mark.parametrize(
    "name, before", [(None, False), ("fp8_block", False), ("fp8_block", True), ("fp8_channel", True)]
)
def test_layer(mesh, kind, name, before):
    config = MoEConfig(17, 4, 512, 256, quantization=name)
    experts = make_weights(config, jax.random.key(0))
    experts = experts if name is None else quantize_experts(experts, name)
    x, logits = inputs(config, TOKENS * mesh.size)
    expected = np.asarray(jax.jit(functools.partial(moe, config=config))(x, experts, logits), np.float32)
    layer = jax.jit(layer_of(mesh, config, EXCHANGES[kind](quantize_before=before)))
    out = np.asarray(layer(x, experts, logits), np.float32)
    check_close(out, expected, 1e-2 if name is None else 2e-2)
    assert_discriminates(lambda y: check_close(y, expected, 2e-2), out)
    np.testing.assert_array_equal(out, np.asarray(layer(x, experts, logits), np.float32))


@pytest.mark.parametrize("kind", ["all-gather", "all-to-all", "peer"])
def test_gradients(mesh, kind):
    config = MoEConfig(17, 4, 256, 128)
    experts = make_weights(config, jax.random.key(0))
    x, logits = inputs(config, TOKENS * mesh.size)
    cotangent = jax.random.normal(jax.random.key(5), x.shape)

    def gradients(layer):
        def loss(*operands):
            return jnp.sum(layer(*operands).astype(jnp.float32) * cotangent)

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(x, experts, logits)

    wanted = gradients(functools.partial(moe, config=config, implementation="xla"))
    found = gradients(layer_of(mesh, config, EXCHANGES[kind]()))
    jax.tree.map(lambda a, b: check_close(jax.device_get(a), jax.device_get(b), 2e-2), found, wanted)


def test_tensor_parallel_over_ranks_of_data(mesh):
    config = MoEConfig(8, 2, 512, 128 * mesh.size)
    experts = make_weights(config, jax.random.key(0))
    x, logits = inputs(config, TOKENS * mesh.size)
    expected = np.asarray(jax.jit(functools.partial(moe, config=config))(x, experts, logits), np.float32)
    out = jax.jit(layer_of(mesh, config, None, ep=False))(x, experts, logits)
    check_close(np.asarray(out, np.float32), expected, 1e-2)


def test_gpus_of_a_process_exchange_by_our_kernels(mesh):
    parallel = ParallelConfig.of_mesh(mesh, enable_expert_parallel=True)
    assert type(choose_exchange(parallel, mesh).exchange) is PeerExchange
