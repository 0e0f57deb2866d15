"""Writes the README's benchmark table from a result file of `moe-jax bench`, between the two markers in the README.

python benchmarks/table.py benchmarks/results/NAME.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- benchmarks: start -->", "<!-- benchmarks: end -->"


def table(result: dict, source: str) -> str:
    """The Markdown table: microseconds of the whole layer, with the kernels' sum, for each case and number of tokens."""
    rows = {(r["case"], r["tokens"]): r for r in result["rows"] if r.get("layer_us") and "failed" not in r}
    tokens = sorted({t for _, t in rows})
    lines = [
        f"Microseconds for the whole {result['rows'][0]['dtype']} layer, router logits and hidden states in, output out, "
        f"inside one jit (in brackets: the sum of its kernels alone), on one {result['device']}, jax {result['jax']}, commit "
        f"`{result['commit']}`, {result['date']}. From `{source}`, which also has each kernel and the error of each row.",
        "",
        "| case | " + " | ".join(f"T = {t}" for t in tokens) + " |",
        "|---|" + "---:|" * len(tokens),
    ]
    for case in dict.fromkeys(c for c, _ in rows):
        cells = [rows.get((case, t)) for t in tokens]
        texts = [f"{c['layer_us']:.0f}" + kernels(c) if c else "" for c in cells]
        lines.append(f"| {case} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def kernels(row: dict) -> str:
    """The kernels' sum in brackets; nothing for a row from a CPU, which has none."""
    return f" ({row['kernels_total_us']:.0f})" if "kernels_total_us" in row else ""


def main(path: Path) -> None:
    text = README.read_text()
    head, rest = text.split(START)
    tail = rest.split(END)[1]
    source = path.resolve().relative_to(README.parent)
    README.write_text(f"{head}{START}\n{table(json.loads(path.read_text()), str(source))}\n{END}{tail}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
