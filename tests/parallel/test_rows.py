"""Rows to other ranks and back: whole blocks as on CPUs, and ragged ones as on GPUs, with a stand-in for the collective."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from moe_jax.parallel import rows
from tests.layers import normal
from tests.parallel.meshes import mesh_of

RANKS, TOKENS = 4, 5


def ragged_all_to_all(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """What the documentation of the JAX function says, by gathering everything: CPUs do not have it."""
    me = lax.axis_index(axis_name)
    operands, starts, sizes, targets = (
        lax.all_gather(a, axis_name) for a in (operand, input_offsets, send_sizes, output_offsets)
    )
    for rank in range(RANKS):
        row = jnp.arange(output.shape[0])
        place = row - targets[rank, me]
        held = (place >= 0) & (place < jnp.minimum(sizes[rank, me], recv_sizes[rank]))
        source = operands[rank][jnp.clip(starts[rank, me] + place, 0, operand.shape[0] - 1)]
        output = jnp.where(held.reshape(-1, *[1] * (output.ndim - 1)), source, output)
    return output


@pytest.fixture(params=["whole", "ragged"])
def way(request, monkeypatch):
    if request.param == "ragged":
        monkeypatch.setattr(rows.lax, "ragged_all_to_all", ragged_all_to_all)
        monkeypatch.setattr(rows.lax, "platform_dependent", lambda *operands, cuda, default: cuda(*operands))


def mapped(function):
    mesh = mesh_of(dp=RANKS)
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=P("dp"), out_specs=P("dp"), check_vma=False))


SENDS = np.random.default_rng(0).random((RANKS, TOKENS, RANKS)) < 0.4
SENDS[1] = False  # a rank that sends nothing
SENDS[:, :, 3] = False  # one that gets nothing


def test_dispatch(way):
    x = normal(0, RANKS * TOKENS, 3)
    ids = jnp.arange(RANKS * TOKENS, dtype=jnp.int32)
    run = mapped(lambda x, ids, sends: rows.dispatch((x, ids), sends, ("dp",)))
    found, found_ids = run(x, ids, SENDS.reshape(-1, RANKS))
    expected = np.where(SENDS.transpose(2, 0, 1)[..., None], np.asarray(x).reshape(1, RANKS, TOKENS, 3), 0)
    np.testing.assert_array_equal(found.reshape(RANKS, RANKS, TOKENS, 3), expected)
    ids = np.where(SENDS.transpose(2, 0, 1), np.asarray(ids).reshape(1, RANKS, TOKENS), 0)
    np.testing.assert_array_equal(found_ids.reshape(RANKS, RANKS, TOKENS), ids)


def test_combine(way):
    """In float32 and in the order of ranks; what was not sent may be anything."""
    y = normal(1, RANKS, RANKS, TOKENS, 3, dtype="bfloat16")
    y = jnp.where(SENDS.transpose(2, 0, 1)[..., None], y, jnp.nan)
    run = mapped(lambda y, sends: rows.combine(y, sends, ("dp",)))
    out = run(y.reshape(RANKS * RANKS, TOKENS, 3), SENDS.reshape(-1, RANKS)).reshape(RANKS, TOKENS, 3)
    total = np.zeros((RANKS, TOKENS, 3), np.float32)
    for rank in range(RANKS):  # that has run the experts
        total = total + np.where(SENDS[:, :, rank, None], np.asarray(y[rank], np.float32), 0)
    np.testing.assert_array_equal(out, jnp.asarray(total, jnp.bfloat16))


def test_each_is_the_transpose_of_the_other(way):
    x, y = normal(2, RANKS * TOKENS, 3), normal(3, RANKS * RANKS, TOKENS, 3)
    sends = SENDS.reshape(-1, RANKS)
    dispatch = mapped(lambda x, sends: rows.dispatch(x, sends, ("dp",)))
    combine = mapped(lambda y, sends: rows.combine(y, sends, ("dp",)))
    np.testing.assert_allclose(jnp.vdot(dispatch(x, sends), y), jnp.vdot(x, combine(y, sends)), rtol=1e-5)
    grad = jax.grad(lambda x: jnp.vdot(dispatch(x, sends), y))(x)
    np.testing.assert_allclose(grad, combine(y, sends), rtol=1e-6)
    grad = jax.grad(lambda y: jnp.vdot(combine(y, sends), x))(y)
    np.testing.assert_allclose(grad, dispatch(x, sends), rtol=1e-6)


def test_received(way):
    found = mapped(lambda sends: rows.received(sends, ("dp",)))(SENDS.reshape(-1, RANKS))
    np.testing.assert_array_equal(found.reshape(RANKS, RANKS, TOKENS), SENDS.transpose(2, 0, 1))
