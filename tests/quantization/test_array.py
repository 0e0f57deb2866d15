"""`QuantizedArray` as a pytree, its properties, what it refuses."""

import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from moe_jax import quantization
from moe_jax.quantization import QuantizedArray, Spec, pad_columns
from moe_jax.types import ExpertWeights
from tests.quantization import oracle
from tests.quantization.cases import SPECS, normal, quantize, value

SOME = ["fp8 tensor", "fp8 block ue8m0", "int8 channel", "int4 group zp", "nvfp4"]
NUM, ROWS, COLUMNS = 3, 10, 37


def array_of(name="fp8 block ue8m0", halves=2) -> QuantizedArray:
    return quantize(normal(0, NUM, ROWS, COLUMNS), SPECS[name], halves=halves)


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


@pytest.mark.parametrize(
    ("name", "scales", "values", "nbytes"),
    [
        ("fp8 tensor", (3, 2), (3, 10, 37), 3 * 10 * 37 + 3 * 2 * 4),
        ("fp8 block ue8m0", (3, 2, 3), (3, 10, 37), 3 * 10 * 37 + 3 * 2 * 3),
        ("int8 channel", (3, 10), (3, 10, 37), 3 * 10 * 37 + 3 * 10 * 4),
        ("int4 group zp", (3, 10, 3), (3, 10, 19), 3 * 10 * 19 + 3 * 10 * 3 * 5),
        ("mxfp4", (3, 10, 3), (3, 10, 19), 3 * 10 * 19 + 3 * 10 * 3),
        ("nvfp4", (3, 10, 3), (3, 10, 19), 3 * 10 * 19 + 3 * 10 * 3 + 3 * 2 * 4),
    ],
)
def test_shapes_and_sizes(name, scales, values, nbytes):
    array = array_of(name)
    assert array.shape == (3, 10, 37) and array.ndim == 3 and array.size == 3 * 10 * 37 and len(array) == 3
    assert array.scales.shape == scales and array.values.shape == values and array.nbytes == nbytes
    assert array.dtype == jnp.dtype(SPECS[name].dtype) and array.columns == (
        37 if SPECS[name].codes_per_value == 2 else None
    )
    shapes = jax.eval_shape(lambda a: a, array)
    assert shapes.shape == array.shape and shapes.nbytes == nbytes and shapes.validate() is shapes


@pytest.mark.parametrize("name", SOME)
def test_experts_go_with_their_scales(name):
    array = array_of(name)
    whole = np.asarray(value(array))
    for index in (1, -1, slice(1, 3), np.array([2, 0]), jnp.array([1, 1]), np.int64(2)):
        part = array[index].validate()
        np.testing.assert_array_equal(value(part), whole[index])
    assert [expert.shape for expert in array] == [(10, 37)] * 3
    traced = jax.jit(lambda a, i: a[i].dequantize())(array, 2)
    np.testing.assert_array_equal(traced, whole[2])


def test_indices_that_would_part_rows_from_their_scales():
    array = array_of()
    for index in ((0, 1), None, ..., (slice(None), 0)):
        with pytest.raises(IndexError, match="first axis alone"):
            array[index]
    for index in (3, -4):
        with pytest.raises(IndexError, match=f"{index} is out of range for 3 experts"):
            array[index]
    with pytest.raises(IndexError, match=r"\(10, 37\) is one matrix.*slice_rows"):
        array[0][0]


@pytest.mark.parametrize("name", SOME)
def test_round_trips(name):
    array = array_of(name)
    leaves, structure = jax.tree.flatten(array)
    named = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(array)}
    last = ".global_scale" if name == "nvfp4" else ".zero_points"
    assert list(named) == [".values", ".scales", last][: len(leaves)]
    host = jax.tree.map(np.asarray, array)
    for copy in (
        pickle.loads(pickle.dumps(array)),
        jax.tree.unflatten(structure, leaves),
        jax.tree.unflatten(structure, named.values()),  # as checkpointing libraries do
        jax.jit(lambda a: a)(array),
        host,
        pickle.loads(pickle.dumps(host)),
    ):
        assert_same(copy, array)
    assert pickle.loads(pickle.dumps(structure)) == structure


def test_formats_tell_structures_apart():
    array = array_of()
    assert jax.tree.structure(array) != jax.tree.structure(dataclasses.replace(array, halves=1))
    assert jax.tree.structure(array) != jax.tree.structure(array_of("fp8 block"))


