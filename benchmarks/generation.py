"""Times how a Hugging Face model writes text with our experts and with transformers' own, a token of each sequence at a time.

python benchmarks/generation.py --output benchmarks/results/NAME.json
python benchmarks/generation.py --batch 1,16 --implementation moe_jax,grouped_mm,batched_mm --mode compile
python benchmarks/generation.py --toy --mode eager

The model has the shape of Qwen3-30B-A3B in all but its number of layers, and random weights. A step is everything between one
token and the next: embedding, attention over a cache of fixed size, router, experts, logits, the most likely token. It is
recorded in a CUDA graph, as it is (``graph``) or compiled by torch (``compile``), or run as it is (``eager``). All
implementations have the same weights; `agree` says how many of their tokens are those of the first one, which rounding alone
changes where two tokens are almost as likely, and `logits_error` how far the logits of the first step are from its.
"""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from moe_jax.bench.environment import describe

PROMPT = 16
WARM_UP = 3  # steps before a graph is recorded: compilers and allocators have done their work
MODES = ("graph", "compile", "eager")
SHAPE = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
}
TOY = SHAPE | {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}


def make_model(layers: int, shape: dict[str, Any], device: str, dtype: torch.dtype) -> Any:
    """The model, with weights that transformers draws, on `device`."""
    import transformers

    from moe_jax_torch.transformers import own_weights, register

    register()
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        num_hidden_layers=layers, max_position_embeddings=4096, eos_token_id=None, **shape
    )
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    own_weights(model)
    return model


class Writer:
    """Continues prompts, the most likely token each time, in memory that stays where it is: a step can be recorded.

    Args:
        model: a causal language model of transformers.
        prompt: ids ``[B, P]``.
        length: of the cache: P and the most steps that follow.
    """

    def __init__(self, model: Any, prompt: torch.Tensor, length: int):
        from transformers import StaticCache

        self._model, self._prompt = model, prompt
        self._cache = StaticCache(config=model.config, max_cache_len=length)
        names = inspect.signature(type(model).forward).parameters  # newer ones of transformers have the short name
        self._cached = {"cache" if "cache" in names else "past_key_values": self._cache, "use_cache": True}
        self.tokens = torch.empty_like(prompt[:, :1])
        self._position = torch.zeros_like(self.tokens)
        self.logits = None

    def start(self) -> None:
        """Reads the prompt; what was written before is forgotten."""
        self._cache.reset()
        self._forward(self._prompt, torch.arange(self._prompt.shape[1], device=self._prompt.device)[None])
        self._position.fill_(self._prompt.shape[1])

    def step(self) -> None:
        """One token more of each sequence."""
        self._forward(self.tokens, self._position)
        self._position += 1

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor) -> None:
        out = self._model(
            input_ids=ids,
            position_ids=positions.expand(ids.shape),
            logits_to_keep=1,
            **self._cached,
        )
        self.logits = out.logits[:, -1]
        self.tokens.copy_(self.logits.argmax(dim=-1, keepdim=True))


def stepper(writer: Writer, mode: str) -> Callable[[], None]:
    """A step in the way that `mode` says, after some steps of warming up; the writer has to be started again.

    A step writes what the next one reads, for which torch's own graphs (``mode="reduce-overhead"``) are skipped: what it compiled
    is recorded here.
    """
    step = torch.compile(writer.step) if mode == "compile" else writer.step
    for _ in range(WARM_UP):
        step()
    if mode == "eager":
        return step
    writer.start()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@torch.no_grad()
def write(model: Any, prompt: torch.Tensor, new_tokens: int, mode: str, rounds: int = 3) -> dict[str, Any]:
    """Tokens, the logits of the first step, and the seconds of the fastest of some rounds."""
    writer = Writer(model, prompt, prompt.shape[1] + max(new_tokens, WARM_UP) + 1)
    writer.start()
    step = stepper(writer, mode)
    synchronize = torch.cuda.synchronize if prompt.is_cuda else lambda: None
    seconds = []
    for _ in range(rounds):
        writer.start()
        written, first = [writer.tokens.clone()], None
        synchronize()
        start = time.perf_counter()
        for _ in range(new_tokens):
            step()
            written.append(writer.tokens.clone())
            first = writer.logits.float().clone() if first is None else first
        synchronize()
        seconds.append(time.perf_counter() - start)
    return {"tokens": torch.cat(written, dim=1), "logits": first, "seconds": min(seconds)}


def compare(model: Any, batch: int, new_tokens: int, mode: str, implementations: list[str]) -> list[dict[str, Any]]:
    """A row for each implementation; of one that fails, why."""
    generator = torch.Generator().manual_seed(batch)
    prompt = torch.randint(0, model.config.vocab_size, (batch, PROMPT), generator=generator).to(model.device)
    rows, first = [], None
    for name in implementations:
        row: dict[str, Any] = {"implementation": name, "mode": mode, "batch": batch, "new_tokens": new_tokens}
        try:
            model.set_experts_implementation(name)
            found = write(model, prompt, new_tokens, mode)
        except Exception as failure:  # the others are measured without it
            rows.append(row | {"reason": f"{type(failure).__name__}: {failure}"[:300]})
            continue
        first = found if first is None else first
        error = torch.linalg.norm(found["logits"] - first["logits"]) / torch.linalg.norm(first["logits"])
        rows.append(
            row
            | {
                "us_a_step": round(found["seconds"] / new_tokens * 1e6, 1),
                "tokens_a_second": round(batch * new_tokens / found["seconds"], 1),
                "agree": round((found["tokens"] == first["tokens"]).float().mean().item(), 4),
                "logits_error": round(error.item(), 6),
            }
        )
        torch.compiler.reset()
    return rows


def main(
    batch: Annotated[str, typer.Option(help="Sequences at a time, several separated by commas.")] = "1,16",
    new_tokens: int = 128,
    layers: int = 4,
    implementation: Annotated[
        str, typer.Option(help="Of the experts; the first is compared with.")
    ] = "moe_jax,grouped_mm",
    mode: Annotated[str, typer.Option(help=f"One of {', '.join(MODES)}.")] = "graph",
    output: Annotated[Path | None, typer.Option(help="A JSON file to write.")] = None,
    commit: Annotated[str | None, typer.Option(help="Of the source, where git does not know it.")] = None,
    toy: Annotated[bool, typer.Option("--toy", help="A tiny model in float32, on any device.")] = False,
) -> None:
    if mode not in MODES:
        raise typer.BadParameter(f"mode {mode!r} must be one of {', '.join(MODES)}")
    if not torch.cuda.is_available() and (mode != "eager" or not toy):
        raise typer.BadParameter("torch sees no CUDA device here; --toy --mode eager runs without one")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = make_model(layers, TOY if toy else SHAPE, device, torch.float32 if toy else torch.bfloat16)
    result = describe(commit, {"torch", "transformers"}) | {"layers": layers, "toy": toy, "rows": []}
    for size in batch.split(","):
        for row in compare(model, int(size), new_tokens, mode, implementation.split(",")):
            result["rows"].append(row)
            print(json.dumps(row), flush=True)
            if output is not None:
                output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
