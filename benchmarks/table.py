"""Writes the README's benchmark tables and pictures from result files of `moe-jax bench`, between two markers in the README.

python benchmarks/table.py benchmarks/results/NAME.json [...]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from moe_jax.bench.plot import by_routing, save_plots

ROOT = Path(__file__).resolve().parents[1]
START, END = "<!-- benchmarks: start -->", "<!-- benchmarks: end -->"
OURS = "xla"  # among the peers: our own plain-JAX form, no other library


def section(path: Path, root: Path = ROOT) -> str:
    """Everything about one result file; draws its pictures into benchmarks/plots."""
    result = json.loads(path.read_text())
    source = path.resolve().relative_to(root)
    plots = root / "benchmarks" / "plots"
    plots.mkdir(exist_ok=True)
    parts = [head(result, source.as_posix())]
    pictures = save_plots(result, plots / f"{path.stem}.png")
    for (routing, rows), picture in zip(by_routing(result).items(), pictures, strict=True):
        parts += [table(rows, routing), f"![time against tokens]({picture.relative_to(root).as_posix()})"]
    return "\n\n".join(parts + notes(result))


def head(result: dict, source: str) -> str:
    """What the figures are and where they come from."""
    rates, dtype = result.get("ceilings"), result["rows"][0]["dtype"]
    experts = f" of `{result['quantization']}` experts" if result.get("quantization") else ""
    ceilings = ""
    if rates:
        matmul = rates.get("matmul") or dtype
        ceilings = (
            f" In the same run a large {matmul} matmul reaches {rates['matmul_tflops']:.3g} TFLOP/s, sums read "
            f"{rates['read_gb_per_s']:.0f} GB/s"
            + (f" ({rates['matmul_reason']})." if rates.get("matmul_reason") else ".")
        )
    calls = result.get("layers_a_call")
    where = "inside one jit" if calls is None else f"one of {calls} in one jit, each on the output of the last"
    return (
        f"Microseconds for the whole {dtype} layer{experts}, router logits and hidden states in, output out, {where} (in "
        f"brackets: the sum of its kernels alone), on one {result['device']}, jax {result['jax']}, commit "
        f"`{result['commit']}`, {result['date']}.{ceilings} From `{source}`, which also has each kernel and the error of "
        "each row."
    )


def table(rows: list[dict], routing: str) -> str:
    """The Markdown table of one routing: a line for each case and number of tokens."""
    names = dict.fromkeys(name for row in rows for name, peer in row.get("peers", {}).items() if "layer_us" in peer)
    columns = ["case", "T", "moe_jax", *names]
    if set(names) - {OURS}:
        columns.append("best peer ÷ moe_jax")
    if any("bound_us" in row for row in rows):
        columns.append("bound_us")
    if any("roofline" in row for row in rows):
        columns.append("of floor")
    if routing != "uniform":
        columns[2:2] = ["experts touched", "most rows"]
    lines = [] if routing == "uniform" else [f"Routing: {routing}.", ""]
    lines += ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    last, cases = None, list(dict.fromkeys(row["case"] for row in rows))
    for row in sorted(rows, key=lambda row: (cases.index(row["case"]), row["tokens"])):
        cells = {
            "case": row["case"] if row["case"] != last else "",
            "T": str(row["tokens"]),
            "experts touched": str(row.get("touched_experts", "")),
            "most rows": str(row.get("rows_per_expert_max", "")),
            "moe_jax": f"{row['layer_us']:.0f}"
            + (f" ({row['kernels_total_us']:.0f})" if "kernels_total_us" in row else ""),
            "best peer ÷ moe_jax": best(row),
            "bound_us": f"{row['bound_us']:.0f}" if "bound_us" in row else "",
            "of floor": f"{row['roofline']:.0%}" if "roofline" in row else "",
        } | {name: microseconds(row, name) for name in names}
        lines.append("| " + " | ".join(cells[column] for column in columns) + " |")
        last = row["case"]
    return "\n".join(lines)


def microseconds(row: dict, name: str) -> str:
    """A peer's time; nothing where it has none."""
    time = row.get("peers", {}).get(name, {}).get("layer_us")
    return "" if time is None else f"{time:.0f}"


def best(row: dict) -> str:
    """How many times as fast as the fastest peer our layer is, and which that is."""
    times = {name: p["layer_us"] for name, p in row.get("peers", {}).items() if "layer_us" in p and name != OURS}
    if not times:
        return ""
    name = min(times, key=times.get)
    return f"{times[name] / row['layer_us']:.2f} ({name})"


def notes(result: dict) -> list[str]:
    """What the file says of itself, what the columns mean, and which peers did not run; nothing for a result with none."""
    found = [result["note"]] if "note" in result else []
    if any("bound_us" in row for row in result["rows"]):
        found.append(
            "`bound_us`, for T up to 128: 1.10 x (bytes of the touched experts' weights ÷ measured read rate + 10 µs). Of "
            "floor: the share of moe_jax's time that the measured rates need at least."
        )
    peers = [(name, peer) for row in result["rows"] for name, peer in row.get("peers", {}).items()]
    timed = {name for name, peer in peers if "layer_us" in peer}
    reasons = {name: peer["reason"] for name, peer in peers if name not in timed and "reason" in peer}
    if timed:
        versions = result.get("versions", {})
        known = [f"{name} {versions[name]}" for name in ("torch", "vllm", "sonic-moe", "tokamax") if versions.get(name)]
        found.append(
            "Peers run in the same process on the same inputs, those under torch as CUDA graphs where that works"
            + (f": {', '.join(known)}." if known else ".")
        )
    found += [f"{name} has no time: {reason}" for name, reason in reasons.items()]
    found += [
        f"{row['case']}, T {row['tokens']} has no time: {row['failed']}" for row in result["rows"] if row.get("failed")
    ]
    if result.get("skipped"):
        found.append(f"{len(result['skipped'])} rows were not measured: the run's time was up.")
    return ["\n".join(f"- {note}" for note in found)] if found else []


def main(paths: list[Path], root: Path = ROOT) -> None:
    readme = root / "README.md"
    before, rest = readme.read_text().split(START)
    after = rest.split(END)[1]
    sections = "\n\n".join(section(path, root) for path in paths)
    readme.write_text(f"{before}{START}\n{sections}\n{END}{after}")


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit(__doc__)
    main([Path(argument) for argument in sys.argv[1:]])
