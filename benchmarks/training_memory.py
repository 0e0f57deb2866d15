"""Bytes a token that a layer keeps for its gradient: hidden states, pre-activations, routing, and nothing else.

python benchmarks/training_memory.py [--output RESULT.json]

They are the arrays that `jax.vjp` of the layer of the GPU holds on to, without the weights. Needs no GPU and computes nothing.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer

from moe_jax import moe
from moe_jax.bench.cases import parse_case
from moe_jax.bench.environment import describe
from moe_jax.bench.inputs import weights_shape
from moe_jax.config import MoEConfig

CASES = ("mixtral-8x7b", "qwen3-30b-a3b", "qwen3-235b", "dsv3-ep8", "gpt-oss-120b")


def kept_bytes(config: MoEConfig, tokens: int) -> dict[str, float]:
    """Bytes a token of what the gradient keeps, by name.

    ``rows`` is what a layer would keep besides, if it kept gathered hidden states and outputs of experts: two arrays of all rows.

    Example:
        >>> kept = kept_bytes(MoEConfig(8, 2, 128, 64), 1024)
        >>> kept["x"], kept["pre_activation"], kept["other"], kept["rows"]
        (256.0, 512.0, 0.0, 1024.0)
    """
    x = jax.ShapeDtypeStruct((tokens, config.hidden_size), config.dtype)
    experts, logits = weights_shape(config), jax.ShapeDtypeStruct((tokens, config.num_experts), jnp.float32)
    layer = functools.partial(moe, config=config, implementation="mosaic")
    held = jax.eval_shape(lambda *operands: jax.vjp(layer, *operands)[1], x, experts, logits)
    pairs = tokens * config.top_k
    found = dict.fromkeys(("x", "pre_activation", "routing", "other"), 0.0)
    for leaf in jax.tree.leaves(held):
        if leaf.ndim == 3:  # weights
            continue
        if leaf.shape == x.shape and leaf.dtype == x.dtype:
            name = "x"
        elif leaf.shape == (pairs, config.w13_rows) and leaf.dtype == x.dtype:
            name = "pre_activation"
        else:  # logits, and a few numbers of 32 bits a pair
            small = leaf.dtype.itemsize == 4 and leaf.size <= max(tokens * config.num_experts, 2 * pairs)
            name = "routing" if small else "other"
        found[name] += leaf.size * leaf.dtype.itemsize / tokens
    itemsize = jnp.dtype(config.dtype).itemsize
    return found | {"rows": 2.0 * config.top_k * config.hidden_size * itemsize}


def main(
    case: Annotated[
        list[str] | None, typer.Option(help="A name of moe-jax bench, or E,k,H,I; may be repeated.")
    ] = None,
    tokens: int = 16384,
    output: Annotated[Path | None, typer.Option(help="A JSON file to write.")] = None,
    commit: Annotated[str | None, typer.Option(help="Of the source, where git does not know it.")] = None,
) -> None:
    result: dict[str, Any] = describe(commit, set()) | {"tokens": tokens, "rows": []}
    print(
        "| case | hidden states | pre-activations | routing | other | together | not kept |\n|---|---|---|---|---|---|---|"
    )
    for name in case or CASES:
        kept = kept_bytes(parse_case(name).config("bfloat16"), tokens)
        together = sum(kept.values()) - kept["rows"]
        result["rows"].append({"case": name, "dtype": "bfloat16", "bytes_per_token": kept})
        numbers = (kept["x"], kept["pre_activation"], kept["routing"], kept["other"], together, kept["rows"])
        print(f"| {name} | " + " | ".join(f"{number:.0f}" for number in numbers) + " |", flush=True)
    if output is not None:
        output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
