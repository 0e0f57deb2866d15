"""A result for people: a table of each case, and a picture of its times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

COLUMNS = (
    "T",
    "what ran",
    "error",
    "kernels\nµs",
    "layer\nµs",
    "matmuls\nTFLOP/s",
    "weights\nGB/s",
    "floor\nµs",
    "of floor",
)


def headline(result: dict[str, Any]) -> str:
    """What was measured on, in one or two lines."""
    ceilings = result["ceilings"]
    return (
        f"{result['device']}, jax {result['jax']}, commit {result['commit'] or 'unknown (give --commit)'}, {result['date']}\n"
        f"measured ceilings: {ceilings['matmul_tflops']:.3g} TFLOP/s, copies {ceilings['copy_gb_per_s']:.4g} GB/s, "
        f"reads {ceilings['read_gb_per_s']:.4g} GB/s"
    )


def case_table(rows: list[dict[str, Any]]) -> Table:
    """The rows of one case; the peers of a row come below it.

    "Of floor" is the share of the layer's time that the hardware needs at least. The pairs of rates are those of the up- and the
    down-projection.
    """
    table = Table(title=f"{rows[0]['case']}, {rows[0]['dtype']}", title_justify="left", box=box.SIMPLE_HEAD)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "what ran" else "right", no_wrap=column != "what ran")
    table.add_column("note")
    for row in rows:
        _add_row(table, row)
    return table


def _add_row(table: Table, row: dict[str, Any]) -> None:
    floor = max(row["floor_memory_us"], row["floor_compute_us"]) if "roofline" in row else None
    table.add_row(
        str(row["tokens"]),
        f"moe_jax ({row.get('implementation', '?')})",
        _error(row),
        _time(row.get("kernels_total_us")),
        _time(row.get("layer_us")),
        _pair(row.get("kernel_tflops")),
        _pair(row.get("weights_gb_per_s")),
        _time(floor),
        f"{row['roofline']:.0%}" if "roofline" in row else "",
        _own_note(row),
    )
    for name, peer in row.get("peers", {}).items():
        note = escape(peer.get("reason", ""))
        if not note and row.get("layer_us") and peer.get("layer_us"):
            note = f"{peer['layer_us'] / row['layer_us']:.2f} x moe_jax's time"
        ran = f"  {name}" + (f" ({escape(peer['implementation'])})" if "implementation" in peer else "")
        times = _time(peer.get("kernels_total_us")), _time(peer.get("layer_us"))
        table.add_row("", ran, _error(peer), *times, "", "", "", "", note)


def _own_note(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"[bold red]FAILED[/] {escape(row['failed'])}"
    if "two_runs_bit_equal" in row:
        return "bit-equal: two runs, alone"
    return f"shape {row['shape']}" if "shape" in row else ""


def _error(row: dict[str, Any]) -> str:
    if "error" not in row:
        return ""
    return "not finite" if row["error"] is None else f"{row['error']:.1e}"


def _time(microseconds: float | None) -> str:
    if microseconds is None:
        return ""
    return f"{microseconds:.1f}" if microseconds < 100 else f"{microseconds:.0f}"


def _pair(rates: dict[str, float] | None) -> str:
    return " / ".join(f"{rate:.0f}" for rate in (rates or {}).values())


def plot_paths(path: Path, cases: list[str]) -> dict[str, Path]:
    """Where the picture of each case goes: `path` itself for one, with the case's name before the ending for several.

    Example:
        >>> [p.as_posix() for p in plot_paths(Path("a/times.png"), ["x", "y"]).values()]
        ['a/times-x.png', 'a/times-y.png']
    """
    if len(cases) == 1:
        return {cases[0]: path}
    return {case: path.with_name(f"{path.stem}-{case}{path.suffix}") for case in cases}


def series(rows: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """The lines of a picture: for each its points, tokens and microseconds."""
    lines: dict[str, list[tuple[int, float]]] = {}

    def add(label: str, tokens: int, microseconds: float | None) -> None:
        if microseconds is not None:
            lines.setdefault(label, []).append((tokens, microseconds))

    for row in rows:
        if "roofline" not in row or "failed" in row:
            continue
        tokens = row["tokens"]
        add("moe_jax", tokens, row["layer_us"])
        add("moe_jax, its kernels", tokens, row.get("kernels_total_us"))
        for name, peer in row.get("peers", {}).items():
            add(name, tokens, peer.get("layer_us"))
        add("floor: memory", tokens, row["floor_memory_us"])
        add("floor: compute", tokens, row["floor_compute_us"])
    return lines


def save_plots(result: dict[str, Any], path: Path) -> list[Path]:
    """Draws time against tokens, one picture for each case that has times.

    Returns:
        The files written.

    Raises:
        OSError: a folder that cannot be written to.
        ValueError: an ending that names no picture format.
    """
    cases = list(dict.fromkeys(row["case"] for row in result["rows"] if "roofline" in row and "failed" not in row))
    paths = plot_paths(path, cases) if cases else {}
    for case, file in paths.items():
        _save_plot(result, case, file)
    return list(paths.values())


def _save_plot(result: dict[str, Any], case: str, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in result["rows"] if row["case"] == case]
    figure, axes = plt.subplots(figsize=(7.5, 5.0))
    lines = series(rows)
    for label, points in lines.items():
        tokens, times = zip(*points, strict=True)
        if label.startswith("floor"):
            style = "--" if label.endswith("memory") else ":"
            axes.plot(tokens, times, color="black", linewidth=1.0, linestyle=style, label=label)
        else:
            wide = 2.2 if label.startswith("moe_jax") else 1.2
            axes.plot(tokens, times, marker="o", markersize=4, linewidth=wide, label=label)
    least = [
        (tokens, max(memory, compute))
        for (tokens, memory), (_, compute) in zip(lines["floor: memory"], lines["floor: compute"], strict=True)
    ]
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="microseconds, whole layer")
    bottom = min(time for label, points in lines.items() if not label.startswith("floor") for _, time in points)
    bottom = min([bottom, *(time for _, time in least)]) / 2  # the floor that does not bind may run off below
    axes.set_ylim(bottom=bottom)
    axes.fill_between(
        [t for t, _ in least], bottom, [time for _, time in least], color="black", alpha=0.08, linewidth=0
    )
    counts = [tokens for tokens, _ in lines["moe_jax"]]
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    axes.set_title(f"{case}, {rows[0]['dtype']}, {result['device']}, commit {result['commit']}", fontsize=10)
    figure.tight_layout()
    try:
        figure.savefig(file, dpi=130)
    finally:
        plt.close(figure)
