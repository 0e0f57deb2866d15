"""Every exchange brings the same tokens to the same experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moe_jax import MoEConfig, RoutingConfig
from moe_jax.parallel import ExpertPlacement, ParallelConfig
from moe_jax.parallel.all_to_all import AllToAll
from moe_jax.parallel.gather_scatter import AllGatherReduceScatter
from moe_jax.parallel.peer import PeerExchange
from moe_jax.types import TopK
from tests.layers import check_layer, experts_of, logits_of, reference_moe, x_of
from tests.parallel.meshes import mesh_of, only_real, parallel_of, sharded

EXCHANGES = {"all-gather": AllGatherReduceScatter(), "all-to-all": AllToAll(), "peer": PeerExchange()}
each_exchange = pytest.mark.parametrize("exchange", EXCHANGES.values(), ids=EXCHANGES)
CONFIG = MoEConfig(5, 2, 16, 12, dtype="float32", has_bias=True)

# dp, pcp, tp, sequence parallel
RANKS = [(2, 1, 1, False), (4, 1, 2, False), (2, 2, 2, False), (2, 1, 2, True), (1, 1, 4, True)]


def problem(config, num_tokens, seed=0):
    return x_of(seed, config, num_tokens), experts_of(seed, config), logits_of(seed, config, num_tokens)


@each_exchange
@pytest.mark.parametrize("dp, pcp, tp, sp", RANKS)
def test_layer(exchange, dp, pcp, tp, sp):
    mesh = mesh_of(tp, dp, pcp)
    placement = ExpertPlacement.make(5, dp * pcp * tp, "round_robin")
    layer = sharded(mesh, parallel_of(mesh, True, sp), CONFIG, placement, exchange=exchange)
    operands = problem(CONFIG, 24)
    check_layer(layer(*operands), reference_moe(*operands, CONFIG), CONFIG)


@each_exchange
@pytest.mark.parametrize("chunks", [1, 2])
def test_bf16_weights_on_input_and_few_tokens(exchange, chunks):
    config = MoEConfig(6, 1, 16, 12, routing=RoutingConfig("llama4"), apply_router_weight_on_input=True)
    mesh = mesh_of(dp=4)
    layer = sharded(mesh, parallel_of(mesh, True), config, exchange=exchange, chunks=chunks)
    x, experts, logits = problem(config, 20)
    counts = jnp.array([3, 0, 5, 2], jnp.int32)
    expected = only_real(reference_moe(x, experts, logits, config), counts, 4)
    padding = only_real(jnp.ones_like(x), counts, 4) == 0
    out = layer(jnp.where(padding, jnp.nan, x), experts, logits, num_tokens=counts)
    check_layer(out, expected, config)
    assert not np.asarray(out, np.float32)[np.asarray(padding)].any()


def test_a_token_goes_once_to_each_rank():
    """Two experts of one rank take one row there, and tokens whose experts are elsewhere none."""
    mesh = mesh_of(dp=2)
    parallel = parallel_of(mesh, True)
    config = MoEConfig(4, 2, 4, 4, dtype="float32")
    ids = jnp.array([[0, 1], [0, 2], [3, 2], [-1, -1]])  # tokens 0, 1 of rank 0, 2, 3 of rank 1
    x = jnp.arange(1.0, 5.0)[:, None] * jnp.ones((1, 4))
    maps = jnp.asarray(ExpertPlacement.make(4, 2).expert_map)

    def run(x, ids):
        prepared = AllToAll().prepare(x, TopK(ids, jnp.ones(ids.shape)), config, parallel, maps, implementation="xla")
        return prepared.x, prepared.topk.ids

    rows, ids = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=P("dp"), out_specs=P("dp"), check_vma=False))(x, ids)
    assert rows[:, 0].reshape(2, 2, 2).tolist() == [[[1, 2], [0, 0]], [[0, 2], [3, 0]]]  # receiver, sender, token
    none = [-1, -1]
    assert ids.tolist() == [[0, 1], [0, 2], none, none, none, [0, 2], [3, 2], none]


def test_reasons():
    assert "use NoExchange" in AllToAll().reason_against(ParallelConfig(tp_size=2, enable_expert_parallel=True))
    assert "use AllGatherReduceScatter" in AllToAll().reason_against(ParallelConfig(dp_size=2))
