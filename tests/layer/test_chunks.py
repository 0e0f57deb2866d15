"""Parts of ranks: each row, column and expert is on one of them, with its scale."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import MoEConfig, quantize_experts
from moe_jax.layer_test import chunks
from moe_jax.quantization import dequantize_experts
from tests.layers import experts_of

CONFIG = MoEConfig(5, 2, 32, 24, dtype="float32")


@pytest.mark.parametrize(("num", "sizes"), [(9, [3, 2, 2, 2]), (8, [2, 2, 2, 2]), (3, [1, 1, 1, 0])])
def test_rank_chunk(num, sizes):
    assert [chunks.rank_chunk(num, rank, 4) for rank in range(4)] == sizes


def test_chunk_by_rank():
    array = jnp.arange(12).reshape(2, 6)
    assert chunks.chunk_by_rank(array, 1, 3, axis=1).tolist() == [[2, 3], [8, 9]]
    assert chunks.maybe_chunk_by_rank(array, 0, 2).tolist() == [list(range(6))]
    assert chunks.maybe_chunk_by_rank(None, 0, 2) is None
    with pytest.raises(ValueError, match=r"axis 1 of shape \(2, 6\) has no 4 equal parts"):
        chunks.chunk_by_rank(array, 0, 4, axis=1)


def test_gate_and_up_rows():
    w13 = jnp.arange(8).reshape(1, 8, 1)
    parts = [chunks.tp_chunk_gate_up(w13, rank, 2)[0, :, 0].tolist() for rank in range(2)]
    assert parts == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_scales():
    assert chunks.chunk_scales(None, [0]) is None
    assert chunks.chunk_scales(jnp.float32(2.0), [0]) == 2.0
    assert chunks.chunk_scales(jnp.array([[1.0], [2.0], [3.0]]), [2, 0]).tolist() == [[3.0], [1.0]]


@pytest.mark.parametrize("name", [None, "fp8_channel", "fp8_tensor"])
def test_parts_stand_for_what_the_whole_stands_for_there(name):
    experts = experts_of(0, CONFIG)
    if name is not None:
        experts = quantize_experts(experts, name)
    matrices = lambda part: dequantize_experts(part, "float32")  # noqa: E731
    whole = matrices(experts)
    parts = [matrices(chunks.tp_chunk(experts, rank, 3)) for rank in range(3)]
    halves = [part.w13.reshape(5, 2, 8, 32) for part in parts]
    np.testing.assert_array_equal(jnp.concatenate(halves, axis=2).reshape(whole.w13.shape), whole.w13)
    np.testing.assert_array_equal(jnp.concatenate([part.w2 for part in parts], axis=2), whole.w2)
    some = matrices(chunks.expert_chunk(experts, [4, 0]))
    np.testing.assert_array_equal(some.w13, whole.w13[jnp.array([4, 0])])
    np.testing.assert_array_equal(some.w2, whole.w2[jnp.array([4, 0])])


def test_blocks_are_not_cut():
    with pytest.raises(ValueError, match="scales of blocks"):
        chunks.tp_chunk(quantize_experts(experts_of(0, CONFIG), "fp8_block"), 0, 2)
