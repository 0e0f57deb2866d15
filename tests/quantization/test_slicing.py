"""Tensor-parallel parts stand for exactly what the whole stands for there, wherever the cuts fall."""

import dataclasses

import numpy as np
import pytest

from moe_jax.quantization import (
    Spec,
    join_halves,
    refine_blocks,
    slice_columns,
    slice_rows,
    split_columns,
    split_rows,
)
from tests.quantization import oracle
from tests.quantization.cases import SPECS, normal, quantize, value

SOME = ["fp8 tensor", "fp8 block ue8m0", "int8 channel", "int4 block zp", "nvfp4"]


def w13(name):
    """Two halves of 12 rows: neither halves nor thirds of them are whole blocks of 8 rows."""
    return quantize(normal(0, 2, 24, 36), SPECS[name], halves=2)


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("name", SOME)
def test_parts_of_gate_and_up(name, parts):
    array = w13(name)
    whole = np.asarray(value(array)).reshape(2, 2, 12, 36)
    split = split_rows(array, parts)
    assert len(split) == parts and len({part.spec for part in split}) == 1
    for rank, part in enumerate(split):
        share = whole[:, :, rank * 12 // parts : (rank + 1) * 12 // parts]
        np.testing.assert_array_equal(value(part.validate()), share.reshape(2, 24 // parts, 36))
    if array.spec.granularity == "block":
        assert split[0].spec.block[0] == {2: 2, 3: 4}[parts]


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("name", SOME)
def test_parts_of_the_contracted_axis(name, parts):
    """A quarter of 36 columns is nine: an odd number of int4 codes, and no whole blocks of 16."""
    array = quantize(normal(1, 2, 13, 36), SPECS[name])
    whole = np.asarray(value(array))
    split = split_columns(array, parts)
    assert len(split) == parts and len({part.spec for part in split}) == 1
    for rank, part in enumerate(split):
        share = whole[..., rank * 36 // parts : (rank + 1) * 36 // parts]
        np.testing.assert_array_equal(value(part.validate()), share)
    if array.spec.block is not None:
        assert split[0].spec.block[1] == {2: 2, 4: 1}[parts]


@pytest.mark.parametrize("cut", [(3, 12), (8, 9), (5, 5)], ids=str)
@pytest.mark.parametrize("name", SOME)
def test_any_rows_and_columns(name, cut):
    array = w13(name)
    whole = np.asarray(value(array))
    rows = slice_rows(array, *cut).validate()
    np.testing.assert_array_equal(
        value(rows), np.concatenate([whole[:, slice(*cut)], whole[:, 12:][:, slice(*cut)]], axis=1)
    )
    columns = slice_columns(array, 3 * cut[0], 3 * cut[1]).validate()
    np.testing.assert_array_equal(value(columns), whole[..., 3 * cut[0] : 3 * cut[1]])


def test_cuts_at_blocks_leave_blocks_alone():
    array = w13("fp8 block")
    assert split_rows(array, 1)[0].spec is split_columns(array, 1)[0].spec is array.spec
    assert slice_rows(array, 8, 12).spec is array.spec and slice_columns(array, 16, 36).spec is array.spec
    assert slice_columns(array, 16, 36).scales.shape == (2, 4, 2)
    even = quantize(normal(2, 2, 64, 64), SPECS["fp8 block"], halves=2)
    assert {part.spec for part in split_rows(even, 4) + split_columns(even, 4)} == {even.spec}


def test_a_part_is_what_is_quantized_of_the_part():
    """Cut at whole blocks, a part has the bits that quantizing the part gives: ranks may quantize their own."""
    x = normal(3, 2, 64, 64)
    whole = quantize(x, SPECS["fp8 block ue8m0"], halves=2)
    mine = np.concatenate([x[:, 16:32], x[:, 48:64]], axis=1)
    part = split_rows(whole, 2)[1]
    alone = quantize(mine, SPECS["fp8 block ue8m0"], halves=2)
    np.testing.assert_array_equal(oracle.bits(part.values), oracle.bits(alone.values))
    np.testing.assert_array_equal(np.asarray(part.scales).view(np.uint8), np.asarray(alone.scales).view(np.uint8))


def test_sums_over_parts_are_the_whole_product():
    """What tensor parallelism needs of w2: the partial products add up."""
    x, array = normal(4, 5, 36), quantize(normal(5, 13, 36), SPECS["int4 block zp"])
    whole = x.astype(np.float64) @ np.asarray(value(array), np.float64).T
    parts = [
        x[:, 12 * rank : 12 * rank + 12].astype(np.float64) @ np.asarray(value(part), np.float64).T
        for rank, part in enumerate(split_columns(array, 3))
    ]
    np.testing.assert_allclose(sum(parts), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["fp8 tensor", "int8 channel", "int4 block zp"])
def test_gate_and_up_are_joined(name):
    x = normal(6, 2, 24, 36)
    gate, up = (quantize(half, SPECS[name]) for half in np.split(x, 2, axis=1))
    joined, whole = join_halves(gate, up).validate(), quantize(x, SPECS[name], halves=2)
    np.testing.assert_array_equal(oracle.bits(joined.values), oracle.bits(whole.values))
    np.testing.assert_array_equal(np.asarray(joined.scales).view(np.uint8), np.asarray(whole.scales).view(np.uint8))
    assert joined.halves == 2 and (joined.zero_points is None) == (whole.zero_points is None)
    for wrong in (up[0], dataclasses.replace(up, halves=2), joined):
        with pytest.raises(ValueError, match="must agree, one half each"):
            join_halves(gate, wrong)


def test_cuts_that_cannot_be():
    array = w13("fp8 block")
    with pytest.raises(ValueError, match="12 rows of a half have no 5 equal parts.*slice_rows"):
        split_rows(array, 5)
    with pytest.raises(ValueError, match="36 columns have no 0 equal parts"):
        split_columns(array, 0)
    with pytest.raises(ValueError, match=r"\[3, 13\) must lie within the 12 rows of a half"):
        slice_rows(array, 3, 13)
    with pytest.raises(ValueError, match=r"\[-1, 2\) must lie within the 36 columns"):
        slice_columns(array, -1, 2)
    with pytest.raises(ValueError, match=r"block=\(3, 16\) does not divide block=\(8, 16\)"):
        refine_blocks(array, (3, 16))
    with pytest.raises(ValueError, match="'tensor' has no blocks"):
        refine_blocks(quantize(normal(7, 8, 8), Spec("int8", "tensor")), (1, 1))
