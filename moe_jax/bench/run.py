"""A whole measurement: the cases one after the other, each with its peers beside it, written down row by row."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from moe_jax import _compat
from moe_jax.bench import measure as measuring
from moe_jax.bench import peers
from moe_jax.bench.cases import CASES, CPU_CASES, CPU_TOKENS, GPU_TOKENS, Case
from moe_jax.bench.roofline import Ceilings, measure_ceilings
from moe_jax.bench.timing import call_time, kernel_times
from moe_jax.config import MoEConfig
from moe_jax.types import ExpertWeights


def has_gpu() -> bool:
    """Whether a jit call runs on a GPU."""
    return _compat.default_device().platform in ("gpu", "cuda")


@dataclasses.dataclass(frozen=True)
class BenchOptions:
    """What to measure. What is left empty is filled in by device: all named cases on a GPU, something small without one.

    Attributes:
        cases: the shapes.
        tokens: T, ascending.
        dtype: compute dtype; None for bfloat16 on a GPU, else float32.
        implementation: what is measured.
        compare: names of peers.
        checks: also run what must hold bit for bit.
        commit: of the source; None asks git.
        out: result file, written again after every row.
    """

    cases: tuple[Case, ...] = ()
    tokens: tuple[int, ...] = ()
    dtype: str | None = None
    implementation: str = "auto"
    compare: tuple[str, ...] = ()
    checks: bool = False
    commit: str | None = None
    out: Path | None = None

    def filled(self, on_gpu: bool) -> BenchOptions:
        """With the defaults of the device."""
        return dataclasses.replace(
            self,
            cases=self.cases or (tuple(CASES.values()) if on_gpu else CPU_CASES),
            tokens=self.tokens or (GPU_TOKENS if on_gpu else CPU_TOKENS),
            dtype=self.dtype or ("bfloat16" if on_gpu else "float32"),
        )


def source_commit() -> str | None:
    """Short hash of the checkout that moe_jax runs from, ``+changes`` if its files differ; None if it is no checkout."""
    package = Path(__file__).parents[1]

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(package), *words], capture_output=True, text=True)
        except OSError:  # no git
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed copy may lie in a virtual environment inside of some other checkout.
    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = git("rev-parse", "--short", "HEAD")
    return f"{commit}+changes" if commit and git("status", "--porcelain", "--", ".") else commit


def describe(options: BenchOptions, ceilings: Ceilings) -> dict[str, Any]:
    """The head of a result file: hardware, versions, commit, ceilings."""
    device = _compat.default_device()
    packages = ["moe_jax", "jax", "jaxlib", *(name for name in options.compare if name in ("torch", "tokamax"))]
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # the peer's row says so
            versions[package] = None
    return {
        "device": device.device_kind,
        "jax": jax.__version__,
        "commit": options.commit or source_commit(),
        "date": time.strftime("%Y-%m-%d"),
        "host": {"machine": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()},
        "platform": " ".join(device.client.platform_version.split()),
        "versions": versions,
        "ceilings": {name: round(rate, 3) for name, rate in ceilings._asdict().items()},
    }


def run_bench(
    options: BenchOptions,
    on_case: Callable[[dict[str, Any], list[dict[str, Any]]], None] = lambda result, rows: None,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measures everything asked for.

    Args:
        options: what.
        on_case: given the result so far and the rows of the case that is done.
        progress: told what is under way.

    Returns:
        The result, as it is written to `options.out`: head and ``rows``, one for each case and number of tokens.
    """
    on_gpu = has_gpu()
    options = options.filled(on_gpu)
    progress("measuring what the device can do")
    ceilings = measure_ceilings(options.dtype, on_gpu)
    result: dict[str, Any] = describe(options, ceilings) | {"rows": []}
    for case in options.cases:
        rows: list[dict[str, Any]] = []
        for row in _case_rows(case, options, ceilings, on_gpu, progress):
            rows.append(row)
            result["rows"].append(row)
            if options.out is not None:
                options.out.write_text(json.dumps(result, indent=1) + "\n")
        on_case(result, rows)
    return result


def _case_rows(case: Case, options: BenchOptions, ceilings: Ceilings, on_gpu: bool, progress: Callable[[str], None]):
    config = case.config(options.dtype)
    progress(f"{case.name}: making weights and compiling")
    weights = jax.block_until_ready(measuring.make_weights(config, jax.random.key(0)))
    layer = measuring.make_layer(config, options.implementation)
    measuring.compile_all(layer, config, weights, options.tokens)
    prepared = {name: peers.prepare(name, config, weights) for name in options.compare}
    for tokens in options.tokens:
        progress(f"{case.name}: T = {tokens}")
        row: dict[str, Any] = {"case": case.name, "tokens": tokens, "dtype": config.dtype}
        expected = None
        x, logits = measuring.make_inputs(config, tokens)
        try:
            expected = measuring.Expected(config, weights, x, logits) if tokens else None
            row = measuring.measure(
                case,
                config,
                layer,
                weights,
                (x, logits),
                expected,
                implementation=options.implementation,
                ceilings=ceilings,
                checks=options.checks,
                on_gpu=on_gpu,
            )
        except Exception as failure:  # one case must not take the others with it
            row["failed"] = f"{type(failure).__name__}: {failure}"[:2000]
        if expected is not None and prepared:
            row["peers"] = {}
            for name, peer in prepared.items():
                progress(f"{case.name}: T = {tokens}, {name}")
                row["peers"][name] = measure_peer(peer, config, weights, x, logits, expected, on_gpu)
        yield row


def measure_peer(
    peer: peers.Prepared | str,
    config: MoEConfig,
    weights: ExpertWeights,
    x: jax.Array,
    logits: jax.Array,
    expected: measuring.Expected,
    on_gpu: bool,
) -> dict[str, Any]:
    """A peer's part of a row: its error and times, or under ``reason`` why there are none."""
    if isinstance(peer, str):
        return {"reason": peer}
    found: dict[str, Any] = {}
    try:
        jax.block_until_ready((x, weights, logits))
        bound = peer(x, logits)
        found["implementation"] = bound.what
        error = expected.error(bound.to_array(bound.wait(bound.call())))
        found["error"] = error if math.isfinite(error) else None
        wrong = measuring.wrong_output(error, config.dtype)
        if wrong:
            return found | {"reason": wrong}
        found["layer_us"] = round(call_time(bound.call, bound.wait), 1)
        if on_gpu and bound.jitted is not None:
            found["kernels_total_us"] = round(sum(kernel_times(*bound.jitted).values()), 1)
    except Exception as failure:  # theirs, not ours
        found["reason"] = peers.short(failure)
    return found


def failures(result: dict[str, Any]) -> list[str]:
    """What is wrong with our own layer, one line for each row; empty when all is well."""
    return [f"{row['case']}, T = {row['tokens']}: {row['failed']}" for row in result["rows"] if "failed" in row]
