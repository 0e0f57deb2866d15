"""Kernels launched on torch's stream: the bits of JAX, CUDA graphs, streams, threads, memory, and what a call costs the host."""

import gc
import sys
import threading
import time

import pytest

torch = pytest.importorskip("torch")

from moe_jax_torch import FusedMoE, fused_experts, fused_topk, launch, ops, set_launch  # noqa: E402
from tests.interop.torch_layers import TOLERANCE, layer_of  # noqa: E402
from tests.util import check_close  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

SIZES = {"hidden": 256, "intermediate": 192, "experts": 16, "top_k": 4}
TOKENS = (1, 16, 33, 300)
WITH_TOKENS = (0, 3, 4)  # of the arguments: hidden states, weights and ids of the slots


@pytest.fixture(autouse=True)
def only_launched():
    """A layer that is not launched raises."""
    before = set_launch("always")
    yield
    set_launch(before)


def tensors_of(tokens, dtype=torch.bfloat16, **options):
    layer = layer_of(tokens=tokens, dtype=dtype, **SIZES | options)
    kwargs = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in layer.kwargs.items()}
    return layer, [tensor.cuda() for tensor in layer[:5]], kwargs


def by_jax(tensors, **kwargs):
    set_launch("never")
    try:
        return fused_experts(*tensors, **kwargs)
    finally:
        set_launch("always")


