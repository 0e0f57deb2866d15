"""Layers whose experts, tokens or weights are spread over the devices of a mesh."""

from moe_jax.parallel.config import ParallelConfig as ParallelConfig
from moe_jax.parallel.placement import ExpertPlacement as ExpertPlacement
from moe_jax.parallel.placement import determine_expert_map as determine_expert_map
from moe_jax.parallel.placement import determine_expert_placement_strategy as determine_expert_placement_strategy
