"""`moe-jax bench --quantization`: what it compares with, what it counts, and what it writes."""

import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import MoEConfig, moe
from moe_jax.bench import BenchOptions, measure, parse_case, plot, report, roofline, run
from moe_jax.bench import expected as module
from moe_jax.bench.entrant import Turn
from moe_jax.bench.expected import Expected
from moe_jax.bench.inputs import in_format, make_inputs, make_weights, weights_shape
from moe_jax.bench.processes import RemoteEntrant
from moe_jax.bench.roofline import Ceilings, expert_bytes, measure_ceilings
from moe_jax.quantization import FORMATS
from moe_jax.quantization import reference as quantized_reference
from moe_jax.quantization.prepared import PreparedArray
from moe_jax.reference import route
from tests.layers import plain

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="sizes and wording are those of a CPU")
needs_matplotlib = pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="needs matplotlib")


def problem(form, tokens=200, dtype="float32"):
    config = MoEConfig(num_experts=4, top_k=2, hidden_size=64, intermediate_size=48, dtype=dtype, quantization=form)
    made = make_weights(config, jax.random.key(0))
    return config, made, in_format(made, config), *make_inputs(config, tokens)


layer = plain(moe)


def test_end_to_end(bench):
    outcome, result = bench(
        *("--quantization", "fp8_tensor", "--tokens", 4, "--checks", "--compare", "ragged_dot,cutlass,sonicmoe")
    )
    assert outcome.exit_code == 0, outcome.output
    assert result["quantization"] == "fp8_tensor"
    (row,) = result["rows"]
    assert row["quantization"] == "fp8_tensor"
    assert 0 <= row["error"] < 1e-5
    assert 0.02 < row["error_unquantized"] < 0.2
    assert row["two_runs_bit_equal"] and "alone_bit_equal" not in row
    assert "other tokens" in row["alone_reason"]
    assert row["floor_memory_us"] < 4 * 6 * 3 * 32 * 48 / 20e9 * 1e6 / 2, "a byte a weight, not four"
    found = row["peers"]
    assert found["ragged_dot"] == found["sonicmoe"] == {"reason": "takes no quantized weights"}
    assert found["cutlass"] == {"reason": "takes fp8_channel of the quantized weights, not fp8_tensor"}
    for words in ("E6-k2-H32-I48, float32, fp8_tensor", "bit-equal: two runs ", "takes no quantized weights"):
        assert words in outcome.stdout


@pytest.mark.parametrize("form", ["nvfp4", "mxfp4", "int4_group32"])
def test_four_bits(bench, monkeypatch, form):
    """Prepared weights, counted with their scales; the sample is that of the codes; peers that take none say so."""
    seen = []

    def layer(x, weights, logits, **keywords):
        seen.append((weights.w13, weights.w2))
        return moe(x, weights, logits, **keywords)

    monkeypatch.setattr(measure, "moe", layer)
    outcome, result = bench(
        *("--quantization", form, "--dtype", "bfloat16", "--tokens", 4, "--checks", "--compare", "torch,vllm,deepgemm")
    )
    assert outcome.exit_code == 0, outcome.output
    assert all(isinstance(w, PreparedArray) for pair in seen for w in pair) and seen
    (row,) = result["rows"]
    assert 0 <= row["error"] < 1e-2 and 0.03 < row["error_unquantized"] < 0.3
    assert row["two_runs_bit_equal"] and row["alone_bit_equal"]
    assert all("layer_us" not in peer and form in peer["reason"] for peer in row["peers"].values())


def test_a_wrong_scale_in_the_layer_is_seen(bench, monkeypatch):
    def doubled(x, weights, logits, **keywords):
        w2 = dataclasses.replace(weights.w2, scales=weights.w2.scales.at[1].multiply(2.0))
        return moe(x, dataclasses.replace(weights, w2=w2), logits, **keywords)

    monkeypatch.setattr(measure, "moe", doubled)
    outcome, result = bench("--quantization", "fp8_block", "--tokens", 16)
    assert outcome.exit_code == 1
    assert "wrong output" in result["rows"][0]["failed"]
    assert result["rows"][0]["error"] > 0.05
    assert "layer_us" not in result["rows"][0]


@pytest.mark.parametrize("form", ["fp8_channel", "int8_channel_static", "int4_group32_zp"])
def test_the_reference_sees_what_the_codes_stand_for(form):
    config, made, weights, x, logits = problem(form, tokens=40)
    expected = Expected(config, weights, x, logits, made)
    sample = layer(x, weights, logits, config)[expected.sample]
    assert expected.error(sample) < 1e-3
    assert 0.01 < expected.error_unquantized(sample) < 0.3
    assert len(expected.outputs) == 1
    assert np.isnan(expected.error(sample.at[0, 0].set(jnp.nan)))


def test_a_scale_that_all_rows_share_is_that_of_the_whole_batch():
    config, _, weights, x, logits = problem("fp8_tensor")
    x = x.at[1].multiply(8.0)  # no token of the sample
    expected = Expected(config, weights, x, logits)
    assert 1 not in expected.sample
    sample = layer(x, weights, logits, config)[expected.sample]
    assert expected.error(sample) < 1e-3
    topk = route(logits[expected.sample], config)
    alone = quantized_reference.apply_experts(x[expected.sample], weights, topk, config, config.quantization)
    assert jnp.linalg.norm(sample - alone) > 1e-2 * jnp.linalg.norm(alone)


