"""Meshes of CPU devices, and layers spread over them beside the same layers on one device."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from moe_jax.parallel import ParallelConfig
from moe_jax.parallel.sharded import moe_sharded
from moe_jax.parallel.weights import place_experts
from tests.layers import quick_jit


def mesh_of(tp=1, dp=1, pcp=1, explicit=False, platform="cpu"):
    devices = jax.devices(platform)[: tp * dp * pcp]
    types = (AxisType.Explicit if explicit else AxisType.Auto,) * 3
    return jax.make_mesh((dp, pcp, tp), ("dp", "pcp", "tp"), devices=devices, axis_types=types)


def parallel_of(mesh, ep, sp=False):
    return ParallelConfig.of_mesh(mesh, enable_expert_parallel=ep, sequence_parallel=sp)


def sharded(mesh, parallel, config, placement=None, implementation="xla", compiled=True, **options):
    """A layer that takes the experts as one device has them."""

    def layer(x, experts, logits, **arrays):
        experts = place_experts(experts, config, parallel, placement)
        run = functools.partial(moe_sharded, parallel=parallel, mesh=mesh, placement=placement)
        return run(x, experts, logits, config, implementation=implementation, **options, **arrays)

    return quick_jit(layer) if compiled else layer


def only_real(array, num_tokens, shards):
    """Zero in the rows past the tokens of each shard."""
    rows = jnp.arange(array.shape[0]) % (array.shape[0] // shards)
    real = rows < jnp.repeat(jnp.asarray(num_tokens), array.shape[0] // shards)
    return jnp.where(real[:, None], array, 0)
