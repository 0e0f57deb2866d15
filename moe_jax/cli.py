"""The command line, `moe-jax demo | explain | bench | tune | layer-test`: options and printing; the work is done elsewhere."""

import enum
import importlib.metadata
import importlib.util
import json
import os
from pathlib import Path
from typing import Annotated

import typer

from moe_jax.config import MoEConfig, RoutingConfig
from moe_jax.console import console as _console
from moe_jax.console import fail as _fail
from moe_jax.explain_table import explanation_table
from moe_jax.explanation import explain as explain_layer
from moe_jax.explanation import explain_plan
from moe_jax.layer_test.command import layer_test
from moe_jax.tuning.command import tune

app = typer.Typer(
    help="Mixture-of-Experts layers for JAX on NVIDIA GPUs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(tune)
app.command()(layer_test)


class Dtype(enum.StrEnum):
    """Compute dtypes."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


class Implementation(enum.StrEnum):
    """What `implementation=` of the library takes."""

    AUTO = "auto"
    XLA = "xla"
    MOSAIC = "mosaic"
    MOSAIC_INTERPRET = "mosaic_interpret"


class Platform(enum.StrEnum):
    """Where a layer would run."""

    CPU = "cpu"
    GPU = "gpu"


def _version(value: bool) -> bool:
    if value:
        typer.echo(importlib.metadata.version("moe_jax"))
        raise typer.Exit
    return value


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Mixture-of-Experts layers for JAX on NVIDIA GPUs."""


@app.command()
def demo(
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Folder of a Hugging Face MoE checkpoint. Default: a small Qwen3-MoE with random weights."),
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Text to run through the model. Default: the README.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Use at most this many tokens of the text.")] = 1024,
    layers: Annotated[int, typer.Option(min=1, help="Run this many of the first MoE layers.")] = 4,
    ranks: Annotated[int, typer.Option(min=1, help="Expert-parallel ranks of the second run.")] = 4,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Compute dtype. Default: bfloat16 on a GPU, else float32.")
    ] = None,
    implementation: Annotated[
        Implementation,
        typer.Option(help="Which implementation to run; the interpreter takes minutes for a few tokens."),
    ] = Implementation.AUTO,
    tolerance: Annotated[
        float | None, typer.Option(min=0.0, help="Largest relative error that passes. Default: by dtype.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls; the median counts.")] = 5,
    out: Annotated[Path, typer.Option(help="Where to write the picture of the expert load.")] = Path("expert_load.png"),
) -> None:
    """Run the MoE layers of a real checkpoint with moe_jax and with transformers, and compare."""
    # Both frameworks share the GPU: JAX must not reserve most of it up front.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if implementation is Implementation.MOSAIC_INTERPRET:
        # Interpreted kernels block a thread at each barrier: with a pool of one thread a core they deadlock.
        os.environ.setdefault("NPROC", "64")
    from moe_jax.demo import DemoError, DemoOptions, run_demo
    from moe_jax.demo.report import print_result, save_expert_load

    options = DemoOptions(
        checkpoint=checkpoint,
        text=text,
        max_tokens=max_tokens,
        layers=layers,
        ranks=ranks,
        dtype=dtype.value if dtype else None,
        implementation=implementation.value,
        tolerance=tolerance,
        repeats=repeats,
    )
    console = _console()
    try:
        if not out.parent.is_dir():
            raise DemoError(f"--out {out}: there is no folder {out.parent}")
        with console.status("starting") as status:
            result = run_demo(options, status.update)
        print_result(result, console)
        save_expert_load(result, out)
    except DemoError as error:
        raise _fail(str(error), 2) from error
    console.print(f"wrote {out}", highlight=False)
    if result.failures:
        raise typer.Exit(1)


@app.command()
def explain(
    config: Annotated[
        Path | None, typer.Option(help="Hugging Face config.json, or the folder that holds it. Or give the shape:")
    ] = None,
    num_experts: Annotated[int | None, typer.Option(help="Routed experts, E.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Experts per token, k.")] = None,
    hidden_size: Annotated[int | None, typer.Option(help="H.")] = None,
    intermediate_size: Annotated[int | None, typer.Option(help="I, of one routed expert.")] = None,
    activation: Annotated[str, typer.Option(help="Activation of the experts (with a shape only).")] = "silu",
    routing: Annotated[str, typer.Option(help="Routing method (with a shape only).")] = "renormalize",
    dtype: Annotated[Dtype, typer.Option(help="Compute dtype.")] = Dtype.BFLOAT16,
    quantization: Annotated[str | None, typer.Option(help="Number format of the experts, such as fp8_block.")] = None,
    tokens: Annotated[int, typer.Option(min=0, help="Tokens in a batch, T.")] = 4096,
    platform: Annotated[Platform | None, typer.Option(help="Default: what JAX runs on here.")] = None,
) -> None:
    """Print each implementation of each op, and the reason why it does or does not apply."""
    shape = {
        "num_experts": num_experts,
        "top_k": top_k,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
    }
    try:
        if config is not None:
            path = config / "config.json" if config.is_dir() else config
            moe_config = MoEConfig.from_hf(json.loads(path.read_text()), dtype=dtype.value, quantization=quantization)
        else:
            missing = ["--" + name.replace("_", "-") for name, value in shape.items() if value is None]
            if missing:
                raise ValueError(f"the shape lacks {', '.join(missing)}; or give --config")
            moe_config = MoEConfig(
                **shape,
                activation=activation,
                routing=RoutingConfig(routing),
                dtype=dtype.value,
                quantization=quantization,
            )
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise _fail(str(error), 2) from error
    where = platform.value if platform else None
    console = _console()
    console.print(explanation_table(explain_layer(moe_config, tokens, where)))
    console.print(explain_plan(moe_config, tokens, where), highlight=False, markup=False)


