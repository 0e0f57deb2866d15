"""Times the kernel of weight gradients under changes of its configuration, side by side on one GPU.

python benchmarks/weight_grad.py --cell qwen3-30b-a3b:16384:even,uniform,zipf --change stages=4,buffers=2 --change band=4
python benchmarks/weight_grad.py --cell 8,2,4096,14336:8192 --accumulate --change buffers=2
python benchmarks/weight_grad.py --cell gpt-oss-120b:8192 --change tile_n=192 --dry

A cell has two products: the gradient of the up-projection, ``[E, 2I, H]``, and that of the down-projection, ``[E, H, I]``. Every
output is compared with float32 products of a few experts, and bit for bit with that of the rule. The variants are timed by CUPTI
in turns, forwards and backwards: a clock that sinks meets all of them. `torch._grouped_mm` is among them where there is torch.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import typer
from jax import lax

from moe_jax.bench.cases import parse_case
from moe_jax.bench.inputs import expert_loads, make_logits, parse_routings
from moe_jax.bench.timing import kernel_times
from moe_jax.kernels.hopper import weight_grad as kernel

RULE = "rule"
EVEN = "even"  # the same number of rows for every expert, a multiple of 8 if the tokens are
CHECKED_EXPERTS = 4


class Product(NamedTuple):
    """A gradient ``[E, m, n]`` of so many rows, under some routings."""

    name: str
    config: Any
    tokens: int
    routings: tuple[str, ...]
    m: int
    n: int

    def sizes(self, routing: str) -> np.ndarray:
        """Rows of each expert."""
        pairs = self.tokens * self.config.top_k
        if routing == EVEN:
            return np.full(self.config.num_experts, pairs // self.config.num_experts)
        return expert_loads(self.config, make_logits(self.config, self.tokens, routing))


def parse_cell(text: str) -> list[Product]:
    """The products of ``case:tokens[:routings]``.

    Example:
        >>> [(p.name, p.m, p.n, p.routings) for p in parse_cell("8,2,256,128:64:even,zipf")]
        [('E8-k2-H256-I128 up', 256, 256, ('even', 'zipf')), ('E8-k2-H256-I128 down', 256, 128, ('even', 'zipf'))]
    """
    case, tokens, *routings = text.split(":")
    case = parse_case(case)
    names = tuple(routings[0].split(",")) if routings else ("uniform",)
    parse_routings(",".join(["uniform", *(name for name in names if name != EVEN)]))
    hidden, inner = case.hidden_size, case.intermediate_size
    sides = (("up", 2 * inner, hidden), ("down", hidden, inner))
    return [Product(f"{case.name} {s}", case.config("bfloat16"), int(tokens), names, m, n) for s, m, n in sides]


def changed(config: kernel.Config, change: str) -> kernel.Config:
    """The configuration with ``field=value`` changed, several separated by commas.

    Example:
        >>> changed(kernel.Config(), "stages=4,buffers=2").stages
        4
    """
    if change == RULE:
        return config
    fields = dict(part.split("=") for part in change.split(","))
    return dataclasses.replace(config, **{name: type(getattr(config, name))(int(v)) for name, v in fields.items()})


def lowered(product: Product, config: kernel.Config, out_dtype: str, accumulate: bool, dry: bool) -> Any:
    """The kernel of a product, lowered for the GPU at hand, or for CUDA."""
    experts, rows = product.config.num_experts, product.tokens * product.config.top_k
    operands = [jax.ShapeDtypeStruct((rows + -rows % kernel.ALIGNED_ROWS, c), "bfloat16") for c in product[-2:]]
    operands += [jax.ShapeDtypeStruct((experts,), "int32")] * 2
    operands += [jax.ShapeDtypeStruct((experts, product.m, product.n), "float32") if accumulate else None]
    run = jax.jit(functools.partial(kernel.weight_grad, out_dtype=out_dtype, config=config))
    return run.trace(*operands).lower(**({"lowering_platforms": ("cuda",)} if dry else {}))


def operands_of(product: Product, sizes: np.ndarray, accumulate: bool) -> list[Any]:
    """Random rows, of which those of no group are NaN, the groups, and sums of earlier gradients or None."""
    rows = product.tokens * product.config.top_k
    rows += -rows % kernel.ALIGNED_ROWS

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def random(key, columns, scale):
        values = jax.random.normal(jax.random.key(key), (rows, columns), jnp.bfloat16) * scale
        return jnp.where((jnp.arange(rows) < sizes.sum())[:, None], values, jnp.nan).astype(jnp.bfloat16)

    groups = [jnp.asarray(a, jnp.int32) for a in (np.cumsum(sizes) - sizes, sizes)]
    shape = (len(sizes), product.m, product.n)
    sums = jax.jit(lambda: jax.random.normal(jax.random.key(3), shape))() if accumulate else None
    return [random(1, product.m, 1.0), random(2, product.n, 1.0), *groups, sums]


def error_of(out: jax.Array, operands: list[Any]) -> float:
    """Relative Frobenius error of a few experts against float32 products, the largest and the smallest among them."""
    left, right, starts, sizes, sums = operands
    order = np.argsort(np.asarray(sizes))
    chosen = order[np.linspace(0, len(order) - 1, CHECKED_EXPERTS).astype(int)]
    wrong = size = 0.0
    for expert in chosen:
        rows = slice(int(starts[expert]), int(starts[expert] + sizes[expert]))
        a, b = (side[rows].astype(jnp.float32) for side in (left, right))
        exact = lax.dot_general(a, b, (((0,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)
        exact = exact if sums is None else exact + sums[expert]
        wrong += float(jnp.sum((out[expert].astype(jnp.float32) - exact) ** 2))
        size += float(jnp.sum(exact**2))
    return (wrong / size) ** 0.5 if size else float(wrong > 0)


def kernel_time(run: Callable[..., Any], operands: list[Any]) -> float:
    """Microseconds of the kernel."""
    return sum(kernel_times(run, *operands, iterations=7).values())


def torch_call(operands: list[Any]) -> Callable[[], float] | None:
    """Microseconds a call of torch's grouped product, as a function; None without torch, or where it has none."""
    try:
        import torch

        left, right = (torch.from_dlpack(side) for side in operands[:2])
        ends = torch.from_dlpack(operands[2] + operands[3])
        rows = int(ends[-1])
        left, right = left[:rows].t(), right[:rows]
        torch._grouped_mm(left, right, offs=ends)
    except (ImportError, AttributeError, RuntimeError) as error:
        print(f"torch: {type(error).__name__}: {error}"[:200], flush=True)
        return None

    def call() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch._grouped_mm(left, right, offs=ends)
        begin.record()
        for _ in range(10):
            torch._grouped_mm(left, right, offs=ends)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 100

    return call


