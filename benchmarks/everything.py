"""Runs the benchmarks of this folder on all GPUs of a machine, side by side, within a time. Each job has its GPUs to itself.

python benchmarks/everything.py --folder measured --minutes 9
python benchmarks/everything.py --folder measured --minutes 9 --job bf16 --job fp8_block --job training --job exchange
python benchmarks/everything.py --list

Jobs begin in the order given, each as soon as enough GPUs are free. One that takes longer than its share, or than all may take,
is ended; what it had written stays. Output of NAME is in FOLDER/NAME.txt, results are in FOLDER/NAME.json. Jobs share the cores
of the machine, on which they compile.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

HERE = Path(__file__).parent
CASES = ("mixtral-8x7b", "qwen3-30b-a3b", "qwen3-235b", "dsv3-ep8", "gpt-oss-120b")
POLL_SECONDS = 0.2


@dataclasses.dataclass(frozen=True)
class Job:
    """A command that measures something.

    Attributes:
        name: of its files.
        command: its arguments; ``{out}`` stands for its result file.
        seconds: the most that it may take.
        gpus: that it needs.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    gpus: int = 1


def _bench(name: str, *options: str, cases: Sequence[str] = CASES, seconds: float = 420.0) -> Job:
    start = (
        "-c",
        "from moe_jax.cli import main; main()",
        "bench",
        *(word for case in cases for word in ("--case", case)),
    )
    return Job(name, (*start, *options, "--budget", str(seconds - 30), "--out", "{out}"), seconds)


def _script(name: str, script: str, *options: str, seconds: float, gpus: int = 1) -> Job:
    return Job(name, (str(HERE / script), *options, "--output", "{out}"), seconds, gpus)


_TRAINING = [word for case in ("qwen3-30b-a3b", "mixtral-8x7b", "qwen3-235b") for word in ("--case", case)]
JOBS = {
    job.name: job
    for job in (
        _bench("bf16", "--compare", "torch,vllm,tokamax"),
        # It tunes itself for a minute or more at each cell.
        _bench("sonicmoe", "--compare", "sonicmoe", "--tokens", "4096,16384", seconds=560.0),
        _bench("fp8_block", "--quantization", "fp8_block", "--compare", "vllm,deepgemm"),
        _bench("fp8_channel", "--quantization", "fp8_channel", "--compare", "torch,vllm,cutlass"),
        _bench("nvfp4", "--quantization", "nvfp4", seconds=300.0),
        _bench("mxfp4", "--quantization", "mxfp4", cases=("gpt-oss-120b", "qwen3-30b-a3b"), seconds=200.0),
        _bench("nvfp4_fp8", "--quantization", "nvfp4_fp8", cases=CASES[:2], seconds=200.0),
        _bench("int8_channel", "--quantization", "int8_channel", "--compare", "vllm", cases=CASES[:2], seconds=200.0),
        _bench("int8_weight", "--quantization", "int8_weight", "--compare", "vllm", cases=CASES[:2], seconds=200.0),
        _bench("fp8_weight", "--quantization", "fp8_weight_block", cases=CASES[:2], seconds=200.0),
        _bench("fp16", "--dtype", "float16", "--compare", "torch,vllm", cases=CASES[:2], seconds=200.0),
        _bench("skewed", "--routing", "uniform,zipf,half,eight", "--tokens", "1024,4096", seconds=300.0),
        _script("training", "training.py", *_TRAINING, "--precision", "bfloat16", "--precision", "fp8", seconds=480.0),
        _script("generation", "generation.py", "--mode", "graph", seconds=150.0),
        _script("generation-compiled", "generation.py", "--mode", "compile", seconds=200.0),
        _script("torch-layer", "torch_layer.py", "--case", "qwen3-30b-a3b", "--tokens", "1,16,128,1024", seconds=200.0),
        _script("exchange", "exchange.py", seconds=400.0, gpus=2),
    )
}


