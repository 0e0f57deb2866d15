"""Times the exchange of tokens between GPUs: our kernel beside XLA's collectives, there and back.

python benchmarks/exchange.py --tokens 128,4096 --dtype bfloat16,float8_e4m3fn --output benchmarks/results/NAME.json

Every rank has as many tokens; their experts are spread evenly over the ranks. A token goes once to each rank that has one of its
experts. Times are those of kernels by CUPTI, and of several exchanges one behind the other in one jit, an exchange each.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from jax import lax
from jax.sharding import NamedSharding

from moe_jax import MoEConfig, _compat, moe
from moe_jax.bench.environment import describe
from moe_jax.bench.inputs import in_format, make_inputs, make_weights
from moe_jax.bench.timing import call_time
from moe_jax.ops.combine import combine
from moe_jax.ops.exchange import send_rows
from moe_jax.parallel import ParallelConfig
from moe_jax.parallel.all_to_all import AllToAll
from moe_jax.parallel.gather_scatter import AllGatherReduceScatter
from moe_jax.parallel.peer import PeerExchange
from moe_jax.parallel.sharded import moe_parallel

AXIS, CHAIN, LAYERS = "ep", 8, 4
SPEC = jax.sharding.PartitionSpec(AXIS)


def places(ids: Any, experts: int) -> tuple[Any, Any]:
    """Whether each token goes to each rank, and where it goes there: destinations for `send_rows` with rows for all tokens."""
    tokens, ranks, me = ids.shape[0], lax.axis_size(AXIS), lax.axis_index(AXIS)
    sends = (ids[:, :, None] // (experts // ranks) == jnp.arange(ranks)).any(axis=1)
    rows = ranks * tokens
    return sends, jnp.where(sends, jnp.arange(ranks) * rows + me * tokens + jnp.arange(tokens)[:, None], -1)


def backwards(ids: Any, experts: int) -> Any:
    """The way back of the rows that all ranks sent here, whose ids these are ``[ranks, T, k]``."""
    ranks, tokens, _ = ids.shape
    me = lax.axis_index(AXIS)
    here = (ids // (experts // ranks) == me).any(axis=2)
    rows = jnp.arange(ranks)[:, None] * (ranks * tokens) + me * tokens + jnp.arange(tokens)
    return jnp.where(here, rows, -1).reshape(-1, 1)


def dispatch_peer(x: Any, ids: Any, experts: int, implementation: str = "mosaic") -> tuple[Any, Any]:
    """Rows at their own place in the block of their rank, and all ids."""
    _, destinations = places(ids, experts)
    options = {"num_rows": lax.axis_size(AXIS) * x.shape[0], "axis_names": (AXIS,), "implementation": implementation}
    (rows,), notes = send_rows([x], destinations, notes=ids, **options)
    return rows, notes


def combine_peer(y: Any, ids: Any, all_ids: Any, experts: int, implementation: str = "mosaic") -> Any:
    """The sum of what the ranks of a token's experts send back."""
    sends, _ = places(ids, experts)
    tokens, ranks = sends.shape
    back, options = backwards(all_ids, experts), {"axis_names": (AXIS,), "implementation": implementation}
    (rows,), _ = send_rows([y], back, num_rows=y.shape[0], **options)
    positions = jnp.where(sends, jnp.arange(ranks) * tokens + jnp.arange(tokens)[:, None], -1)
    return combine(rows, positions, None, implementation=implementation)


def dispatch_gather(x: Any, ids: Any, experts: int) -> tuple[Any, Any]:
    """All tokens everywhere."""
    del experts
    return lax.all_gather(x, AXIS, tiled=True), lax.all_gather(ids, AXIS)


def combine_scatter(y: Any, ids: Any, all_ids: Any, experts: int) -> Any:
    """The sum over all ranks."""
    del ids, all_ids, experts
    return lax.psum_scatter(y, AXIS, tiled=True)


def dispatch_ragged(x: Any, ids: Any, experts: int) -> tuple[Any, Any]:
    """The rows of each rank behind each other; where they begin in a rank's block is that of a full block."""
    sends, _ = places(ids, experts)
    tokens, ranks = sends.shape
    order = jnp.argsort(~sends, axis=0, stable=True)
    sizes = sends.sum(axis=0, dtype=jnp.int32)
    codes = lax.bitcast_convert_type(x, jnp.uint8) if x.dtype.itemsize == 1 else x
    rows = codes[order.T.reshape(-1)]  # blocks of all tokens, their first ones sent
    offsets = jnp.arange(ranks, dtype=jnp.int32) * tokens
    there = jnp.full(ranks, lax.axis_index(AXIS) * tokens, jnp.int32)
    received = lax.all_to_all(sizes, AXIS, 0, 0, tiled=True)
    out = jnp.zeros((ranks * tokens, x.shape[1]), codes.dtype)
    return lax.ragged_all_to_all(rows, out, offsets, sizes, there, received, axis_name=AXIS), lax.all_gather(ids, AXIS)


