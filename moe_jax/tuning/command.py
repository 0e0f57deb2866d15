"""`moe-jax tune`: options, progress and the table at the end; the search is in `moe_jax.tuning.search`."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from moe_jax.console import console as make_console
from moe_jax.console import fail

if TYPE_CHECKING:
    from moe_jax.tuning.search import Layer, Outcome, Problem

# A plan serves half to twice the pairs that it was measured with: powers of four leave no gap.
TOKENS = "1,4,16,64,256,1024,4096,16384"


class KernelDtype(enum.StrEnum):
    """Dtypes of the kernels that can be tuned."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def tune(
    case: Annotated[
        list[str] | None,
        typer.Option(
            help="Name of a shape, or E,k,H,I; may be repeated. A rank of expert parallelism is a shape of its own: its "
            "local experts, and as k the pairs that it expects of a token. Default: all names."
        ),
    ] = None,
    tokens: Annotated[
        str, typer.Option(help="Numbers of tokens, T; a plan is used from half to twice as many.")
    ] = TOKENS,
    dtype: Annotated[KernelDtype, typer.Option(help="Compute dtype.")] = KernelDtype.BFLOAT16,
    quantization: Annotated[
        str | None, typer.Option(help="Number format of the experts, such as fp8_block. Default: not quantized.")
    ] = None,
    activation: Annotated[
        str, typer.Option(help="Activation of the experts: what counts is whether it has a gate.")
    ] = "silu",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the tuned plans. Default: $MOE_JAX_TUNED_DIR, else the user's cache."),
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="That compile side by side. Default: one a core, up to 12.")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Also measure what is there already.")] = False,
) -> None:
    """Measure which tiles of the grouped matmuls are fastest on this Hopper GPU, and keep them for later runs."""
    from moe_jax.bench import CASES, parse_case, parse_format, parse_tokens
    from moe_jax.ops.implementation import platform_reason
    from moe_jax.tuning import cache
    from moe_jax.tuning.search import Problem
    from moe_jax.tuning.search import tune as tune_problems

    try:
        cases = [parse_case(text) for text in dict.fromkeys(case or CASES)]
        counts = parse_tokens(tokens)
        if 0 in counts:
            raise ValueError(f"--tokens {tokens}: no tokens, nothing to measure; give numbers from 1")
        form = parse_format(quantization)
        configs = {c.name: dataclasses.replace(c.config(dtype.value, form), activation=activation) for c in cases}
        problems = [Problem(name, config, count) for name, config in configs.items() for count in counts]
    except ValueError as error:
        raise fail(str(error), 2) from error
    # Processes share the GPU: JAX must not reserve most of it at the first look for a device.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    reason = platform_reason()
    if reason is not None:
        raise fail(
            f"there is nothing to tune here: {reason}. What is tuned are the Hopper kernels, so run this on an H100 or "
            "H200; the plain-JAX form (xla) has no tiles to choose",
            1,
        )
    folder = cache.user_folder() if out is None else out
    try:
        cache.check_writable(folder)
    except ValueError as error:
        raise fail(f"--out {folder}: {error}", 2) from error
    from moe_jax.tuning import processes as sharing
    from moe_jax.tuning import timed_layer

    console = make_console()
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    outcomes = []
    number = processes or sharing.default_processes()
    shared = sharing.Pool(number) if number > 1 else contextlib.nullcontext()
    with shared as pool, Progress(*columns, console=console) as progress:
        task = progress.add_task("starting", total=len(problems))

        def make_layer(problem: Problem) -> Layer:
            progress.update(task, description=f"{problem.name}, T = {problem.num_tokens}")
            if pool is None:
                return timed_layer.TimedLayer(problem.config, problem.num_tokens)
            return sharing.SharedLayer(pool, problem.config, problem.num_tokens)

        def say(message: str) -> None:
            progress.console.print(message, highlight=False, markup=False)

        for outcome in tune_problems(problems, folder, make_layer, again=again, say=say):
            outcomes.append(outcome)
            progress.advance(task)
    console.print(outcome_table(outcomes))
    console.print(f"plans in {folder / cache.file_name(cache.device_kind())}", highlight=False, markup=False)
    if folder not in cache.folders():
        console.print(f"to use them, set MOE_JAX_TUNED_DIR={folder.absolute()}", highlight=False, markup=False)
    failed = [f"{o.problem.name}, T = {o.problem.num_tokens}: {o.failed}" for o in outcomes if o.failed]
    if failed:
        raise fail("; ".join(failed), 1)


def outcome_table(outcomes: list[Outcome]) -> Table:
    """Every problem: its time under the default rule, its time under the plan that was chosen, and that plan."""
    from moe_jax.tuning.plan import default_plan
    from moe_jax.tuning.search import summary

    formats = {o.problem.config.quantization.name for o in outcomes if o.problem.config.quantization}
    title = ", ".join(["layer times, microseconds", *sorted(formats)])
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("case", "T", "default", "tuned", "gain"):
        table.add_column(column, justify="left" if column == "case" else "right", no_wrap=True)
    table.add_column("plan")
    for problem, entry, skipped, failed in outcomes:
        if entry is None:
            table.add_row(
                problem.name, str(problem.num_tokens), "", "", "", f"[bold red]FAILED[/] {escape(failed or '')}"
            )
            continue
        gain = 1 - entry.tuned_us / entry.default_us
        plan = summary(entry.plan, default_plan(entry.shape)) + (" (was there already)" if skipped else "")
        times = f"{entry.default_us:.1f}", f"{entry.tuned_us:.1f}", f"{gain:.1%}"
        table.add_row(problem.name, str(problem.num_tokens), *times, escape(plan))
    return table
