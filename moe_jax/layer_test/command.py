"""`moe-jax layer-test`: the layer suite for the ranks and formats that options name, on the devices that are here."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import jax
import typer
from rich import box
from rich.progress import track
from rich.table import Table

from moe_jax.console import console, fail
from moe_jax.layer_test.config import MoETestConfig
from moe_jax.layer_test.run import LayerTestResult, run_one_config
from moe_jax.layer_test.support import BACKENDS, QUANT_METHODS, is_valid_config
from moe_jax.layer_test.sweep import FEATURES, sweep
from moe_jax.quantization import quant_format

VIRTUAL_DEVICES = 8


def layer_test(
    tp: Annotated[int, typer.Option(min=1, help="Ranks of tensor parallelism.")] = 1,
    dp: Annotated[int, typer.Option(min=1, help="Ranks of data parallelism.")] = 1,
    ep: Annotated[bool, typer.Option("--ep", help="The ranks split the experts, not their intermediate size.")] = False,
    quant: Annotated[
        str, typer.Option(help="Number formats, such as none,fp8_block; all for every one there is.")
    ] = "none",
    backend: Annotated[
        str, typer.Option(help="Exchanges, several as a,b. Default: all that these ranks can use.")
    ] = "",
    shape: Annotated[
        list[str] | None, typer.Option(help="m,n,k: rows of a shard, I and H; may be repeated. Default: 33,128,256.")
    ] = None,
    num_experts: Annotated[int, typer.Option(min=1, help="E.")] = 9,
    top_k: Annotated[int, typer.Option(min=1, help="k.")] = 2,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    shared: Annotated[bool, typer.Option("--shared", help="With a shared expert.")] = False,
    gate: Annotated[bool, typer.Option("--gate", help="Router logits computed in the layer.")] = False,
    transform: Annotated[bool, typer.Option("--transform", help="Routed experts of half the hidden size.")] = False,
    eplb: Annotated[bool, typer.Option("--eplb", help="Balance the load of the experts.")] = False,
    quantize_before: Annotated[bool, typer.Option("--quantize-before", help="Let codes travel.")] = False,
    sweep_all: Annotated[
        bool,
        typer.Option(
            "--sweep", help="All ranks and features, and both ways to quantize, for these shapes and formats."
        ),
    ] = False,
    subtests: Annotated[
        list[str] | None,
        typer.Option(help="The id of a config, as the table has it; may be repeated. Nothing else runs."),
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="On virtual devices of the CPU, even if there are GPUs.")] = False,
) -> None:
    """Run layers over a mesh and compare them with the float32 reference, rank by rank."""
    _virtual_devices(max(VIRTUAL_DEVICES, dp * tp))
    out = console()
    try:
        if subtests:
            configs = [MoETestConfig.from_id(text) for text in subtests]
        else:
            ranks = Ranks(dp, tp, ep)
            features = Features(shared, gate, transform, eplb, quantize_before)
            sizes = [_sizes(text) for text in shape or ["33,128,256"]]
            configs = chosen(
                sizes, num_experts, top_k, dtype, formats_of(quant), exchanges_of(backend), ranks, features, sweep_all
            )
        devices = _devices(cpu, max(config.world_size for config in configs))
        out.print(f"{len(configs)} layers on {devices[0].device_kind} devices", highlight=False)
        results = [run_one_config(config, devices) for config in track(configs, "running", console=out)]
    except (ValueError, NotImplementedError) as error:
        raise fail(str(error), 2) from error
    out.print(results_table(results))
    wrong = [result for result in results if result.failures]
    for result in wrong:
        out.print(f"{result.config.id()}: {'; '.join(result.failures)}", highlight=False, markup=False)
    if wrong:
        raise fail(f"{len(wrong)} of {len(results)} layers are wrong", 1)
    out.print(f"all {len(results)} agree with the reference", highlight=False)


class Ranks(NamedTuple):
    """Sizes, and whether the ranks split the experts."""

    dp: int
    tp: int
    ep: bool


class Features(NamedTuple):
    """What a layer has beside its experts."""

    shared: bool
    gate: bool
    transform: bool
    eplb: bool
    quantize_before: bool


def chosen(
    shapes: list[tuple[int, int, int]],
    num_experts: int,
    top_k: int,
    dtype: str,
    formats: tuple[str | None, ...],
    exchanges: tuple[str, ...],
    ranks: Ranks,
    features: Features,
    sweep_all: bool,
) -> list[MoETestConfig]:
    """The configs that the options name: of these ranks and features, or of all.

    Raises:
        ValueError: there is none; says why.
    """
    options: dict[str, Any] = {"shapes": shapes, "num_experts": (num_experts,), "top_ks": (top_k,), "dtypes": (dtype,)}
    options |= {"quantizations": formats, "backends": exchanges}
    if sweep_all:
        return list(sweep(**options, features=FEATURES, quantize_before=(False, True)))
    size = ranks.dp * ranks.tp
    config = MoETestConfig(
        *shapes[0],
        num_experts,
        top_k,
        dtype,
        formats[0],
        *features[:4],
        backend=exchanges[0] if size > 1 else None,
        ep_size=size if ranks.ep else 1,
        dp_size=ranks.dp,
        tp_size=ranks.tp,
        quantize_before=features.quantize_before,
    )
    options |= {"ranks": [(*ranks[:2], ranks.ep and size > 1)], "max_devices": size}
    found = list(sweep(**options, features=[features[:3]], quantize_before=(features.quantize_before,)))
    if not found:
        raise ValueError(f"there is no such layer: {is_valid_config(config)[1]}")
    return [dataclasses.replace(one, enable_eplb=features.eplb) for one in found]


def formats_of(text: str) -> tuple[str | None, ...]:
    """Number formats by name.

    Example:
        >>> formats_of("none,fp8_block")
        (None, 'fp8_block')
    """
    if text == "all":
        return QUANT_METHODS
    return tuple(None if name == "none" else quant_format(name).name for name in text.split(","))


def exchanges_of(text: str) -> tuple[str, ...]:
    """Exchanges by name.

    Example:
        >>> exchanges_of("all_to_all")
        ('all_to_all',)
    """
    names = tuple(text.split(",")) if text else tuple(BACKENDS)
    for name in names:
        if name not in BACKENDS:
            raise ValueError(f"--backend {name} is not one of {', '.join(BACKENDS)}")
    return names


def _sizes(text: str) -> tuple[int, int, int]:
    parts = text.split(",")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"--shape {text} must be three numbers m,n,k: rows of a shard, I and H, such as 33,128,256")
    m, n, k = map(int, parts)
    return m, n, k


def _virtual_devices(number: int) -> None:
    """Several devices on a CPU: read once, when JAX starts. GPUs are as many as there are."""
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={number}".strip()


def _devices(cpu: bool, number: int) -> Sequence[jax.Device]:
    """GPUs, if there are as many as ranks; virtual devices of the CPU otherwise."""
    devices = jax.devices()
    if cpu or len(devices) < number:
        if not cpu and devices[0].platform != "cpu":
            console().print(f"{len(devices)} of {number} GPUs are there: virtual devices of the CPU run instead")
        devices = jax.devices("cpu")
    return devices


def results_table(results: list[LayerTestResult]) -> Table:
    """A line a config."""
    table = Table(box=box.SIMPLE_HEAD)
    columns = ("dp", "tp", "ep", "exchange", "format", "m, n, k", "E, k", "with", "error", "of a token", "")
    for column in columns:
        table.add_column(column, justify="right" if column in ("dp", "tp", "ep", "error", "of a token") else "left")
    for result in results:
        config = result.config
        ranks = (str(size) for size in (config.dp_size, config.tp_size, config.ep_size))
        named = {
            "sequence parallel": config.is_sequence_parallel,
            "codes travel": config.quantize_before,
            "shared": config.use_shared_experts,
            "gate": config.use_gate,
            "transform": config.use_routed_input_transform,
        }
        table.add_row(
            *ranks,
            config.backend or "",
            config.quantization or config.in_dtype,
            f"{config.m}, {config.n}, {config.k}",
            f"{config.num_experts}, {config.top_k}",
            ", ".join(name for name, there in named.items() if there),
            f"{result.error:.1e}",
            f"{result.token_error:.1e}",
            "[bold red]WRONG[/]" if result.failures else "ok",
        )
    return table