class Run:
    """A job under way.

    Args:
        job: what runs.
        gpus: their numbers.
        folder: of its files.
    """

    def __init__(self, job: Job, gpus: tuple[int, ...], folder: Path):
        self.job, self.gpus, self.begun = job, gpus, time.monotonic()
        environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONUNBUFFERED": "1", **os.environ}
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
        out = str(folder / f"{job.name}.json")
        command = [sys.executable, *(word.replace("{out}", out) for word in job.command)]
        with (folder / f"{job.name}.txt").open("w") as log:
            # A group of its own: what it started ends with it.
            self._process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.begun

    def code(self, deadline: float) -> int | None:
        """The exit code, None while it may go on. One that had its time is ended."""
        code = self._process.poll()
        if code is None and (self.seconds > self.job.seconds or time.monotonic() > deadline):
            self.end()
            return self._process.returncode
        return code

    def end(self) -> None:
        """Ends it, with all that it started."""
        for number, patience in ((signal.SIGTERM, 3.0), (signal.SIGKILL, None)):
            try:
                os.killpg(self._process.pid, number)
                self._process.wait(patience)
                return
            except ProcessLookupError:
                self._process.wait()
                return
            except subprocess.TimeoutExpired:
                continue


def run_all(
    jobs: Sequence[Job], gpus: int, seconds: float, folder: Path, report: Callable[[str], None] = print
) -> dict[str, int | None]:
    """The exit code of each job, negative for one that was ended, None for one that never began.

    Args:
        jobs: in the order in which they begin.
        gpus: of the machine.
        seconds: that all may take.
        folder: for their files; made if it is not there.
        report: takes a line for each job that begins and ends.

    Raises:
        ValueError: a job that needs more GPUs than there are.
    """
    for job in jobs:
        if job.gpus > gpus:
            raise ValueError(f"job {job.name!r} needs {job.gpus} GPUs, but there are {gpus}; leave it out")
    folder.mkdir(parents=True, exist_ok=True)
    free, waiting, running = list(range(gpus)), list(jobs), []
    codes: dict[str, int | None] = {job.name: None for job in jobs}
    begun = time.monotonic()
    deadline = begun + seconds
    try:
        while running or (waiting and time.monotonic() < deadline):
            for job in [job for job in waiting if time.monotonic() < deadline]:
                if job.gpus > len(free):
                    break  # later ones wait too: a job of two GPUs would else never begin
                taken, free = tuple(free[: job.gpus]), free[job.gpus :]
                waiting.remove(job)
                running.append(Run(job, taken, folder))
                report(f"{time.monotonic() - begun:6.1f} s  {job.name} begins on GPU {', '.join(map(str, taken))}")
            for run in list(running):
                code = run.code(deadline)
                if code is None:
                    continue
                running.remove(run)
                free = sorted([*free, *run.gpus])
                codes[run.job.name] = code
                how = "done" if code == 0 else "ended, its time was up" if code < 0 else f"failed with {code}"
                report(f"{time.monotonic() - begun:6.1f} s  {run.job.name}: {how} after {run.seconds:.0f} s")
            if running:
                time.sleep(POLL_SECONDS)
    finally:
        for run in running:
            run.end()
    return codes


def count_gpus() -> int:
    """GPUs that nvidia-smi lists; 0 without it."""
    try:
        found = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return 0
    return len(found.stdout.splitlines())


def main(
    folder: Annotated[Path, typer.Option(help="For results and outputs.")] = Path("measured"),
    minutes: Annotated[float, typer.Option(help="That all may take.", min=0.01)] = 60.0,
    job: Annotated[list[str] | None, typer.Option(help="One of --list; may be repeated. Default: all.")] = None,
    gpus: Annotated[int | None, typer.Option(help="How many to use. Default: all.")] = None,
    show: Annotated[bool, typer.Option("--list", help="Only list the jobs.")] = False,
) -> None:
    if show:
        for one in JOBS.values():
            print(f"{one.name}: {one.gpus} GPU, at most {one.seconds:.0f} s: {' '.join(one.command)}")
        return
    names = job or list(JOBS)
    if unknown := [name for name in names if name not in JOBS]:
        raise typer.BadParameter(f"job {unknown[0]!r} must be one of {', '.join(JOBS)}")
    there = count_gpus() if gpus is None else gpus
    if there < 1:
        raise typer.BadParameter("nvidia-smi lists no GPU here, and there is nothing to time without one")
    wanted = [JOBS[name] for name in names if job or JOBS[name].gpus <= there]
    try:
        codes = run_all(wanted, there, 60 * minutes, folder)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if bad := [name for name, code in codes.items() if code]:
        print(f"not done: {', '.join(bad)}; see {folder}/NAME.txt")
    if left := [name for name, code in codes.items() if code is None]:
        print(f"not begun: {', '.join(left)}")
    raise typer.Exit(int(bool(bad)))


if __name__ == "__main__":
    typer.run(main)
