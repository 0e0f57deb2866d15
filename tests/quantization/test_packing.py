"""Nibbles: our own bytes, and the words of GPTQ, AWQ and compressed-tensors, against loops over single codes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import quantization as q
from moe_jax.quantization import packing
from tests.quantization.cases import normal, value

N, K, GROUP = 16, 64, 32
GROUPS = K // GROUP
CODES = np.random.default_rng(0).integers(0, 16, (2, N, K)).astype(np.uint8)
ZEROS = np.random.default_rng(1).integers(0, 16, (2, N, GROUPS)).astype(np.uint8)
SCALES = (0.1 + np.random.default_rng(2).random((2, N, GROUPS))).astype(np.float16)
# Column j of eight is in nibble AWQ_NIBBLE[j] of an AWQ word.
AWQ_NIBBLE = [0, 4, 1, 5, 2, 6, 3, 7]


def expected(zeros=None) -> np.ndarray:
    zeros = np.full_like(ZEROS, 8) if zeros is None else zeros
    per_column = np.repeat(SCALES.astype(np.float32), GROUP, axis=-1), np.repeat(zeros, GROUP, axis=-1)
    return (CODES.astype(np.float32) - per_column[1]) * per_column[0]


def words(codes: np.ndarray, axis: int, nibble_of=range(8)) -> np.ndarray:
    """Eight codes a word, code by code."""
    codes = np.moveaxis(codes, axis, -1)
    out = np.zeros((*codes.shape[:-1], codes.shape[-1] // 8), np.uint32)
    for index in np.ndindex(codes.shape):
        place = index[-1]
        out[(*index[:-1], place // 8)] |= np.uint32(codes[index]) << np.uint32(4 * nibble_of[place % 8])
    return np.moveaxis(out.view(np.int32), -1, axis)


def swap(array: np.ndarray) -> np.ndarray:
    return np.swapaxes(array, -1, -2)


def test_our_bytes_have_the_even_column_low():
    packed = np.asarray(q.quantize(np.float32([[-8, 7, 3]]), q.Spec("int4", "channel")).values)
    assert packed.tolist() == [[(15 << 4) | 0, 11]]


def test_every_byte_and_odd_sizes():
    packed = jnp.arange(256, dtype=jnp.uint8)
    codes = packing.unpack_int4(packed)
    assert codes.tolist() == [nibble for byte in range(256) for nibble in (byte & 15, byte >> 4)]
    np.testing.assert_array_equal(packing.pack_int4(codes), packed)
    odd = CODES[..., :37]
    assert packing.pack_int4(odd).shape == (2, N, 19)
    np.testing.assert_array_equal(packing.unpack_int4(packing.pack_int4(odd), 37), odd)
    assert packing.pack_int4(CODES[..., :0]).shape == (2, N, 0)


@pytest.mark.parametrize("axis", [-1, -2, 0])
def test_words_against_a_loop(axis):
    codes = CODES if axis != 0 else CODES.reshape(8, -1)
    np.testing.assert_array_equal(packing.pack_words(codes, axis), words(codes, axis))
    np.testing.assert_array_equal(packing.unpack_words(words(codes, axis), axis), codes)
    cut = np.take(codes, range(codes.shape[axis] - 3), axis)  # the last word is filled up
    np.testing.assert_array_equal(packing.unpack_words(packing.pack_words(cut, axis), axis, size=cut.shape[axis]), cut)


def check(array, zeros=None):
    assert array.shape == (2, N, K) and array.spec.block == (1, GROUP) and array.scales.dtype == jnp.float32
    np.testing.assert_array_equal(value(array), expected(zeros))


@pytest.mark.parametrize("less_one", [True, False])
def test_gptq(less_one):
    stored = (ZEROS - less_one) & 15
    parts = dict(qweight=words(swap(CODES), -2), scales=swap(SCALES), qzeros=words(swap(stored), -1))
    array = q.from_gptq(**parts, group=GROUP, zeros_less_one=less_one, g_idx=np.arange(K) // GROUP)
    check(array, ZEROS)
    back = q.to_gptq(array, zeros_less_one=less_one)
    for name, part in parts.items():
        np.testing.assert_array_equal(back[name], part)
    np.testing.assert_array_equal(back["g_idx"], np.tile(np.arange(K) // GROUP, (2, 1)))


def test_gptq_without_zero_points():
    array = q.from_gptq(words(swap(CODES), -2), swap(SCALES), group=GROUP)
    check(array)
    assert array.zero_points is None and not array.spec.asymmetric
    assert (np.asarray(q.to_gptq(array)["qzeros"]) == 0x77777777).all(), "a zero of 8 is stored less one"


def test_gptq_with_columns_out_of_order():
    order = np.random.default_rng(3).permutation(K) // GROUP
    with pytest.raises(ValueError, match="desc_act=True.*desc_act=False, or dequantize"):
        q.from_gptq(words(swap(CODES), -2), swap(SCALES), group=GROUP, g_idx=order)


def test_awq():
    parts = dict(
        qweight=words(swap(CODES), -1, AWQ_NIBBLE), scales=swap(SCALES), qzeros=words(swap(ZEROS), -1, AWQ_NIBBLE)
    )
    array = q.from_awq(**parts, group=GROUP)
    check(array, ZEROS)
    for name, part in parts.items():
        np.testing.assert_array_equal(q.to_awq(array)[name], part)
    check(q.from_awq(parts["qweight"], parts["scales"], group=GROUP))


def test_compressed_tensors():
    packed, zeros = words(CODES, -1), words(ZEROS, -2)
    array = q.from_compressed_tensors(packed, SCALES, zeros, group=GROUP)
    check(array, ZEROS)
    back = q.to_compressed_tensors(array)
    for name, part in dict(weight_packed=packed, weight_scale=SCALES, weight_zero_point=zeros).items():
        np.testing.assert_array_equal(back[name], part)
    assert back["weight_shape"].tolist() == [N, K]
    symmetric = q.from_compressed_tensors(packed, SCALES, group=GROUP)
    check(symmetric)
    assert "weight_zero_point" not in q.to_compressed_tensors(symmetric)


def test_odd_sizes_and_one_group_a_row():
    array = q.quantize(normal(4, 11, 37), q.Spec("int4", "group", 16, asymmetric=True))
    ct, gptq, awq = q.to_compressed_tensors(array), q.to_gptq(array), q.to_awq(array)
    for copy in (
        q.from_compressed_tensors(
            ct["weight_packed"], ct["weight_scale"], ct["weight_zero_point"], group=16, columns=37
        ),
        q.from_gptq(gptq["qweight"], gptq["scales"], gptq["qzeros"], group=16, columns=37),
        q.from_awq(awq["qweight"], awq["scales"], awq["qzeros"], group=16),
    ):
        assert jax.tree.structure(copy) == jax.tree.structure(array)
        jax.tree.map(np.testing.assert_array_equal, copy, array)
    whole_rows = q.from_compressed_tensors(ct["weight_packed"], ct["weight_scale"][:, :1], group=-1, columns=37)
    assert whole_rows.spec.block == (1, 37) and whole_rows.validate() is whole_rows


def test_what_these_checkpoints_cannot_hold():
    for wrong in (q.Spec("int8", "group", 16), q.Spec("int4", "channel")):
        for convert in (q.to_gptq, q.to_awq, q.to_compressed_tensors):
            with pytest.raises(ValueError, match="is not int4 with groups"):
                convert(q.quantize(normal(5, 8, 16), wrong))
    with pytest.raises(
        ValueError, match=r"the checkpoint's weight.scales has shape \(2, 16, 2\), but must be \(2, 16, 4\)"
    ):
        q.from_gptq(words(swap(CODES), -2), swap(SCALES), group=16)


def test_checks_discriminate():
    """The comparison notices a swapped pair of nibbles, or a zero point one off."""
    array = q.from_compressed_tensors(words(CODES, -1), SCALES, words(ZEROS, -2), group=GROUP)
    swapped = dataclasses.replace(array, values=(array.values >> 4) | (array.values << 4))
    shifted = dataclasses.replace(array, zero_points=(array.zero_points + 1) & 15)
    for wrong in (swapped, shifted):
        with pytest.raises(AssertionError):
            check(wrong, ZEROS)