def run_chain(way: Callable[..., Any], mesh: Any, *operands: Any) -> Any:
    """Several exchanges in one jit, one after the other."""

    def chain(*operands):
        results = []
        for _ in range(CHAIN):
            results.append(way(*operands))
            operands, _ = lax.optimization_barrier((operands, results[-1]))  # else equal exchanges would be one
        return results

    return jax.jit(jax.shard_map(chain, mesh=mesh, in_specs=SPEC, out_specs=SPEC, check_vma=False))


def measure(name: str, way: Callable[..., Any], mesh: Any, *operands: Any) -> dict[str, Any]:
    """Median microseconds of each kernel of an exchange on a rank, waiting included, and those of an exchange in the chain."""
    function = run_chain(way, mesh, *operands)
    times: dict[str, list[float]] = collections.defaultdict(list)
    runs = _compat.measure_kernels(function, *operands)
    for kernel, milliseconds in itertools.chain(*runs):
        times[kernel.removesuffix("_mosaic_gpu_kernel")[:80]].append(milliseconds * 1e3)
    exchanges = len(runs) * CHAIN * mesh.size
    return {
        "name": name,
        "kernels_us": {
            kernel: round(statistics.median(found) * len(found) / exchanges, 2) for kernel, found in times.items()
        },
        "us": round(call_time(lambda: function(*operands)) / CHAIN, 1),
    }


