"""One of two processes with four CPU devices each: layers over a mesh of all eight against the layer on one device.

Run by test_processes.py: ``python -m tests.parallel.process RANK PORT``.
"""

import sys

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moe_jax import MoEConfig, moe
from moe_jax.parallel import ParallelConfig
from moe_jax.parallel.all_to_all import AllToAll
from moe_jax.parallel.gather_scatter import AllGatherReduceScatter
from moe_jax.parallel.sharded import moe_sharded
from moe_jax.parallel.weights import expert_specs, place_experts, spec_of
from tests.util import check_close


def main(rank: int, port: int) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=rank)

    from tests.layers import experts_of, logits_of, x_of  # asks for the backend, which processes join before

    assert (jax.device_count(), jax.local_device_count()) == (8, 4)
    config = MoEConfig(5, 2, 16, 12, dtype="float32", has_bias=True)
    x, experts, logits = x_of(0, config, 16), experts_of(0, config), logits_of(0, config, 16)
    expected = np.asarray(moe(x, experts, logits, config, implementation="xla"))
    mesh = jax.make_mesh((4, 2), ("dp", "tp"), axis_types=(AxisType.Auto,) * 2)

    def put(tree, specs):
        return jax.tree.map(lambda leaf, spec: jax.device_put(np.asarray(leaf), NamedSharding(mesh, spec)), tree, specs)

    for ep, exchange in ((True, AllToAll()), (True, AllGatherReduceScatter()), (False, AllGatherReduceScatter())):
        parallel = ParallelConfig.of_mesh(mesh, enable_expert_parallel=ep)
        placed = place_experts(experts, config, parallel)
        tokens = spec_of(parallel.token_axes)
        operands = put((x, logits), (tokens, tokens)), put(placed, expert_specs(placed, parallel))

        @jax.jit
        def layer(operands, parallel=parallel, exchange=exchange):
            (x, logits), experts = operands
            options = {"parallel": parallel, "mesh": mesh, "exchange": exchange, "implementation": "xla"}
            return moe_sharded(x, experts, logits, config, **options)

        out = layer(operands)
        assert out.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec("dp")), 2)
        for shard in out.addressable_shards:
            check_close(shard.data, expected[shard.index], 2e-6)
        sys.stdout.write(f"{exchange} ep={ep}: right\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
