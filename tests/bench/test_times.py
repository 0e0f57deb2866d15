"""Arithmetic of times and rates, on made-up measurements."""

import types

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.mosaic.gpu import profiler

from moe_jax import MoEConfig, _compat
from moe_jax.bench import inputs, measure, roofline, timing
from moe_jax.bench.cases import Case
from moe_jax.bench.compiling import Job, Layer, compile_all, layers_a_call, stack_logits
from moe_jax.bench.expected import Expected
from moe_jax.bench.roofline import Ceilings, floors


def test_floors_by_hand():
    config = MoEConfig(4, 2, 1000, 500, dtype="bfloat16")
    ceilings = Ceilings(matmul_tflops=100.0, copy_gb_per_s=1000.0, read_gb_per_s=2000.0)
    least = floors(config, 10, 3, ceilings)
    # weights: 3 experts x 3 x 1000 x 500 x 2 bytes = 9 MB; x and y: 2 x 10 x 1000 x 2 = 40 kB; logits: 10 x 4 x 4 = 160 B
    assert least.memory_us == pytest.approx(9_040_160 / 2e12 * 1e6)  # at the faster of the two rates
    # 10 tokens x 2 experts x 3 matrices x 1000 x 500 x 2 = 60 Mflop
    assert least.compute_us == pytest.approx(60e6 / 100e12 * 1e6)
    assert least.us == least.memory_us
    assert floors(config, 10_000, 4, ceilings).us == pytest.approx(60e9 / 100e12 * 1e6)


def test_ceilings_from_times(monkeypatch):
    times = iter([2.0, 3.0, 50.0, 30.0, 25.0])  # two matmuls, a copy, two sums, in microseconds
    monkeypatch.setattr(roofline, "call_time", lambda call, seconds: next(times))
    ceilings = roofline.measure_ceilings("float32", on_gpu=False)
    assert ceilings.matmul_tflops == pytest.approx(2 * 512**3 / 2e-6 / 1e12)
    assert ceilings.copy_gb_per_s == pytest.approx(2 * 4 * 2**23 / 50e-6 / 1e9)
    assert ceilings.read_gb_per_s == pytest.approx(4 * 2**23 / 25e-6 / 1e9)


def test_kernel_times_are_medians_by_name(monkeypatch):
    asked = {}

    def fake(function, **keywords):
        asked.update(keywords)
        runs = [[("up_mosaic_gpu_kernel", up), ("fusion", 0.5), ("fusion", 0.25)] for up in (0.003, 0.001, 0.002)]
        return lambda *operands: (function(*operands), runs)

    monkeypatch.setattr(profiler, "measure", fake)
    assert timing.kernel_times(jnp.sin, jnp.ones(3)) == pytest.approx({"up": 2.0, "fusion": 500.0, "fusion#2": 250.0})
    assert asked == {"iterations": 11, "aggregate": False}


def test_kernel_times_of_layers_whose_routing_comes_first(monkeypatch):
    run = [("route", 0.001), ("route", 0.003), ("up", 0.1), ("down", 0.2), ("up", 0.3), ("down", 0.4)]
    monkeypatch.setattr(_compat, "measure_kernels", lambda *arguments, iterations: [run])
    times = timing.kernel_times(jnp.sin, jnp.ones(3), layers=2)
    assert times == pytest.approx({"route": 2.0, "up": 200.0, "down": 300.0})
    assert timing.kernel_times(jnp.sin, jnp.ones(3))["route#2"] == pytest.approx(3.0)
    with pytest.raises(RuntimeError, match="3 layers"):
        timing.kernel_times(jnp.sin, jnp.ones(3), layers=3)


def test_no_kernel_is_an_error(monkeypatch):
    monkeypatch.setattr(_compat, "measure_kernels", lambda *arguments, iterations: [])
    with pytest.raises(RuntimeError, match="no kernel"):
        timing.kernel_times(jnp.sin, jnp.ones(3))