def layers(mesh: Any, config: MoEConfig, tokens: int, wanted: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """A layer with each exchange, and beside it one rank's experts alone on one GPU, with as many rows as a rank has."""
    parallel = ParallelConfig(dp_size=mesh.size, dp_axis=AXIS, enable_expert_parallel=True)
    local = dataclasses.replace(config, num_experts=config.num_experts // mesh.size)

    def of_rank():
        return in_format(make_weights(local, jax.random.key(lax.axis_index(AXIS))), local)

    experts = jax.jit(jax.shard_map(of_rank, mesh=mesh, in_specs=(), out_specs=SPEC, check_vma=False))()
    alone = jax.jit(lambda: in_format(make_weights(local, jax.random.key(0)), local))()
    x, logits = (jax.device_put(array, NamedSharding(mesh, SPEC)) for array in make_inputs(config, tokens * mesh.size))

    def chain(layer, x, experts, logits):
        for _ in range(LAYERS):
            x = layer(x, experts, logits)
        return x

    def timed(name, layer, *operands):
        function = jax.jit(functools.partial(chain, layer))
        kernels, runs = collections.Counter(), _compat.measure_kernels(function, *operands, iterations=5)
        for kernel, milliseconds in itertools.chain(*runs):
            kernels[kernel.removesuffix("_mosaic_gpu_kernel")[:60]] += milliseconds * 1e3
        ranks = len(operands[0].sharding.device_set)
        return {
            "name": name,
            "tokens": tokens,
            "kernels_us": {name: round(us / len(runs) / LAYERS / ranks, 1) for name, us in kernels.most_common(12)},
            "us": round(call_time(lambda: function(*operands)) / LAYERS, 1),
        }

    inputs = make_inputs(local, tokens)
    yield timed("layer, one GPU", lambda *operands: moe(*operands, local), inputs[0], alone, inputs[1])
    exchanges = {
        "peer": PeerExchange(),
        "peer, codes": PeerExchange(quantize_before=True),
        "all_gather": AllGatherReduceScatter(),
        "all_gather, codes": AllGatherReduceScatter(quantize_before=True),
        "ragged_all_to_all": AllToAll(),
    }
    for (name, exchange), chunks in itertools.product(exchanges.items(), (1, 2)):
        if name.split(",")[0] not in wanted:
            continue
        name = name if chunks == 1 else f"{name}, {chunks} chunks"
        options = {"parallel": parallel, "exchange": exchange, "chunks": chunks}
        layer = functools.partial(moe_parallel, config=config, **options)
        sharded = jax.shard_map(layer, mesh=mesh, in_specs=SPEC, out_specs=SPEC, check_vma=False)
        try:
            yield timed(f"layer, {name}", sharded, x, experts, logits)
        except Exception as failure:
            yield {"name": f"layer, {name}", "tokens": tokens, "failed": f"{type(failure).__name__}: {failure}"[:500]}


def check(mesh: Any, x: Any, ids: Any, experts: int, iterations: int) -> int:
    """How many of some exchanges differ from the plain form in a bit; routings are new, skewed, without tokens on one rank."""

    def both(x, ids):
        found = []
        for implementation in ("mosaic", "xla"):
            rows, all_ids = dispatch_peer(x, ids, experts, implementation)
            mask = backwards(all_ids, experts) >= 0
            y = jnp.where(mask, rows, 0)
            found.append((y, all_ids, combine_peer(y, ids, all_ids, experts, implementation)))
        same = jnp.array([(a == b).all() for a, b in zip(*found, strict=True)]).all()
        return same[None]

    function = jax.jit(jax.shard_map(both, mesh=mesh, in_specs=SPEC, out_specs=SPEC, check_vma=False))
    random, wrong = np.random.default_rng(0), 0
    for i in range(iterations):
        new = random.integers(0, experts, ids.shape)
        new = new if i % 3 else np.where(random.random(ids.shape) < 0.9, 1, new)  # skewed
        new = new.astype(np.int32)
        new[: ids.shape[0] // mesh.size] = (
            -1 if i % 5 == 0 else new[: ids.shape[0] // mesh.size]
        )  # the first rank has none
        wrong += not bool(np.asarray(function(x, jax.device_put(new, ids.sharding))).all())
    return wrong


def exchanges(
    mesh: Any, tokens: int, kind: str, shape: tuple[int, int, int], wanted: tuple[str, ...]
) -> Iterator[dict[str, Any]]:
    """The ways there and back of so many tokens a rank; back go rows of 16 bits alone."""
    experts, top_k, hidden = shape
    sharding, ranks = NamedSharding(mesh, SPEC), mesh.size
    ids = random_ids(mesh, tokens, experts, top_k)
    sent = np.asarray((np.asarray(ids)[:, :, None] // (experts // ranks) == np.arange(ranks)).any(axis=1))
    owner = np.repeat(np.arange(ranks), tokens)
    remote = sum((sent[:, rank] & (owner != rank)).sum() for rank in range(ranks)) / ranks  # rows of a rank

    def random(rows: int, dtype: str) -> jax.Array:
        values = jax.random.normal(jax.random.key(0), (rows * ranks, hidden), jnp.bfloat16)
        return jax.device_put(values.astype(dtype), sharding)

    x, y = random(tokens, kind), random(tokens * ranks, "bfloat16")
    gather = jax.shard_map(lambda i: lax.all_gather(i, AXIS), mesh=mesh, in_specs=SPEC, out_specs=SPEC)
    all_ids = jax.jit(gather)(ids)
    there = {"peer": dispatch_peer, "all_gather": dispatch_gather, "ragged_all_to_all": dispatch_ragged}
    back = {"peer": combine_peer, "all_gather": combine_scatter} if kind == "bfloat16" else {}
    for direction, ways, operands in (("dispatch", there, (x, ids)), ("combine", back, (y, ids, all_ids))):
        for name, way in ways.items():
            if name not in wanted:
                continue
            row: dict[str, Any] = {"tokens": tokens, "dtype": kind}
            try:
                row |= measure(f"{direction}, {name}", functools.partial(way, experts=experts), mesh, *operands)
                kernel = row["kernels_us"].get("send_rows")
                size = remote * hidden * operands[0].dtype.itemsize
                row["remote_gb_per_s"] = None if not kernel else round(size / kernel / 1e3, 1)
            except Exception as failure:
                row |= {"name": f"{direction}, {name}", "failed": f"{type(failure).__name__}: {failure}"[:300]}
            yield row


def random_ids(mesh: Any, tokens: int, experts: int, top_k: int) -> jax.Array:
    """Experts of all tokens, evenly spread."""
    order = np.random.default_rng(1).random((tokens * mesh.size, experts)).argsort(axis=1)[:, :top_k]
    return jax.device_put(order.astype(np.int32), NamedSharding(mesh, SPEC))


def main(
    tokens: str = "128,4096",
    dtype: str = "bfloat16,float8_e4m3fn",
    hidden: int = 7168,
    experts: int = 256,
    top_k: int = 8,
    intermediate: int = 2048,
    ways: str = "peer,all_gather,ragged_all_to_all",
    layer: Annotated[str, typer.Option(help="The number format of whole layers; empty for none.")] = "fp8_block",
    iterations: Annotated[int, typer.Option(help="Checked exchanges with changing routing.")] = 1000,
    output: Annotated[Path | None, typer.Option(help="A JSON file to write, row by row.")] = None,
    commit: Annotated[str | None, typer.Option(help="Of the source, where git does not know it.")] = None,
) -> None:
    mesh = jax.sharding.Mesh(np.array(jax.devices()), (AXIS,))
    result: dict[str, Any] = describe(commit, set()) | {"ranks": mesh.size, "hidden": hidden, "rows": []}
    if iterations:
        small = jax.random.normal(jax.random.key(0), (64 * mesh.size, hidden), jnp.bfloat16)
        ids = random_ids(mesh, 64, experts, top_k)
        wrong = check(mesh, jax.device_put(small, ids.sharding), ids, experts, iterations)
        result["checked"] = {"iterations": iterations, "wrong": wrong}
        print(result["checked"], flush=True)
    counts, wanted = [int(count) for count in tokens.split(",")], tuple(ways.split(","))
    sources = [
        exchanges(mesh, count, kind, (experts, top_k, hidden), wanted)
        for count in counts
        for kind in dtype.split(",")
        if kind
    ]
    if layer:
        config = MoEConfig(experts, top_k, hidden, intermediate, quantization=layer)
        sources += [layers(mesh, config, count, wanted) for count in reversed(counts)]
    for row in itertools.chain(*sources):
        result["rows"].append(row)
        print(json.dumps(row), flush=True)
        if output is not None:
            output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
