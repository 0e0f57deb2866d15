"""Weights as pytrees: what jit, vmap, grad and checkpointing libraries do with them."""

import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from moe_jax.types import ExpertWeights, MoELayerWeights, SharedExpertWeights, TopK


def experts(bias=False):
    make = lambda *shape: jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)  # noqa: E731
    return ExpertWeights(make(3, 4, 5), make(3, 5, 2), make(3, 4) if bias else None, make(3, 5) if bias else None)


def test_missing_parts_are_no_leaves():
    assert len(jax.tree.leaves(experts())) == 2
    assert len(jax.tree.leaves(experts(bias=True))) == 4
    layer = MoELayerWeights(
        experts(), jnp.zeros((3, 5)), shared=SharedExpertWeights(jnp.zeros((4, 5)), jnp.zeros((5, 2)))
    )
    assert len(jax.tree.leaves(layer)) == 5


def test_leaves_are_named_by_their_fields():
    layer = MoELayerWeights(experts(), jnp.zeros((3, 5)), correction_bias=jnp.zeros(3))
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(layer)]
    assert names == [".experts.w13", ".experts.w2", ".router", ".correction_bias"]


def test_input_scales_go_with_their_experts():
    scaled = dataclasses.replace(experts(), w13_input_scale=jnp.arange(3.0), w2_input_scale=jnp.arange(3.0, 6.0))
    assert len(jax.tree.leaves(scaled)) == 4
    mine = jax.tree.map(lambda leaf: leaf[jnp.array([2, 0])], scaled)
    assert (mine.w13_input_scale.tolist(), mine.w2_input_scale.tolist()) == ([2, 0], [5, 3])


def test_round_trips():
    layer = MoELayerWeights(experts(bias=True), jnp.ones((3, 5)))
    for copy in (
        pickle.loads(pickle.dumps(layer)),
        jax.tree.unflatten(jax.tree.structure(layer), jax.tree.leaves(layer)),
    ):
        assert jax.tree.structure(copy) == jax.tree.structure(layer)
        jax.tree.map(np.testing.assert_array_equal, copy, layer)


def test_transformations():
    weights = experts()
    total = lambda w: jnp.sum(w.w13) + 2.0 * jnp.sum(w.w2)  # noqa: E731
    gradient = jax.jit(jax.grad(total))(weights)
    assert isinstance(gradient, ExpertWeights) and float(gradient.w2[0, 0, 0]) == 2.0
    per_expert = jax.vmap(total, in_axes=(ExpertWeights(0, 0),))(weights)
    np.testing.assert_allclose(jnp.sum(per_expert), total(weights))


def test_other_things_in_the_places_of_arrays():
    shapes = jax.eval_shape(lambda w: w, experts())
    assert isinstance(shapes, ExpertWeights) and shapes.num_local_experts == 3
    specs = jax.tree.map(lambda w: PartitionSpec("expert"), experts())
    assert specs == ExpertWeights(PartitionSpec("expert"), PartitionSpec("expert"))


def test_topk_unpacks_as_ids_and_weights():
    ids, weights = TopK(ids=jnp.zeros((2, 1), jnp.int32), weights=jnp.ones((2, 1)))
    assert ids.dtype == jnp.int32 and weights.dtype == jnp.float32
    assert len(jax.tree.leaves(TopK(ids, weights))) == 2
