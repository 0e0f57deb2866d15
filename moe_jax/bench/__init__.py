"""`moe-jax bench`: times of the layer and of its peers, with the error beside each, against what the hardware can do."""

from moe_jax.bench.cases import CASES, Case, parse_case, parse_format, parse_tokens
from moe_jax.bench.inputs import ROUTINGS, parse_routings
from moe_jax.bench.options import BenchOptions
from moe_jax.bench.peers import PEERS, parse_peers
from moe_jax.bench.run import failures, run_bench

__all__ = [
    "CASES",
    "PEERS",
    "ROUTINGS",
    "BenchOptions",
    "Case",
    "failures",
    "parse_case",
    "parse_format",
    "parse_peers",
    "parse_routings",
    "parse_tokens",
    "run_bench",
]
