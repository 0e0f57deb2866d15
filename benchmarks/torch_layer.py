"""Times the layer as torch users run it on a GPU, eager and in a CUDA graph, beside JAX's kernels and vLLM's layer in a graph.

python benchmarks/torch_layer.py --case qwen3-30b-a3b --tokens 1,16,128,1024 --output benchmarks/results/NAME.json

Every layer reads the same weights. Times of graphs are of one of several layers, one behind the other, as in `moe-jax bench`. The
host's time is that of a call which only queues its kernels, and beside it that of a torch addition, the measure of the machine.
"""

from __future__ import annotations

import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import typer

from moe_jax import moe
from moe_jax.bench.cases import parse_case, parse_tokens
from moe_jax.bench.compiling import Job, Layer, compile_all, layers_a_call, stack_logits
from moe_jax.bench.environment import describe, has_gpu
from moe_jax.bench.inputs import make_inputs, make_weights, weights_shape
from moe_jax.bench.peers import PACKAGES, TorchPeer, prepare, short
from moe_jax.bench.timing import call_time, kernel_times
from moe_jax.bench.torch_layers import TORCH_LAYERS, TorchLayer
from moe_jax.config import MoEConfig

OURS, HOST_CALLS, HOST_ROUNDS = "moe_jax_torch", 20, 21


def launched(torch: Any, config: MoEConfig) -> Callable[[Any, Any], TorchLayer]:
    """Our module as a peer: it raises where its kernels cannot be launched on torch's stream."""
    from moe_jax_torch import FusedMoE, set_launch

    set_launch("always")

    def place(w13: Any, w2: Any) -> TorchLayer:
        sizes = config.num_experts, config.top_k, config.hidden_size, config.intermediate_size
        layer = FusedMoE(*sizes, device="meta", dtype=w13.dtype)
        layer.w13_weight, layer.w2_weight = (torch.nn.Parameter(w, requires_grad=False) for w in (w13, w2))
        return TorchLayer(layer.forward, "moe_jax_torch.FusedMoE")

    return place


def host_us(torch: Any, call: Callable[[], Any]) -> float:
    """Median microseconds that a call keeps the host, with a queue that has room."""
    rounds = []
    for _ in range(HOST_ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(HOST_CALLS):
            call()
        rounds.append((time.perf_counter() - start) / HOST_CALLS * 1e6)
    torch.cuda.synchronize()
    return round(statistics.median(rounds), 1)


def measure(config: MoEConfig, tokens: int, ours: Layer, peers: dict[str, Any], weights: Any) -> dict[str, Any]:
    """The row of a number of tokens."""
    import torch

    x, logits = make_inputs(config, tokens)
    operands = x, weights, stack_logits(logits)
    stack, calls = ours.stack_at(tokens), layers_a_call(tokens)
    expected = np.asarray(stack(*operands)[0].astype("float32"))
    kernels = kernel_times(stack, *operands, layers=calls)
    row: dict[str, Any] = {
        "tokens": tokens,
        "jax_layer_us": round(call_time(lambda: stack(*operands)) / calls, 1),
        "jax_kernels_us": {name: round(us, 2) for name, us in kernels.items()},
        "jax_kernels_total_us": round(sum(kernels.values()), 1),
    }
    for name, bind in peers.items():
        row[name] = {"reason": bind} if isinstance(bind, str) else measure_peer(bind, x, logits, expected)
    tensors = torch.from_dlpack(x), torch.from_dlpack(logits)
    layer = launched(torch, config)(*(torch.from_dlpack(w) for w in (weights.w13, weights.w2))).function
    with torch.no_grad():
        row[OURS]["eager_host_us"] = host_us(torch, lambda: layer(*tensors))
        row["torch_add_host_us"] = host_us(torch, lambda: tensors[0] + tensors[0])
    return row


def measure_peer(bind: Any, x: jax.Array, logits: jax.Array, expected: np.ndarray) -> dict[str, Any]:
    """Time and error of a layer in a CUDA graph; the reason where it fails."""
    try:
        bound = bind(x, logits)
        output = np.asarray(bound.rows(bound.wait(bound.call()), np.arange(x.shape[0])))
        return {
            "what": bound.what,
            "layer_us": round(call_time(bound.call, bound.wait) / bound.layers, 1),
            "bits_of_jax": bool((output == expected).all()),
            "from_jax": float(np.linalg.norm(output - expected) / np.linalg.norm(expected)),
        }
    except Exception as failure:  # the others can be measured without
        return {"reason": short(failure)}


def peer_of(name: str, config: MoEConfig, weights: Any) -> Any:
    """The layer with its weights in place, or the reason why it cannot run."""
    try:
        return prepare(name, TorchPeer(name, config), weights)
    except Exception as failure:
        return short(failure)


def main(
    case: Annotated[str, typer.Option(help="A name of moe-jax bench, or E,k,H,I.")] = "qwen3-30b-a3b",
    tokens: str = "1,16,128,1024",
    compare: Annotated[str, typer.Option(help="Peers under torch, as in moe-jax bench.")] = "vllm",
    output: Annotated[Path | None, typer.Option(help="A JSON file to write.")] = None,
    commit: Annotated[str | None, typer.Option(help="Of the source, where git does not know it.")] = None,
) -> None:
    if not has_gpu():
        raise typer.BadParameter("JAX sees no GPU here, and there is nothing to time without one")
    config, counts = parse_case(case).config("bfloat16"), parse_tokens(tokens)
    TORCH_LAYERS[OURS] = launched
    names = [OURS, *(name.strip() for name in compare.split(",") if name.strip())]
    layer = Layer(functools.partial(moe, config=config))
    compile_all([Job(layer, config, weights_shape(config), count) for count in counts])
    weights = jax.block_until_ready(make_weights(config, jax.random.key(0)))
    peers = {name: peer_of(name, config, weights) for name in names}
    result = describe(commit, {PACKAGES[name] for name in names[1:]} | {"torch"}) | {"case": case, "rows": []}
    for count in counts:
        result["rows"].append(measure(config, count, layer, peers, weights))
        print(json.dumps(result["rows"][-1]), flush=True)
        if output is not None:
            output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
