"""Trains a byte-level Mixture-of-Experts transformer on the sources of Python's standard library.

    python examples/train_moe_lm.py                          # toy size, some minutes on a CPU
    python examples/train_moe_lm.py --balancing bias         # DeepSeek-V3's balancing without a loss
    python examples/train_moe_lm.py --size small --precision fp8  # FP8 products in the experts, bfloat16 beside them
    python examples/train_moe_lm.py --devices 2              # batch and experts over two devices (virtual ones of a CPU)
    python examples/train_moe_lm.py --size small --precision fp8 --devices 2  # both
    python examples/train_moe_lm.py --size gpu --steps 2000  # bfloat16, a real size

Call it again with the same `--folder` and it goes on from the last checkpoint, with the numbers that an uninterrupted run has.
Needs the extra ``train``.
"""

from pathlib import Path
from typing import Annotated

import jax
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from moe_lm.data import Batches, stdlib_bytes
from moe_lm.model import SIZES


def main(
    size: Annotated[str, typer.Option(help="toy, small, or gpu")] = "toy",
    precision: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16, fp8, fp8-e5m2 or fp8-tensor (not toy); by default that of the size"),
    ] = None,
    steps: Annotated[int, typer.Option(help="steps of the whole run", min=1)] = 300,
    balancing: Annotated[
        str, typer.Option(help="aux (a loss), bias (without a loss), z (z-loss alone) or none")
    ] = "aux",
    learning_rate: Annotated[float | None, typer.Option(help="the largest; by default that of the size")] = None,
    devices: Annotated[int, typer.Option(help="split the batch and the experts over so many", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="of parameters and data")] = 0,
    folder: Annotated[Path, typer.Option(help="for checkpoints, records and pictures")] = Path("moe_lm_run"),
    save_every: Annotated[int, typer.Option(help="steps between checkpoints", min=1)] = 100,
    stop_after: Annotated[int | None, typer.Option(help="stop after this step, to go on later")] = None,
) -> None:
    """Trains a byte-level Mixture-of-Experts transformer on the sources of Python's standard library."""
    console = Console()
    if size not in SIZES:
        raise typer.BadParameter(f"size={size!r} must be one of {', '.join(SIZES)}")
    if devices > 1:
        jax.config.update("jax_num_cpu_devices", devices)  # read when JAX starts; GPUs are as many as there are
    if devices > jax.device_count():
        raise typer.BadParameter(
            f"devices={devices}, but JAX sees {jax.device_count()} {jax.default_backend()} devices"
        )

    from moe_lm.plots import save_plots
    from moe_lm.train import BALANCING, Checkpoints, TrainConfig, Trainer, run, violation

    if balancing not in BALANCING:
        raise typer.BadParameter(f"balancing={balancing!r} must be one of {', '.join(BALANCING)}")
    try:
        model = SIZES[size].with_precision(precision)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    rate = learning_rate or (6e-4 if size == "gpu" else 3e-3)
    train = TrainConfig(steps=steps, learning_rate=rate, balancing=balancing, seed=seed, devices=devices)
    trainer = Trainer(model, train)
    text = stdlib_bytes()
    batches = Batches(text, model.batch_size, model.seq_len, seed)
    checkpoints = Checkpoints(folder)
    done = checkpoints.manager.latest_step() or 0
    where = f"{devices} {jax.default_backend()} device{'s' if devices > 1 else ''}"
    console.print(
        f"{len(text) / 1e6:.1f} MB of Python, {size} model on {where}, balancing: {balancing}, from step {done}"
    )

    columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        until = min(stop_after or steps, steps)
        task = progress.add_task("", total=until, completed=min(done, until))

        def report(record: dict) -> None:
            text = f"loss {record['loss']:.3f}  busiest expert +{violation(record['loads']):.0%}"
            progress.update(task, completed=record["step"], description=text)

        records = run(trainer, batches, until=until, checkpoints=checkpoints, every=save_every, report=report)

    last = records[-min(20, len(records)) :]
    mean = sum(record["loss"] for record in last) / len(last)
    busiest = sum(violation(record["loads"]) for record in last) / len(last)
    console.print(
        f"mean of the last {len(last)} steps: loss {mean:.3f}, busiest expert {busiest:.0%} above an even share"
    )
    console.print("wrote " + ", ".join(str(path) for path in save_plots(records, folder)))


if __name__ == "__main__":
    typer.run(main)
