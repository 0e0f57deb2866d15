"""`moe-jax bench` end to end on a CPU, small: what it writes, and that it notices what is wrong."""

import importlib.util
import json
import multiprocessing
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from moe_jax import moe
from moe_jax.bench import (
    BenchOptions,
    entrant,
    environment,
    jax_layers,
    measure,
    parse_case,
    peers,
    plot,
    run,
    torch_layers,
)
from moe_jax.bench.roofline import Ceilings, measure_ceilings

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="sizes and wording are those of a CPU")

needs_matplotlib = pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="needs matplotlib")
needs_torch = pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="needs torch")


@needs_matplotlib
def test_end_to_end(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "measure_ceilings", measure_ceilings)
    plot = tmp_path / "times.png"
    arguments = ["--tokens", "0,4", "--compare", "ragged_dot"]
    outcome, result = bench(*arguments, "--checks", "--commit", "abc1234", "--plot", plot)
    assert outcome.exit_code == 0, outcome.output
    assert "no GPU" in outcome.stdout
    assert result["device"] == "cpu"
    assert result["jax"] == result["versions"]["jax"] == jax.__version__
    assert result["commit"] == "abc1234"
    assert len(result["date"]) == 10
    assert result["ceilings"].pop("matmul") == "float32"
    assert all(rate > 0 for rate in result["ceilings"].values())
    assert [(row["case"], row["tokens"]) for row in result["rows"]] == [("E6-k2-H32-I48", 0), ("E6-k2-H32-I48", 4)]
    for row in result["rows"]:
        assert row["implementation"] == "xla"
        assert row["dtype"] == "float32"
        assert "failed" not in row
        assert "kernel_us" not in row
        if row["tokens"] == 0:
            assert row["shape"][0] == 0
            continue
        assert 0 < row["error"] < 1e-5
        assert row["two_runs_bit_equal"]
        assert row["layer_us"] > 0
        assert min(row["floor_memory_us"], row["floor_compute_us"]) >= 0
        assert row["roofline"] > 0
        assert row["bound_us"] > 11
        assert row["routing"] == "uniform"
        assert 2 <= row["touched_experts"] <= 6
        assert row["temp_bound_bytes"] == 4 * 2 * (32 + 48) * 4 + 2**20
        for peer in row["peers"].values():
            assert peer["layer_us"] > 0
            assert 0 < peer["error"] < 1e-5
    assert set(result["rows"][1]["peers"]) == {"ragged_dot"}
    assert result["skipped"] == []
    for word in ("E6-k2-H32-I48, float32", "moe_jax (xla)", "jax.lax.ragged_dot", "x moe_jax's time", "shape [0, 32]"):
        assert word in outcome.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert f"wrote {plot}" in outcome.stdout


