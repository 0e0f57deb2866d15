"""One of two processes that hold a layer together: layers over a mesh of all their devices against the layer on one.

Run by test_processes.py and tests/gpu/test_processes.py: ``python -m tests.parallel.process RANK PORT PLATFORM``. On a CPU each
has four devices and computes in float32, on GPUs each has its own and runs the kernels.
"""

import socket
import subprocess
import sys

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moe_jax import MoEConfig, moe
from moe_jax.parallel import ParallelConfig
from moe_jax.parallel.all_to_all import AllToAll
from moe_jax.parallel.choice import choose_exchange, explain_exchanges
from moe_jax.parallel.gather_scatter import AllGatherReduceScatter
from moe_jax.parallel.peer import PeerExchange
from moe_jax.parallel.sharded import moe_sharded
from moe_jax.parallel.weights import expert_specs, place_experts, spec_of
from tests.util import check_close

TESTED = (True, AllToAll()), (True, AllGatherReduceScatter()), (False, AllGatherReduceScatter())


def main(rank: int, port: int, platform: str) -> None:
    on_cpu = platform == "cpu"
    if on_cpu:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    mine = None if on_cpu else [rank]
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=rank, local_device_ids=mine)

    from tests.layers import experts_of, logits_of, x_of  # asks for the backend, which processes join before

    assert (jax.device_count(), jax.local_device_count()) == ((8, 4) if on_cpu else (2, 1))
    sizes, dtype, limit = ((5, 2, 16, 12), "float32", 2e-6) if on_cpu else ((9, 2, 256, 128), "bfloat16", 1e-2)
    config = MoEConfig(*sizes, dtype=dtype, has_bias=True)
    x, experts, logits = x_of(0, config, 16), experts_of(0, config), logits_of(0, config, 16)
    implementation = "xla" if on_cpu else "auto"
    expected = np.asarray(moe(x, experts, logits, config, implementation=implementation), np.float32)
    tensor = jax.local_device_count() // 2 or 1
    mesh = jax.make_mesh((jax.device_count() // tensor, tensor), ("dp", "tp"), axis_types=(AxisType.Auto,) * 2)

    def put(tree, specs):
        return jax.tree.map(lambda leaf, spec: jax.device_put(np.asarray(leaf), NamedSharding(mesh, spec)), tree, specs)

    for ep, exchange in TESTED:
        parallel = ParallelConfig.of_mesh(mesh, enable_expert_parallel=ep)
        placed = place_experts(experts, config, parallel)
        tokens = spec_of(parallel.token_axes)
        operands = put((x, logits), (tokens, tokens)), put(placed, expert_specs(placed, parallel))

        @jax.jit
        def layer(operands, parallel=parallel, exchange=exchange):
            (x, logits), experts = operands
            options = {"parallel": parallel, "mesh": mesh, "exchange": exchange, "implementation": implementation}
            return moe_sharded(x, experts, logits, config, **options)

        out = layer(operands)
        assert out.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec("dp")), 2)
        for shard in out.addressable_shards:
            check_close(np.asarray(shard.data, np.float32), expected[shard.index], limit)
        sys.stdout.write(f"{exchange} ep={ep}: right\n")

    # Between processes memory is out of reach, and the exchange that needs it says so.
    parallel = ParallelConfig.of_mesh(mesh, enable_expert_parallel=True)
    (reason,) = (reason for found, reason in explain_exchanges(parallel, mesh, config) if type(found) is PeerExchange)
    assert on_cpu or "belong to the processes [0, 1]" in reason, reason
    assert type(choose_exchange(parallel, mesh, config, implementation).exchange) is AllToAll


def run_both(platform: str, env: dict[str, str], folder: str) -> None:
    """Starts both processes and raises AssertionError unless both are right."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.parallel.process"]
    options = {"cwd": folder, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [subprocess.Popen([*command, str(rank), str(port), platform], env=env, **options) for rank in (0, 1)]
    try:
        for process in processes:
            output, _ = process.communicate(timeout=300)
            assert process.returncode == 0, output
            assert output.count("right") == len(TESTED), output
    finally:
        for process in processes:
            process.kill()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
