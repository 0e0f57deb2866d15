"""Layers whose experts, tokens or weights are spread over the devices of a mesh."""

from moe_jax.parallel.all_to_all import AllToAll as AllToAll
from moe_jax.parallel.batched import Batched as Batched
from moe_jax.parallel.choice import choose_exchange as choose_exchange
from moe_jax.parallel.choice import explain_exchanges as explain_exchanges
from moe_jax.parallel.config import ParallelConfig as ParallelConfig
from moe_jax.parallel.exchange import Exchange as Exchange
from moe_jax.parallel.gather_scatter import AllGatherReduceScatter as AllGatherReduceScatter
from moe_jax.parallel.layer import apply_experts_parallel as apply_experts_parallel
from moe_jax.parallel.layer import moe_parallel as moe_parallel
from moe_jax.parallel.no_exchange import NoExchange as NoExchange
from moe_jax.parallel.peer import PeerExchange as PeerExchange
from moe_jax.parallel.placement import ExpertPlacement as ExpertPlacement
from moe_jax.parallel.placement import determine_expert_map as determine_expert_map
from moe_jax.parallel.placement import determine_expert_placement_strategy as determine_expert_placement_strategy
from moe_jax.parallel.sharded import moe_sharded as moe_sharded
from moe_jax.parallel.weights import expert_specs as expert_specs
from moe_jax.parallel.weights import place_experts as place_experts
from moe_jax.parallel.weights import place_shared as place_shared
from moe_jax.parallel.weights import shared_specs as shared_specs
