"""What a launcher hands to kernels, seen by kernels that write down what they are given. The kernels themselves need a GPU."""

import contextlib
import ctypes
import itertools
import threading

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.autograd.forward_ad as fwAD  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from moe_jax_torch import FusedMoE, fused_experts, launch, ops, set_launch  # noqa: E402
from moe_jax_torch import calls as operands  # noqa: E402
from moe_jax_torch.bridge import as_jax_dtype, own_memory  # noqa: E402
from moe_jax_torch.eager import is_plain  # noqa: E402
from moe_jax_torch.program import Launch, Place, Program, TensorType  # noqa: E402
from tests.interop.torch_layers import layer_of  # noqa: E402

# x -> first kernel -> workspace -> second kernel, which reads a constant and x again -> output
PROGRAM = Program(
    arguments=(TensorType((4, 8), "float32"), TensorType((4,), "int32")),
    outputs=(TensorType((2, 3), "bfloat16"),),
    constants=(np.arange(5, dtype=np.int32),),
    launches=(
        Launch(b"first", b"", (Place("argument", 0), Place("argument", 1), Place("workspace", 0, 256))),
        Launch(b"second", b"", (Place("workspace", 0, 256), Place("constant", 0), Place("output", 0))),
    ),
    workspace_bytes=512,
)


class Calls(list):
    """What kernels were given: (thread, kernel, stream, the addresses of its buffers)."""

    def kernel(self, name, num_buffers):
        def note(stream, address):
            buffers = (ctypes.c_uint64 * num_buffers).from_address(address)[:]
            self.append((threading.get_ident(), name, stream, *buffers))

        return note

    def load(self, program, *_):
        return {step.kernel: self.kernel(step.kernel, len(step.buffers)) for step in program.launches}


