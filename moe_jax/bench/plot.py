"""The times of a result as a picture: time against tokens, a panel a case, with every peer and the floor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Row = dict[str, Any]
# The same color in every panel and picture.
COLORS = {
    "moe_jax": "tab:blue",
    "vllm": "tab:orange",
    "cutlass": "tab:olive",
    "deepgemm": "tab:pink",
    "sonicmoe": "tab:green",
    "torch": "tab:red",
    "tokamax": "tab:purple",
    "ragged_dot": "tab:brown",
    "xla": "tab:gray",
}
KERNELS = "moe_jax, its kernels"


def series(rows: list[Row]) -> dict[str, list[tuple[int, float]]]:
    """The lines of a panel: for each its points, tokens and microseconds.

    Example:
        >>> series([{"tokens": 4, "layer_us": 9.0, "peers": {"torch": {"layer_us": 20.0}, "vllm": {"reason": "not here"}}}])
        {'moe_jax': [(4, 9.0)], 'torch': [(4, 20.0)]}
    """
    lines: dict[str, list[tuple[int, float]]] = {}

    def add(label: str, tokens: int, microseconds: float | None) -> None:
        if microseconds is not None:
            lines.setdefault(label, []).append((tokens, microseconds))

    for row in filter(is_timed, rows):
        tokens = row["tokens"]
        add("moe_jax", tokens, row["layer_us"])
        add(KERNELS, tokens, row.get("kernels_total_us"))
        for name, peer in row.get("peers", {}).items():
            add(name, tokens, peer.get("layer_us"))
        if "floor_memory_us" in row:
            add("floor", tokens, max(row["floor_memory_us"], row["floor_compute_us"]))
    return lines


def is_timed(row: Row) -> bool:
    """Whether the row has a time that counts."""
    return "layer_us" in row and "failed" not in row


def by_routing(result: Row) -> dict[str, list[Row]]:
    """The rows that have times, by routing; results from before there was a choice have uniform routing."""
    rows: dict[str, list[Row]] = {}
    for row in filter(is_timed, result["rows"]):
        rows.setdefault(row.get("routing", "uniform"), []).append(row)
    return rows


def save_plots(result: Row, path: Path) -> list[Path]:
    """Draws time against tokens, a panel for each case that has times.

    Args:
        result: as `run_bench` returns it.
        path: the file; of several routings each has its own, with the routing's name before the ending.

    Returns:
        The files written.

    Raises:
        OSError: a folder that cannot be written to.
        ValueError: an ending that names no picture format.
    """
    routings = by_routing(result)
    files = []
    for routing, rows in routings.items():
        file = path if len(routings) == 1 else path.with_name(f"{path.stem}-{routing}{path.suffix}")
        _save_plot(result, routing, rows, file)
        files.append(file)
    return files


def _save_plot(result: Row, routing: str, rows: list[Row], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys(row["case"] for row in rows))
    across = min(3, len(cases))
    down = -(-len(cases) // across)
    figure, panels = plt.subplots(
        down, across, figsize=(1.0 + 4.0 * across, 1.0 + 3.2 * down), squeeze=False, layout="constrained"
    )
    for axes in panels.flat[len(cases) :]:
        axes.set_axis_off()
    for axes, case in zip(panels.flat, cases, strict=False):
        _draw(axes, case, [row for row in rows if row["case"] == case])
    handles = {
        label: line for axes in panels.flat for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=min(len(handles), 3 * across), frameon=False
    )
    experts = f", {rows[0]['quantization']} experts" if rows[0].get("quantization") else ""
    what = f"Whole {rows[0]['dtype']} layer{experts}, {routing} routing"
    figure.suptitle(f"{what}\n{result['device']}, commit {result['commit']}, {result['date']}", fontsize=11)
    try:
        # Without the version of matplotlib, so that the same result gives the same file.
        figure.savefig(file, dpi=100, metadata={"Software": None} if file.suffix == ".png" else None)
    finally:
        plt.close(figure)


def _draw(axes: Any, case: str, rows: list[Row]) -> None:
    from matplotlib.ticker import LogLocator

    lines = series(rows)
    for label, points in lines.items():
        tokens, times = zip(*points, strict=True)
        if label == "floor":
            axes.plot(tokens, times, color="black", linewidth=1.0, linestyle="--", label=label)
        elif label == KERNELS:
            axes.plot(tokens, times, color=COLORS["moe_jax"], linewidth=1.2, linestyle=":", label=label)
        else:
            width = 2.2 if label == "moe_jax" else 1.2
            axes.plot(tokens, times, color=COLORS.get(label), marker="o", markersize=4, linewidth=width, label=label)
    axes.set(xscale="log", yscale="log", title=case, xlabel="tokens", ylabel="microseconds")
    counts = [tokens for tokens, _ in lines["moe_jax"]]
    axes.set_xticks(counts, [str(count) for count in counts], fontsize=8)
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(color="0.92")
    axes.spines[["top", "right"]].set_visible(False)
