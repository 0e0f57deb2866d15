"""Cases in processes of their own: all compile at the same time, then one after the other is measured.

JAX compiles the Mosaic kernels of a process one by one, under a lock, however many threads ask. Nothing else happens on the
machine while a case is measured: the others have compiled and wait. A process that ends takes its memory with it, and where a
peer breaks its CUDA context no other case is lost.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

from moe_jax.bench.cases import Case
from moe_jax.bench.entrant import Entrant, Progress, Row, Turn, number_format, plan
from moe_jax.bench.environment import has_gpu
from moe_jax.bench.options import BenchOptions

GRACE_SECONDS = 60.0  # for what was begun before the budget was spent


class RemoteEntrant:
    """An `Entrant` in a new process, where it starts to compile at once.

    Args:
        case: the shape.
        options: filled in for the device.
    """

    def __init__(self, case: Case, options: BenchOptions):
        self.case, self.options = case, options
        # Not forked: a copy of a process that has started CUDA cannot use it. Not daemonic: a peer may start compilers.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, case, options))
        self.process.start()
        theirs.close()
        self.ended = False
        self.failure: str | None = None

    def wait_until_compiled(self, deadline: float) -> None:
        """Returns when it is ready to be measured, or at the deadline."""
        self._receive(deadline)

    def rows(self, turn: Turn, progress: Progress) -> Iterator[Row]:
        """Lets it measure; yields the rows as they come. If it dies the row that was under way says so."""
        heads = iter(plan(self.case, self.options))
        if not self.ended:
            self._send(turn)
        while not self.ended:
            kind, value = self._receive(turn.deadline + GRACE_SECONDS)
            if kind == "row":
                next(heads)
                yield value
            elif kind == "progress":
                progress(value)
            elif kind == "done":
                self.process.join(GRACE_SECONDS)  # the next one finds the device as this one found it
                return
        head = next(heads, None)
        if head is not None and self.failure is not None:
            yield head | number_format(self.options) | {"failed": self.failure}

    def close(self) -> None:
        """Ends the process if it has not ended by itself."""
        self.connection.close()
        self.process.join(5.0)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def _send(self, turn: Turn) -> None:
        try:
            self.connection.send(turn)
        except OSError:
            self._has_died()

    def _receive(self, deadline: float) -> tuple[str, Any]:
        left = None if deadline == float("inf") else max(0.0, deadline - time.monotonic())
        try:
            if self.connection.poll(left):
                return self.connection.recv()
            self.ended = True
        except (EOFError, OSError):
            self._has_died()
        return "ended", None

    def _has_died(self) -> None:
        self.process.join(5.0)
        self.ended = True
        self.failure = f"the process of this case ended with exit code {self.process.exitcode}"


def _serve(connection: Connection, case: Case, options: BenchOptions) -> None:
    # JAX has not looked for a device yet. Each process may take only what it uses: they share the GPU.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    has_gpu()  # JAX loads its libraries before a peer loads those of torch, as it does without processes
    try:
        entrant = Entrant(case, options)
        entrant.compile()
        connection.send(("compiled", None))
        turn = connection.recv()
        for row in entrant.rows(turn, lambda text: connection.send(("progress", text))):
            connection.send(("row", row))
        connection.send(("done", None))
    except (EOFError, BrokenPipeError):  # nobody wants it any more
        pass
