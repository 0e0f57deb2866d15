"""Times a layer under changes of its plan, side by side on one GPU: what `benchmarks/results/*variants.txt` is made of.

python benchmarks/variants.py --cell dsv3-ep8:4096:uniform,half --change up.band=4 --change up.gather=0,down.stages=3
python benchmarks/variants.py --cell qwen3-30b-a3b:1024 --quantization fp8_block --dry

Every output is compared with that of the rule's plan, bit for bit. The variants are timed in turns, forwards and backwards: a
clock that sinks meets all of them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import typer

from moe_jax import moe
from moe_jax.bench.cases import parse_case
from moe_jax.bench.compiling import Layer, layers_a_call, stack_logits
from moe_jax.bench.inputs import in_format, make_inputs, make_weights, parse_routings, weights_shape
from moe_jax.bench.timing import call_time, kernel_times
from moe_jax.config import MoEConfig
from moe_jax.kernels.hopper.matmul_config import Config
from moe_jax.tuning.plan import LayerPlan, LayerShape, default_plan

RULE = "rule"


class Cell(NamedTuple):
    """A case at a number of tokens, under some routings."""

    name: str
    config: MoEConfig
    tokens: int
    routings: tuple[str, ...]


def parse_cell(text: str, quantization: str | None = None) -> Cell:
    """A cell of ``case:tokens[:routings]``.

    Example:
        >>> parse_cell("dsv3-ep8:4096:uniform,half")[2:]
        (4096, ('uniform', 'half'))
    """
    case, tokens, *routings = text.split(":")
    config = parse_case(case).config("bfloat16", quantization)
    return Cell(case, config, int(tokens), parse_routings(routings[0] if routings else "uniform"))


def changed(plan: LayerPlan, change: str) -> LayerPlan:
    """The plan with ``side.field=value`` changed, several separated by commas; ``both`` is up and down, ``/`` between row counts.

    Example:
        >>> rule = default_plan(LayerShape(128, 32768, 2048, 768, gated=True, dtype="bfloat16"))
        >>> changed(rule, "up.band=4,both.stages=3").down.stages
        3
    """
    if change == RULE:
        return plan
    changes: dict[str, Config] = {}
    for part in change.split(","):
        where, value = part.split("=")
        side, field = where.split(".")
        for name in ("up", "down") if side == "both" else (side,):
            config = changes.get(name, getattr(plan, name))
            kind = type(getattr(config, field))
            new = tuple(map(int, value.split("/"))) if kind is tuple else kind(int(value))
            changes[name] = dataclasses.replace(config, **{field: new})
    tile_rows = {config.tile_rows for config in (changes.get("up", plan.up), changes.get("down", plan.down))}
    return dataclasses.replace(plan, tile_rows=max(tile_rows), **changes)


def lowered(cell: Cell, plan: LayerPlan, dry: bool) -> tuple[Layer, object]:
    """The layer, and its stack lowered."""
    config = cell.config
    layer = Layer(functools.partial(moe, config=config, plan=plan, implementation="mosaic"))
    x = jax.ShapeDtypeStruct((cell.tokens, config.hidden_size), config.dtype)
    logits = jax.ShapeDtypeStruct((cell.tokens, config.num_experts), jnp.float32)
    weights = weights_shape(config)
    if dry:
        return layer, layer.jitted.trace(x, weights, logits).lower(lowering_platforms=("cuda",))
    return layer, layer.stacked.lower(x, weights, stack_logits(logits))


def measure(cell: Cell, stacks: dict[str, Layer], turns: int) -> None:
    """Prints a line for each routing and variant."""
    weights = jax.block_until_ready(in_format(make_weights(cell.config, jax.random.key(0)), cell.config))
    for routing in cell.routings:
        x, logits = make_inputs(cell.config, cell.tokens, routing)
        logits, calls = stack_logits(logits), layers_a_call(cell.tokens)
        runs = {name: layer.compiled_stacks[cell.tokens] for name, layer in stacks.items()}
        outputs = {name: np.asarray(run(x, weights, logits)[0]).view(np.int16) for name, run in runs.items()}
        for name, output in outputs.items():
            if not np.array_equal(output, outputs[RULE]):
                print(f"{cell.name} {cell.tokens} {routing} {name}: ANOTHER OUTPUT", flush=True)
        times: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(turns):
            for name in list(runs)[:: -1 if turn % 2 else 1]:
                call = functools.partial(runs[name], x, weights, logits)
                times[name].append(call_time(call, seconds=0.5) / calls)
        for name, run in runs.items():
            kernels = kernel_times(run, x, weights, logits, layers=calls, iterations=5)
            layer_us = " ".join(f"{time:.1f}" for time in times[name])
            of_kernels = ", ".join(f"{kernel}: {time:.2f}" for kernel, time in kernels.items())
            print(
                f"{cell.name} {cell.tokens} {routing} {name}: layer {layer_us}, "
                f"kernels {sum(kernels.values()):.1f} {{{of_kernels}}}",
                flush=True,
            )


def main(
    cell: Annotated[list[str], typer.Option(help="case:tokens[:routings]; may be repeated.")],
    change: Annotated[list[str] | None, typer.Option(help="side.field=value,...; may be repeated.")] = None,
    quantization: Annotated[str | None, typer.Option(help="Number format of the experts.")] = None,
    turns: int = 3,
    dry: Annotated[bool, typer.Option("--dry", help="Only lower for CUDA; needs no GPU.")] = False,
) -> None:
    cells = [parse_cell(text, quantization) for text in cell]
    jobs = []
    for one, name in itertools.product(cells, [RULE, *(change or [])]):
        plan = changed(default_plan(LayerShape.of(one.config, one.tokens)), name)
        try:
            jobs.append((one, name, *lowered(one, plan, dry)))
        except ValueError as error:  # a plan that cannot run; the others can be timed without
            print(f"{one.name} {one.tokens} {name}: {error}"[:300], flush=True)
            continue
        if dry:
            print(one.name, one.tokens, name, plan)
    if dry:
        return

    def compile_one(job) -> None:
        one, name, layer, lowered_stack = job
        try:
            layer.compiled_stacks[one.tokens] = lowered_stack.compile()
        except Exception as error:  # the others can be timed without
            print(f"{one.name} {one.tokens} {name}: {type(error).__name__}: {error}"[:300], flush=True)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(compile_one, jobs))
    for one in cells:
        stacks = {name: layer for other, name, layer, _ in jobs if other is one and layer.compiled_stacks}
        measure(one, stacks, turns)


if __name__ == "__main__":
    typer.run(main)
