"""The PTX that makes FP8 of four bits, carried out in NumPy for the 128 threads of a warpgroup: every byte and its place."""

import itertools
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import _compat_words
from moe_jax.kernels.hopper.fp8_from_four import _Thread
from moe_jax.quantization import fp8_blocks, prepare, quant_format, quantize
from moe_jax.quantization.prepared_fp8 import fp8_of
from tests import ptx
from tests.layers import normal

THREADS = np.arange(128, dtype=np.uint32)
WEIGHTS = 1 << 16  # where they begin in shared memory; codes begin at 0


class Shared:
    """Shared memory, whose loads and stores of 16 bytes take eight threads at a time, one for each group of banks."""

    def __init__(self, codes):
        self.bytes = np.zeros(2 * WEIGHTS, np.uint8)
        self.bytes[: codes.nbytes] = codes.reshape(-1).view(np.uint8)

    def _at(self, place, more, count):
        first = place.astype(np.int64) + more
        assert not (first % (4 * count)).any()
        if count == 4:
            assert (np.sort(first.reshape(-1, 8) // 16 % 8) == np.arange(8)).all(), "a conflict of banks"
        return first[:, None] + np.arange(4 * count)

    def load(self, place, more, count):
        return list(self.bytes[self._at(place, more, count)].view(np.uint32).T.copy())

    def store(self, place, more, words):
        self.bytes[self._at(place, more, len(words))] = np.stack(words, 1).view(np.uint8)


@pytest.mark.parametrize("swizzled", [64, 128])
@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_a_stage(name, swizzled):
    """Two blocks of rows, two of columns, NaN and scales far below the largest among them."""
    units, deep = 2, 2
    natural = quantize(normal(1, 1, 128, 256) * np.exp(3 * normal(2, 1, 128, 1)), quant_format(name).weights)
    scales = natural.scales.view(jnp.uint8).at[0, 5, 3].set(255 if name == "mxfp4" else 127)
    natural = type(natural)(
        natural.values, scales.view(natural.scales.dtype), None, natural.global_scale, spec=natural.spec
    )
    prepared = prepare(natural, "float8_e4m3fn")
    shared = Shared(np.asarray(prepared.values)[0])
    emitted = mock.patch.multiple(
        _compat_words,
        inline_ptx=ptx.run,
        thread=lambda: THREADS,
        address=lambda ref: np.full(128, {"codes": 0, "weights": WEIGHTS}[ref], np.uint32),
        load_at=shared.load,
        store_at=shared.store,
    )
    with emitted:
        thread = _Thread("codes", "weights", prepared.layout, deep, swizzled)
        for part in itertools.product(range(units), range(deep), range(2)):
            thread.decode(*part, *thread.load(*part))
    rows, columns = np.mgrid[:128, : deep * 128]
    tile = rows // 8 * (deep * 128 // swizzled) + columns // swizzled
    at = tile * 8 * swizzled + rows % 8 * swizzled + columns % swizzled
    at ^= at >> 3 & {64: 0x30, 128: 0x70}[swizzled]  # 16 bytes change places by the bits above 128 bytes
    found = shared.bytes[WEIGHTS + at]
    blocks = np.asarray(fp8_of(prepared.values, prepared.layout)).view(np.uint8)[0]
    np.testing.assert_array_equal(found, blocks.swapaxes(1, 2).reshape(128, -1))
    right = np.asarray(fp8_blocks(natural).values)[0]
    nan = np.isnan(right.astype(np.float32))
    assert nan.any() and (found[nan] & 127 == 127).all()
    np.testing.assert_array_equal(found[~nan], right.view(np.uint8)[~nan])
