"""Which exchange is taken, and the reasons against the others."""

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from moe_jax import MoEConfig, _compat
from moe_jax.ops.implementation import SlowPathWarning
from moe_jax.parallel import ParallelConfig, choice
from moe_jax.parallel.all_to_all import AllToAll
from moe_jax.parallel.choice import choose_exchange, explain_exchanges
from moe_jax.parallel.gather_scatter import AllGatherReduceScatter
from moe_jax.parallel.no_exchange import NoExchange
from moe_jax.parallel.peer import PeerExchange
from tests.parallel.meshes import mesh_of

EP = ParallelConfig(tp_size=2, dp_size=2, enable_expert_parallel=True)


@pytest.fixture
def gpus(monkeypatch):
    """Kernels are taken to run here; gives meshes whose devices belong to the processes ``[dp, tp]``."""
    monkeypatch.setattr(choice, "_platform", lambda mesh: None)
    choice._warn_once.cache_clear()

    def mesh(processes):
        monkeypatch.setattr(choice, "_processes", lambda mesh: np.asarray(processes))
        return jax.make_mesh((2, 2), ("dp", "tp"), devices=jax.devices("cpu")[:4])

    return mesh


@pytest.mark.parametrize(
    "parallel, exchange",
    [
        (ParallelConfig(), NoExchange),
        (ParallelConfig(tp_size=4, enable_expert_parallel=True), NoExchange),
        (ParallelConfig(dp_size=2, tp_size=2), AllGatherReduceScatter),
        (EP, AllToAll),
        (ParallelConfig(tp_size=2, enable_expert_parallel=True, sequence_parallel=True), AllToAll),
    ],
)
def test_without_gpus(parallel, exchange):
    chosen = choose_exchange(parallel, mesh_of(2, 2) if parallel is EP else None)
    assert type(chosen.exchange) is exchange
    if exchange is AllToAll:
        assert "not PeerExchange: platform cpu has no Mosaic GPU kernels" in chosen.reason


def test_gpus_of_one_process(gpus):
    assert type(choose_exchange(EP, gpus([[0, 0], [0, 0]])).exchange) is PeerExchange
    assert type(choose_exchange(EP, AbstractMesh((2, 2), ("dp", "tp"))).exchange) is PeerExchange
    # Tokens are exchanged along dp alone: each column lies within a process.
    assert type(choose_exchange(EP, gpus([[0, 1], [0, 1]])).exchange) is PeerExchange


def test_processes_between_which_xla_moves_no_ragged_rows(gpus, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    chosen = choose_exchange(EP, gpus([[0, 0], [1, 1]]))
    assert type(chosen.exchange) is AllGatherReduceScatter
    assert f"start them with XLA_FLAGS={_compat.RAGGED_FLAG}=true" in chosen.reason


def test_gpus_that_do_not_reach_each_other(gpus, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", f"--other=1 {_compat.RAGGED_FLAG}=true")
    with pytest.warns(
        SlowPathWarning, match=r"not by PeerExchange: ranks along \('dp',\) belong to the processes \[0, 1\]"
    ):
        chosen = choose_exchange(EP, gpus([[0, 0], [1, 1]]))
    assert type(chosen.exchange) is AllToAll
    assert "let the axes of tokens stay within a process" in chosen.reason
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert type(choose_exchange(EP, None).exchange) is AllToAll


def test_rows_that_the_kernel_cannot_send(gpus):
    config = MoEConfig(8, 2, 1 << 16, 64)
    with pytest.warns(SlowPathWarning, match="too long"):
        assert type(choose_exchange(EP, gpus([[0, 0], [0, 0]]), config).exchange) is AllToAll


def test_explained_in_order():
    found = explain_exchanges(EP, mesh_of(2, 2))
    assert [type(one.exchange) for one in found] == [NoExchange, PeerExchange, AllToAll, AllGatherReduceScatter]
    assert [one.reason is None for one in found] == [False, False, True, True]
