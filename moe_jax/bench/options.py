"""What a run of the benchmark is asked for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from moe_jax.bench.cases import CASES, CPU_CASES, CPU_TOKENS, GPU_TOKENS, Case


@dataclasses.dataclass(frozen=True)
class BenchOptions:
    """What to measure. What is left empty is filled in by device: all named cases on a GPU, something small without one.

    Attributes:
        cases: the shapes.
        tokens: T, ascending.
        routings: names of routings, see `moe_jax.bench.inputs`.
        dtype: compute dtype; None for bfloat16 on a GPU, else float32.
        quantization: name of the experts' number format, see `moe_jax.quantization.quant_format`; None: not quantized.
        implementation: what is measured.
        compare: names of peers.
        seconds: about how long the times of a layer, ours or a peer's, are taken in a row: a GPU at work becomes slower.
        budget: seconds; a row or peer not begun when they are spent is not measured. None: no end.
        processes: each case in its own process, see `moe_jax.bench.processes`; None for several cases on a GPU.
        checks: also run what must hold bit for bit.
        commit: of the source; None asks git.
        out: result file, written again after every row.
    """

    cases: tuple[Case, ...] = ()
    tokens: tuple[int, ...] = ()
    routings: tuple[str, ...] = ("uniform",)
    dtype: str | None = None
    quantization: str | None = None
    implementation: str = "auto"
    compare: tuple[str, ...] = ()
    seconds: float = 1.0
    budget: float | None = None
    processes: bool | None = None
    checks: bool = False
    commit: str | None = None
    out: Path | None = None

    def filled(self, on_gpu: bool) -> BenchOptions:
        """With the defaults of the device."""
        cases = self.cases or (tuple(CASES.values()) if on_gpu else CPU_CASES)
        return dataclasses.replace(
            self,
            cases=cases,
            tokens=self.tokens or (GPU_TOKENS if on_gpu else CPU_TOKENS),
            dtype=self.dtype or ("bfloat16" if on_gpu else "float32"),
            processes=on_gpu and len(cases) > 1 if self.processes is None else self.processes,
        )
