"""One case with its peers: compiled first, measured when it is its turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from moe_jax.bench import measure as measuring
from moe_jax.bench import peers
from moe_jax.bench.cases import Case
from moe_jax.bench.compiling import Job, compile_all
from moe_jax.bench.environment import has_gpu
from moe_jax.bench.expected import Expected, finite, shared_scale, tolerance, wrong_output
from moe_jax.bench.inputs import in_format, make_inputs, make_weights, weights_shape
from moe_jax.bench.options import BenchOptions
from moe_jax.bench.roofline import Ceilings
from moe_jax.bench.timing import ITERATIONS, call_time, kernel_times
from moe_jax.config import MoEConfig

Row = dict[str, Any]
Progress = Callable[[str], None]


class Turn(NamedTuple):
    """What a case is told when it is measured.

    Attributes:
        ceilings: of the device.
        deadline: of `time.monotonic`; what is not begun then is left out.
    """

    ceilings: Ceilings
    deadline: float


def plan(case: Case, options: BenchOptions) -> list[Row]:
    """How each row of a case begins, in the order of measurement."""
    return [
        {"case": case.name, "tokens": tokens, "routing": routing}
        for tokens in options.tokens
        for routing in (options.routings if tokens else options.routings[:1])
    ]


def number_format(options: BenchOptions) -> Row:
    """What the numbers of a row's layer are."""
    return {"dtype": options.dtype, "quantization": options.quantization}


class Entrant:
    """A case and its peers, in this process.

    Args:
        case: the shape.
        options: filled in for the device.
    """

    def __init__(self, case: Case, options: BenchOptions):
        self.case, self.options = case, options
        self.config = case.config(options.dtype, options.quantization)
        self.layer = measuring.make_layer(self.config, options.implementation)
        self.peers = {name: peers.find_peer(name, self.config) for name in options.compare}

    def compile(self) -> None:
        """Compiles what does not need the device to itself."""
        tokens = set(self.options.tokens)
        shapes = weights_shape(self.config)
        # The checks also run a token alone, where that means something; no tokens are a check too, and nothing to time.
        single = set() if shared_scale(self.config) else {1}
        alone = tokens | single if self.options.checks else tokens & {0}
        jobs = [Job(self.layer, self.config, shapes, count, stack=False) for count in sorted(alone)]
        jobs += [Job(self.layer, self.config, shapes, count) for count in sorted(tokens - {0})]
        for peer in self.peers.values():
            if isinstance(peer, peers.JaxPeer) and peer.ahead:
                weights = peer.weights_shape(shapes)
                jobs += [Job(peer.layer, self.config, weights, count) for count in sorted(tokens - {0})]
        compile_all(jobs)
        for peer in self.peers.values():
            if isinstance(peer, peers.TorchPeer) and has_gpu():
                peer.warm(tokens - {0})

    def rows(self, turn: Turn, progress: Progress) -> Iterator[Row]:
        """Measures; yields the rows as they come and leaves no memory taken."""
        yield from self._rows(turn, progress)
        peers.free_memory()

    def _rows(self, turn: Turn, progress: Progress) -> Iterator[Row]:
        weights, unquantized, prepared = None, None, {}
        for head in plan(self.case, self.options):
            if time.monotonic() > turn.deadline:
                return
            if weights is None:
                progress(f"{self.case.name}: making weights")
                made = make_weights(self.config, jax.random.key(0))
                weights = jax.block_until_ready(in_format(made, self.config))
                unquantized = None if self.config.quantization is None else made
                prepared = {name: peers.prepare(name, peer, weights) for name, peer in self.peers.items()}
            yield self._row(head, weights, unquantized, prepared, turn, progress)
            peers.free_memory()

    def _row(
        self, head: Row, weights: Any, unquantized: Any, prepared: dict[str, Any], turn: Turn, progress: Progress
    ) -> Row:
        config, options, tokens = self.config, self.options, head["tokens"]
        what = f"{self.case.name}: T = {tokens}, {head['routing']}"
        progress(what)
        row: Row = head | number_format(options)
        expected = None
        try:
            x, logits = jax.block_until_ready(make_inputs(config, tokens, head["routing"]))
            expected = Expected(config, weights, x, logits, unquantized) if tokens else None
            row |= measuring.measure(
                config,
                self.layer,
                weights,
                (x, logits),
                expected,
                implementation=options.implementation,
                ceilings=turn.ceilings,
                checks=options.checks,
                on_gpu=has_gpu(),
                seconds=options.seconds,
            )
        except Exception as failure:  # one row must not take the others with it
            row["failed"] = f"{type(failure).__name__}: {failure}"[:2000]
        if expected is not None and prepared and head["routing"] == options.routings[0]:
            row["peers"] = {}
            for name, peer in prepared.items():
                progress(f"{what}, {name}")
                if time.monotonic() > turn.deadline:
                    peer = f"not begun: the budget of {options.budget:g} s is spent"
                row["peers"][name] = measure_peer(peer, config, x, logits, expected, options.seconds, has_gpu())
        return row


def measure_peer(
    peer: peers.Prepared | str,
    config: MoEConfig,
    x: jax.Array,
    logits: jax.Array,
    expected: Expected,
    seconds: float,
    on_gpu: bool,
) -> Row:
    """A peer's part of a row: its error and times, or under ``reason`` why there are none."""
    if isinstance(peer, str):
        return {"reason": peer}
    found: Row = {}
    try:
        bound = peer(x, logits)
        found["implementation"] = bound.what
        sample = bound.rows(bound.wait(bound.call()), expected.sample)
        error, unquantized = expected.error(sample), expected.error_unquantized(sample)
        found["error"] = finite(error)
        if unquantized is not None:
            found["error_unquantized"] = finite(unquantized)
        wrong = wrong_output(error, tolerance(config, peer=True))
        if wrong:
            return found | {"reason": wrong}
        call_us = call_time(bound.call, bound.wait, seconds)
        found["layer_us"] = round(call_us / bound.layers, 1)
        if on_gpu and bound.jitted is not None and call_us * 2e-6 <= seconds:
            iterations = min(ITERATIONS, int(seconds / call_us * 1e6))
            kernels = kernel_times(*bound.jitted, iterations=iterations)
            found["kernels_total_us"] = round(sum(kernels.values()) / bound.layers, 1)
    except Exception as failure:  # theirs, not ours
        found["reason"] = peers.short(failure)
    return found
