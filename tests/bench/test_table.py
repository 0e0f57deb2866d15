"""The README's tables and pictures are made of result files, old and new."""

import importlib.util
import json
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
ROOT = Path(__file__).parents[2]
specification = importlib.util.spec_from_file_location("benchmarks_table", ROOT / "benchmarks" / "table.py")
table = importlib.util.module_from_spec(specification)
specification.loader.exec_module(table)

ROW = {
    "case": "a",
    "tokens": 16,
    "routing": "uniform",
    "dtype": "bfloat16",
    "layer_us": 100.0,
    "kernels_total_us": 95.0,
}
FLOOR = {"floor_memory_us": 80.0, "floor_compute_us": 10.0, "roofline": 0.8, "bound_us": 99.0}
PEERS = {
    "torch": {"layer_us": 180.0},
    "vllm": {"layer_us": 121.0},
    "xla": {"layer_us": 50.0},
    "tokamax": {"reason": "tokamax cannot be imported"},
}
RESULT = {
    "device": "NVIDIA H200",
    "jax": "0.11.2",
    "commit": "abc1234",
    "date": "2026-01-01",
    "versions": {"jax": "0.11.2", "vllm": "0.22.1"},
    "ceilings": {"matmul_tflops": 680.0, "copy_gb_per_s": 4000.0, "read_gb_per_s": 4290.0},
}


def write(tmp_path, rows, **more):
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True, exist_ok=True)
    (tmp_path / "README.md").write_text(f"before\n{table.START}\nold\n{table.END}\nafter\n")
    path = results / "run.json"
    path.write_text(json.dumps(RESULT | more | {"rows": rows}))
    return path


def test_peers_bound_and_floor_have_columns(tmp_path):
    rows = [  # in the order in which they were measured
        {"case": "a", "tokens": 1024, "dtype": "bfloat16", "layer_us": 200.0},
        ROW | FLOOR | {"peers": PEERS},
        {"case": "b", "tokens": 1, "dtype": "bfloat16", "failed": "wrong output"},
    ]
    path = write(tmp_path, rows, skipped=[{"case": "b", "tokens": 16, "routing": "uniform"}], note="Of two GPUs.")
    table.main([path], tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| case | T | moe_jax | torch | vllm | xla | best peer ÷ moe_jax | bound_us | of floor |" in text
    assert "| a | 16 | 100 (95) | 180 | 121 | 50 | 1.21 (vllm) | 99 | 80% |" in text
    assert "|  | 1024 | 200 |  |  |  |  |  |  |" in text
    assert "b, T 1 has no time: wrong output" in text
    for words in (
        "680 TFLOP/s",
        "4290 GB/s",
        "tokamax has no time: tokamax cannot",
        "vllm 0.22.1",
        "1 rows were not",
        "- Of two GPUs.",
    ):
        assert words in text
    assert "](benchmarks/plots/run.png)" in text
    assert (tmp_path / "benchmarks" / "plots" / "run.png").read_bytes().startswith(b"\x89PNG")
    table.main([path], tmp_path)
    assert (tmp_path / "README.md").read_text() == text


def test_a_skewed_routing_has_its_own_table(tmp_path):
    skewed = ROW | {"routing": "half", "touched_experts": 8, "rows_per_expert_max": 512}
    table.main([write(tmp_path, [ROW, skewed])], tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "Routing: half." in text
    assert "| a | 16 | 8 | 512 | 100 (95) |" in text
    assert "run-uniform.png" in text and "run-half.png" in text


def test_results_from_before_there_were_peers(tmp_path):
    path = write(tmp_path, [])
    path.write_text((ROOT / "benchmarks" / "results" / "2026-11-22-h200-bf16-layer.json").read_text())
    table.main([path], tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| qwen3-30b-a3b | 1 | 44 (39) |" in text
    assert "bound_us" not in text and "None" not in text


def test_a_number_format_is_named(tmp_path):
    ceilings = RESULT["ceilings"] | {"matmul": "float8_e4m3fn", "matmul_reason": "for a reason"}
    path = write(tmp_path, [ROW | {"quantization": "fp8_block"}], quantization="fp8_block", ceilings=ceilings)
    head = table.head(json.loads(path.read_text()), "run.json")
    assert "the whole bfloat16 layer of `fp8_block` experts" in head
    assert "a large float8_e4m3fn matmul reaches 680 TFLOP/s, sums read 4290 GB/s (for a reason)." in head
