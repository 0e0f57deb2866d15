"""Ranks that hold a layer together: sizes, axes of the mesh, and what is refused."""

import dataclasses
import pickle

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from moe_jax.parallel import ParallelConfig
from tests.util import without_type_checks

unchecked = without_type_checks("moe_jax.parallel.config")
EP = {"enable_expert_parallel": True}


@pytest.mark.parametrize(
    ("sizes", "ep", "tp", "exchange"),
    [
        ({}, 1, 1, False),
        (EP, 1, 1, False),
        ({"tp_size": 2}, 1, 2, False),
        ({"dp_size": 2}, 1, 2, False),
        ({"tp_size": 2, "dp_size": 2}, 1, 4, False),
        ({"tp_size": 2} | EP, 2, 1, False),
        ({"dp_size": 2} | EP, 2, 1, True),
        ({"tp_size": 2, "dp_size": 2} | EP, 4, 1, True),
        ({"tp_size": 2, "pcp_size": 3} | EP, 6, 1, True),
        ({"tp_size": 2, "pcp_size": 3, "dp_size": 5}, 1, 30, False),
        ({"tp_size": 2, "sequence_parallel": True} | EP, 2, 1, True),
    ],
    ids=str,
)
def test_sizes(sizes, ep, tp, exchange):
    parallel = ParallelConfig(**sizes)
    assert (parallel.ep_size, parallel.experts_tp_size, parallel.uses_exchange) == (ep, tp, exchange)
    assert parallel.flattened_size == ep * tp
    assert parallel.use_ep == (ep > 1)


def test_axes_of_the_mesh():
    parallel = ParallelConfig(2, 1, 4, True, tp_axis="model", dp_axis=("hosts", "data"))
    assert parallel.expert_axes == ("hosts", "data", "model")
    assert (parallel.token_axes, parallel.num_token_shards) == (("hosts", "data"), 4)
    shared_out = dataclasses.replace(parallel, sequence_parallel=True)
    assert (shared_out.token_axes, shared_out.num_token_shards) == (("hosts", "data", "model"), 8)
    assert ParallelConfig(tp_axis=None).expert_axes == ()


def test_values_that_a_jit_holds():
    parallel = unchecked.ParallelConfig(tp_size=np.int64(2), dp_axis=["a", "b"])
    assert type(parallel.tp_size) is int and parallel.dp_axis == ("a", "b")
    parallel = ParallelConfig(tp_size=2)
    assert hash(parallel) == hash(ParallelConfig(tp_size=2)) and pickle.loads(pickle.dumps(parallel)) == parallel


@pytest.mark.parametrize("axes", [{}, {"pcp_axis": "tp", "tp_axis": "pcp"}], ids=str)
def test_rank_is_that_of_the_device(axes):
    """Inside shard_map every device finds the place that `rank_of` gives it on the host."""
    parallel = ParallelConfig(2, 2, 2, **axes)
    axes = (parallel.dp_axis, parallel.pcp_axis, parallel.tp_axis)
    mesh = jax.make_mesh((2, 2, 2), axes, axis_types=(AxisType.Auto,) * 3)
    spec = PartitionSpec(parallel.dp_axis, parallel.pcp_axis, parallel.tp_axis)
    ranks = jax.shard_map(lambda: parallel.rank().reshape(1, 1, 1), mesh=mesh, in_specs=(), out_specs=spec)()
    for dp, pcp, tp in np.ndindex(2, 2, 2):
        assert ranks[dp, pcp, tp] == parallel.rank_of(dp_rank=dp, pcp_rank=pcp, tp_rank=tp) == 4 * dp + 2 * pcp + tp


def test_of_mesh():
    mesh = AbstractMesh((2, 3, 4), ("dp", "stage", "tp"))
    parallel = ParallelConfig.of_mesh(mesh, enable_expert_parallel=True, sequence_parallel=True)
    assert parallel == ParallelConfig(4, 1, 2, True, True, pcp_axis=None)
    parallel.check_mesh(mesh)
    named = ParallelConfig.of_mesh(mesh, dp_axis=("dp", "stage"))
    assert (named.dp_size, named.tp_size, named.expert_axes) == (6, 4, ("dp", "stage", "tp"))
    with pytest.raises(ValueError, match=r"tp_axis='model' is not on the mesh, whose axes are .*'stage': 3"):
        ParallelConfig.of_mesh(mesh, tp_axis="model")
    with pytest.raises(ValueError, match="none of them"):
        ParallelConfig.of_mesh(AbstractMesh((2,), ("stage",)))


def test_a_mesh_that_does_not_fit():
    mesh = AbstractMesh((2, 4), ("dp", "tp"))
    ParallelConfig(tp_size=4, dp_size=2, pcp_axis="anything").check_mesh(mesh)
    with pytest.raises(ValueError, match=r"tp_size=2, but the mesh has size 4 along tp_axis='tp'"):
        ParallelConfig(tp_size=2, dp_size=2).check_mesh(mesh)
    with pytest.raises(ValueError, match=r"dp_size=1, but the mesh has size 2 along dp_axis='dp'"):
        ParallelConfig(tp_size=4).check_mesh(mesh)
    with pytest.raises(ValueError, match=r"pcp_axis='pcp' of pcp_size=2 is not on the mesh"):
        ParallelConfig(4, 2, 2).check_mesh(mesh)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tp_size": 0}, ValueError, "tp_size=0 must be at least 1"),
        ({"dp_size": 2.0}, TypeError, "dp_size=2.0 must be an integer"),
        ({"enable_expert_parallel": 1}, TypeError, "must be True or False"),
        ({"tp_size": 2, "tp_axis": None}, ValueError, "tp_axis=None says .* tp_size=2; name the axis"),
        ({"tp_size": 2, "tp_axis": ()}, TypeError, "must be the name of a mesh axis"),
        ({"tp_size": 2, "dp_size": 2, "dp_axis": "tp"}, ValueError, "name one twice"),
        ({"tp_size": 2, "sequence_parallel": True}, ValueError, "needs enable_expert_parallel=True"),
        ({"dp_size": 2, "sequence_parallel": True} | EP, ValueError, "and tp_size > 1"),
    ],
    ids=str,
)
def test_refusals(arguments, error, message):
    with pytest.raises(error, match=message):
        unchecked.ParallelConfig(**arguments)


def test_rank_of_refuses_ranks_outside_their_size():
    with pytest.raises(ValueError, match=r"dp_rank=2 must lie in \[0, dp_size=2\)"):
        ParallelConfig(dp_size=2).rank_of(dp_rank=2)
