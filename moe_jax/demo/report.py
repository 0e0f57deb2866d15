"""The demo's results for people: two tables and a picture."""

from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moe_jax.demo.errors import DemoError
from moe_jax.demo.job import DemoResult, LayerResult
from moe_jax.explain_table import chosen, explanation_table

_BARS = " ▁▂▃▄▅▆▇█"


def histogram(counts: np.ndarray, width: int = 32) -> str:
    """One character per expert, or per few neighbouring experts when there are more than ``width``.

    Example:
        >>> histogram(np.array([0, 4, 8]))
        ' ▄█'
    """
    means = np.array([part.mean() for part in np.array_split(counts, min(width, counts.size))])
    levels = np.ceil(means / max(means.max(), 1) * (len(_BARS) - 1)).astype(int)
    return "".join(_BARS[level] for level in levels)


def print_result(result: DemoResult, console: Console) -> None:
    """Prints the result table, the explanation table and the verdict."""
    config = result.config
    console.print(
        f"[bold]{escape(result.model)}[/]: {config.num_experts} experts, top-{config.top_k}, "
        f"hidden {config.hidden_size}, intermediate {config.intermediate_size}, {config.dtype}; "
        f"{result.num_tokens} tokens ({result.tokenizer})\n"
        f"moe_jax on {result.device}, transformers timed on {result.transformers_device}; "
        "errors are against transformers' block in float32",
        highlight=False,
    )
    ranks = int(result.layers[0].ranks.max()) + 1
    if result.implementation == "auto":
        names = " + ".join(sorted(set(chosen(result.explanations).values())))
    else:
        names = result.implementation
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("layer", justify="right")
    table.add_column("error\nwhole", justify="right")
    table.add_column(f"error\nEP-{ranks}", justify="right")
    table.add_column("routing\nties", justify="right")
    table.add_column("transformers\nms", justify="right")
    table.add_column("moe_jax\nms", justify="right")
    table.add_column("ran")
    table.add_column("tokens per expert\nmin / mean / max", justify="right")
    table.add_column("by expert")
    for layer in result.layers:
        table.add_row(*_row(layer, names, result.tolerance))
    console.print(table)
    console.print(explanation_table(result.explanations))
    for failure in result.failures:
        console.print(f"[bold red]FAILED[/] {escape(failure)}", highlight=False)
    if not result.failures:
        console.print(
            f"[green]passed[/]: every layer within {result.tolerance:.1e} of transformers, "
            f"whole and split over {ranks} ranks",
            highlight=False,
        )


def _row(layer: LayerResult, names: str, tolerance: float) -> list[str]:
    def error(value: float) -> str:
        return f"{value:.1e}" if value <= tolerance else f"[bold red]{value:.1e}[/]"

    counts = layer.tokens_per_expert
    return [
        str(layer.index),
        error(layer.error),
        error(layer.error_parallel),
        str(layer.tied),
        f"{layer.transformers_seconds * 1e3:.2f}",
        f"{layer.seconds * 1e3:.2f}",
        names,
        f"{counts.min()} / {counts.mean():.0f} / {counts.max()}",
        histogram(counts),
    ]


def save_expert_load(result: DemoResult, path: Path) -> None:
    """Draws the tokens of every expert, one panel per layer, coloured by the rank that owns the expert."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    experts = result.config.num_experts
    figure, panels = plt.subplots(
        len(result.layers),
        1,
        figsize=(max(8.0, experts / 10), 1.2 + 1.6 * len(result.layers)),
        sharex=True,
        squeeze=False,
    )
    for panel, layer in zip(panels[:, 0], result.layers, strict=True):
        for rank in range(int(layer.ranks.max()) + 1):
            mine = np.flatnonzero(layer.ranks == rank)
            panel.bar(mine, layer.tokens_per_expert[mine], width=0.85, label=f"rank {rank}")
        panel.axhline(layer.tokens_per_expert.mean(), color="black", linewidth=0.8, linestyle="--")
        panel.set_ylabel(f"layer {layer.index}\ntokens")
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1, 0].set_xlabel("expert (dashed: the mean)")
    panels[-1, 0].set_xlim(-0.6, experts - 0.4)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.suptitle(f"Tokens per expert: {result.num_tokens} tokens, top-{result.config.top_k} of {experts} experts")
    figure.legend(handles, labels, loc="upper right", ncols=len(labels), frameon=False, bbox_to_anchor=(0.99, 0.955))
    figure.tight_layout(rect=(0, 0, 1, 0.96))
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:  # a folder that is read-only; an ending that names no picture format
        raise DemoError(f"cannot write --out {path}: {error}") from error
    finally:
        plt.close(figure)
