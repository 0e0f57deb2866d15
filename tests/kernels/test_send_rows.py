"""Rows to other GPUs: one rank in the interpreter, several lowered for CUDA. Ranks that meet need GPUs: tests/gpu."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moe_jax import _compat
from moe_jax.kernels.hopper import send_rows as kernel
from moe_jax.ops.exchange import send_rows
from tests.layers import normal
from tests.lowering import H200_MULTIPROCESSORS, MOSAIC, like, operations, without_strings

CASES = {
    "more rows than blocks": (37, 3, 37 * 3),
    "a row a block": (2, 1, 5),
    "a row": (1, 8, 9),
}


def problem(tokens, places, num_rows, share=0.5):
    """Rows of two arrays, notes, and places of which some are none; the first rows go nowhere."""
    random = np.random.default_rng(0)
    destinations = random.permutation(num_rows)[: tokens * places].reshape(tokens, places)
    destinations[random.random(destinations.shape) > share] = -1
    destinations[: tokens // 4] = -1
    arrays = [normal(0, tokens, 256, dtype="bfloat16"), normal(1, tokens, 32, dtype="float32")]
    notes = jnp.arange(tokens * 5, dtype=jnp.int32).reshape(tokens, 5)
    return arrays, jnp.asarray(destinations, jnp.int32), notes


def check(found, expected, destinations):
    """Bits of the rows that were sent, and of all notes."""
    sent = np.asarray(destinations)[np.asarray(destinations) >= 0]
    for mine, right in zip(found[0], expected[0], strict=True):
        np.testing.assert_array_equal(np.asarray(mine[sent]).view(np.uint8), np.asarray(right[sent]).view(np.uint8))
    if expected[1] is None:
        assert found[1] is None
    else:
        np.testing.assert_array_equal(found[1], expected[1])


@pytest.mark.parametrize("with_notes", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_one_rank(case, with_notes):
    arrays, destinations, notes = problem(*CASES[case])
    notes = notes if with_notes else None
    options = dict(num_rows=CASES[case][2], axis_names=())
    expected = send_rows(arrays, destinations, notes=notes, implementation="xla", **options)
    found = kernel.send_rows(
        arrays, destinations, notes, interpret=_compat.interpret_params(), multiprocessors=3, **options
    )
    check(found, expected, destinations)
    for row, places in enumerate(np.asarray(destinations)):
        for place in places[places >= 0]:
            assert (expected[0][0][place] == arrays[0][row]).all()
    if (np.asarray(destinations) >= 0).any():
        with pytest.raises(AssertionError):
            check(([jnp.roll(array, 1, axis=1) for array in found[0]], found[1]), expected, destinations)


def test_odd_rows_are_filled_up():
    x, destinations = normal(0, 3, 7, dtype="float32"), jnp.array([[2], [-1], [0]])
    (rows,), _ = send_rows([x], destinations, num_rows=3, axis_names=(), implementation="mosaic_interpret")
    assert rows.shape == (3, 7) and (rows[jnp.array([2, 0])] == x[jnp.array([0, 2])]).all()


def test_no_tokens_and_no_places():
    for shape in ((0, 3), (4, 0)):
        (rows,), notes = send_rows(
            [jnp.ones((shape[0], 8))],
            jnp.zeros(shape, jnp.int32),
            num_rows=5,
            axis_names=(),
            notes=jnp.ones((shape[0], 2), jnp.int32),
        )
        assert not rows.any() and rows.shape == (5, 8) and notes.shape == (1, shape[0], 2)


def test_the_gradient_is_the_way_back():
    arrays, destinations, _ = problem(5, 2, 10, share=1.0)
    cotangent, sent = normal(2, 10, 32, dtype="float32"), jnp.zeros(10, bool).at[destinations.reshape(-1)].set(True)

    def loss(x, implementation):
        (rows,), _ = send_rows([x], destinations, num_rows=10, axis_names=(), implementation=implementation)
        return jnp.sum(jnp.where(sent[:, None], rows, 0) * cotangent)

    expected = jnp.where((destinations >= 0)[..., None], cotangent[destinations], 0).sum(axis=1)
    for implementation in ("xla", "mosaic_interpret"):
        np.testing.assert_allclose(jax.grad(loss)(arrays[1], implementation), expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("shape", [(2,), (2, 4)])
def test_lowers_for_cuda_to_one_kernel(monkeypatch, shape, dtype):
    """Ranks of an axis, and of two; with the filling of tables."""
    monkeypatch.undo()
    names = ("ep", "tp")[: len(shape)]
    ranks = int(np.prod(shape))
    mesh = jax.make_mesh(shape, names, axis_types=(jax.sharding.AxisType.Auto,) * len(shape))
    run = functools.partial(send_rows, num_rows=ranks * 128, axis_names=names, implementation="mosaic")

    def body(x, destinations, notes):
        (rows,), all_notes = run([x], destinations, notes=notes)
        return rows, all_notes

    function = jax.shard_map(body, mesh=mesh, in_specs=P(names), out_specs=P(names), check_vma=False)
    rows = ranks * 128
    with mock.patch.object(_compat, "num_multiprocessors", lambda: H200_MULTIPROCESSORS):
        operands = like(dtype, rows, 7168), like("int32", rows, ranks), like("int32", rows, 16)
        lowered = jax.jit(function).trace(*operands).lower(lowering_platforms=("cuda",))
    found = operations(without_strings(lowered.as_text()))
    assert [count for name, count in found.items() if MOSAIC.fullmatch(name)] == [1]
    assert not {name for name in found if "gather" in name or "reduce" in name or "all_to_all" in name}


def test_what_it_does_not_send():
    assert kernel.supports([like("bfloat16", 4, 64)]) is None
    assert "multiple of 128 bytes; pad it" in kernel.supports([like("bfloat16", 4, 65)])
    assert "too long" in kernel.supports([like("float32", 4, 32 * 1024)])
    with pytest.raises(ValueError, match="too long"):
        x = jnp.zeros((1, 32 * 1024))
        send_rows([x], jnp.zeros((1, 1), jnp.int32), num_rows=1, axis_names=(), implementation="mosaic")