@needs_matplotlib
def test_a_panel_for_each_case_and_a_picture_for_each_routing(tmp_path):
    times = {"layer_us": 9.0, "floor_memory_us": 2.0, "floor_compute_us": 1.0, "roofline": 0.2, "dtype": "float32"}
    peer = {"peers": {"torch": {"layer_us": 20.0}, "tokamax": {"reason": "not here"}}}
    rows = [
        {"case": "a", "tokens": 0, "dtype": "float32", "shape": [0, 32]},
        {"case": "a", "tokens": 1} | times,
        {"case": "a", "tokens": 8} | times | peer,
        {"case": "b", "tokens": 1, "kernels_total_us": 5.0} | times,
        {"case": "wrong", "tokens": 1, "failed": "wrong output"},
    ]
    result = {"device": "cpu", "commit": "abc1234", "date": "2026-01-01", "rows": rows}
    assert plot.series(rows[:3]) == {
        "moe_jax": [(1, 9.0), (8, 9.0)],
        "torch": [(8, 20.0)],
        "floor": [(1, 2.0), (8, 2.0)],
    }
    written = plot.save_plots(result, tmp_path / "times.png")
    rows.append({"case": "a", "tokens": 8, "routing": "half"} | times)
    written += plot.save_plots(result, tmp_path / "times.png")
    assert [path.name for path in written] == ["times.png", "times-uniform.png", "times-half.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_defaults_are_those_of_the_device():
    options = BenchOptions().filled(on_gpu=False)
    assert [case.name for case in options.cases] == ["small"]
    assert options.dtype == "float32"
    assert len(BenchOptions().filled(on_gpu=True).cases) == 6
    assert BenchOptions().filled(on_gpu=True).dtype == "bfloat16"
    assert BenchOptions().filled(on_gpu=True).processes
    assert not BenchOptions(cases=(parse_case("mixtral-8x7b"),)).filled(on_gpu=True).processes
    assert not options.processes


def test_a_missing_peer_gives_its_reason(bench, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokamax", None)
    monkeypatch.setitem(sys.modules, "torch", None)
    outcome, result = bench("--tokens", 4, "--compare", "tokamax,torch,xla")
    assert outcome.exit_code == 0, outcome.output
    found = result["rows"][0]["peers"]
    assert set(found["tokamax"]) == set(found["torch"]) == {"reason"}
    assert "pip install tokamax" in found["tokamax"]["reason"]
    assert "pip install 'moe_jax[torch]'" in found["torch"]["reason"]
    assert found["tokamax"]["reason"] in outcome.stdout
    assert 0 < found["xla"]["error"] < 1e-5
    assert found["xla"]["layer_us"] > 0


def test_tokamax_runs_where_it_can_be_imported(bench, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokamax", types.SimpleNamespace(ragged_dot=jax.lax.ragged_dot))
    outcome, result = bench("--tokens", 4, "--compare", "tokamax")
    assert outcome.exit_code == 0, outcome.output
    assert result["rows"][0]["peers"]["tokamax"]["error"] < 1e-5


@needs_torch
@pytest.mark.parametrize("grouped", [False, True])
def test_torch_agrees(bench, monkeypatch, grouped):
    monkeypatch.setattr(torch_layers, "takes_grouped_mm", lambda *arguments: grouped)
    outcome, result = bench("--tokens", 4, "--compare", "torch", "--dtype", "bfloat16")
    assert outcome.exit_code == 0, outcome.output
    found = result["rows"][0]["peers"]["torch"]
    assert "reason" not in found, found
    assert found["implementation"] == ("torch._grouped_mm" if grouped else "loop over experts, torch.nn.functional")
    assert found["layer_us"] > 0
    assert 0 < found["error"] < 1e-2


def test_a_peer_with_a_wrong_output_is_not_timed(bench, monkeypatch):
    def wrong(config):
        def twice(x, weights, logits):
            return 2 * moe(x, weights, logits, config)

        return jax_layers.JaxLayer(twice, lambda weights: weights, "twice")

    def broken(config):
        raise RuntimeError("out of everything\nand more")

    monkeypatch.setitem(jax_layers.JAX_LAYERS, "wrong", wrong)
    monkeypatch.setitem(jax_layers.JAX_LAYERS, "broken", broken)
    monkeypatch.setattr(peers, "PEERS", (*peers.PEERS, "wrong", "broken"))
    outcome, result = bench("--tokens", 4, "--compare", "wrong,broken")
    assert outcome.exit_code == 0, outcome.output
    found = result["rows"][0]["peers"]
    assert found["wrong"]["error"] == pytest.approx(1.0, abs=1e-3)
    assert "wrong output" in found["wrong"]["reason"]
    assert "layer_us" not in found["wrong"]
    assert found["broken"] == {"reason": "RuntimeError: out of everything"}
    assert "layer_us" in result["rows"][0]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda y: y * 1.001, "wrong output: relative error 0.001"),
        (lambda y: y.at[0, 0].set(jnp.nan), "wrong output: relative error nan"),
        (lambda y: y[:, :-1], "x has shape (4, 31)"),
        (lambda y: 1 / 0, "ZeroDivisionError"),
    ],
    ids=["values", "nan", "shape", "raises"],
)
def test_a_wrong_layer_is_reported_and_not_timed(bench, monkeypatch, spoil, words):
    monkeypatch.setattr(measure, "moe", lambda *operands, **keywords: spoil(moe(*operands, **keywords)))
    outcome, result = bench("--tokens", 4)
    assert outcome.exit_code == 1
    assert words in outcome.stderr
    assert "FAILED" in outcome.stdout
    assert words in result["rows"][0]["failed"]
    assert "layer_us" not in result["rows"][0]


def test_bits_that_do_not_repeat_are_reported(bench, monkeypatch):
    def by_batch(x, weights, logits, **keywords):  # a rounding error that depends on the other tokens
        return moe(x, weights, logits, **keywords) * (1 + 2e-7 * x.shape[0])

    monkeypatch.setattr(measure, "moe", by_batch)
    outcome, result = bench("--tokens", 4, "--checks")
    assert outcome.exit_code == 1
    assert result["rows"][0]["two_runs_bit_equal"] is True
    assert result["rows"][0]["alone_bit_equal"] is False
    assert "alone_bit_equal does not hold" in outcome.stderr