@pytest.mark.parametrize("name", SOME)
def test_vmap_over_experts(name):
    array, x = array_of(name), normal(1, NUM, 4, COLUMNS)
    product = jax.vmap(lambda a, x: x @ a.dequantize().T)(array, x)
    np.testing.assert_allclose(product, x @ np.swapaxes(value(array), 1, 2), rtol=1e-5, atol=1e-5)
    made = jax.vmap(lambda w: quantization.quantize(w, SPECS[name], halves=2))(normal(0, NUM, ROWS, COLUMNS))
    assert_same(made, array)


@pytest.mark.parametrize("name", SOME)
def test_shard_map_and_scan_over_experts(name):
    array = array_of(name)
    mesh = jax.make_mesh((1,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("expert")
    back = jax.jit(jax.shard_map(lambda a: a.dequantize(), mesh=mesh, in_specs=spec, out_specs=spec))(array)
    np.testing.assert_array_equal(back, value(array))
    _, stacked = jax.lax.scan(lambda carry, expert: (carry, expert.dequantize()), None, array)
    np.testing.assert_array_equal(stacked, value(array))


def test_other_things_in_the_places_of_arrays():
    array = array_of("int4 group zp")
    specs = jax.tree.map(lambda leaf: PartitionSpec("expert"), array)
    assert isinstance(specs, QuantizedArray) and specs.zero_points == PartitionSpec("expert")
    weights = ExpertWeights(w13=array, w2=array)
    assert weights.num_local_experts == 3 and len(jax.tree.leaves(weights)) == 6
    assert jax.tree.map(lambda leaf: leaf[1:], weights).w13.shape == (2, 10, 37)


def test_padded_storage_does_not_count():
    for name in (*SOME, "int4 group"):
        array = array_of(name)
        padded = pad_columns(array, 16).validate()
        assert padded.shape == array.shape and padded.values.shape[-1] == 48 // SPECS[name].codes_per_value
        np.testing.assert_array_equal(value(padded), value(array))
        np.testing.assert_array_equal(oracle.bits(padded.codes()), oracle.bits(array.codes()))
        # The codes that fill up stand for zero with any scale of their row.
        everything = dataclasses.replace(padded, columns=None)
        zero = 8 if "int4" in name else 0
        if array.zero_points is not None:
            zero = np.asarray(array.zero_points)[..., -1:]
        assert (np.asarray(everything.codes()).astype(np.float32)[..., 37:] == zero).all()
        assert pad_columns(padded, 16) is not None and pad_columns(array, 1) is array


REFUSED = {
    "one axis": (ValueError, dict(values=jnp.zeros(4, jnp.int8)), ["[..., N, K]", "(4,)"]),
    "dtype": (TypeError, dict(values=jnp.zeros((8, 16))), ["w.values is float32", "int8"]),
    "dtype of scales": (TypeError, dict(scales=jnp.zeros(8, "bfloat16")), ["w.scales is bfloat16", "float32"]),
    "shape of scales": (ValueError, dict(scales=jnp.zeros((8, 1))), ["w.scales", "(8, 1)", "(8,)", "'channel'"]),
    "too many columns": (ValueError, dict(columns=17), ["columns=17", "[0, 16]"]),
    "zero points": (ValueError, dict(zero_points=jnp.zeros(8, jnp.uint8)), ["has zero_points", "asymmetric=False"]),
    "halves": (ValueError, dict(halves=2, values=jnp.zeros((7, 16), jnp.int8)), ["7 rows", "halves"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_parts_that_do_not_fit(name):
    error, changes, words = REFUSED[name]
    good = QuantizedArray(jnp.zeros((8, 16), jnp.int8), jnp.zeros(8), spec=Spec("int8", "channel"))
    assert good.validate() is good
    with pytest.raises(error) as caught:
        dataclasses.replace(good, **changes).validate("w")
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


def test_zero_points_that_do_not_fit():
    good = array_of("int4 group zp")
    with pytest.raises(ValueError, match="no zero_points.*asymmetric=True"):
        dataclasses.replace(good, zero_points=None).validate()
    with pytest.raises(TypeError, match="zero_points is int32.*uint8"):
        dataclasses.replace(good, zero_points=good.zero_points.astype("int32")).validate()
    with pytest.raises(ValueError, match=r"zero_points has shape \(3, 10, 2\), but must be \(3, 10, 3\)"):
        dataclasses.replace(good, zero_points=good.zero_points[..., :2]).validate()
