"""Tensors to arrays and back: values, who owns the memory, and what is refused."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from moe_jax_torch import bridge  # noqa: E402
from moe_jax_torch.bridge import DTYPES, to_jax, to_torch  # noqa: E402

ROOT = Path(__file__).parents[2]


def bytes_of(tensor):
    return tensor.contiguous().view(torch.uint8)


def codes(dtype, *shape):
    """Every bit pattern is as good as another, but those of bool."""
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    raw = torch.randint(
        0, 2 if dtype == torch.bool else 256, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=torch.uint8
    )
    return raw.view(dtype)


def pointer(array):
    return array.unsafe_buffer_pointer()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (16,), (0, 4), (4, 0)], ids=str)
def test_round_trip_keeps_every_bit_and_shares_memory_on_the_way_in(dtype, shape):
    tensor = codes(dtype, *shape)
    array = to_jax(tensor)
    assert array.shape == shape and array.dtype.name == DTYPES[dtype]
    if tensor.numel():
        assert pointer(array) == tensor.data_ptr()
    back = to_torch(array)
    assert back.dtype == dtype and back.shape == tensor.shape
    if tensor.numel():
        assert torch.equal(bytes_of(back), bytes_of(tensor))


def test_result_is_in_memory_of_torch():
    array = jnp.arange(64.0)
    back = to_torch(array)
    assert back.data_ptr() != pointer(array)
    back.fill_(7)
    assert float(array.sum()) == 2016


def test_scalars_cross():
    assert float(to_jax(torch.tensor(2.5))) == 2.5
    assert to_torch(jnp.float32(2.5)).shape == ()


def test_fp4_travels_as_bytes():
    raw = torch.arange(8, dtype=torch.uint8).reshape(2, 4)
    array = to_jax(raw.view(torch.float4_e2m1fn_x2))
    assert array.dtype == jnp.uint8 and array.tolist() == raw.tolist()


def test_int64_becomes_int32_and_never_wraps_around():
    assert to_jax(torch.tensor([-1, 2**31 - 1])).tolist() == [-1, 2**31 - 1]
    assert to_jax(torch.tensor([1, 2])).dtype == jnp.int32
    for value in (2**33 + 5, -(2**31) - 1):
        with pytest.raises(ValueError, match=f"{value}.*crosses as int32"):
            to_jax(torch.tensor([0, value]))


STRIDED = {
    "transposed": lambda t: t.t(),
    "gaps": lambda t: t[:, ::2],
    "columns": lambda t: t[:, 1:3],
    "expanded": lambda t: t[:1].expand(5, -1),
    "reversed axes": lambda t: t.reshape(2, 2, -1).permute(2, 1, 0),
    "rows": lambda t: t[1:],
    "not aligned": lambda t: t.flatten()[1:],
}


@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED)
def test_strides_and_addresses_that_jax_does_not_take_are_copied_to_the_default_layout(view):
    tensor = view(torch.arange(4 * 6, dtype=torch.float32).reshape(4, 6))
    array = to_jax(tensor)
    np.testing.assert_array_equal(array, tensor.numpy())
    assert array.format.layout.major_to_minor == tuple(range(array.ndim))
    assert pointer(array) % 64 == 0 and pointer(array) != tensor.data_ptr()


def test_an_unaligned_tensor_is_copied_once_not_twice(monkeypatch):
    copies = []
    clone = torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda self, **k: copies.append(clone(self, **k)) or copies[-1])
    array = to_jax(torch.arange(33.0)[1:])
    assert len(copies) == 1 and pointer(array) == copies[0].data_ptr()


@pytest.mark.parametrize("rows", [None, 3])
def test_out_is_written_in_place_whatever_its_strides(rows):
    array = jnp.arange(20.0).reshape(5, 4)
    expected = np.asarray(array)[:rows]
    big = torch.full((5, 4, 9), -1.0)[: len(expected)]
    for out in (big[:, :, 4], torch.full((4, len(expected)), -1.0).t(), torch.full(expected.shape, -1.0)):
        assert to_torch(array, out=out, rows=rows) is out
        np.testing.assert_array_equal(out, expected)
    others = [i for i in range(9) if i != 4]
    assert (big[:, :, others] == -1).all()


def test_out_that_does_not_fit_is_refused():
    array = jnp.zeros((2, 3))
    for out in (torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.float16), torch.zeros(2, 3, device="meta")):
        with pytest.raises((ValueError, TypeError), match="out is|meta"):
            to_torch(array, out=out)
    with pytest.raises(ValueError, match="requires a gradient"):
        to_torch(array, out=torch.zeros(2, 3, requires_grad=True))


def test_gradients_are_cut_only_when_told_so():
    leaf = torch.ones(3, requires_grad=True)
    for tensor in (leaf, leaf * 2):
        with pytest.raises(ValueError, match="detach=True"):
            to_jax(tensor)
        with torch.no_grad(), pytest.raises(ValueError, match="detach=True"):
            to_jax(tensor)
        assert to_jax(tensor, detach=True).shape == (3,)


def test_inference_tensors_and_parameters_cross():
    with torch.inference_mode():
        assert to_jax(torch.ones(3) * 2).tolist() == [2.0] * 3
    assert to_jax(torch.nn.Parameter(torch.ones(2), requires_grad=False)).tolist() == [1.0, 1.0]


def fake():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.empty(3)


REFUSED = {
    "fake": (fake, "FakeTensor"),
    "meta": (lambda: torch.empty(3, device="meta"), "meta tensor"),
    "sparse": (lambda: torch.eye(3).to_sparse(), "sparse_coo"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested"),
    "conj": (lambda: torch.ones(3, dtype=torch.complex64).conj(), "resolve_conj"),
    "neg": (lambda: torch.ones(3, dtype=torch.complex64).conj().imag, "resolve_neg"),
    "complex": (lambda: torch.ones(3, dtype=torch.complex64), "complex64 does not cross"),
    "float64": (lambda: torch.ones(3, dtype=torch.float64), "float64 does not cross; cast"),
    "numpy": (lambda: np.ones(3), "ndarray"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_cross_is_refused_by_name(make, message):
    with pytest.raises(TypeError, match=message):
        to_jax(make())


def test_tensors_that_vmap_and_grad_made_are_refused():
    def crossing(tensor):
        return to_torch(to_jax(tensor)).sum()

    for transform in (torch.vmap, torch.func.grad):
        with pytest.raises(TypeError, match="transforms"):
            transform(crossing)(torch.ones(3))


def test_arrays_that_cannot_cross_are_refused():
    deleted = jnp.ones(3)
    deleted.delete()
    with pytest.raises(ValueError, match="deleted"):
        to_torch(deleted)
    with pytest.raises(TypeError, match="int4"):
        to_torch(jnp.ones(4, jnp.int4))
    with pytest.raises(TypeError, match="tracer"):
        jax.jit(to_torch)(jnp.ones(3))
    with pytest.raises(TypeError, match="ndarray"):
        to_torch(np.ones(3))


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")
def test_a_gpu_that_jax_does_not_have_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with pytest.raises(RuntimeError, match=r"no cuda backend.*moe_jax\[cuda13\]"):
        bridge.check_device(torch.device("cuda", 0))
    with pytest.raises(RuntimeError, match="no memory with torch on xpu"):
        bridge.check_device(torch.device("xpu"))


def test_capture_of_a_cuda_graph_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="replay would return stale values"):
        bridge.check_device(torch.device("cuda", 0))
    assert to_jax(torch.ones(2)).shape == (2,)  # a CPU tensor has nothing to do with it


slow = jax.jit(lambda x: jax.lax.fori_loop(0, 30, lambda _, y: jnp.sin(y @ x), x))


@pytest.mark.parametrize("when", ["after the results are out", "before, which nothing can save"])
def test_results_are_right_when_inputs_are_overwritten_or_freed_as_soon_as_they_are_out(when):
    """JAX computes after the call has returned, on a CPU too: waiting for the results is what makes this safe."""
    generator = torch.Generator().manual_seed(0)
    corrupted = 0
    for _ in range(20):
        x = 0.1 * torch.randn(128, 128, generator=generator)
        expected = to_torch(slow(to_jax(x.clone())))
        result = slow(to_jax(x))
        if when.startswith("before"):
            x.fill_(float("nan"))
        out = to_torch(result)
        x.fill_(float("nan"))
        del x, result
        torch.full((128, 128), float("nan"))  # likely in the memory just freed
        corrupted += not torch.equal(out, expected)
    assert (corrupted > 0) == when.startswith("before")


def test_importing_starts_no_backend_of_jax_and_loads_no_transformers():
    code = "import sys, jax, moe_jax_torch; print('transformers' in sys.modules, flush=True); jax.devices()"
    # A platform that does not exist: a backend that started would have raised at the import, as the last statement does.
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'interop'}", "JAX_PLATFORMS": "no_such_platform"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout.strip()) == (1, "False"), done.stderr
    assert "no_such_platform" in done.stderr
