"""Times a layer forward, and forward and backward, with each of its kernels, beside torch's grouped matmul and autograd.

python benchmarks/training.py --case qwen3-30b-a3b --case mixtral-8x7b --output benchmarks/results/NAME.json
python benchmarks/training.py --case qwen3-30b-a3b --precision bfloat16 --precision fp8
python benchmarks/training.py --case qwen3-235b --tokens 4096 --dry

Gradients are those of hidden states, experts and router logits. Everything is compiled before anything is timed, side by side: a
step has kernels of many row counts, and compiling takes minutes. Kernels are timed by CUPTI, calls by the clock with others
queued behind. Rates count the products alone: 6 T k H I operations forward and twice as many backward, for gated experts.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer

from moe_jax import Fp8Training, moe
from moe_jax.bench.cases import parse_case, parse_tokens
from moe_jax.bench.compiling import THREADS
from moe_jax.bench.environment import describe, has_gpu
from moe_jax.bench.inputs import make_inputs, make_weights, parse_routings, weights_shape
from moe_jax.bench.timing import call_time, kernel_times
from moe_jax.config import MoEConfig

ITERATIONS = 7
PRECISIONS = {
    "bfloat16": None,
    "fp8": Fp8Training(),
    "fp8-16-bit-weight-grad": Fp8Training(weight_grad=False),
    "fp8-tensor": Fp8Training(scaling="tensor"),
}


def functions(config: MoEConfig, implementation: str = "auto") -> dict[str, Callable[..., Any]]:
    """``forward(x, experts, logits, g)`` and ``both``, with all gradients of the output's product with g."""
    layer = functools.partial(moe, config=config, implementation=implementation)

    def both(x, experts, logits, g):
        y, pull = jax.vjp(layer, x, experts, logits)
        return y, pull(g)

    return {"forward": lambda x, experts, logits, g: layer(x, experts, logits), "both": both}


def operations(config: MoEConfig, tokens: int) -> int:
    """Of the products of both directions.

    Example:
        >>> operations(MoEConfig(8, 2, 64, 32), 10) == 18 * 10 * 2 * 64 * 32
        True
    """
    halves = 2 if config.is_gated else 1
    return 3 * 2 * tokens * config.top_k * config.hidden_size * config.intermediate_size * (halves + 1)


def shapes_of(config: MoEConfig, tokens: int) -> tuple[Any, ...]:
    """Of the operands of `functions`."""
    x = jax.ShapeDtypeStruct((tokens, config.hidden_size), config.dtype)
    return x, weights_shape(config), jax.ShapeDtypeStruct((tokens, config.num_experts), jnp.float32), x


def compile_all(jobs: list[tuple[MoEConfig, int]]) -> list[dict[str, jax.stages.Compiled]]:
    """The functions of each configuration at a number of tokens, all compiled at once."""
    with ThreadPoolExecutor(THREADS) as pool:
        running = [
            {
                name: pool.submit(lambda f, *shapes: jax.jit(f).lower(*shapes).compile(), function, *shapes_of(*job))
                for name, function in functions(job[0]).items()
            }
            for job in jobs
        ]
        return [{name: future.result() for name, future in one.items()} for one in running]


def measure(compiled: dict[str, jax.stages.Compiled], operands: tuple[Any, ...], config: MoEConfig) -> dict[str, Any]:
    """Times and bytes of each function, and the rate of both directions."""
    row: dict[str, Any] = {}
    for name, program in compiled.items():
        kernels = kernel_times(program, *operands, iterations=ITERATIONS)
        row[name] = {
            "call_us": round(call_time(lambda program=program: program(*operands)), 1),
            "kernels_total_us": round(sum(kernels.values()), 1),
            "kernels_us": {kernel: round(us, 1) for kernel, us in sorted(kernels.items(), key=lambda item: -item[1])},
            "temp_bytes": program.memory_analysis().temp_size_in_bytes,
        }
    row["both"]["tflops"] = rate(config, operands[0].shape[0], row["both"]["kernels_total_us"])
    return row


def errors(found: Any, right: Any) -> dict[str, float]:
    """Relative Frobenius errors of the output and the gradients of another precision.

    Example:
        >>> x = jnp.ones((2, 2))
        >>> errors((x, (2 * x, (x, x), x)), (x, (x, (x, x), x)))
        {'y': 0.0, 'x': 1.0, 'w13': 0.0, 'w2': 0.0, 'logits': 0.0}
    """
    names = ("y", "x", "w13", "w2", "logits")
    pairs = zip(names, jax.tree.leaves(found), jax.tree.leaves(right), strict=True)
    return {name: float(_error(a, b)) for name, a, b in pairs}


