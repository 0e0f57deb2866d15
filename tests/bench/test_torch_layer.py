"""The torch layer's timing, as far as it goes without a GPU."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import jax.numpy as jnp  # noqa: E402
import typer  # noqa: E402

from moe_jax import moe  # noqa: E402
from moe_jax.bench.cases import parse_case  # noqa: E402
from moe_jax.bench.inputs import make_inputs, make_weights  # noqa: E402
from moe_jax.bench.peers import Bound  # noqa: E402
from moe_jax_torch import set_launch  # noqa: E402

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "torch_layer.py"


@pytest.fixture(scope="module")
def torch_layer():
    spec = importlib.util.spec_from_file_location("torch_layer", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    set_launch("auto")


def test_ours_computes_the_layer(torch_layer):
    import jax

    config = parse_case("8,2,64,32").config("float32")
    weights = make_weights(config, jax.random.key(0))
    x, logits = make_inputs(config, 5)
    layer = torch_layer.launched(torch, config)(*(torch.from_dlpack(w) for w in (weights.w13, weights.w2)))
    found = torch.no_grad()(layer.function)(torch.from_dlpack(x), torch.from_dlpack(logits))
    expected = moe(x, weights, logits, config)
    assert np.linalg.norm(found.numpy() - expected) < 1e-6 * np.linalg.norm(expected)


def test_a_peer_that_fails_says_why(torch_layer):
    def bind(x, logits):
        raise RuntimeError("no room")

    assert torch_layer.measure_peer(bind, None, None, None) == {"reason": "RuntimeError: no room"}
    assert torch_layer.peer_of("none", parse_case("8,2,64,32").config("float32"), None)


def test_bits_are_compared(torch_layer):
    x = jnp.ones((3, 4))
    bound = Bound(lambda: x, lambda out: out, lambda out, rows: out[rows], "itself", layers=4)
    row = torch_layer.measure_peer(lambda *_: bound, x, None, np.ones((3, 4)))
    assert row["bits_of_jax"] and row["from_jax"] == 0 and row["layer_us"] >= 0
    row = torch_layer.measure_peer(lambda *_: bound, x, None, np.full((3, 4), 2.0))
    assert not row["bits_of_jax"] and row["from_jax"] == 0.5


def test_it_needs_a_gpu(torch_layer):
    with pytest.raises(typer.BadParameter, match="no GPU"):
        torch_layer.main()