def measure(product: Product, variants: dict[str, Any], turns: int, accumulate: bool, peers: bool) -> None:
    """Prints a line for each routing and variant."""
    for routing in product.routings:
        sizes = product.sizes(routing)
        operands = jax.block_until_ready(operands_of(product, sizes, accumulate))
        right, found = variants[RULE](*operands), {}
        for name, run in variants.items():
            out = run(*operands)
            found[name] = f"error {error_of(out, operands):.1e}"
            if not bool(jnp.array_equal(out, right)):
                found[name] += ", ANOTHER OUTPUT"
            del out
        del right
        calls: dict[str, Callable[[], float]] = {
            name: functools.partial(kernel_time, run, operands) for name, run in variants.items()
        }
        by_torch = torch_call(operands) if peers else None
        calls |= {"torch._grouped_mm, by events": by_torch} if by_torch else {}
        times: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(turns):
            for name in list(calls)[:: -1 if turn % 2 else 1]:
                times[name].append(calls[name]())
        for name, all_us in times.items():
            us = float(np.median(all_us))
            rate = 2 * int(sizes.sum()) * product.m * product.n / us / 1e6
            each = " ".join(f"{time:.1f}" for time in all_us)
            print(
                f"{product.name} {product.tokens} {routing} [{product.m}, {product.n}] {name}: {rate:.0f} TFLOP/s, "
                f"{us:.1f} us ({each}) {found.get(name, '')}",
                flush=True,
            )


def main(
    cell: Annotated[list[str], typer.Option(help="case:tokens[:routings], even among them; may be repeated.")],
    change: Annotated[list[str] | None, typer.Option(help="field=value,... of the rule; may be repeated.")] = None,
    out_dtype: Annotated[
        str, typer.Option(help="bfloat16, float16 or float32; float32 with --accumulate.")
    ] = "bfloat16",
    accumulate: Annotated[bool, typer.Option("--accumulate", help="Onto sums of earlier gradients.")] = False,
    turns: int = 3,
    peers: Annotated[bool, typer.Option(help="Time torch, where it is installed.")] = True,
    dry: Annotated[bool, typer.Option("--dry", help="Only lower for CUDA; needs no GPU.")] = False,
) -> None:
    out_dtype = "float32" if accumulate else out_dtype
    products = [product for text in cell for product in parse_cell(text)]
    jobs: dict[tuple[Product, str], Any] = {}
    for product, name in itertools.product(products, [RULE, *(change or [])]):
        config = changed(kernel.default_config(product.m, product.n), name)
        reason = kernel.config_misfit(config)
        print(f"{product.name} [{product.m}, {product.n}] {name}: {reason or config}", flush=True)
        if reason is None:
            jobs[product, name] = lowered(product, config, out_dtype, accumulate, dry)
    if dry:
        return
    with ThreadPoolExecutor(16) as pool:
        compiled = dict(zip(jobs, pool.map(lambda job: job.compile(), jobs.values()), strict=True))
    for product in products:
        variants = {name: run for (other, name), run in compiled.items() if other is product}
        measure(product, variants, turns, accumulate, peers and not accumulate)


if __name__ == "__main__":
    typer.run(main)
