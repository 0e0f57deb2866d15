"""A layer whose plans are compiled in several processes at once, and measured in one after the other.

JAX compiles the Mosaic kernels of a process one by one, under a lock, and a search compiles some twenty layers: that is most of
its time. Each process compiles some of the plans from shapes alone; weights are made where something is first run. Nothing else
happens on the GPU while a plan is measured: one process is asked at a time.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from moe_jax import _compat
from moe_jax.bench.roofline import expert_bytes
from moe_jax.config import MoEConfig
from moe_jax.tuning.plan import LayerPlan
from moe_jax.tuning.timed_layer import TimedLayer

MOST = 12
SHARE = 0.6  # of the GPU's memory, for the weights of all processes


def default_processes() -> int:
    """As many as there are cores, up to 12."""
    return min(MOST, os.cpu_count() or 1)


class ProcessError(RuntimeError):
    """A process of the pool has ended, or something went wrong in it."""


class Pool:
    """Processes that each hold a `TimedLayer`; a context manager.

    Args:
        number: of processes, at least 1.
        make: what makes a layer of a config and a number of tokens; picklable.
    """

    def __init__(self, number: int, make: Any = TimedLayer):
        # Not forked: a copy of a process that has started CUDA cannot use it.
        context = multiprocessing.get_context("spawn")
        self._workers = []
        for _ in range(number):
            connection, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, make), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, connection))

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        for process, connection in self._workers:
            connection.close()  # a worker that waits for a word ends
            process.join(5.0)
            if process.is_alive():
                process.kill()
                process.join()

    def __len__(self) -> int:
        return len(self._workers)

    def send(self, worker: int, name: str, *arguments: Any) -> None:
        """Asks a worker for something; the answer comes with `receive`."""
        try:
            self._workers[worker][1].send((name, arguments))
        except OSError as error:
            raise self._ended(worker) from error

    def receive(self, worker: int) -> Any:
        """The answer to what was asked last.

        Raises:
            ProcessError: the worker raised, or has ended.
        """
        try:
            failed, answer = self._workers[worker][1].recv()
        except (EOFError, OSError) as error:
            raise self._ended(worker) from error
        if failed:
            raise ProcessError(answer)
        return answer

    def _ended(self, worker: int) -> ProcessError:
        process = self._workers[worker][0]
        process.join(5.0)
        return ProcessError(f"process {worker} of the search ended with exit code {process.exitcode}")


def processes_for(config: MoEConfig, most: int, memory_bytes: int | None) -> int:
    """How many processes may hold the weights of a layer at the same time; at least 1.

    Example:
        >>> config = MoEConfig(num_experts=128, top_k=8, hidden_size=4096, intermediate_size=1536)
        >>> processes_for(config, 12, 80 * 2**30), processes_for(config, 12, None)
        (10, 12)
    """
    if memory_bytes is None:
        return most
    plain = dataclasses.replace(config, quantization=None)
    weights = expert_bytes(plain, config.num_experts)
    if config.quantization is not None:  # made of plain ones, beside them
        weights += expert_bytes(config, config.num_experts)
    return max(1, min(most, int(SHARE * memory_bytes // weights)))


class SharedLayer:
    """`moe_jax.tuning.search.Layer`, its plans spread over a pool.

    Args:
        pool: the processes.
        config: the layer.
        num_tokens: T.
    """

    def __init__(self, pool: Pool, config: MoEConfig, num_tokens: int):
        self._pool, self._where = pool, {}
        self._number = processes_for(config, len(pool), _compat.device_memory_bytes())
        for worker in range(len(pool)):
            pool.send(worker, "layer", config, num_tokens)
        for worker in range(len(pool)):
            pool.receive(worker)

    def build(self, plans: Sequence[LayerPlan], stacks: bool = False) -> dict[LayerPlan, str]:
        """As `TimedLayer.build`, all processes at the same time."""
        shares: dict[int, list[LayerPlan]] = {}
        for plan in dict.fromkeys(plans):
            worker = self._where.setdefault(plan, len(self._where) % self._number)
            shares.setdefault(worker, []).append(plan)
        for worker, share in shares.items():
            self._pool.send(worker, "build", share, stacks)
        return {plan: reason for worker in shares for plan, reason in self._pool.receive(worker).items()}

    def fingerprint(self, plan: LayerPlan) -> str:
        """As `TimedLayer.fingerprint`."""
        return self._ask(plan, "fingerprint")

    def kernel_us(self, plan: LayerPlan) -> tuple[float, float]:
        """As `TimedLayer.kernel_us`."""
        return self._ask(plan, "kernel_us")

    def layer_us(self, plan: LayerPlan) -> float:
        """As `TimedLayer.layer_us`."""
        return self._ask(plan, "layer_us")

    def _ask(self, plan: LayerPlan, name: str) -> Any:
        worker = self._where[plan]
        self._pool.send(worker, name, plan)
        return self._pool.receive(worker)


def _serve(connection: Connection, make: Any) -> None:
    # JAX has not looked for a device yet. Each process may take only what it uses: they share the GPU.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    layer = None
    while True:
        try:
            name, arguments = connection.recv()
        except (EOFError, OSError):
            return
        try:
            if name == "layer":
                layer = None  # its memory, before that of the next
                layer = make(*arguments)
                answer = False, None
            else:
                answer = False, getattr(layer, name)(*arguments)
        except Exception as error:  # the search discards the plan, or gives up the problem
            answer = True, f"{type(error).__name__}: {error}"[:500]
        try:
            connection.send(answer)
        except OSError:
            return
