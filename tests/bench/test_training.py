"""The script that times training, as far as it goes without a GPU."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest
import typer

from moe_jax import moe
from moe_jax.bench.cases import parse_case
from moe_jax.bench.inputs import make_inputs, make_weights
from tests.lowering import an_h200
from tests.util import check_close

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "training.py"
CONFIG = parse_case("8,2,64,32").config("float32")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("training_script", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_timed_is_the_gradient_of_the_layer(script):
    experts, (x, logits) = make_weights(CONFIG, jax.random.key(0)), make_inputs(CONFIG, 9)
    g = jax.random.normal(jax.random.key(1), x.shape)
    y, (dx, d_experts, d_logits) = script.functions(CONFIG)["both"](x, experts, logits, g)
    right = jax.grad(lambda x: (moe(x, experts, logits, CONFIG) * g).sum())(x)
    check_close(dx, right, 1e-6)
    assert d_experts.w13.shape == experts.w13.shape and np.any(np.asarray(d_logits))
    np.testing.assert_array_equal(y, jax.vjp(lambda x: moe(x, experts, logits, CONFIG), x)[0])
    assert script.rate(CONFIG, 10, 1.0) == round(18 * 10 * 2 * 64 * 32 / 1e6, 1)


def test_torch_has_the_same_gradient(script):
    pytest.importorskip("torch")
    experts, (x, logits) = make_weights(CONFIG, jax.random.key(0)), make_inputs(CONFIG, 9)
    operands = x, experts, logits, jax.random.normal(jax.random.key(1), x.shape)
    _, (dx, _, _) = script.functions(CONFIG)["both"](*operands)
    assert script.by_torch(CONFIG, operands, dx)["dx_from_ours"] < 1e-5
    assert script.by_torch(CONFIG, operands, 2 * dx)["dx_from_ours"] > 0.5


@pytest.mark.parametrize("precision, kernels", [("bfloat16", 13), ("fp8", 19)])
def test_it_lowers_for_cuda(script, capsys, precision, kernels):
    with an_h200():
        script.main(["16,2,256,128"], tokens="100", precision=[precision], dry=True)
    assert capsys.readouterr().out == f"16,2,256,128 100 {precision}: {kernels} Mosaic kernels\n"


def test_a_step_is_compiled_and_compared(script):
    (programs,) = script.compile_all([(CONFIG, 9)])
    experts, (x, logits) = make_weights(CONFIG, jax.random.key(0)), make_inputs(CONFIG, 9)
    found = programs["both"](x, experts, logits, x)
    other = programs["both"](x, experts, logits, 2 * x)
    assert set(programs) == {"forward", "both"}
    assert script.errors(found, found) == dict.fromkeys(("y", "x", "w13", "w2", "logits"), 0.0)
    assert script.errors(other, found) == pytest.approx({"y": 0, "x": 1, "w13": 1, "w2": 1, "logits": 1}, abs=1e-5)


def test_what_is_unknown_is_refused(script):
    with pytest.raises(typer.BadParameter, match="no GPU"):
        script.main(["small"])
    with pytest.raises(typer.BadParameter, match="'fp4' must be one of bfloat16, fp8"):
        script.main(["small"], precision=["fp4"])