def captured(function, *tensors):
    function(*tensors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function(*tensors)
    return graph, out


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_bits_of_jax(dtype, tokens):
    layer, tensors, kwargs = tensors_of(tokens, dtype, bias=dtype == torch.float16)
    tensors[4][tokens // 2, 1:] = -1
    layer.ids.copy_(tensors[4])
    out = fused_experts(*tensors, **kwargs)
    assert torch.equal(out, by_jax(tensors, **kwargs))
    check_close(out.float().cpu(), layer.loop(), TOLERANCE[dtype])


def test_a_rank_and_int64_ids_and_out():
    layer, tensors, kwargs = tensors_of(16, local=[3, 9, 1, 0, 12])
    tensors[4] = tensors[4].long()
    out = fused_experts(*tensors, **kwargs)
    check_close(out.float().cpu(), layer.loop(), TOLERANCE[torch.bfloat16])
    gaps = torch.zeros(*out.shape, 2, dtype=out.dtype, device="cuda")
    assert torch.equal(fused_experts(*tensors, **kwargs, out=gaps[..., 1]), out) and (gaps[..., 0] == 0).all()
    x = tensors[0].clone()
    assert fused_experts(x, *tensors[1:], **kwargs, inplace=True) is x and torch.equal(x, out)


@pytest.mark.parametrize("tokens", [16, 33])
def test_a_replay_sees_new_inputs_and_weights(tokens):
    _, tensors, _ = tensors_of(tokens)
    graph, out = captured(fused_experts, *tensors)
    for seed in range(1, 6):
        _, new, _ = tensors_of(tokens, seed=seed)
        for tensor, values in zip(tensors, new, strict=True):
            tensor.copy_(values)
        tensors[4][seed] = -1
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, by_jax(tensors))


def test_several_graphs_and_eager_calls_do_not_disturb_each_other():
    _, tensors, _ = tensors_of(33)
    shorter = [[t[:n] if i in WITH_TOKENS else t for i, t in enumerate(tensors)] for n in (33, 16, 7)]
    expected = [by_jax(some) for some in shorter]
    graphs = [captured(fused_experts, *some) for some in shorter]
    for _ in range(20):
        for graph, out in graphs:
            out.fill_(float("nan"))
            graph.replay()
            fused_experts(*tensors)
        for (_, out), right in zip(graphs, expected, strict=True):
            assert torch.equal(out, right)


def test_token_counts_of_a_bucket_share_what_is_compiled():
    _, tensors, _ = tensors_of(64)
    whole = fused_experts(*tensors)
    compiled = len(launch._found), len(launch._kernels)
    for tokens in (33, 50, 63):
        some = [t[:tokens] if i in WITH_TOKENS else t for i, t in enumerate(tensors)]
        assert torch.equal(fused_experts(*some), whole[:tokens])
    assert (len(launch._found), len(launch._kernels)) == compiled


@pytest.mark.filterwarnings("ignore:.* runs its plain-JAX form")
def test_what_cannot_be_captured_says_why():
    _, tensors, _ = tensors_of(2)
    with (
        pytest.raises(RuntimeError, match="nothing is compiled yet for tensors of"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        fused_experts(*tensors)
    _, tensors, _ = tensors_of(16, torch.float32)
    with pytest.raises(RuntimeError, match=r"set_launch\('always'\), but stablehlo"):
        fused_experts(*tensors)
    set_launch("auto")
    out = fused_experts(*tensors)
    with pytest.raises(RuntimeError, match="JAX has to run this layer"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        fused_experts(*tensors)
    assert torch.equal(fused_experts(*tensors), out)


def test_a_module_is_one_operator_with_the_bits_of_two():
    layer = FusedMoE(16, 4, 256, 192, device="cuda", dtype=torch.bfloat16)
    for tokens in (1, 16, 33):
        x, logits = torch.randn(tokens, 256, device="cuda").bfloat16(), torch.randn(tokens, 16, device="cuda")
        with torch.no_grad():
            graph, out = captured(layer, x, logits)
            x.mul_(2), logits.neg_()
            graph.replay()
            assert torch.equal(out, layer(x, logits))
            assert torch.equal(fused_topk(x, logits, 4, True)[1], layer.select_experts(x, logits)[1])
        assert torch.equal(out, layer(x, logits).detach())  # routing, then experts


def test_torch_compiles_it_into_its_cuda_graphs():
    layer = FusedMoE(16, 4, 256, 192, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(layer, backend="cudagraphs", fullgraph=True)
    with torch.no_grad():
        for seed in range(5):
            torch.manual_seed(seed)
            x, logits = torch.randn(16, 256, device="cuda").bfloat16(), torch.randn(16, 16, device="cuda")
            assert torch.equal(compiled(x, logits), layer(x, logits))


def test_weights_that_kernels_cannot_read_in_place_are_copied_with_a_warning(monkeypatch):
    monkeypatch.setattr(ops.known_weights, "_warned", False)
    _, (x, w1, w2, weights, ids), _ = tensors_of(16)
    right = fused_experts(x, w1, w2, weights, ids)
    memory = torch.zeros(w1.numel() + 8, dtype=w1.dtype, device="cuda")
    shifted = memory[8:].view(w1.shape)  # 16 bytes further
    shifted.copy_(w1)
    with pytest.warns(UserWarning, match="are copied at every call"):
        assert torch.equal(fused_experts(x, shifted, w2, weights, ids), right)
    wide = torch.zeros(16, 512, dtype=x.dtype, device="cuda")
    wide[:, 256:] = x
    assert torch.equal(fused_experts(wide[:, 256:], w1, w2.mT.contiguous().mT, weights, ids), right)
    graph, out = captured(fused_experts, x, shifted, w2, weights, ids)
    shifted.mul_(2)
    graph.replay()
    assert torch.equal(out, fused_experts(x, w1 * 2, w2, weights, ids))


def test_streams_and_threads():
    """Each waits for its own work only: the weights are written on the stream of the call, behind a sleep."""
    _, tensors, _ = tensors_of(300)
    expected = [fused_experts(tensors[0], tensors[1] * scale, *tensors[2:]) for scale in range(1, 9)]
    torch.cuda.synchronize()
    wrong = []

    def work():
        with torch.cuda.stream(torch.cuda.Stream()):
            weight = tensors[1].clone()
            for _ in range(5):
                found = []
                for scale in range(1, 9):
                    torch.cuda._sleep(300_000)
                    torch.mul(tensors[1], scale, out=weight)
                    found.append(fused_experts(tensors[0], weight, *tensors[2:]))
                torch.cuda.current_stream().synchronize()
                wrong.extend(not torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 160 and not any(wrong)


def test_results_survive_early_frees_and_other_work_on_the_memory():
    """What a call allocated goes back to torch's allocator while its kernels still wait in the stream."""
    _, tensors, _ = tensors_of(300)
    expected = [fused_experts(tensors[0] * (1 + i), *tensors[1:]) for i in range(4)]
    torch.cuda.synchronize()
    for round_ in range(100):
        torch.cuda._sleep(1_000_000)
        outs = []
        for i in range(4):
            x = tensors[0] * (1 + i)
            outs.append(fused_experts(x, *tensors[1:]))
            del x
            torch.full((1 << 20,), float("nan"), device="cuda")  # lands where the workspace was
        for out, right in zip(outs, expected, strict=True):
            assert torch.equal(out, right), round_


def test_memory_does_not_grow():
    _, tensors, _ = tensors_of(16)
    for _ in range(100):
        fused_experts(*tensors)
    torch.cuda.synchronize()
    gc.collect()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), torch.cuda.mem_get_info()[0]
    for _ in range(10_000):
        fused_experts(*tensors)
    torch.cuda.synchronize()
    gc.collect()
    after = torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), torch.cuda.mem_get_info()[0]
    assert after[:2] == before[:2] and after[2] >= before[2] - (4 << 20)


def test_what_a_call_costs_the_host(capsys):
    """Beside that of a torch addition, the measure of the machine."""
    _, tensors, _ = tensors_of(16)

    def microseconds(function):
        rounds = []
        for _ in range(20):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(20):
                function()
            rounds.append((time.perf_counter() - start) / 20 * 1e6)
        return sorted(rounds)[10]

    with torch.no_grad():
        call, add = microseconds(lambda: fused_experts(*tensors)), microseconds(lambda: tensors[0] + tensors[0])
    with capsys.disabled():
        sys.stdout.write(f"\nan eager call takes {call:.1f} us of the host, a torch addition {add:.1f} us\n")
    assert call < max(60.0, 15 * add)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_devices():
    torch.cuda.set_device(0)  # another may be current where JAX has started before torch
    _, tensors, _ = tensors_of(16)
    there = [tensor.to("cuda:1") for tensor in tensors]
    out = fused_experts(*there)
    assert out.device == torch.device("cuda:1") and torch.cuda.current_device() == 0
    assert torch.equal(out.cpu(), fused_experts(*tensors).cpu())
