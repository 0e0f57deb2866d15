"""A whole measurement: the cases one after the other, each with its peers beside it, written down row by row."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from moe_jax.bench import peers
from moe_jax.bench.compiling import FEW_TOKENS, layers_a_call
from moe_jax.bench.entrant import Entrant, Progress, Row, Turn, plan
from moe_jax.bench.environment import describe, has_gpu
from moe_jax.bench.options import BenchOptions
from moe_jax.bench.processes import RemoteEntrant
from moe_jax.bench.roofline import measure_ceilings
from moe_jax.quantization import quant_format


def run_bench(
    options: BenchOptions,
    on_case: Callable[[Row, list[Row]], None] = lambda result, rows: None,
    progress: Progress = lambda text: None,
) -> Row:
    """Measures everything asked for.

    Args:
        options: what.
        on_case: given the result so far and the rows of the case that is done.
        progress: told what is under way.

    Returns:
        The result, as it is written to `options.out`: head, ``rows``, one for each case, number of tokens and routing, and
        ``skipped``, those without a row: not yet measured, or not begun when the budget was spent.
    """
    start = time.monotonic()
    deadline = start + options.budget if options.budget is not None else float("inf")
    on_gpu = has_gpu()
    options = options.filled(on_gpu)
    progress("measuring what the device can do")
    form = None if options.quantization is None else quant_format(options.quantization)
    ceilings = measure_ceilings(options.dtype, on_gpu, form)
    packages = [peers.PACKAGES[name] for name in options.compare if name in peers.PACKAGES]
    few, many = layers_a_call(FEW_TOKENS), layers_a_call(FEW_TOKENS + 1)
    result: Row = describe(options.commit, packages) | {
        "quantization": options.quantization,
        "ceilings": {
            name: round(value, 3) if isinstance(value, float) else value
            for name, value in ceilings._asdict().items()
            if value not in ("", None)
        },
        "budget_seconds": options.budget,
        "seconds": options.seconds,
        "layers_a_call": many if few == many else f"{few} (up to {FEW_TOKENS} tokens) or {many}",
        "rows": [],
        "skipped": [head for case in options.cases for head in plan(case, options)],
    }
    begun = time.monotonic()
    with _compiled(options, deadline, progress) as entrants:
        result["compile_seconds"] = round(time.monotonic() - begun, 1)
        for entrant in entrants:
            rows: list[Row] = []
            for row in entrant.rows(Turn(ceilings, deadline), progress):
                rows.append(row)
                result["rows"].append(row)
                result["skipped"].remove({key: row[key] for key in ("case", "tokens", "routing")})
                _write(result, options.out)
            if rows:
                on_case(result, rows)
    result["seconds"] = round(time.monotonic() - start, 1)
    _write(result, options.out)
    return result


@contextlib.contextmanager
def _compiled(
    options: BenchOptions, deadline: float, progress: Progress
) -> Iterator[list[Entrant] | list[RemoteEntrant]]:
    """The cases, compiled."""
    if not options.processes:
        entrants = [Entrant(case, options) for case in options.cases]
        for entrant in entrants:
            if time.monotonic() <= deadline:
                progress(f"{entrant.case.name}: compiling")
                entrant.compile()
        yield entrants
        return
    remotes: list[RemoteEntrant] = []
    try:
        for case in options.cases:
            remotes.append(RemoteEntrant(case, options))
        for done, remote in enumerate(remotes):
            progress(f"compiling in {len(remotes)} processes, {done} have ended")
            remote.wait_until_compiled(deadline)
        yield remotes
    finally:
        for remote in remotes:
            remote.close()


def _write(result: Row, out: Path | None) -> None:
    if out is not None:
        # Whole at every moment: a run may be stopped in the middle of anything.
        beside = out.with_name(out.name + ".part")
        beside.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(beside, out)


def failures(result: Row) -> list[str]:
    """What is wrong with our own layer, one line for each row; empty when all is well."""
    return [f"{row['case']}, T = {row['tokens']}: {row['failed']}" for row in result["rows"] if "failed" in row]
