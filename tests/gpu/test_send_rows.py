"""Rows between GPUs: bits of the plain form, over routings that change, are skewed, or leave a rank without tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.ops.exchange import send_rows

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def mesh():
    devices = jax.devices("cuda")
    if len(devices) < 2:
        pytest.skip(f"needs 2 GPUs, there are {len(devices)}")
    return jax.make_mesh((len(devices),), ("ep",), devices=devices, axis_types=(jax.sharding.AxisType.Auto,))


def over(mesh, function):
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"), check_vma=False))


@pytest.mark.parametrize("hidden", [7168, 64])
@pytest.mark.parametrize("tokens", [1, 7, 128, 3000])
def test_the_bits_of_the_plain_form(mesh, tokens, hidden):
    """Up to two places of each row on any rank; scales and notes go along."""
    ranks, random = mesh.size, np.random.default_rng(tokens)
    num_rows = 2 * tokens * ranks

    def both(x, scales, destinations, notes):
        sent = []
        for implementation in ("mosaic", "xla"):
            options = dict(num_rows=num_rows, axis_names=("ep",), notes=notes, implementation=implementation)
            (rows, of_rows), all_notes = send_rows([x, scales], destinations, **options)
            everywhere = jax.lax.all_gather(destinations, "ep").reshape(-1) - jax.lax.axis_index("ep") * num_rows
            here = jnp.zeros(num_rows, bool).at[jnp.where(everywhere < 0, num_rows, everywhere)].set(True, mode="drop")
            sent.append([jnp.where(here[:, None], rows, 0), jnp.where(here[:, None], of_rows, 0), all_notes])
        return jnp.stack([(a == b).all() for a, b in zip(*sent, strict=True)] + [here.any()])[None]

    run, put = over(mesh, both), functools.partial(jax.device_put, device=NamedSharding(mesh, P("ep")))
    x = put(jnp.asarray(random.standard_normal((tokens * ranks, hidden)), jnp.bfloat16))
    scales, notes = (
        put(random.random((tokens * ranks, 3)).astype(np.float32)),
        put(np.arange(5 * tokens * ranks, dtype=np.int32).reshape(-1, 5)),
    )
    for skew in (0.0, 0.0, 0.9, 1.0):
        order = random.permutation(num_rows * ranks)[: 2 * tokens * ranks].reshape(-1, 2).astype(np.int32)
        order[random.random(order.shape) < 0.3 + 0.6 * (skew == 1.0)] = -1
        order = np.where((order >= 0) & (random.random(order.shape) < skew), order % num_rows, order)  # to rank 0
        flat = order.reshape(-1)
        _, first = np.unique(flat, return_index=True)
        keep = np.zeros(flat.size, bool)
        keep[first] = True
        order = np.where(keep & (flat >= 0), flat, -1).reshape(-1, 2).astype(np.int32)
        if skew == 0.9:
            order[:tokens] = -1  # the first rank sends none
        found = np.asarray(run(x, scales, put(order), notes))
        assert found[:, :3].all() and (found[:, 3].any() or not (order >= 0).any())
