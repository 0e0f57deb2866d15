"""The search: every candidate is compared with the default rule's plan bit for bit, then timed; the fastest is kept."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from moe_jax.config import MoEConfig
from moe_jax.tuning import cache
from moe_jax.tuning.candidates import candidates
from moe_jax.tuning.fit import misfit
from moe_jax.tuning.plan import LayerPlan, LayerShape, default_plan
from moe_jax.tuning.schema import TunedEntry

LEAST_GAIN = 0.01  # of the layer's time; less than that is noise, and the default rule stays
ROUNDS = 3  # the finalists are timed in turns: a clock that sinks meets all of them

Say = Callable[[str], Any]


@runtime_checkable
class Layer(Protocol):
    """What a search measures: see `timed_layer.TimedLayer`."""

    def build(self, plans: Sequence[LayerPlan], stacks: bool = False) -> dict[LayerPlan, str]:
        """Compiles; gives those plans that cannot be compiled, with the reason. With `stacks` also what `layer_us` runs."""

    def fingerprint(self, plan: LayerPlan) -> str:
        """What the bits of the layer's output under a plan that was built come to."""

    def kernel_us(self, plan: LayerPlan) -> tuple[float, float]:
        """Microseconds of the up- and of the down-projection's kernel."""

    def layer_us(self, plan: LayerPlan) -> float:
        """Microseconds of the layer."""


def search(shape: LayerShape, layer: Layer, say: Say = lambda message: None) -> TunedEntry:
    """The fastest plan for a shape.

    The kernels of all candidates are timed one by one. From the fastest up- and the fastest down-projection of each row tile
    a plan is made, and of these the one with the fastest layer is taken, if it beats the default rule by `LEAST_GAIN`.

    Args:
        shape: of the layer.
        layer: that layer.
        say: told of candidates that were discarded.

    Raises:
        ValueError: the kernels cannot run this shape.
        RuntimeError: the default rule's plan cannot be built.
    """
    default = default_plan(shape)
    reason = misfit(shape, default)
    if reason:
        raise ValueError(f"nothing to tune, the kernels cannot run this layer: {reason}")
    right = _right(layer, candidates(shape), default, say)
    times = {plan: layer.kernel_us(plan) for plan in right}
    finalists = [default]
    for tile_rows in dict.fromkeys(plan.tile_rows for plan in times):
        plans = [plan for plan in times if plan.tile_rows == tile_rows]
        up = min(plans, key=lambda plan: times[plan][0]).up
        down = min(plans, key=lambda plan: times[plan][1]).down
        finalists.append(LayerPlan(tile_rows, up, down))
    finalists = _right(layer, list(dict.fromkeys(finalists)), default, say, stacks=True)
    turns = [[layer.layer_us(plan) for plan in finalists] for _ in range(ROUNDS)]
    layer_us = {plan: statistics.median(turn[i] for turn in turns) for i, plan in enumerate(finalists)}
    best = min(finalists, key=layer_us.__getitem__)
    if layer_us[best] > (1 - LEAST_GAIN) * layer_us[default]:
        best = default
    return TunedEntry(shape, best, layer_us[default], layer_us[best])


def _right(layer: Layer, plans: list[LayerPlan], default: LayerPlan, say: Say, stacks: bool = False) -> list[LayerPlan]:
    """Those of the plans that can be built and whose output is that of the default plan."""
    refused = layer.build(plans, stacks)
    if default in refused:
        raise RuntimeError(f"the default rule's plan: {refused[default]}")
    expected = layer.fingerprint(default)
    right = []
    for plan in plans:
        reason = refused.get(plan) or (None if plan == default else _wrong(layer, plan, expected))
        if reason is None:
            right.append(plan)
        else:
            say(f"discarded: {summary(plan, default)}: {reason}")
    return right


def _wrong(layer: Layer, plan: LayerPlan, expected: str) -> str | None:
    try:
        found = layer.fingerprint(plan)
    except Exception as error:  # such as more registers or shared memory than there are, seen at the launch
        return f"cannot run: {type(error).__name__}: {error}"[:300]
    # Every row is summed in the same order under every plan: rounding is no excuse.
    return None if found == expected else "another output than the default rule's"


def summary(plan: LayerPlan, default: LayerPlan) -> str:
    """What a plan does otherwise than the default rule, in a line.

    Example:
        >>> shape = LayerShape(128, 32768, 2048, 768, gated=True, dtype="bfloat16")
        >>> rule = default_plan(shape)
        >>> summary(dataclasses.replace(rule, up=dataclasses.replace(rule.up, band=4)), rule)
        'tile_rows=160; up: band=4; down: as the rule'
    """
    if plan == default:
        return f"tile_rows={plan.tile_rows}; as the rule"
    parts = [f"tile_rows={plan.tile_rows}"]
    for name in ("up", "down"):
        mine, rule = getattr(plan, name), getattr(default, name)
        names = [f.name for f in dataclasses.fields(mine) if f.name != "row_counts"]
        changed = [f"{n}={getattr(mine, n)}" for n in names if getattr(mine, n) != getattr(rule, n)]
        parts.append(f"{name}: {', '.join(changed) or 'as the rule'}")
    return "; ".join(parts)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A layer at one number of tokens.

    Attributes:
        name: for people.
        config: the layer.
        num_tokens: T.
    """

    name: str
    config: MoEConfig
    num_tokens: int

    @property
    def shape(self) -> LayerShape:
        """What the plan is kept under."""
        return LayerShape.of(self.config, self.num_tokens)


class Outcome(NamedTuple):
    """What became of a problem.

    Attributes:
        problem: which.
        entry: its tuned plan; None if the search failed.
        skipped: the entry was there before.
        failed: why there is no entry.
    """

    problem: Problem
    entry: TunedEntry | None
    skipped: bool = False
    failed: str | None = None


def tune(
    problems: Iterable[Problem],
    folder: Path,
    make_layer: Callable[[Problem], Layer],
    *,
    again: bool = False,
    say: Say = lambda message: None,
) -> Iterator[Outcome]:
    """Searches one problem after the other; each is written to `folder` when it is done, and not searched twice.

    Args:
        problems: what to tune.
        folder: where the file of this device is.
        make_layer: what `search` measures; called for problems that are not there yet.
        again: search those too that are there.
        say: told of candidates that were discarded.
    """
    for problem in problems:
        entry = None if again else cache.stored(folder, problem.shape)
        if entry is not None:
            yield Outcome(problem, entry, skipped=True)
            continue
        try:
            entry = search(problem.shape, make_layer(problem), say)
        except Exception as error:  # one problem must not take the others with it
            yield Outcome(problem, None, failed=f"{type(error).__name__}: {error}"[:500])
            continue
        cache.save(folder, entry)
        yield Outcome(problem, entry)