def test_call_time_divides_by_the_calls_and_ends_when_calls_are_slow(monkeypatch):
    now = [0.0]
    calls = []

    def call(seconds):
        calls.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(timing, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    assert timing.call_time(lambda: call(0.002), wait=lambda out: None) == pytest.approx(2000.0)
    assert len(calls) == 2 + 5 * 75
    calls.clear()
    assert timing.call_time(lambda: call(2.0), wait=lambda out: None) == pytest.approx(2e6)
    assert len(calls) == 2
    calls.clear()
    assert timing.call_time(lambda: call(0.06), wait=lambda out: None, seconds=1.0) == pytest.approx(6e4)
    assert len(calls) == 2 + 5 * 2  # rounds of 0.15 s
    calls.clear()
    assert timing.call_time(lambda: call(0.03), wait=lambda out: None, seconds=0.1) == pytest.approx(3e4)
    assert len(calls) == 2 + 4  # rounds of a single call until 0.1 s are over


def gpu_row(monkeypatch, kernel_times):
    config = Case("tiny", 4, 2, 32, 16).config("float32")
    monkeypatch.setattr(measure, "kernel_times", kernel_times)
    monkeypatch.setattr(measure, "call_time", lambda call, seconds: 10.0 * layers_a_call(64))
    layer, weights = measure.make_layer(config, "xla"), inputs.make_weights(config, jax.random.key(0))
    compile_all([Job(layer, config, weights, 64), Job(layer, config, weights, 64, stack=False)])
    x, logits = inputs.make_inputs(config, 64)
    return measure.measure(
        config,
        layer,
        weights,
        (x, logits),
        Expected(config, weights, x, logits),
        implementation="xla",
        ceilings=Ceilings(matmul_tflops=0.5, copy_gb_per_s=10.0, read_gb_per_s=1.0),
        checks=True,
        on_gpu=True,
    )


def test_a_gpu_row_has_the_keys_of_the_result_files(monkeypatch):
    kernels = {"route_topk": 1.0, "grouped_matmul_up": 4.0, "grouped_matmul_down": 2.0}
    row = gpu_row(monkeypatch, lambda *arguments, layers: kernels)
    flops = 64 * 2 * 3 * 32 * 16 * 2  # 393216
    assert row["kernel_us"] == kernels
    assert row["kernel_launches"] == 3
    assert row["kernel_tflops"]["grouped_matmul_up"] == round(flops * 2 / 3 / 4e-6 / 1e12, 1)
    assert row["weights_gb_per_s"]["grouped_matmul_down"] == round(4 * 32 * 16 * 4 / 2e-6 / 1e9)
    assert (row["kernels_total_us"], row["layer_us"]) == (7.0, 10.0)
    assert row["floor_memory_us"] == round((4 * 3 * 32 * 16 * 4 + 2 * 64 * 32 * 4 + 64 * 4 * 4) / 10e9 * 1e6, 2)
    assert row["floor_compute_us"] == round(flops / 0.5e12 * 1e6, 2)
    assert row["roofline"] == round(row["floor_memory_us"] / 10.0, 3)
    assert row["kernels_roofline"] == round(row["floor_memory_us"] / 7.0, 3)
    assert row["bound_us"] == round(1.10 * (4 * 3 * 32 * 16 * 4 / 1e9 * 1e6 + 10), 1)  # read rate, not the faster one
    assert row["touched_experts"] == 4
    assert row["rows_per_expert_max"] >= 64 * 2 / 4
    assert row["temp_bytes"] >= 0
    assert row["temp_bound_bytes"] == 64 * 2 * (16 + 32) * 4 + 2**20
    assert "failed" not in row


def test_a_row_without_kernel_times_says_why(monkeypatch):
    def broken(*arguments, layers):
        raise RuntimeError("CUPTI is taken")

    row = gpu_row(monkeypatch, broken)
    assert row["kernels_reason"] == "CUPTI is taken"
    assert row["layer_us"] == 10.0
    assert "kernel_us" not in row


def test_a_stack_is_so_many_layers():
    """Each on the output of the last, none computed once for all."""
    layer = Layer(lambda x, weights, logits: x @ weights + logits.sum())
    x, weights, logits = jnp.ones((3, 2)), 2 * jnp.eye(2), jnp.zeros((3, 4))
    first, last = layer.stack_at(3)(x, weights, stack_logits(logits))
    assert (first == 2).all() and (last == 2 ** layers_a_call(3)).all()
    lowered = layer.stacked.lower(x, weights, stack_logits(logits)).compile().as_text()
    assert lowered.count("dot(") == layers_a_call(3)


def test_kernel_times_of_a_stack_are_those_of_a_layer(monkeypatch):
    runs = [[("a_mosaic_gpu_kernel", 1e-3 * i), ("b", 2e-3), ("b", 5e-3)] * 2 for i in (1, 2, 3)]
    monkeypatch.setattr(timing._compat, "measure_kernels", lambda *operands, iterations: runs)
    assert timing.kernel_times(print, layers=2) == pytest.approx({"a": 2.0, "b": 2.0, "b#2": 5.0})
    with pytest.raises(RuntimeError, match="call of 4 layers"):
        timing.kernel_times(print, layers=4)


def test_many_tokens_have_no_bound():
    config = MoEConfig(4, 2, 1000, 500)
    assert roofline.bound_us(config, 129, 4, Ceilings(1.0, 1.0, 1.0)) is None


def test_what_does_not_compile_ahead_is_left_to_the_call():
    config = Case("tiny", 4, 2, 32, 16).config("float32")
    layer = Layer(lambda x, weights, logits: x @ weights)
    shape = jax.ShapeDtypeStruct((32, 8), "float32")
    wrong = jax.ShapeDtypeStruct((7, 8), "float32")
    compile_all([Job(layer, config, weights, count, stack=False) for count, weights in ((5, shape), (6, wrong))])
    assert set(layer.compiled) == {5} and not layer.compiled_stacks
    assert layer(jnp.ones((5, 32)), jnp.ones((32, 8)), jnp.ones((5, 4))).shape == (5, 8)
    with pytest.raises(TypeError):
        layer(jnp.ones((6, 32)), jnp.ones((7, 8)), jnp.ones((6, 4)))
