"""A result for people: a table of each case."""

from __future__ import annotations

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
    "temp\nMiB",
)


def headline(result: dict[str, Any]) -> str:
    """What was measured on, and what was not measured, in a few lines."""
    ceilings, skipped = result["ceilings"], result.get("skipped")
    spent = (
        f"\n{len(skipped)} rows not measured: the budget of {result['budget_seconds']:g} s is spent" if skipped else ""
    )
    of = f" of {ceilings['matmul']}" if ceilings.get("matmul") else ""
    reason = f"\n{ceilings['matmul_reason']}" if ceilings.get("matmul_reason") else ""
    return (
        f"{result['device']}, jax {result['jax']}, commit {result['commit'] or 'unknown (give --commit)'}, {result['date']}\n"
        f"measured ceilings: {ceilings['matmul_tflops']:.3g} TFLOP/s{of}, copies {ceilings['copy_gb_per_s']:.4g} GB/s, "
        f"reads {ceilings['read_gb_per_s']:.4g} GB/s{reason}{spent}"
    )


def case_table(rows: list[dict[str, Any]]) -> Table:
    """The rows of one case; the peers of a row come below it.

    T is followed by the routing unless that is uniform, the kernels' time by how many are launched.
    "Of floor" is the share of the layer's time that the hardware needs at least. The pairs of rates are those of the up- and the
    down-projection.
    """
    experts = f", {rows[0]['quantization']}" if rows[0].get("quantization") else ""
    table = Table(title=f"{rows[0]['case']}, {rows[0]['dtype']}{experts}", title_justify="left", box=box.SIMPLE_HEAD)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "what ran" else "right", no_wrap=column != "what ran")
    table.add_column("note")
    said: set[tuple[str, str]] = set()
    for row in rows:
        _add_row(table, row, said)
    return table


def _add_row(table: Table, row: dict[str, Any], said: set[tuple[str, str]]) -> None:
    routing = "" if row.get("routing", "uniform") == "uniform" else f" {row['routing']}"
    floor = max(row["floor_memory_us"], row["floor_compute_us"]) if "roofline" in row else None
    table.add_row(
        str(row["tokens"]) + routing,
        f"moe_jax ({row.get('implementation', '?')})",
        _error(row),
        _time(row.get("kernels_total_us")) + (f" ({row['kernel_launches']})" if "kernel_launches" in row else ""),
        _time(row.get("layer_us")),
        _pair(row.get("kernel_tflops")),
        _pair(row.get("weights_gb_per_s")),
        _time(floor),
        f"{row['roofline']:.0%}" if "roofline" in row else "",
        f"{row['temp_bytes'] / 2**20:.1f}" if "temp_bytes" in row else "",
        _own_note(row),
    )
    for name, peer in row.get("peers", {}).items():
        reason = peer.get("reason", "")
        if set(peer) == {"reason"} and (name, reason) in said:  # it could not run before, and still cannot
            continue
        said.add((name, reason))
        note = escape(reason)
        if not note and row.get("layer_us") and peer.get("layer_us"):
            note = f"{peer['layer_us'] / row['layer_us']:.2f} x moe_jax's time"
        ran = f"  {name}" + (f" ({escape(peer['implementation'])})" if "implementation" in peer else "")
        times = _time(peer.get("kernels_total_us")), _time(peer.get("layer_us"))
        table.add_row("", ran, _error(peer), *times, "", "", "", "", "", note)


def _own_note(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"[bold red]FAILED[/] {escape(row['failed'])}"
    if "two_runs_bit_equal" in row:
        return "bit-equal: two runs" + (", alone" if "alone_bit_equal" in row else "")
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