@app.command()
def bench(
    case: Annotated[
        list[str] | None,
        typer.Option(
            help="Name of a shape, or E,k,H,I; may be repeated. Default: all names on a GPU, a small one without."
        ),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(help="Numbers of tokens, T. Default: 0,1,16,128,1024,4096,16384 on a GPU, else 1,16,128."),
    ] = None,
    routing: Annotated[
        str,
        typer.Option(
            help="How the experts are loaded: uniform, zipf, half (one gets half of the rows, at most one of each token's) "
            "or eight (of all are active); several as uniform,half."
        ),
    ] = "uniform",
    dtype: Annotated[
        Dtype | None, typer.Option(help="Compute dtype. Default: bfloat16 on a GPU, else float32.")
    ] = None,
    quantization: Annotated[
        str | None, typer.Option(help="Number format of the experts, such as fp8_block. Default: not quantized.")
    ] = None,
    implementation: Annotated[Implementation, typer.Option(help="What to measure.")] = Implementation.AUTO,
    compare: Annotated[
        str,
        typer.Option(
            help="Peers to run beside it, of torch, vllm, sonicmoe, cutlass and deepgemm (vLLM's, for FP8 experts), tokamax, "
            "ragged_dot (jax.lax's) and xla (our plain-JAX form); one that cannot run here says why."
        ),
    ] = "",
    seconds: Annotated[
        float,
        typer.Option(min=0.001, help="About how long the times of a layer, ours or a peer's, are taken in a row."),
    ] = 1.0,
    budget: Annotated[
        float | None, typer.Option(min=0.0, help="Seconds; what is not begun when they are spent is not measured.")
    ] = None,
    checks: Annotated[bool, typer.Option("--checks", help="Also check bit for bit: two runs, a token alone.")] = False,
    commit: Annotated[str | None, typer.Option(help="Commit to record. Default: what git says.")] = None,
    out: Annotated[Path | None, typer.Option(help="Result file, JSON, written again after every row.")] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Picture of time against tokens, a panel a case; of several routings one each, FILE-ROUTING.png."
        ),
    ] = None,
) -> None:
    """Measure the layer: kernel and layer times, error, share of what the hardware can do."""
    if implementation is Implementation.MOSAIC_INTERPRET:
        os.environ.setdefault("NPROC", "64")  # see demo
    from moe_jax.bench import (
        BenchOptions,
        failures,
        parse_case,
        parse_format,
        parse_peers,
        parse_routings,
        parse_tokens,
        run_bench,
    )
    from moe_jax.bench.environment import has_gpu
    from moe_jax.bench.plot import save_plots
    from moe_jax.bench.report import case_table, headline

    try:
        options = BenchOptions(
            cases=tuple(parse_case(text) for text in dict.fromkeys(case or [])),
            tokens=parse_tokens(tokens) if tokens is not None else (),
            routings=parse_routings(routing),
            dtype=dtype.value if dtype else None,
            quantization=parse_format(quantization),
            implementation=implementation.value,
            compare=parse_peers(compare),
            seconds=seconds,
            budget=budget,
            checks=checks,
            commit=commit,
            out=out,
        )
        for name, path in (("--out", out), ("--plot", plot)):
            if path is not None and not path.parent.is_dir():
                raise ValueError(f"{name} {path}: there is no folder {path.parent}")
        if plot is not None and importlib.util.find_spec("matplotlib") is None:
            raise ValueError("--plot needs matplotlib; pip install 'moe_jax[demo]'")
    except ValueError as error:
        raise _fail(str(error), 2) from error
    # Several processes share the GPU, and torch with them: JAX must not reserve three quarters of it when it starts, which
    # it does at the first look for a device, below. Its pool then grows as needed, up to the same three quarters, and
    # never shrinks; the rest, 35 GB on an H200, is enough for a peer's activations, since the weights are not copied.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # torch's threads on a CPU spin while they wait, which on a busy machine makes it look a hundred times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    console = _console()
    if not has_gpu():
        console.print(
            "There is no GPU here: the plain-JAX (xla) path runs, at small sizes by default, and kernel times are left out.",
            highlight=False,
        )
    with console.status("starting") as status:
        result = run_bench(options, lambda _, rows: console.print(case_table(rows)), status.update)
    console.print(headline(result), highlight=False, markup=False)
    if out is not None:
        console.print(f"wrote {out}", highlight=False, markup=False)
    wrong = failures(result)
    if plot is not None:
        try:
            for path in save_plots(result, plot):
                console.print(f"wrote {path}", highlight=False, markup=False)
        except (OSError, ValueError) as error:  # a folder that is read-only; an ending that names no picture format
            raise _fail(f"cannot write --plot {plot}: {error}", 2) from error
    if wrong:
        raise _fail("; ".join(wrong), 1)


def main() -> None:
    """The entry point of the `moe-jax` script."""
    app()
