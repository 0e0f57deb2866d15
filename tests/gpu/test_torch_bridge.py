"""Layers that JAX runs for torch on a GPU: whose memory results are in, streams, graphs, and what a loop over experts gives."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

torch = pytest.importorskip("torch")

from moe_jax_torch import FusedMoE, fused_experts, fused_topk, set_launch, to_jax, to_torch  # noqa: E402
from tests.interop.torch_layers import TOLERANCE, Layer, layer_of  # noqa: E402
from tests.util import check_close  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

# float32 has no kernels, and a layer of it says so.
slow_in_float32 = pytest.mark.filterwarnings("ignore:.* runs its plain-JAX form on this GPU")

LARGE = {"tokens": 300, "hidden": 256, "intermediate": 192, "experts": 16, "top_k": 4}


@pytest.fixture(autouse=True)
def never_launched():
    """Without this only float32 would cross the bridge; what is launched is in test_torch_launch."""
    before = set_launch("never")
    yield
    set_launch(before)


def on_gpu(layer: Layer) -> Layer:
    kwargs = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in layer.kwargs.items()}
    return Layer(*(tensor.cuda() for tensor in layer[:5]), kwargs)


def run(layer: Layer, **more):
    return fused_experts(*layer[:5], **layer.kwargs, **more)


@slow_in_float32
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("arguments", [LARGE, LARGE | {"tokens": 1}, {"tokens": 0}, LARGE | {"bias": True}], ids=str)
def test_layer_and_out_equal_the_loop(arguments, dtype):
    layer = layer_of(dtype=dtype, **arguments)
    if layer.ids.shape[0] > 2:
        layer.ids[1] = -1
    out = run(there := on_gpu(layer))
    check_close(out.float().cpu(), layer.loop(), TOLERANCE[dtype])
    gaps = torch.zeros(*layer.x.shape, 2, dtype=dtype, device="cuda")
    assert torch.equal(run(there, out=gaps[..., 1]), out) and (gaps[..., 0] == 0).all()


@slow_in_float32
def test_gradients_equal_those_of_the_loop():
    layer = layer_of(**LARGE)
    results = []
    for here, function in ((layer, Layer.loop), (on_gpu(layer), run)):
        tensors = [tensor.clone().requires_grad_() for tensor in here[:4]]
        function(Layer(*tensors, here.ids, here.kwargs)).square().sum().backward()
        results.append([tensor.grad.cpu() for tensor in tensors])
    for expected, found in zip(*results, strict=True):
        check_close(found, expected, 1e-5)


def test_slices_are_copied_to_addresses_that_the_kernels_take():
    x = torch.arange(4096, device="cuda", dtype=torch.float32)
    for tensor in (x, x[1:], x[64:], x[::2]):
        array = to_jax(tensor)
        assert array.unsafe_buffer_pointer() % 256 == 0
        assert torch.equal(to_torch(array), tensor)
    assert to_jax(x[64:]).unsafe_buffer_pointer() == x[64:].data_ptr()


def test_int64_saturates():
    ids = torch.tensor([3, -1, 2**33 + 5, -(2**40)], device="cuda")
    assert to_jax(ids).tolist() == [3, -1, 2**31 - 1, -(2**31)]


def test_results_survive_early_frees_overwritten_inputs_and_other_work_of_jax():
    """A hand-over that shares JAX's memory fails this: torch's slow reader is queued when JAX reuses it."""
    double, noise = jax.jit(lambda x: 2 * x), jax.jit(lambda x: x * 0 - 1)
    other = jnp.ones((1 << 22,))
    readers = []
    for round_ in range(200):
        x = torch.full((1 << 22,), float(round_), device="cuda")
        torch.cuda._sleep(2_000_000)  # torch's stream is busy, so the copy waits in it
        out = to_torch(double(to_jax(x)))
        x.fill_(-7)
        readers.append((round_, out.amin(), out.amax()))
        del x, out
        other = noise(other) + noise(other)
    for round_, low, high in readers:
        assert low.item() == high.item() == 2 * round_


def test_side_streams_and_weights_that_change_on_them():
    layer = on_gpu(layer_of(**LARGE, dtype=torch.bfloat16))
    expected = [run(layer._replace(w1=layer.w1 * scale)) for scale in range(1, 9)]
    weight, found = layer.w1.clone(), []
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for scale in range(1, 9):
            torch.cuda._sleep(1_000_000)
            weight.copy_(layer.w1 * scale)
            found.append(run(layer._replace(w1=weight)))
    torch.cuda.synchronize()
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_a_cuda_graph_is_refused():
    """JAX runs on streams of its own."""
    layer = on_gpu(layer_of(**LARGE, dtype=torch.bfloat16))
    run(layer)
    with (
        pytest.raises(RuntimeError, match="replay would return stale values"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        run(layer)
    torch.cuda.synchronize()
    run(layer)


def test_compiled_module():
    layer = FusedMoE(
        num_experts=16, top_k=4, hidden_size=256, intermediate_size=192, device="cuda", dtype=torch.bfloat16
    )
    x, logits = torch.randn(33, 256, device="cuda", dtype=torch.bfloat16), torch.randn(33, 16, device="cuda")
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, fullgraph=True)(x, logits), layer(x, logits))
        assert fused_topk(x, logits, 4, True)[1].is_cuda


def test_memory_does_not_grow():
    layer = on_gpu(layer_of(**LARGE, dtype=torch.bfloat16))
    for _ in range(100):
        run(layer)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), jax.local_devices()[0].memory_stats()["bytes_in_use"]
    for _ in range(1000):
        run(layer)
    torch.cuda.synchronize()
    run(layer)  # lets go of what the calls before held
    after = torch.cuda.memory_allocated(), jax.local_devices()[0].memory_stats()["bytes_in_use"]
    assert all(late <= early + (16 << 20) for early, late in zip(before, after, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_the_current_gpu_stays_when_jax_starts():
    code = (
        "import torch\nfrom moe_jax_torch import to_jax\ntensor = torch.ones(2, device='cuda')\n"
        "array = to_jax(tensor)\nprint(torch.cuda.current_device(), torch.ones(2, device='cuda').device, array.device.id)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["0", "cuda:0", "0"]