@pytest.mark.parametrize(("largest", "outputs"), [(8 + 1 / 16, 1), (8 + 1 / 64, 2)])
def test_where_a_shared_scale_may_round_either_way_both_are_right(monkeypatch, largest, outputs):
    config, _, weights, x, logits = problem("fp8_tensor", tokens=3, dtype="bfloat16")
    monkeypatch.setattr(module, "_largest_hidden", lambda *arguments: largest)
    expected = Expected(config, weights, x, logits)
    assert len(expected.outputs) == outputs
    assert all(expected.error(output) == 0 for output in expected.outputs)


def test_static_scales_come_with_the_weights():
    config, _, weights, x, _ = problem("fp8_tensor_static")
    assert jnp.max(jnp.abs(x)) < 8 and float(weights.w13_input_scale[0]) == pytest.approx(8 / 448)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), weights_shape(config)) == jax.tree.map(
        lambda a: (a.shape, a.dtype), weights
    )


def test_weights_are_counted_as_they_are_stored():
    def of(form):
        return expert_bytes(MoEConfig(4, 2, 256, 128, quantization=form), 3)

    assert of(None) == 3 * 3 * 256 * 128 * 2
    assert of("fp8_channel") == 3 * (3 * 256 * 128 + 4 * (2 * 128 + 256))
    assert of("fp8_block") == 3 * (3 * 256 * 128 + 4 * (2 * 2 + 2))
    assert of("nvfp4") == 3 * (3 * 256 * 128 * 9 // 16 + 4 * (2 + 1))
    assert of("mxfp4") == 3 * (3 * 256 * 128 * 17 // 32)
    assert of("int4_group64_zp") == 3 * (3 * 256 * 128 // 2 + 5 * 3 * 256 * 128 // 64)


@pytest.mark.parametrize("codes", ["float8_e4m3fn", "int8"])
def test_the_matmul_is_one_of_codes(monkeypatch, codes):
    def call(function, *operands):
        assert all(operand.dtype == codes for operand in operands)
        out = jax.jit(function)(*operands)
        assert out.dtype == {"float8_e4m3fn": "bfloat16", "int8": "int32"}[codes]
        return 2.0

    monkeypatch.setattr(roofline, "_microseconds", call)
    assert roofline._fastest_matmul(32, codes) == 2.0


def test_ceilings_of_a_format(monkeypatch):
    def fastest(size, dtype):
        if dtype == "int8":
            raise RuntimeError("no such algorithm")
        return {"float8_e4m3fn": 10.0, "bfloat16": 20.0}[dtype]

    monkeypatch.setattr(roofline, "_fastest_matmul", fastest)
    monkeypatch.setattr(roofline, "_microseconds", lambda *arguments: 1.0)

    def of(form, on_gpu=True):
        found = measure_ceilings("bfloat16", on_gpu, FORMATS.get(form))
        return found.matmul, found.matmul_reason

    assert of(None) == of("fp8_weight_block") == ("bfloat16", None)
    assert of("fp8_block") == ("float8_e4m3fn", None)
    assert of("nvfp4_fp8") == ("float8_e4m3fn", None) and of("nvfp4") == of("nvfp4_w4a4") == ("bfloat16", None)
    matmul, reason = of("int8_channel")
    assert matmul == "bfloat16" and "int8 failed (RuntimeError: no such algorithm)" in reason
    assert "no GPU" in of("fp8_block", on_gpu=False)[1]


def test_a_result_says_what_was_multiplied(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "measure_ceilings", lambda *arguments: Ceilings(1.0, 2.0, 3.0, "int8", "for a reason"))
    options = BenchOptions((parse_case("6,2,32,48"),), (4,), quantization="int8_block", budget=0.0, out=tmp_path / "r")
    result = run.run_bench(options)
    assert json.loads((tmp_path / "r").read_text()) == result
    assert result["quantization"] == "int8_block"
    assert (result["ceilings"]["matmul"], result["ceilings"]["matmul_reason"]) == ("int8", "for a reason")
    head = report.headline(result)
    assert "1 TFLOP/s of int8" in head and "for a reason" in head


@needs_matplotlib
def test_a_picture_names_the_format(monkeypatch, tmp_path):
    import matplotlib.figure

    titles = []
    monkeypatch.setattr(matplotlib.figure.Figure, "suptitle", lambda self, text, **options: titles.append(text))
    rows = [{"case": "a", "tokens": 1, "layer_us": 9.0, "dtype": "bfloat16", "quantization": "fp8_block"}]
    plot.save_plots({"device": "cpu", "commit": "abc1234", "date": "2026-01-01", "rows": rows}, tmp_path / "a.png")
    assert titles[0].startswith("Whole bfloat16 layer, fp8_block experts, uniform routing")


def test_a_process_that_dies_names_the_format(monkeypatch):
    class Dead(RemoteEntrant):
        def __init__(self, case, options):
            self.case, self.options, self.ended, self.failure = case, options, True, "it died"

    options = BenchOptions(tokens=(4,), dtype="bfloat16", quantization="fp8_block")
    (row,) = Dead(parse_case("6,2,32,48"), options).rows(Turn(Ceilings(1.0, 1.0, 1.0), 0.0), print)
    assert (row["failed"], row["quantization"], row["dtype"]) == ("it died", "fp8_block", "bfloat16")