@pytest.fixture
def calls(monkeypatch):
    """The CPU stands in for a GPU whose kernels compute nothing and note what they are given."""
    noted = Calls()
    monkeypatch.setattr(launch, "_Context", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(launch, "_current_stream", lambda device: 7)
    monkeypatch.setattr(launch, "_load", noted.load)
    monkeypatch.setattr(launch, "_found", {})
    monkeypatch.setattr(launch, "_again", {})
    monkeypatch.setattr(launch, "_on_gpu", lambda tensor: True)
    monkeypatch.setattr(operands, "implementation_for", lambda platform: "mosaic")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: torch.Stream("cpu"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return noted


@pytest.fixture
def launcher(calls):
    made = launch.Launcher(PROGRAM, torch.device("cpu"))
    made.calls = calls
    return made


def aligned(values):
    """Where torch's GPU memory would be."""
    memory = torch.empty(values.numel() + 256, dtype=values.dtype)
    start = -memory.data_ptr() % 256 // values.element_size()
    return memory[start : start + values.numel()].view(values.shape).copy_(values)


def tensors():
    return aligned(torch.ones(4, 8)), aligned(torch.ones(4, dtype=torch.int32))


def run(launcher, x, ids):
    launcher.calls.clear()
    (out,) = launcher([x, ids], None)
    (_, *first), (_, *second) = launcher.calls
    return out, first, second


def test_kernels_are_given_the_tensors_themselves_in_order(launcher):
    x, ids = tensors()
    out, first, second = run(launcher, x, ids)
    assert (out.shape, out.dtype) == ((2, 3), torch.bfloat16)
    assert first[:4] == [b"first", 7, x.data_ptr(), ids.data_ptr()]
    assert second[:2] == [b"second", 7] and second[2] == first[4] and second[4] == out.data_ptr()
    assert (ctypes.c_int32 * 5).from_address(second[3])[:] == [0, 1, 2, 3, 4]


def test_other_tensors_are_seen(launcher):
    """The addresses of one call are not those of the next."""
    kept = []
    for _ in range(9):
        x, ids = tensors()
        out, first, second = run(launcher, x, ids)
        assert (first[2], second[4]) == (x.data_ptr(), out.data_ptr())
        kept.append((x, ids, out))


def test_few_arrays_are_kept(launcher, monkeypatch):
    monkeypatch.setattr(launch, "_MAX_ARRAYS", 4)
    for x, ids in [tensors() for _ in range(20)] * 2:
        assert run(launcher, x, ids)[1][2] == x.data_ptr()
        assert len(launcher._arrays) <= 4


def test_tensors_that_kernels_cannot_take_are_copied(launcher):
    seen = []

    def note(stream, address):
        x, ids, _ = ctypes.cast(address, ctypes.POINTER(ctypes.c_uint64 * 3)).contents
        seen.append(((ctypes.c_float * 32).from_address(x)[:], (ctypes.c_int32 * 4).from_address(ids)[:], x % 64))

    launcher._launches = [(note, 0)]
    wanted = torch.arange(32.0).reshape(4, 8)
    memory = torch.zeros(40)
    memory[1:33] = wanted.flatten()
    for x in (wanted, wanted.t().contiguous().t(), memory[1:33].view(4, 8)):
        operands = x, torch.tensor([3, -1, 2**31 - 1, 0])
        launcher(list(operands), lambda operands=operands: [aligned(own_memory(as_jax_dtype(t))) for t in operands])
    assert seen == [(wanted.flatten().tolist(), [3, -1, 2**31 - 1, 0], 0)] * 3


def test_threads_share_nothing(launcher):
    """Each call's kernels see the tensors of that call."""
    results: list = []

    def work():
        for _ in range(200):
            x, ids = tensors()
            results.append((threading.get_ident(), x.data_ptr(), launcher([x, ids], None)[0].data_ptr()))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for thread in {thread for thread, *_ in results}:
        expected = [rest for mine, *rest in results if mine == thread]
        first = [call[3] for call in launcher.calls if call[0] == thread and call[1] == b"first"]
        second = [call[5] for call in launcher.calls if call[0] == thread and call[1] == b"second"]
        assert expected == [list(pair) for pair in zip(first, second, strict=True)]


def layer_tensors(tokens, **options):
    layer = layer_of(tokens=tokens, hidden=64, intermediate=32, dtype=torch.bfloat16, **options)
    return [aligned(tensor) for tensor in layer[:5]]


def test_the_operator_launches_its_layer(calls):
    x, w1, w2, weights, ids = layer_tensors(16)
    out = fused_experts(x, w1, w2, weights, ids)
    assert 4 <= len(calls) <= 7 and len({name for _, name, *_ in calls}) == len(calls)
    first, *_, last = calls
    assert first[3] == ids.data_ptr() and last[-1] == out.data_ptr() and weights.data_ptr() in last
    for tensor in (x, w1, w2):
        assert sum(tensor.data_ptr() in call for call in calls) == 1
    memory = [address for call in calls for address in call[3:]]
    assert all(address % 64 == 0 for address in memory) and not any(a == b for a, b in itertools.pairwise(calls))


def test_token_counts_of_a_bucket_share_a_launcher_and_rows_of_no_token_have_no_expert(calls):
    for tokens in (16, 9, 13):
        calls.clear()
        x, w1, w2, weights, ids = layer_tensors(tokens)
        out = fused_experts(x, w1, w2, weights, ids)
        assert (out.shape, len(launch._found)) == ((tokens, 64), 1)
    assert x.data_ptr() not in itertools.chain(*calls) and w1.data_ptr() in itertools.chain(*calls)

    def look(stream, address):
        (first,) = (ctypes.c_uint64 * 1).from_address(address)
        seen.append(torch.tensor((ctypes.c_int32 * (16 * 3)).from_address(first)[:]).view(16, 3))

    seen, (launcher,) = [], launch._found.values()
    launcher._launches = [(look, 0)]
    fused_experts(x, w1, w2, weights, ids.long())  # a count that is no power of two, in another dtype
    launcher = list(launch._found.values())[-1]
    launcher._launches = [(look, 0)]
    fused_experts(x, w1, w2, weights, ids.long())
    assert torch.equal(seen[0][:13], ids) and (seen[0][13:] == -1).all() and seen[0].shape == (16, 3)


def test_what_does_not_fit_is_refused_also_where_its_bucket_is_known(calls):
    x, w1, w2, weights, ids = layer_tensors(13)
    fused_experts(x, w1, w2, weights, ids)
    calls.clear()
    more_weights, more_ids = layer_tensors(15)[3:]
    with pytest.raises(ValueError, match=r"topk_ids \(15, 3\).*with the T of hidden_states, 13"):
        fused_experts(x, w1, w2, more_weights, more_ids)
    with pytest.raises(ValueError, match="contracted axis comes last"):
        fused_experts(x, w1[:, 1:], w2, weights, ids)
    with pytest.raises(ValueError, match=r"topk_weights is \(13, 3\)"):
        fused_experts(x, w1, w2, weights, ids[:, :2])
    assert not calls


def test_weights_are_copied_where_kernels_cannot_read_them(calls, monkeypatch):
    monkeypatch.setattr(ops.known_weights, "_warned", False)
    x, w1, w2, weights, ids = layer_tensors(16)
    strided = w2.mT.contiguous().mT
    with pytest.warns(UserWarning, match="are copied at every call"):
        fused_experts(x, w1, strided, weights, ids)
    addresses = list(itertools.chain(*calls))
    assert strided.data_ptr() not in addresses and w1.data_ptr() in addresses


def test_a_module_without_gradients_launches_one_program(calls, monkeypatch):
    monkeypatch.setattr(ops, "check_range", lambda *_: None)  # of ids that no kernel has written
    layer = FusedMoE(8, 3, 64, 32, dtype=torch.bfloat16)
    x, logits = torch.randn(13, 64).bfloat16(), torch.randn(13, 8)
    with torch.no_grad():
        assert layer(x, logits).shape == (13, 64)
        assert len(launch._found) == 1
        with pytest.raises(ValueError, match="gating_output"):
            layer(x, logits[:12])
    whole = len(calls)
    layer(x, logits)
    assert len(launch._found) == 3 and len(calls) - whole > whole


@pytest.mark.parametrize("tokens", [8, 13])
def test_a_module_in_a_hurry_launches_the_same(calls, monkeypatch, tokens):
    """The second call finds its program by its arguments alone; others, and tensors that kernels cannot take, do not."""
    monkeypatch.setattr(launch, "ALIGNMENT", 16)  # what padding gets on a CPU
    layer = FusedMoE(8, 3, 64, 32, dtype=torch.bfloat16)
    for weight in (layer.w13_weight, layer.w2_weight):
        weight.data = aligned(weight.data)
    x, logits = aligned(torch.randn(tokens, 64).bfloat16()), aligned(torch.randn(tokens, 8))
    with torch.no_grad():
        layer(x, logits)
        first = [names for _, names, *_ in calls]
        calls.clear()
        monkeypatch.setattr(ops, "launch", None)  # no second search
        out = layer(x, logits)
        assert [names for _, names, *_ in calls] == first and out.shape == (tokens, 64)
        read = set(itertools.chain(*calls))
        assert {layer.w13_weight.data_ptr(), layer.w2_weight.data_ptr()} < read
        assert tokens == 13 or {x.data_ptr(), logits.data_ptr()} < read
        layer.w2_weight.data = aligned(layer.w2_weight.data)  # elsewhere
        layer(x, logits)
        assert layer.w2_weight.data_ptr() in set(itertools.chain(*calls))
        if tokens == 8:
            with pytest.raises(TypeError, match="NoneType"):  # it searches
                layer(x.t().contiguous().t(), logits)
        before = set_launch("never")
        with pytest.raises(TypeError, match="NoneType"):
            layer(x, logits)
        set_launch(before)
    for change in ({"top_k": 2}, {"activation": "gelu"}, {"renormalize": not layer.renormalize}):
        for name, value in change.items():
            before = getattr(layer, name)
            setattr(layer, name, value)
            with torch.no_grad(), pytest.raises(TypeError, match="NoneType"):
                layer(x, logits)
            setattr(layer, name, before)


def test_what_stands_between_a_call_and_its_kernel(monkeypatch):
    x = torch.ones(2)
    with torch.no_grad():
        assert is_plain(x, None, torch.nn.Parameter(x))
        with FakeTensorMode():
            assert not is_plain(torch.ones(2))
        with torch.overrides.TorchFunctionMode():
            assert not is_plain(x)
        with fwAD.dual_level():
            assert not is_plain(fwAD.make_dual(x, x))
        seen = []
        torch.vmap(lambda t: seen.append(is_plain(t)) or t)(torch.ones(2, 2))
        torch.jit.trace(lambda t: seen.append(is_plain(t)) or t + 1, x, check_trace=False)
        assert seen == [False, False]
    assert not is_plain(x)
    with torch.inference_mode():
        assert is_plain(x)


def test_a_capture_needs_what_was_compiled_before(calls, monkeypatch):
    tensors = layer_tensors(16)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"nothing is compiled yet for tensors of \(16, 64\), .* make one call"):
        fused_experts(*tensors)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    fused_experts(*tensors)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    calls.clear()
    assert fused_experts(*tensors).shape == (16, 64) and calls


def test_what_cannot_be_launched_says_why(calls, monkeypatch):
    monkeypatch.setattr(operands, "implementation_for", lambda platform: "xla")
    layer = layer_of()
    out = fused_experts(*layer[:5])  # by JAX
    assert torch.equal(fused_experts(*layer[:5]), out) and not calls
    before = set_launch("always")
    try:
        with pytest.raises(RuntimeError, match=r"set_launch\('always'\), but stablehlo\.\w+ of .* is no Mosaic kernel"):
            fused_experts(*layer[:5])
    finally:
        set_launch(before)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"JAX has to run this layer.*stablehlo"):
        fused_experts(*layer[:5])


def test_modes(monkeypatch):
    with pytest.raises(ValueError, match=r"'sometimes' is not one of auto, never, always"):
        set_launch("sometimes")
    assert set_launch("always") == "auto"
    try:
        layer = layer_of()  # on a CPU there is nothing to launch, and nothing to complain of
        assert fused_experts(*layer[:5]).shape == layer.x.shape
    finally:
        set_launch("auto")