@jax.jit
def _error(found: jax.Array, right: jax.Array) -> jax.Array:
    found, right = (a.astype(jnp.float32).ravel() for a in (found, right))
    return jnp.linalg.norm(found - right) / jnp.linalg.norm(right)


def rate(config: MoEConfig, tokens: int, us: float) -> float:
    """TFLOP/s of the products of both directions."""
    return round(operations(config, tokens) / us / 1e6, 1)


def by_torch(config: MoEConfig, operands: tuple[Any, ...], dx: jax.Array) -> dict[str, Any]:
    """The same with torch operations and autograd, and how far its gradient of hidden states is from ours; or why it cannot."""
    try:
        import torch

        from moe_jax.bench.torch_layers import torch_grouped_mm

        x, experts, logits, g = operands
        given = [torch.from_dlpack(a).requires_grad_() for a in (x, logits, experts.w13, experts.w2)]
        layer, g = torch_grouped_mm(torch, config)(*given[2:]), torch.from_dlpack(g)

        def both():
            for leaf in given:
                leaf.grad = None
            layer.function(*given[:2]).backward(g)

        us = call_time(both, lambda _: torch.cuda.synchronize() if g.is_cuda else None)
        mine, other = (np.asarray(a, np.float32) for a in (dx, given[0].grad.float().cpu()))
        error = float(np.linalg.norm(mine - other) / np.linalg.norm(other))
        return {"what": layer.what, "call_us": round(us, 1), "dx_from_ours": error}
    except Exception as failure:  # ours is measured without it
        return {"reason": f"{type(failure).__name__}: {failure}"[:200]}


def main(
    case: Annotated[list[str], typer.Option(help="A name of moe-jax bench, or E,k,H,I; may be repeated.")],
    tokens: str = "16384",
    routing: str = "uniform",
    precision: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(PRECISIONS)}; may be repeated, gradients are compared with the first."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="A JSON file to write.")] = None,
    commit: Annotated[str | None, typer.Option(help="Of the source, where git does not know it.")] = None,
    dry: Annotated[bool, typer.Option("--dry", help="Only lower for CUDA; needs no GPU.")] = False,
) -> None:
    precisions = precision or ["bfloat16"]
    if unknown := [name for name in precisions if name not in PRECISIONS]:
        raise typer.BadParameter(f"precision {unknown[0]!r} must be one of {', '.join(PRECISIONS)}")
    counts, routings = parse_tokens(tokens), parse_routings(routing)
    cells = list(itertools.product(case, counts, precisions))
    configs = {
        (name, precision): dataclasses.replace(parse_case(name).config("bfloat16"), fp8_training=PRECISIONS[precision])
        for name, precision in itertools.product(case, precisions)
    }
    if dry:
        for name, count, precision in cells:
            config = configs[name, precision]
            both = jax.jit(functions(config, "mosaic")["both"]).trace(*shapes_of(config, count))
            text = both.lower(lowering_platforms=("cuda",)).as_text()
            print(f"{name} {count} {precision}: {text.count('custom_call @mosaic_gpu')} Mosaic kernels", flush=True)
        return
    if not has_gpu():
        raise typer.BadParameter(
            "JAX sees no GPU here, and there is nothing to time without one; --dry lowers for CUDA"
        )
    result = describe(commit, {"torch"}) | {"rows": []}
    jobs = [(configs[name, precision], count) for name, count, precision in cells]
    compiled = dict(zip(cells, compile_all(jobs), strict=True))
    for name in case:
        config = configs[name, precisions[0]]
        experts = jax.block_until_ready(make_weights(config, jax.random.key(0)))
        for count, one in itertools.product(counts, routings):
            x, logits = make_inputs(config, count, one)
            operands = x, experts, logits, jax.random.normal(jax.random.key(0), x.shape, x.dtype)
            first = None
            for precision in precisions:
                row = {"case": name, "dtype": config.dtype, "precision": precision, "tokens": count, "routing": one}
                programs = compiled[name, count, precision]
                row |= measure(programs, operands, config)
                found = programs["both"](*operands)
                if first is None:
                    first = found
                    row["torch"] = by_torch(config, operands, found[1][0])
                    if "call_us" in row["torch"]:
                        row["torch"]["tflops"] = rate(config, count, row["torch"]["call_us"])
                else:
                    row["errors"] = errors(found, first)
                result["rows"].append(row)
                print(json.dumps(row), flush=True)
                if output is not None:
                    output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
