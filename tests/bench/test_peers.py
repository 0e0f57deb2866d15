"""Peers whose packages need a GPU, by stand-ins that compute the same: what they are called with, and what becomes of it."""

import contextlib
import importlib.util
import sys
import types

import jax
import pytest

from moe_jax import MoEConfig
from moe_jax.bench import entrant, peers
from moe_jax.bench.compiling import layers_a_call
from moe_jax.bench.expected import Expected
from moe_jax.bench.inputs import make_inputs, make_weights
from tests.bench.stand_ins import module

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "cpu" or not importlib.util.find_spec("torch"), reason="stand-ins on a CPU, in torch"
)
CONFIG = MoEConfig(num_experts=6, top_k=2, hidden_size=32, intermediate_size=48, dtype="float32")


def experts(x, w13, w2, weight, ids):
    import torch

    out = torch.zeros_like(x)
    for token, slot in torch.cartesian_prod(torch.arange(ids.shape[0]), torch.arange(ids.shape[1])):
        gate, up = (w13[ids[token, slot]] @ x[token]).chunk(2)
        out[token] += weight[token, slot] * (w2[ids[token, slot]] @ (torch.nn.functional.silu(gate) * up))
    return out


def topk(logits, k):
    import torch

    chosen, ids = torch.topk(logits, k)
    return torch.softmax(chosen, -1), ids


@pytest.fixture
def fake_vllm(monkeypatch):
    cuda = types.SimpleNamespace(is_cuda=lambda: True)
    for name in ("vllm", "vllm.model_executor", "vllm.model_executor.layers"):
        module(monkeypatch, name)
    module(monkeypatch, "vllm.platforms", current_platform=cuda)
    fused = "vllm.model_executor.layers.fused_moe"
    module(monkeypatch, fused, fused_topk=lambda x, logits, k, renormalize: (*topk(logits, k), None))
    sys.modules[fused].fused_experts = experts
    module(monkeypatch, f"{fused}.fused_moe", get_moe_configs=lambda *arguments: None)
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")  # set by the peer, and to be forgotten after the test
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "1")


@pytest.fixture
def fake_sonicmoe(monkeypatch):
    state = {}

    def route(logits, num_experts, k, softmax_over_topk, normalize):
        assert (num_experts, k, softmax_over_topk) == (6, 2, True)
        return topk(logits, k)

    def metadata(ids, num_experts, frequency, offsets, gather, scatter, reverse):
        assert (frequency.numel(), offsets.numel()) == (num_experts, num_experts + 1)
        assert gather.numel() == scatter.numel() == reverse.numel() == ids.numel()
        state["ids"] = ids

    def up(x, w1, bias, offsets, rows, k, *rest):
        assert w1.shape == (2 * 48, 32, 6)
        state.update(x=x, w1=w1)
        return "act", None

    def down(act, pre, w2, bias, scores, offsets, tokens, k, *rest):
        assert w2.shape == (32, 48, 6)
        return experts(state["x"], state["w1"].permute(2, 0, 1), w2.permute(2, 0, 1), scores, state["ids"])

    def function(apply):
        return types.SimpleNamespace(apply=apply)

    module(monkeypatch, "sonicmoe")
    module(monkeypatch, "sonicmoe.enums", ActivationType=str)
    module(
        monkeypatch,
        "sonicmoe.functional",
        TC_Softmax_Topk_Router_Function=function(route),
        TC_topk_router_metadata_triton=metadata,
        _UpProjection=function(up),
        _DownProjection=function(down),
    )


def row_of(name, tokens=17, seconds=0.01, on_gpu=False):
    weights = make_weights(CONFIG, jax.random.key(0))
    x, logits = make_inputs(CONFIG, tokens)
    expected = Expected(CONFIG, weights, x, logits)
    prepared = peers.prepare(name, peers.find_peer(name, CONFIG), weights)
    return entrant.measure_peer(prepared, CONFIG, x, logits, expected, seconds, on_gpu)


