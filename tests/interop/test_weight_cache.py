"""Weights that crossed once: what they see of later changes, and how long they live."""

import gc
import weakref

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from moe_jax_torch import WeightCache  # noqa: E402


def parameter(*shape):
    return torch.nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(0)))


def test_writes_in_place_are_seen_without_a_new_import():
    cache, weight = WeightCache(), parameter(8, 4)
    array = cache(weight)
    with torch.no_grad():
        weight.mul_(3)
        weight.data.add_(1)
    assert cache(weight) is array
    np.testing.assert_array_equal(array, weight.detach().numpy())


# All but the first keep the address; each keeps what the others change where it can.
CHANGES = {
    "storage": lambda t: t.clone(),
    "shape": lambda t: t[:4],
    "stride": lambda t: t.t(),
    "dtype": lambda t: t.view(torch.int32),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.filterwarnings("ignore:weights of shape")
def test_another_storage_shape_stride_or_dtype_is_imported_anew(change):
    cache, weight = WeightCache(), torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    before = cache(weight)
    weight.data = change(weight.data)
    array = cache(weight)
    assert array is not before
    np.testing.assert_array_equal(array, weight.numpy(), strict=True)


def test_what_must_be_copied_is_never_kept_and_warns_once():
    cache, weight = WeightCache(), torch.randn(33)[1:]
    with pytest.warns(UserWarning, match=r"copied at every call.*p\.data = p\.data\.clone") as caught:
        cache(weight)
        weight.fill_(2)
        assert float(cache(weight).sum()) == 64
    assert len(caught) == 1 and len(cache) == 0


def test_the_cache_keeps_no_memory_alive():
    memory = np.zeros(1024 + 64, np.uint8)
    start = -memory.ctypes.data % 64
    weight = torch.from_numpy(memory[start : start + 1024]).view(torch.float32)
    memory = weakref.ref(memory)
    cache = WeightCache()
    cache(weight)
    assert len(cache) == 1 and memory() is not None
    del weight
    gc.collect()
    assert len(cache) == 0
    cache(torch.ones(4))  # JAX lets go of what was dropped at its next call
    gc.collect()
    assert memory() is None


def test_two_views_of_one_storage_are_two_entries():
    cache, whole = WeightCache(), torch.randn(4, 64)
    first, second = whole[:2], whole[2:]
    assert cache(first).tolist() == first.tolist() and cache(second).tolist() == second.tolist()
    assert len(cache) == 2
