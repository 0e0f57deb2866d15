"""Hardware counters of a layer's kernels, by Nsight Compute: what keeps each of them busy, and what its warps wait for.

python benchmarks/counters.py --cell gpt-oss-120b:1024 --cell dsv3-ep8:1024
python benchmarks/counters.py --cell qwen3-30b-a3b:128 --quantization nvfp4
python benchmarks/counters.py --recorded layer.csv

Needs a GPU whose counters may be read, and `ncu`. Each kernel runs again and again, with cold caches and a cool clock: for times
see `moe-jax bench`. Stalls are warps that wait, on average, for each instruction that is issued, the largest first; warps that
have nothing to do wait at a `barrier`, those that wait for a stage of the ring are in `long_scoreboard`.
"""

from __future__ import annotations

import csv
import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

SECTIONS = ("SpeedOfLight", "WarpStateStats", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "SchedulerStats")
SUFFIX = "_mosaic_gpu_kernel"
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
COUNTERS = {  # name here: (name of Nsight Compute, so many of its units)
    "us": ("gpu__time_duration.sum", 1e-3),
    "GHz": ("gpc__cycles_elapsed.avg.per_second", 1e-9),
    "tensor cores %": ("sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active", 1.0),
    "integer units %": ("sm__pipe_alu_cycles_active.avg.pct_of_peak_sustained_active", 1.0),
    "issued a cycle": ("sm__inst_issued.avg.per_cycle_active", 1.0),
    "memory GB/s": ("dram__bytes.sum.per_second", 1e-9),
    "L2 %": ("lts__throughput.avg.pct_of_peak_sustained_elapsed", 1.0),
    "L2 hits %": ("lts__t_sector_hit_rate.pct", 1.0),
}


class Kernel(NamedTuple):
    """A kernel that ran.

    Attributes:
        name: without what all names end with.
        counters: by the names of `COUNTERS`.
        stalls: warps waiting for each reason, the largest first.
    """

    name: str
    counters: dict[str, float]
    stalls: dict[str, float]


def parse(lines: Iterable[str]) -> list[Kernel]:
    """The kernels of a page of raw counters that Nsight Compute wrote as CSV.

    Raises:
        ValueError: no kernel is in it.
    """
    rows = list(csv.reader(line for line in lines if not line.startswith("==")))
    if len(rows) < 3 or "Kernel Name" not in rows[0]:
        raise ValueError("Nsight Compute wrote no counters of a kernel; may they be read here?")
    before, after = STALL.split("{}")
    kernels = []
    for row in rows[2:]:  # the second has the units
        found = dict(zip(rows[0], row, strict=True))
        counters = {
            ours: float(found[theirs].replace(",", "")) * scale
            for ours, (theirs, scale) in COUNTERS.items()
            if found.get(theirs)
        }
        stalls = {
            name.removeprefix(before).removesuffix(after): float(value)
            for name, value in found.items()
            if name.startswith(before) and name.endswith(after) and value
        }
        stalls.pop("selected", None)  # one that issues
        ordered = dict(sorted(stalls.items(), key=lambda item: -item[1]))
        kernels.append(Kernel(found["Kernel Name"].removesuffix(SUFFIX), counters, ordered))
    return kernels


def line(kernel: Kernel, most: int = 4) -> str:
    """A kernel as a line of text.

    Example:
        >>> line(Kernel("combine_rows", {"us": 12.5, "issued a cycle": 0.5}, {"wait": 1.25}))
        'combine_rows: us 12.5, issued a cycle 0.5; wait 1.25'
    """
    counters = ", ".join(f"{name} {value:.4g}" for name, value in kernel.counters.items())
    stalls = ", ".join(f"{name} {value:.2f}" for name, value in list(kernel.stalls.items())[:most])
    return f"{kernel.name}: {counters}; {stalls}"


def run_layer(cell: str, quantization: str | None) -> None:
    """What Nsight Compute watches: a layer, once."""
    import jax

    from moe_jax import moe
    from moe_jax.bench.cases import parse_case
    from moe_jax.bench.inputs import in_format, make_inputs, make_weights

    case, tokens = cell.split(":")
    config = parse_case(case).config("bfloat16", quantization)
    weights = jax.block_until_ready(in_format(make_weights(config, jax.random.key(0)), config))
    x, logits = make_inputs(config, int(tokens))
    layer = jax.jit(functools.partial(moe, config=config, implementation="mosaic"))
    jax.block_until_ready(layer(x, weights, logits))


def measure(cell: str, quantization: str | None, ncu: str) -> list[Kernel]:
    """The kernels of a layer.

    Raises:
        FileNotFoundError: there is no `ncu`.
        RuntimeError: the layer did not run.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "counters.csv"
        command = [ncu, "--clock-control", "none", "--kernel-name", f"regex:{SUFFIX}$", "--csv", "--page", "raw"]
        command += [word for section in SECTIONS for word in ("--section", section)]
        command += ["--log-file", str(log), sys.executable, __file__, "--watched", "--cell", cell]
        command += ["--quantization", quantization] if quantization else []
        environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{cell}: {(done.stderr or done.stdout)[-500:]}")
        return parse(log.read_text().splitlines())


def main(
    cell: Annotated[list[str] | None, typer.Option(help="case:tokens; may be repeated.")] = None,
    quantization: Annotated[str | None, typer.Option(help="Number format of the experts.")] = None,
    recorded: Annotated[
        list[Path] | None, typer.Option(help="A page that Nsight Compute wrote; may be repeated.")
    ] = None,
    ncu: Annotated[str, typer.Option(help="Nsight Compute.")] = "ncu",
    watched: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    if watched:
        run_layer(*cell, quantization)
        return
    sources = [(path.stem, functools.partial(_recorded, path)) for path in recorded or []]
    sources += [(one, functools.partial(measure, one, quantization, ncu)) for one in cell or []]
    if not sources:
        raise typer.BadParameter("name a --cell, or a page that was --recorded")
    for name, kernels in sources:
        print(name, quantization or "", flush=True)
        try:
            for kernel in kernels():
                print(f"  {line(kernel)}", flush=True)
        except (FileNotFoundError, RuntimeError, ValueError) as error:
            raise typer.BadParameter(f"{name}: {error}") from None


def _recorded(path: Path) -> list[Kernel]:
    return parse(path.read_text().splitlines())


if __name__ == "__main__":
    typer.run(main)