def test_vllm_agrees_and_says_that_it_is_not_tuned(fake_vllm):
    row = row_of("vllm")
    assert row["implementation"] == "vLLM fused_experts, Triton, ships no tuning for this shape"
    assert 0 < row["error"] < 1e-5
    assert row["layer_us"] > 0


def test_vllm_is_compiled_for_each_number_of_tokens_before_it_is_measured(fake_vllm, monkeypatch):
    import torch

    calls = []
    peer = peers.find_peer("vllm", CONFIG)
    original = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda shape, dtype, device: original(shape, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("done"))
    fused = sys.modules["vllm.model_executor.layers.fused_moe"]
    monkeypatch.setattr(fused, "fused_experts", lambda x, *rest: calls.append(tuple(x.shape)))
    peers.find_peer("vllm", CONFIG).warm([1, 16])
    assert calls == [(1, 32), (16, 32), "done"]
    monkeypatch.setattr(torch, "zeros", None)
    peer.warm([1])  # what fails here is reported when it is measured
    assert len(calls) == 3


def test_sonicmoe_agrees(fake_sonicmoe):
    row = row_of("sonicmoe")
    assert 0 < row.get("error", 1) < 1e-5, row
    assert row["layer_us"] > 0


@pytest.mark.parametrize("name", ["vllm", "sonicmoe", "tokamax"])
def test_what_is_not_installed_says_how_to_get_it(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    reason = row_of(name)["reason"]
    assert reason.startswith(f"{name} cannot be imported")
    assert f"pip install {peers.PACKAGES[name]}" in reason


def test_a_slow_peer_is_measured_less_often(monkeypatch):
    times, asked = iter([1e3, 0.2e6, 0.6e6]), []

    def kernel_times(*jitted, iterations):
        asked.append(iterations)
        return {"kernel": 9.0}

    monkeypatch.setattr(entrant, "kernel_times", kernel_times)
    monkeypatch.setattr(entrant, "call_time", lambda call, wait, seconds: next(times))
    rows = [row_of("xla", seconds=1.0, on_gpu=True) for _ in range(3)]
    assert [row["layer_us"] for row in rows] == [time / layers_a_call(17) for time in (1e3, 0.2e6, 0.6e6)]
    assert asked == [11, 5]
    assert "kernels_total_us" not in rows[2]


class FakeTorch:
    """Of torch what the capture of a graph needs."""

    def __init__(self, fails=False, free=100 * 2**30):
        self.log = []
        stream = types.SimpleNamespace(wait_stream=lambda other: None)
        graph = types.SimpleNamespace(replay=lambda: self.log.append("replay"))
        self.__version__ = "2.0"
        self.cuda = types.SimpleNamespace(
            Stream=lambda: stream,
            current_stream=lambda: stream,
            stream=lambda other: contextlib.nullcontext(),
            CUDAGraph=lambda: graph,
            graph=self.capture,
            is_available=lambda: True,
            mem_get_info=lambda: (free, 140 * 2**30),
        )
        self.fails = fails

    @contextlib.contextmanager
    def capture(self, graph, capture_error_mode):
        self.log.append("capture")
        if self.fails:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        yield


@pytest.mark.parametrize("fails", [False, True])
def test_a_graph_holds_several_layers(fails):
    torch = FakeTorch(fails)
    eager = peers.Bound(lambda: torch.log.append("layer"), lambda out: out, lambda out, rows: out, "torch")
    bound = peers._in_cuda_graph(torch, eager, 7)
    bound.call()
    if fails:
        assert torch.log == ["layer"] * 3 + ["capture", "layer"]
        assert bound.what == "torch, no CUDA graph (RuntimeError: operation not permitted)"
        assert bound.layers == 1
    else:
        assert torch.log == ["layer"] * 3 + ["capture"] + ["layer"] * 7 + ["replay"]
        assert bound.what == "torch, in a CUDA graph"
        assert bound.layers == 7


def test_torch_without_memory_is_told_how_to_get_it():
    peers._check_device(FakeTorch())
    with pytest.raises(peers.PeerUnavailable, match="2.0 GiB .* XLA_PYTHON_CLIENT_PREALLOCATE=false"):
        peers._check_device(FakeTorch(free=2 * 2**30))
