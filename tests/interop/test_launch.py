"""What a launcher hands to kernels, seen by kernels that write down what they are given. The kernels themselves need a GPU."""

import contextlib
import ctypes
import threading

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from moe_jax_torch import fused_experts, launch, set_launch  # noqa: E402
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


@pytest.fixture
def launcher(monkeypatch):
    """A launcher on a CPU whose kernels note their addresses in `calls`."""
    calls = []

    def kernel(name):
        def launch_it(stream, address):
            buffers = ctypes.cast(address, ctypes.POINTER(ctypes.c_uint64 * 3)).contents
            calls.append((threading.get_ident(), name, stream, *buffers))

        return launch_it

    monkeypatch.setattr(launch, "_Context", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(launch, "current_raw_stream", lambda device: 7)
    monkeypatch.setattr(launch, "_load", lambda program, *_: {b: kernel(b) for b in (b"first", b"second")})
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: torch.Stream("cpu"))
    made = launch.Launcher(PROGRAM, torch.device("cpu"))
    made.calls = calls
    return made


def run(launcher, x, ids):
    launcher.calls.clear()
    (out,) = launcher((x, ids))
    (_, *first), (_, *second) = launcher.calls
    return out, first, second


def test_kernels_are_given_the_tensors_themselves_in_order(launcher):
    x, ids = torch.ones(4, 8), torch.ones(4, dtype=torch.int32)
    out, first, second = run(launcher, x, ids)
    assert (out.shape, out.dtype) == ((2, 3), torch.bfloat16)
    assert first[:4] == [b"first", 7, x.data_ptr(), ids.data_ptr()]
    assert second[:2] == [b"second", 7] and second[2] == first[4] and second[4] == out.data_ptr()
    assert (ctypes.c_int32 * 5).from_address(second[3])[:] == [0, 1, 2, 3, 4]


def test_other_tensors_are_seen(launcher):
    """The addresses of one call are not those of the next."""
    ids, kept = torch.ones(4, dtype=torch.int32), []
    for _ in range(launch._MAX_ARRAYS // 256 + 5):
        x = torch.ones(4, 8)
        out, first, second = run(launcher, x, ids)
        assert (first[2], second[4]) == (x.data_ptr(), out.data_ptr())
        kept.append((x, out))


def test_few_arrays_are_kept(launcher, monkeypatch):
    monkeypatch.setattr(launch, "_MAX_ARRAYS", 4)
    ids, tensors = torch.ones(4, dtype=torch.int32), [torch.ones(4, 8) for _ in range(20)]
    for x in tensors * 2:
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
        launcher((x, torch.tensor([3, -1, 2**40, 0])[:4].clamp(max=2**31 - 1)))
    assert seen == [(wanted.flatten().tolist(), [3, -1, 2**31 - 1, 0], 0)] * 3


def test_threads_share_nothing(launcher):
    """Each call's kernels see the tensors of that call."""
    ids = torch.ones(4, dtype=torch.int32)

    def work():
        for _ in range(200):
            x = torch.ones(4, 8)
            results.append((threading.get_ident(), x.data_ptr(), launcher((x, ids))[0].data_ptr()))

    results: list = []
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


def test_modes(monkeypatch):
    with pytest.raises(ValueError, match=r"'sometimes' is not one of auto, never, always"):
        set_launch("sometimes")
    assert set_launch("always") == "auto"
    try:
        layer = layer_of()  # on a CPU there is nothing to launch, and nothing to complain of
        assert fused_experts(*layer[:5]).shape == layer.x.shape
    finally:
        set_launch("auto")
