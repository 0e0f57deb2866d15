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
from collections.abc import Callable
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


def layers(mesh: Any, config: MoEConfig, tokens: int) -> list[dict[str, Any]]:
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

    rows = [
        timed(
            "layer, one GPU",
            lambda *a: moe(*a, local),
            *make_inputs(local, tokens)[:1],
            alone,
            make_inputs(local, tokens)[1],
        )
    ]
    exchanges = {
        "PeerExchange": PeerExchange(),
        "PeerExchange, codes": PeerExchange(quantize_before=True),
        "AllGatherReduceScatter": AllGatherReduceScatter(),
        "AllGatherReduceScatter, codes": AllGatherReduceScatter(quantize_before=True),
        "AllToAll": AllToAll(),
    }
    for name, exchange in exchanges.items():
        layer = functools.partial(moe_parallel, config=config, parallel=parallel, exchange=exchange)
        sharded = jax.shard_map(layer, mesh=mesh, in_specs=SPEC, out_specs=SPEC, check_vma=False)
        try:
            rows.append(timed(f"layer, {name}", sharded, x, experts, logits))
        except Exception as failure:
            rows.append(
                {"name": f"layer, {name}", "tokens": tokens, "failed": f"{type(failure).__name__}: {failure}"[:500]}
            )
        print(json.dumps(rows[-1]), flush=True)
    print(json.dumps(rows[0]), flush=True)
    return rows


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


def main(
    tokens: str = "128,4096",
    dtype: str = "bfloat16,float8_e4m3fn",
    hidden: int = 7168,
    experts: int = 256,
    top_k: int = 8,
    intermediate: int = 2048,
    layer: Annotated[str, typer.Option(help="The number format of whole layers; empty for none.")] = "fp8_block",
    iterations: Annotated[int, typer.Option(help="Checked exchanges with changing routing.")] = 1000,
    output: Annotated[Path | None, typer.Option(help="A JSON file to write.")] = None,
    commit: Annotated[str | None, typer.Option(help="Of the source, where git does not know it.")] = None,
) -> None:
    mesh = jax.sharding.Mesh(np.array(jax.devices()), (AXIS,))
    sharding = jax.sharding.NamedSharding(mesh, SPEC)
    result: dict[str, Any] = describe(commit, set()) | {"ranks": mesh.size, "hidden": hidden, "rows": []}

    def random(shape, kind):
        values = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16).astype(kind)
        return jax.device_put(values, sharding)

    def random_ids(count):
        order = np.random.default_rng(1).random((count * mesh.size, experts)).argsort(axis=1)[:, :top_k]
        return jax.device_put(order.astype(np.int32), sharding)

    small = random((64 * mesh.size, hidden), "bfloat16"), random_ids(64)
    result["checked"] = {"iterations": iterations, "wrong": check(mesh, *small, experts, iterations)}
    print(result["checked"], flush=True)
    for count in map(int, tokens.split(",")):
        ids = random_ids(count)
        sent = np.asarray((np.asarray(ids)[:, :, None] // (experts // mesh.size) == np.arange(mesh.size)).any(axis=1))
        owner = np.repeat(np.arange(mesh.size), count)
        remote = sum((sent[:, rank] & (owner != rank)).sum() for rank in range(mesh.size)) / mesh.size  # rows of a rank
        for kind in dtype.split(","):
            x, y = (
                random((count * mesh.size, hidden), kind),
                random((mesh.size * count * mesh.size, hidden), "bfloat16"),
            )
            all_ids = jax.jit(
                jax.shard_map(lambda i: lax.all_gather(i, AXIS), mesh=mesh, in_specs=SPEC, out_specs=SPEC)
            )(ids)
            ways = {
                "dispatch": (functools.partial(dispatch_peer, experts=experts), x, ids),
                "dispatch, all_gather": (functools.partial(dispatch_gather, experts=experts), x, ids),
                "dispatch, ragged_all_to_all": (functools.partial(dispatch_ragged, experts=experts), x, ids),
            }
            if kind == "bfloat16":
                ways |= {
                    "combine": (functools.partial(combine_peer, experts=experts), y, ids, all_ids),
                    "combine, psum_scatter": (functools.partial(combine_scatter, experts=experts), y, ids, all_ids),
                }
            for name, (way, *operands) in ways.items():
                row = {"tokens": count, "dtype": kind}
                try:
                    row |= measure(name, way, mesh, *operands)
                    bytes_sent = remote * hidden * (2 if "combine" in name else jnp.dtype(kind).itemsize)
                    kernel = row["kernels_us"].get("send_rows")
                    row["remote_gb_per_s"] = None if not kernel else round(bytes_sent / kernel / 1e3, 1)
                except Exception as failure:
                    row |= {"name": name, "failed": f"{type(failure).__name__}: {failure}"[:300]}
                result["rows"].append(row)
                print(json.dumps(row), flush=True)
    if layer:
        config = MoEConfig(experts, top_k, hidden, intermediate, quantization=layer)
        for count in map(int, tokens.split(",")):
            result["rows"] += layers(mesh, config, count)
    if output is not None:
        output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
