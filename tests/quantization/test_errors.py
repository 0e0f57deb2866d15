"""How far each format is off on data of unit RMS, and that the comparison would notice a wrong scale; the benchmark of it."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from moe_jax.config import MoEConfig
from moe_jax.quantization import FORMATS
from tests.quantization.cases import ERRORS, dequantize, normal, quantize
from tests.util import assert_discriminates, check_close, relative_error

WEIGHTS = normal(0, 64, 2048)


def load_benchmark(name="quantization_error"):
    path = Path(__file__).parents[2] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", FORMATS)
def test_errors_are_those_that_the_format_must_have(name):
    """Neither worse nor, which would mean that the check looks at the wrong thing, better."""
    back = np.asarray(dequantize(quantize(WEIGHTS, FORMATS[name].weights)))
    assert relative_error(back, WEIGHTS) == pytest.approx(ERRORS[name], rel=0.04)
    assert_discriminates(lambda w: check_close(w, WEIGHTS, 1.04 * ERRORS[name]), back)


@pytest.mark.parametrize("name", ["fp8_tensor", "fp8_channel", "fp8_block", "int8_channel", "int8_block"])
def test_errors_do_not_depend_on_the_size_of_the_values(name):
    """Activations of any magnitude; with a scale a row, or a piece of it, each row of its own."""
    spec = FORMATS[name].activations
    error = relative_error(dequantize(quantize(WEIGHTS, spec)), WEIGHTS)
    sizes = np.full((64, 1), 1e-3, np.float32)
    if spec.granularity != "tensor":
        sizes = np.exp2(np.arange(-32, 32, dtype=np.float32))[:, None] * np.float32(1e-1)
    scaled = np.asarray(dequantize(quantize(WEIGHTS * sizes, spec))) / sizes
    assert relative_error(scaled, WEIGHTS) == pytest.approx(error, rel=0.02)


def test_the_benchmark_measures_and_prints():
    benchmark = load_benchmark()
    config = MoEConfig(num_experts=2, top_k=1, hidden_size=128, intermediate_size=64)
    result = benchmark.measure(["fp8_tensor_static"], shape=(16, 512), config=config, tokens=8, tails=("normal",))
    (row,) = result["rows"]
    assert row["bits_per_weight"] == 8.004
    assert row["weights_normal"] == pytest.approx(2.65e-2, rel=0.1)
    assert row["layer_normal"] == pytest.approx(6.5e-2, rel=0.3)
    lines = benchmark.table(result).splitlines()
    assert len(lines) == 3 and lines[-1].startswith("| fp8_tensor_static | 8.00 |")


@pytest.mark.once
def test_the_benchmark_on_a_layer_that_was_trained_on_text():
    """A few steps of training need fewer bits a byte; formats of four bits with and without activations."""
    config = MoEConfig(num_experts=2, top_k=1, hidden_size=64, intermediate_size=32)
    train = load_benchmark("text_layer").train
    before, after = (train(config, steps, tokens=64) for steps in (1, 12))
    assert after.bits_a_byte < 0.95 * before.bits_a_byte and np.isfinite(after.bits_a_byte)
    assert after.x.shape == (64, 64) and after.topk.ids.shape == (64, 1)
    benchmark = load_benchmark()
    names = ["nvfp4", "nvfp4_w4a4_static"]
    result = benchmark.measure(names, shape=(16, 512), config=config, tokens=8, tails=(), trained=after)
    alone, both = result["rows"]
    assert alone["activations_text"] is None and 0.05 < both["activations_text"] < 0.2
    assert 0.05 < alone["weights_text"] == both["weights_text"] < 0.15
    assert alone["layer_text"] < both["layer_text"] < 1
    assert benchmark.table(result).splitlines()[2].startswith("| nvfp4 | 4.5")