def test_each_routing_has_its_row(bench):
    outcome, result = bench("--tokens", "0,64", "--routing", "uniform,half")
    assert outcome.exit_code == 0, outcome.output
    uniform, half = result["rows"][1:]
    assert [row["routing"] for row in result["rows"]] == ["uniform", "uniform", "half"]
    assert half["rows_per_expert_max"] == 64 > uniform["rows_per_expert_max"]
    assert half["error"] < 1e-5
    assert "64 half" in outcome.stdout


def test_what_the_budget_leaves_no_time_for_is_listed(bench, monkeypatch):
    outcome, result = bench("--tokens", "1,4", "--budget", "0")
    assert outcome.exit_code == 0, outcome.output
    assert result["rows"] == []
    assert result["skipped"] == [{"case": "E6-k2-H32-I48", "tokens": t, "routing": "uniform"} for t in (1, 4)]
    assert "2 rows not measured: the budget of 0 s is spent" in outcome.stdout


def test_a_budget_spent_within_a_row_leaves_out_its_peers_and_the_next_rows(bench, monkeypatch):
    now = [0.0]
    for module in (run, entrant):
        monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    original = measure.measure

    def slow(*arguments, **keywords):
        now[0] += 6.0
        return original(*arguments, **keywords)

    monkeypatch.setattr(measure, "measure", slow)
    outcome, result = bench("--tokens", "1,4", "--budget", "5", "--compare", "xla")
    assert outcome.exit_code == 0, outcome.output
    assert [row["tokens"] for row in result["rows"]] == [1]
    assert result["rows"][0]["peers"]["xla"] == {"reason": "not begun: the budget of 5 s is spent"}
    assert [row["tokens"] for row in result["skipped"]] == [4]


def test_a_case_in_a_process_of_its_own_that_dies(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "measure_ceilings", lambda *arguments: Ceilings(0.1, 10.0, 20.0))
    name, out = "E6-k2-H32-I48", tmp_path / "out.json"
    options = BenchOptions((parse_case("6,2,32,48"),), tokens=(1, 4, 8), processes=True, out=out)
    told = []

    def progress(text):
        told.append(text)
        if text == f"{name}: T = 4, uniform":
            (child,) = multiprocessing.active_children()
            child.kill()

    result = run.run_bench(options, progress=progress)
    assert json.loads(out.read_text()) == result
    first, dead = result["rows"]
    assert first["error"] < 1e-5
    assert f"{name}: T = 1, uniform" in told
    assert dead["failed"] == "the process of this case ended with exit code -9"
    assert run.failures(result) == [f"{name}, T = 4: {dead['failed']}"]
    assert result["skipped"] == [{"case": name, "tokens": 8, "routing": "uniform"}]


def test_a_process_that_compiles_for_longer_than_the_budget_is_ended(monkeypatch):
    monkeypatch.setattr(run, "measure_ceilings", lambda *arguments: Ceilings(0.1, 10.0, 20.0))
    options = BenchOptions((parse_case("6,2,32,48"),), tokens=(1,), processes=True, budget=0.2)
    result = run.run_bench(options)
    assert result["rows"] == []
    assert len(result["skipped"]) == 1
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--case", "8,2,64"], ["E,k,H,I"]),
        (["--tokens", "few"], ["few"]),
        (["--compare", "megablox"], ["megablox", "vllm", "tokamax"]),
        (["--quantization", "fp9"], ["--quantization fp9", "fp8_block", "int4_group128_zp"]),
        (["--routing", "even"], ["even", "uniform", "zipf"]),
        (["--plot", "/nonexistent/x.png"], ["--plot", "/nonexistent"]),
    ],
)
def test_options_are_checked_before_the_work(bench, arguments, words):
    outcome, result = bench(*arguments)
    assert outcome.exit_code == 2
    assert result is None
    assert "Traceback" not in outcome.output
    assert all(word in outcome.stderr for word in words), outcome.stderr


def test_the_commit_is_that_of_the_source(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # where the command is called does not matter
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "site-packages" / "moe_jax" / "bench" / "run.py"))
    (tmp_path / "site-packages" / "moe_jax").mkdir(parents=True)
    assert environment.source_commit() is None
